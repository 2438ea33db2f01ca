from cluster.plan.hardware import GIB, GPUS, Device, Machine
from cluster.plan.roofline import Phase, iteration_seconds, speed
from cluster.runtime.resources import Process

CORES = Device(name="8 cores", flops=8e11, bandwidth=4e10, memory=GIB, link=1e10, source="given")


def test_a_process_has_its_threads_part_of_the_cores_or_whole_gpus():
    machine = Machine(name="a", cpus=8, memory=GIB, gpus=0, device=CORES)
    quarter = speed(Process(name="p", threads=2, cpus=2), machine, wide=False)
    assert (quarter.flops, quarter.bandwidth) == (2e11, 1e10)
    assert speed(Process(name="p", threads=2, cpus=2), machine, wide=True).flops == 1e11
    node = Machine(name="b", cpus=8, memory=GIB, gpus=8, device=GPUS["H100"])
    four = speed(Process(name="p", threads=8, cpus=8, gpus=4), node, wide=False)
    assert four.bandwidth == 4 * GPUS["H100"].bandwidth
    shared = speed(Process(name="p", threads=8, cpus=8, gpus=0.25), node, wide=False)
    assert shared.flops == GPUS["H100"].flops  # those that share it take turns


def test_an_iteration_is_the_sum_or_where_phases_overlap_the_longer_side():
    phases = [
        Phase(name=name, least=least, expected=2 * least, formula="")
        for name, least in (("generate", 5.0), ("score", 1.0), ("evaluate", 1.0), ("update policy", 2.0))
    ]
    assert iteration_seconds(phases, max_staleness=0) == (9.0, 18.0)
    assert iteration_seconds(phases, max_staleness=1) == (6.0, 12.0)
    assert iteration_seconds([], max_staleness=0) == (0.0, 0.0)
