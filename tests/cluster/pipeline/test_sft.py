"""Fine-tuning on stand-ins: what it reads, learns and writes."""

import json

import pytest

from cluster.pipeline.job import Job
from cluster.pipeline.sft import SFT, Baseline, encoded
from reward_server.encoding import ChatEncoding
from tests.stage_runs import FakeLearner, made_of, make_job, rows, run_stage, summary
from tests.tiny_models import tiny_causal_lm, tiny_tokenizer

ASK = {"prompt": "hello", "response": "this is good"}


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny_tokenizer(folder)
    return folder


def test_the_files_of_fine_tuning_are_read_before_anything_starts(tmp_path, base):
    data = {
        "demonstrations": rows(tmp_path / "d.jsonl", ASK, ASK | {"prompt": "hello world"}),
        "demonstrations_valid": rows(tmp_path / "v.jsonl", ASK),
        "pretraining": rows(tmp_path / "t.jsonl", {"text": "the quick brown fox " * 20}),
    }
    sections = {"data": data, "sft": {"max_tokens": 64}, "ppo": {"pretraining": {"sequence_tokens": 16}}}
    one = make_job(tmp_path / "run", **sections)
    found = SFT(one, base).check()
    assert (len(found.demonstrations), len(found.valid)) == (2, 1)
    assert found.pretraining
    assert {len(one.ids) for one in found.pretraining} == {16}
    assert found.pretraining_valid == ()
    data["pretraining_valid"] = data.pop("pretraining")
    with pytest.raises(ValueError, match=r"data\.pretraining is not set"):
        SFT(make_job(tmp_path / "run", **sections), base).check()
    data["pretraining"] = data["pretraining_valid"]
    found = SFT(make_job(tmp_path / "run", **sections), base).check()
    assert found.pretraining_valid == found.pretraining
    sections["baseline"] = {"max_tokens": 64, "pretraining_share": 0.0}
    assert Baseline(make_job(tmp_path / "run", **sections), base).check().pretraining == ()


