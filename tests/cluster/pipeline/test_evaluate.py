"""Held-out prompts, the samples that are shown, and win rates by the labeler's verdicts."""

import asyncio
from typing import Any, cast

import pytest
import torch

from actors.prompts import Prompt
from cluster.pipeline.evaluate import (
    Evaluate,
    EvaluationSet,
    Evaluator,
    by_use_case,
    read_evaluation_set,
    samples_to_show,
    win_rate,
)
from cluster.pipeline.ppo import PPO
from cluster.rundir.files import read_rows
from reward_server.preferences.labeling import load_labeler
from reward_server.schema import Message
from tests.fakes import FakeEncoding, FakeFleet, FakeGenerator, FakeScorer, prompts
from tests.stage_runs import make_job
from tests.stage_runs import rows as write_rows
from tests.tiny_models import tiny_causal_lm, tiny_tokenizer


def rows(count):
    return [{"id": str(n), "score": float((n * 7) % count)} for n in range(count)]


def test_the_best_the_worst_and_some_of_the_rest_are_shown():
    shown = samples_to_show(rows(11), each=2, seed=0)
    by_reason = {why: [row["score"] for row in shown if row["shown for"] == why] for why in ("highest", "lowest")}
    assert by_reason == {"highest": [10.0, 9.0], "lowest": [0.0, 1.0]}
    assert len(shown) == len({row["id"] for row in shown}) == 6
    assert samples_to_show(rows(11), each=2, seed=0) == shown


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6, 7])
def test_no_sample_is_shown_twice_and_few_are_all_shown(count):
    shown = samples_to_show(rows(count), each=2, seed=1)
    assert len(shown) == len({row["id"] for row in shown}) == min(count, 6)


