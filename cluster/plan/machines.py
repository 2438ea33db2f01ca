"""Machines to plan for: described ones, the cluster's, or this one, and how fast their devices are."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.config.schema import Config, NodeConfig
from cluster.rundir.environment import gpu_lines
from cluster.runtime.fitting import Node
from cluster.runtime.resources import GIB, machine_cores, machine_gpus, machine_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What computes in a process: a GPU, or the cores of a machine."""

    name: str
    """as it is called in tables"""
    flops: float
    """dense bfloat16 operations a second, a multiplication and an addition being two"""
    bandwidth: float
    """bytes a second that it reads from its memory"""
    memory: float
    """bytes of its memory; of cores, the machine's"""
    link: float
    """bytes a second, one way, to another device of the same machine"""
    source: str
    """where the figures are from"""


# NVIDIA's data sheets: dense bf16 tensor-core Tflop/s (float16 of V100 and T4), memory GB/s, memory a program sees in
# GiB, and to a neighbour half of NVLink's two-way GB/s, or of PCIe's where there is no NVLink.
GPUS = {
    name: Device(name=name, flops=f * 1e12, bandwidth=b * 1e9, memory=int(m * GIB), link=n * 1e9, source="data sheet")
    for name, f, b, m, n in (
        ("V100", 125, 900, 31.7, 150),
        ("T4", 65, 320, 14.6, 16),
        ("A10G", 70, 600, 22.0, 32),
        ("L4", 121, 300, 22.0, 32),
        ("RTX3090", 71, 936, 23.5, 32),
        ("RTX4090", 165, 1008, 23.5, 32),
        ("L40S", 362, 864, 44.5, 32),
        ("A100-40G", 312, 1555, 39.4, 300),
        ("A100", 312, 2039, 79.2, 300),
        ("H100", 989, 3350, 79.2, 450),
        ("H200", 989, 4800, 139.7, 450),
        ("B200", 2250, 8000, 178.0, 900),
    )
}


@dataclass(frozen=True, kw_only=True)
class Machine(Node):
    """One machine that processes can be put on, and what computes there."""

    device: Device
    """one of its GPUs; without any, all of its cores together"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a run would run."""

    title: str
    """in words"""
    machines: tuple[Machine, ...]
    """what there is"""
    local: bool
    """one machine whose processes take turns on its cores"""


def site_of(config: Config, local: bool = False) -> Site:
    """The described machines, else the cluster, else (or `local`) this machine. Raises ValueError for unknown GPUs."""
    address = "local" if local else config.cluster.address
    where = "this machine" if address == "local" else f"the cluster at {address}"
    if config.plan.nodes:
        machines = described(config.plan.nodes)
        where = f"the {len(machines)} machines in plan.nodes; --plan.nodes '[]' plans for {where}"
    else:
        machines = [this_machine()] if address == "local" else _live_machines(address)
    first, count = machines[0], len(machines)
    title = f"{where}: {count} x {first.cpus:g} cores, {first.memory / GIB:.1f} GiB, {first.gpus:g} GPUs"
    return Site(title=title, machines=tuple(machines), local=count == 1 and address == "local")


def gpu_named(text: str) -> Device:
    """The GPU that a name means, such as "NVIDIA H100 80GB HBM3"; the longest match wins. Raises ValueError."""
    plain = "".join(letter for letter in text.upper() if letter.isalnum())
    if "A100" in plain and "40G" in plain:
        return GPUS["A100-40G"]
    if found := [name for name in GPUS if name.replace("-", "") in plain]:
        return GPUS[max(found, key=len)]
    raise ValueError(
        f"nothing is known of the GPU {text!r}. Describe the machines with --plan.nodes '[{{cpus = 16, memory_gib = "
        f'64, gpus = 1, gpu = "L4"}}]\': one of {", ".join(GPUS)}, or with device_memory_gib, device_tflops and '
        "device_gb_s"
    )


def described(nodes: Sequence[NodeConfig]) -> list[Machine]:
    """The machines of a description; one without GPUs has cores of an assumed speed where it does not say.

    Raises ValueError for a GPU of which nothing is known.
    """
    kinds = [(node, _device(node)) for node in nodes for _ in range(node.count)]
    return [
        Machine(name=f"node-{number}", cpus=node.cpus, memory=int(node.memory_gib * GIB), gpus=node.gpus, device=device)
        for number, (node, device) in enumerate(kinds)
    ]


def _device(node: NodeConfig) -> Device:
    memory, gpu = node.device_memory_gib if node.gpus else node.memory_gib, node.gpu or ""
    figures = (("memory", memory, GIB), ("flops", node.device_tflops, 1e12), ("bandwidth", node.device_gb_s, 1e9))
    given: dict[str, Any] = {name: int(figure * unit) for name, figure, unit in figures if figure}
    if len(given) == 3:
        link = GPUS[gpu].link if gpu in GPUS else 16e9
        return Device(name=gpu or "cores", link=link, source="given", **given)
    return replace(gpu_named(gpu) if node.gpus else cores(node.cpus, int(node.memory_gib * GIB)), **given)


def this_machine() -> Machine:
    """The machine that this process runs on, its memory within the control group's limit."""
    gpus, lines, cpus, memory = machine_gpus(), gpu_lines(), machine_cores(), machine_memory()
    device = gpu_named(lines[0] if lines else "") if gpus else cores(cpus, memory)
    return Machine(name="this machine", cpus=cpus, memory=memory, gpus=gpus, device=device)


def _live_machines(address: str) -> list[Machine]:
    """The machines of a running cluster, as Ray was told of them."""
    from cluster.runtime.placement import cluster_nodes
    from cluster.runtime.session import start_ray

    with tempfile.TemporaryDirectory() as logs, start_ray(address, cpus=0, log_dir=Path(logs)):
        nodes = cluster_nodes()
    devices = [gpu_named(one.accelerator or "") if one.gpus else cores(one.cpus, one.memory) for one in nodes]
    return [
        Machine(name=node.name, cpus=node.cpus, memory=node.memory, gpus=node.gpus, device=device)
        for node, device in zip(nodes, devices, strict=True)
    ]


def cores(count: float, memory: float) -> Device:
    """All cores of a machine as one device, at rates that are assumed for every kind of core."""
    figures = {"flops": 2e11 * count, "bandwidth": 1e10 * count, "link": 1e8}  # through gloo, checked and packed
    return Device(name=f"{count:g} cores", memory=memory, source="assumed", **figures)
