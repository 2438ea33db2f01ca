"""Machines to plan for: described ones, this one, and how fast their devices are by data sheet or by measurement."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.config.schema import NodeConfig
from cluster.rundir.environment import gpu_lines
from cluster.runtime.resources import machine_cores, machine_gpus, machine_memory

GIB = 2**30
MEASURED = "measured here"
"""Source of the figures of this machine's cores."""
PRODUCT = 1024
"""Rows of the matrices whose product is timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What computes in a process: a GPU, or the cores of a machine."""

    name: str
    """as it is called in tables"""
    flops: float
    """dense bfloat16 operations a second, a multiplication and an addition being two"""
    bandwidth: float
    """bytes a second that it reads from its memory"""
    memory: int
    """bytes of its memory; of cores, the machine's"""
    link: float
    """bytes a second, one way, to another device of the same machine"""
    source: str
    """where the figures are from"""


def _gpu(name: str, teraflops: float, bandwidth_gb: float, memory_gib: float, link_gb: float) -> Device:
    return Device(
        name=name,
        flops=teraflops * 1e12,
        bandwidth=bandwidth_gb * 1e9,
        memory=int(memory_gib * GIB),
        link=link_gb * 1e9,
        source="data sheet",
    )


# NVIDIA's data sheets: dense bf16 tensor-core Tflop/s, memory GB/s, memory a program sees in GiB, and to a neighbour
# half of NVLink's two-way GB/s, or of PCIe's where there is no NVLink.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("V100", 125, 900, 31.7, 150),  # float16: it has no bf16
        _gpu("T4", 65, 320, 14.6, 16),  # float16
        _gpu("A10G", 70, 600, 22.0, 32),
        _gpu("L4", 121, 300, 22.0, 32),
        _gpu("RTX3090", 71, 936, 23.5, 32),
        _gpu("RTX4090", 165, 1008, 23.5, 32),
        _gpu("L40S", 362, 864, 44.5, 32),
        _gpu("A100-40G", 312, 1555, 39.4, 300),
        _gpu("A100", 312, 2039, 79.2, 300),
        _gpu("H100", 989, 3350, 79.2, 450),
        _gpu("H200", 989, 4800, 139.7, 450),
        _gpu("B200", 2250, 8000, 178.0, 900),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine that processes can be put on."""

    name: str
    """address, or a name of our own"""
    cpus: int
    """cores"""
    memory: int
    """bytes of main memory"""
    gpus: int
    """GPUs"""
    device: Device
    """one of its GPUs; without any, all of its cores together"""


def gpu_named(text: str) -> Device | None:
    """The GPU that a name means, such as "NVIDIA H100 80GB HBM3"; the longest match wins."""
    plain = "".join(letter for letter in text.upper() if letter.isalnum())
    if "A100" in plain and "40G" in plain:
        return GPUS["A100-40G"]
    found = [name for name in GPUS if name.replace("-", "") in plain]
    return GPUS[max(found, key=len)] if found else None


def described(nodes: Sequence[NodeConfig], cores: Device | None = None) -> list[Machine]:
    """The machines of a description; `cores`: what one without GPUs computes with where it does not say.

    Raises ValueError for a GPU of which nothing is known.
    """
    return [
        Machine(
            name=f"node-{first + number}",
            cpus=node.cpus,
            memory=int(node.memory_gib * GIB),
            gpus=node.gpus,
            device=_device(node, cores),
        )
        for first, node in zip(_starts(nodes), nodes, strict=True)
        for number in range(node.count)
    ]


def _starts(nodes: Sequence[NodeConfig]) -> list[int]:
    return [sum(node.count for node in nodes[:index]) for index in range(len(nodes))]


def _device(node: NodeConfig, cores: Device | None) -> Device:
    base = gpu_named(node.gpu or "") if node.gpus else cores
    memory = node.device_memory_gib if node.gpus else node.memory_gib
    if base is None and (memory is None or node.device_tflops is None or node.device_gb_s is None):
        raise ValueError(
            f"plan.nodes: nothing is known of the device {node.gpu!r}. Name a GPU ({', '.join(GPUS)}), or give "
            "device_memory_gib, device_tflops and device_gb_s"
        )
    given = node.device_tflops is not None and node.device_gb_s is not None
    base = base or Device(name=node.gpu or "cores", flops=0, bandwidth=0, memory=0, link=16e9, source="given")
    return replace(
        base,
        memory=base.memory if memory is None else int(memory * GIB),
        flops=base.flops if node.device_tflops is None else node.device_tflops * 1e12,
        bandwidth=base.bandwidth if node.device_gb_s is None else node.device_gb_s * 1e9,
        source="given" if given else base.source,
    )


def this_machine() -> Machine:
    """The machine that this process runs on, its memory within the control group's limit, its speed measured."""
    gpus, lines = machine_gpus(), gpu_lines()
    device = gpu_named(lines[0]) if lines else None
    if gpus and device is None:
        raise ValueError(
            f"nothing is known of the GPU of this machine ({lines[0] if lines else 'nvidia-smi does not answer'}): "
            "describe it with --plan.nodes '[{cpus = 16, memory_gib = 64, gpus = 1, gpu = \"L4\"}]'"
        )
    return Machine(
        name="this machine",
        cpus=machine_cores(),
        memory=machine_memory(),
        gpus=gpus,
        device=device or measured_cores(),
    )


def measured_cores(seconds: float = 0.25) -> Device:
    """All cores that this process may use: the best bf16 matrix product and the best read of about `seconds` each."""
    import torch

    before, cores = torch.get_num_threads(), machine_cores()
    torch.set_num_threads(cores)
    try:
        block = torch.ones(2**26)  # 256 MiB: no cache holds it
        flops = 2 * PRODUCT**3 / best_seconds(matrix_product(), seconds, cores)
        bandwidth = block.nbytes / best_seconds(lambda: block.sum(), seconds, cores)
        copied = block.nbytes / best_seconds(lambda: block.clone(), seconds, cores)
    finally:
        torch.set_num_threads(before)
    return Device(
        name=f"{cores} cores",
        flops=flops,
        bandwidth=bandwidth,
        memory=machine_memory(),
        link=copied,
        source=MEASURED,
    )


def matrix_product() -> Callable[[], object]:
    """The product of two square bf16 matrices of PRODUCT rows, whose rate is taken for the peak."""
    import torch

    left, right = (torch.randn(PRODUCT, PRODUCT).bfloat16() for _ in range(2))
    return lambda: left @ right


def best_seconds(work: Callable[[], object], seconds: float, threads: int) -> float:
    """Seconds of the fastest call within about `seconds`, after one to warm up.

    Those of the processor, divided by the threads that share the work: what else the machine does takes nothing of
    them, so a plan is made for a quiet machine wherever it is made.
    """
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best / threads
