"""The choice among the epochs of an SFT model by the reward model's scores."""

import asyncio
import json
from typing import Any

import pytest

from actors.prompts import stable_hash
from cluster.config.schema import Config, TrackingConfig
from cluster.pipeline.job import Job
from cluster.pipeline.selection import Select
from cluster.pipeline.stage import advance
from cluster.tracking.tracker import Tracker
from reward_server.schema import ScoreReply
from tests.fake_pool import FakePool
from tests.fakes import FakeFleet, FakeGenerator
from tests.tiny_models import tiny_tokenizer

PROMPTS = [{"id": name, "prompt": f"hello {name}"} for name in "abcd"]


@pytest.fixture
def job(tmp_path):
    """A run with three epochs of a baseline and the prompts to choose by."""
    run = tmp_path / "run"
    for epoch in (1, 2, 10):
        folder = run / "baseline-epochs" / str(epoch)
        tiny_tokenizer(folder)
        (folder / "config.json").write_text(json.dumps({"epoch": epoch}))
    (run / "baseline-epochs" / ".half-written").mkdir()
    (run / "baseline").mkdir()
    (run / "baseline" / "config.json").write_text(json.dumps({"epoch": 10}))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    scoring = {"parts": [{"name": "letters", "kind": "function", "target": "tests.hf_generator:share_of_letters"}]}
    config = Config.model_validate(
        {"data": {"prompts_valid": prompts}, "rollout": {"temperature": 0.5}, "scoring": scoring}
    )
    return Job(config=config, run_dir=run, tracker=Tracker(run, TrackingConfig(mode="disabled"), "test"))


class Recorder(FakeGenerator):
    """Remembers the temperature."""

    async def generate(self, query_ids, seeds, max_new_tokens, temperature):
        self.temperature = temperature
        return await super().generate(query_ids, seeds, max_new_tokens, temperature)


class Judge:
    """Likes epoch 2, the second that it is asked about."""

    def __init__(self):
        self.ids = []

    async def ready(self):
        pass

    async def score(self, requests):
        best = (0.5, 1.5, 1.25)[len(self.ids) // len(PROMPTS)]
        self.ids += [request.id for request in requests]
        return [ScoreReply(id=r.id, score=best + (r.id.split("/")[1] in "ab"), parts={}) for r in requests]


class Pool(FakePool):
    """Generators that remember the model that they were started with."""

    def __init__(self, judge):
        super().__init__(rewards=judge)
        self.opened = []

    async def fresh_generators(self, model, max_model_len=None):
        self.opened.append((model.name, Recorder()))
        return FakeFleet(self.opened[-1][1])


def select(job):
    judge = Judge()
    pool: Any = Pool(judge)
    asyncio.run(advance(Select(job), pool))
    chosen = json.loads((job.run_dir / "selection-baseline.json").read_text())["chosen"]
    return chosen, pool.opened, judge


def test_the_epoch_of_the_highest_mean_score_becomes_the_model(job):
    chosen, _, _ = select(job)
    assert chosen == 2
    assert (job.run_dir / "baseline" / "config.json").read_text() == json.dumps({"epoch": 2})
    assert (job.run_dir / "baseline-epochs" / "2" / "config.json").is_file()
    table = json.loads((job.run_dir / "selection-baseline.json").read_text())
    assert (table["chosen"], table["prompts"]) == (2, 4)
    assert [(row["epoch"], row["score"]) for row in table["epochs"]] == [(1, 1.0), (2, 2.0), (10, 1.75)]
    assert all(row["score_ci"][0] < row["score"] < row["score_ci"][1] for row in table["epochs"])
    assert json.loads((job.run_dir / "summary.json").read_text())["select"]["baseline"]["epoch"] == 2
    lines = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["select/score"]) for line in lines] == [(1, 1.0), (2, 2.0), (10, 1.75)]


def test_every_epoch_answers_each_prompt_once_from_the_same_seeds_at_temperature_one(job):
    _, opened, judge = select(job)
    assert [name for name, _ in opened] == ["1", "2", "10"]
    seeds = [stable_hash(job.config.select.seed, row["id"], 0) for row in PROMPTS]
    assert [generator.seeds for _, generator in opened] == [seeds] * 3
    assert {generator.temperature for _, generator in opened} == {1.0}
    assert len(set(judge.ids)) == 12  # an id stands for one text only


def test_without_kept_epochs_the_command_that_keeps_them_is_named(job):
    other = job.config.model_copy(update={"select": job.config.select.model_copy(update={"model": "sft"})})
    with pytest.raises(ValueError, match=r"sft-epochs holds no epochs.*`rayward sft --sft.select reward`"):
        Select(Job(config=other, run_dir=job.run_dir, tracker=job.tracker)).check()
