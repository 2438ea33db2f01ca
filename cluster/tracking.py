"""A run's records: JSONL files that are complete, the console, and Weights & Biases as far as it keeps up.

W&B is fed by a thread of its own through a bounded queue, so that whatever it does (raise, hang, find no
network) costs a warning and never a step. By default it writes to RUN/wandb only; `wandb sync` uploads that
later. Credentials come from W&B's own environment and files, never from the configuration.
"""

import contextlib
import copy
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from cluster.alerts import Alert, Alerts
from cluster.config import TrackingConfig
from cluster.console import Console
from cluster.history import forget_stage, has_all, last_steps, remember_run
from cluster.prometheus import Exporter
from cluster.repeating import repeating
from cluster.wandb_feed import WandbFeed

log = logging.getLogger(__name__)
_TICK_S = 5.0


class Tracker:
    """Records the steps, phases, tables and pictures of one command in a run directory, from any thread."""

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        name: str,
        *,
        settings: Mapping[str, Any] | None = None,
        console: Console | None = None,
        run_id: str | None = None,
        wandb: Any = None,
    ) -> None:
        """
        name: the command, e.g. "ppo", as W&B's job type; the commands of a run directory are a W&B group.
        settings: the resolved configuration, for W&B.
        console: where headlines and phases are shown.
        run_id: of the W&B run to go on with, which is not sent again what it has; None begins one.
        wandb: stands in for the wandb module in tests.
        """
        self.run_dir = run_dir
        self._prefix = ""
        self.console = console or Console()
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
        self._known = run_id is not None and has_all(run_dir, name)
        self._sent = last_steps(run_dir) if self._known else {}
        self._wandb = None if config.mode == "disabled" else WandbFeed(config, self._start, wandb)
        self._alerts = Alerts(config.alerts, self._alert)
        self._closing = contextlib.ExitStack()
        self._sinks: list[Callable[[str, int, Mapping[str, float]], None]] = [self.console.metrics, self._alerts.step]

    def part(self, name: str) -> Self:
        """The same in the subdirectory `name`; in W&B it is the same run, with `name`/ before everything."""
        part = copy.copy(self)
        part.run_dir, part._prefix = self.run_dir / name, f"{self._prefix}{name}/"
        part._sent = last_steps(part.run_dir) if self._known else {}
        return part

    @property
    def run_id(self) -> str:
        """Of the W&B run."""
        return self._start["id"]

    def __enter__(self) -> Self:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self._config.prometheus_port:
            exporter = Exporter(self.run_dir.name, self._config.prometheus_host, self._config.prometheus_port)
            self._closing.callback(exporter.close)
            self._sinks.append(exporter.step)
        if self._config.tensorboard:
            self._sinks.append(self._closing.enter_context(_tensorboard(self.run_dir / "tensorboard")))
        self._closing.enter_context(repeating(self._alerts.tick, _TICK_S, "alerts"))
        if self._wandb is not None:
            remember_run(self.run_dir, self._start["job_type"], self.run_id, finished=False)
            self._wandb.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let W&B finish, within its deadline."""
        self._closing.close()
        if self._wandb is not None:
            self._wandb.close()
            remember_run(self.run_dir, self._start["job_type"], self.run_id, finished=True)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step of a stage ("sft", "reward", "ppo", ...), by the name "area/name"."""
        values = {name: float(value) for name, value in metrics.items()}
        self._append("metrics.jsonl", {"stage": stage, "step": step, "time": time.time(), **values})
        for sink in self._sinks:
            try:
                sink(stage, step, values)
            except Exception:  # nobody who watches may stop the run
                log.exception("a step could not be shown")
        if step > self._sent.get(stage, -1):  # else its curves would go back and forth
            self._feed(lambda wandb, run: _log_step(run, self._prefix + stage, step, values))

    @contextlib.contextmanager
    def phase(self, name: str, stage: str | None = None) -> Iterator[None]:
        """Show and record how long a phase takes, even if it fails; `stage` is what it belongs to."""
        started = time.monotonic()
        try:
            with self.console.phase(name):
                yield
        finally:
            seconds = time.monotonic() - started
            self._append("phases.jsonl", {"phase": name, "stage": stage or name, "seconds": seconds})
            self._feed(lambda wandb, run: run.log({f"{self._prefix}phase/{name}": seconds}))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show rows of plain values, which have the same columns, as a table in W&B."""
        columns = list(rows[0]) if rows else []
        cells = [[row[column] for column in columns] for row in rows]
        self._feed(lambda wandb, run: run.log({self._prefix + name: wandb.Table(columns=columns, data=cells)}))

    def artefact(
        self, name: str, kind: str, path: Path, inputs: Sequence[str], facts: Mapping[str, str | None]
    ) -> None:
        """Put a file or folder into W&B's lineage, by reference: nothing is uploaded.

        `name` and `inputs` are paths relative to the run directory; what was not made in it is left out.
        """

        def log_it(wandb: Any, run: Any) -> None:
            artifact = wandb.Artifact(self._artefact(name), type=kind, metadata={**facts, "inputs": list(inputs)})
            artifact.add_reference(path.resolve().as_uri(), checksum=False)
            for one in inputs if self._config.mode == "online" else ():  # W&B has to be asked which version it is
                if not one.startswith("/") and (self.run_dir / one).exists():
                    run.use_artifact(f"{self._artefact(one)}:latest")
            run.log_artifact(artifact)

        self._feed(log_it)

    def _artefact(self, name: str) -> str:
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{self._start['group']}-{name}")

    def image(self, name: str, path: Path) -> None:
        """Show a picture file in W&B."""
        self._feed(lambda wandb, run: run.log({self._prefix + name: wandb.Image(str(path))}))

    def _alert(self, alert: Alert) -> None:
        self._append("alerts.jsonl", {"time": time.time(), "kind": alert.kind, "text": alert.text})
        self.console.warning(alert.text)
        self._feed(lambda wandb, run: run.alert(title=f"{self._start['name']}: {alert.kind}", text=alert.text))

    def forget(self, stage: str) -> None:
        """Take a stage that starts over out of the JSONL files, whose readers would mix it with the new one."""
        self._sent.pop(stage, None)
        with self._lock:
            forget_stage(self.run_dir, stage)

    def _append(self, file: str, row: Mapping[str, Any]) -> None:
        with self._lock, (self.run_dir / file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")

    def _feed(self, item: Callable[[Any, Any], None]) -> None:
        if self._wandb is not None:
            self._wandb.put(item)


@contextlib.contextmanager
def _tensorboard(folder: Path) -> Iterator[Callable[[str, int, Mapping[str, float]], None]]:
    """Write event files; raises ValueError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"tracking.tensorboard is set, and TensorBoard cannot be imported ({error}). Remedy: install tensorboard"
        ) from error
    writer = SummaryWriter(str(folder), flush_secs=10)

    def step(stage: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(f"{stage}/{name}", value, step)

    try:
        yield step
    finally:
        writer.close()


def _log_step(run: Any, stage: str, step: int, values: Mapping[str, float]) -> None:
    """Each stage counts its own steps, so the stage's step is the axis of its metrics."""
    prefix = stage + "/"
    run.define_metric(prefix + "*", step_metric=prefix + "step")
    named = {name if name.startswith(prefix) else prefix + name: value for name, value in values.items()}
    run.log({prefix + "step": step, **named})
