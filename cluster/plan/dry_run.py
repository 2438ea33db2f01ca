"""`rayward plan` and --dry-run: what a command would do, without starting or writing anything."""

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.cli.audit import ledgers
from cluster.cli.commands import COMMANDS
from cluster.config.schema import Config, TrackingConfig
from cluster.fleet.scale import number_of
from cluster.pipeline.job import Job
from cluster.pipeline.stage import preflight
from cluster.pipeline.stages import STAGES
from cluster.plan.check import check_config
from cluster.plan.forecast import STEPS, Forecast, Site, forecast
from cluster.plan.hardware import Machine, described, gpu_named, measured_cores, this_machine
from cluster.plan.pace import pace_of
from cluster.plan.table import as_json, tables
from cluster.rundir.lineage import lineage_tree
from cluster.rundir.record import Start
from cluster.runtime.placement import cluster_nodes
from cluster.runtime.session import start_ray
from cluster.tracking.tracker import Tracker


def plan(config: Config, run_dir: Path, command: str, as_data: bool) -> bool:
    """Print the plan of a run, as tables or (`as_data`) as JSON; returns whether it can work.

    Raises ValueError when the size of a model or the site is not known.
    """
    return _show(foresee(config, run_dir, command), {}, as_data)


def dry_run(
    config: Config | None, run_dir: Path, command: str, flags: frozenset[str], arguments: tuple[str, ...]
) -> bool:
    """Print what a command would do, read and write, and what would stop it; returns whether it could start.

    Raises ValueError as `plan` does.
    """
    as_data = "json" in flags
    files = {"files": _named(COMMANDS[command].files, run_dir)}
    if config is None:
        return _show_alone(command, _problems_of_looking(command, run_dir, arguments), files, as_data)
    start: Start = "resume" if "resume" in flags else "restart" if "restart" in flags else "new"
    problems: tuple[str, ...] = ()
    if not config.plan.nodes:  # the models and files of described machines are not here
        problems = _problems(config, command, run_dir, start)
    if command not in STEPS:
        return _show_alone(command, problems, files, as_data)
    try:
        found = foresee(config, run_dir, command)
    except ValueError as error:  # such as a model that is not there, which the checks tell better
        if not problems:
            raise
        return _show_alone(command, (*problems, str(error)), files, as_data)
    return _show(replace(found, problems=tuple(dict.fromkeys((*found.problems, *problems)))), files, as_data)


def _problems(config: Config, command: str, run_dir: Path, start: Start) -> tuple[str, ...]:
    """What would stop a stage, in words: its settings, files and models, or what the run directory holds already."""
    if problems := check_config(config, STAGES[command], run_dir).problems:
        return problems
    tracker = Tracker(run_dir, TrackingConfig(mode="disabled"), command)  # is never entered, so it writes nothing
    try:
        preflight(STAGES[command](Job(config=config, run_dir=run_dir, tracker=tracker, start=start)))
    except (ValueError, OSError) as error:
        return tuple(str(error).splitlines())
    return ()


def foresee(config: Config, run_dir: Path, command: str = "plan") -> Forecast:
    """The forecast of a command at the described machines, else the cluster, else this machine."""
    return forecast(config, site(config, command), command, run_dir)


def _show(found: Forecast, files: Mapping[str, str], as_data: bool) -> bool:
    if as_data:
        sys.stdout.write(json.dumps(as_json(found) | dict(files), indent=2) + "\n")
        return not found.problems
    console = Console(highlight=False, markup=False)
    console.print(tables(found, files.get("files")))
    _lines(console, [*(f"note: {note}" for note in found.notes), *_verdict("This plan", "fits", found.problems)])
    return not found.problems


