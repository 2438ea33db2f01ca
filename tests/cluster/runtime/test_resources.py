"""Plans by hand, and what their check says. Placement on a cluster is in test_remote, which has one."""

import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.config.schema import Config
from cluster.runtime.resources import (
    KINDS,
    Plan,
    ResourceError,
    check,
    machine_cores,
    machine_gpus,
    plan_machine,
    plan_replicas,
    ray_obstacles,
    session_parent,
)
from reward_server.config import ServeConfig


def plan(cores: int = 2, gpus: int = 0, **changes: int) -> Plan:
    at = {"max_staleness": "ppo", "waves_in_flight": "rollout", "tensor_parallel_size": "generator"}
    sections: dict[str, dict[str, int]] = {"cluster": {"generators": 2}, "ppo": {"max_staleness": 0}}
    for key, value in changes.items():
        sections.setdefault(at.get(key, "cluster"), {})[key] = value
    return plan_machine(Config.model_validate(sections), cores, gpus)


def threads(found: Plan) -> dict[str, int]:
    return {process.name: process.threads for process in found.processes}


@pytest.mark.parametrize(
    ("gpus", "size", "apart"),
    [(0, 1, False), (1, 1, False), (3, 1, False), (4, 1, True), (8, 1, True), (5, 2, True)],
)
def test_nccl_connects_processes_that_share_no_gpu(gpus: int, size: int, apart: bool) -> None:
    assert plan(cores=16, gpus=gpus, tensor_parallel_size=size).gpus_apart is apart


def test_synchronous_generators_share_the_cores_and_the_learner_has_all() -> None:
    found = plan()
    assert threads(found) == {"generator-0": 1, "generator-1": 1, "learner-0": 2, "reward-0": 1}
    assert [found.process(f"generator-{i}").pin for i in range(2)] == [(0,), (1,)]
    assert found.process("learner-0").pin is None
    assert found.concurrent == {
        "generate": ("generator-0", "generator-1"),
        "score": ("generator-1", "reward-0"),
        "update": ("learner-0",),
    }
    assert found.cpus == 5
    check(found, cores=2, gpus=0)


@pytest.mark.parametrize(
    ("cores", "gpus", "waves", "beside"), [(2, 0, 1, True), (4, 0, 1, False), (9, 0, 2, True), (16, 4, 1, True)]
)
def test_a_replica_scores_beside_generators_where_it_has_cores_or_they_have_one_thread(
    cores: int, gpus: int, waves: int, beside: bool
) -> None:
    assert plan(cores, gpus, waves_in_flight=waves).scores_beside is beside


@pytest.mark.parametrize(
    ("gpus", "staleness", "apart"), [(0, 0, False), (0, 1, True), (4, 0, True), (3, 0, False), (3, 1, False)]
)
def test_learner_and_generators_are_apart_with_cores_or_gpus_of_their_own(gpus: int, staleness: int, apart: bool):
    found = plan(4, gpus, max_staleness=staleness)
    assert found.apart is apart
    assert found.shares_gpus is (gpus == 3)


def test_asynchronous_rollout_and_learner_split_the_cores() -> None:
    found = plan(generators=1, max_staleness=2)
    assert threads(found) == {"generator-0": 1, "learner-0": 1, "reward-0": 1}
    assert [*found.concurrent.values()] == [("generator-0", "learner-0"), ("reward-0", "learner-0")]
    check(found, cores=2, gpus=0)
    with pytest.raises(ResourceError, match="generate and update"):
        check(plan(generators=2, max_staleness=2), cores=2, gpus=0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cores": 8}, {"generator-0": 4, "generator-1": 4, "learner-0": 8, "reward-0": 4}),
        ({"cores": 8, "learner_ranks": 2}, {"learner-0": 4, "learner-1": 4}),
        ({"cores": 9, "waves_in_flight": 2}, {"generator-0": 3, "generator-1": 3, "reward-0": 3}),
        ({"cores": 8, "max_staleness": 1}, {"generator-0": 2, "generator-1": 2, "learner-0": 4, "reward-0": 2}),
        ({"generators": 1}, {"generator-0": 2, "learner-0": 2, "reward-0": 2}),
        ({"cores": 1, "generators": 1}, {"generator-0": 1, "learner-0": 1, "reward-0": 1}),
    ],
)
def test_threads_of_other_machines(changes: dict[str, int], expected: dict[str, int]) -> None:
    found = plan(**changes)
    assert threads(found).items() >= expected.items()
    check(found, cores=changes.get("cores", 2), gpus=0)


