"""Reward modelling on stand-ins."""

import json
import re
import shutil

import pytest

from cluster.pipeline.reward_model import RewardModel
from tests.stage_runs import FakeLearner, made_of, make_job, rows, run_stage, summary
from tests.tiny_models import tiny_causal_lm, tiny_tokenizer

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


def test_accuracy_by_labeler_and_on_the_control_is_told_and_kept(tmp_path, base, capsys):
    rankings = [
        comparison(number) | {"id": f"{number}:{labeler}", "labeler": labeler, "control": number % 2 == 0}
        for number in range(8)
        for labeler in ("p1", "p2", "p3")
    ]
    wrong = [one | {"ranks": [1, 0]} if one["labeler"] == "p2" else one for one in rankings]
    data = {"comparisons": rows(tmp_path / "c.jsonl", *wrong), "demonstrations": rows(tmp_path / "d.jsonl", ASK)}
    reward = {"valid_share": 0.5, "labeler_weights": "p3=0"}
    one = make_job(tmp_path / "run", data=data, models={"sft": base}, reward=reward)
    (one.run_dir / "reward").mkdir()
    learner = FakeLearner()
    run_stage(RewardModel(one), learner)
    figures = summary(one)["reward"]
    calibration = json.loads((one.run_dir / "reward" / "calibration.json").read_text())
    assert {name: (part["accuracy"], part["pairs"]) for name, part in figures["by_labeler"].items()} == {
        "p1": (1.0, 4),
        "p2": (0.0, 4),
    }
    assert figures["control"]["accuracy"] == 0.5
    assert (calibration["by_labeler"], calibration["control"]) == (figures["by_labeler"], figures["control"])
    (_, groups, _, weights, *_), *_ = learner.named("ranking_step")
    assert (len(groups), set(weights)) == (8, {0.5})  # four prompts, by p1 and p2
    said = capsys.readouterr().out
    assert "reward: rankings of p2: pair accuracy 0.000 on 4 held-out pairs (95 % interval 0.00 to 0.00)" in said
    assert said.index("reward: the control: pair accuracy 0.500") < said.index("rankings of p2") < said.index("of p1:")


def test_weights_of_a_labeler_who_ranked_nothing_stop_before_anything_is_loaded(tmp_path, base):
    ranked = [comparison(number) | {"labeler": "p1"} for number in range(8)]
    data = {"comparisons": rows(tmp_path / "c.jsonl", *ranked), "demonstrations": rows(tmp_path / "d.jsonl", ASK)}
    one = make_job(tmp_path / "run", data=data, models={"sft": base}, reward={"labeler_weights": "p1=1,p7=0.5"})
    learner = FakeLearner()
    with pytest.raises(ValueError, match="labeler_weights names p7, who ranked no comparison: they are by p1"):
        run_stage(RewardModel(one), learner)
    assert learner.calls == []


def test_unranked_comparisons_stop_before_anything_is_loaded(tmp_path, base):
    unranked = {key: value for key, value in comparison(1).items() if key != "ranks"}
    data = {"comparisons": rows(tmp_path / "c.jsonl", unranked), "demonstrations": rows(tmp_path / "d.jsonl", ASK)}
    learner = FakeLearner()
    with pytest.raises(ValueError, match="'1' has no ranks"):
        run_stage(RewardModel(make_job(tmp_path / "run", data=data, models={"sft": base})), learner)
    assert learner.calls == []


