"""What a run is doing now: RUN/status.json, written every few seconds.

The controller knows every process, every call that has no answer yet and every wait, so it can say who waits for whom
and for how long without asking anybody: a process that hangs still shows up. What a process takes and does, it is asked
beside the work. The file needs no connection to the run, so `rayward status` works from any machine that sees the run
directory.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import socket
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from actors.waits import waits
from cluster.rundir.files import read_metrics, read_rows
from cluster.runtime.handle import LIVE, Handle, local
from cluster.runtime.health import SCORERS, Controller, Vitals
from cluster.runtime.repeating import repeating

FILE = "status.json"
INTERVAL_S = 2.0
"""Seconds between two writes, and between two questions to a process."""
_SILENT_S = 5 * INTERVAL_S  # after which a run, or a process, counts as gone or stuck
_PACE_STEPS = 10  # steps that the time left is reckoned from
_ALERTS = 5  # of the newest
_KINDS = ("controller", "learner", "generator", "reward")
_PHASES: list[tuple[str, str]] = []  # (name, stage) of those that are under way, the outermost first
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStatus:
    """The controller, an actor, a learner rank or a reward replica, as the controller sees it."""

    name: str
    """generator-0, learner-1, reward-0, .."""
    state: str
    """starting, idle, working, paused (it stands still while weights arrive), silent or dead"""
    waiting: tuple[tuple[str, float], ...]
    """(method, seconds) of each call that the controller waits for, the oldest first"""
    answered: int
    """calls answered since it started"""
    died: str
    """why it is gone; empty while it lives"""
    silent_s: float
    """seconds for which it has not said how it is; 0 when it has"""
    vitals: Vitals | None
    """what it takes and does, as it said last; None before the first time"""
    cores: float | None
    """cores that it has kept busy lately"""
    rates: Mapping[str, float]
    """by how much each of its facts has grown lately, a second"""

    @classmethod
    def of(cls, handle: Handle) -> "ProcessStatus":
        """The status behind a handle."""
        waiting, pulse = tuple(handle.waiting), handle.pulse
        return cls(
            name=handle.name,
            state=_process_state(handle, bool(waiting)),
            waiting=waiting,
            answered=handle.answered,
            died=handle.died,
            silent_s=pulse.silent_s,
            vitals=pulse.last,
            cores=pulse.cores,
            rates=pulse.rates,
        )


def _process_state(handle: Handle, called: bool) -> str:
    last, silent_s = handle.pulse.last, handle.pulse.silent_s
    if handle.died:
        return "dead"
    if last is None and silent_s:
        return "starting"
    if silent_s > _SILENT_S:
        return "silent"
    facts = last.facts if last else {}
    if facts.get("paused"):
        return "paused"
    return "working" if called or (last and last.doing) or facts.get("waiting") or facts.get("running") else "idle"


def processes() -> list[ProcessStatus]:
    """Every process that there is a live handle of: the controller, learner ranks, generators, reward replicas."""
    return sorted((ProcessStatus.of(handle) for handle in list(LIVE)), key=lambda one: _order(one.name))


def _order(name: str) -> tuple[int, list[int], str]:
    kind = name.partition("-")[0]
    return _KINDS.index(kind) if kind in _KINDS else len(_KINDS), [int(n) for n in re.findall(r"\d+", name)], name


@contextlib.asynccontextmanager
async def attending(every_s: float = INTERVAL_S) -> AsyncIterator[None]:
    """Until the block ends, ask every process for its vitals and have every wait say its words, beside the work."""
    me = local(Controller(), "controller")

    async def work() -> None:
        while True:
            try:
                for wait in waits():
                    wait.look()
                await asyncio.gather(*(handle.attend(every_s / 2) for handle in list(LIVE)))
            except Exception:  # what is shown of a run must not stop it
                log.exception("the state of a process could not be asked for")
            await asyncio.sleep(every_s)

    task = asyncio.create_task(work(), name="attending")
    try:
        yield
    finally:
        me.kill()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.contextmanager
def under_way(phase: str, stage: str) -> Iterator[None]:
    """Have the status say that a phase of a stage is under way until the block ends."""
    _PHASES.append((phase, stage))
    try:
        yield
    finally:
        _PHASES.remove((phase, stage))


def snapshot(command: str) -> dict[str, Any]:
    """What RUN/status.json holds: this process, every live handle and every wait, as JSON values."""
    return {
        "time": time.time(),
        "command": command,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "phases": [{"phase": phase, "stage": stage} for phase, stage in _PHASES],
        "processes": [asdict(process) for process in processes()],
        "paused": _paused(),
        "waits": [{"who": wait.who, "for": wait.text, "seconds": wait.seconds} for wait in waits()],
    }


def _paused() -> dict[str, Any] | None:
    """Since when and why the run waits for scores."""
    pause = next((client.paused for client in list(SCORERS) if client.paused), None)
    return None if pause is None else {"reason": pause.reason, "seconds": time.time() - pause.since}


@contextlib.contextmanager
def reporting(run_dir: Path, command: str, interval_s: float = INTERVAL_S) -> Iterator[None]:
    """Keep RUN/status.json up to date until the block ends, and say there how it ended."""
    started = time.time()

    def write(**more: str) -> None:
        aside = run_dir / f".{FILE}.{os.getpid()}"
        with contextlib.suppress(OSError):  # a full disk must not stop the run that it reports on
            aside.write_text(json.dumps({**snapshot(command), "started": started, **more}))
            aside.replace(run_dir / FILE)

    write()
    ended = "failed"
    try:
        with repeating(write, interval_s, "status"):
            yield
        ended = "done"
    except (KeyboardInterrupt, SystemExit):
        ended = "stopped"
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
    status = json.loads(path.read_text())
    status["silent_s"] = max(0.0, time.time() - status["time"])
    status["state"] = _state(status)
    status["curves"] = read_metrics(run_dir)
    status["progress"] = _progress(status, run_dir)
    alerts = run_dir / "alerts.jsonl"
    status["alerts"] = [row for row in read_rows(alerts) if {"time", "text"} <= row.keys()][-_ALERTS:]
    return status


def _state(status: Mapping[str, Any]) -> str:
    """ "done", "failed", "stopped", "running", "paused", or what is known of a run that has fallen silent."""
    if ended := status.get("ended"):
        return ended
    if status["host"] == socket.gethostname() and not Path(f"/proc/{status['pid']}").exists():
        return "killed"
    if status["silent_s"] >= _SILENT_S:
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
