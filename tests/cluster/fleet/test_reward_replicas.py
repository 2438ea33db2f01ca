"""Replicas that die and come back, behind a real client and real servers."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import pytest

from actors.waits import Waits
from cluster.config.schema import FleetConfig
from cluster.fleet.reward_replicas import reward_replicas
from cluster.runtime.health import ActorDied, Health, Stats, measure
from reward_server.app import ScoreServer, serve
from reward_server.client import RewardClient
from reward_server.config import PartConfig, SourceConfig
from reward_server.schema import Message, ScoreRequest
from reward_server.sources import build_source

QUICK = FleetConfig(backoff_s=0.05, watch_s=0.02, max_restarts=2)
ASKED = [ScoreRequest(id="a", prompt=(Message(role="user", content="Hi"),), response="one two", ended=True)]


class Mortal(Health):
    """The health of a process that is dead once `dead` says why."""

    def __init__(self, name: str) -> None:
        super().__init__(name, self._say)
        self.dead = ""

    async def _say(self) -> Stats:
        if self.dead:
            raise ActorDied(self.name, self.dead)
        return measure(None)


@dataclass
class Machine:
    """Starts replicas as servers of this process."""

    lives: dict[str, list[tuple[Mortal, ScoreServer]]] = field(default_factory=dict)
    broken: bool = False
    """whether no other one starts"""

    @contextlib.asynccontextmanager
    async def start(self, name: str) -> AsyncIterator[tuple[Health, str]]:
        if self.broken:
            raise ValueError("no memory is left")
        server = serve(build_source(SourceConfig(parts=(PartConfig(name="words", kind="length"),))))
        health = Mortal(name)
        self.lives.setdefault(name, []).append((health, server))
        try:
            yield health, server.url
        finally:
            await self.end(server)

    async def kill(self, name: str) -> None:
        health, server = self.lives[name][-1]
        await self.end(server)
        health.dead = "out of memory"

    async def end(self, server: ScoreServer) -> None:
        server._server.force_exit = True  # else it waits for connections that are kept alive
        await asyncio.to_thread(server.close)


def connect(urls: Sequence[str]) -> RewardClient:
    return RewardClient(urls, retry_s=5.0, pause_s=5.0, ask_s=0.1)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_replica_that_dies_is_started_again_and_asked_at_its_new_address(caplog: pytest.LogCaptureFixture) -> None:
    machine, waits = Machine(), Waits()

    async def scenario() -> None:
        async with reward_replicas(["reward-0", "reward-1"], machine.start, connect, QUICK, waits) as client:
            first = client.urls
            await machine.kill("reward-1")
            assert (await client.score(ASKED))[0].score == 2.0, "the other one answers meanwhile"
            await until(lambda: any(wait.who == "reward-1" for wait in waits.open))
            await until(lambda: len(machine.lives["reward-1"]) == 2 and client.urls != first)
            assert client.urls[0] == first[0]
            await machine.kill("reward-0")
            assert (await client.score(ASKED))[0].score == 2.0, "now it is asked itself"
        assert not waits.open

    asyncio.run(scenario())
    assert "reward-1 is lost: out of memory. It is started again in 0.05 s" in caplog.text


def test_a_lone_replica_pauses_the_run_only_until_it_is_back() -> None:
    machine = Machine()

    async def scenario() -> float:
        async with reward_replicas(["reward-0"], machine.start, connect, QUICK, Waits()) as client:
            await machine.kill("reward-0")
            return (await client.score(ASKED))[0].score

    assert asyncio.run(scenario()) == 2.0
    assert len(machine.lives["reward-0"]) == 2


def test_one_that_cannot_be_started_stays_away_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()

    async def scenario() -> float:
        async with reward_replicas(["reward-0", "reward-1"], machine.start, connect, QUICK, Waits()) as client:
            machine.broken = True
            await machine.kill("reward-0")
            await until(lambda: any(record.levelno == logging.ERROR for record in caplog.records))
            return (await client.score(ASKED))[0].score

    assert asyncio.run(scenario()) == 2.0
    expected = "reward-0 was started 3 times in a row and is lost again: it did not start: no memory is left"
    assert expected in caplog.text


def test_what_keeps_the_first_from_starting_ends_the_run() -> None:
    async def scenario() -> None:
        async with reward_replicas(["reward-0"], Machine(broken=True).start, connect, QUICK, Waits()):
            raise AssertionError

    with pytest.raises(ValueError, match="no memory is left"):
        asyncio.run(scenario())