def test_too_many_threads_name_the_phase_each_process_the_sum_and_the_remedy() -> None:
    with pytest.raises(
        ResourceError,
        match=r"^3 threads would compute at the same time on 2 cores in the phase 'generate' "
        r"\(generator-0: 1, generator-1: 1, generator-2: 1\).*use fewer generators.*a machine with 3 cores$",
    ):
        check(plan(generators=3), cores=2, gpus=0)
    with pytest.raises(ResourceError, match=r"'generate and score' \(.*reward-0: 1\)"):
        check(plan(waves_in_flight=2), cores=2, gpus=0)
    with pytest.raises(ResourceError, match=r"'update' \(learner-0: 1, learner-1: 1, learner-2: 1\)"):
        check(plan(learner_ranks=3), cores=2, gpus=0)


def test_gpus_are_one_each_or_evenly_shared() -> None:
    whole = plan(generators=2, learner_ranks=1, gpus=4, cores=32)
    assert {process.gpus for process in whole.processes} == {1.0}
    assert {process.pin for process in whole.processes} == {None}
    assert max(threads(whole).values()) == 8
    check(whole, cores=32, gpus=4)
    with pytest.raises(ResourceError, match=r"need 4 GPUs and there are 2 \(learner-0: 1, .*reward-0: 1\)"):
        check(whole, cores=32, gpus=2)
    two = plan(generators=2, learner_ranks=1, gpus=2, cores=32)  # 4 processes, 2 on each GPU
    assert {process.gpus for process in two.processes} == {0.5}
    one = plan(generators=1, learner_ranks=1, gpus=1, cores=16)  # 3 processes on one GPU
    assert {process.gpus for process in one.processes} == {0.3333}
    check(one, cores=16, gpus=1)


def test_generators_that_may_join_later_are_not_asked_for_at_the_start() -> None:
    assert [process.name for process in plan(generators=3).first(KINDS, 1)] == ["learner-0", "generator-0", "reward-0"]
    assert [process.name for process in plan(generators=12).first(("generator",), 11)][-1] == "generator-10"


def test_some_kinds_alone_keep_the_phases_in_which_they_compute() -> None:
    some = plan(generators=2).of(["learner", "reward"])
    assert [process.name for process in some.processes] == ["learner-0", "reward-0"]
    assert some.concurrent == {"score": ("reward-0",), "update": ("learner-0",)}


def test_a_single_copy_of_the_reward_service_is_the_command_itself() -> None:
    (alone,) = plan_replicas(ServeConfig(threads=2), gpus=1).processes
    assert (alone.cpus, alone.gpus, alone.threads) == (0, 1, 2)
    copies = plan_replicas(ServeConfig(replicas=2, max_replicas=3, threads=2, gpus=0.5), gpus=1).processes
    assert [(one.name, one.cpus, one.gpus) for one in copies] == [(f"reward-{i}", 2, 0.5) for i in range(3)]


def test_a_machine_without_cores_and_unknown_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="cores is 0"):
        plan(cores=0)
    with pytest.raises(KeyError, match=r"no process 'critic'.*'learner-0'"):
        plan().process("critic")


def test_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= machine_cores() <= len(os.sched_getaffinity(0))
    for value, count in {"": 0, "-1": 0, "0": 1, "1,3": 2, "GPU-4f, GPU-5a": 2}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert machine_gpus() == count


def test_what_would_keep_ray_from_starting_is_told_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RAY_TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(ray_obstacles()) == []
    monkeypatch.setenv("HOME", "/nonexistent")
    ((what, remedy),) = ray_obstacles()
    assert (what, remedy) == (
        "/nonexistent, where Ray keeps its token, cannot be written",
        "export HOME=DIR that you can write",
    )
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert list(ray_obstacles()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**26))
    ((what, remedy),) = ray_obstacles()
    assert (what, "--shm-size=8g" in remedy) == ("/dev/shm has 64 MiB free, and a local Ray shares 256 there", True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_long_folder_of_temporary_files_is_left_and_one_of_somebody_else_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * 90)
    assert session_parent() == Path("/tmp")
    for folder in ("/nonexistent", tempfile.mkdtemp(dir="/tmp")):
        if os.path.exists(folder):
            monkeypatch.setattr(os, "getuid", lambda: 12345)
            os.chown(folder, 54321, -1)
        monkeypatch.setenv("RAY_TMPDIR", folder)
        ((what, remedy),) = (one for one in ray_obstacles() if one[0].startswith(folder))
        assert what == f"{folder}, where a local Ray keeps its session, cannot be written, or is another user's"
        assert remedy.startswith("export RAY_TMPDIR=DIR")
    os.rmdir(folder)
