"""What a run is doing now: RUN/status.json, written every few seconds, and how it is shown.

The controller knows every process and every call that has no answer yet, so it can say who waits for whom and for how
long without asking anybody: a process that hangs still shows up. The file needs no connection to the run, so
`rayward status` works from any machine that sees the run directory.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.console import duration
from cluster.handle import LIVE, Handle
from cluster.repeating import repeating
from cluster.run_files import read_metrics

FILE = "status.json"
INTERVAL_S = 2.0
"""Seconds between two writes."""
_SILENT_S = 5 * INTERVAL_S  # after which a run counts as gone or stuck
_SPARKS = "▁▂▃▄▅▆▇█"
_CURVES = ("score/mean", "gold/mean", "kl/mean", "parity/mean_gap", "time/iteration")
_CURVE_WIDTH = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStatus:
    """One actor, learner rank or service, as the controller sees it."""

    name: str
    """generator-0, learner-1, reward, .."""
    state: str
    """idle, working or dead"""
    waiting: tuple[tuple[str, float], ...]
    """(method, seconds) of each call that the controller waits for, the oldest first"""
    answered: int
    """calls answered since it started"""
    died: str
    """why it is gone; empty while it lives"""

    @classmethod
    def of(cls, handle: Handle) -> "ProcessStatus":
        """The status behind a handle."""
        waiting = tuple(handle.waiting)
        state = "dead" if handle.died else "working" if waiting else "idle"
        return cls(name=handle.name, state=state, waiting=waiting, answered=handle.answered, died=handle.died)


def snapshot(command: str) -> dict[str, Any]:
    """What RUN/status.json holds: this process and every live handle, as JSON values."""
    processes = sorted((ProcessStatus.of(handle) for handle in list(LIVE)), key=lambda one: one.name)
    return {
        "time": time.time(),
        "command": command,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "processes": [asdict(process) for process in processes],
    }


@contextlib.contextmanager
def reporting(run_dir: Path, command: str, interval_s: float = INTERVAL_S) -> Iterator[None]:
    """Keep RUN/status.json up to date until the block ends, and say there how it ended."""

    def write(**more: str) -> None:
        aside = run_dir / f".{FILE}.{os.getpid()}"
        with contextlib.suppress(OSError):  # a full disk must not stop the run that it reports on
            aside.write_text(json.dumps(snapshot(command) | more))
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
    """RUN/status.json with the newest metrics of each stage. Raises ValueError where there is none."""
    path = run_dir / FILE
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: no command has run in {run_dir} yet. Remedy: name the --run directory of a run"
        )
    status = json.loads(path.read_text())
    status["silent_s"] = max(0.0, time.time() - status["time"])
    status["state"] = _state(status)
    status["curves"] = read_metrics(run_dir)
    return status


def _state(status: Mapping[str, Any]) -> str:
    """ "done", "failed", "stopped", "running", or what is known of a run that has fallen silent."""
    if ended := status.get("ended"):
        return ended
    if status["host"] == socket.gethostname() and not Path(f"/proc/{status['pid']}").exists():
        return "killed"
    return "running" if status["silent_s"] < _SILENT_S else "silent"


def render(status: Mapping[str, Any], run_dir: Path, curves: bool = False) -> RenderableType:
    """The status for a terminal: a headline, a row a process, and with `curves` how the newest stage is going."""
    shown: list[RenderableType] = [_headline(status, run_dir), _processes(status["processes"])]
    if curves and status["curves"]:
        stage = list(status["curves"])[-1]
        shown.append(_sparklines(stage, status["curves"][stage]))
    return Group(*shown)


def _headline(status: Mapping[str, Any], run_dir: Path) -> Text:
    state = status["state"]
    what = {
        "running": f"running on {status['host']} (pid {status['pid']})",
        "killed": "killed: its process is gone. Remedy: the same command with --resume",
        "silent": f"silent for {duration(status['silent_s'])}: its machine is gone, or it is stopped",
    }.get(state, state)
    text = Text(f"rayward {status['command']}  {run_dir}: {what}")
    text.stylize({"running": "green", "done": "green"}.get(state, "bold red"))
    return text


def _processes(processes: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("process", "state", "the run waits for", "since", "calls open", "answered"):
        table.add_column(column, justify="right" if column in ("since", "calls open", "answered") else "left")
    for one in processes:
        method, seconds = one["waiting"][0] if one["waiting"] else ("", 0.0)
        table.add_row(
            one["name"],
            one["state"],
            one["died"] or method,
            duration(seconds) if method else "",
            str(len(one["waiting"])),
            str(one["answered"]),
            style="red" if one["state"] == "dead" else None,
        )
    return table


def _sparklines(stage: str, metrics: Mapping[str, Mapping[int, float]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in (stage, "last", "course"):
        table.add_column(column, justify="right" if column == "last" else "left")
    for name in [*(n for n in _CURVES if n in metrics), *(n for n in metrics if n.endswith("/loss"))]:
        values = list(metrics[name].values())
        table.add_row(name, f"{values[-1]:.4g}", sparkline(values[-_CURVE_WIDTH:]))
    steps = [step for series in metrics.values() for step in series]
    total = next(iter(metrics.get("progress/total", {}).values()), 0)
    table.add_row("step", f"{max(steps, default=0)}", f"of {total:g}" if total else "")
    return table


def sparkline(values: Sequence[float]) -> str:
    """A curve of one character a value, between its smallest and its largest."""
    low, high = min(values), max(values)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((value - low) * scale)] for value in values)
