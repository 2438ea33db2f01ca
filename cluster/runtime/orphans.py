"""Kill what a dead process leaves behind, and remove its files.

A process started with a mark in its environment hands the mark to everything it starts, also to children that
moved to a session of their own and so survive the kill of a process group. A watcher (this file run as a
script, a few MB, outside the marked family) waits for its parent to die and then kills every process with the
mark. Linux: reads /proc.
"""

import contextlib
import fcntl
import getpass
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

SESSION_MARK = "RAYWARD_SESSION"
"""Environment variable with the id of the Ray session that the process belongs to."""

ACTOR_MARK = "RAYWARD_ACTOR"
"""Environment variable with the id of the Ray actor that the process belongs to."""


_FOLDER = "rayward-"
_TRACKER_S = 2.0

SPAWNING = threading.Lock()
"""Held while this process's own environment carries a mark, by whoever starts processes that are to inherit it, and
by other threads while they start processes that are not."""


def marked(mark: str) -> list[int]:
    """Ids of the live processes whose environment holds `mark` ("NAME=value")."""
    wanted, found = mark.encode(), []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as file:
                if wanted in file.read().split(b"\0"):
                    found.append(int(entry))
        except OSError:
            continue  # it ended meanwhile, or is another user's
    return found


def kill_marked(mark: str, within_s: float) -> list[int]:
    """SIGKILL every process with `mark` but this one until none is left; the ids of those left in the end."""
    end = time.monotonic() + within_s
    while True:
        pids = [pid for pid in marked(mark) if pid != os.getpid()]
        if not pids or time.monotonic() > end:
            return pids
        for pid in pids:
            with contextlib.suppress(OSError):
                # It removes what the others leave in /dev/shm, and ends after them by itself.
                tracker = b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
                if not tracker or time.monotonic() > end - within_s + _TRACKER_S:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


@contextlib.contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """A folder of this process's own for temporary files, gone after the block; those of dead processes go now."""
    for old in parent.glob(f"{_FOLDER}*/lock"):
        with contextlib.suppress(OSError), old.open() as lock:  # another user's, or gone by now
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old.parent)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=parent))
    try:
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def temporary(folder: Path) -> dict[str, str]:
    """What to set in the environment for temporary files to go to `folder`, but for a cache that others use too."""
    cache = f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
    return {"TORCHINDUCTOR_CACHE_DIR": cache, **os.environ, "TMPDIR": str(folder)}


def watch(mark: str, folder: Path | None = None) -> subprocess.Popen[bytes]:
    """Start a watcher that kills every process with `mark`, and removes `folder`, once the calling process is dead."""
    # Isolated mode: neither this folder nor the user's packages get on the watcher's path.
    command = [sys.executable, "-I", "-S", __file__, mark, str(os.getpid()), *([str(folder)] if folder else [])]
    return subprocess.Popen(command, env={}, stdin=subprocess.DEVNULL, start_new_session=True)


def main() -> None:
    mark, parent = sys.argv[1], int(sys.argv[2])
    while os.getppid() == parent:
        time.sleep(0.25)
    kill_marked(mark, within_s=10.0)
    for folder in sys.argv[3:]:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
