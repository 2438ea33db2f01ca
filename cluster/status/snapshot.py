"""What a run is doing now: RUN/status.json, written every few seconds.

The controller knows every process, every call that has no answer yet and every wait, so it can say who waits for whom
and for how long without asking anybody: a process that hangs still shows up. What a process takes and does, it is asked
beside the work. The file needs no connection to the run, so `rayward status` works from any machine that sees the run
directory.
"""

import contextlib
import json
import os
import socket
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster.rundir.files import read_metrics, read_rows
from cluster.runtime.exit_codes import FAILED
from cluster.runtime.health import INTERVAL_S, SILENT_S, Health, Monitor, repeating
from cluster.runtime.signals import Stopped
from reward_server.preferences.records import write_whole
from reward_server.redaction import redact, visible

FILE = "status.json"
_PACE_STEPS = 10  # steps that the time left is reckoned from
_ALERTS = 5  # of the newest


def snapshot(command: str, monitor: Monitor) -> dict[str, Any]:
    """What RUN/status.json holds: what a monitor sees, as JSON values."""
    pause = monitor.paused
    return {
        "time": time.time(),
        "command": command,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "phases": [{"phase": phase, "stage": stage} for phase, stage in monitor.phases],
        "processes": [_process(health) for health in monitor.processes()],
        "paused": pause and {"reason": pause.reason, "seconds": time.time() - pause.since},
        "waits": [{"who": wait.who, "for": wait.text, "seconds": wait.seconds} for wait in monitor.waits.open],
    }


def _process(health: Health) -> dict[str, Any]:
    return {
        "name": health.name,
        "state": health.state,
        "waiting": health.waiting,
        "answered": health.answered,
        "died": health.died,
        "silent_s": health.silent_s,
        "vitals": health.last and asdict(health.last),
        "cores": health.cores,
        "rates": health.rates,
    }


@contextlib.contextmanager
def reporting(run_dir: Path, command: str, monitor: Monitor, interval_s: float = INTERVAL_S / 2) -> Iterator[None]:
    """Keep RUN/status.json up to date until the block ends, and say there how it ended."""
    started = time.time()

    def write(**more: str) -> None:
        text = redact(json.dumps({**snapshot(command, monitor), "started": started, **more}))
        with contextlib.suppress(OSError):  # a full disk must not stop the run that it reports on
            try:
                write_whole(run_dir / FILE, text)
            except OSError:  # no room for another one: in the room of the last
                with (run_dir / FILE).open("r+") as file:
                    file.write(text)
                    file.truncate()

    write()
    ended = "failed"
    try:
        with repeating(write, interval_s, "status"):
            yield
        ended = "done"
    except Stopped as error:
        ended = "failed" if error.code == FAILED else "stopped"
        raise
    finally:
        write(ended=ended)


def read(run_dir: Path) -> dict[str, Any]:
    """RUN/status.json with the newest metrics of each stage, how far it is, and the last alerts.

    Raises ValueError where there is none.
    """
    path = run_dir / FILE
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: no command has run in {run_dir} yet. Remedy: name the --run directory of a run"
        )
    try:
        status = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Remedy: a command at work writes it anew") from error
    status["silent_s"] = max(0.0, time.time() - status["time"])
    status["state"] = _state(status)
    status["curves"] = read_metrics(run_dir)
    status["progress"] = _progress(status, run_dir)
    alerts = run_dir / "alerts.jsonl"
    status["alerts"] = [row for row in read_rows(alerts) if {"time", "text"} <= row.keys()][-_ALERTS:]
    return visible(status)


def _state(status: Mapping[str, Any]) -> str:
    """ "done", "failed", "stopped", "running", "paused", or what is known of a run that has fallen silent."""
    if ended := status.get("ended"):
        return ended
    if status["host"] == socket.gethostname() and not Path(f"/proc/{status['pid']}").exists():
        return "killed"
    if status["silent_s"] >= SILENT_S:
        return "silent"
    return "paused" if status.get("paused") else "running"


def _progress(status: Mapping[str, Any], run_dir: Path) -> dict[str, Any] | None:
    """The stage that is at work, its step, of how many, and the seconds that are left; None before the first."""
    curves = status["curves"]
    newest = next(reversed(curves), "")
    current = status["phases"][-1]["stage"] if status.get("phases") else newest
    facts = next((p["vitals"]["facts"] for p in status["processes"] if p["name"] == "controller" and p["vitals"]), {})
    if "iterations" in facts:  # PPO is at work, and its first iteration has logged nothing yet
        stage, step, total = current, int(facts["version"]), int(facts["iterations"])
    else:
        stage = current if current in curves else newest
        step = max((step for series in curves.get(stage, {}).values() for step in series), default=0)
        total = int(next(iter(curves.get(stage, {}).get("progress/total", {}).values()), 0))
    if not stage:
        return None
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if row.get("stage") == stage] if step else []
    seconds = _pace([(row["step"], row["time"]) for row in rows if {"step", "time"} <= row.keys()])
    left = None if seconds is None or not total or status["state"] != "running" else seconds * (total - step)
    return {"stage": stage, "step": step, "total": total or None, "step_s": seconds, "left_s": left}


def _pace(logged: Sequence[tuple[int, float]]) -> float | None:
    """Seconds a step, by the median of the last ones: a pause or a resume is no step."""
    first = dict(reversed(logged))  # a checkpoint's row comes later, under the same step
    newest = sorted(first.items())[-_PACE_STEPS - 1 :]
    gaps = [(late - early) / (to - since) for (since, early), (to, late) in pairwise(newest) if late > early]
    return statistics.median(gaps) if gaps else None
