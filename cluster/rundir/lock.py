"""Who owns a run directory: RUN/owner.json, held by the one command that may work there, with a lease that it renews.

A dead owner is taken over: at once where its process can be looked up, else when its lease has run out, so that a
scheduler may start the run again on another machine.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Self, TextIO

from cluster.config.load import ConfigError
from cluster.runtime.health import repeating
from cluster.runtime.signals import end

FILE = "owner.json"
RENEW_S, LEASE_S = 5.0, 60.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The process that works in a run directory."""

    command: str
    pid: int
    host: str
    place: str
    """boot of the machine and space of process ids: where `pid` means this process"""
    started: str
    """when the process did, in ticks since the boot: ids are given again"""
    since: float
    """seconds since the epoch"""

    @classmethod
    def this(cls, command: str) -> Self:
        """This process, from now on."""
        pid = os.getpid()
        return cls(
            command=command,
            pid=pid,
            host=socket.gethostname(),
            place=_place(),
            started=_started(pid),
            since=time.time(),
        )

    @property
    def gone(self) -> bool | None:
        """Whether the process has ended; None where that cannot be seen."""
        return _started(self.pid) != self.started if self.place == _place() else None

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since).isoformat(" ", "seconds")
        return f"`rayward {self.command}`, PID {self.pid} on {self.host} since {since}"


@contextlib.contextmanager
def owned(run_dir: Path, command: str, renew_s: float = RENEW_S, lease_s: float = LEASE_S) -> Iterator[None]:
    """Own a run directory until the block ends. Raises ConfigError with whoever is at work there.

    An owner on another machine shows by renewing its lease that it lives, for which this waits `lease_s` at most. Who
    finds that somebody else has taken over, as when it stood still for longer than its lease, ends as failed.
    """
    file, me = run_dir / FILE, Owner.this(command)
    renewed: float | None = None
    while (other := _take(file, me, lease_s)) is not None:
        owner, seen = other
        if owner.gone is False or (renewed is not None and seen > renewed):
            raise ConfigError(_refusal(run_dir, owner))
        if renewed is None:
            log.warning("%s: %s was there; looking for at most %g s whether it lives", run_dir, owner, lease_s)
        renewed = seen
        time.sleep(renew_s / 5)

    lost: list[Owner] = []

    def renew() -> None:
        with contextlib.suppress(OSError), _open(file) as lease:  # a file server that is away for a moment
            if (now := _read(lease)) == me:
                os.utime(lease.fileno())
            elif now is None:  # somebody has removed it
                _write(lease, me)
            elif not lost:
                lost.append(now)
                end(f"{run_dir} has been taken over by {now}")

    try:
        with repeating(renew, renew_s, "lease"):
            yield
    finally:
        with contextlib.suppress(OSError), _open(file) as lease:
            if _read(lease) == me:
                file.unlink()


def at_work(run_dir: Path) -> str | None:
    """Why a command would be refused there, for all that can be seen without waiting; writes nothing."""
    with contextlib.suppress(OSError), (run_dir / FILE).open(encoding="utf-8") as lease:
        owner, age = _read(lease), time.time() - os.fstat(lease.fileno()).st_mtime
        if owner is not None and (owner.gone is False or (owner.gone is None and age < LEASE_S)):
            return _refusal(run_dir, owner)
    return None


def _refusal(run_dir: Path, owner: Owner) -> str:
    remedy = f"wait for it (rayward status {run_dir}), stop it, or name another --run DIR"
    return f"{run_dir} is at work: {owner}. Remedy: {remedy}"


def _take(file: Path, me: Owner, lease_s: float) -> tuple[Owner, float] | None:
    """Become the owner, unless another one may live: who that is, and when it renewed its lease last."""
    with _open(file) as lease:
        owner, seen = _read(lease), os.fstat(lease.fileno()).st_mtime
        if owner is not None and not owner.gone:
            with tempfile.TemporaryFile(dir=file.parent) as now:  # by the clock of the file server
                age = os.fstat(now.fileno()).st_mtime - seen
            if owner.gone is False or age < lease_s:
                return owner, seen
        if owner is not None:
            log.warning("%s is taken over from %s, which is gone", file.parent, owner)
        _write(lease, me)
    return None


@contextlib.contextmanager
def _open(file: Path) -> Iterator[TextIO]:
    """The file, which nobody else has open in here meanwhile."""
    while True:
        with file.open("a+", encoding="utf-8") as lease:
            with contextlib.suppress(OSError):  # without locks, two of the same instant find out when they renew
                fcntl.flock(lease, fcntl.LOCK_EX)
            if file.exists() and file.stat().st_ino == os.fstat(lease.fileno()).st_ino:  # else its owner has ended
                yield lease
                return


def _read(lease: TextIO) -> Owner | None:
    lease.seek(0)
    try:
        return Owner(**json.load(lease))
    except (ValueError, TypeError):
        return None


def _write(lease: TextIO, owner: Owner) -> None:
    lease.seek(0)
    lease.truncate()
    json.dump(asdict(owner), lease)


def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> str:
    """Empty for a process that has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]
