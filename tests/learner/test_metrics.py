"""Metrics of an iteration by hand, from one batch of two responses and the sums of two minibatches."""

import math
from dataclasses import replace

import pytest
import torch

from learner.data.batch import collate
from learner.metrics import Laps, iteration_metrics, part_means
from learner.worker.ppo_steps import Evaluation, Targets
from tests.tiny_batches import trajectory

LOGPROBS = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, 0.0, 0.0]])
REFERENCE = torch.tensor([[-1.5, -1.5, -1.0], [-1.0, 0.0, 0.0]])
SUMS = [
    {
        "tokens": 3.0,
        "value_tokens": 3.0,
        "loss/policy": 1.5,
        "loss/value": 3.0,
        "ratio/mean": 3.0,
        "policy/clip_fraction": 0.0,
        "policy/approx_kl": 0.25,
        "value/clip_fraction": 1.0,
        "grad_norm/policy": 2.0,
        "time/policy": 0.5,
    },
    {
        "tokens": 1.0,
        "value_tokens": 1.0,
        "loss/policy": 0.5,
        "loss/value": 1.0,
        "ratio/mean": 2.0,
        "policy/clip_fraction": 1.0,
        "policy/approx_kl": 0.75,
        "value/clip_fraction": 0.0,
        "grad_norm/policy": 4.0,
        "time/policy": 1.0,
    },
]


def metrics(sums=SUMS, version=7):
    batch = collate([trajectory(4, 3, 1, score=1.0, version=5), trajectory(5, 1, 2, score=-3.0, version=7)], pad_id=0)
    values = torch.tensor([[0.5, 0.5, 0.5], [1.5, 9.0, 9.0]])  # 9 lies in the padding
    entropies = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0]])
    evaluation = Evaluation(logprobs=LOGPROBS, ref_logprobs=REFERENCE, values=values, entropies=entropies)
    returns = torch.tensor([[0.0, 1.0, 0.0], [3.0, 9.0, 9.0]])
    targets = Targets(evaluation=evaluation, advantages=torch.zeros(2, 3), returns=returns, weights=None)
    return iteration_metrics(batch, version, targets, 0.1, sums)


def test_scores_rewards_and_lengths_are_per_response():
    found = metrics()
    assert (found["score/mean"], found["score/std"]) == (-1.0, 2.0)
    assert found["reward/mean"] == pytest.approx((0.95 - 2.95) / 2)  # the KL of each is .5 and -.5
    assert found["reward/std"] == pytest.approx(1.95)
    assert (found["response/length"], found["response/eos_rate"]) == (2.0, 1.0)


def test_kl_is_summed_over_a_response_and_averaged_over_responses():
    found = metrics()
    # k1: .5 - .5 + .5 = .5 and -.5
    assert found["kl/mean"] == pytest.approx(0.0)
    assert found["kl/std"] == pytest.approx(0.5)
    low, high = math.exp(-0.5) - 1 + 0.5, math.exp(0.5) - 1 - 0.5
    assert found["kl/k3"] == pytest.approx((2 * low + high + high) / 2, rel=1e-5)
    assert found["kl/k2"] == pytest.approx((3 * 0.125 + 0.125) / 2)
    assert found["kl/coef"] == 0.1


def test_values_and_entropies_are_per_token_without_the_padding():
    found = metrics()
    assert found["value/mean"] == pytest.approx(3.0 / 4)
    assert found["policy/entropy"] == pytest.approx(10.0 / 4)
    # errors .5 .5 .5 1.5 squared: mean .75; returns 0 1 0 3: variance 1.5
    assert found["value/explained_variance"] == pytest.approx(0.5)


def test_sums_of_minibatches_are_divided_by_their_tokens_together():
    found = metrics()
    assert found["loss/policy"] == pytest.approx(0.5)
    assert found["loss/value"] == pytest.approx(1.0)
    assert found["ratio/mean"] == pytest.approx(1.25)  # 5 / 4, not the mean of 1 and 2
    assert found["ratio/first_minibatch"] == pytest.approx(1.0)
    assert found["policy/clip_fraction"] == pytest.approx(0.25)
    assert found["policy/approx_kl"] == pytest.approx(0.25)
    assert found["value/clip_fraction"] == pytest.approx(0.25)


def test_norms_are_averaged_over_minibatches_and_seconds_added():
    found = metrics()
    assert found["grad_norm/policy"] == 3.0
    assert found["time/policy"] == 1.5


def test_the_pretraining_loss_is_per_token_of_text_and_absent_without_text():
    assert "loss/pretraining" not in metrics()
    text = [
        {**SUMS[0], "loss/pretraining": 30.0, "pretraining_tokens": 10.0, "grad_norm/pretraining": 1.0},
        {**SUMS[1], "loss/pretraining": 10.0, "pretraining_tokens": 30.0, "grad_norm/pretraining": 2.0},
    ]
    found = metrics(text)
    assert found["loss/pretraining"] == 1.0
    assert found["grad_norm/pretraining"] == 1.5


def test_a_skipped_step_is_in_no_mean():
    value = {key: SUMS[0][key] for key in ("value_tokens", "loss/value", "value/clip_fraction")}
    found = metrics([{**value, "skipped/policy": 1.0, "time/policy": 0.5}, SUMS[1]])
    assert found["loss/policy"] == 0.5
    assert found["grad_norm/policy"] == 4.0
    assert found["loss/value"] == pytest.approx(1.0)
    assert found["time/policy"] == 1.5
    assert "ratio/first_minibatch" not in found


def test_staleness_counts_from_the_version_that_trains():
    found = metrics(version=7)
    assert (found["staleness/mean"], found["staleness/max"]) == (1.0, 2.0)
    assert found["progress/version"] == 8.0


def test_each_part_of_the_scores_has_its_mean():
    batch = [
        replace(trajectory(1, 1, 0, 0.0), parts=parts) for parts in ({"words": 1.0, "tone": 0.5}, {"words": 4.0}, {})
    ]
    assert part_means(batch) == {"parts/words": 2.5, "parts/tone": 0.5}
    assert part_means([replace(trajectory(1, 1, 0, 0.0), parts={})]) == {}


def test_laps_are_the_seconds_between_calls(monkeypatch):
    clock = iter([10.0, 12.0, 12.5])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    lap = Laps()
    lap("rollout")
    lap("update")
    assert lap.times() == {"time/rollout": 2.0, "time/update": 0.5, "time/iteration": 2.5}
