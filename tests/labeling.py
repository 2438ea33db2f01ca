"""People who label, for tests: items, answers, a clock, and a project that is called without a loop."""

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reward_server.labeling.config import LabelConfig
from reward_server.labeling.items import Answer, Assignment, Feedback, Item, Rating
from reward_server.labeling.log import FILE, read_events
from reward_server.labeling.project import Project
from reward_server.schema import Message

TEXTS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota")
RANKED: dict[str, Any] = {"quality": False, "flags": (), "words_per_minute": 0, "gold_share": 0, "repeat_share": 0}
"""Settings with which ranks alone are asked for, and everything counts."""


def item(name: str, count: int = 3, **more: Any) -> Item:
    """An item of work with `count` completions of a word each."""
    texts = {"responses": TEXTS[:count], "ended": (True,) * count}
    return Item(id=name, prompt=(Message(role="user", content=f"prompt {name}"),), **(texts | more))


def ranked(assignment: Assignment, ranks: Sequence[int]) -> Answer:
    """The answer of which these are the ranks in the item's order, 0 for the best."""
    return Answer(ranks=tuple(ranks[index] + 1 for index in assignment.order))


def rated(assignment: Assignment, ranks: Sequence[int], qualities: Sequence[int], flags: Sequence[str]) -> Answer:
    """The same with a quality and a flag of each completion, in the item's order."""
    ratings = tuple(Rating(quality=qualities[index], flags=(flags[index],)) for index in assignment.order)
    return ranked(assignment, ranks).model_copy(update={"ratings": ratings})


class Clock:
    """Seconds that a test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """A project whose labelers do one thing after another. Each change has a key of its own."""

    def __init__(self, folder: Path, items: Sequence[Item], **config: Any) -> None:
        self.folder = folder
        self.clock = Clock()
        self.config = LabelConfig(**(RANKED | config))
        self._keys = map(str, itertools.count())
        self.open(items)

    def open(self, items: Sequence[Item] = ()) -> None:
        """Open the log, again."""
        self.project = Project(self.folder, self.config, items, self.clock, page="page-1")

    def reopen(self) -> None:
        """End the project, and begin again from its log."""
        self.project.close()
        self.open()

    def next(self, labeler: str) -> Assignment | None:
        """What the labeler gets."""
        return asyncio.run(self.project.next(labeler))

    def take(self, labeler: str) -> Assignment:
        """What the labeler gets, and there is something."""
        found = self.next(labeler)
        assert found is not None
        return found

    def draft(self, one: Assignment, answer: Answer, seconds: float = 1.0) -> int:
        """The new version."""
        call = self.project.draft(one.labeler, one.id, one.version, answer, seconds, next(self._keys))
        return asyncio.run(call)

    def submit(self, one: Assignment, answer: Answer, seconds: float = 1.0) -> Feedback | None:
        """What the labeler is told."""
        call = self.project.submit(one.labeler, one.id, one.version, answer, seconds, next(self._keys))
        return asyncio.run(call)

    def rank(self, labeler: str, *ranks: int, seconds: float = 1.0) -> Assignment:
        """Have the labeler get an item, and rank it so, 0 for the best, in the item's order."""
        one = self.take(labeler)
        self.submit(one, ranked(one, ranks or range(len(one.order))), seconds)
        return one

    def undo(self, labeler: str) -> Assignment | None:
        """What was reopened."""
        return asyncio.run(self.project.undo(labeler, next(self._keys)))

    def leave_out(self, labeler: str, reason: str | None) -> None:
        """As p0, who runs it."""
        asyncio.run(self.project.leave_out("p0", labeler, reason))

    @property
    def events(self) -> list[dict[str, Any]]:
        """What is on the disk."""
        return read_events(self.folder / FILE)
