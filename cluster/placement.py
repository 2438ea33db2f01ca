"""The machines of the connected cluster, and a bundle on them for each process: all, or one refused by name."""

import dataclasses
from collections.abc import Sequence

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.resources import Process, ResourceError


class Placement:
    """Reserved bundles of a cluster, one for each process."""

    def __init__(self, group: PlacementGroup, names: Sequence[str]) -> None:
        self._group = group
        self._names = list(names)

    def bundle(self, name: str) -> PlacementGroupSchedulingStrategy:
        """Where the process called `name` goes, for ActorOptions.placement. Raises: ValueError."""
        return PlacementGroupSchedulingStrategy(self._group, self._names.index(name))

    def release(self) -> None:
        """Give the bundles back; what still runs in them is killed."""
        if ray.is_initialized():
            remove_placement_group(self._group)


def place(
    processes: Sequence[Process], *, deadline_s: float, strategy: str = "PACK", autoscaling: bool = False
) -> Placement:
    """Reserve a bundle for every process on the connected cluster, all of them or none.

    A bundle larger than every machine is refused at once, unless the cluster can grow (`autoscaling`).

    Raises: ResourceError naming the bundle that cannot be placed and what the cluster has.
    """
    if not autoscaling:
        _check_bundles(processes)
    bundles = [{"CPU": p.cpus, "GPU": p.gpus} if p.gpus else {"CPU": p.cpus} for p in processes]
    group = placement_group(bundles, strategy=strategy)
    if not group.wait(deadline_s):
        remove_placement_group(group)
        _check_bundles(processes)
        each = ", ".join(f"{p.name}: {p.cpus:g} CPUs, {p.gpus:g} GPUs" for p in processes)
        raise ResourceError(
            f"no room for the bundles ({each}) with strategy {strategy} within {deadline_s:g} s. The cluster "
            f"has {_nodes_text()}; free now: {_free_text()}. Stop what else runs on it, ask for less, or add "
            "machines"
        )
    return Placement(group, [process.name for process in processes])


def check_cluster(processes: Sequence[Process]) -> None:
    """Refuse processes that the connected cluster cannot hold, rather than wait for machines that will not come.

    Raises: ResourceError naming the process that no machine has room for, or the sum and what there is.
    """
    _check_bundles(processes)
    nodes = _nodes()
    needs = sum(process.cpus for process in processes), sum(process.gpus for process in processes)
    if needs[0] > sum(cpus for _, cpus, _ in nodes) or needs[1] > sum(gpus for _, _, gpus in nodes):
        raise ResourceError(
            f"the processes need {needs[0]:g} CPUs and {needs[1]:g} GPUs, and the cluster has {_nodes_text()}. Use "
            "fewer generators or learner ranks, or add machines"
        )


def _check_bundles(processes: Sequence[Process]) -> None:
    for process in processes:
        if not any(cpus >= process.cpus and gpus >= process.gpus for _, cpus, gpus in _nodes()):
            raise ResourceError(
                f"the bundle of {process.name!r} needs {process.cpus:g} CPUs and {process.gpus:g} GPUs "
                f"on one machine, and no machine has that. The cluster has {_nodes_text()}. Ask for less, or "
                "add a larger machine"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A live machine of the connected cluster."""

    address: str
    """where it is"""
    cpus: float
    """logical CPUs that Ray was told of"""
    gpus: float
    """GPUs"""
    memory: float
    """bytes of main memory, object store included"""
    accelerator: str | None
    """kind of its GPUs as Ray names it, such as H100"""


def cluster_nodes() -> list[Node]:
    """Every live machine of the connected cluster."""
    kind = "accelerator_type:"
    return [
        Node(
            address=node["NodeManagerAddress"],
            cpus=has.get("CPU", 0.0),
            gpus=has.get("GPU", 0.0),
            memory=has.get("memory", 0.0) + has.get("object_store_memory", 0.0),
            accelerator=next((name.removeprefix(kind) for name in has if name.startswith(kind)), None),
        )
        for node in ray.nodes()
        if node["Alive"]
        for has in (node["Resources"],)
    ]


def _nodes() -> list[tuple[str, float, float]]:
    """(address, CPUs, GPUs) of every live machine of the cluster."""
    return [(node.address, node.cpus, node.gpus) for node in cluster_nodes()]


def _nodes_text() -> str:
    return "; ".join(f"{address}: {cpus:g} CPUs, {gpus:g} GPUs" for address, cpus, gpus in _nodes())


def _free_text() -> str:
    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs"
