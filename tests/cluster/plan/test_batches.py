"""The arithmetic of a configuration's steps."""

import gzip
from pathlib import Path

import pytest

from cluster.config.schema import Config
from cluster.plan.batches import batches_of, rows_of
from cluster.plan.counts import Lengths, PPOPlan, SamplingPlan, StepsPlan
from cluster.plan.remedies import changed

LENGTHS = Lengths(prompt=10, response=5, longest=8)
NOWHERE = Path("nowhere")


def test_rows_are_those_of_the_files_else_those_of_the_plan(tmp_path: Path):
    assert batches_of(Config(), "sft", LENGTHS, NOWHERE) is None
    stated = changed(Config(), {"plan.demonstrations": 64})
    sft = batches_of(stated, "sft", LENGTHS, NOWHERE)
    assert isinstance(sft, StepsPlan)
    assert (sft.rows, sft.step_tokens) == (64, 32 * 15)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": 2}\n'))
    counted = changed(stated, {"data.demonstrations": packed})
    assert rows_of(counted, "demonstrations", NOWHERE) == 2


def test_sampling_of_each_kind():
    config = changed(Config(), {"plan.ranked_prompts": 100, "rollout.prompts_per_wave": 10, "cluster.generators": 4})
    sample = batches_of(config, "sample", LENGTHS, NOWHERE)
    assert isinstance(sample, SamplingPlan)
    assert (sample.episodes, sample.waves, sample.response_tokens, sample.sequence_tokens) == (400, 3, 2000, 6000)
    evaluate = batches_of(config, "evaluate", LENGTHS, NOWHERE)
    assert isinstance(evaluate, SamplingPlan)
    assert evaluate.prompts == 128
    assert batches_of(config, "select", LENGTHS, NOWHERE) is None  # nobody knows how many validation prompts there are


def test_the_last_round_has_the_comparisons_of_all(tmp_path: Path):
    config = changed(Config(), {"rounds.count": 3, "rounds.prompts": 100})
    last = batches_of(config, "reward", LENGTHS, NOWHERE, in_rounds=True)
    newest = batches_of(changed(config, {"rounds.comparisons": "newest"}), "reward", LENGTHS, NOWHERE, in_rounds=True)
    assert isinstance(last, StepsPlan)
    assert isinstance(newest, StepsPlan)
    assert (last.rows, newest.rows) == (300 - 45, 100 - 15)


def test_an_indivisible_batch_is_refused():
    assert isinstance(batches_of(Config(), "ppo", LENGTHS, NOWHERE), PPOPlan)
    with pytest.raises(ValueError, match=r"ppo.minibatch_size = 60 does not divide"):
        batches_of(changed(Config(), {"ppo.minibatch_size": 60}), "ppo", LENGTHS, NOWHERE)
