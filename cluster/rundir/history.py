"""What earlier commands left in a run directory for those that go on: their W&B runs, and how far they logged."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reward_server.preferences.records import write_whole

_FILE = "wandb-runs.json"


def earlier_run(run_dir: Path, command: str) -> str | None:
    """Id of the W&B run that a command used the last time; None when there was none."""
    return _runs(run_dir).get(command, {}).get("id")


def has_all(run_dir: Path, command: str) -> bool:
    """Whether that W&B run was finished: after a SIGKILL, W&B lacks what it had not written yet."""
    return _runs(run_dir).get(command, {}).get("finished", False)


def remember_run(run_dir: Path, command: str, run_id: str, finished: bool) -> None:
    """Note the id of a command's W&B run, and whether it was finished."""
    runs = {**_runs(run_dir), command: {"id": run_id, "finished": finished}}
    write_whole(run_dir / _FILE, json.dumps(runs, indent=2) + "\n")


def area(name: str) -> str:
    """The part of a metric's name before its last slash: metrics of one area are logged together."""
    return name.rpartition("/")[0]


def last_steps(run_dir: Path) -> dict[tuple[str, str], int]:
    """The last step of each area of metrics of each stage in metrics.jsonl, by (stage, area)."""
    path, last = run_dir / "metrics.jsonl", dict[tuple[str, str], int]()
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        try:
            row = json.loads(line)
            for key in {(row["stage"], area(name)) for name in row if "/" in name}:
                last[key] = max(row["step"], last.get(key, row["step"]))
        except (ValueError, LookupError, TypeError):
            continue  # a line that its writer had no time to finish
    return last


def forget_stage(run_dir: Path, stage: str) -> None:
    """Take the lines of a stage out of metrics.jsonl and phases.jsonl."""
    for file in ("metrics.jsonl", "phases.jsonl"):
        _leave_out(run_dir / file, lambda row: row["stage"] == stage)


def forget_steps(run_dir: Path, stage: str, done: int) -> bool:
    """Take the lines of a stage's steps after `done` out of metrics.jsonl; whether there were any."""
    return _leave_out(run_dir / "metrics.jsonl", lambda row: row["stage"] == stage and row["step"] > done)


def _leave_out(path: Path, wrong: Callable[[dict[str, Any]], bool]) -> bool:
    """Leave rows out of a file, and a line that its writer had no time to finish; whether there were any."""
    lines, kept = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [], []
    for line in filter(None, lines):
        with contextlib.suppress(ValueError, LookupError, TypeError):
            if not wrong(json.loads(line)):
                kept.append(f"{line}\n")
    if "".join(kept) == "\n".join(lines):
        return False
    write_whole(path, "".join(kept))
    return True


def _runs(run_dir: Path) -> dict[str, dict[str, Any]]:
    path = run_dir / _FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
