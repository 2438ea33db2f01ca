"""Best of n on stand-ins: what is sampled, scored, judged, told and written, and how it goes on after a stop."""

import json
import logging
import math
from dataclasses import replace

import pytest

from actors.prompts import read_demonstrations, stable_hash
from cluster.pipeline.evaluation.best_of_n import BestOfN, curve
from reward_server.client import RewardUnavailable
from reward_server.preferences.labeling import load_labeler
from reward_server.schema import Message
from tests.fakes import FakeGenerator, FakeScorer
from tests.stage_runs import made_of, make_job, rows, run_stage, summary
from tests.tiny_models import tiny_tokenizer

PROMPTS = [{"id": name, "prompt": f"hello {name}"} for name in "abc"]


class Says(FakeGenerator):
    """Gives the same four responses to every prompt."""

    texts = ("good", "good good good", "good good", "good good evil")
    ended = True

    async def generate(self, query_ids, seeds, max_new_tokens, temperature):
        found = await super().generate(query_ids, seeds, max_new_tokens, temperature)
        return [replace(one, text=text, ended=self.ended) for one, text in zip(found, self.texts, strict=True)]


@pytest.fixture
def job(tmp_path):
    def make(**best_of_n):
        if not (tmp_path / "sft").exists():
            tiny_tokenizer(tmp_path / "sft")
            for name in ("sft", "reward"):
                rows(tmp_path / name / "config.json", {})
        prompts = rows(tmp_path / "p.jsonl", *PROMPTS)
        return make_job(
            tmp_path / "run",
            models={"sft": tmp_path / "sft", "reward": tmp_path / "reward"},
            data={"prompts_heldout": prompts, "prompts": prompts},
            rollout={"prompts_per_wave": 1},
            best_of_n={"n": 4} | best_of_n,
        )

    return make


def samples(job):
    return [json.loads(line) for line in (job.run_dir / "best-of-n" / "samples.jsonl").read_text().splitlines()]


def test_every_response_is_scored_and_judged_and_the_best_is_a_demonstration(job, capsys):
    one, generator = job(), Says()
    assert run_stage(BestOfN(one), generators=[generator], rewards=FakeScorer()).started == [one.model("sft")]
    assert generator.seeds == [stable_hash(0, name, k) for name in "abc" for k in range(4)]
    found = samples(one)
    assert [row["id"] for row in found] == ["a", "b", "c"]
    golds = load_labeler(one.config.labeler).verdicts(Says.texts)
    for row in found:
        assert [response["response"] for response in row["responses"]] == list(Says.texts)
        assert [response["score"] for response in row["responses"]] == [4.0, 14.0, 9.0, 14.0]  # their letters
        assert [response["gold"] for response in row["responses"]] == golds
    best = read_demonstrations(one.run_dir / "data" / "best_of_n.jsonl")
    assert [(demonstration.id, demonstration.prompt) for demonstration in best] == [
        (row["id"], (Message(role="user", content=row["prompt"]),)) for row in PROMPTS
    ]
    assert {demonstration.response for demonstration in best} == {"good good good"}  # the first of equal scores
    told = summary(one)["best_of_n"]
    assert (told["model"], told["file"]) == ("sft", "prompts_heldout")
    assert [point["k"] for point in told["curve"]] == [1, 2, 4]
    # of the six pairs five hold a 14, and one is of 4 and 9; the second response is the best of three, the last of two
    assert [point["score"]["value"] for point in told["curve"]] == pytest.approx([41 / 4, (5 * 14 + 9) / 6, 14])
    pairs = (3 * golds[1] + 2 * golds[3] + golds[2]) / 6
    assert [point["gold"]["value"] for point in told["curve"]] == pytest.approx([sum(golds) / 4, pairs, golds[1]])
    assert [point["kl"] for point in told["curve"]] == pytest.approx([0, math.log(2) - 1 / 2, math.log(4) - 3 / 4])
    assert all(point["score"]["n"] == 3 for point in told["curve"])
    logged = [json.loads(line) for line in (one.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"], row["best_of_n/score"]) for row in logged] == [
        ("best-of-n", point["k"], point["score"]["value"]) for point in told["curve"]
    ]
    sources = [str(one.model(name)) for name in ("sft", "reward")] + [str(one.file("prompts_heldout"))]
    assert made_of(one) == {"best-of-n/samples.jsonl": sources, "data/best_of_n.jsonl": sources}
    assert "best of" in capsys.readouterr().out


def test_one_that_was_stopped_goes_on_after_what_was_scored(job):
    class Down(FakeScorer):
        async def score(self, requests):
            if len(self.batches) == 2:
                raise RewardUnavailable("it is down")
            return await super().score(requests)

    one, first, second = job(), Says(), Says()
    with pytest.raises(RewardUnavailable):
        run_stage(BestOfN(one), generators=[first], rewards=Down())
    assert not (one.run_dir / "data" / "best_of_n.jsonl").exists()
    run_stage(BestOfN(one), generators=[second], rewards=(rewards := FakeScorer()))
    assert (len(first.seeds), len(second.seeds), len(rewards.batches)) == (12, 4, 1)
    found = samples(one)
    assert [row["id"] for row in found] == ["a", "b", "c"]
    assert list((one.run_dir / "best-of-n").iterdir()) == [one.run_dir / "best-of-n" / "samples.jsonl"]
    with pytest.raises(ValueError, match=r"best_of_n.n was 4, is 8"):
        run_stage(BestOfN(job(n=8)), generators=[second], rewards=rewards)


def test_what_was_cut_off_or_is_blank_is_no_demonstration(job, caplog):
    class Mostly(Says):
        async def generate(self, query_ids, seeds, max_new_tokens, temperature):
            self.ended, self.texts = len(self.calls) != 1, (" ",) * 4 if len(self.calls) == 2 else Says.texts
            return await super().generate(query_ids, seeds, max_new_tokens, temperature)

    one = job(file="prompts")
    with caplog.at_level(logging.WARNING):
        run_stage(BestOfN(one), generators=[Mostly()], rewards=FakeScorer())
    assert [row.id for row in read_demonstrations(one.run_dir / "data" / "best_of_n.jsonl")] == ["a"]
    assert "of 3 prompts 2 are no demonstrations: their best response is blank, or was cut off" in caplog.text
    assert {response["score"] for response in samples(one)[1]["responses"]} == {-1.0}  # as PPO scores what is cut off


def test_which_model_and_prompts_are_asked_is_a_setting(job):
    one = job(file="prompts", model="policy")
    assert BestOfN.models(one.config) == ("policy", "reward")
    assert BestOfN.data(one.config) == ("prompts",)
    with pytest.raises(ValueError, match=r"there is no policy model in .*run `rayward ppo`.* or set models.policy"):
        BestOfN(one).check()
    assert [prompt.id for prompt in BestOfN(job(prompts=2)).check().prompts] == ["a", "b"]


def test_the_interval_is_over_prompts_and_n_is_told_where_it_is_no_power_of_two():
    pool = [{"responses": [{"score": float(p), "gold": 1.0 - p}] * 3} for p in range(4)]
    points = curve(pool, 3)
    assert [point.k for point in points] == [1, 2, 3]
    for point in points:
        assert (point.score.value, point.gold.value) == pytest.approx((1.5, -0.5))
        assert point.score.ci == points[0].score.ci
        assert 0 <= point.score.ci[0] < 1.5 < point.score.ci[1] <= 3
    assert curve(pool[:1], 3)[0].score.ci == (0.0, 0.0)
