"""Fine-tuning and reward modelling, stopped and resumed inside: everything but Ray, in one process."""

import asyncio
import contextlib
import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from cluster.config.schema import Config, TrackingConfig
from cluster.pipeline.job import Job
from cluster.pipeline.reward_model import RewardModel
from cluster.pipeline.sft import SFT
from cluster.pipeline.stage import Stage, advance
from cluster.rundir.record import ResumeRefused, Start
from cluster.runtime.signals import Stopped, ended_by_signals
from cluster.tracking.console import Console
from cluster.tracking.tracker import Tracker
from learner.worker.group import LearnerGroup
from learner.worker.worker import LearnerWorker
from tests.fake_pool import FakePool
from tests.ranks import InProcess
from tests.stage_runs import rows
from tests.tiny_models import tiny_causal_lm

TRAINING = {"checkpoint_every": 2, "network": {"dtype": "float32"}, "optimizer": {"lr": 5e-3}}
MIXED = {"batch_size": 4, "pretraining_share": 0.25, "max_tokens": 64}
SETTINGS: dict[str, Any] = {  # 9 steps each, 3 an epoch
    "sft": TRAINING | MIXED | {"epochs": 3, "residual_dropout": 0.1, "select": "loss"},
    "reward": TRAINING | {"epochs": 3, "prompts_per_batch": 3, "valid_share": 0.25},
    "ppo": {"pretraining": {"sequence_tokens": 32}},
}
STAGES: dict[str, type[Stage]] = {"sft": SFT, "reward": RewardModel}
STEPS = ("language_model_step", "ranking_step")


class Killed(BaseException):
    """The process ends here."""


class Killable(InProcess):
    """A rank whose caller is killed, or sent a signal, while it takes a step."""

    def __init__(self, worker: LearnerWorker, killed_at: int, by: signal.Signals) -> None:
        super().__init__(worker)
        self.killed_at, self.by, self.steps = killed_at, by, 0

    def __getattr__(self, method: str) -> Any:
        self.steps += method in STEPS
        if self.steps == self.killed_at and method in STEPS:
            if self.by == signal.SIGKILL:
                raise Killed
            signal.raise_signal(self.by)
        return super().__getattr__(method)


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Any]:
    """A model and data, as settings."""
    tiny_causal_lm(tmp_path / "base")
    asked = [{"prompt": f"say {i}", "response": "good " * (i % 3 + 1)} for i in range(9)]
    ranked = [
        {"id": str(i), "prompt": f"say {i}", "completions": [{"text": "good"}, {"text": f"bad {i}"}], "ranks": [0, 1]}
        for i in range(12)
    ]
    text = {"text": "the quick brown fox jumps over the lazy dog " * 9}
    data = {
        "demonstrations": rows(tmp_path / "demonstrations.jsonl", *asked),
        "demonstrations_valid": rows(tmp_path / "valid.jsonl", {"prompt": "say more", "response": "good good"}),
        "pretraining": rows(tmp_path / "text.jsonl", text),
        "comparisons": rows(tmp_path / "comparisons.jsonl", *ranked),
    }
    return {"models": {"base": str(tmp_path / "base"), "sft": tmp_path / "base"}, "data": data}


def train(
    worker: LearnerWorker,
    made: dict[str, Any],
    name: str,
    run: Path,
    start: Start,
    killed_at: int = 0,
    by: signal.Signals = signal.SIGKILL,
    **changed: Any,
) -> tuple[int, str]:
    """One command; (steps that it took, what it printed)."""
    shown, learner = io.StringIO(), Killable(worker, killed_at, by)
    settings = SETTINGS | made | {name: SETTINGS[name] | changed}
    tracker = Tracker(run, TrackingConfig(mode="disabled"), name, console=Console(stream=shown))
    run.mkdir(exist_ok=True)
    job = Job(config=Config.model_validate(settings), run_dir=run, tracker=tracker, start=start)
    worker.unload()
    pool: Any = FakePool(LearnerGroup([learner]))
    with contextlib.suppress(Killed), ended_by_signals():
        asyncio.run(advance(STAGES[name](job), pool))
    return learner.steps, shown.getvalue()


