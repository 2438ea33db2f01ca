"""Reward modelling on stand-ins."""

import json

import pytest

from cluster.pipeline.reward_model import RewardModel
from tests.stage_runs import FakeLearner, made_of, make_job, rows, run_stage, summary
from tests.tiny_models import tiny_tokenizer

ASK = {"prompt": "hello", "response": "this is good"}


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    return folder


def comparison(number: int):
    return {
        "id": str(number),
        "prompt": f"hello {number}",
        "completions": [{"text": "a", "ended": True}, {"text": "b", "ended": True}],
        "ranks": [0, 1],
    }


def test_reward_modelling_writes_the_model_its_calibration_and_figures(tmp_path, base):
    data = {
        "comparisons": rows(tmp_path / "c.jsonl", *map(comparison, range(8))),
        "demonstrations": rows(tmp_path / "d.jsonl", ASK),
    }
    one = make_job(tmp_path / "run", data=data, models={"sft": base}, reward={"valid_share": 0.25})
    learner = FakeLearner()
    (one.run_dir / "reward").mkdir()  # as the learner's save does
    run_stage(RewardModel(one), learner)
    assert learner.named("load")[0][:3] == ("reward", "new_value", base)
    assert learner.named("save") == [("reward", one.run_dir / "reward")]
    ((gain, bias),) = [scale[1:] for scale in learner.named("normalise")]
    assert gain == 1.0
    assert bias > 0
    figures = summary(one)["reward"]
    assert (figures["accuracy"], figures["pairs"]) == (1.0, 2)
    calibration = json.loads((one.run_dir / "reward" / "calibration.json").read_text())
    assert calibration["accuracy"] == 1.0
    assert sum(one["count"] for one in calibration["bins"]) == 2
    assert calibration["by_rank_gap"] == [{"gap": 1, "accuracy": 1.0, "count": 2}]
    assert calibration["prompt_accuracy_ci"] == [1.0, 1.0]
    assert calibration["calibration_error"] > 0
    assert figures["prompt_accuracy"] == 1.0
    assert figures["score_std"] == pytest.approx(calibration["score_std"])
    assert made_of(one) == {"reward": [str(base), *map(str, data.values())]}


def test_unranked_comparisons_stop_before_anything_is_loaded(tmp_path, base):
    unranked = {key: value for key, value in comparison(1).items() if key != "ranks"}
    data = {"comparisons": rows(tmp_path / "c.jsonl", unranked), "demonstrations": rows(tmp_path / "d.jsonl", ASK)}
    learner = FakeLearner()
    with pytest.raises(ValueError, match="'1' has no ranks"):
        run_stage(RewardModel(make_job(tmp_path / "run", data=data, models={"sft": base})), learner)
    assert learner.calls == []
