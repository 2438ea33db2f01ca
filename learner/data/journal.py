"""Files of JSON lines that a run appends to, and what it does while their disk is full: it waits, and loses none."""

import asyncio
import contextlib
import errno
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from reward_server.preferences.records import NotWritten, no_room, writing
from reward_server.schema import Pause

T = TypeVar("T")
_BLOCK = 2**16
_APPENDING = threading.Lock()  # half of a line that another thread is writing must not be taken for a killed writer's
log = logging.getLogger(__name__)


class Disk:
    """Whether there is room for what a run writes. While there is not, the run is paused: nothing new is begun.

    What could not be written is tried again every `retry_s` seconds. After `pause_s` seconds the run stops.
    """

    def __init__(self, pause_s: float = 3600.0, retry_s: float = 1.0) -> None:
        self.pause_s = pause_s
        self.retry_s = retry_s
        self.paused: Pause | None = None
        """Since when and why; None while there is room."""
        self._lock = threading.Lock()
        self._waiting = set[object]()
        self._pauses_s = self._began = 0.0

    @property
    def paused_s(self) -> float:
        """Seconds of all pauses so far."""
        return self._pauses_s + (time.monotonic() - self._began if self.paused else 0.0)

    async def ready(self) -> None:
        """Return at once, or when there is room again. Raises NotWritten when there is none for too long."""
        while self.paused:
            self._check()
            await asyncio.sleep(self.retry_s / 2)

    async def saved(self, save: Callable[[], Awaitable[T]]) -> T:
        """What `save` returns, which is called again while there is no room. Raises as it does."""
        while True:
            with self._trying(save):
                return await save()
            await asyncio.sleep(self.retry_s)

    def written(self, write: Callable[[], T]) -> T:
        """The same of a call that the whole process waits for: a small file, where nothing else is under way."""
        while True:
            with self._trying(write):
                return write()
            time.sleep(self.retry_s)

    def lacks_room(self, holder: object, error: Exception) -> None:
        """Somebody has something to write for which there is no room. A journal is asked again."""
        with self._lock:
            self._waiting.add(holder)
            if self.paused is not None:
                return
            self.paused, self._began = Pause(since=time.time(), reason=str(error)), time.monotonic()
            threading.Thread(target=self._retry, name="disk", daemon=True).start()
        log.warning("paused: %s. It is tried again for %g s, and nothing new is begun meanwhile", error, self.pause_s)

    def has_room(self, holder: object) -> None:
        """Somebody has nothing left to write."""
        with self._lock:
            self._waiting.discard(holder)
            if self.paused is None or self._waiting:
                return
            seconds = time.monotonic() - self._began
            self._pauses_s += seconds
            self.paused = None
        log.warning("there is room on the disk again, and the pause is over after %.0f s", seconds)

    @contextlib.contextmanager
    def _trying(self, holder: object) -> Iterator[None]:
        """Go on after it where there was no room, and the run may still wait for it."""
        try:
            yield
        except Exception as error:
            if no_room(error):
                self.lacks_room(holder, error)
                self._check()
                return
            self.has_room(holder)
            raise
        self.has_room(holder)

    def _check(self) -> None:
        pause, seconds = self.paused, time.monotonic() - self._began
        if pause is not None and seconds > self.pause_s:
            text = f"{pause.reason}. There was no room for {seconds:.0f} s; with it, --resume goes on"
            raise NotWritten(errno.ENOSPC, text)

    def _retry(self) -> None:
        while self.paused:
            time.sleep(self.retry_s)
            for holder in self._waiting.copy():
                if isinstance(holder, Journal):
                    with contextlib.suppress(NotWritten):  # for another reason now, which its next line tells
                        holder.flush()


class Journal:
    """A file of JSON lines that grows by whole ones, from any thread. Those without room wait in memory, in order."""

    def __init__(self, path: Path, disk: Disk | None = None) -> None:
        """`disk` is that of the run."""
        self.path = path
        self._disk = disk or Disk()
        self._lock = threading.Lock()
        self._lines = deque[bytes]()
        self._file: FileIO | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a line. Raises NotWritten for anything but a full disk."""
        with self._lock:
            self._lines.append(json.dumps(row).encode() + b"\n")
        self.flush()

    def flush(self) -> bool:
        """Write the lines that wait; whether none is left. Raises NotWritten for anything but a full disk."""
        with self._lock:
            try:
                with writing(self.path):
                    self._file = self._file or _open(self.path)
                    while self._lines:
                        _append(self._file, self._lines[0])
                        self._lines.popleft()
            except NotWritten as error:
                if not no_room(error):
                    raise
                self._disk.lacks_room(self, error)
                return False
            self._disk.has_room(self)
            return True

    def sync(self) -> None:
        """Have what was written survive a loss of power. Raises NotWritten, on a full disk too."""
        if not self.flush():
            raise NotWritten(errno.ENOSPC, f"{self.path} has lines without room. Remedy: make room on its disk")
        with self._lock, writing(self.path):
            if self._file is not None:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a later line opens it again."""
        if self._lines and not self.flush():
            log.error("%d lines of %s are not written, as there is no room", len(self._lines), self.path)
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line to a file that is not kept open, from any thread. Raises NotWritten, on a full disk too."""
    with _APPENDING, writing(path), contextlib.closing(_open(path)) as file:
        _append(file, json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _open(path: Path) -> FileIO:
    """Open a file to append to; the rest of a line whose writer was killed is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = FileIO(path, "ab+")
    end = size = file.seek(0, os.SEEK_END)
    whole = 0
    while end and not whole:
        start = max(0, end - _BLOCK)
        file.seek(start)
        if (at := file.read(end - start).rfind(b"\n")) >= 0:
            whole = start + at + 1
        end = start
    if whole < size:
        file.truncate(whole)
    return file


def _append(file: FileIO, line: bytes) -> None:
    """All of a line or, after an error, nothing."""
    size = file.seek(0, os.SEEK_END)
    try:
        while line:
            line = line[file.write(line) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise
