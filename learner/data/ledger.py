"""The ledger: one line for every change of state of a sample, so that none is lost without a trace.

A ticket's samples move together, so a line names a ticket (number, attempt) and stands for all its keys
(prompt id, epoch, 0..K-1, attempt); ticket number -> (prompt id, epoch) is one-to-one. States: issued ->
generated -> scored -> batched(step) -> committed(version), or dropped(reason) on the way. A run that is resumed goes on
in the same file: the line "resumed" undoes what its checkpoint does not hold.
"""

import json
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.prompts import PromptStream
from actors.trajectory import Ticket
from learner.data.journal import Disk, Journal


class Ledger:
    """Appends lines to a JSONL file; without a path it keeps nothing."""

    def __init__(self, path: str | Path | None, stream: PromptStream | None = None, disk: Disk | None = None) -> None:
        """Store the path. With the run's `stream`, a line about a ticket also names its prompt; `disk` is the run's."""
        self.disk = disk or Disk()
        self._journal = None if path is None else Journal(Path(path), self.disk)
        self._stream = stream

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

    def sync(self) -> None:
        """Have what was written survive a loss of power, as a checkpoint does that counts on it. Raises NotWritten."""
        if self._journal is not None:
            self._journal.sync()

    def close(self) -> None:
        """Close the file; a later line opens it again."""
        if self._journal is not None:
            self._journal.close()

    def name(self, number: int) -> str:
        """Name a ticket for an error message."""
        if self._stream is None:
            return f"ticket {number}"
        prompt, epoch = self._stream[number]
        return f"ticket {number} (prompt {prompt.id!r}, epoch {epoch})"

    def _write(self, line: dict[str, Any]) -> None:
        if self._journal is None:
            return
        if self._stream is not None and "ticket" in line:
            prompt, epoch = self._stream[line["ticket"]]
            line |= {"prompt_id": prompt.id, "epoch": epoch}
        self._journal.append({"time": round(time.time(), 3), **line})


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What a ledger says of a stage, counted in tickets; obeys issued = trained + dropped + outstanding."""

    issued: int
    """tickets handed out, every attempt counted"""
    trained: int
    """tickets that are part of a batch of the run's present history"""
    dropped: dict[str, int]
    """tickets lost, by reason; "resumed" are those that a checkpoint did not hold when the run went on from it"""
    outstanding: int
    """tickets in flight, or waiting in the buffer"""
    twice: int
    """tickets trained more than once in the present history"""
    staleness: int
    """version at training minus that of the oldest token, at most"""
    steps: dict[int, tuple[int, int]]
    """(samples, tokens) of each batch of the present history"""
    committed: int
    """newest version that the ledger knows a checkpoint of; 0 without one"""
    resumed: int
    """how often the stage went on after a stop"""
    violations: tuple[str, ...]
    """broken promises, with the line where it shows"""

    @property
    def iterations(self) -> int:
        """Batches taken."""
        return len(self.steps)

    @property
    def samples(self) -> int:
        """Responses trained."""
        return sum(samples for samples, _ in self.steps.values())

    @property
    def tokens(self) -> int:
        """Their tokens."""
        return sum(tokens for _, tokens in self.steps.values())


def audit(path: str | Path) -> Audit:
    """Replay a ledger and check its promises (reliability of the samples):

    a ticket is trained at most once in one history, with tokens, none of which is staler than the bound or newer than
    the learner; batch i is made of the tickets i * B .. i * B + B - 1; nothing vanishes. A line that its writer had no
    time to finish is left out.
    """
    replay = _Replay()
    with Path(path).open("rb") as file:
        for number, text in enumerate(file, start=1):
            if text.endswith(b"\n"):
                replay.read(number, text)
    return replay.audit()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    attempt: int
    step: int
    scored: dict[str, Any]  # samples, tokens, oldest and newest version

    @property
    def staleness(self) -> int:
        return self.step - self.scored.get("oldest", self.step)