def test_comparisons_that_teach_little_and_a_model_at_chance_are_told(tmp_path, base, caplog):
    odd = comparison(0) | {"completions": [{"text": " "}, {"text": "b<|im_end|>"}]}
    data = {
        "comparisons": rows(
            tmp_path / "c.jsonl",
            odd,
            *(comparison(i) | {"ranks": [i % 2, 1 - i % 2]} for i in range(1, 9)),
            *(comparison(i) | {"ranks": [0, 0]} for i in (9, 10)),
            comparison(11) | {"completions": [{"text": "a"}, {"text": "a"}]},
        ),
        "demonstrations": rows(tmp_path / "d.jsonl", ASK),
    }
    one = make_job(tmp_path / "run", data=data, models={"sft": base}, reward={"valid_share": 0.5})
    (one.run_dir / "reward").mkdir()
    run_stage(RewardModel(one), FakeLearner())
    for told in (
        "1 of 12 comparisons have an empty completion of rank 0",
        "1 of 12 comparisons have a completion that ends in an end mark",
        "2 of 12 comparisons have no completion ranked above another",
        "1 of 12 comparisons rank identical completions differently",
    ):
        assert caplog.text.count(told) == 1, told
    assert "not told from chance" in caplog.text


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_longer_than_the_models_positions_is_told_with_its_row(tmp_path, family, caplog):
    """Deep in the learner it was an IndexError (GPT-2), or trained beyond the positions (Llama)."""
    tiny_causal_lm(tmp_path / "base", family=family, max_positions=64)
    long = comparison(1) | {"prompt": "say 123 " * 40}
    forged = comparison(2) | {"prompt": "a <|im_end|> b"}
    data = {
        "comparisons": rows(tmp_path / "c.jsonl", *map(comparison, range(3, 11)), long, forged),
        "demonstrations": rows(tmp_path / "d.jsonl", ASK, ASK | {"response": "say 123 " * 40}),
    }
    given = {"models": {"sft": tmp_path / "base"}, "data": data}
    with pytest.raises(ValueError, match="2 bad rows") as caught:
        RewardModel(make_job(tmp_path / "run", **given)).check()
    told = str(caught.value).splitlines()
    assert re.match(r".*c\.jsonl:9: comparison '1' has \d+ tokens, more than the 64 positions", told[0])
    assert re.match(r".*c\.jsonl:10: comparison '2': message 0 \(user\) holds '<\|im_end\|>'", told[1])
    given["data"] = {**data, "max_bad_rows": 2}
    groups, demonstrations = RewardModel(make_job(tmp_path / "run", **given)).check()
    assert (len(groups), len(demonstrations)) == (8, 1)
    assert f"1 of 2 rows of {tmp_path / 'd.jsonl'} are longer than the 64 positions" in caplog.text


def test_a_model_from_elsewhere_is_copied_with_the_normalisation_of_the_demonstrations(tmp_path, base):
    foreign = shutil.copytree(base, tmp_path / "foreign")
    (foreign / "model.safetensors").write_text("as it is")
    (foreign / "config.json").write_text('{"architectures": ["A"]}')
    demonstrations = rows(tmp_path / "d.jsonl", ASK, ASK | {"prompt": "hello you"}, ASK | {"response": "bad"})
    one = make_job(tmp_path / "run", data={"demonstrations": demonstrations}, reward={"normalise": foreign})
    learner, stage = FakeLearner(), RewardModel(one)
    absent = make_job(tmp_path / "absent", reward={"normalise": tmp_path / "nowhere"})
    with pytest.raises(ValueError, match=r"reward\.normalise = .*nowhere is no model's folder"):
        next(RewardModel(absent).weights())
    assert RewardModel.models(one.config) == ()
    assert [*stage.weights()] == [("reward.normalise", foreign, "raw_value")]
    run_stage(stage, learner)
    assert learner.named("load")[0][:3] == ("reward", "raw_value", foreign)
    assert learner.named("ranking_step") == learner.named("save") == []
    _, sequences = stage.check()
    raw = [-float(ids[-2]) for ids in sequences]
    fields = json.loads((one.run_dir / "reward" / "config.json").read_text())
    assert fields["rayward_normalisation"] == {"gain": 1.0, "bias": pytest.approx(-sum(raw) / 3)}
    assert fields["architectures"] == ["A"]
    assert (one.run_dir / "reward" / "model.safetensors").read_text() == "as it is"
    assert json.loads((foreign / "config.json").read_text()) == {"architectures": ["A"]}
    assert made_of(one) == {"reward": [str(foreign), str(demonstrations)]}
