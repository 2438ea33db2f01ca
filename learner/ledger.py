"""The ledger: one line for every change of state of a sample, so that none is lost without a trace.

A ticket's samples move together, so a line names a ticket (number, attempt) and stands for all its keys
(prompt id, epoch, 0..K-1, attempt); ticket number -> (prompt id, epoch) is one-to-one. States: issued ->
generated -> scored -> batched(step) -> committed(version), or dropped(reason) on the way.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from actors.prompts import PromptStream
from actors.trajectory import Ticket
from reward_server.records import read_jsonl


class Ledger:
    """Appends lines to a JSONL file; without a path it keeps nothing."""

    def __init__(self, path: str | Path | None, stream: PromptStream | None = None) -> None:
        """Store the path. With the run's `stream`, a line about a ticket also names its prompt."""
        self._path = None if path is None else Path(path)
        self._stream = stream
        self._file: TextIO | None = None

    def record(self, state: str, ticket: Ticket, **details: object) -> None:
        """Note that a ticket came into a state."""
        self._write({"state": state, "ticket": ticket.number, "attempt": ticket.attempt, **details})

    def committed(self, version: int) -> None:
        """Note that a checkpoint of this version is complete: what was trained before it is final."""
        self._write({"state": "committed", "version": version})

    def resumed(self, version: int, kept: Collection[Ticket]) -> None:
        """Note that the run goes on from a version; all that is not committed by it or kept is lost."""
        names = [[ticket.number, ticket.attempt] for ticket in kept]
        self._write({"state": "resumed", "version": version, "kept": names})

    def close(self) -> None:
        """Close the file; a later line opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def name(self, number: int) -> str:
        """Name a ticket for an error message."""
        if self._stream is None:
            return f"ticket {number}"
        prompt, epoch = self._stream[number]
        return f"ticket {number} (prompt {prompt.id!r}, epoch {epoch})"

    def _write(self, line: dict[str, Any]) -> None:
        if self._path is None:
            return
        if self._stream is not None and "ticket" in line:
            prompt, epoch = self._stream[line["ticket"]]
            line |= {"prompt_id": prompt.id, "epoch": epoch}
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(self._path)
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._file.write(json.dumps({"time": round(time.time(), 3), **line}) + "\n")


def _cut_torn_line(path: Path) -> None:
    """Remove the rest of a line whose writer was killed."""
    if path.exists():
        with path.open("rb+") as file:
            written = file.read()
            file.truncate(written.rfind(b"\n") + 1)
            os.fsync(file.fileno())


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What a ledger says of a run, counted in tickets."""

    issued: int
    """tickets handed out, every attempt counted"""
    trained: int
    """tickets that are part of a batch of the run's present history"""
    dropped: dict[str, int]
    """tickets lost, by reason"""
    outstanding: int
    """tickets in flight, or waiting in the buffer"""


def audit(path: str | Path) -> Audit:
    """Replay a ledger and check its promises.

    Raises ValueError, with the line, when a ticket is trained twice in one history, or comes into a state
    without being outstanding. What it returns obeys issued = trained + dropped + outstanding.
    """
    issued = 0
    live: dict[tuple[int, int], str] = {}
    trained: dict[int, tuple[int, int]] = {}  # ticket number -> (attempt, step)
    dropped: Counter[str] = Counter()
    for line_number, line in read_jsonl(path):
        state = line["state"]
        if state == "committed":
            continue
        if state == "resumed":
            undone = {n: attempt for n, (attempt, step) in trained.items() if step >= line["version"]}
            trained = {n: value for n, value in trained.items() if n not in undone}
            live |= dict.fromkeys(undone.items(), "scored")
            kept = {(number, attempt) for number, attempt in line["kept"]}
            dropped["resumed"] += len(live.keys() - kept)
            live = {key: state for key, state in live.items() if key in kept}
            continue
        key = (line["ticket"], line["attempt"])
        if state == "issued":
            if key in live or key[0] in trained:
                raise ValueError(f"{path}:{line_number}: ticket {key} is issued while it is live or trained")
            issued += 1
        elif key not in live:
            raise ValueError(f"{path}:{line_number}: ticket {key} is {state} but was not outstanding")
        live[key] = state
        if state == "batched":
            trained[key[0]] = (key[1], line["step"])
            del live[key]
        elif state == "dropped":
            dropped[line["reason"]] += 1
            del live[key]
    assert issued == len(trained) + dropped.total() + len(live), (issued, trained, dropped, live)
    return Audit(issued=issued, trained=len(trained), dropped=dict(dropped), outstanding=len(live))
