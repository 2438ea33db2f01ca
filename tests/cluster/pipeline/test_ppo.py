"""PPO of a run directory, stopped and resumed: everything but Ray and vLLM, in one process."""

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.sampling import GeneratorFailed
from cluster.config.schema import Config, TrackingConfig
from cluster.pipeline.job import Job
from cluster.pipeline.ppo import Alignment
from cluster.rundir.stages import ResumeRefused, Start
from cluster.tracking.console import Console
from cluster.tracking.tracker import Tracker
from learner.data.ledger import audit
from learner.worker.group import LearnerGroup
from learner.worker.networks import ValueNetwork
from learner.worker.worker import LearnerWorker
from reward_server.sources import FunctionSource
from tests.hf_generator import HfGenerator, SourceScorer
from tests.ranks import InProcess
from tests.tiny_models import tiny_causal_lm, tiny_reward_model

SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {
        "iterations": 4,
        "checkpoint_every": 2,
        "prompts_per_batch": 6,
        "minibatch_size": 3,
        "warmup_iterations": 3,
        "kl": {"target": 2.0, "horizon": 50},
        "pretraining": {"sequence_tokens": 32, "sequences_per_episode": 0.5},
        "network": {"dtype": "float32"},
        "policy_optimizer": {"lr": 5e-3},
        "critic_optimizer": {"lr": 5e-3},
    },
    "rollout": {"prompts_per_wave": 3, "max_prompt_tokens": 40, "max_new_tokens": 5},
    "evaluation": {"prompts": 4, "every": 1},
}


_TIMES = ("time", "checkpoint/", "heldout/seconds")


class Killed(BaseException):
    """The process ends here."""


class Lost:
    """A generator that is gone."""

    name = "generator-0"

    async def generate(self, *_: Any) -> None:
        raise GeneratorFailed("generator-0 is gone: it is dead")


class OneGenerator:
    """A fleet of one, which is given the worker's weights; the process is killed while it takes a version."""

    publisher = None
    joining = contextlib.nullcontext
    crews = 0
    lost_at = 0
    """Which time that held-out prompts are answered the generator is lost; then there is another one."""

    def __init__(self, generator: HfGenerator, worker: LearnerWorker, killed_at: int | None) -> None:
        self.generator, self.worker, self.killed_at = generator, worker, killed_at
        self.versions: list[int] = []

    async def publish(self, version: int) -> dict[str, float]:
        self.generator.receive(self.worker, version)
        self.versions.append(version)
        if version == self.killed_at:
            raise Killed
        return {}

    async def crew(self) -> list[Any]:
        self.crews += 1
        return [Lost()] if self.crews == self.lost_at else [self.generator]

    @contextlib.asynccontextmanager
    async def rollouts(self, work: Any, fail: Any) -> AsyncIterator[None]:
        leave = asyncio.Event()
        task = asyncio.create_task(work(self.generator, leave))
        try:
            yield
        finally:
            leave.set()
            await asyncio.wait([task])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alignment")
    tiny_causal_lm(root / "sft")
    tiny_reward_model(root / "reward")
    tiny_reward_model(root / "other", seed=1)
    prompts = [{"id": f"p{i}", "prompt": f"say {chr(ord('a') + i)}"} for i in range(8)]
    texts = [{"text": f"the quick brown fox number {i} jumps over the lazy dog"} for i in range(30)]
    rows = {"prompts": prompts, "prompts_heldout": prompts[:4], "pretraining": texts, "pretraining_valid": texts[:6]}
    for name, values in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return root


@pytest.fixture(scope="module")
def worker() -> LearnerWorker:
    found = LearnerWorker(rank=0, world_size=1, threads=1)
    found.start(*found.meeting_point(loopback=True), deadline_s=60)
    return found


def align(
    worker: LearnerWorker,
    made: Path,
    run: Path,
    start: Start,
    killed_at: int | None = None,
    critic: Path | None = None,
    lost_at: int = 0,
    **ppo: Any,
) -> tuple[list[int], str]:
    """One command; (versions that were published, what it printed)."""
    files = {
        name: made / f"{name}.jsonl" for name in ("prompts", "prompts_heldout", "pretraining", "pretraining_valid")
    }
    models = {"sft": made / "sft", "reward": made / "reward", "critic": critic}
    settings = SETTINGS | {"ppo": SETTINGS["ppo"] | ppo, "models": models, "data": files}
    shown = io.StringIO()
    tracker = Tracker(run, TrackingConfig(mode="disabled"), "ppo", console=Console(stream=shown))
    job = Job(config=Config.model_validate(settings), run_dir=run, tracker=tracker, start=start)
    run.mkdir(exist_ok=True)
    worker.unload()
    alignment = Alignment(job)
    if alignment.finished(job.config.ppo):
        return [], shown.getvalue()
    fleet: Any = OneGenerator(HfGenerator(made / "sft"), worker, killed_at)
    fleet.lost_at = lost_at
    rewards: Any = SourceScorer(FunctionSource("tests.hf_generator:share_of_letters"))
    alignment.connect(LearnerGroup([InProcess(worker)]), fleet, rewards)
    with contextlib.suppress(Killed):
        asyncio.run(alignment.run(job.config.ppo))
    return fleet.versions, shown.getvalue()


