"""A Ray session: a quiet local Ray that leaves nothing behind, or a connection to a running cluster."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray._private.worker

from cluster.runtime.orphans import SESSION_MARK, SPAWNING, kill_marked, marked, watch
from reward_server.redaction import LOG_FORMAT, Formatter

_OBJECT_STORE = 256 * 2**20  # bytes, of a local Ray: batches of tokens pass through it, weights do not
_SHUTDOWN_S = 10.0
_SPAWNING_S = 30.0  # a thread that hangs while it starts a process must not keep Ray from starting
_TOKEN = Path(".ray") / "auth_token"  # in the home directory


@contextlib.contextmanager
def start_ray(address: str | None = None, *, cpus: int, log_dir: Path, deadline_s: float = 60.0) -> Iterator[None]:
    """Connect to `address` (else RAY_ADDRESS), or start a Ray of `cpus` logical CPUs here (else, or "local").

    Nothing of Ray is printed: its messages go to log_dir/ray.log. Token authentication is as Ray sets it. On
    the way out, also by Ctrl-C or SIGTERM, a local Ray and everything it started is gone. Enter it on a
    thread that outlives the session: the kernel ends a local Ray with the thread that started it.

    `deadline_s` is for the cluster to answer; a local start has Ray's own bound, half a minute.

    Raises: RuntimeError when this process has a Ray session already, or a local Ray does not start;
    ConnectionError when no cluster answers.
    """
    if ray.is_initialized():
        raise RuntimeError("this process has a Ray session already: leave it before starting another")
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    log_dir.mkdir(parents=True, exist_ok=True)
    with _messages_to(log_dir / "ray.log"), _sigterm_raises() as attach:
        mark = f"{SESSION_MARK}={secrets.token_hex(8)}"
        watcher = watch(mark) if address == "local" else None
        try:
            if watcher:
                _start(cpus, mark)
            else:
                _connect(address, deadline_s)
            attach()  # Ray has put its own in the place of the handler
            yield
        finally:
            with _uninterrupted():
                ray.shutdown()
                if watcher is not None:
                    _sweep(mark)
                    watcher.kill()
                    watcher.wait()


def _start(cpus: int, mark: str) -> None:
    name, value = mark.split("=")
    # Ray's processes inherit the mark; what other threads start meanwhile, or this process later, must not.
    alone = SPAWNING.acquire(timeout=_SPAWNING_S)
    token = Path.home() / _TOKEN
    makes_token = not token.exists()
    os.environ[name] = value
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            object_store_memory=_OBJECT_STORE,
            include_dashboard=False,
            log_to_driver=False,
            logging_format=LOG_FORMAT,
            # Our actors never run in a prestarted worker, as each has an environment of its own.
            _system_config={"prestart_worker_first_driver": False},
        )
    except (Exception, SystemExit) as error:
        raise RuntimeError(f"Ray did not start on this machine: {error}") from error
    finally:
        del os.environ[name]
        if alone:
            SPAWNING.release()
        if makes_token and token.is_file():
            token.chmod(0o600)  # Ray makes it readable for everybody


def _connect(address: str, deadline_s: float) -> None:
    if "://" in address:
        raise ConnectionError(
            f"cannot connect to {address}: Ray Client is not supported. Give host:port of a cluster that "
            "this machine belongs to, or submit the command to the cluster with `ray job submit`"
        )
    if address != "auto":
        _probe(address, deadline_s)  # Ray itself takes two minutes to give up
    try:
        ray.init(address=address, log_to_driver=False, logging_format=LOG_FORMAT)
    except (Exception, SystemExit) as error:  # Ray's core ends the process where it cannot connect
        raise ConnectionError(
            f"cannot connect to the Ray cluster at {address}: {error}. For a cluster with token "
            "authentication set RAY_AUTH_MODE=token here and have the cluster's token in ~/.ray/auth_token "
            "or RAY_AUTH_TOKEN"
        ) from error


def _probe(address: str, deadline_s: float) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConnectionError(f"cannot connect to a Ray cluster at {address!r}: give host:port, auto or local")
    try:
        socket.create_connection((host, int(port)), timeout=deadline_s).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({error}): start one with `ray start --head`, correct the "
            "address (or RAY_ADDRESS), or give the address 'local'"
        ) from error


def _sweep(mark: str) -> None:
    """Wait for the session's processes to end by themselves, and kill what has not."""
    end = time.monotonic() + _SHUTDOWN_S / 2
    while marked(mark) and time.monotonic() < end:
        time.sleep(0.1)
    if left := kill_marked(mark, within_s=_SHUTDOWN_S / 2):
        raise TimeoutError(f"processes {left} of the Ray session did not end within {_SHUTDOWN_S:.0f} s of SIGKILL")


class _ToRoot(logging.Handler):
    """Hands records on to the root logger, where the console of a run shows errors; Ray's logger does not."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger().handle(record)


@contextlib.contextmanager
def _messages_to(path: Path) -> Iterator[None]:
    """Write what Ray logs, and what its daemons have it print, to a file; its errors go on to the root logger too."""
    logger = logging.getLogger("ray")
    file, console = logging.FileHandler(path), _ToRoot(logging.ERROR)
    file.setFormatter(Formatter(LOG_FORMAT))
    worker: Any = ray._private.worker
    before = logger.handlers, logger.level, worker.print_to_stdstream
    logger.handlers = [file, console]
    # Ray has no setting for the news of its daemons ("a worker died"); the handles report a death themselves.
    worker.print_to_stdstream = lambda data, ignore_prefix: logger.info("%s", "\n".join(data["lines"]))
    try:
        yield
    finally:
        logger.handlers, level, worker.print_to_stdstream = before
        logger.setLevel(level)
        file.close()


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[Callable[[], object]]:
    """SIGTERM ends the block by SystemExit, unless the program has a handler; yields what sets it (once more)."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.getsignal(signal.SIGTERM)

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    attach = partial(signal.signal, signal.SIGTERM, leave if before is signal.SIG_DFL else before)
    attach()
    try:
        yield attach
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM: a second one must not leave half of a session behind."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