def _show_alone(command: str, problems: tuple[str, ...], files: Mapping[str, str], as_data: bool) -> bool:
    """Of a command that starts no process, or of which nothing can be planned."""
    if as_data:
        found = {"command": command, "works": not problems, "problems": problems, "processes": [], **files}
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return not problems
    alone = [] if command in STEPS else [f"rayward {command} works in its own process and starts no other."]
    _lines(Console(highlight=False, markup=False), [*alone, files["files"], *_verdict("It", "can start", problems)])
    return not problems


def _lines(console: Console, lines: Iterable[str]) -> None:
    """Sentences, which a terminal has wrapped and a file or pipe has on a line each."""
    for line in lines:
        console.print(line, soft_wrap=not console.is_terminal)


def _verdict(subject: str, good: str, problems: Sequence[str]) -> list[str]:
    end = "cannot work as it stands" if problems else good
    return [*(f"cannot work: {problem}" for problem in problems), f"{subject} {end}."]


def _named(files: str, run_dir: Path) -> str:
    """What a command says of its files, with the run directory's name."""
    return files.replace("RUN/", f"{run_dir}/")


def _problems_of_looking(command: str, run_dir: Path, arguments: tuple[str, ...]) -> tuple[str, ...]:
    """What would stop a command that takes a run directory alone."""
    try:
        if not run_dir.is_dir():
            raise ValueError(f"there is no run directory {run_dir}. Remedy: name one that a command has written")
        _LOOKS.get(command, lambda run_dir, *words: None)(run_dir, *arguments)
    except ValueError as error:
        return (str(error),)
    return ()


_LOOKS: dict[str, Callable[..., Any]] = {
    "scale": lambda run_dir, wanted: number_of(wanted),
    "audit": ledgers,
    "lineage": lineage_tree,
}


def site(config: Config, command: str = "plan") -> Site:
    """Where the run would run. `rayward serve` of a single copy always computes on this machine."""
    alone = command == "serve" and not config.serve.on_ray
    nodes, address, pace = config.plan.nodes, "local" if alone else config.cluster.address, pace_of(config)
    if nodes:
        bare = any(not node.gpus and not (node.device_tflops and node.device_gb_s) for node in nodes)
        machines = described(nodes, measured_cores() if bare else None)
        kinds = [
            f"{node.count} x {node.cpus} cores, {node.memory_gib:g} GiB"
            + (f", {node.gpus} {node.gpu or 'GPU'}" if node.gpus else "")
            for node in nodes
        ]
        other = "this machine" if address == "local" else f"the cluster at {address}"
        title = f"the machines in plan.nodes ({'; '.join(kinds)}); --plan.nodes '[]' plans for {other}"
        return Site(title=title, machines=tuple(machines), local=len(machines) == 1 and address == "local", pace=pace)
    if address == "local":
        machine = this_machine()
        title = f"this machine: {machine.cpus} cores, {machine.memory / 2**30:.1f} GiB, {machine.gpus} GPUs"
        return Site(title=title, machines=(machine,), local=True, pace=pace)
    found = live_machines(address)
    return Site(title=f"the cluster at {address}: {len(found)} machines", machines=tuple(found), local=False, pace=pace)


def live_machines(address: str) -> list[Machine]:
    """The machines of a running cluster. CPUs are those that Ray was told of; a machine's speed is this one's."""
    with tempfile.TemporaryDirectory() as logs, start_ray(address, cpus=0, log_dir=Path(logs)):
        nodes = cluster_nodes()
    cores = None if all(node.gpus for node in nodes) else measured_cores()
    found = []
    for node in nodes:
        device = gpu_named(node.accelerator or "") if node.gpus else cores
        if device is None:
            raise ValueError(
                f"nothing is known of the GPUs of {node.name} ({node.accelerator or 'of no named kind'}): describe "
                "the machines with --plan.nodes '[{count = 1, cpus = 16, memory_gib = 64, gpus = 1, gpu = \"L4\"}]'"
            )
        found.append(
            Machine(
                name=node.name,
                cpus=int(node.cpus),
                memory=int(node.memory),
                gpus=int(node.gpus),
                device=device,
            )
        )
    return found