def results(run: Path) -> dict[str, Any]:
    """What a run leaves behind, times apart."""
    steps: dict[int, dict[str, Any]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept = {name: value for name, value in row.items() if not name.startswith(_TIMES)}
        steps.setdefault(row["step"], {}).update(kept)
    files = [*run.glob("policy*/model.safetensors"), *run.glob("evaluations/*"), run / "summary.json"]
    return {"steps": steps} | {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_a_stage_that_was_killed_goes_on_and_ends_the_same(worker: LearnerWorker, made: Path, tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert align(worker, made, whole, "new")[0] == [0, 1, 2, 3, 4]
    assert align(worker, made, parts, "new", killed_at=1)[0] == [0, 1]  # before there was a checkpoint
    versions, shown = align(worker, made, parts, "resume", killed_at=4)
    assert versions == [0, 1, 2, 3, 4]
    assert "ppo: there is no checkpoint, so it starts over" in shown
    with pytest.raises(ResumeRefused, match=r"begun\. Remedy: --resume goes on with it"):
        align(worker, made, parts, "new")
    versions, shown = align(worker, made, parts, "resume")
    assert versions == [2, 3, 4]
    assert "ppo: goes on after iteration 2, from" in shown
    expected, found = results(whole), results(parts)
    assert expected.keys() == found.keys() > {"policy/model.safetensors", "policy_ema/model.safetensors"}
    for name, value in expected.items():
        assert found[name] == value, name
    counts = audit(parts / "ledger-ppo.jsonl")
    assert (counts.violations, counts.trained, counts.twice, counts.resumed) == ((), 24, 0, 2)
    # measured before, after each iteration, and after
    curve = {step: row["heldout/gold"] for step, row in expected["steps"].items()}
    assert curve.keys() == {0, 1, 2, 3, 4}
    for step, label in enumerate(("sft", "ppo-000001", "ppo-000002", "ppo-000003", "ppo")):
        golds = [row["gold"] for row in map(json.loads, expected[f"evaluations/{label}.jsonl"].splitlines())]
        assert curve[step] == pytest.approx(sum(golds) / 4)
    # complete: nothing more happens, unless it is to be longer
    assert align(worker, made, parts, "resume") == ([], "ppo: complete, and left as it is\n")
    assert align(worker, made, parts, "resume", iterations=5)[0] == [4, 5]
    assert audit(parts / "ledger-ppo.jsonl").trained == 30
    with pytest.raises(ResumeRefused, match=r"ppo.clip was 0.2, is 0.3; ppo.kl.target was 2.0, is 3.0"):
        align(worker, made, parts, "resume", clip=0.3, kl={"target": 3.0, "horizon": 50})
    assert align(worker, made, parts, "restart", iterations=1, clip=0.3)[0] == [0, 1]
    counts = audit(parts / "ledger-ppo.jsonl")
    assert (counts.trained, counts.resumed, counts.committed) == (6, 0, 1)


def test_held_out_prompts_are_answered_anew_by_the_replacement_of_a_generator(
    worker: LearnerWorker, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    align(worker, made, tmp_path / "whole", "new", iterations=2)
    assert align(worker, made, tmp_path / "lost", "new", iterations=2, lost_at=2)[0] == [0, 1, 2]
    assert "the held-out prompts are answered anew: generator-0 is gone: it is dead" in caplog.text
    assert results(tmp_path / "lost") == results(tmp_path / "whole")


def test_the_critic_starts_from_the_folder_that_is_named_for_it(
    worker: LearnerWorker, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A language model gets a fresh value head; a reward model is read as it is. Both learn beside the policy."""
    started: list[dict[str, torch.Tensor]] = []
    load = LearnerWorker.load

    def noted(self: LearnerWorker, name: str, *rest: Any, **more: Any) -> int:
        trained = load(self, name, *rest, **more)
        if name == "critic":
            network = self.networks.module("critic")
            assert isinstance(network, ValueNetwork)
            started.append({key: value.detach().clone() for key, value in network.model.named_parameters()})
        return trained

    monkeypatch.setattr(LearnerWorker, "load", noted)
    for name in ("sft", "other"):
        run = tmp_path / name
        assert align(worker, made, run, "new", critic=made / name, iterations=1)[0] == [0, 1]
        folder, read = load_file(made / name / "model.safetensors"), started.pop()
        assert read.keys() - folder.keys() == ({"score.weight"} if name == "sft" else set())
        assert all(torch.equal(read[key], folder[key]) for key in read.keys() & folder.keys())
        assert read["score.weight"].std() > 0
        assert results(run)["steps"][1]["grad_norm/value"] > 0
    with pytest.raises(ResumeRefused, match=r"models\.critic has other content now"):
        align(worker, made, tmp_path / "sft", "resume", critic=made / "other", iterations=2)


def test_a_run_killed_after_its_last_iteration_is_measured_and_written(
    worker: LearnerWorker, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(LearnerWorker, "save", killed)
        assert align(worker, made, tmp_path, "new", iterations=1)[0] == [0, 1]
    assert not (tmp_path / "policy").exists()
    assert align(worker, made, tmp_path, "resume", iterations=1)[0] == [1]
    figures = json.loads((tmp_path / "summary.json").read_text())["ppo"]["ppo"]
    assert {"gold_before", "gold_after", "kl", "iterations"} <= figures.keys()
    assert audit(tmp_path / "ledger-ppo.jsonl").trained == 6
    data = made / "prompts.jsonl"
    before = data.read_text()
    data.write_text(before + '{"id": "more", "prompt": "say z"}\n')
    try:
        with pytest.raises(ResumeRefused, match=r"order of prompts was .*; data.prompts has other content now"):
            align(worker, made, tmp_path, "resume", iterations=1)
    finally:
        data.write_text(before)
