"""The append-only log of all that people do on the page, and the state that its events make.

It is JSON lines, each on the disk before it is acknowledged.
"""

import asyncio
import errno
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from reward_server.labeling.items import Answer, Assignment, Item
from reward_server.preferences.records import NotWritten, RecordError, writing
from reward_server.preferences.sheets import dense

FILE = "log.jsonl"
SAVE_S = 30.0
"""Seconds that a disk has to take what is written."""
Event = Mapping[str, Any]
_log = logging.getLogger(__name__)


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a log, also while somebody writes it: a last line that is not whole does not count yet.

    Raises RecordError (file:line, reason, remedy) for a line that is no event, or not the next one.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise RecordError(f"{path} is not there: nobody has labelled anything yet. Remedy: `rayward label`") from error
    return _events(path, data)[0]


class Log:
    """The one writer of a log. A thread writes what has been appended meanwhile at once, and has it saved once."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Open or make the log. Raises ValueError where another process has it open, RecordError as `read_events`.

        A last line whose writer was killed is cut off: it was never acknowledged.
        """
        self.path = path
        self._clock = clock
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self.events = self._opened()
        except BaseException:
            os.close(self._file)
            raise
        self._count = len(self.events)
        self._changed = threading.Condition()
        self._lines: list[bytes] = []
        self._saved = _promise()
        self._saved.set_result(None)
        self._failed: NotWritten | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._write, name="labeling-log", daemon=True)
        self._thread.start()

    def append(self, event: Event) -> dict[str, Any]:
        """The event with its number and time; it counts once `saved` has returned. Raises NotWritten after a failure.

        From any thread.
        """
        with self._changed:
            self._check()
            whole = {"n": self._count, "time": round(self._clock(), 3), **event}
            line = json.dumps(whole, ensure_ascii=False, allow_nan=False).encode() + b"\n"
            if not self._lines:
                self._saved = _promise()
            self._lines.append(line)
            self._count += 1
            self._changed.notify()
            return whole

    async def saved(self) -> None:
        """Wait until all that was appended so far is on the disk. Raises NotWritten: nothing is taken from then on."""
        with self._changed:
            self._check()
            promise = self._saved
        try:
            await asyncio.wait_for(asyncio.wrap_future(promise), SAVE_S)
        except TimeoutError as error:
            failure = NotWritten(errno.EIO, f"{self.path} was not written in {SAVE_S:g} s. Remedy: see to its disk")
            self._fail(failure)
            raise failure from error

    def close(self) -> None:
        """Write what was appended, and let others open the log."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify()
        self._thread.join(SAVE_S)
        os.close(self._file)

    def _opened(self) -> list[dict[str, Any]]:
        os.fchmod(self._file, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self.path} is open in another process, which serves the page: end that one, or wait for it"
            ) from error
        data = self.path.read_bytes()
        events, whole = _events(self.path, data)
        if whole < len(data):
            _log.warning("%s: cut off %d bytes of a line that was not complete", self.path, len(data) - whole)
            os.ftruncate(self._file, whole)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the file's name may not survive a loss of power
        finally:
            os.close(folder)
        os.fsync(self._file)  # what was read may be in the memory of the system only, from a process that was killed
        return events

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closed)
                lines, promise = self._lines, self._saved
                self._lines = []
            if not lines:
                return
            try:
                with writing(self.path):
                    _write_all(self._file, lines)
                    os.fsync(self._file)
            except NotWritten as error:
                self._fail(error)
                promise.set_exception(error)
                return
            promise.set_result(None)

    def _fail(self, error: NotWritten) -> None:
        _log.error("nothing more is taken: %s", error)
        with self._changed:
            self._failed = self._failed or error
            if self._lines:
                self._lines = []
                self._saved.set_exception(error)

    def _check(self) -> None:
        if self._failed is not None:
            raise NotWritten(*self._failed.args)
        if self._closed:
            raise NotWritten(errno.EBADF, f"{self.path} is closed, as the page is no longer served")


class State:
    """All items and assignments, as the events up to now have made them. Only `apply` changes it."""

    def __init__(self) -> None:
        self.items: dict[str, Item] = {}
        """by id, in the order of the log"""
        self.assignments: dict[str, Assignment] = {}
        """by id, in the order in which they were given"""
        self.of_item: dict[str, list[str]] = {}
        """ids of the assignments of each item"""
        self.words: dict[str, int] = {}
        """words that a labeler has to read of each item"""
        self.of_labeler: dict[str, list[str]] = {}
        """ids of the assignments of each labeler, in the order in which they were given"""
        self.keys: dict[tuple[str, str], tuple[str, str, int]] = {}
        """for each (labeler, key) of a change: its kind, the assignment and the version that it made"""
        self.left_out: dict[str, str] = {}
        """labelers that were left out by hand, with the reason"""

    def apply(self, event: Event) -> None:
        """Take one event more. Raises ValueError or KeyError for one that does not follow from those before."""
        match event["kind"]:
            case "item":
                item = Item.model_validate(event["item"])
                self.items[item.id] = item
                self.of_item[item.id] = []
                texts = (*(message.content for message in item.prompt), *item.responses)
                self.words[item.id] = sum(len(text.split()) for text in texts)
            case "given":
                self._give(event)
            case "draft" | "submitted" | "undone":
                self._change(event)
            case "left_out":
                self.left_out[event["labeler"]] = event["reason"]
            case "taken_back":
                self.left_out.pop(event["labeler"], None)
            case kind:
                raise ValueError(f"there is no event of kind {kind!r}")

    def given(self, item: Item) -> Iterator[Assignment]:
        """All assignments of an item, the oldest first."""
        return (self.assignments[name] for name in self.of_item[item.id])

    def work(self, item: Item) -> Iterator[Assignment]:
        """Those that are work, and no measurement of the labeler."""
        return (one for one in self.given(item) if one.use == "work")

    def given_to(self, labeler: str) -> Iterator[Assignment]:
        """All assignments of a labeler, the oldest first."""
        return (self.assignments[name] for name in self.of_labeler.get(labeler, ()))

    def last_submitted(self, labeler: str) -> Assignment | None:
        """What a labeler submitted last, training apart, which is not taken back."""
        done = (one for one in self.given_to(labeler) if one.submitted and one.use != "training")
        return max(done, key=lambda one: one.since, default=None)

    def _give(self, event: Event) -> None:
        item, at = self.items[event["item"]], event["time"]
        assignment = Assignment(
            id=event["assignment"],
            item=item,
            labeler=event["by"],
            use=event["use"],
            order=tuple(event["order"]),
            since=event["n"],
            given=at,
            changed=at,
        )
        self.assignments[assignment.id] = assignment
        self.of_item[item.id].append(assignment.id)
        self.of_labeler.setdefault(assignment.labeler, []).append(assignment.id)

    def _change(self, event: Event) -> None:
        old, kind = self.assignments[event["assignment"]], event["kind"]
        new = replace(old, version=old.version + 1, changed=event["time"], submitted=kind == "submitted")
        if kind != "draft":
            new = replace(new, since=event["n"], ranks=None)
        if kind != "undone":
            answer = Answer.model_validate(event["answer"])
            given = [rank for rank in answer.ranks if rank is not None]
            ranked = kind == "submitted" and answer.cannot is None and given
            new = replace(
                new,
                answer=answer,
                ranks=dense(new.in_order(given)) if ranked else None,
                seconds=event["seconds"],
                guidelines=event.get("guidelines"),
                page=event.get("page"),
            )
        self.assignments[old.id] = new
        if key := event.get("key"):
            self.keys[old.labeler, key] = (kind, old.id, new.version)


def _promise() -> Future[None]:
    """A future that nobody who waits for it can cancel for the others."""
    promise = Future[None]()
    promise.set_running_or_notify_cancel()
    return promise


def _write_all(file: int, lines: Iterable[bytes]) -> None:
    data = memoryview(b"".join(lines))
    while data:
        data = data[os.write(file, data) :]


def _events(path: Path, data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The events of whole lines, and how many bytes those are."""
    whole = data.rfind(b"\n") + 1
    events = []
    for number, line in enumerate(data[:whole].split(b"\n")[:-1]):
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or event.get("n") != number:
                raise ValueError(f'it must be an event with "n": {number}')
        except ValueError as error:
            raise RecordError(
                f"{path}:{number + 1}: {error}. Remedy: put back the log as it was written, from a copy"
            ) from error
        events.append(event)
    return events, whole
