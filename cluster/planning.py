"""`rayward plan` and --dry-run: what a command would do, without starting or writing anything."""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cluster.checks import check_config
from cluster.config import Config
from cluster.forecast import STEPS, Forecast, Site, forecast
from cluster.forecast_tables import as_json, tables
from cluster.hardware import Machine, described, gpu_named, measured_cores, this_machine
from cluster.placement import cluster_nodes
from cluster.session import start_ray

STEPS_OF = {
    "plan": STEPS,
    "quickstart": STEPS,
    "sft": ("sft",),
    "sample": ("sample",),
    "reward": ("reward",),
    "ppo": ("ppo",),
    "evaluate": ("ppo",),
}
"""Steps whose processes a command starts. One that is not here computes in its own process, on little memory."""


def plan(config: Config, run_dir: Path, command: str, as_data: bool) -> bool:
    """Print the plan of a command, as tables or (`as_data`) as JSON; returns whether it can work.

    Raises ValueError when the size of a model or the site is not known.
    """
    if command not in STEPS_OF:
        sys.stdout.write(f"rayward {command} starts no other process: there is nothing to plan\n")
        return True
    found = foresee(config, run_dir, command)
    if command != "plan" and not config.plan.nodes:  # what would stop the command at its start
        problems = (*found.problems, *check_config(config, command, run_dir).problems)
        found = replace(found, problems=tuple(dict.fromkeys(problems)))
    if as_data:
        sys.stdout.write(json.dumps(as_json(found), indent=2) + "\n")
    else:
        Console(highlight=False, soft_wrap=True, markup=False).print(tables(found))
    return not found.problems


def foresee(config: Config, run_dir: Path, command: str = "plan") -> Forecast:
    """The forecast of a command at the described machines, else the cluster, else this machine."""
    return forecast(config, site(config), STEPS_OF[command], run_dir)


def site(config: Config) -> Site:
    """Where the run would run."""
    nodes, address = config.plan.nodes, config.cluster.address
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
        return Site(title=title, machines=tuple(machines), local=len(machines) == 1 and address == "local")
    if address == "local":
        machine = this_machine()
        title = f"this machine: {machine.cpus} cores, {machine.memory / 2**30:.1f} GiB, {machine.gpus} GPUs"
        return Site(title=title, machines=(machine,), local=True)
    found = live_machines(address)
    return Site(title=f"the cluster at {address}: {len(found)} machines", machines=tuple(found), local=False)


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
