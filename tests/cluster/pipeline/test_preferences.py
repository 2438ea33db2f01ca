"""Completions that are sampled and ranked, on stand-ins."""

import pytest

from cluster.pipeline.preferences import Rank, Sample
from reward_server.preferences.labeling import read_comparisons
from tests.fakes import FakeGenerator
from tests.stage_runs import made_of, make_job, rows, run_stage, summary
from tests.tiny_models import tiny_tokenizer


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    return folder


def test_completions_are_sampled_and_then_ranked(tmp_path, base):
    prompts = rows(tmp_path / "p.jsonl", {"id": "x", "prompt": "hello"}, {"id": "y", "prompt": "world"})
    settings = {"models": {"sft": base}, "sample": {"completions_per_prompt": 3}}
    one = make_job(tmp_path / "run", data={"preference_prompts": prompts}, **settings)
    assert run_stage(Sample(one), generators=[FakeGenerator()]).started == [base]
    sampled = read_comparisons(one.run_dir / "data" / "completions.jsonl")
    assert [(c.id, len(c.responses), c.ranks, c.labeler) for c in sampled] == [
        ("x", 3, None, None),
        ("y", 3, None, None),
    ]
    run_stage(Rank(one))
    ranked = read_comparisons(one.run_dir / "data" / "comparisons.jsonl")
    assert [c.responses for c in ranked] == [c.responses for c in sampled]
    assert {c.labeler for c in ranked} == {"simulated:vader"}
    assert all(c.ranks and min(c.ranks) == 0 for c in ranked)
    assert summary(one) == {"labeler": "simulated labeler (VADER)"}
    assert made_of(one) == {
        "data/completions.jsonl": [str(base), str(prompts)],
        "data/comparisons.jsonl": ["data/completions.jsonl"],
    }


def test_a_preference_prompt_that_is_too_long_stops_before_sampling(tmp_path, base):
    prompts = rows(tmp_path / "p.jsonl", {"id": "x", "prompt": "hello " * 50})
    settings = {"models": {"sft": base}, "rollout": {"max_prompt_tokens": 20}}
    one, generator = make_job(tmp_path / "run", data={"preference_prompts": prompts}, **settings), FakeGenerator()
    with pytest.raises(ValueError, match=r"'x' has .* tokens, more than the 20 allowed"):
        run_stage(Sample(one), generators=[generator])
    assert generator.calls == []
    assert not (one.run_dir / "stages").exists(), "nothing was recorded as begun"
