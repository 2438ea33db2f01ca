import pytest

from cluster.config.schema import NodeConfig
from cluster.plan.machines import GIB, GPUS, cores, described, gpu_named, this_machine
from cluster.runtime.resources import machine_cores, machine_memory


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *(("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-40GB", "A100-40G"), ("NVIDIA A100-SXM4-80GB", "A100")),
        *(("NVIDIA GeForce RTX 4090", "RTX4090"), ("NVIDIA L40S", "L40S"), ("L4", "L4"), ("A10G", "A10G")),
    ],
)
def test_a_gpu_is_known_by_what_its_driver_and_ray_call_it(text: str, name: str):
    assert gpu_named(text) is GPUS[name]


def test_an_unknown_gpu_is_refused_unless_it_is_described():
    node = {"cpus": 8, "memory_gib": 32, "gpus": 2, "gpu": "X1"}
    with pytest.raises(ValueError, match=r"nothing is known of the GPU 'X1'.*V100.*device_tflops"):
        described([NodeConfig(**node)])
    (machine,) = described([NodeConfig(**node, device_memory_gib=16, device_tflops=100, device_gb_s=500)])
    assert (machine.device.flops, machine.device.bandwidth) == (1e14, 5e11)
    assert (machine.device.memory, machine.gpus, machine.memory) == (16 * GIB, 2, 32 * GIB)


def test_machines_are_counted_and_figures_overruled():
    kinds = [
        NodeConfig(count=2, cpus=64, memory_gib=512, gpus=8, gpu="H100", device_gb_s=3000),
        NodeConfig(cpus=8, memory_gib=16, device_tflops=1, device_gb_s=50),
    ]
    found = described(kinds)
    assert [machine.name for machine in found] == ["node-0", "node-1", "node-2"]
    assert (found[0].device.flops, found[0].device.bandwidth) == (GPUS["H100"].flops, 3e12)
    assert found[2].device.memory == 16 * GIB


def test_this_machine_has_cores_of_an_assumed_speed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine = this_machine()
    assert (machine.cpus, machine.gpus, machine.memory) == (machine_cores(), 0, machine_memory())
    assert machine.device == cores(machine.cpus, machine.memory)
    assert machine.device.flops == 2e11 * machine.cpus
