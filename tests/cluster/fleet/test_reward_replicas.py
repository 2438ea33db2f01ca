"""Replicas that die and come back, behind a real client and real servers."""

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from actors.waits import Waits
from cluster.config.schema import ClusterConfig, FleetConfig
from cluster.fleet.processes import Processes
from cluster.fleet.reward_replicas import reward_replicas
from cluster.runtime.health import ActorDied, Health, Stats, measure
from cluster.runtime.resources import Plan, Process
from cluster.runtime.session import start_ray
from reward_server.app import ScoreServer, serve
from reward_server.client import RewardClient, RewardUnavailable
from reward_server.config import PartConfig, SourceConfig
from reward_server.schema import Message, ScoreReply, ScoreRequest
from reward_server.sources import Source, build_source

QUICK = FleetConfig(backoff_s=0.05, watch_s=0.02, max_restarts=2)
ASKED = [ScoreRequest(id="a", prompt=(Message(role="user", content="Hi"),), response="one two", ended=True)]


class Mortal(Health):
    """The health of a process that is dead once `dead` says why, and says nothing while it is `stopped`."""

    def __init__(self, name: str, server: ScoreServer) -> None:
        super().__init__(name, self._say)
        self.dead = ""
        self.stopped = False
        self._server = server

    async def _say(self) -> Stats:
        if self.dead:
            raise ActorDied(self.name, self.dead)
        while self.stopped:
            await asyncio.sleep(0.01)
        return measure(self._server)


class Hanging(Source):
    """Does not come back from its first batch after the probe, until it is `freed`."""

    def __init__(self) -> None:
        self.freed = threading.Event()
        self.batches = 0

    def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        self.batches += requests[0].id.endswith("/a")
        if self.batches:
            self.freed.wait(30)
        return [ScoreReply(id=request.id, score=-1.0) for request in requests]


@dataclass
class Machine:
    """Starts replicas as servers of this process."""

    lives: dict[str, list[tuple[Mortal, ScoreServer]]] = field(default_factory=dict)
    broken: bool = False
    """whether no other one starts"""
    hanging: list[Source] = field(default_factory=list)
    """what the next ones score by"""

    @contextlib.asynccontextmanager
    async def start(self, name: str) -> AsyncIterator[tuple[Health, str]]:
        if self.broken:
            raise ValueError("no memory is left")
        words = build_source(SourceConfig(parts=(PartConfig(name="words", kind="length"),)))
        server = serve(self.hanging.pop(0) if self.hanging else words)
        health = Mortal(name, server)
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
        server._listening._server.force_exit = True  # else it waits for connections that are kept alive
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
        async with reward_replicas(["reward-0", "reward-1"], machine.start, connect, QUICK, waits, 5.0) as client:
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
        async with reward_replicas(["reward-0"], machine.start, connect, QUICK, Waits(), 5.0) as client:
            await machine.kill("reward-0")
            return (await client.score(ASKED))[0].score

    assert asyncio.run(scenario()) == 2.0
    assert len(machine.lives["reward-0"]) == 2


def test_one_that_cannot_be_started_stays_away_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()

    async def scenario() -> float:
        async with reward_replicas(["reward-0", "reward-1"], machine.start, connect, QUICK, Waits(), 5.0) as client:
            machine.broken = True
            await machine.kill("reward-0")
            await until(lambda: any(record.levelno == logging.ERROR for record in caplog.records))
            return (await client.score(ASKED))[0].score

    assert asyncio.run(scenario()) == 2.0
    expected = "reward-0 was started 3 times in a row and is lost again: it did not start: no memory is left"
    assert expected in caplog.text


def test_what_keeps_the_first_from_starting_ends_the_run() -> None:
    async def scenario() -> None:
        async with reward_replicas(["reward-0"], Machine(broken=True).start, connect, QUICK, Waits(), 5.0):
            raise AssertionError

    with pytest.raises(ValueError, match="no memory is left"):
        asyncio.run(scenario())


