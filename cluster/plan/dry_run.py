"""`rayward plan` and --dry-run: what a command would do, as tables or JSON, without starting or writing anything."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.config.schema import Config, TrackingConfig
from cluster.pipeline.job import Job
from cluster.pipeline.stage import Stage, preflight
from cluster.pipeline.stages import STAGES
from cluster.plan.check import check_config
from cluster.plan.forecast import Forecast, forecast
from cluster.plan.machines import site_of
from cluster.plan.memory import Bytes, kinds, total
from cluster.rundir.lock import at_work
from cluster.rundir.record import Start
from cluster.runtime.resources import GIB
from cluster.tracking.console import duration
from cluster.tracking.tracker import Tracker
from reward_server.redaction import shown

_MEASURED = (
    "Estimates, without start-up, saving and held-out measurements. On GPUs none of this has been measured; on "
    "CPUs a learner rank's memory was within 25 %, and the phases of one quickstart took 0.8 to 1.8 times as long."
)


def plan(config: Config, run_dir: Path, command: str, as_data: bool) -> bool:
    """Print the plan of a run, as tables or (`as_data`) as JSON; returns whether it can work.

    Raises ValueError when the size of a model or the machines are not known.
    """
    found = foresee(config, run_dir, command)
    return _show(as_json(found), found, [], as_data)


def dry_run(config: Config, run_dir: Path, command: str, flags: Set[str]) -> bool:
    """Print what a stage would do, read and write, and what would stop it; returns whether it could start.

    Raises ValueError as `plan` does.
    """
    found, said = None, [STAGES[command].files.replace("RUN/", f"{run_dir}/")]
    tracker = Tracker(run_dir, TrackingConfig(mode="disabled"), command)  # is never entered, so it writes nothing
    start: Start = "resume" if "resume" in flags else "restart" if "restart" in flags else "new"
    stage = STAGES[command](Job(config=config, run_dir=run_dir, tracker=tracker, start=start))
    # The models and files of described machines are not here.
    problems = [] if config.plan.nodes else _problems(stage)
    reads = _reads(stage, whole=not (problems or config.plan.nodes))
    data = {"command": command, "works": not problems, "problems": problems, "processes": []}
    if kinds(type(stage)):
        try:
            found = foresee(config, run_dir, command)
            told = [one for one in problems if not any(other.startswith(one) for other in found.problems)]
            data = as_json(replace(found, problems=[*found.problems, *told]))
        except ValueError as error:  # such as a model that is not there, which the checks tell better
            if not problems:
                raise
            problems.append(str(error))
    else:
        said.insert(0, f"rayward {command} works in its own process and starts no other.")
    told = [f"reads {key}: {path}" for key, path in reads.items()]
    return _show(data | {"files": said[-1], "reads": reads}, found, [*said, *told], "json" in flags)


def foresee(config: Config, run_dir: Path, command: str = "plan") -> Forecast:
    """The forecast of a command at the described machines, else the cluster, else this machine."""
    stage = STAGES.get(command, STAGES["quickstart"])  # which has the parts of a whole run
    # `rayward serve` of a single copy always computes on this machine.
    site = site_of(config, local="serve" in stage.sections and not config.serve.on_ray)
    return forecast(config, site, command, [STAGES[name] for name in stage.parts or (command,)], run_dir)


def _reads(stage: Stage, whole: bool) -> dict[str, str]:
    """The path, or hub id, of each model and file that a stage reads, by its key; `whole`: it has read them."""
    config, own, found = stage.job.config, stage.job.run_dir, dict[str, Any]()
    for one in [STAGES[part] for part in stage.parts] or [type(stage)]:
        found |= {f"models.{name}": getattr(config.models, name) or own / name for name in one.models(config)}
        names = one.data(config)
        found |= {f"data.{name}": getattr(config.data, name) or own / "data" / f"{name}.jsonl" for name in names}
    if "scoring" in stage.sections:
        found |= {f"scoring.parts: {one.name}": one.target for one in config.scoring.parts if one.kind == "model"}
    found = {
        key: path for key, path in found.items() if path and (own not in Path(path).parents or os.path.exists(path))
    }
    found |= stage.made_of()[1] if whole else {}
    return {key: os.path.abspath(path) if os.path.exists(path) else str(path) for key, path in found.items()}


def _problems(stage: Stage) -> list[str]:
    """What would stop a stage, in words: its settings, files and models, or what the run directory holds already."""
    job = stage.job
    problems = [*filter(None, [at_work(job.run_dir)]), *check_config(job.config, type(stage), job.run_dir).problems]
    if problems:
        return problems
    try:
        preflight(stage)
    except (ValueError, OSError) as error:
        return str(error).splitlines()
    return []


def _show(data: Mapping[str, Any], found: Forecast | None, said: Sequence[str], as_data: bool) -> bool:
    """Print JSON, or tables, sentences and a verdict; returns whether it works."""
    if as_data:
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
        return data["works"]
    console = Console(highlight=False, markup=False)
    for title, columns, rows in _tables(found) if found else ():
        table = Table(header_style="dim", box=None, pad_edge=False, show_header=any(columns))
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index and title else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(title, style="bold")
        console.print(table)
    timed = found is not None and any(step.phases for step in found.steps)
    wrong, good = [f"cannot work: {one}" for one in data["problems"]], "This plan fits." if found else "It can start."
    verdict = [*wrong, f"{'This plan' if found else 'It'} cannot work as it stands." if wrong else good]
    # A terminal has these wrapped, and a file or pipe has them on a line each.
    for line in (*said, *[_MEASURED] * timed, *[f"note: {note}" for note in data.get("notes", ())], *verdict):
        console.print(shown(line), soft_wrap=not console.is_terminal)
    return data["works"]


def _tables(found: Forecast) -> Iterator[tuple[str, Sequence[str], Iterable[Sequence[str]]]]:
    """(title, columns, rows)"""
    models, device, lengths = found.models, found.site.machines[0].device, found.lengths
    heading = {
        "plan of": f"rayward {found.command}",
        "for": found.site.title,
        "device": f"{device.name}: {device.flops / 1e12:.3g} Tflop/s in bfloat16, {device.bandwidth / 1e9:,.0f} GB/s, "
        f"{device.memory / GIB:.1f} GiB ({device.source})",
        "model": f"{models.policy.name}: {models.policy.parameters:,} parameters",
        "reward model, critic": f"{models.reward.name}: {models.reward.value_parameters:,}",
        "tokens": f"{lengths.prompt:,} of a prompt, {lengths.response:,} of a response on average, "
        f"{lengths.longest:,} at most",
    }
    yield "", ("", ""), heading.items()
    for step in found.steps:
        if step.batches:
            counts = {name: number for name, number in step.batches.numbers.items() if number > 1}
            yield f"{step.name}: counts", ("", ""), ((name, f"{number:,}") for name, number in counts.items())
    yield "Who runs where", ("process", "on", "GPUs", "CPUs", "threads"), _processes(found)
    for step in found.steps:  # of each kind of process the first: its twins are alike
        if first := {name.partition("-")[0]: held for name, held in step.memory.items() if name.endswith("-0")}:
            yield f"{step.name}: memory of each process in GiB", ("", *first), _memory([*first.values()])
    if any(step.phases for step in found.steps):
        yield "Time", ("phase", "expect"), _times(found)


def _processes(found: Forecast) -> Iterator[Sequence[str]]:
    """Neighbours that differ in their number alone are one row."""
    at = {name: machine.name for name, (_, machine) in found.placed.at.items()}
    rows = Counter(
        (one.name.partition("-")[0], at.get(one.name, "no place"), f"{one.gpus:g}", f"{one.cpus:g}", f"{one.threads}")
        for one in found.plan.processes
    )
    for (kind, *more), number in rows.items():
        yield f"{number} x {kind}", *more
    yield "the command itself", found.site.machines[0].name, "0", "0", "1"


def _memory(columns: Sequence[Mapping[str, Bytes]]) -> Iterator[Sequence[str]]:
    """A column a process, a row an item."""
    for where, title in (("device", "on a GPU"), ("host", "in main memory")):
        rows = {
            item: [getattr(held.get(item, Bytes()), where) for held in columns] for held in columns for item in held
        }
        rows[f"together, {title}"] = [getattr(total(held), where) for held in columns]
        yield from ((item, *(f"{n / GIB:.2f}" if n else "" for n in row)) for item, row in rows.items() if any(row))


def _times(found: Forecast) -> Iterator[Sequence[str]]:
    for step in found.steps:
        yield from ((f"{step.name}: {phase}", duration(seconds)) for phase, seconds in step.phases.items())
        if step.times != 1:
            yield f"{step.name}: once", duration(step.seconds)
        yield f"{step.name}: {step.times:g} x", duration(step.times * step.seconds)
    yield "all of it", duration(sum(step.times * step.seconds for step in found.steps))


def as_json(found: Forecast) -> dict[str, Any]:
    """The same as data: bytes, seconds, counts."""
    data, at = asdict(found), {name: machine.name for name, (_, machine) in found.placed.at.items()}
    for step, fields in zip(found.steps, data["steps"], strict=True):
        fields["batches"] = step.batches and step.batches.numbers
    return {
        "works": not found.problems,
        **{key: data[key] for key in ("command", "problems", "notes", "site", "models", "lengths")},
        "processes": [asdict(one) | {"machine": at.get(one.name)} for one in found.plan.processes],
        "steps": {fields.pop("name"): fields for fields in data["steps"]},
    }
