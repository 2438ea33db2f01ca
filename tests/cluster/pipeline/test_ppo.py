"""PPO of a run directory, stopped and resumed: everything but Ray and vLLM, in one process."""

import asyncio
import contextlib
import inspect
import io
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from actors.trajectory import Ticket
from cluster.config.schema import Config, TrackingConfig
from cluster.pipeline.evaluate import Evaluation, Evaluator
from cluster.pipeline.job import Job
from cluster.pipeline.ppo import PPO
from cluster.pipeline.stage import advance
from cluster.rundir.lineage import latest, read_lineage, state
from cluster.rundir.record import ResumeRefused, Start
from cluster.runtime.health import ActorDied, Monitor
from cluster.tracking.console import Console
from cluster.tracking.tracker import Tracker
from learner.data.buffer import Buffer
from learner.data.ledger import Ledger, audit
from learner.progress import Progress
from learner.worker.group import LearnerGroup
from learner.worker.networks import ValueNetwork
from learner.worker.worker import LearnerWorker
from reward_server.sources import FunctionSource
from tests.fake_pool import FakePool
from tests.fakes import FakeFleet
from tests.full_disk import FullDisk
from tests.hf_generator import HfGenerator, SourceScorer
from tests.ranks import InProcess
from tests.stage_runs import make_job
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


PUBLISHED: dict[int, dict[str, torch.Tensor]] = {}
"""the newest weights of each version"""
_TIMES = ("time", "checkpoint/", "heldout/seconds")


class Killed(BaseException):
    """The process ends here."""


class OneGenerator(FakeFleet):
    """A fleet of one, which is given the worker's weights; the process is killed while it takes a version."""

    publisher = None

    def __init__(self, generator: HfGenerator, worker: LearnerWorker, killed_at: int | None) -> None:
        super().__init__(generator)
        self.generator, self.worker, self.killed_at = generator, worker, killed_at
        self.versions: list[int] = []

    async def publish(self, version: int) -> dict[str, float]:
        self.generator.receive(self.worker, version)
        self.versions.append(version)
        PUBLISHED[version] = {name: one.detach().clone() for name, one in self.generator.model.named_parameters()}
        if version == self.killed_at:
            raise Killed
        return {}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alignment")
    tiny_causal_lm(root / "sft")
    tiny_reward_model(root / "reward")
    tiny_reward_model(root / "other", seed=1)
    prompts = [{"id": f"p{i}", "prompt": f"say {chr(ord('a') + i)}"} for i in range(8)]
    texts = [{"text": f"the quick brown fox number {i} jumps over the lazy dog"} for i in range(30)]
    heldout = [{**row, "user": f"u{i}", "use_case": "say"} if i else row for i, row in enumerate(prompts[:4])]
    items = [{"ctx": "the quick brown fox", "endings": ["jumps", "the dog", "a fox"], "label": n} for n in range(3)]
    rows = {"prompts": prompts, "prompts_heldout": heldout, "pretraining": texts, "pretraining_valid": texts[:6]}
    rows |= {"hellaswag": items}
    for name, values in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return root


def align(
    worker: LearnerWorker,
    made: Path,
    run: Path,
    start: Start,
    killed_at: int | None = None,
    critic: Path | None = None,
    apart: bool = False,
    suite_every: int = 0,
    **ppo: Any,
) -> tuple[list[int], str]:
    """One command; (versions that were published, what it printed)."""
    files = {
        name: made / f"{name}.jsonl" for name in ("prompts", "prompts_heldout", "pretraining", "pretraining_valid")
    }
    models = {"sft": made / "sft", "reward": made / "reward", "critic": critic}
    settings = SETTINGS | {"ppo": SETTINGS["ppo"] | ppo, "models": models, "data": files}
    if suite_every:
        suite = {"suite": "hellaswag,bits_per_byte", "suite_every": suite_every, "items": 2}
        benchmarks = {"hellaswag": str(made / "hellaswag.jsonl")}
        settings |= {"evaluation": SETTINGS["evaluation"] | suite, "benchmarks": benchmarks}
    shown, monitor = io.StringIO(), Monitor()
    tracker = Tracker(run, TrackingConfig(mode="disabled"), "ppo", console=Console(stream=shown), monitor=monitor)
    config = Config.model_validate(settings)
    job = Job(config=config, run_dir=run, tracker=tracker, start=start, monitor=monitor)
    run.mkdir(exist_ok=True)
    worker.unload()
    fleet: Any = OneGenerator(HfGenerator(made / "sft"), worker, killed_at)
    rewards: Any = SourceScorer(FunctionSource("tests.hf_generator:share_of_letters"))
    pool: Any = FakePool(LearnerGroup([InProcess(worker)]), fleet, rewards, apart)
    with contextlib.suppress(Killed):
        asyncio.run(advance(PPO(job), pool))
    return fleet.versions, shown.getvalue()


