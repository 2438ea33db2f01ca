"""Processes that start when they are needed, and are kept, or started anew with other weights."""

import asyncio
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

from cluster.config.schema import Config
from cluster.fleet.pool import ProcessPool
from cluster.runtime.health import Monitor


class FakeProcesses:
    def __init__(self, notes: list[Any]) -> None:
        self.notes = notes
        self.monitor = Monitor()

    @asynccontextmanager
    async def learner(self):
        self.notes.append("learner starts")
        yield object()
        self.notes.append("learner stops")

    @asynccontextmanager
    async def generators(self, config, model):
        self.notes.append(f"fleet starts with {model}")
        yield object()
        self.notes.append("fleet stops")

    @asynccontextmanager
    async def reward(self, config, model):
        self.notes.append(f"rewards start with {model}")
        yield object()
        self.notes.append("rewards stop")


def happened(work) -> list[Any]:
    """What starts and stops while a function works with a pool."""
    found: list[Any] = []
    processes: Any = FakeProcesses(found)

    async def run() -> None:
        async with ProcessPool(processes, Config(), lambda text: nullcontext()) as pool:
            await work(pool)

    asyncio.run(run())
    return found


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
        await pool.rewards(Path("reward"))

    assert happened(work) == [
        *("fleet starts with 1", "fleet stops", "fleet starts with 2"),
        *("rewards start with None", "rewards stop", "rewards start with reward"),
        *("rewards stop", "fleet stops"),
    ]
