"""What commands read and write: models, files and figures of a run directory, and each step on stand-ins."""

import asyncio
import json
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from actors.prompts import Prompt, read_demonstrations
from cluster.config.schema import Config, TrackingConfig
from cluster.pipeline.job import (
    Job,
    heldout_prompts,
    run_rank,
    run_reward,
    run_sample,
    run_sft,
    sequence_tokens,
    sft_data,
)
from cluster.rundir.lineage import read_lineage
from cluster.tracking.tracker import Tracker
from learner.config import SFTConfig
from learner.data.corpora import demonstration_examples
from reward_server.encoding import ChatEncoding
from reward_server.preferences.labeling import read_comparisons
from reward_server.schema import Message
from tests.fakes import FakeGenerator
from tests.tiny_models import tiny_tokenizer


@pytest.fixture
def job(tmp_path):
    """Makes a job of overrides."""

    def make(**sections) -> Job:
        run_dir = tmp_path / "run"
        run_dir.mkdir(exist_ok=True)
        tracker = Tracker(run_dir, TrackingConfig(mode="disabled"), "test")
        return Job(config=Config.model_validate(sections), run_dir=run_dir, tracker=tracker)

    return make


def model_folder(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def rows(path, *values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


# --- models and files


def test_a_configured_model_comes_before_the_runs_own(job, tmp_path):
    own, other = model_folder(tmp_path / "run" / "sft"), model_folder(tmp_path / "other")
    assert job().model("sft") == own
    assert job(models={"sft": other}).model("sft") == other


@pytest.mark.parametrize(("name", "command"), [("sft", "sft"), ("reward", "reward"), ("policy", "ppo")])
def test_a_missing_model_names_the_command_that_makes_it_and_the_key(job, name, command):
    with pytest.raises(ValueError, match=rf"no {name} model in .*/run/{name}: run `rayward {command}`.*models\.{name}"):
        job().model(name)


def test_a_configured_model_that_is_not_there_is_not_replaced_by_the_runs_own(job, tmp_path):
    model_folder(tmp_path / "run" / "sft")
    with pytest.raises(ValueError, match="/nowhere"):
        job(models={"sft": tmp_path / "nowhere"}).model("sft")


def test_a_configured_file_comes_before_the_runs_own(job, tmp_path):
    own = rows(tmp_path / "run" / "data" / "completions.jsonl", {})
    assert job().file("completions") == own
    assert job(data={"completions": tmp_path / "mine.jsonl"}).file("completions") == tmp_path / "mine.jsonl"


def test_ppo_starts_from_the_sft_model_or_from_what_it_is_told(job, tmp_path):
    own, other = model_folder(tmp_path / "run" / "sft"), model_folder(tmp_path / "round-1" / "policy")
    assert job().model("init") == own
    assert job(models={"init": other}).model("init") == other
    with pytest.raises(ValueError, match=r"no init model in /nowhere: run `rayward ppo`.*models\.init"):
        job(models={"init": "/nowhere"}).model("init")


def test_the_round_of_a_run_is_recorded_in_the_runs_lineage(job, tmp_path):
    part = replace(job(), run_dir=tmp_path / "run" / "round-1", root=tmp_path / "run")
    part.run_dir.mkdir()
    (part.run_dir / "sheet.csv").write_text("")
    part.made("sheet", part.run_dir / "sheet.csv")
    assert made_of(part) == {"round-1/sheet.csv": []}


def test_a_missing_file_names_the_key_and_where_it_was_looked_for(job):
    with pytest.raises(ValueError, match=r"data\.prompts is not set and .*/run/data/prompts\.jsonl does not exist"):
        job().file("prompts")


# --- summary.json


def summary(job: Job):
    return json.loads((job.run_dir / "summary.json").read_text())


def test_figures_are_merged_under_their_keys(job):
    one = job()
    one.summarise("sft", valid_before=3.0, valid_after=2.0)
    one.summarise("ppo", "ppo", gold_after=0.5)
    one.summarise("ppo", "ppo-noptx", gold_after=0.6)
    one.summarise("sft", valid_after=1.5)
    one.summarise(labeler="simulated labeler (VADER)")
    assert summary(one) == {
        "sft": {"valid_before": 3.0, "valid_after": 1.5},
        "ppo": {"ppo": {"gold_after": 0.5}, "ppo-noptx": {"gold_after": 0.6}},
        "labeler": "simulated labeler (VADER)",
    }


# --- the steps


ASK = {"prompt": "hello", "response": "this is good"}


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny_tokenizer(folder)
    return folder


def test_the_files_of_fine_tuning_are_read_before_anything_starts(job, tmp_path, base):
    data = {
        "demonstrations": rows(tmp_path / "d.jsonl", ASK, ASK | {"prompt": "hello world"}),
        "demonstrations_valid": rows(tmp_path / "v.jsonl", ASK),
        "pretraining": rows(tmp_path / "t.jsonl", {"text": "the quick brown fox " * 20}),
    }
    sections = {"data": data, "sft": {"max_tokens": 64}, "ppo": {"pretraining": {"sequence_tokens": 16}}}
    one = job(**sections)
    found = sft_data(one, base, one.config.sft)
    assert (len(found.demonstrations), len(found.valid)) == (2, 1)
    assert found.pretraining
    assert {len(one.ids) for one in found.pretraining} == {16}
    assert found.pretraining_valid == ()
    data["pretraining_valid"] = data.pop("pretraining")
    with pytest.raises(ValueError, match=r"data\.pretraining is not set"):
        sft_data(job(**sections), base, one.config.sft)
    data["pretraining"] = data["pretraining_valid"]
    found = sft_data(job(**sections), base, one.config.sft)
    assert found.pretraining_valid == found.pretraining
    assert sft_data(job(**sections), base, one.config.baseline.model_copy(update={"max_tokens": 64})).pretraining == ()


def test_without_a_held_out_file_whole_instructions_are_held_out(job, tmp_path, base):
    drawn = [ASK | {"prompt": f"hello {i}", "group": str(i // 4)} for i in range(16)]  # 4 draws of each instruction
    data = {"demonstrations": rows(tmp_path / "d.jsonl", *drawn)}
    one = job(data=data, sft={"pretraining_share": 0.0, "valid_share": 0.25})
    found = sft_data(one, base, one.config.sft)
    assert (len(found.demonstrations), len(found.valid)) == (12, 4)
    texts = {example.ids: row["group"] for row, example in zip(drawn, examples(one, base), strict=True)}
    assert len({texts[example.ids] for example in found.valid}) == 1


def examples(one: Job, base):
    encoding, config = ChatEncoding.load(base), one.config.sft
    rows = read_demonstrations(one.file("demonstrations"))
    return demonstration_examples(rows, encoding, config.max_tokens, config.mask_prompt)


def test_demonstrations_without_a_group_are_split_by_their_prompts(job, tmp_path, base):
    said = [{"prompt": f"hello {i % 4}", "response": f"good {i}"} for i in range(16)]
    one = job(data={"demonstrations": rows(tmp_path / "d.jsonl", *said)}, sft={"pretraining_share": 0.0})
    found = sft_data(one, base, one.config.sft)
    assert (len(found.demonstrations), len(found.valid)) == (12, 4)


def test_an_instruction_on_both_sides_is_told(job, tmp_path, base, caplog):
    data = {
        "demonstrations": rows(tmp_path / "d.jsonl", ASK, ASK | {"prompt": "hello world"}),
        "demonstrations_valid": rows(tmp_path / "v.jsonl", ASK | {"response": "that is bad"}),
    }
    one = job(data=data, sft={"pretraining_share": 0.0})
    sft_data(one, base, one.config.sft)
    assert "1 instructions of" in caplog.text


def test_packed_text_is_as_long_as_fine_tuning_allows(job):
    config = SFTConfig(max_tokens=64)
    assert sequence_tokens(job(ppo={"pretraining": {"sequence_tokens": 16}}), config) == 16
    assert sequence_tokens(job(ppo={"pretraining": {"sequence_tokens": 2048}}), config) == 64


def made_of(job: Job) -> dict[str, list[str]]:
    return {one.path: [source.path for source in one.inputs] for one in read_lineage(job.root or job.run_dir)}


class FakeLearner:
    """Learns nothing; the better completion of a pair is the one whose last token is smaller."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __getattr__(self, name):
        async def call(*args, **_):
            self.calls.append((name, *args))
            return {"load": 1_000_000, "ranking_step": {"grad_norm": 0.5}}.get(name)

        return call

    async def language_model_loss(self, *args):
        return 3.0 - 0.5 * sum(name == "language_model_step" for name, *_ in self.calls)

    async def language_model_step(self, *args):
        self.calls.append(("language_model_step", *args))
        return {"loss": 2.5, "grad_norm": 0.5}

    async def last_values(self, name, sequences, max_tokens):
        return torch.tensor([-float(ids[-2]) for ids in sequences])

    def named(self, name: str) -> list[tuple]:
        return [tuple(args) for called, *args in self.calls if called == name]


def test_fine_tuning_writes_the_model_and_its_losses(job, tmp_path, base):
    data = {"demonstrations": rows(tmp_path / "d.jsonl", ASK), "demonstrations_valid": rows(tmp_path / "v.jsonl", ASK)}
    one = job(data=data, sft={"pretraining_share": 0.0})
    learner: Any = FakeLearner()
    model_folder(one.run_dir / "base")  # as the learner's save does
    config = SFTConfig(epochs=2, pretraining_share=0.0)
    asyncio.run(run_sft(one, learner, base, sft_data(one, base, config), config, stage="warm", out="base"))
    assert learner.named("load") == [("policy", "policy", base, config.network, config.optimizer)]
    assert learner.named("save") == [("policy", one.run_dir / "base")]
    assert learner.calls[-1] == ("unload",)
    assert summary(one) == {"warm": {"valid_before": 3.0, "valid_after": 2.0, "epoch": 2}}
    assert made_of(one) == {"base": [str(base), str(tmp_path / "d.jsonl")]}
    lines = [json.loads(line) for line in (one.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["warm"] * 5
    assert [line["warm/valid_loss"] for line in lines if "warm/valid_loss" in line] == [3.0, 2.5, 2.0]


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
def test_the_kept_weights_are_those_of_the_epoch_that_was_asked_for(job, tmp_path, base, select, kept, epoch):
    data = {"demonstrations": rows(tmp_path / "d.jsonl", ASK), "demonstrations_valid": rows(tmp_path / "v.jsonl", ASK)}
    one, config = job(data=data), SFTConfig(epochs=4, pretraining_share=0.0, select=select)
    (one.run_dir / "sft-epochs" / "9").mkdir(parents=True)  # of an earlier run
    learner: Any = SavingLearner()
    asyncio.run(run_sft(one, learner, base, sft_data(one, base, config), config))
    assert sorted(path.name for path in (one.run_dir / "sft-epochs").glob("*")) == kept
    assert (one.run_dir / "sft" / "config.json").read_text() == str(epoch)
    assert summary(one)["sft"] == {"valid_before": 2.0, "valid_after": abs(epoch - 2.0), "epoch": epoch}


def test_dropout_is_asked_for_where_it_is_configured(job, tmp_path, base):
    data = {"demonstrations": rows(tmp_path / "d.jsonl", ASK), "demonstrations_valid": rows(tmp_path / "v.jsonl", ASK)}
    one, config, learner = job(data=data), SFTConfig(pretraining_share=0.0, residual_dropout=0.2), LoadingLearner()
    model_folder(one.run_dir / "sft")
    asyncio.run(run_sft(one, cast(Any, learner), base, sft_data(one, base, config), config))
    assert learner.settings == {"chat_template": None, "residual_dropout": 0.2}


class LoadingLearner(FakeLearner):
    """Remembers how it was told to load."""

    async def load(self, *_, **settings):
        self.settings = settings
        return 1


def test_completions_are_sampled_and_then_ranked(job, tmp_path, base):
    prompts = rows(tmp_path / "p.jsonl", {"id": "x", "prompt": "hello"}, {"id": "y", "prompt": "world"})
    one = job(data={"preference_prompts": prompts}, sample={"completions_per_prompt": 3})
    asyncio.run(run_sample(one, [FakeGenerator()], base))
    sampled = read_comparisons(one.run_dir / "data" / "completions.jsonl")
    assert [(c.id, len(c.responses), c.ranks, c.labeler) for c in sampled] == [
        ("x", 3, None, None),
        ("y", 3, None, None),
    ]
    run_rank(one)
    ranked = read_comparisons(one.run_dir / "data" / "comparisons.jsonl")
    assert [c.responses for c in ranked] == [c.responses for c in sampled]
    assert {c.labeler for c in ranked} == {"simulated:vader"}
    assert all(c.ranks and min(c.ranks) == 0 for c in ranked)
    assert summary(one) == {"labeler": "simulated labeler (VADER)"}
    assert made_of(one) == {
        "data/completions.jsonl": [str(base), str(prompts)],
        "data/comparisons.jsonl": ["data/completions.jsonl"],
    }


def test_a_preference_prompt_that_is_too_long_stops_before_sampling(job, tmp_path, base):
    prompts = rows(tmp_path / "p.jsonl", {"id": "x", "prompt": "hello " * 50})
    one, generator = job(data={"preference_prompts": prompts}, rollout={"max_prompt_tokens": 20}), FakeGenerator()
    with pytest.raises(ValueError, match=r"'x' has .* tokens, more than the 20 allowed"):
        asyncio.run(run_sample(one, [generator], base))
    assert generator.waves == []


def comparison(number: int):
    return {
        "id": str(number),
        "prompt": f"hello {number}",
        "completions": [{"text": "a", "ended": True}, {"text": "b", "ended": True}],
        "ranks": [0, 1],
    }


def test_reward_modelling_writes_the_model_its_calibration_and_figures(job, tmp_path, base):
    data = {
        "comparisons": rows(tmp_path / "c.jsonl", *map(comparison, range(8))),
        "demonstrations": rows(tmp_path / "d.jsonl", ASK),
    }
    one = job(data=data, reward={"valid_share": 0.25})
    learner: Any = FakeLearner()
    (one.run_dir / "reward").mkdir()  # as the learner's save does
    asyncio.run(run_reward(one, learner, base))
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


def test_unranked_comparisons_stop_before_anything_is_loaded(job, tmp_path, base):
    unranked = {key: value for key, value in comparison(1).items() if key != "ranks"}
    data = {"comparisons": rows(tmp_path / "c.jsonl", unranked), "demonstrations": rows(tmp_path / "d.jsonl", ASK)}
    learner: Any = FakeLearner()
    with pytest.raises(ValueError, match="'1' has no ranks"):
        asyncio.run(run_reward(job(data=data), learner, base))
    assert learner.calls == []


def test_only_the_first_prompts_are_held_out_for_evaluation(job, tmp_path, base):
    prompts = rows(tmp_path / "p.jsonl", *({"id": str(i), "prompt": "hello"} for i in range(5)))
    one = job(data={"prompts_heldout": prompts}, evaluation={"prompts": 3})
    found = heldout_prompts(one, ChatEncoding.load(base))
    assert [prompt.id for prompt in found] == ["0", "1", "2"]
    assert found[0] == Prompt(id="0", messages=(Message(role="user", content="hello"),), reference=None)