def noting(calls: list[str], name: str, method: Any) -> Any:
    """The method, which notes its calls."""
    return lambda *args, **settings: calls.append(name) or method(*args, **settings)


def results(run: Path) -> dict[str, Any]:
    """What a run leaves behind, times apart."""
    steps: dict[int, dict[str, Any]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept = {name: value for name, value in row.items() if not name.startswith(_TIMES)}
        steps.setdefault(row["step"], {}).update(kept)
    files = [*run.glob("policy*/model.safetensors"), *run.glob("evaluations/**/*.jsonl"), run / "summary.json"]
    return {"steps": steps} | {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_a_stage_that_was_killed_goes_on_and_ends_the_same(
    worker: LearnerWorker, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, parts, calls = tmp_path / "whole", tmp_path / "parts", list[str]()
    for owner, method in ((LearnerWorker, "save"), (HfGenerator, "_sample")):
        monkeypatch.setattr(owner, method, noting(calls, method, getattr(owner, method)))
    assert align(worker, made, whole, "new")[0] == [0, 1, 2, 3, 4]
    assert calls[-3:] == ["_sample", "save", "save"]  # in turns
    assert align(worker, made, parts, "new", killed_at=1)[0] == [0, 1]  # before there was a checkpoint
    versions, shown = align(worker, made, parts, "resume", killed_at=4)
    assert versions == [0, 1, 2, 3, 4]
    assert "ppo: there is no checkpoint, so it starts over" in shown
    with pytest.raises(ResumeRefused, match=r"begun\. Remedy: --resume goes on with it"):
        align(worker, made, parts, "new")
    with pytest.raises(ResumeRefused, match=r"ppo.iterations is 1, but .*version-000002 has done 2 already"):
        align(worker, made, parts, "resume", iterations=1)
    versions, shown = align(worker, made, parts, "resume", apart=True)
    assert versions == [2, 3, 4]
    assert calls[-1] == "_sample"  # the policy was written while held-out prompts were answered
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
    by_case = json.loads(expected["summary.json"])["use_cases"]
    assert by_case.keys() == {"sft", "ppo"}
    for label, found in by_case.items():
        rows = [row for row in map(json.loads, expected[f"evaluations/{label}.jsonl"].splitlines()) if row["use_case"]]
        means = {name: sum(row[name] for row in rows) / 3 for name in ("gold", "score")}
        assert {name: found["say"][name] for name in ("n", *means)} == pytest.approx({"n": 3, **means})
    # complete: nothing more happens, unless it is to be longer
    assert align(worker, made, parts, "resume") == ([], "ppo: complete, and left as it is\n")
    assert align(worker, made, parts, "resume", iterations=5)[0] == [4, 5]
    assert audit(parts / "ledger-ppo.jsonl").trained == 30
    with pytest.raises(ResumeRefused, match=r"ppo.clip was 0.2, is 0.3; ppo.kl.target was 2.0, is 3.0"):
        align(worker, made, parts, "resume", clip=0.3, kl={"target": 3.0, "horizon": 50})
    assert align(worker, made, parts, "restart", iterations=1, clip=0.3)[0] == [0, 1]
    counts = audit(parts / "ledger-ppo.jsonl")
    assert (counts.trained, counts.resumed, counts.committed) == (6, 0, 1)


def golds(monkeypatch: pytest.MonkeyPatch, *by_version: float) -> None:
    """Have held-out measurements say these golds, whatever they find."""
    measure = Evaluator.measure

    async def told(self: Evaluator, name: str, config: Any, stage: str, step: int) -> Evaluation:
        return replace(await measure(self, name, config, stage, step), gold=by_version[step])

    monkeypatch.setattr(Evaluator, "measure", told)


def kept(run: Path) -> int:
    """The version that policy_best is of, whose weights it has."""
    version = json.loads((run / "summary.json").read_text())["ppo"]["ppo"]["best"]["iteration"]
    weights = load_file(run / "policy_best" / "model.safetensors")
    assert all(torch.equal(weights[name], PUBLISHED[version][name]) for name in weights)
    return version


def test_the_policy_with_the_most_gold_is_kept_over_stops(
    worker: LearnerWorker, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    golds(monkeypatch, 0.9, 0.1, 0.5, 0.3, 0.2, 0.8)
    align(worker, made, tmp_path, "new", killed_at=4)
    assert kept(tmp_path) == 2  # 0 is the SFT model
    align(worker, made, tmp_path, "resume")
    assert kept(tmp_path) == 2
    assert (tmp_path / "policy_best" / "tokenizer.json").is_file()
    best = latest(read_lineage(tmp_path))["policy_best"]
    assert state(tmp_path, best) == "whole"
    align(worker, made, tmp_path, "resume", iterations=5)
    assert kept(tmp_path) == 5  # the last one, which is also the policy
    assert load_file(tmp_path / "policy" / "model.safetensors").keys() == PUBLISHED[5].keys()


def test_no_policy_is_kept_where_that_is_not_wanted(
    worker: LearnerWorker, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(SETTINGS["evaluation"], "keep_best", False)
    align(worker, made, tmp_path, "new", iterations=2)
    assert not (tmp_path / "policy_best").exists()
    assert "best" not in json.loads((tmp_path / "summary.json").read_text())["ppo"]["ppo"]
    monkeypatch.setitem(SETTINGS["evaluation"], "keep_best", True)
    align(worker, made, tmp_path, "resume", iterations=3)  # it may be wanted later on
    assert kept(tmp_path) == 3


def test_the_suite_on_the_way_changes_nothing_of_what_ppo_computes(worker: LearnerWorker, made: Path, tmp_path: Path):
    plain, whole, parts = tmp_path / "plain", tmp_path / "whole", tmp_path / "parts"
    align(worker, made, plain, "new")
    align(worker, made, whole, "new", suite_every=3)
    assert align(worker, made, parts, "new", suite_every=1, killed_at=4)[0] == [0, 1, 2, 3, 4]
    align(worker, made, parts, "resume", suite_every=3)  # 3 is trained and measured once more
    expected, found, again = results(plain), results(whole), results(parts)
    curves = {step: taken(row) for step, row in found["steps"].items()}
    assert {step: taken(row) for step, row in again["steps"].items() if step in (0, 3, 4)} == {
        step: row for step, row in curves.items() if row
    }
    for version in (1, 2):
        taken(again["steps"][version])
    names = {"suite/hellaswag.accuracy", "suite/bits_per_byte.bits_per_byte"}
    assert {step: row.keys() for step, row in curves.items()} == {
        step: names if step in (0, 3, 4) else set() for step in range(5)
    }
    for version in (0, 3, 4):
        name = f"evaluations/ppo-{version:06d}/bits_per_byte.jsonl"
        rows = [json.loads(line) for line in found[name].splitlines()]
        bits, size = (sum(row["verdict"]["bits_per_byte"][n] for row in rows) for n in (0, 1))
        assert len(rows) == 2
        assert curves[version]["suite/bits_per_byte.bits_per_byte"] == pytest.approx(bits / size)
        assert again[name] == found[name]
    bits = [curves[version]["suite/bits_per_byte.bits_per_byte"] for version in (0, 3, 4)]
    assert len({*bits}) == 3, "the weights of the moment are measured"
    for name, value in expected.items():
        assert found[name] == again[name] == value, name
    assert ledger_of(whole) == ledger_of(plain)


def taken(row: dict[str, Any]) -> dict[str, Any]:
    """The suite's metrics, taken out of a row."""
    return {name: row.pop(name) for name in [*row] if name.startswith("suite/")}


def ledger_of(run: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "ledger-ppo.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"evaluation": {"suite_every": 1}}, "suite_every needs benchmarks to measure"),
        ({"evaluation": {"suite": "drop", "suite_every": 1}}, r"benchmarks\.drop is not set"),
        ({"evaluation": {"suite": "win_rate", "suite_every": 1}}, "win_rate, which compares models"),
        ({"evaluation": {"suite": "hellaswag", "suite_every": 1}, "generator": {"max_model_len": 20}}, "raise it to"),
    ],
)
def test_a_suite_that_cannot_be_measured_on_the_way_is_refused_before_ppo_starts(
    made: Path, tmp_path: Path, settings: dict[str, Any], said: str
):
    files = {name: made / f"{name}.jsonl" for name in ("prompts", "prompts_heldout")}
    given = {"data": files, "models": {"sft": made / "sft"}, "benchmarks": {"hellaswag": str(made / "hellaswag.jsonl")}}
    with pytest.raises(ValueError, match=said):
        PPO(
            make_job(tmp_path, **given, **settings, ppo={"pretraining": {"coef": 0}}, rollout=SETTINGS["rollout"])
        ).check()


def test_a_stage_reaches_the_loop_in_two_calls(
    worker: LearnerWorker, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cluster, found = str(Path(__file__).parents[3] / "cluster"), []

    async def loop(*_: Any) -> None:
        found.extend(one.function for one in inspect.stack() if one.filename.startswith(cluster))
        raise Killed

    monkeypatch.setattr("learner.ppo.ppo", loop)
    align(worker, made, tmp_path, "new")
    assert found == ["_train", "run", "_work", "advance"]


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


def test_a_run_waits_for_room_on_a_full_disk_and_ends_the_same(
    worker: LearnerWorker, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Full in the second iteration, and again when the policy is exported."""
    align(worker, made, tmp_path / "whole", "new", iterations=2)
    disk, run, save, update = FullDisk(monkeypatch), tmp_path / "full", LearnerWorker.save, LearnerWorker.update
    freed: list[threading.Timer] = []

    def fill(times: int) -> None:
        if len(freed) < times:
            disk.full = True
            freed.append(threading.Timer(0.5, setattr, (disk, "full", False)))
            freed[-1].start()

    def updated(self: LearnerWorker, *rest: Any, **more: Any) -> Any:
        fill(1)
        return update(self, *rest, **more)

    def saved(self: LearnerWorker, *rest: Any, **more: Any) -> Any:
        fill(2)
        return save(self, *rest, **more)

    monkeypatch.setattr(LearnerWorker, "update", updated)
    monkeypatch.setattr(LearnerWorker, "save", saved)
    assert align(worker, made, run, "new", iterations=2)[0] == [0, 1, 2]
    assert results(run) == results(tmp_path / "whole")
    assert audit(run / "ledger-ppo.jsonl").violations == ()
    assert audit(run / "ledger-ppo.jsonl").trained == 12
    assert caplog.text.count("the pause is over") == len(freed) == 2
    assert "cannot be written (No space left on device). Remedy: make room on its disk" in caplog.text
    assert not list(run.rglob(".aside-*"))


# --- where it goes on, and checkpoints that cannot be written


class Saver:
    """Saves a file, or fills the disk."""

    full = False

    async def save_state(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_bytes(b"0" * 100)
        if self.full:
            with open("/dev/full", "wb", buffering=0) as file:
                file.write(b"0" * 100)


class Stopped(PPO):
    """PPO as far as its record and its progress go."""

    def made_of(self) -> Any:
        return {"ppo": {"clip": 0.2}}, {}


def begin(run: Path, start: Start = "resume") -> tuple[Stopped, Progress, Buffer, Ledger]:
    tracker = Tracker(run, TrackingConfig(mode="disabled"), "ppo", console=Console(stream=io.StringIO()))
    config = Config.model_validate({"ppo": {"prompts_per_batch": 2}})
    stage = Stopped(Job(config=config, run_dir=run, tracker=tracker, start=start))
    assert stage.record is not None
    if stage.record.begin():
        tracker.forget("ppo")
    progress = stage.progress(stage.config)
    ledger = Ledger(stage._ledger_file)
    buffer = Buffer(2, 1, 0, progress.done, ledger=ledger)
    stage._restore(progress, buffer, ledger)
    return stage, progress, buffer, ledger


def save(version: int, stage: Stopped, progress: Progress, buffer: Buffer, ledger: Ledger, learner: Any) -> None:
    buffer.version = version
    buffer._taken = buffer._tickets.admitted = 2 * version
    asyncio.run(stage._save(progress, version, 0.5, buffer, ledger, learner))


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_stage_that_was_stopped_goes_on_from_its_newest_checkpoint(tmp_path: Path):
    parts = begin(tmp_path)
    assert (parts[1].done, parts[1].state) == (0, {})
    save(2, *parts, Saver())
    _, again, buffer, _ = begin(tmp_path)
    assert (again.done, again.state["beta"], buffer.version) == (2, 0.5, 2)
    assert again.newest is not None
    assert (again.newest.networks / "weights").stat().st_size == 100
    found = audit(tmp_path / "ledger-ppo.jsonl")
    assert (found.committed, found.resumed) == (2, 1)


def test_without_a_checkpoint_what_was_begun_is_undone_in_the_ledger(tmp_path: Path):
    *_, ledger = begin(tmp_path)
    ledger.record("issued", Ticket(number=0, attempt=0))
    ledger.close()
    assert begin(tmp_path)[1].done == 0
    found = audit(tmp_path / "ledger-ppo.jsonl")
    assert (found.dropped, found.outstanding, found.resumed) == ({"resumed": 1}, 0, 1)


def test_starting_over_removes_what_was_written(tmp_path: Path):
    parts = begin(tmp_path)
    save(2, *parts, Saver())
    progress = begin(tmp_path, "restart")[1]
    assert progress.newest is None
    assert not (tmp_path / "ledger-ppo.jsonl").exists()
    assert not (tmp_path / "checkpoints" / "ppo").exists()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_full_disk_is_an_alarm_and_the_earlier_checkpoint_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    parts, learner = begin(tmp_path), Saver()
    save(2, *parts, learner)
    learner.full = True
    save(3, *parts, learner)
    assert "checkpoint 3 was not written, and the run goes on without it: [Errno 28] No space left" in caplog.text
    first, second = logged(tmp_path)
    assert (first["checkpoint/failures"], second["checkpoint/failures"]) == (0.0, 1.0)
    assert first["checkpoint/bytes"] > 100
    learner.full = False
    save(4, *parts, learner)
    assert begin(tmp_path)[1].done == 4
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "ppo").iterdir()) == [
        "version-000002",
        "version-000004",
    ]
    assert audit(tmp_path / "ledger-ppo.jsonl").committed == 4


def test_an_error_of_ours_is_not_taken_for_a_full_disk(tmp_path: Path):
    with pytest.raises(AttributeError):
        save(2, *begin(tmp_path), cast(Any, None))


@pytest.mark.parametrize(
    "error", [ActorDied("learner-1", "out of memory"), TimeoutError("save_state() did not answer")]
)
def test_a_rank_that_is_gone_or_silent_is_not_taken_for_a_full_disk(tmp_path: Path, error: Exception):
    class Gone:
        async def save_state(self, folder: Path) -> None:
            raise error

    with pytest.raises(type(error)):
        save(2, *begin(tmp_path), Gone())
