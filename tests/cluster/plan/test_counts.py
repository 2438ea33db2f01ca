"""The arithmetic by hand, and beside what the loops themselves do."""

from typing import Any

import pytest

from actors.chat import ChatExample
from cluster.plan.counts import (
    Lengths,
    either,
    indivisible,
    nearest_divisors,
    nearest_multiples,
    plan_ppo,
    plan_reward,
    plan_sft,
    rank_microbatches,
)
from learner.config import SFTConfig
from learner.data.batch import minibatches
from learner.sft import sft_batches

PPO: dict[str, Any] = {
    "iterations": 500,
    "prompts": 512,
    "samples": 1,
    "minibatch": 64,
    "epochs": 1,
    "generators": 4,
    "prompts_per_wave": 32,
    "ranks": 2,
    "max_tokens": 4096,
    "pretraining_per_episode": 8.0,
    "pretraining_tokens": 2048,
    "lengths": Lengths(prompt=512, response=512, longest=512),
}


def test_the_papers_batch():
    plan = plan_ppo(**PPO)
    assert (plan.episodes, plan.minibatches, plan.steps, plan.total_steps) == (512, 8, 8, 4000)
    assert plan.total_episodes == 256_000  # InstructGPT, appendix C.4
    assert plan.waves == 4  # 512 prompts in waves of 32 to 4 generators
    assert plan.microbatches == 8  # 64 of 1,024 tokens, 4 at a time, on 2 ranks
    assert plan.pretraining_sequences == 512
    assert plan.pretraining_microbatches == 128
    assert plan.episode_tokens == 512 * 1024
    assert plan.response_tokens == 512 * 512
    assert plan.pretraining_tokens == 8 * 512 * 2048
    assert plan.total_tokens == 500 * (512 * 1024 + 8 * 512 * 2048)


def test_samples_and_epochs_multiply():
    changes = {"prompts": 10, "samples": 6, "minibatch": 15, "epochs": 3, "pretraining_per_episode": 0.0}
    plan = plan_ppo(**{**PPO, **changes})
    assert (plan.episodes, plan.minibatches, plan.steps) == (60, 4, 12)
    assert (plan.pretraining_sequences, plan.pretraining_microbatches, plan.pretraining_tokens) == (0, 0, 0)
    assert plan.total_tokens == 500 * 60 * 1024 * 3
    assert len(minibatches(60, 15, seed=0)) == plan.minibatches


def test_an_indivisible_batch_is_refused_with_its_neighbours():
    with pytest.raises(
        ValueError,
        match=r"ppo.minibatch_size = 60 .* 512 responses.*= 32 or 64, or ppo.prompts_per_batch = 480 or 540$",
    ):
        plan_ppo(**{**PPO, "minibatch": 60})


@pytest.mark.parametrize(("rows", "batch", "share"), [(100, 32, 0.1), (7, 8, 0.0), (1, 2, 0.4), (65, 16, 0.5)])
def test_sft_steps_are_those_that_the_loop_takes(rows: int, batch: int, share: float):
    examples = [ChatExample(ids=(1, 2), loss_mask=(False, True))] * rows
    config = SFTConfig(epochs=2, batch_size=batch, pretraining_share=share)
    plan = plan_sft(rows=rows, epochs=2, batch=batch, pretraining_share=share, tokens=64, max_tokens=128, ranks=1)
    found = sft_batches(examples, examples, config)
    assert plan.steps == sum(map(len, found))
    assert plan.batch == batch


def test_reward_modelling_holds_prompts_out_and_keeps_completions_together():
    plan = plan_reward(
        rows=1000, valid_share=0.15, epochs=1, batch=64, completions=4, tokens=100, max_tokens=1000, ranks=1
    )
    assert (plan.rows, plan.steps) == (850, 14)
    assert plan.microbatches == 32  # two prompts of 400 tokens each
    assert plan.total_tokens == 14 * 64 * 400
    with pytest.raises(ValueError, match="1 ranked prompts are too few"):
        plan_reward(rows=1, valid_share=0.15, epochs=1, batch=4, completions=4, tokens=9, max_tokens=99, ranks=1)


def test_microbatches_are_those_of_the_learner():
    assert rank_microbatches([100] * 10, 250, 1) == 5
    assert rank_microbatches([100] * 10, 250, 4) == 2
    assert rank_microbatches([100] * 2, 50, 1) == 2  # what is longer than the budget stands alone
    assert rank_microbatches([], 50, 3) == 0


def test_what_is_nearest():
    assert nearest_divisors(512, 60) == [32, 64]
    assert nearest_divisors(7, 100) == [7]
    assert nearest_divisors(12, 6) == [4, 12]
    assert nearest_multiples(8, 20) == [16, 24]
    assert nearest_multiples(8, 3) == [8]
    assert either([32, 64]) == "32 or 64"
    assert indivisible("k", 5, 12, "things") == "k = 5 does not divide the 12 things. Nearest: k = 4 or 6"