def test_only_the_first_prompts_are_held_out_for_evaluation(tmp_path):
    tiny_tokenizer(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text("{}")
    prompts = write_rows(tmp_path / "p.jsonl", *({"id": str(i), "prompt": "hello"} for i in range(5)))
    text = write_rows(tmp_path / "t.jsonl", {"text": "the quick brown fox " * 20})
    data = {"prompts_heldout": prompts, "pretraining_valid": text}
    short = {"pretraining": {"sequence_tokens": 16}}
    one = make_job(tmp_path / "run", data=data, models={"sft": tmp_path / "base"}, evaluation={"prompts": 3}, ppo=short)
    found = read_evaluation_set(one).prompts
    assert [prompt.id for prompt in found] == ["0", "1", "2"]
    assert found[0] == Prompt(id="0", messages=(Message(role="user", content="hello"),), reference=None)


def test_a_long_reference_is_cut_for_the_probe_and_text_to_the_positions(tmp_path, caplog):
    """An engine that was given one died of it, and the next ones too."""
    tiny_causal_lm(tmp_path / "base", max_positions=64)
    long = {"id": "x", "prompt": "hello", "reference": "good " * 200}
    data = {
        "prompts_heldout": write_rows(tmp_path / "p.jsonl", long, {"id": "y", "prompt": "hello", "reference": "good"}),
        "pretraining_valid": write_rows(tmp_path / "t.jsonl", {"text": "the quick brown fox " * 90}),
    }
    rollout = {"max_prompt_tokens": 40, "max_new_tokens": 24}
    one = make_job(tmp_path / "run", data=data, models={"sft": tmp_path / "base"}, rollout=rollout)
    found = read_evaluation_set(one)
    first, second = found.probes()
    assert len(first.ids) - first.first == 23  # vLLM wants room for one more token
    assert len(second.ids) - second.first < 10
    assert "the first 23 tokens of the references of ['x']" in caplog.text
    assert {len(example.ids) for example in found.text} == {64}


def test_figures_by_use_case_are_means_with_their_number():
    rows = [
        {"use_case": case, "gold": gold, "score": 2 * gold}
        for case, gold in (("chat", 0.0), ("chat", 0.5), ("qa", 1.0))
    ]
    found = by_use_case([*rows, {"use_case": None, "gold": 9.0, "score": 9.0}])
    half = 1.959964 * 0.25  # of 0 and 0.5 the standard error is 0.25
    interval = found["chat"].pop("gold_ci")
    assert interval == pytest.approx([0.25 - half, 0.25 + half])
    assert found == {"chat": {"n": 2, "gold": 0.25, "score": 0.5}, "qa": {"n": 1, "gold": 1.0, "score": 2.0}}
    assert by_use_case([{"gold": 1.0, "score": 1.0}]) == {}


class Learner:
    """Notes when it computes; log-probs of the policy are a quarter above those of the reference."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    async def language_model_loss(self, name: str, examples: Any, max_tokens: int) -> float:
        self.notes.append("loss")
        return 2.5

    async def response_logprobs(self, name: str, batch: Any, max_tokens: int, temperature: float) -> torch.Tensor:
        self.notes.append(name)
        return batch.mask * (-1.0 if name == "policy" else -1.25)


@pytest.mark.parametrize("apart", [True, False])
def test_the_loss_of_text_is_computed_while_actors_answer_where_the_learner_has_cores_of_its_own(tmp_path, apart):
    notes: list[str] = []
    job = make_job(tmp_path / "run")
    held_out = EvaluationSet(
        prompts=prompts(3),
        text=(),
        encoding=FakeEncoding(),  # pyright: ignore[reportArgumentType]
        labeler=load_labeler(job.config.labeler),
        reply_tokens=8,
    )

    def answered(queries: Any) -> None:
        notes.append("answer")

    fleet: Any = FakeFleet(FakeGenerator(fault=answered, turns=lambda: 20))
    learner, rewards = cast("Any", Learner(notes)), cast("Any", FakeScorer())
    evaluator = Evaluator(job=job, held_out=held_out, learner=learner, fleet=fleet, rewards=rewards, apart=apart)
    found = asyncio.run(evaluator.measure("sft", job.config.ppo))
    first, *rest = ["loss", *["answer"] * 3] if apart else [*["answer"] * 3, "loss"]
    assert notes == [first, *rest, "policy", "reference"]
    assert found.pretraining_loss == 2.5
    assert found.kl == pytest.approx(0.25 * found.length)
    for row in read_rows(job.run_dir / "evaluations" / "sft.jsonl"):
        assert row["response"] == "".join(text for text, _ in row["tokens"])
        assert row["kl"] == sum(kl for _, kl in row["tokens"]) == 0.25 * len(row["tokens"])


@pytest.mark.parametrize("kind", [Evaluate, PPO])
def test_the_report_and_the_card_are_written_at_the_end(tmp_path, kind):
    job = make_job(tmp_path / "run")
    job.summarise(labeler="people")
    kind(job).conclude()
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "card.md").is_file()


# --- win rates


def test_a_tie_is_half_a_win_and_the_interval_is_wilsons():
    ours = {str(n): 1.0 for n in range(61)} | {str(n): 0.0 for n in range(61, 100)}
    theirs = (
        {str(n): 0.0 for n in range(61)} | {str(n): 0.5 for n in range(61, 94)} | {str(n): 0.04 for n in range(94, 100)}
    )
    found = win_rate(ours, theirs, tie_margin=0.05)
    assert found is not None
    assert (found.wins, found.losses, found.ties, found.rate) == (61, 33, 6, 0.64)
    assert found.ci == pytest.approx((0.542354, 0.727288), abs=1e-6)


def test_only_prompts_that_both_answered_count():
    found = win_rate({"a": 1.0, "b": 1.0}, {"b": 0.0, "c": 5.0}, tie_margin=0.0)
    assert found is not None
    assert (found.wins, found.losses, found.ties) == (1, 0, 0)
    assert win_rate({"a": 1.0}, {"b": 1.0}, tie_margin=0.0) is None


def test_the_other_side_has_the_rest():
    ours, theirs = {"a": 1.0, "b": 0.0, "c": 0.2}, {"a": 0.0, "b": 1.0, "c": 0.0}
    one, other = win_rate(ours, theirs, 0.1), win_rate(theirs, ours, 0.1)
    assert one is not None
    assert other is not None
    assert one.rate + other.rate == 1