def results(run: Path) -> dict[str, Any]:
    """What a run leaves behind, times apart."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [
        {key: value for key, value in row.items() if key != "time"} for row in lines if "checkpoint/bytes" not in row
    ]
    files = [*run.rglob("*.safetensors"), run / "summary.json"]
    return {"logged": logged} | {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_was_killed_goes_on_and_ends_the_same(
    worker: LearnerWorker, made: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(worker, made, name, whole, "new")[0] == 9
    train(worker, made, name, parts, "new", killed_at=2)  # before there was a checkpoint
    steps, shown = train(worker, made, name, parts, "resume", killed_at=8)
    assert f"{name}: there is no checkpoint, so it starts over" in shown
    checkpoints = parts / "checkpoints" / name
    assert sorted(path.name for path in checkpoints.iterdir()) == ["version-000004", "version-000006"]
    with pytest.raises(ResumeRefused, match=r"begun\. Remedy: --resume goes on with it"):
        train(worker, made, name, parts, "new")
    steps, shown = train(worker, made, name, parts, "resume", killed_at=2)
    assert f"{name}: goes on after step 6, from {checkpoints}/version-000006" in shown
    weights = next((checkpoints / "version-000006").rglob("*.pt"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    # what changes nothing may change on the way
    steps, shown = train(worker, made, name, parts, "resume", max_tokens_per_microbatch=4095, checkpoint_every=3)
    assert steps == 5
    assert f"{name}: goes on after step 4, from {checkpoints}/version-000004" in shown
    assert "version-000006 is damaged" in caplog.text
    expected, found = results(whole), results(parts)
    assert expected.keys() == found.keys() > {f"{name}/model.safetensors"}
    for key, value in expected.items():
        assert found[key] == value, key
    steps_logged = [row["step"] for row in found["logged"] if f"{name}/lr" in row or "reward_model/lr" in row]
    assert steps_logged == list(range(1, 10))
    assert not checkpoints.exists(), "nobody goes on from a stage that is complete"
    assert train(worker, made, name, parts, "resume") == (0, f"{name}: complete, and left as it is\n")


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_goes_on_with_the_data_it_was_begun_with_alone(
    worker: LearnerWorker, made: dict[str, Any], tmp_path: Path, name: str
):
    train(worker, made, name, tmp_path / "run", "new", killed_at=4)
    key = {"sft": "demonstrations", "reward": "comparisons"}[name]
    file = made["data"][key]
    file.write_text(file.read_text().replace("good", "fine"))
    with pytest.raises(
        ResumeRefused, match=rf"the stage '{name}' .* was made of something else: data\.{key} has other"
    ):
        train(worker, made, name, tmp_path / "run", "resume")
    assert train(worker, made, name, tmp_path / "run", "restart")[0] == 9


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_is_stopped_saves_the_step_that_is_under_way(
    worker: LearnerWorker, made: dict[str, Any], tmp_path: Path, name: str
):
    with pytest.raises(Stopped) as stopped:
        train(worker, made, name, tmp_path, "new", killed_at=3, by=signal.SIGTERM, checkpoint_every=100)
    assert stopped.value.code == 143
    assert [path.name for path in (tmp_path / "checkpoints" / name).iterdir()] == ["version-000003"]
    steps, shown = train(worker, made, name, tmp_path, "resume")
    assert (steps, "goes on after step 3, from" in shown) == (6, True)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_was_killed_after_its_last_step_takes_none_again(
    worker: LearnerWorker, made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    changed = {"epochs": 1, **({"select": "last"} if name == "sft" else {})}
    with monkeypatch.context() as patch:
        patch.setattr(LearnerWorker, "save", killed)
        assert train(worker, made, name, tmp_path, "new", **changed)[0] == 3
    assert train(worker, made, name, tmp_path, "resume", **changed)[0] == 0
    assert (tmp_path / name / "model.safetensors").is_file()
    assert json.loads((tmp_path / "summary.json").read_text())[name]
