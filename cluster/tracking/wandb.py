"""A W&B run that is fed from a thread of its own: whatever W&B does, the run that feeds it goes on.

W&B may raise, hang or find no network: that costs a warning and never a step. By default it writes to RUN/wandb only;
`wandb sync` uploads that later. Credentials come from W&B's own environment and files, never from the configuration.
"""

import contextlib
import functools
import logging
import os
import queue
import re
import secrets
import shlex
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from cluster.config.schema import TrackingConfig
from cluster.rundir.history import remember_run
from cluster.rundir.lineage import Artefact, origin
from cluster.runtime.orphans import SPAWNING
from cluster.tracking.alerts import Alert

log = logging.getLogger(__name__)
_P = ParamSpec("_P")


def _fed(work: Callable[Concatenate["WandbFeed", _P], None]) -> Callable[Concatenate["WandbFeed", _P], None]:
    """A method that is called on the feed's thread, in order; left out and counted when W&B is too far behind."""

    @functools.wraps(work)
    def put(feed: "WandbFeed", *args: _P.args, **kwargs: _P.kwargs) -> None:
        feed.put(functools.partial(work, feed, *args, **kwargs))

    return put


class WandbFeed:
    """Does what it is told to a W&B run, on its own thread; counts and leaves out what fails."""

    def __init__(self, config: TrackingConfig, start: dict[str, Any], wandb: Any) -> None:
        """start: arguments of wandb.init. wandb: stands in for the module in tests."""
        self._config = config
        self._start = start
        self._wandb: Any = wandb
        self._run: Any = None
        self._axes: set[str] = set()
        self._seconds = defaultdict[str, float](float)
        self._items: queue.Queue[Callable[[], None] | None] = queue.Queue(config.queue_size)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._enabled = config.mode != "disabled"
        self._online = self._sent = self._warned = False
        self._lost = 0

    @property
    def id(self) -> str:
        """Of the W&B run."""
        return self._start["id"]

    def start(self, sent: Mapping[str, int]) -> None:
        """Start the thread, unless W&B is disabled; `sent`: how far the run is, by area of metrics."""
        if self._enabled:
            self._remember(sent)
            self._thread.start()

    def put(self, item: Callable[[], None]) -> None:
        """Have something called on the thread."""
        if self._enabled:
            try:
                self._items.put_nowait(item)
            except queue.Full:
                self._lost += 1
                self._warn(f"W&B is {self._items.maxsize} steps behind")

    def close(self, sent: Mapping[str, int]) -> str | None:
        """Let W&B finish, within its deadline, and warn of what the run has not got; `sent`: how far it then is.

        Returns the command that sends the run, or None where the server has it all.
        """
        if not self._enabled:
            return None
        deadline = time.monotonic() + self._config.close_deadline_s
        with contextlib.suppress(queue.Full):
            self._items.put(None, timeout=self._config.close_deadline_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if late := self._thread.is_alive():
            log.warning("W&B did not finish within %g s", self._config.close_deadline_s)
        if self._lost:
            log.warning("%d records are not in W&B; metrics.jsonl has every step", self._lost)
        self._remember(sent)
        if self._sent and not late:
            return None
        folders = f"{shlex.quote(self._start['dir'])}/wandb/*run-*-{self.id}"
        return f"wandb sync {'--include-online ' if self._online else ''}{folders}"

    @_fed
    def step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a step."""
        self._log(stage, step, values)

    @_fed
    def samples(
        self, stage: str, step: int, shown: Sequence[Mapping[str, Any]], distributions: Mapping[str, Sequence[float]]
    ) -> None:
        """Samples of a step as a table, and histograms of all of them. W&B keeps those of every step."""
        columns = list(shown[0]) if shown else []
        table = self._wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in shown])
        bars = {f"heldout/{name}_histogram": self._wandb.Histogram(values) for name, values in distributions.items()}
        self._log(stage, step, {"heldout/samples": table, **bars})

    @_fed
    def phase(self, stage: str, seconds: float) -> None:
        """Seconds of each stage so far, as the run's summary, a column to compare runs by."""
        self._seconds[stage] += seconds
        self._run.summary.update({f"seconds/{stage}": self._seconds[stage]})

    @_fed
    def alert(self, alert: Alert) -> None:
        """An alert, which W&B mails to whoever wants it."""
        title = f"{self._start['name']}: {alert.kind}{' is over' if alert.over else ''}"
        self._run.alert(title, alert.text, "INFO" if alert.over else "WARN")

    @_fed
    def artefact(self, made: Artefact, run_dir: Path) -> None:
        """A file or folder of a run with what it was made of, by reference: nothing is uploaded.

        What it was made of is given once more, as used: with the same content it is the same version in W&B, whoever
        gave it first and in whatever order offline runs are synced.
        """
        for one in made.inputs:
            if one.sha256:
                used = _reference(self._wandb, run_dir, one.path, one.sha256)
                # use_artifact does the same, but refuses to offline, and waits for the server online
                self._run._log_artifact(used, is_user_created=True, use_after_commit=True)
        self._run.log_artifact(_reference(self._wandb, run_dir, made.path, made.sha256))

    def _log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Each stage counts its own steps, so the stage's step is the axis of its metrics."""
        prefix = f"{stage}/"
        if stage not in self._axes:
            self._axes.add(stage)
            self._run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
        named = {prefix + name.removeprefix(prefix): value for name, value in values.items()}
        self._run.log({f"{prefix}step": step, **named})

    def _work(self) -> None:
        # Tables wait here to be sent, offline perhaps for long; W&B's own default is in the home directory.
        os.environ.setdefault("WANDB_DATA_DIR", str(Path(self._start["dir"], "wandb").resolve()))
        self._attempt("could not be started", self._init)
        while (item := self._items.get()) is not None:
            if self._run is None or not self._attempt("failed", item):
                self._lost += 1
        if self._run is not None:
            self._sent = self._attempt("could not finish", self._run.finish) and self._online

    def _attempt(self, failed: str, call: Callable[[], None]) -> bool:
        try:
            call()
        except BaseException as error:  # wandb raises SystemExit too
            self._warn(f"W&B {failed} ({_reason(error)})")
            return False
        return True

    def _init(self) -> None:
        if self._wandb is None:
            import wandb  # takes a second

            self._wandb = wandb
        with SPAWNING:  # W&B's own process must not be taken for one of Ray's
            self._wandb.setup(settings=self._settings())  # else it prints whose key it has found
            if self._config.mode == "online":
                try:
                    self._run = self._wandb.init(mode="online", settings=self._settings(), **self._start)
                    self._online = True
                    return
                except Exception as error:
                    self._warn(f"W&B is offline for this run ({_reason(error)})")
                    self._start["id"] = secrets.token_hex(4)  # the failed attempt may hold the old one
            self._run = self._wandb.init(mode="offline", settings=self._settings(), **self._start)

    def _settings(self) -> Any:
        """No output, no copies of the code or of what is printed, no waiting without end."""
        half = self._config.close_deadline_s / 2
        return self._wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            x_save_requirements=False,
            init_timeout=half,
            finish_timeout=half,
            finish_timeout_raises=True,
        )

    def _remember(self, sent: Mapping[str, int]) -> None:
        remember_run(Path(self._start["dir"]), self._start["job_type"], self.id, sent)

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s. The run goes on, with every step in metrics.jsonl", why)


def _reason(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _reference(wandb: Any, run_dir: Path, path: str, sha256: str) -> Any:
    """Named after the run in which it was made, and of the kind that is written down there; "input" where none is."""
    name, kind = path.strip("/") if path.startswith("/") else f"{run_dir.resolve().name}-{path}", "input"
    facts: dict[str, Any] = {}
    if found := origin(run_dir, path):
        folder, made = found
        name, kind = f"{folder.resolve().name}-{made.path}", made.kind
        if made.sha256 == sha256:
            inputs = [one.path for one in made.inputs]
            facts = {"command": made.command, "config": made.config, "commit": made.commit, "inputs": inputs}
    artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[-128:], type=kind, metadata=facts)
    # Named after their hash, files that were made anew are another version. They are not read once more.
    artifact.add_reference((run_dir / path).resolve().as_uri(), name=f"sha256-{sha256}", checksum=False)
    return artifact
