"""A run's records: JSONL files that are complete, the console, and Weights & Biases as far as it keeps up.

W&B is fed by a thread of its own through a bounded queue, so that whatever it does (raise, hang, find no
network) costs a warning and never a step. By default it writes to RUN/wandb only; `wandb sync` uploads that
later. Credentials come from W&B's own environment and files, never from the configuration.
"""

import contextlib
import copy
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from cluster.config.schema import TrackingConfig
from cluster.rundir.history import area, forget_stage, has_all, last_steps, remember_run
from cluster.rundir.lineage import Artefact
from cluster.runtime.health import Monitor
from cluster.runtime.repeating import repeating
from cluster.tracking.alerts import Alert, Alerts
from cluster.tracking.console import Console
from cluster.tracking.prometheus import Exporter, serving
from cluster.tracking.tensorboard import EventFiles, event_files
from cluster.tracking.wandb import (
    Record,
    WandbFeed,
    artefact_record,
    phases_record,
    samples_record,
    seconds_record,
    step_record,
)

log = logging.getLogger(__name__)
_TICK_S = 5.0


class Tracker:
    """Records the steps, phases and samples of one command in a run directory, from any thread."""

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        name: str,
        *,
        settings: Mapping[str, Any] | None = None,
        console: Console | None = None,
        run_id: str | None = None,
        monitor: Monitor | None = None,
        wandb: Any = None,
    ) -> None:
        """
        name: the command, e.g. "ppo", as W&B's job type; the commands of a run directory are a W&B group.
        settings: the resolved configuration, for W&B.
        console: where headlines and phases are shown.
        run_id: of the W&B run to go on with, which is not sent again what it has; None begins one.
        monitor: is told of the phases, and knows the processes that Prometheus is shown.
        wandb: stands in for the wandb module in tests.
        """
        self.run_dir = run_dir
        self._prefix = ""
        self.console = console or Console()
        self._monitor = monitor or Monitor()
        self._lock = threading.Lock()
        self._start: dict[str, Any] = {
            "project": config.project,
            "entity": config.entity,
            "group": run_dir.resolve().name,
            "job_type": name,
            "name": f"{run_dir.resolve().name} {name}",
            "tags": list(config.tags),
            "id": run_id or secrets.token_hex(4),
            "resume": "allow" if run_id else None,
            "dir": str(run_dir),
            "config": dict(settings or {}),
        }
        self._config = config
        self._goes_on = run_id is not None
        self._sent: dict[tuple[str, str], int] = {}
        self._wandb = None if config.mode == "disabled" else WandbFeed(config, self._start, wandb)
        self._alerts = Alerts(config.alerts, self._alert)
        self._counted: Callable[[str], None] = lambda kind: None
        self._closing = contextlib.ExitStack()
        self._axes: set[str] = set()
        self._phases: list[tuple[str, str, float]] = []
        self._events: EventFiles | None = None
        self._sinks: list[Callable[[str, int, Mapping[str, float]], None]] = [self.console.metrics, self._alerts.step]

    def part(self, name: str) -> Self:
        """The same in the subdirectory `name`; in W&B it is the same run, with `name`/ before everything."""
        part = copy.copy(self)
        part.run_dir, part._prefix = self.run_dir / name, f"{self._prefix}{name}/"
        part._sent = last_steps(part.run_dir) if self._goes_on else {}
        return part

    @property
    def run_id(self) -> str:
        """Of the W&B run."""
        return self._start["id"]

    def __enter__(self) -> Self:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._goes_on = self._goes_on and has_all(self.run_dir, self._start["job_type"])
        self._sent = last_steps(self.run_dir) if self._goes_on else {}
        if self._config.prometheus_port:
            exporter = Exporter(self.run_dir.name, self._monitor)
            where = self._config.prometheus_host, self._config.prometheus_port
            self._closing.enter_context(serving(exporter, *where))
            self._sinks.append(exporter.step)
            self._counted = exporter.alert
        if self._config.tensorboard:
            self._events = self._closing.enter_context(event_files(self.run_dir / "tensorboard"))
        self._closing.enter_context(repeating(self._alerts.tick, _TICK_S, "alerts"))
        if self._wandb is not None:
            remember_run(self.run_dir, self._start["job_type"], self.run_id, finished=False)
            self._wandb.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Let W&B finish, within its deadline, and say how to send what is not there."""
        self._closing.close()
        if self._wandb is not None:
            if self._phases:
                self._wandb.put(phases_record(self._phases))
            if command := self._wandb.close():
                self.console.line(f"To send this run to W&B: {command}")
            remember_run(self.run_dir, self._start["job_type"], self.run_id, finished=True)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step of a stage ("sft", "reward", "ppo", ...), by the name "area/name"."""
        values = {name: float(value) for name, value in metrics.items()}
        self._append("metrics.jsonl", {"stage": stage, "step": step, "time": time.time(), **values})
        for sink in self._sinks:
            with _harmless():
                sink(stage, step, values)
        if self._events is not None:
            with _harmless():
                self._events.step(self._prefix + stage, step, values)
        if new := {name: value for name, value in values.items() if self._is_new(stage, step, name)}:
            self._feed(step_record(self._prefix + stage, step, new, self._axes))

    @contextlib.contextmanager
    def phase(self, name: str, stage: str | None = None) -> Iterator[None]:
        """Show and record how long a phase takes, even if it fails; `stage` is what it belongs to."""
        started = time.monotonic()
        try:
            with self.console.phase(name), self._monitor.phase(name, stage or name):
                yield
        finally:
            seconds = time.monotonic() - started
            self._append("phases.jsonl", {"phase": name, "stage": stage or name, "seconds": seconds})
            self._phases.append((self._prefix + (stage or name), name, seconds))
            spent: dict[str, float] = {}
            for one, _, took in self._phases:
                spent[one] = spent.get(one, 0.0) + took
            self._feed(seconds_record(spent))

    def samples(
        self, stage: str, step: int, shown: Sequence[Mapping[str, Any]], distributions: Mapping[str, Sequence[float]]
    ) -> None:
        """Show held-out samples, rows with the same columns, and how figures of all of them are distributed."""
        if self._events is not None:
            with _harmless():
                self._events.samples(self._prefix + stage, step, shown, distributions)
        if self._is_new(stage, step, "heldout/samples"):
            self._feed(samples_record(self._prefix + stage, step, shown, distributions, self._axes))

    def artefact(self, made: Artefact, run_dir: Path) -> None:
        """Put something that was made, as it stands in the lineage of a run directory, into that of W&B."""
        self._feed(artefact_record(made, run_dir))

    def _alert(self, alert: Alert) -> None:
        self._append("alerts.jsonl", {"time": time.time(), **asdict(alert)})
        if alert.over:
            self.console.line(alert.text)
        else:
            self._counted(alert.kind)
            self.console.warning(alert.text)
        title = f"{self._start['name']}: {alert.kind}{' is over' if alert.over else ''}"
        self._feed(lambda wandb, run: run.alert(title, alert.text, "INFO" if alert.over else "WARN"))

    def alerting(self, kind: str, look: Callable[[], str | None]) -> contextlib.AbstractContextManager[None]:
        """While the block lasts, it is an alert whenever `look()` says what is wrong rather than None."""
        return self._alerts.looking(kind, look)

    def forget(self, stage: str) -> None:
        """Take a stage that starts over out of the JSONL files, whose readers would mix it with the new one."""
        self._sent = {key: step for key, step in self._sent.items() if key[0] != stage}
        with self._lock:
            forget_stage(self.run_dir, stage)

    def _append(self, file: str, row: Mapping[str, Any]) -> None:
        with self._lock, (self.run_dir / file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")

    def _is_new(self, stage: str, step: int, name: str) -> bool:
        """Whether W&B has not been sent it before a stop: else its curves would go back and forth."""
        return step > self._sent.get((stage, area(name)), -1)

    def _feed(self, item: Record) -> None:
        if self._wandb is not None:
            self._wandb.put(item)


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    """Nobody who watches may stop the run."""
    try:
        yield
    except Exception:
        log.exception("a step could not be shown")
