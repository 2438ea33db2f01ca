"""The machines of the connected cluster, and a bundle on them for each process: all, or one refused by name."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

import ray
import ray._private.state
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config.schema import Config
from cluster.runtime.exit_codes import FAILED
from cluster.runtime.fitting import Node, place_processes, plan_cluster
from cluster.runtime.resources import Plan, Process, ResourceError, check
from cluster.runtime.signals import Stopped


class Placement:
    """Reserved bundles of a cluster, one for each process, given back at the end of a `with` block."""

    def __init__(self, group: PlacementGroup, names: Sequence[str]) -> None:
        self._group = group
        self._names = list(names)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not (isinstance(error, Stopped) and error.code == FAILED):  # Ray is lost, and would not answer
            self.release()

    def bundle(self, name: str) -> PlacementGroupSchedulingStrategy | None:
        """Where the process called `name` goes, for `remote`; None for one that has no bundle.

        Who comes after a process that has died goes to the same bundle. Ray moves it when its machine is lost.
        """
        return PlacementGroupSchedulingStrategy(self._group, self._names.index(name)) if name in self._names else None

    def release(self) -> None:
        """Give the bundles back; what still runs in them is killed."""
        if ray.is_initialized():
            remove_placement_group(self._group)


def place(processes: Sequence[Process], *, deadline_s: float) -> Placement:
    """Reserve a bundle for every process on the connected cluster, all of them or none, on few machines.

    What the cluster could not hold if it were empty is refused at once. Raises: ResourceError naming the bundle that
    has no place and what the cluster has.
    """
    nodes = cluster_nodes()
    if never := place_processes(processes, nodes, by_cpus=True).unplaced:
        raise ResourceError(f"{never[0]}. The cluster has {_text(nodes)}")
    bundles = [{"CPU": p.cpus, "GPU": p.gpus} if p.gpus else {"CPU": p.cpus} for p in processes]
    group = placement_group(bundles, strategy="PACK")
    placement, placed = Placement(group, [process.name for process in processes]), False
    try:
        placed = group.wait(deadline_s)
        if not placed:
            raise ResourceError(_no_room(processes, deadline_s))
    finally:
        if not placed:
            placement.release()
    return placement


def plan_live(config: Config) -> Plan:
    """The plan of a run on the connected cluster. Raises ResourceError where one machine has too few cores for it."""
    nodes = cluster_nodes()
    plan = plan_cluster(config, nodes)
    if len(nodes) == 1:
        check(plan, cores=int(nodes[0].cpus), gpus=nodes[0].gpus)
    return plan


def _no_room(processes: Sequence[Process], deadline_s: float) -> str:
    nodes = cluster_nodes()
    free = _free(nodes)
    without = place_processes(processes, free, by_cpus=True).unplaced
    which = without[0] if without else "all bundles would fit by now, and Ray has not placed them"
    each = ", ".join(f"{p.name}: {p.cpus:g} CPUs, {p.gpus:g} GPUs" for p in processes)
    return (
        f"no room for the bundles ({each}) within {deadline_s:g} s (cluster.start_deadline_s): {which}. The cluster "
        f"has {_text(nodes)}; free now: {_text(free)}. Or stop what else runs on it"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterNode(Node):
    """A live machine of the connected cluster, as Ray was told of it."""

    id: str
    """what Ray calls it"""
    accelerator: str | None
    """kind of its GPUs as Ray names it, such as H100"""


def cluster_nodes() -> list[ClusterNode]:
    """Every live machine of the connected cluster."""
    kind = "accelerator_type:"
    live = [node for node in ray.nodes() if node["Alive"]]
    at = Counter(node["NodeManagerAddress"] for node in live)

    def name(node: dict[str, Any]) -> str:
        address = node["NodeManagerAddress"]
        return address if at[address] == 1 else f"{address} ({node['NodeID'][:8]})"

    return [
        ClusterNode(
            id=node["NodeID"],
            name=name(node),
            cpus=has.get("CPU", 0.0),
            gpus=has.get("GPU", 0.0),
            memory=has.get("memory", 0.0) + has.get("object_store_memory", 0.0),
            accelerator=next((name.removeprefix(kind) for name in has if name.startswith(kind)), None),
        )
        for node in live
        for has in (node["Resources"],)
    ]


def _free(nodes: Sequence[ClusterNode]) -> list[ClusterNode]:
    """The same machines with what nobody has reserved."""
    state: Any = ray._private.state
    free = state.available_resources_per_node()
    return [
        dataclasses.replace(node, cpus=has.get("CPU", 0.0), gpus=has.get("GPU", 0.0))
        for node in nodes
        for has in (free.get(node.id, {}),)
    ]


def _text(nodes: Sequence[ClusterNode]) -> str:
    return "; ".join(f"{node.name}: {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in nodes)
