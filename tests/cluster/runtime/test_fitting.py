import pytest

from cluster.config.schema import ClusterConfig, Config
from cluster.plan.machines import GPUS, Machine
from cluster.runtime.fitting import place_processes, plan_cluster
from cluster.runtime.resources import GIB, Process


def machine(name: str, gpus: int, cpus: int = 16, memory: int = 64 * GIB) -> Machine:
    return Machine(name=name, cpus=cpus, memory=memory, gpus=gpus, device=GPUS["A100"])


def process(name: str, gpus: float, cpus: float = 1) -> Process:
    return Process(name=name, threads=1, cpus=cpus, gpus=gpus)


def test_a_tensor_parallel_bundle_goes_to_one_machine():
    wanted = [process("learner-0", 1), process("generator-0", 4), process("generator-1", 4), process("reward", 1)]
    placed = place_processes(wanted, [machine("a", 6), machine("b", 4)], by_cpus=True)
    assert {name: at[1].name for name, at in placed.at.items()} == {
        "generator-0": "a",
        "generator-1": "b",
        "learner-0": "a",
        "reward": "a",
    }
    assert list(placed.at) == [one.name for one in wanted]  # in their own order
    assert placed.devices["generator-1"] == ("b/gpu-0", "b/gpu-1", "b/gpu-2", "b/gpu-3")
    assert not placed.unplaced


def test_a_bundle_without_room_is_named_with_what_is_free():
    placed = place_processes([process("generator-0", 3), process("generator-1", 3)], [machine("a", 4)], by_cpus=False)
    (said,) = placed.unplaced
    assert "the bundle of 'generator-1' needs 3 GPUs" in said
    assert "a: 1 of 4 GPUs" in said
    assert "Nearest: a process of 1 GPUs" in said
    crowded = [process(f"learner-{i}", 0, cpus=10) for i in range(2)]
    (said,) = place_processes(crowded, [machine("a", 0)], by_cpus=True).unplaced
    assert "'learner-1' needs 0 GPUs and 10 CPUs" in said
    assert "6 of 16 CPUs" in said
    assert not place_processes(crowded, [machine("a", 0)], by_cpus=False).unplaced  # they take turns


@pytest.mark.parametrize(
    ("cpus", "at"),
    [  # what Ray 2.60 did with these bundles on three raylets of 2, 2 and 3 CPUs; the two of 2 are interchangeable
        ([1.5, 1.5, 1.5], "ccb"),
        ([1, 2, 3], "abc"),
        ([1, 1, 1, 1, 1, 1], "cccbba"),
        ([1, 1], "cc"),
        ([1, 1, 1], "ccc"),
    ],
)
def test_processes_go_where_ray_puts_them(cpus: list[float], at: str):
    wanted = [process(f"learner-{index}", 0, cpus=each) for index, each in enumerate(cpus)]
    there = [machine("b", 0, cpus=2), machine("a", 0, cpus=2), machine("c", 0, cpus=3)]
    placed = place_processes(wanted, there, by_cpus=True).at
    assert "".join(placed[one.name][1].name for one in wanted) == at


def test_parts_of_a_gpu_fill_one_before_the_next():
    thirds = [process(name, 0.3333) for name in ("generator-0", "learner-0", "reward", "learner-1")]
    placed = place_processes(thirds, [machine("a", 2)], by_cpus=False)
    assert [placed.devices[one.name] for one in thirds] == [("a/gpu-0",)] * 3 + [("a/gpu-1",)]


@pytest.mark.parametrize(
    ("machines", "threads", "cpus"),
    [
        ([(0, 8), (0, 8)], 4, 4),  # four processes, two on each
        ([(0, 9), (0, 3)], 3, 3),  # three and one; with four threads there would be room for two
        ([(0, 1), (0, 1)], 1, 1),  # no room even so, which the reservation tells
        ([(2, 32), (2, 32)], 8, 8),  # more is of no use to a process with a GPU
        ([(4, 16)], 8, 4),  # alone they take turns on the CPUs
    ],
)
def test_processes_of_several_machines_have_cores_of_their_own(
    machines: list[tuple[int, int]], threads: int, cpus: float
):
    config = Config(cluster=ClusterConfig(address="10.0.0.1:6379", learner_ranks=2))
    there = [machine(f"node-{index}", *sizes) for index, sizes in enumerate(machines)]
    plan = plan_cluster(config, there)
    assert {p.name for p in plan.processes} == {"generator-0", "learner-0", "learner-1", "reward-0"}
    assert {(p.threads, p.cpus, p.pin) for p in plan.processes} == {(threads, cpus, None)}
    assert plan.apart  # with GPUs for all, on one machine too
    fits = sum(p.cpus for p in plan.processes) <= sum(machine.cpus for machine in there)
    assert fits == (not place_processes(plan.processes, there, by_cpus=True).unplaced)
