"""Actors in processes of their own, on one local Ray session."""

import asyncio
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray._private.internal_api import node_stats
from ray.exceptions import ActorDiedError, OutOfMemoryError

from cluster.fleet.processes import KEEPS_MEMORY
from cluster.runtime.actor import Handle, RemoteError, remote
from cluster.runtime.actor_process import Failure
from cluster.runtime.health import ActorDied
from cluster.runtime.placement import place
from cluster.runtime.resources import Process, ResourceError
from cluster.runtime.session import start_ray
from reward_server.config import PartConfig, SourceConfig
from reward_server.service import RewardService


class Refusal(ValueError):
    """An exception whose constructor takes more than a message."""

    def __init__(self, *, value: int) -> None:
        super().__init__(f"refused {value}")
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return _refusal, (self.value,)


def _refusal(value: int) -> Refusal:
    return Refusal(value=value)


class Clashing:
    def kill(self) -> None: ...


class Unpicklable(Exception):
    """Loses an argument in pickling."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


class BadArgument:
    """Pickles, but cannot be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


class Worker:
    """A plain class with everything an actor does."""

    def __init__(self, start: int = 0) -> None:
        if start < 0:
            raise Refusal(value=start)
        self.seen: list[int] = []
        self.total = start
        self.open = 0
        self.most_open = 0
        self.cancelled = False

    def add(self, number: int, payload: np.ndarray | None = None) -> int:
        self.seen.append(number)
        self.total += number
        return self.total

    def order(self) -> list[int]:
        return self.seen

    def refuse(self, value: int) -> None:
        raise Refusal(value=value)

    def refuse_strangely(self) -> None:
        raise Unpicklable("one", "two")

    def block(self, seconds: float) -> str:
        time.sleep(seconds)
        return "done"

    async def wait(self, seconds: float) -> int:
        """The largest number of waits that were open at once."""
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            self.open -= 1
        return self.most_open

    async def was_cancelled(self) -> bool:
        return self.cancelled

    async def out_of_time(self, deadline_s: float) -> None:
        raise TimeoutError(f"the method's own {deadline_s}")

    def surroundings(self) -> dict[str, Any]:
        return {
            "threads": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
            "cores": sorted(os.sched_getaffinity(0)),
            "child_cores": int(subprocess.check_output(["nproc"])),
            "cache": os.environ["TORCHINDUCTOR_CACHE_DIR"],
        }

    def faults(self) -> list[int]:
        """Pages that came in anew while 64 MiB were taken and freed, thrice."""
        counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
        for _ in range(3):
            bytearray(2**26)
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        return [after - before for before, after in itertools.pairwise(counts)]

    def torch_threads(self) -> int:
        import torch

        return torch.get_num_threads()

    def size(self, array: np.ndarray) -> int:
        return array.nbytes

    def print_lines(self) -> None:
        print("from print")  # noqa: T201
        subprocess.run(["echo", "from a child"], check=True)
        sys.stderr.write("from stderr\n")

    def start_children(self) -> list[int]:
        """One child in the actor's process group, and one that left its session."""
        command = [sys.executable, "-c", "import time; time.sleep(1000)"]
        return [subprocess.Popen(command, start_new_session=away).pid for away in (False, True)]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    logs = tmp_path_factory.mktemp("logs")
    with start_ray("local", cpus=4, log_dir=logs):
        yield logs


@pytest.fixture(scope="module")
def worker(session: Path) -> Iterator[Handle]:
    """The actor of the tests that leave it as it is."""
    process, log_file = Process(name="worker-7", pin=(0,)), session / "actors" / "worker-7.log"
    variables = KEEPS_MEMORY | {"TORCHINDUCTOR_CACHE_DIR": str(session / "cache")}
    handle = remote(Worker, 10, process=process, log_file=log_file, deadline_s=30, variables=variables)
    asyncio.run(handle.ready(deadline_s=60))
    yield handle
    handle.kill()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_gone(pids: list[int], within_s: float) -> bool:
    end = time.monotonic() + within_s
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def test_methods_are_awaited_in_a_process_of_its_own(worker: Handle) -> None:
    async def scenario() -> None:
        pid = await worker.ready(deadline_s=60)
        assert pid != os.getpid()
        before = await worker.add(0)
        assert await worker.add(number=5) == before + 5
        assert await worker.call("add", 7, deadline_s=5) == before + 12

    asyncio.run(scenario())