def test_without_a_held_out_file_whole_instructions_are_held_out(tmp_path, base):
    drawn = [ASK | {"prompt": f"hello {i}", "group": str(i // 4)} for i in range(16)]  # 4 draws of each instruction
    data = {"demonstrations": rows(tmp_path / "d.jsonl", *drawn)}
    one = make_job(tmp_path / "run", data=data, sft={"pretraining_share": 0.0, "valid_share": 0.25})
    found = SFT(one, base).check()
    assert (len(found.demonstrations), len(found.valid)) == (12, 4)
    texts = {example.ids: row["group"] for row, example in zip(drawn, examples(one, base), strict=True)}
    assert len({texts[example.ids] for example in found.valid}) == 1


def examples(one: Job, base):
    encoding, config = ChatEncoding.load(base), one.config.sft
    return [example for _, example in encoded(one.file("demonstrations"), 0, encoding, config)]


def test_demonstrations_without_a_group_are_split_by_their_prompts(tmp_path, base):
    said = [{"prompt": f"hello {i % 4}", "response": f"good {i}"} for i in range(16)]
    one = make_job(
        tmp_path / "run", data={"demonstrations": rows(tmp_path / "d.jsonl", *said)}, sft={"pretraining_share": 0.0}
    )
    found = SFT(one, base).check()
    assert (len(found.demonstrations), len(found.valid)) == (12, 4)


def test_an_instruction_on_both_sides_is_told(tmp_path, base, caplog):
    data = {
        "demonstrations": rows(tmp_path / "d.jsonl", ASK, ASK | {"prompt": "hello world"}),
        "demonstrations_valid": rows(tmp_path / "v.jsonl", ASK | {"response": "that is bad"}),
    }
    one = make_job(tmp_path / "run", data=data, sft={"pretraining_share": 0.0})
    SFT(one, base).check()
    assert "1 instructions of" in caplog.text


def test_demonstrations_that_are_cut_are_counted(tmp_path, base, caplog):
    """They teach no end."""
    files = {
        "demonstrations": rows(tmp_path / "d.jsonl", ASK, ASK | {"response": "good " * 90}),
        "demonstrations_valid": rows(tmp_path / "v.jsonl", ASK),
    }
    found = SFT(make_job(tmp_path / "run", data=files, sft={"pretraining_share": 0.0, "max_tokens": 64}), base).check()
    assert [len(example.ids) for example in found.demonstrations][1:] == [64]
    assert f"1 of 2 rows of {tmp_path / 'd.jsonl'} are cut at max_tokens = 64" in caplog.text
    assert caplog.text.count("teach no end") == 1


def test_an_end_mark_in_a_response_is_told(tmp_path, base, caplog):
    files = demonstrations(tmp_path)
    rows(tmp_path / "d.jsonl", ASK, ASK | {"response": "good<|im_end|>\n"})
    SFT(make_job(tmp_path / "run", data=files, sft={"pretraining_share": 0.0}), base).check()
    assert f"1 of 2 rows of {tmp_path / 'd.jsonl'} end in an end mark" in caplog.text


def test_no_demonstration_is_longer_than_the_models_positions(tmp_path):
    tiny_causal_lm(tmp_path / "base", family="gpt2", max_positions=32)
    one = make_job(tmp_path / "run", data=demonstrations(tmp_path), sft={"pretraining_share": 0.0, "max_tokens": 64})
    with pytest.raises(ValueError, match=r"sft\.max_tokens = 64 is more than the 32 positions"):
        SFT(one, tmp_path / "base").check()


def test_packed_text_is_as_long_as_fine_tuning_allows(tmp_path, base):
    data = {
        "demonstrations": rows(tmp_path / "d.jsonl", ASK),
        "demonstrations_valid": rows(tmp_path / "v.jsonl", ASK),
        "pretraining": rows(tmp_path / "t.jsonl", {"text": "the quick brown fox " * 200}),
    }
    for sequence, longest in ((16, 16), (2048, 64)):
        ppo = {"pretraining": {"sequence_tokens": sequence}}
        one = make_job(tmp_path / "run", data=data, sft={"max_tokens": 64}, ppo=ppo)
        assert {len(example.ids) for example in SFT(one, base).check().pretraining} == {longest}


def demonstrations(tmp_path):
    return {
        "demonstrations": rows(tmp_path / "d.jsonl", ASK),
        "demonstrations_valid": rows(tmp_path / "v.jsonl", ASK),
    }


def test_fine_tuning_writes_the_model_and_its_losses(tmp_path, base):
    one = make_job(tmp_path / "run", data=demonstrations(tmp_path), baseline={"epochs": 2, "pretraining_share": 0.0})
    config, learner = one.config.baseline, FakeLearner()
    (one.run_dir / "baseline").mkdir()  # as the learner's save does
    run_stage(Baseline(one, base), learner)
    assert learner.named("load") == [("policy", "policy", base, config.network, config.optimizer)]
    assert learner.named("save") == [("policy", one.run_dir / "baseline")]
    assert learner.calls[-1] == ("unload",)
    assert summary(one) == {"baseline": {"valid_before": 3.0, "valid_after": 2.0, "epoch": 2}}
    assert made_of(one) == {"baseline": [str(base), str(tmp_path / "d.jsonl")]}
    lines = [json.loads(line) for line in (one.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["baseline"] * 6
    assert lines[-1]["checkpoint/bytes"] > 0, "the last step is saved, until the stage is complete"
    assert [line["baseline/valid_loss"] for line in lines if "baseline/valid_loss" in line] == [3.0, 2.5, 2.0]
    calls = len(learner.calls)
    run_stage(Baseline(one, base), learner)
    assert len(learner.calls) == calls, "a stage that is complete is left as it is"


class SavingLearner(FakeLearner):
    """Writes the number of its steps; its losses fall for two steps and then rise."""

    async def language_model_loss(self, *args):
        return abs(len(self.named("language_model_step")) - 2.0)

    async def save(self, name, path):
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(str(len(self.named("language_model_step"))))


@pytest.mark.parametrize(
    ("select", "kept", "epoch"),
    [("last", [], 4), ("loss", ["1", "2", "3", "4"], 2), ("reward", ["1", "2", "3", "4"], 4)],
)
def test_the_kept_weights_are_those_of_the_epoch_that_was_asked_for(tmp_path, base, select, kept, epoch):
    section = {"epochs": 4, "pretraining_share": 0.0, "select": select}
    one = make_job(tmp_path / "run", data=demonstrations(tmp_path), sft=section)
    (one.run_dir / "sft-epochs" / "9").mkdir(parents=True)  # of an earlier run
    run_stage(SFT(one, base), SavingLearner())
    assert sorted(path.name for path in (one.run_dir / "sft-epochs").glob("*")) == kept
    assert (one.run_dir / "sft" / "config.json").read_text() == str(epoch)
    assert summary(one)["sft"] == {"valid_before": 2.0, "valid_after": abs(epoch - 2.0), "epoch": epoch}


def test_dropout_is_asked_for_where_it_is_configured(tmp_path, base):
    section = {"pretraining_share": 0.0, "residual_dropout": 0.2, "select": "last"}
    one, learner = make_job(tmp_path / "run", data=demonstrations(tmp_path), sft=section), LoadingLearner()
    (one.run_dir / "sft").mkdir()
    run_stage(SFT(one, base), learner)
    assert learner.settings == {"chat_template": None, "residual_dropout": 0.2}


class LoadingLearner(FakeLearner):
    """Remembers how it was told to load."""

    async def load(self, *_, **settings):
        self.settings = settings
        return 1


def test_a_stage_does_not_go_on_with_another_day_in_its_chat_template(tmp_path, base):
    for number, (told, day) in enumerate([({}, None), ({"chat_date": "2025-03-02"}, "2025-03-02")]):
        one = make_job(tmp_path / str(number), models={"base": str(base), **told})
        assert SFT(one)._made_of().get("models.chat_date") == day
