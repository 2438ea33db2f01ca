"""People who label, without a browser: they rank by a rule as soon as the page is served."""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from reward_server.labeling.items import Answer, Assignment, Rating
from reward_server.labeling.people import People
from reward_server.labeling.project import Project

Rule = Callable[[Sequence[str]], Sequence[int]]
"""Ranks, 1 for the best, of texts in the order shown."""


def by_length(texts: Sequence[str]) -> list[int]:
    """The shortest is best, of equal length is a tie."""
    lengths = sorted({len(text) for text in texts})
    return [lengths.index(len(text)) + 1 for text in texts]


def backwards(texts: Sequence[str]) -> list[int]:
    """The longest is best."""
    best = max(by_length(texts))
    return [best + 1 - rank for rank in by_length(texts)]


def invited(file: Path, *names: str) -> list[str]:
    """Ids of people who were just invited."""
    return [People(file).invite(name)[0] for name in names]


def answered(given: Assignment, rule: Rule) -> Answer:
    ranks = tuple(rule(given.responses))
    return Answer(ranks=ranks, ratings=tuple(Rating(quality=5) for _ in ranks))


async def rank(project: Project, labeler: str, rule: Rule, most: int = 1000) -> int:
    """Have a labeler rank what there is, and `most` items at most; how many it were."""
    count = 0
    while count < most and (given := await project.next(labeler)) is not None:
        await project.submit(labeler, given.id, given.version, answered(given, rule), 60.0, uuid4().hex)
        count += 1
    return count


class Served:
    """Stands in for `serve_labeling`: whoever is in `rules` labels at once, in a thread with an event loop."""

    def __init__(self, rules: Mapping[str, Rule], most: int = 1000) -> None:
        self.rules, self.most, self.count = rules, most, 0

    def __call__(self, project: Project, people: People, config: Any, audit: Path) -> Any:
        self.count += 1
        assert {one.id for one in people.labelers} >= self.rules.keys()

        async def work() -> None:
            await asyncio.gather(*(rank(project, name, rule, self.most) for name, rule in self.rules.items()))

        thread = threading.Thread(target=lambda: asyncio.run(work()))
        thread.start()
        return SimpleNamespace(url="http://127.0.0.1:8701", close=thread.join)
