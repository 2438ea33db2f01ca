"""Where PPO goes on, and what happens to the run when a checkpoint cannot be written."""

import asyncio
import io
import json
from pathlib import Path
from typing import Any, cast

import pytest

from actors.trajectory import Ticket
from cluster.config.schema import Config
from cluster.pipeline.job import Job
from cluster.pipeline.progress import Progress
from cluster.rundir.stages import ResumeRefused, Stage, Start
from cluster.tracking.console import Console
from cluster.tracking.tracker import Tracker
from learner.config import PPOConfig
from learner.data.buffer import Buffer
from learner.data.ledger import Ledger, audit

CONFIG = PPOConfig(iterations=4, prompts_per_batch=2)


class Learner:
    """Saves a file, or fills the disk."""

    full = False

    async def save_state(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_bytes(b"0" * 100)
        if self.full:
            with open("/dev/full", "wb", buffering=0) as file:
                file.write(b"0" * 100)


def begin(run: Path, start: Start = "resume", config: PPOConfig = CONFIG) -> tuple[Progress, Buffer, Ledger]:
    tracker = Tracker(
        run, Config().tracking.model_copy(update={"mode": "disabled"}), "ppo", console=Console(stream=io.StringIO())
    )
    job = Job(config=Config(), run_dir=run, tracker=tracker, start=start)
    traces = (run / "ledger-ppo.jsonl", run / "checkpoints" / "ppo")
    progress = Progress(job, Stage(run, "ppo", {"ppo.clip": 0.2}, start, run / "policy", traces), config)
    ledger = Ledger(progress.ledger_file)
    buffer = Buffer(2, 1, 0, progress.version, ledger=ledger)
    progress.restore(buffer, ledger)
    return progress, buffer, ledger


def save(version: int, progress: Progress, buffer: Buffer, ledger: Ledger, learner: Any) -> None:
    buffer.version = version
    buffer._taken = buffer._admitted = 2 * version
    asyncio.run(progress.save(version, 0.5, buffer, ledger, learner))


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_stage_that_was_stopped_goes_on_from_its_newest_checkpoint(tmp_path: Path):
    parts = begin(tmp_path)
    assert (parts[0].version, parts[0].beta) == (0, CONFIG.kl.coef)
    save(2, *parts, Learner())
    again, buffer, _ = begin(tmp_path)
    assert (again.version, again.beta, buffer.version) == (2, 0.5, 2)
    assert (again.networks / "weights").stat().st_size == 100
    found = audit(tmp_path / "ledger-ppo.jsonl")
    assert (found.committed, found.resumed) == (2, 1)


def test_without_a_checkpoint_what_was_begun_is_undone_in_the_ledger(tmp_path: Path):
    _, _, ledger = begin(tmp_path)
    ledger.record("issued", Ticket(number=0, attempt=0))
    ledger.close()
    progress, _, _ = begin(tmp_path)
    assert progress.version == 0
    found = audit(tmp_path / "ledger-ppo.jsonl")
    assert (found.dropped, found.outstanding, found.resumed) == ({"resumed": 1}, 0, 1)


def test_starting_over_removes_what_was_written(tmp_path: Path):
    parts = begin(tmp_path)
    save(2, *parts, Learner())
    progress, _, _ = begin(tmp_path, "restart")
    assert progress.version == 0
    assert not (tmp_path / "ledger-ppo.jsonl").exists()
    assert progress.checkpoints.newest() is None
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_shorter_run_than_was_done_is_refused(tmp_path: Path):
    save(4, *begin(tmp_path), Learner())
    with pytest.raises(ResumeRefused, match=r"ppo.iterations is 3, but .*version-000004 has done 4 already"):
        begin(tmp_path, config=CONFIG.model_copy(update={"iterations": 3}))
    assert begin(tmp_path, config=CONFIG.model_copy(update={"iterations": 9}))[0].version == 4


def test_a_full_disk_is_an_alarm_and_the_earlier_checkpoint_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    parts, learner = begin(tmp_path), Learner()
    save(2, *parts, learner)
    learner.full = True
    save(3, *parts, learner)
    assert "checkpoint 3 was not written, and the run goes on without it: [Errno 28] No space left" in caplog.text
    first, second = logged(tmp_path)
    assert (first["checkpoint/failures"], second["checkpoint/failures"]) == (0.0, 1.0)
    assert first["checkpoint/bytes"] > 100
    learner.full = False
    save(4, *parts, learner)
    found = begin(tmp_path)[0].checkpoints
    assert sorted(path.name for path in found.folder.iterdir()) == ["version-000002", "version-000004"]
    assert audit(tmp_path / "ledger-ppo.jsonl").committed == 4


def test_an_error_of_ours_is_not_taken_for_a_full_disk(tmp_path: Path):
    with pytest.raises(AttributeError):
        save(2, *begin(tmp_path), cast(Any, None))
