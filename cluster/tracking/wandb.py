"""A W&B run that is fed from a thread of its own: whatever W&B does, the run that feeds it goes on.

Each of the functions below makes something for that thread to do with the module and the run.
"""

import contextlib
import importlib
import logging
import os
import queue
import re
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.config.schema import TrackingConfig
from cluster.rundir.lineage import Artefact, origin
from cluster.runtime.orphans import SPAWNING

log = logging.getLogger(__name__)
Record = Callable[[Any, Any], None]
"""(wandb, run) -> done"""
_AGE = "staleness/age_"


class WandbFeed:
    """Does what is put into it to a W&B run, on its own thread; counts and leaves out what fails."""

    def __init__(self, config: TrackingConfig, start: dict[str, Any], wandb: Any) -> None:
        self._config = config
        self._start = start
        self._wandb = wandb
        self._items: queue.Queue[Record | None] = queue.Queue(config.queue_size)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._online = self._sent = False
        self._lost = 0
        self._warned = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, item: Record) -> None:
        """Have `item(wandb, run)` called on the thread, in order; left out and counted when W&B is too far behind."""
        try:
            self._items.put_nowait(item)
        except queue.Full:
            self._lose(f"W&B is {self._items.maxsize} steps behind")

    def close(self) -> str | None:
        """Let W&B finish, within its deadline, and warn of what the run has not got.

        Returns the command that sends the run, or None where the server has it all.
        """
        deadline = time.monotonic() + self._config.close_deadline_s
        with contextlib.suppress(queue.Full):
            self._items.put(None, timeout=self._config.close_deadline_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        late = self._thread.is_alive()
        if late:
            log.warning("W&B did not finish within %g s", self._config.close_deadline_s)
        if self._lost:
            log.warning("%d records are not in W&B; metrics.jsonl has every step", self._lost)
        if self._sent and not late:
            return None
        folders = f"{shlex.quote(self._start['dir'])}/wandb/*run-*-{self._start['id']}"
        return f"wandb sync {'--include-online ' if self._online else ''}{folders}"

    def _work(self) -> None:
        wandb, run = self._wandb, None
        # Tables wait here to be sent, offline perhaps for long; W&B's own default is in the home directory.
        os.environ.setdefault("WANDB_DATA_DIR", str(Path(self._start["dir"], "wandb").resolve()))
        try:
            wandb = wandb or importlib.import_module("wandb")
            with SPAWNING:  # W&B's own process must not be taken for one of Ray's
                run = self._init(wandb)
        except BaseException as error:  # wandb raises SystemExit too
            self._warn(f"W&B could not be started ({_reason(error)})")
        while (item := self._items.get()) is not None:
            if run is None:
                self._lost += 1
                continue
            try:
                item(wandb, run)
            except BaseException as error:
                self._lose(f"W&B failed ({_reason(error)})")
        if run is not None:
            try:
                run.finish()
                self._sent = self._online
            except BaseException as error:
                self._warn(f"W&B could not finish ({_reason(error)})")

    def _init(self, wandb: Any) -> Any:
        wandb.setup(settings=self._settings(wandb))  # else it prints whose key it has found
        modes = ("online", "offline") if self._config.mode == "online" else ("offline",)
        for mode in modes:
            try:
                run = wandb.init(mode=mode, settings=self._settings(wandb), **self._start)
                self._online = mode == "online"
                return run
            except Exception as error:
                if mode == "offline":
                    raise
                self._warn(f"W&B is offline for this run ({_reason(error)})")
                self._start["id"] = secrets.token_hex(4)  # the failed attempt may hold the old one

    def _settings(self, wandb: Any) -> Any:
        """No output, no copies of the code or of what is printed, no waiting without end."""
        return wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            x_save_requirements=False,
            init_timeout=self._config.close_deadline_s / 2,
            finish_timeout=self._config.close_deadline_s / 2,
            finish_timeout_raises=True,
        )

    def _lose(self, why: str) -> None:
        self._lost += 1
        self._warn(why)

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s. The run goes on, with every step in metrics.jsonl", why)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def step_record(stage: str, step: int, values: Mapping[str, Any], axes: set[str]) -> Record:
    """Metrics of a step. Each stage counts its own steps, so the stage's step is the axis of its metrics.

    axes: of the stages that have been given theirs already, which is added to.
    """

    def give(wandb: Any, run: Any) -> None:
        _axis(run, stage, axes)
        found = dict(values)
        if ages := {int(name.removeprefix(_AGE)): value for name, value in values.items() if name.startswith(_AGE)}:
            shares = [ages.get(age, 0.0) for age in range(max(ages) + 1)]
            edges = [age - 0.5 for age in range(len(shares) + 1)]
            found["staleness/ages"] = wandb.Histogram(np_histogram=(shares, edges))
        run.log({f"{stage}/step": step, **_named(stage, found)})

    return give


def samples_record(
    stage: str,
    step: int,
    shown: Sequence[Mapping[str, Any]],
    distributions: Mapping[str, Sequence[float]],
    axes: set[str],
) -> Record:
    """Samples of a step as a table, and histograms of all of them. W&B keeps those of every step."""

    def give(wandb: Any, run: Any) -> None:
        _axis(run, stage, axes)
        columns = list(shown[0]) if shown else []
        table = wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in shown])
        bars = {f"heldout/{name}_histogram": wandb.Histogram(values) for name, values in distributions.items()}
        run.log({f"{stage}/step": step, **_named(stage, {"heldout/samples": table, **bars})})

    return give


def seconds_record(spent: Mapping[str, float]) -> Record:
    """Seconds of each stage so far, as the run's summary: a column to compare runs by."""
    seconds = {f"seconds/{stage}": value for stage, value in spent.items()}
    return lambda wandb, run: run.summary.update(seconds)


def phases_record(rows: Sequence[tuple[str, str, float]]) -> Record:
    """A table of (stage, phase, seconds), with a bar for each."""

    def give(wandb: Any, run: Any) -> None:
        table = wandb.Table(columns=["stage", "phase", "seconds"], data=[list(row) for row in rows])
        run.log({"phases": wandb.plot.bar(table, "phase", "seconds", title="Seconds of each phase")})

    return give


def artefact_record(made: Artefact, run_dir: Path) -> Record:
    """A file or folder of a run with what it was made of, by reference: nothing is uploaded.

    What it was made of is given once more, as used: with the same content it is the same version in W&B, whoever gave
    it first and in whatever order offline runs are synced.
    """

    def give(wandb: Any, run: Any) -> None:
        for one in made.inputs:
            if one.sha256:
                used = _reference(wandb, run_dir, one.path, one.sha256)
                # use_artifact does the same, but refuses to offline, and waits for the server online
                run._log_artifact(used, is_user_created=True, use_after_commit=True)
        run.log_artifact(_reference(wandb, run_dir, made.path, made.sha256))

    return give


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


def _axis(run: Any, stage: str, axes: set[str]) -> None:
    if stage not in axes:
        axes.add(stage)
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")


def _named(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name if name.startswith(f"{stage}/") else f"{stage}/{name}": value for name, value in values.items()}
