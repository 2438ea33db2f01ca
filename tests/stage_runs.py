"""What the tests of stages share: a job of overrides, its files, and a learner that learns nothing."""

import asyncio
import json
from pathlib import Path
from typing import Any

import torch

from cluster.config.schema import Config, TrackingConfig
from cluster.pipeline.job import Job
from cluster.pipeline.stage import Stage, advance
from cluster.rundir.lineage import read_lineage
from cluster.runtime.health import Monitor
from cluster.tracking.tracker import Tracker
from tests.fake_pool import FakePool


def make_job(run_dir: Path, **sections: Any) -> Job:
    run_dir.mkdir(exist_ok=True)
    monitor = Monitor()
    tracker = Tracker(run_dir, TrackingConfig(mode="disabled"), "test", monitor=monitor)
    return Job(config=Config.model_validate(sections), run_dir=run_dir, tracker=tracker, monitor=monitor)


def run_stage(stage: Stage, learner: Any = None, generators: Any = (), rewards: Any = None) -> FakePool:
    pool: Any = FakePool(learner, generators, rewards)
    asyncio.run(advance(stage, pool))
    return pool


def rows(path: Path, *values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def summary(job: Job) -> dict[str, Any]:
    return json.loads((job.run_dir / "summary.json").read_text())


def made_of(job: Job) -> dict[str, list[str]]:
    return {one.path: [source.path for source in one.inputs] for one in read_lineage(job.root or job.run_dir)}


class FakeLearner:
    """Learns nothing; the better completion of a pair is the one whose last token is smaller."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __getattr__(self, name):
        async def call(*args, **_):
            self.calls.append((name, *args))
            return {"load": 1_000_000, "ranking_step": {"grad_norm": 0.5}}.get(name)

        return call

    async def language_model_loss(self, *args):
        return 3.0 - 0.5 * sum(name == "language_model_step" for name, *_ in self.calls)

    async def language_model_step(self, *args):
        self.calls.append(("language_model_step", *args))
        return {"loss": 2.5, "grad_norm": 0.5}

    async def last_values(self, name, sequences, max_tokens):
        return torch.tensor([-float(ids[-2]) for ids in sequences])

    def named(self, name: str) -> list[tuple]:
        return [tuple(args) for called, *args in self.calls if called == name]
