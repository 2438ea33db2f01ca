"""A Ray session: a quiet local Ray that leaves nothing behind, or a connection to a running cluster."""

import contextlib
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.ray_constants
import ray._private.utils
import ray._private.worker

from cluster.runtime.health import repeating
from cluster.runtime.orphans import SESSION_MARK, SPAWNING, kill_marked, marked, own_folder, temporary, watch
from cluster.runtime.resources import OBJECT_STORE, session_parent
from cluster.runtime.signals import Stopped, attach, end, unbroken
from reward_server.redaction import LOG_FORMAT, Formatter

_SHUTDOWN_S = 10.0
_WATCH_S = 0.5
_GCS_AWAY_S = 45.0  # a cluster may start its GCS again; after a minute Ray ends its drivers without a word
_NAMES = {"raylet": "raylet", "gcs_server": "GCS"}
_SPAWNING_S = 30.0  # a thread that hangs while it starts a process must not keep Ray from starting
_TOKEN = Path(".ray") / "auth_token"  # in the home directory


@contextlib.contextmanager
def start_ray(address: str | None = None, *, cpus: int, log_dir: Path, deadline_s: float = 60.0) -> Iterator[None]:
    """Connect to `address` (else RAY_ADDRESS), or start a Ray of `cpus` logical CPUs here (else, or "local").

    Nothing of Ray is printed: its messages go to log_dir/ray.log. Token authentication is as Ray sets it. On the way
    out, however that comes, a local Ray is gone with everything it started and wrote, but for its logs, in log_dir/ray.
    When its raylet or its GCS is lost, the command ends and says so. Enter it on a thread that outlives the session:
    the kernel ends a local Ray with the thread that started it.

    `deadline_s` is for the cluster to answer; a local start has Ray's own bound, half a minute.

    Raises: RuntimeError when this process has a Ray session already, or a local Ray does not start, or is lost;
    ConnectionError when no cluster answers.
    """
    if ray.is_initialized():
        raise RuntimeError("this process has a Ray session already: leave it before starting another")
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    log_dir.mkdir(parents=True, exist_ok=True)
    with _messages_to(log_dir / "ray.log"), contextlib.ExitStack() as stack:
        mark, folder, watcher, lost = f"{SESSION_MARK}={secrets.token_hex(8)}", None, None, ""
        if address == "local":
            folder = stack.enter_context(own_folder(session_parent()))
            watcher = watch(mark, folder)
        try:
            if folder:
                _start(cpus, mark, folder)
            else:
                _connect(address, deadline_s)
            attach()  # Ray's core prints a stack at SIGTERM
            daemons = _Daemons()
            try:
                with repeating(daemons.look, _WATCH_S, "watch Ray"):
                    yield
            except Exception as error:
                daemons.look()  # it may have failed for want of Ray
                if daemons.lost:
                    raise RuntimeError(f"stopped by {daemons.lost}") from error
                raise
            finally:
                lost = daemons.lost
        finally:
            with unbroken():
                ray.shutdown()
                if folder and watcher:
                    _sweep(mark, at_once=bool(lost))
                    with contextlib.suppress(OSError):  # a full disk
                        shutil.copytree(folder / "session_latest" / "logs", log_dir / "ray", dirs_exist_ok=True)
                    watcher.kill()
                    watcher.wait()


class _Daemons:
    """Ray's own processes, without which nothing goes on: the raylet of this machine, and the GCS."""

    def __init__(self) -> None:
        self.lost = ""
        """Which of them is gone, once one is."""
        self._node: Any = ray._private.worker._global_node
        self._local = bool(self._node.all_processes)
        socket_name, found = self._node.raylet_socket_name, psutil.process_iter(["name", "cmdline"])
        named = [one for one in found if not self._local and one.info["name"] == "raylet"]
        self._raylets = [one for one in named if any(socket_name in word for word in one.info["cmdline"] or ())]
        self._heard = time.monotonic()

    def look(self) -> None:
        """End the command when one is gone. To be called again and again, on a thread of its own."""
        if not self.lost and (gone := self._of_this_machine() if self._local else self._of_a_cluster()):
            self.lost = f"the loss of Ray's {gone}"
            end(self.lost)

    def _of_this_machine(self) -> str:
        codes = {name: process.returncode for name, process in self._node.dead_processes()}
        how = {name: f"signal {-code}" if code < 0 else f"exit code {code}" for name, code in codes.items()}
        return next((f"{_NAMES[name]} ({how[name]})" for name in _NAMES if name in how), "")

    def _of_a_cluster(self) -> str:
        if not all(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in self._raylets):
            return "raylet on this machine"
        host, _, port = self._node.gcs_address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
            self._heard = time.monotonic()
        except OSError as error:
            if time.monotonic() - self._heard > _GCS_AWAY_S:
                return f"GCS, which has not answered for {_GCS_AWAY_S:.0f} s ({error})"
        return ""


def _start(cpus: int, mark: str, folder: Path) -> None:
    before = os.environ.copy()
    # Ray's processes inherit the mark; what other threads start meanwhile, or this process later, must not.
    alone = SPAWNING.acquire(timeout=_SPAWNING_S)
    token = Path.home() / _TOKEN
    makes_token = not token.exists()
    os.environ.update(temporary(folder) | dict([mark.split("=")]))
    constants: Any = ray._private.ray_constants
    constants.ENABLE_RAY_CLUSTER = False  # else Ray takes an address that others reach for 127.0.0.1, and listens there
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            object_store_memory=OBJECT_STORE,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder),
            log_to_driver=False,
            logging_format=LOG_FORMAT,
            # Our actors never run in a prestarted worker, as each has an environment of its own.
            _system_config={"prestart_worker_first_driver": False},
        )
    except Stopped:
        raise
    except (Exception, SystemExit) as error:
        raise RuntimeError(f"Ray did not start on this machine: {error}") from error
    finally:
        constants.ENABLE_RAY_CLUSTER = True
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
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
    except Stopped:
        raise
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


def _sweep(mark: str, at_once: bool) -> None:
    """Wait for the session's processes to end by themselves, unless `at_once`, and kill what has not."""
    deadline = time.monotonic() + (0.0 if at_once else _SHUTDOWN_S / 2)
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left := kill_marked(mark, within_s=_SHUTDOWN_S / 2):
        raise TimeoutError(f"processes {left} of the Ray session did not end within {_SHUTDOWN_S:.0f} s of SIGKILL")


# Ray would have its own handler of SIGTERM while it starts.
ray._private.utils.set_sigterm_handler = lambda handler: None


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
