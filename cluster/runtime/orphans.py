"""Kill what a dead process leaves behind.

A process started with a mark in its environment hands the mark to everything it starts, also to children that
moved to a session of their own and so survive the kill of a process group. A watcher (this file run as a
script, a few MB, outside the marked family) waits for its parent to die and then kills every process with the
mark. Linux: reads /proc.
"""

import os
import signal
import subprocess
import sys
import threading
import time

SESSION_MARK = "RAYWARD_SESSION"
"""Environment variable with the id of the Ray session that the process belongs to."""

ACTOR_MARK = "RAYWARD_ACTOR"
"""Environment variable with the id of the Ray actor that the process belongs to."""


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
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        time.sleep(0.05)


def watch(mark: str) -> subprocess.Popen[bytes]:
    """Start a watcher that kills every process with `mark` once the calling process is dead."""
    # Isolated mode: neither this folder nor the user's packages get on the watcher's path.
    command = [sys.executable, "-I", "-S", __file__, mark, str(os.getpid())]
    return subprocess.Popen(command, env={}, stdin=subprocess.DEVNULL, start_new_session=True)


def main() -> None:
    mark, parent = sys.argv[1], int(sys.argv[2])
    while os.getppid() == parent:
        time.sleep(0.25)
    kill_marked(mark, within_s=10.0)


if __name__ == "__main__":
    main()