class _Replay:
    """The state of every ticket, line after line."""

    def __init__(self) -> None:
        self.issued = self.committed = self.resumes = self.twice = 0
        self.live: dict[tuple[int, int], dict[str, Any]] = {}  # (ticket, attempt) -> what its score's line says
        self.trained: dict[int, _Trained] = {}  # by ticket
        self.dropped: Counter[str] = Counter()
        self.violations: list[str] = []

    def read(self, number: int, text: bytes) -> None:
        try:
            line = json.loads(text)
            getattr(self, f"_{line['state']}", self._moved)(line)
        except _Violation as broken:
            self.violations.append(f"line {number}: {broken}")
        except (ValueError, LookupError, TypeError) as error:
            self.violations.append(f"line {number} cannot be read ({type(error).__name__}: {error})")

    def audit(self) -> Audit:
        self._check_batches()
        trained = self.trained.values()
        steps: dict[int, tuple[int, int]] = {}
        for one in trained:
            samples, tokens = steps.get(one.step, (0, 0))
            steps[one.step] = samples + one.scored.get("samples", 0), tokens + one.scored.get("tokens", 0)
        if self.issued != len(trained) + self.dropped.total() + len(self.live):
            self.violations.append(f"{self.issued} issued are not {len(trained)} trained, the dropped and the live")
        return Audit(
            issued=self.issued,
            trained=len(trained),
            dropped=dict(self.dropped),
            outstanding=len(self.live),
            twice=self.twice,
            staleness=max((one.staleness for one in trained), default=0),
            steps=dict(sorted(steps.items())),
            committed=self.committed,
            resumed=self.resumes,
            violations=tuple(self.violations),
        )

    def _committed(self, line: dict[str, Any]) -> None:
        self.committed = line["version"]

    def _resumed(self, line: dict[str, Any]) -> None:
        """What came after the checkpoint is undone; of what is live, the buffer's ready tickets remain."""
        self.resumes += 1
        self.committed = line["version"]
        undone = {(n, one.attempt): one for n, one in self.trained.items() if one.step >= line["version"]}
        for ticket, _ in undone:
            del self.trained[ticket]
        self.live |= {key: one.scored for key, one in undone.items()}
        kept = {(ticket, attempt) for ticket, attempt in line["kept"]}
        if lost := len(self.live.keys() - kept):
            self.dropped["resumed"] += lost
        self.live = {key: scored for key, scored in self.live.items() if key in kept}

    def _issued(self, line: dict[str, Any]) -> None:
        key = (line["ticket"], line["attempt"])
        if key in self.live or key[0] in self.trained:
            raise _Violation(f"ticket {key} is issued while it is live or trained")
        self.issued += 1
        self.live[key] = {}

    def _dropped(self, line: dict[str, Any]) -> None:
        self._moved(line)
        del self.live[line["ticket"], line["attempt"]]
        self.dropped[line["reason"]] += 1

    def _batched(self, line: dict[str, Any]) -> None:
        ticket, step = line["ticket"], line["step"]
        if ticket in self.trained:
            self.twice += 1
            raise _Violation(f"ticket {ticket} is trained in step {step} and was in step {self.trained[ticket].step}")
        self._moved(line)
        scored = self.live.pop((ticket, line["attempt"]))
        one = self.trained[ticket] = _Trained(attempt=line["attempt"], step=step, scored=scored)
        if one.staleness > line.get("max_staleness", one.staleness):
            bound = line["max_staleness"]
            raise _Violation(f"ticket {ticket} is trained with a token {one.staleness} versions old, bound {bound}")
        if (newest := scored.get("newest", step)) > step:
            raise _Violation(f"ticket {ticket} is trained in step {step} with a token of version {newest}")
        if scored.get("tokens", 1) < 1:
            raise _Violation(f"ticket {ticket} is trained without a token")

    def _moved(self, line: dict[str, Any]) -> None:
        """A ticket that is out comes into another state."""
        key = (line["ticket"], line["attempt"])
        if key not in self.live:
            raise _Violation(f"ticket {key} is {line['state']} but was not outstanding")
        if line["state"] == "scored":
            self.live[key] = line

    def _check_batches(self) -> None:
        """The order of tickets is that of the prompts, so it must have no gap."""
        batches: dict[int, list[int]] = {}
        for ticket, one in self.trained.items():
            batches.setdefault(one.step, []).append(ticket)
        size = len(batches.get(0, ()))
        for step in range(max(batches, default=-1) + 1):
            tickets = sorted(batches.get(step, ()))
            whole = list(range(step * size, (step + 1) * size))
            last = step == max(batches)  # may have been taken when the run was killed
            if tickets != whole and not (last and tickets == whole[: len(tickets)]):
                found, due = f"{len(tickets)} tickets from {tickets[:1]} on", f"{size} from {step * size} on"
                self.violations.append(f"step {step} trained {found}, not {due}")


class _Violation(Exception):
    """A promise is broken."""
