"""Which process goes on which machine."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from cluster.config.schema import Config
from cluster.runtime.resources import Plan, Process, plan_machine

_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine as far as bundles are concerned."""

    name: str
    """its address, and the start of its id where several have the same; or a name of our own"""
    cpus: float
    """logical CPUs"""
    gpus: float
    """GPUs"""
    memory: float
    """bytes of main memory; of a live machine with Ray's object store"""


AnyNode = TypeVar("AnyNode", bound=Node)


@dataclass(frozen=True, kw_only=True)
class Placed(Generic[AnyNode]):
    """Where processes go."""

    at: Mapping[str, tuple[Process, AnyNode]]
    """process and machine by the process' name"""
    devices: Mapping[str, tuple[str, ...]]
    """names of the GPUs that it uses, by its name; none without GPUs"""
    unplaced: tuple[str, ...]
    """why a bundle has no place, one text a bundle"""


def plan_cluster(config: Config, machines: Sequence[Node]) -> Plan:
    """The plan of a run on a cluster, whose CPUs are reserved for as long as a process lives.

    On several machines every process has cores of its own, as nobody knows who will be neighbours: at most as many
    threads as let each bundle have a place (one, where there is no place even so). On a single machine processes take
    turns, as without a cluster, and each reserves its share of the CPUs. Nothing is pinned, since other work may be
    there. Raises ValueError for a cluster without CPUs.
    """
    cores = sum(int(machine.cpus) for machine in machines)
    whole = plan_machine(config, cores, sum(int(machine.gpus) for machine in machines))
    if len(machines) == 1:
        share = min(1.0, cores / whole.cpus)
        cpus = {one.name: math.floor(1e4 * one.cpus * share) / 1e4 for one in whole.processes}
        return replace(whole, processes=tuple(replace(p, cpus=cpus[p.name], pin=None) for p in whole.processes))
    most = min(max(int(machine.cpus) for machine in machines), max(process.threads for process in whole.processes))
    for threads in range(most, 1, -1):
        plan = _bounded(whole, threads)
        if not place_processes(plan.processes, machines, by_cpus=True).unplaced:
            return plan
    return _bounded(whole, 1)


def _bounded(plan: Plan, most: int) -> Plan:
    """No process has more than `most` threads; each reserves those that it has, and nobody waits for a turn."""
    bounds = [min(process.threads, most) for process in plan.processes]
    bounded = [replace(p, threads=n, cpus=n, pin=None) for p, n in zip(plan.processes, bounds, strict=True)]
    return replace(plan, processes=tuple(bounded), concurrent={"compute": tuple(one.name for one in bounded)})


def place_processes(processes: Sequence[Process], machines: Sequence[AnyNode], by_cpus: bool) -> Placed[AnyNode]:
    """Put processes on machines as Ray's PACK does: the largest first, on the emptiest machine, and with it what fits.

    A bundle is never split over machines, so the GPUs of one tensor-parallel generator are neighbours. `by_cpus`:
    cores are reserved too; on one machine of its own a run's processes take turns on them. Among machines with as much
    room Ray may choose another than the first.
    """
    gpus = {machine.name: [1.0] * int(machine.gpus) for machine in machines}
    cores = {machine.name: machine.cpus if by_cpus else math.inf for machine in machines}
    at: dict[str, tuple[Process, AnyNode]] = {}
    devices: dict[str, tuple[str, ...]] = {}
    unplaced = []

    def chosen(process: Process, machine: AnyNode) -> list[int] | None:
        fits = process.cpus <= cores[machine.name] + _EPSILON
        return _devices(gpus[machine.name], process.gpus) if fits else None

    left, empty = sorted(processes, key=lambda one: (-one.gpus, -one.cpus)), list(machines)
    while left:
        first = left[0]
        room = [machine for machine in empty if chosen(first, machine) is not None]
        if not room:
            unplaced.append(_no_room(left.pop(0), machines, gpus, cores))
            continue
        machine = max(room, key=lambda one: _left_over(first, one))
        for process in tuple(left):
            if (found := chosen(process, machine)) is not None:
                for gpu in found:
                    gpus[machine.name][gpu] -= min(process.gpus, 1.0)
                cores[machine.name] -= process.cpus
                at[process.name] = (process, machine)
                devices[process.name] = tuple(f"{machine.name}/gpu-{gpu}" for gpu in found)
                left.remove(process)
        empty.remove(machine)
    at = {process.name: at[process.name] for process in processes if process.name in at}
    return Placed(at=at, devices=devices, unplaced=tuple(unplaced))


def _left_over(process: Process, machine: Node) -> float:
    """Share of an empty machine that a bundle leaves free, added up over what it asks for."""
    needs = ((process.gpus, machine.gpus), (process.cpus, machine.cpus))
    return sum((has - need) / has for need, has in needs if need and has)


def _devices(free: Sequence[float], gpus: float) -> list[int] | None:
    """GPUs for a bundle: whole ones, or the fullest that still has room for a part of one; None without."""
    if 0 < gpus < 1:
        room = [gpu for gpu, part in enumerate(free) if part >= gpus - _EPSILON]
        return [min(room, key=lambda gpu: free[gpu])] if room else None
    whole = [gpu for gpu, part in enumerate(free) if part > 1 - _EPSILON]
    return whole[: round(gpus)] if len(whole) >= gpus else None


def _no_room(
    process: Process, machines: Sequence[Node], gpus: Mapping[str, Sequence[float]], cores: Mapping[str, float]
) -> str:
    def left(machine: Node) -> str:
        free = f"{machine.name}: {sum(gpus[machine.name]):g} of {machine.gpus:g} GPUs"
        has = cores[machine.name]
        return free if has == math.inf else f"{free}, {has:g} of {machine.cpus:g} CPUs"

    free = "; ".join(map(left, machines[:8])) + (f"; and {len(machines) - 8} more machines" if machines[8:] else "")
    most = max((sum(part > 1 - _EPSILON for part in parts) for parts in gpus.values()), default=0)
    nearest = f"a process of {most} GPUs, " if process.gpus > 1 and most else ""
    return (
        f"the bundle of {process.name!r} needs {process.gpus:g} GPUs and {process.cpus:g} CPUs on one machine, and "
        f"after the bundles before it there are free {free}. Nearest: {nearest}fewer generators, learner "
        "ranks or reward replicas, a smaller generator.tensor_parallel_size, or one more machine"
    )