def test_sync_methods_keep_their_order_although_large_arguments_arrive_late(worker: Handle) -> None:
    large = np.zeros(3_000_000, np.float32)  # through the object store, so it takes longer than the next call

    async def scenario() -> list[int]:
        start = len(await worker.order())
        await asyncio.gather(*(worker.add(i, large if i % 3 == 0 else None) for i in range(30)))
        return (await worker.order())[start:]

    assert asyncio.run(scenario()) == list(range(30))


def test_async_methods_overlap_each_other_and_a_busy_sync_method(worker: Handle) -> None:
    async def scenario() -> None:
        busy = asyncio.ensure_future(worker.block(1.5))
        start = time.monotonic()
        assert max(await asyncio.gather(*(worker.wait(0.3) for _ in range(20)))) == 20
        assert time.monotonic() - start < 1.2
        assert not busy.done()
        assert await busy == "done"

    asyncio.run(scenario())


def test_exceptions_come_back_as_themselves_with_the_actor_and_its_traceback(worker: Handle) -> None:
    with pytest.raises(Refusal, match="refused 3") as caught:
        asyncio.run(worker.refuse(3))
    assert caught.value.value == 3
    (note,) = caught.value.__notes__
    assert "worker-7" in note
    assert "in refuse" in note
    with pytest.raises(TimeoutError, match="the method's own 3"):
        asyncio.run(worker.out_of_time(deadline_s=3))


