"""Processes that start when they are needed, and generators that are given the weights that are asked for."""

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.config.schema import Config, TrackingConfig
from cluster.pipeline import workplace as module
from cluster.pipeline.job import Job
from cluster.pipeline.workplace import Workplace
from cluster.tracking.tracker import Tracker


class Recorder:
    """Notes every call on learner and fleet, in order."""

    def __init__(self, notes: list[Any], name: str) -> None:
        self.notes, self.name = notes, name
        self.publisher: Any = None

    def __getattr__(self, method: str):
        async def call(*args: Any, **_: Any) -> None:
            self.notes.append((self.name, method, *args[:3]))

        return call


class FakeProcesses:
    def __init__(self, notes: list[Any]) -> None:
        self.notes = notes

    @asynccontextmanager
    async def learner(self):
        self.notes.append("learner starts")
        yield Recorder(self.notes, "learner")
        self.notes.append("learner stops")

    @asynccontextmanager
    async def generators(self, config, model):
        self.notes.append(f"fleet starts with {model}")
        yield Recorder(self.notes, "fleet")
        self.notes.append("fleet stops")


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """What happens while a function works in a workplace."""

    class NoProbes:
        def __init__(self, job: Job) -> None:
            pass

        def probes(self) -> list[Any]:
            return []

    monkeypatch.setattr(module, "HeldOut", NoProbes)
    tracker = Tracker(tmp_path, TrackingConfig(mode="disabled"), "test")

    def happened(work) -> list[Any]:
        found: list[Any] = []
        processes: Any = FakeProcesses(found)

        async def run() -> None:
            async with Workplace(Job(config=Config(), run_dir=tmp_path, tracker=tracker), processes) as place:
                await work(place)

        asyncio.run(run())
        return found

    return happened


def test_nothing_starts_before_it_is_needed(notes):
    async def idle(place: Workplace) -> None:
        pass

    assert notes(idle) == []


def test_the_fleet_starts_with_the_first_model_and_is_given_others_by_the_learner(notes):
    async def work(place: Workplace) -> None:
        first = await place.fleet(Path("sft"))
        assert await place.fleet(Path("sft")) is first
        assert await place.fleet(Path("policy"), exactly=False) is first
        assert await place.fleet(Path("policy")) is first
        place.weights = Path("trained")  # as PPO leaves them
        await place.fleet(Path("trained"))

    found = notes(work)
    assert found[:2] == ["fleet starts with sft", "learner starts"]
    assert [note[1] for note in found[2:6]] == ["load", "open_sender", "publish", "unload"]
    assert found[2] == ("learner", "load", "policy", "policy", Path("policy"))
    assert found[4] == ("fleet", "publish", 0)
    assert found[6:] == ["learner stops", "fleet stops"]