def test_a_replica_that_says_nothing_is_started_again_as_a_dead_one(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()

    async def scenario() -> float:
        async with reward_replicas(["reward-0"], machine.start, connect, QUICK, Waits(), 0.2) as client:
            await asyncio.sleep(0.4)
            assert len(machine.lives["reward-0"]) == 1, "it answers"
            machine.lives["reward-0"][0][0].stopped = True
            await until(lambda: len(machine.lives["reward-0"]) == 2)
            return (await client.score(ASKED))[0].score

    assert asyncio.run(scenario()) == 2.0
    assert "reward-0 is lost: it has said nothing for 0 s. It is started again" in caplog.text


def test_a_replica_that_never_ends_a_batch_is_started_again_and_the_next_one_scores_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = Hanging()
    machine = Machine(hanging=[source])

    def impatient(urls: Sequence[str]) -> RewardClient:
        return RewardClient(urls, retry_s=5.0, attempt_s=0.5)

    async def scenario() -> float:
        async with reward_replicas(["reward-0"], machine.start, impatient, QUICK, Waits(), 0.2) as client:
            await asyncio.sleep(0.4)
            assert len(machine.lives["reward-0"]) == 1, "it has no work"
            try:
                return (await client.score(ASKED))[0].score
            finally:
                source.freed.set()

    assert asyncio.run(scenario()) == 2.0
    assert "reward-0 is lost: it has computed one batch for 0 s; where scores take so long, raise" in caplog.text


def test_when_none_is_to_come_back_the_run_is_told_at_once_instead_of_after_the_pause() -> None:
    sources = [Hanging() for _ in range(6)]
    machine = Machine(hanging=list(sources))

    def patient(urls: Sequence[str]) -> RewardClient:
        return RewardClient(urls, retry_s=0.1, pause_s=60.0, attempt_s=0.3, ask_s=0.1)

    async def scenario() -> None:
        async with reward_replicas(["reward-0", "reward-1"], machine.start, patient, QUICK, Waits(), 0.2) as client:
            try:
                await client.score(ASKED)
            finally:
                for source in sources:
                    source.freed.set()

    began = time.monotonic()
    with pytest.raises(
        RewardUnavailable,
        match=r"no replica .* is left: reward-\d was started 3 times in a row and is lost again: it has computed one",
    ):
        asyncio.run(scenario())
    assert time.monotonic() - began < 20
    assert not machine.hanging


SLOW_ONCE = """
import pathlib, re
def score(prompts, responses):
    once = pathlib.Path(__file__).with_name("once")
    if "!" in responses[0] and not once.exists():
        once.touch()
        re.search("(a|aa)+$", "a" * 60 + "!")  # holds Python's lock for years
    return [float(len(response)) for response in responses]
"""


@pytest.mark.slow
def test_a_process_that_is_stopped_and_one_whose_function_backtracks_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Real processes: the replacement scores what they were asked for."""
    (tmp_path / "slow_once.py").write_text(SLOW_ONCE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    replicas = tuple(Process(name=f"reward-{n}", threads=1, cpus=1) for n in range(2))
    plan = Plan(processes=replicas, concurrent={})
    fleet = FleetConfig(backoff_s=0.1, watch_s=0.5)
    run = Processes(ClusterConfig(fleet=fleet, start_deadline_s=60), plan, tmp_path / "logs")
    parts = (PartConfig(name="mine", kind="function", target="slow_once:score"),)
    source = SourceConfig(parts=parts, retry_s=3.0, pause_s=60.0)

    async def scenario() -> float:
        async with run.reward(source, None) as client:
            first = run.monitor.processes()[0]
            await first.attend(5.0)
            assert first.last
            os.kill(first.last.pid, signal.SIGSTOP)
            return (await client.score([ASKED[0].model_copy(update={"response": "five!"})]))[0].score

    with start_ray("local", cpus=2, log_dir=tmp_path / "logs"):
        assert asyncio.run(scenario()) == 5.0
    assert caplog.text.count("is lost: it has said nothing for") == 2
