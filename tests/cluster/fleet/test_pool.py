"""Processes that start when they are needed, and are kept, or started anew with other weights."""

import asyncio
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config.schema import Config
from cluster.fleet.pool import ProcessPool
from cluster.runtime.health import Monitor
from reward_server.config import PartConfig, SourceConfig


class FakeProcesses:
    def __init__(self, notes: list[Any], apart: bool = False, shares_gpus: bool = False) -> None:
        self.notes = notes
        self.monitor = Monitor()
        self.plan = SimpleNamespace(apart=apart, shares_gpus=shares_gpus)
        self.faults: dict[str, Exception] = {}
        """what keeps a kind from starting, once"""

    @asynccontextmanager
    async def _lives(self, name: str, starts: str, stops: str):
        self.notes.append(starts)
        try:
            for _ in range(5 if name in self.faults else 50):  # it fails while the others still start
                await asyncio.sleep(0)
            if error := self.faults.pop(name, None):
                raise error
            self.notes.append(f"{name} up")
            yield object()
        finally:
            self.notes.append(stops)

    def learner(self):
        return self._lives("learner", "learner starts", "learner stops")

    def generators(self, config, model):
        return self._lives("fleet", f"fleet starts with {model}", "fleet stops")

    def reward(self, config, model):
        return self._lives("rewards", f"rewards start with {model}", "rewards stop")


def happened(work, ups: bool = False, **plan: bool) -> list[Any]:
    """What starts and stops while a function works with a pool, and with `ups` when a start is over."""
    found: list[Any] = []
    processes: Any = FakeProcesses(found, **plan)

    @contextmanager
    def announce(text: str):
        processes.notes += [text] * ups
        yield

    async def run() -> None:
        pool: Any = ProcessPool(processes, Config(), announce)
        async with pool:
            pool.faults = processes.faults
            await work(pool)

    asyncio.run(run())
    return [one for one in found if ups or not one.endswith(" up")]


def test_nothing_starts_before_it_is_needed():
    async def idle(pool: ProcessPool) -> None:
        pass

    assert happened(idle) == []


def test_what_was_started_is_kept_until_the_end():
    async def work(pool: ProcessPool) -> None:
        learner, fleet = await pool.learner(), await pool.generators(Path("sft"))
        rewards = await pool.rewards(Path("reward"))
        assert await pool.learner() is learner
        assert await pool.generators(Path("policy")) is fleet  # whatever weights they have
        assert await pool.fresh_generators(Path("sft")) is fleet
        assert await pool.rewards(Path("reward")) is rewards
        assert pool.weights == Path("sft")

    assert happened(work) == [
        *("learner starts", "fleet starts with sft", "rewards start with reward"),
        *("learner stops", "rewards stop", "fleet stops"),
    ]


def test_generators_and_rewards_are_started_anew_for_other_models():
    async def work(pool: ProcessPool) -> None:
        await pool.fresh_generators(Path("1"))
        await pool.fresh_generators(Path("2"))
        pool.weights = Path("trained")  # as PPO leaves them
        await pool.fresh_generators(Path("trained"))
        await pool.rewards(None)
        await pool.rewards(None, SourceConfig(parts=(PartConfig(kind="length"),)))
        await pool.rewards(Path("reward"))

    assert happened(work) == [
        *("fleet starts with 1", "fleet stops", "fleet starts with 2"),
        *("rewards start with None", "rewards stop") * 2,
        *("rewards start with reward", "rewards stop", "fleet stops"),
    ]


STARTS = ["learner starts", "fleet starts with sft", "rewards start with reward"]
UPS = ["learner up", "fleet up", "rewards up"]
STOPS = ["learner stops", "rewards stop", "fleet stops"]


async def everything(pool: ProcessPool) -> None:
    learner, fleet, rewards = await pool.all(Path("sft"), Path("reward"))
    assert await pool.all(Path("policy"), Path("reward")) == (learner, fleet, rewards)


def test_what_a_stage_needs_starts_at_the_same_time():
    found = happened(everything, ups=True)
    assert found[:4] == ["start the learner, the vLLM actors and the reward service", *STARTS]
    assert {*found[4:7]} == {*UPS}
    assert found[7:] == STOPS


def test_where_a_gpu_is_shared_one_starts_after_the_other():
    found = happened(everything, ups=True, shares_gpus=True)
    assert found[1:7] == [one for pair in zip(STARTS, UPS, strict=True) for one in pair]


@pytest.mark.parametrize("kind", ["learner", "fleet", "rewards"])
def test_a_start_that_fails_ends_the_others_and_is_told(kind: str):
    async def work(pool: Any) -> None:
        pool.faults[kind] = ValueError(f"{kind} has no memory")
        with pytest.raises(ValueError, match=f"{kind} has no memory"):
            await everything(pool)
        await everything(pool)

    found = happened(work, ups=True)
    again = found.index("start the learner, the vLLM actors and the reward service", 1)
    assert {*found[1:again]} == {*STARTS, *STOPS}  # nobody is up
    assert found[-3:] == STOPS


def test_what_was_started_ahead_is_there_when_it_is_asked_for():
    async def work(pool: Any) -> None:
        pool.prefetch(Path("base"))
        await asyncio.sleep(0)
        learner = await pool.learner()
        assert (await pool.all(Path("sft"), None))[0] is learner
        assert pool.weights == Path("base")

    expected = ["fleet starts with base", "learner starts", "rewards start with None", *STOPS]
    assert happened(work, apart=True) == expected
    turns = ["learner starts", "fleet starts with sft", "rewards start with None", *STOPS]

    async def in_turns(pool: Any) -> None:
        pool.prefetch(Path("base"))
        pool.prefetch()
        await asyncio.sleep(0)
        await pool.learner()
        await pool.all(Path("sft"), None)

    assert happened(in_turns) == turns


def test_what_did_not_start_ahead_is_started_when_it_is_needed(caplog: pytest.LogCaptureFixture):
    async def work(pool: Any) -> None:
        pool.faults["learner"] = OSError("no room")
        pool.prefetch()
        await asyncio.sleep(0.05)
        await pool.learner()

    assert happened(work, apart=True) == ["learner starts", "learner stops"] * 2
    assert "the learner did not start ahead, and will be started when a stage needs it: no room" in caplog.text


def test_the_end_of_the_command_ends_what_is_starting_ahead():
    async def work(pool: Any) -> None:
        pool.prefetch(Path("base"))
        await asyncio.sleep(0)

    assert happened(work, ups=True, apart=True) == ["fleet starts with base", "fleet stops"]
