"""A run's records: JSONL files that are complete, the console, and Weights & Biases as far as it keeps up."""

import contextlib
import copy
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from cluster.config.schema import TrackingConfig
from cluster.rundir.history import forget_stage, forget_steps, sent_steps
from cluster.rundir.lineage import Artefact
from cluster.runtime.health import Monitor, repeating
from cluster.tracking.alerts import Alert, Alerts
from cluster.tracking.console import Console
from cluster.tracking.prometheus import Exporter, serving
from cluster.tracking.wandb import WandbFeed
from learner.data.journal import Journal
from reward_server.redaction import shown

T = TypeVar("T")
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
        self.console = console or Console()
        self._name = name
        self._prefix = ""
        self._config = config
        self._monitor = monitor or Monitor()
        self._lock = threading.Lock()
        self._journals: dict[Path, Journal] = {}
        self._goes_on = run_id is not None
        self._before: dict[str, int] = {}
        """The last step of each area of metrics that W&B had before a stop."""
        self._sent: dict[str, int] = {}
        """The same as it is now; both are those of all parts."""
        start: dict[str, Any] = {
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
        self._wandb = WandbFeed(config, start, wandb)
        self._alerts = Alerts(config.alerts, self._alert, self._paused)
        self._exporter = Exporter(run_dir.name, self._monitor)
        self._events: Any = None
        self._sinks: list[Callable[[str, int, Mapping[str, float]], None]] = [
            *(self.console.metrics, self._alerts.step, self._exporter.step)
        ]
        self._closing = contextlib.ExitStack()

    def part(self, name: str) -> Self:
        """The same in the subdirectory `name`; in W&B it is the same run, with `name`/ before everything."""
        part = copy.copy(self)
        part.run_dir, part._prefix = self.run_dir / name, f"{self._prefix}{name}/"
        return part

    @property
    def run_id(self) -> str:
        """Of the W&B run."""
        return self._wandb.id

    def __enter__(self) -> Self:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self._goes_on:
            self._before.update(sent_steps(self.run_dir, self._name))
            self._sent.update(self._before)
        if port := self._config.prometheus_port:
            self._closing.enter_context(serving(self._exporter, self._config.prometheus_host, port))
        if self._config.tensorboard:
            self._events = self._closing.enter_context(_event_files(self.run_dir / "tensorboard"))
        self._closing.enter_context(repeating(self._alerts.tick, _TICK_S, "alerts"))
        self._wandb.start(self._before)
        return self

    def __exit__(self, *_: object) -> None:
        """Let W&B finish, within its deadline, and say how to send what is not there."""
        self._closing.close()
        if command := self._wandb.close(self._sent):
            self.console.line(f"To send this run to W&B: {command}")
        for journal in self._journals.values():
            journal.close()

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step of a stage ("sft", "reward", "ppo", ...), by the name "area/name"."""
        values = {name: float(value) for name, value in metrics.items()}
        self._append("metrics.jsonl", {"stage": stage, "step": step, "time": time.time(), **values})
        for sink in self._sinks:
            _harmless(sink, stage, step, values)
        for name, value in values.items() if self._events else ():
            _harmless(self._events.add_scalar, f"{self._prefix}{stage}/{name}", value, step)
        if new := {name: value for name, value in values.items() if self._is_new(stage, step, name)}:
            self._wandb.step(self._prefix + stage, step, new)

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
            self._wandb.phase(self._prefix + (stage or name), seconds)

    def samples(
        self, stage: str, step: int, shown: Sequence[Mapping[str, Any]], distributions: Mapping[str, Sequence[float]]
    ) -> None:
        """Show held-out samples, rows with the same columns, and how figures of all of them are distributed."""
        if self._is_new(stage, step, "heldout/samples"):
            self._wandb.samples(self._prefix + stage, step, shown, distributions)

    def artefact(self, made: Artefact, run_dir: Path) -> None:
        """Put something that was made, as it stands in the lineage of a run directory, into that of W&B."""
        self._wandb.artefact(made, run_dir)

    def forget(self, stage: str) -> None:
        """Take a stage that starts over out of the JSONL files, whose readers would mix it with the new one."""
        for sent in (self._before, self._sent):
            for area in [area for area in sent if area.startswith(f"{self._prefix}{stage} ")]:
                del sent[area]
        self._rewrite(lambda: forget_stage(self.run_dir, stage))

    def go_on(self, stage: str, done: int) -> bool:
        """Take the steps of a stage after `done`, which are done again, out of metrics.jsonl; whether there are any."""
        return self._rewrite(lambda: forget_steps(self.run_dir, stage, done))

    def _rewrite(self, change: Callable[[], T]) -> T:
        """Change the JSONL files, which nobody has open meanwhile, as soon as there is room for it."""
        with self._lock:
            for journal in self._journals.values():
                journal.close()
            return self._monitor.disk.written(change)

    def _paused(self) -> str | None:
        if (pause := self._monitor.paused) is None:
            return None
        since = datetime.fromtimestamp(pause.since).strftime("%H:%M:%S")
        why = "" if pause is self._monitor.disk.paused else ", as the reward service gives no scores"
        return f"the run has been paused since {since}{why}: {pause.reason}"

    def _alert(self, alert: Alert) -> None:
        alert = replace(alert, text=shown(alert.text))
        self._append("alerts.jsonl", {"time": time.time(), **asdict(alert)})
        if alert.over:
            self.console.line(alert.text)
        else:
            self._exporter.alert(alert.kind)
            self.console.warning(alert.text)
        self._wandb.alert(alert)

    def _append(self, file: str, row: Mapping[str, Any]) -> None:
        path = self.run_dir / file
        with self._lock:
            journal = self._journals.setdefault(path, Journal(path, self._monitor.disk))
        journal.append(row)

    def _is_new(self, stage: str, step: int, name: str) -> bool:
        """Whether W&B has not been sent it before a stop: else its curves would go back and forth."""
        area = f"{self._prefix}{stage} {name.rpartition('/')[0]}"  # what is logged together
        self._sent[area] = max(step, self._sent.get(area, step))
        return step > self._before.get(area, -1)


def _event_files(folder: Path) -> Any:
    """A SummaryWriter, to be entered; raises ValueError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"tracking.tensorboard is set, and TensorBoard cannot be imported ({error}). Remedy: install tensorboard"
        ) from error
    return SummaryWriter(str(folder), flush_secs=10)


def _harmless(show: Callable[..., None], *args: Any) -> None:
    """Nobody who watches may stop the run."""
    try:
        show(*args)
    except Exception:
        log.exception("a step could not be shown")
