"""What earlier commands left in a run directory for those that go on: their W&B runs, and how far they logged."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from reward_server.preferences.records import write_whole

_FILE = "wandb-runs.json"
log = logging.getLogger(__name__)


def earlier_run(run_dir: Path, command: str) -> str | None:
    """Id of the W&B run that a command used the last time; None when there was none."""
    return _runs(run_dir).get(command, {}).get("id")


def sent_steps(run_dir: Path, command: str) -> dict[str, int]:
    """The last step of each area of metrics that W&B has for sure: of a command that was killed, it may have none."""
    return _runs(run_dir).get(command, {}).get("sent", {})


def remember_run(run_dir: Path, command: str, run_id: str, sent: Mapping[str, int]) -> None:
    """Note the id of a command's W&B run, and the last step of each area of metrics that it has for sure."""
    runs = {**_runs(run_dir), command: {"id": run_id, "sent": sent}}
    try:
        write_whole(run_dir / _FILE, json.dumps(runs, indent=2) + "\n")
    except OSError as error:
        log.warning("%s. W&B may be sent steps again after a stop", error)


def forget_stage(run_dir: Path, stage: str) -> None:
    """Take the lines of a stage out of metrics.jsonl and phases.jsonl."""
    for file in ("metrics.jsonl", "phases.jsonl"):
        _leave_out(run_dir / file, lambda row: row["stage"] == stage)


def forget_steps(run_dir: Path, stage: str, done: int) -> bool:
    """Take the lines of a stage's steps after `done` out of metrics.jsonl; whether there were any."""
    return _leave_out(run_dir / "metrics.jsonl", lambda row: row["stage"] == stage and row["step"] > done)


def _leave_out(path: Path, wrong: Callable[[dict[str, Any]], bool]) -> bool:
    """Leave rows out of a file, and lines that are none; whether there were any."""
    kept = b"".join(line + b"\n" for line, row in _rows(path) if not wrong(row))
    if not path.is_file() or kept == path.read_bytes():
        return False
    write_whole(path, kept.decode())
    return True


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line of metrics or phases that is one; the others are named, but for one that its writer did not finish."""
    *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not (isinstance(row["stage"], str) and isinstance(row.get("step", 0), int)):
                raise ValueError
        except (ValueError, LookupError, TypeError):
            log.warning("%s:%d is damaged, and left out", path, number)
        else:
            yield line, row


def _runs(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What is noted of W&B's runs: nothing where it cannot be read, as no run depends on that."""
    path = run_dir / _FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        sent = {command: {key: int(step) for key, step in run["sent"].items()} for command, run in found.items()}
        return {command: {"id": str(run["id"]), "sent": sent[command]} for command, run in found.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s): W&B begins new runs, and what it has is sent again", path, error)
        return {}
