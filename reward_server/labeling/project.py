"""The labelling of one set of items by several people at once: what each gets next, and what becomes of answers."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from reward_server.labeling.assignment import Choice, shuffled
from reward_server.labeling.config import LabelConfig
from reward_server.labeling.items import Answer, Assignment, Conflict, Feedback, Item, complete, fits
from reward_server.labeling.log import FILE, Log, State
from reward_server.labeling.quality import Progress, measure, pace
from reward_server.preferences.records import RecordError
from reward_server.preferences.sheets import dense

_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """What a labeler sees of the own progress."""

    done: int
    """items that the labeler has submitted"""
    wanted: int
    """those, and what there is left for this labeler"""
    per_hour: float
    """items submitted in the last hour, or at that pace"""


class Project:
    """What a log says, and who gets what next.

    Every method that is awaited returns when all that it says is on the disk, and raises NotWritten when it cannot be.
    All of them belong on one event loop; `progress`, `own` and `quota_reached` can be asked from any thread. No other
    process can have the log open.
    """

    def __init__(
        self,
        folder: Path,
        config: LabelConfig,
        items: Sequence[Item],
        clock: Callable[[], float] = time.time,
        *,
        seed: int = 0,
        page: str | None = None,
    ) -> None:
        """Open the log of `folder`, and add the items that it does not have yet. `page` is the version of the page.

        Raises ValueError for items that differ from those of the log, and for guidelines that cannot be read;
        RecordError (file:line) for a log that is broken; ValueError when another process has it open.
        """
        self.guidelines = read_guidelines(config)
        """what labelers are told; None where there is nothing"""
        self.config = config
        self._versions = {"guidelines": self.guidelines and version(self.guidelines), "page": page}
        self._clock, self._seed = clock, seed
        self._state = State()
        self._log = Log(folder / FILE, clock)
        try:
            self._replay()
            self._choice = Choice(self._state, config, seed)
            for item in items:
                self._add(item)
        except BaseException:
            self._log.close()
            raise

    async def next(self, labeler: str) -> Assignment | None:
        """What the labeler has open, the newest first, else something new; None when there is nothing for this labeler.

        Training comes first. Gold items and repeats are among the work, in their shares.
        """
        now = self._clock()
        found = None if self._choice.stopped(labeler) else next(self._choice.open(labeler, now), None)
        if found is None and (chosen := self._choice.next(labeler, now)):
            item, use = chosen
            # Unlike those of any other log, which a page that was left open may still have answers for.
            name = f"a{len(self._state.assignments) + 1}-{secrets.token_hex(4)}"
            order = shuffled(self._seed, item, labeler, use)
            self._record("given", by=labeler, item=item.id, assignment=name, use=use, order=order)
            found = self._state.assignments[name]
        await self._log.saved()
        return found

    async def draft(
        self, labeler: str, assignment_id: str, version: int, answer: Answer, seconds: float, key: str
    ) -> int:
        """Keep what a labeler has so far; the new version. `seconds` are those of work on it in all.

        The same key again changes nothing, and returns the same. Raises KeyError for an assignment that is not the
        labeler's, Conflict when it was changed since `version`, ValueError for an answer that does not fit.
        """
        made = self._made(labeler, key, "draft", assignment_id)
        if made is None:
            assignment = self._current(labeler, assignment_id, version)
            fits(answer, assignment.item, self.config)
            made = self._answer("draft", assignment, answer, seconds, key)
        await self._log.saved()
        return made

    async def submit(
        self, labeler: str, assignment_id: str, version: int, answer: Answer, seconds: float, key: str
    ) -> Feedback | None:
        """Take an answer as done; for training, what is right. Otherwise as `draft`, and the answer has to be whole."""
        if self._made(labeler, key, "submitted", assignment_id) is None:
            assignment = self._current(labeler, assignment_id, version)
            complete(answer, assignment.item, self.config)
            self._answer("submitted", assignment, answer, seconds, key)
        await self._log.saved()
        return _feedback(self._state.assignments[assignment_id])

    async def undo(self, labeler: str, key: str) -> Assignment | None:
        """Reopen what the labeler submitted last, training apart; None when there is nothing. `key` as in `draft`."""
        known = self._state.keys.get((labeler, key))
        if known is not None:
            last = self._state.assignments[known[1]]
            self._made(labeler, key, "undone", last.id)
        elif (last := self._state.last_submitted(labeler)) is not None:
            self._record("undone", by=labeler, item=last.item.id, assignment=last.id, key=key)
        await self._log.saved()
        return last and self._state.assignments[last.id]

    async def leave_out(self, by: str, labeler: str, reason: str | None) -> None:
        """Have nothing of a labeler count from now on, nor give the labeler more; None takes that back."""
        if reason is None:
            self._record("taken_back", by=by, labeler=labeler)
        elif not reason.strip():
            raise ValueError("say why the labeler is left out")
        else:
            self._record("left_out", by=by, labeler=labeler, reason=reason)
        await self._log.saved()

    def progress(self) -> Progress:
        """Where everything stands, for whoever runs it."""
        return measure(self._state, self.config, self._clock())

    def own(self, labeler: str) -> Own:
        """Where one labeler stands, for the labeler."""
        now = self._clock()
        done, per_hour = pace(self._state, labeler, now)
        return Own(done=done, wanted=done + self._choice.left(labeler, now), per_hour=per_hour)

    @property
    def quota_reached(self) -> bool:
        """Whether every item has its answers, and nobody is just adjudicating one; see `Choice.done`."""
        return self._choice.done(self._clock())

    async def wait_quota(self, seconds: float) -> None:
        """Wait until `quota_reached`. Raises TimeoutError after so many seconds."""
        async with asyncio.timeout(seconds):
            while not self.quota_reached:
                await asyncio.sleep(_POLL_S)

    def close(self) -> None:
        """Write what was taken, and let others open the log."""
        self._log.close()

    def _replay(self) -> None:
        for event in self._log.events:
            try:
                self._state.apply(event)
            except (KeyError, ValueError, TypeError) as error:
                raise RecordError(
                    f"{self._log.path}:{event['n'] + 1}: {error!r} is no event that can follow. Remedy: put back the "
                    "log as it was written, from a copy"
                ) from error
        self._log.events.clear()

    def _add(self, item: Item) -> None:
        known = self._state.items.get(item.id)
        if known is None:
            self._record("item", item=item.model_dump(mode="json"))
            return
        for name in ("task", "use", "prompt", "responses", "ended", "ranks"):
            if getattr(known, name) != getattr(item, name):
                raise ValueError(
                    f"item {item.id!r} has another {name} than in {self._log.path}, where people have labelled it: put "
                    "back the file that it came from, or label into another folder"
                )

    def _record(self, kind: str, **event: Any) -> None:
        """Take an event, and what follows from it. It is on the disk when the log says so."""
        made = self._log.append({"kind": kind, **event})
        self._state.apply(made)
        self._choice.follow(made)

    def _answer(self, kind: str, assignment: Assignment, answer: Answer, seconds: float, key: str) -> int:
        """Take a draft, or what is submitted; the new version."""
        self._record(
            kind,
            by=assignment.labeler,
            item=assignment.item.id,
            assignment=assignment.id,
            version=assignment.version + 1,
            answer=answer.model_dump(mode="json"),
            seconds=max(assignment.seconds, seconds),
            key=key,
            **self._versions,
        )
        return assignment.version + 1

    def _made(self, labeler: str, key: str, kind: str, assignment_id: str) -> int | None:
        """The version that a change with this key has made; None for a new key."""
        found = self._state.keys.get((labeler, key))
        if found is None:
            return None
        if found[:2] != (kind, assignment_id):
            raise ValueError(f"key {key!r} was used for another change: give each its own")
        return found[2]

    def _current(self, labeler: str, assignment_id: str, version: int) -> Assignment:
        assignment = self._state.assignments.get(assignment_id)
        if assignment is None or assignment.labeler != labeler:
            raise KeyError(assignment_id)
        if assignment.submitted or assignment.version != version:
            raise Conflict(assignment)
        return assignment


def version(guidelines: str) -> str:
    """What tells one text of guidelines from another: 12 hex digits."""
    return sha256(guidelines.encode()).hexdigest()[:12]


def read_guidelines(config: LabelConfig) -> str | None:
    """The text of label.guidelines; None where there is none. Raises ValueError where it cannot be read."""
    if config.guidelines is None:
        return None
    try:
        return config.guidelines.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"label.guidelines names {config.guidelines}, which cannot be read ({error}): give a text file in UTF-8"
        ) from error


def _feedback(assignment: Assignment) -> Feedback | None:
    if assignment.use != "training" or assignment.item.ranks is None:
        return None
    right = dense(assignment.item.ranks)
    return Feedback(
        correct=assignment.ranks == right,
        ranks=tuple(right[index] + 1 for index in assignment.order),
        explanation=assignment.item.explanation,
    )
