"""A W&B run that is fed from a thread of its own: whatever W&B does, the run that feeds it goes on."""

import contextlib
import importlib
import logging
import os
import queue
import secrets
import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.config.schema import TrackingConfig
from cluster.runtime.orphans import SPAWNING

log = logging.getLogger(__name__)


class WandbFeed:
    """Does what is put into it to a W&B run, on its own thread; counts and leaves out what fails."""

    def __init__(self, config: TrackingConfig, start: dict[str, Any], wandb: Any) -> None:
        self._config = config
        self._start = start
        self._wandb = wandb
        self._items: queue.Queue[Callable[[Any, Any], None] | None] = queue.Queue(config.queue_size)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._online = self._sent = False
        self._lost = 0
        self._warned = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, item: Callable[[Any, Any], None]) -> None:
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