def test_an_exception_with_a_secret_travels_as_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller, on another machine, may not know that it is one."""
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789abcdef")
    failure = Failure.of(ValueError("no such key: canary-0123456789abcdef"))
    assert (failure.error, failure.summary) == (None, "ValueError: no such key: [HF_TOKEN]")
    assert "canary" not in failure.traceback
    assert Failure.of(ValueError("no such key")).error


def test_an_exception_that_cannot_be_pickled_still_tells_what_happened(worker: Handle) -> None:
    with pytest.raises(RemoteError, match=r"worker-7.*Unpicklable: one"):
        asyncio.run(worker.refuse_strangely())
    assert asyncio.run(worker.add(0)) > 0


def test_a_call_whose_argument_cannot_be_read_does_not_hold_up_the_next(worker: Handle) -> None:
    async def scenario() -> None:
        with pytest.raises(RemoteError, match="worker-7"):
            await worker.add(BadArgument())
        with pytest.raises(TypeError):  # a lock cannot be pickled: the call never leaves
            await worker.add(__import__("threading").Lock())
        assert await worker.call("add", 0, deadline_s=5) > 0

    asyncio.run(scenario())


def test_a_missed_deadline_names_actor_method_seconds_and_place(worker: Handle) -> None:
    async def scenario() -> None:
        with pytest.raises(TimeoutError, match=r"'worker-7': block\(\) did not answer within 0.3 s") as caught:
            await worker.call("block", 1.5, deadline_s=0.3)
        assert "in block" in str(caught.value)
        assert "time.sleep(seconds)" in str(caught.value)

    asyncio.run(scenario())


def test_an_async_call_that_nobody_waits_for_is_cancelled_in_the_actor(worker: Handle) -> None:
    async def scenario() -> None:
        assert not await worker.was_cancelled()
        with pytest.raises(TimeoutError, match=r"in wait[\s\S]*await asyncio.sleep"):
            await worker.call("wait", 60, deadline_s=0.3)
        end = time.monotonic() + 5
        while not await worker.was_cancelled():
            assert time.monotonic() < end, "the call goes on in the actor"

    asyncio.run(scenario())


def test_threads_and_cores_are_as_told(worker: Handle) -> None:
    found = asyncio.run(worker.surroundings())
    assert found["threads"] == {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    assert found["cores"] == [min(os.sched_getaffinity(0))]
    assert found["child_cores"] == 1
    assert Path(found["cache"]).name == "cache", "what is given goes before what each process has of its own"


def test_freed_memory_stays_with_a_process_that_is_to_keep_it(worker: Handle) -> None:
    assert max(asyncio.run(worker.faults())[1:]) < 100  # of 16,384 pages


def test_output_of_actor_and_children_goes_to_its_log_file(
    worker: Handle, session: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(worker.print_lines())
    log = (session / "actors" / "worker-7.log").read_text()
    assert [line for line in log.splitlines() if line.startswith("from ")] == [
        "from print",
        "from a child",
        "from stderr",
    ]
    assert capfd.readouterr() == ("", "")


def test_a_handle_has_the_public_methods_only_and_stays_where_it_is(worker: Handle) -> None:
    with pytest.raises(AttributeError, match=r"'worker-7' \(Worker\) has no public method 'vanish'.*'add'"):
        worker.vanish  # noqa: B018
    with pytest.raises(AttributeError, match="no public method '_private'"):
        asyncio.run(worker.call("_private", deadline_s=1))
    with pytest.raises(TypeError, match="worker-7"):
        worker.__reduce__()


def test_calls_made_before_the_actor_is_up_keep_their_order_too(session: Path) -> None:
    handle = remote(Worker, process=Process(name="early"))

    async def scenario() -> list[int]:
        await asyncio.gather(handle.wait(0), *(handle.add(i) for i in range(50)))
        return await handle.order()

    assert asyncio.run(scenario()) == list(range(50))
    handle.kill()


def test_a_failing_constructor_answers_every_call(session: Path) -> None:
    handle = remote(Worker, -1, process=Process(name="broken"))

    async def scenario() -> None:
        with pytest.raises(Refusal, match="refused -1"):
            await handle.ready(deadline_s=60)
        with pytest.raises(Refusal, match="refused -1"):
            await handle.add(1)
        with pytest.raises(Refusal, match="refused -1"):
            await handle.wait(0)

    asyncio.run(scenario())
    handle.kill()


def test_large_calls_pass_through_a_store_that_is_nearly_full_and_leave_nothing_in_it(session: Path) -> None:
    handle = remote(Worker, process=Process(name="reader"))

    def stored() -> int:
        (node,) = ray.nodes()
        found = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
        return found.store_stats.object_store_bytes_used

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.2)

    async def scenario() -> None:
        await handle.ready(deadline_s=60)
        ballast = ray.put(np.zeros(26 * 2**20))  # 208 of 256 MiB
        await until(lambda: stored() > 200 * 2**20)
        for _ in range(8):
            assert await handle.size(np.zeros(2**23)) == 2**26
            assert stored() <= 256 * 2**20
        del ballast
        await until(lambda: stored() < 2**20)

    asyncio.run(scenario())
    handle.kill()


def test_a_kill_for_want_of_memory_is_a_death_with_what_it_took(session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = remote(Worker, 1, process=Process(name="large"))

    async def scenario() -> None:
        await handle.ready(deadline_s=60)
        await handle.health.attend(10)
        for error, said in (  # as Ray's memory monitor has it, and of the kernel's
            (
                OutOfMemoryError(
                    "1 worker(s) were killed ... Memory on the node (IP: x) was 22GB used / 23GB limit\n.."
                ),
                "22GB used",
            ),
            (ActorDiedError(), "the kernel has killed on this machine for want of memory since it started"),
        ):
            answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            answer.set_exception(error)
            with pytest.raises(ActorDied, match=r"(?s)actor 'large' died: .*it last took 0\.\d\d GiB") as caught:
                await handle._answer(answer, "add", 1.0)
            assert said in str(caught.value)
            monkeypatch.setattr("cluster.runtime.health._kills", lambda: 10**9)

    asyncio.run(scenario())
    handle.kill()


def test_sigkill_is_told_with_the_log_and_leaves_no_child(session: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = session / "victim.log"
    handle = remote(Worker, process=Process(name="victim"), log_file=log)

    async def scenario() -> list[int]:
        pid = await handle.ready(deadline_s=60)
        await handle.print_lines()
        children = await handle.start_children()
        assert all(alive(child) for child in children)
        waiting = [asyncio.ensure_future(handle.wait(60)), asyncio.ensure_future(handle.block(60))]
        await handle.health.attend(10)
        os.kill(pid, signal.SIGKILL)
        for call in [*waiting, handle.add(1)]:
            with pytest.raises(
                ActorDied, match=r"'victim' died: .*worker process has died.*took 0\.\d\d GiB"
            ) as caught:
                await asyncio.wait_for(call, 10)
            assert caught.value.name == "victim"
            assert "from a child" in caught.value.log
        return [pid, *children]

    assert all_gone(asyncio.run(scenario()), within_s=5)
    assert capfd.readouterr() == ("", "")
    assert "worker died" in (session / "ray.log").read_text()


def test_kill_through_the_handle_and_a_pin_to_a_core_that_is_not_there(session: Path) -> None:
    handle = remote(Worker, process=Process(name="short"))
    wrong = remote(Worker, process=Process(name="astray", pin=(4096,)))

    async def scenario() -> list[int]:
        pids = [await handle.ready(deadline_s=60), *await handle.start_children()]
        waiting = asyncio.ensure_future(handle.wait(60))
        await asyncio.sleep(0.1)
        handle.kill()
        for call in (handle.add(1), handle.wait(0), waiting):
            with pytest.raises(ActorDied, match="'short' died: it was killed by its handle"):
                await asyncio.wait_for(call, 10)
        with pytest.raises(ActorDied, match=r"cannot pin to cores \[4096\]"):
            await wrong.ready(deadline_s=60)
        return pids

    assert all_gone(asyncio.run(scenario()), within_s=5)


def test_a_stopped_actor_and_one_that_finds_no_room_are_told_apart(session: Path) -> None:
    handle = remote(Worker, process=Process(name="stopped"))
    large = remote(Worker, process=Process(name="large", cpus=64))

    async def scenario() -> int:
        pid = await handle.ready(deadline_s=60)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(TimeoutError, match=r"'stopped': add.* answers nothing"):
            await handle.call("add", 1, deadline_s=0.3)
        with pytest.raises(TimeoutError, match=r"has not started: it asks for 64 CPUs and 0 GPUs.*of 4 CPUs free"):
            await large.ready(deadline_s=0.3)
        return pid

    pid = asyncio.run(scenario())
    handle.kill()
    large.kill()
    assert all_gone([pid], within_s=10), "else it would keep its memory and its place from the one that comes after it"


def test_torch_computes_with_the_threads_of_the_options(session: Path) -> None:
    handle = remote(Worker, process=Process(name="torch", threads=3))

    async def scenario() -> None:
        await handle.torch_threads()  # imports torch
        assert await handle.torch_threads() == 3

    asyncio.run(scenario())
    handle.kill()


def test_a_process_without_threads_and_methods_whose_names_clash_are_refused(session: Path) -> None:
    with pytest.raises(ValueError, match="threads is 0"):
        remote(Worker, process=Process(name="none", threads=0))
    with pytest.raises(ValueError, match=r"Clashing has methods named \['kill'\]"):
        remote(Clashing, process=Process(name="clash"))


def test_bundles_are_placed_or_refused_by_name(session: Path) -> None:
    small = Process(name="generator-0", threads=1, cpus=0.5)
    with pytest.raises(ResourceError, match=r"'learner-0' needs 0 GPUs and 64 CPUs.*: 4 CPUs, 0 GPUs"):
        place([small, Process(name="learner-0", threads=64, cpus=64)], deadline_s=30)
    three = [Process(name=name, threads=3, cpus=3) for name in ("generator-0", "learner-0")]
    with pytest.raises(
        ResourceError, match=r"the bundle of .* needs 0 GPUs and 3 CPUs .* The cluster has .*: 4 CPUs, 0"
    ):
        place(three, deadline_s=30)
    with (
        place(three[:1], deadline_s=30),
        pytest.raises(ResourceError, match=r"'learner-0' needs .* 3 CPUs on one") as no,
    ):
        place(three[1:], deadline_s=0.5)
    assert re.search(r"within 0.5 s .* has .*: 4 CPUs, 0 GPUs; free now: .*: [01] CPUs", str(no.value))
    placement = place([small], deadline_s=30)
    handle = remote(Worker, process=small, placement=placement.bundle("generator-0"))

    async def scenario() -> None:
        await handle.ready(deadline_s=60)
        assert await handle.add(2) == 2
        placement.release()
        with pytest.raises(ActorDied):
            await handle.block(30)

    asyncio.run(scenario())
    assert placement.bundle("reward") is None


def test_a_reward_function_that_hangs_is_told_at_the_deadline_of_the_start(
    session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_rewards.py").write_text(
        "import time\ndef score(prompts, responses):\n    time.sleep(60.0)\n    return [0.0] * len(responses)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    source = SourceConfig(parts=(PartConfig(kind="function", target="slow_rewards:score"),))
    handle = remote(RewardService, source, None, 1, process=Process(name="reward"))

    async def scenario() -> None:
        await handle.ready(deadline_s=60)
        with pytest.raises(TimeoutError, match=r"'reward': start\(\) did not answer within 5 s[\s\S]*time.sleep"):
            await handle.call("start", True, deadline_s=5)

    asyncio.run(scenario())
    handle.kill()


def test_round_trip_is_short(worker: Handle) -> None:
    async def scenario() -> float:
        start = time.monotonic()
        for _ in range(100):
            await worker.was_cancelled()
        return (time.monotonic() - start) / 100

    assert asyncio.run(scenario()) < 0.05


def test_without_a_session_the_error_says_what_to_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match="'early' needs a Ray session"):
        remote(Worker, process=Process(name="early"))
