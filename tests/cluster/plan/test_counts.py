"""The arithmetic by hand, and beside what the loops themselves do."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from actors.chat import ChatExample
from cluster.config.schema import Config
from cluster.pipeline.stages import STAGES
from cluster.plan.counts import Counts, Lengths, count, divisors, lengths_of, neighbours, rows_of
from learner.config import SFTConfig
from learner.data.batch import minibatches
from learner.sft import sft_batches
from tests.settings import settings

LENGTHS = Lengths(prompt=512, response=512, longest=512)
NOWHERE = Path("nowhere")
PAPER = {
    "cluster.generators": 4,
    "cluster.learner_ranks": 2,
    "rollout.prompts_per_wave": 32,
    "ppo.pretraining.sequence_tokens": 2048,
    "ppo.pretraining.sequences_per_episode": 8.0,
    "ppo.max_tokens_per_microbatch": 4096,
}


def counted(stage: str, values: dict[str, Any], lengths: Lengths = LENGTHS, **options: Any) -> Counts:
    found = count(settings(values), STAGES[stage], lengths, NOWHERE, **options)
    assert found is not None
    return found


def test_the_papers_batch():
    found = counted("ppo", PAPER)
    assert (found.minibatch, found.steps, found.times) == (64, 8, 500)
    assert found.numbers["total_steps"] == 4000
    assert found.numbers["total_episodes"] == 256_000  # InstructGPT, appendix C.4
    assert found.waves == 4  # 512 prompts in waves of 32 to 4 generators
    assert found.microbatches == 8  # 64 of 1,024 tokens, 4 at a time, on 2 ranks
    assert (found.pretraining_sequences, found.pretraining_microbatches) == (512, 128)
    assert found.numbers["total_tokens"] == 500 * (512 * 1024 + 8 * 512 * 2048)


def test_samples_and_epochs_multiply():
    values = {"ppo.prompts_per_batch": 10, "rollout.samples_per_prompt": 6, "ppo.minibatch_size": 15}
    values |= {"ppo.epochs": 3, "ppo.pretraining.coef": 0}
    found = counted("ppo", PAPER | values)
    assert (found.numbers["episodes"], found.steps) == (60, 12)
    assert (found.pretraining_sequences, found.pretraining_microbatches) == (0, 0)
    assert found.numbers["total_tokens"] == 500 * 60 * 1024 * 3
    assert len(minibatches(60, 15, seed=0)) * 3 == found.steps


def test_an_indivisible_batch_is_refused_with_its_neighbours():
    with pytest.raises(ValueError, match=r"= 60 .* 512 responses.*= 32 or 64, or ppo.prompts_per_batch = 480 or 540$"):
        counted("ppo", {"ppo.minibatch_size": 60})
    assert neighbours(divisors(7), 100) == "7"
    assert neighbours(divisors(12), 6) == "4 or 12"


@pytest.mark.parametrize(("rows", "batch", "share"), [(100, 32, 0.1), (7, 8, 0.0), (1, 2, 0.4), (65, 16, 0.5)])
def test_sft_steps_are_those_that_the_loop_takes(rows: int, batch: int, share: float):
    section = SFTConfig(epochs=2, batch_size=batch, pretraining_share=share)
    found = counted("sft", {"sft": section, "plan.demonstrations": rows})
    examples = [ChatExample(ids=(1, 2), loss_mask=(False, True))] * rows
    assert found.steps == sum(map(len, sft_batches(examples, examples, section)))
    assert (found.minibatch, found.step_tokens) == (batch, batch * 1024)


def test_reward_modelling_holds_prompts_out_and_keeps_completions_together(tmp_path: Path):
    values = {"plan.ranked_prompts": 1000, "reward.max_tokens_per_microbatch": 1000}
    found = counted("reward", values, Lengths(prompt=50, response=50, longest=50))
    assert (found.rows, found.steps) == (850, 14)
    assert found.microbatches == 32  # two prompts of 400 tokens each
    assert found.numbers["total_tokens"] == 14 * 64 * 400
    (tmp_path / "one.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="too few"):
        counted("reward", {"data.comparisons": tmp_path / "one.jsonl"})


def test_sampling_of_each_kind(tmp_path: Path):
    values = {"plan.ranked_prompts": 100, "rollout.prompts_per_wave": 10, "cluster.generators": 4}
    sample = counted("sample", values)
    assert (sample.numbers["episodes"], sample.waves) == (400, 3)
    assert counted("evaluate", values).rows == 128
    best = counted("best-of-n", {"best_of_n.n": 8, "best_of_n.prompts": 50, "rollout.prompts_per_wave": 10})
    assert (best.rows, best.samples, best.waves) == (50, 8, 5)
    assert count(Config(), STAGES["select"], LENGTHS, NOWHERE) is None  # nobody knows how many prompts there are
    assert count(Config(), STAGES["sft"], LENGTHS, NOWHERE) is None
    rounds = {"rounds.count": 3, "rounds.prompts": 100}
    assert counted("reward", rounds, rounds=True).rows == 300 - 45  # the last round has the comparisons of all
    assert counted("sample", rounds, rounds=True).rows == 100
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": 2}\n'))
    assert rows_of(settings({"data.demonstrations": packed}), "demonstrations", NOWHERE) == 2
    (tmp_path / "rows.json").write_text('[{"a":\n1},\n{"a": 2},\n{"a": 3}]')
    assert rows_of(settings({"data.demonstrations": tmp_path / "rows.json"}), "demonstrations", NOWHERE) == 3


def test_lengths_are_those_of_the_settings():
    values = {"rollout.max_prompt_tokens": 50, "rollout.max_new_tokens": 30}
    found = lengths_of(settings(values))
    assert (found.prompt, found.response, found.longest) == (50, 30, 30)
    stated = lengths_of(settings(values | {"plan.prompt_tokens": 7, "plan.response_tokens": 5}))
    assert (stated.prompt, stated.response, stated.longest, stated.sequence) == (7, 5, 30, 12)
