"""Which process goes on which machine."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from cluster.config.schema import Config
from cluster.runtime.resources import Plan, Process, plan_machine

_EPSILON = 1e-6


class Node(Protocol):
    """A machine as far as bundles are concerned."""

    @property
    def name(self) -> str: ...

    @property
    def cpus(self) -> float: ...

    @property
    def gpus(self) -> float: ...


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
    """No process has more than `most` threads; each reserves those that it has."""
    bounds = [min(process.threads, most) for process in plan.processes]
    bounded = [replace(p, threads=n, cpus=n, pin=None) for p, n in zip(plan.processes, bounds, strict=True)]
    return replace(plan, processes=tuple(bounded))


def place_processes(processes: Sequence[Process], machines: Sequence[AnyNode], by_cpus: bool) -> Placed[AnyNode]:
    """Put processes on machines as Ray's PACK does: the largest first, on the emptiest machine, and with it what fits.

    A bundle is never split over machines, so the GPUs of one tensor-parallel generator are neighbours. `by_cpus`:
    cores are reserved too; on one machine of its own a run's processes take turns on them. Among machines with as much
    room Ray may choose another than the first.
    """
    free = {machine.name: dict.fromkeys(range(int(machine.gpus)), 1.0) for machine in machines}
    cores = {machine.name: float(machine.cpus) for machine in machines}
    at: dict[str, tuple[Process, AnyNode]] = {}
    devices: dict[str, tuple[str, ...]] = {}
    unplaced = []

    def chosen(process: Process, machine: AnyNode) -> list[int] | None:
        found = _devices(free[machine.name], process.gpus)
        return None if by_cpus and process.cpus > cores[machine.name] + _EPSILON else found

    left, empty = sorted(processes, key=lambda one: (-one.gpus, -one.cpus)), list(machines)
    while left:
        first = left[0]
        room = [machine for machine in empty if chosen(first, machine) is not None]
        if not room:
            unplaced.append(_no_room(left.pop(0), machines, free, cores if by_cpus else None))
            continue
        machine = max(room, key=lambda one: _left_over(first, one))
        for process in tuple(left):
            if (gpus := chosen(process, machine)) is not None:
                for gpu in gpus:
                    free[machine.name][gpu] -= min(process.gpus, 1.0)
                cores[machine.name] -= process.cpus
                at[process.name] = (process, machine)
                devices[process.name] = tuple(f"{machine.name}/gpu-{gpu}" for gpu in gpus)
                left.remove(process)
        empty.remove(machine)
    order = {process.name: index for index, process in enumerate(processes)}
    return Placed(at=dict(sorted(at.items(), key=lambda one: order[one[0]])), devices=devices, unplaced=tuple(unplaced))


def _left_over(process: Process, machine: Node) -> float:
    """Share of an empty machine that a bundle leaves free, added up over what it asks for."""
    needs = ((process.gpus, machine.gpus), (process.cpus, machine.cpus))
    return sum((has - need) / has for need, has in needs if need and has)


def _devices(free: Mapping[int, float], gpus: float) -> list[int] | None:
    """GPUs for a bundle: whole ones, or the fullest that still has room for a part of one; None without."""
    if not gpus:
        return []
    if gpus < 1:
        room = [gpu for gpu, part in free.items() if part >= gpus - _EPSILON]
        return [min(room, key=lambda gpu: (free[gpu], gpu))] if room else None
    whole = [gpu for gpu, part in free.items() if part > 1 - _EPSILON]
    return whole[: round(gpus)] if len(whole) >= gpus else None


def _no_room(
    process: Process,
    machines: Sequence[Node],
    free: Mapping[str, Mapping[int, float]],
    cores: Mapping[str, float] | None,
) -> str:
    left = "; ".join(
        f"{machine.name}: {sum(free[machine.name].values()):g} of {machine.gpus:g} GPUs"
        + (f", {cores[machine.name]:g} of {machine.cpus:g} CPUs" if cores else "")
        for machine in machines[:8]
    )
    more = f"; and {len(machines) - 8} more machines" if len(machines) > 8 else ""
    most = max((sum(part > 1 - _EPSILON for part in parts.values()) for parts in free.values()), default=0)
    nearest = f"a process of {most} GPUs, " if process.gpus > 1 and most else ""
    return (
        f"the bundle of {process.name!r} needs {process.gpus:g} GPUs and {process.cpus:g} CPUs on one machine, and "
        f"after the bundles before it there are free {left}{more}. Nearest: {nearest}fewer generators, learner "
        "ranks or reward replicas, a smaller generator.tensor_parallel_size, or one more machine"
    )
