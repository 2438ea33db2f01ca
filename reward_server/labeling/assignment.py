"""Which item a labeler gets next, and when there are answers enough. Everything is drawn by seed, id and labeler."""

import random
from collections.abc import Iterator

from reward_server.labeling.config import LabelConfig
from reward_server.labeling.items import Assignment, Item, Use
from reward_server.labeling.log import Event, State
from reward_server.labeling.quality import adjudicated, counted, disputed, left_out, refusal, wanted

REPEAT_AFTER = 5
"""Items of a labeler in between before one comes again."""


class Choice:
    """What the state of a log means for what comes next."""

    def __init__(self, state: State, config: LabelConfig, seed: int) -> None:
        self._state = state
        self._config = config
        self._seed = seed
        self._out: dict[str, str] = {}
        self._fresh: dict[str, Item] = {}  # work that nobody was given
        self._begun: dict[str, Item] = {}  # work that somebody was given, and that lacks answers which count
        self._disputed: dict[str, Item] = {}
        self._orders: dict[str, list[Item]] = {}  # of work, by labeler, the first one last
        self.renew()

    def renew(self) -> None:
        """Find anew whose answers count, which items lack some, and on which labelers disagree."""
        self._out = left_out(self._state, self._config)
        for item in self._state.items.values():
            self._judge(item)

    def follow(self, event: Event) -> None:
        """The same for what an event of the state has changed."""
        match event["kind"]:
            case "item":
                self._judge(self._state.items[event["item"]["id"]])
            case "left_out" | "taken_back":
                self.renew()
            case "given" | "submitted" | "undone":
                assignment = self._state.assignments[event["assignment"]]
                self._judge(assignment.item)
                if assignment.use == "gold" and left_out(self._state, self._config) != self._out:
                    self.renew()

    def open(self, labeler: str, now: float) -> Iterator[Assignment]:
        """What a labeler has open, the newest first, but for what is not begun and others have done since."""
        waiting = [one for one in self._state.given_to(labeler) if not one.submitted]
        for one in sorted(waiting, key=lambda one: -one.since):
            passed_on = one.use == "work" and one.version == 0 and not self._young(one, now)
            if not passed_on or self._active(one.item, now) < wanted(one.item, self._config):
                yield one

    def next(self, labeler: str, now: float) -> tuple[Item, Use] | None:
        """What to give a labeler who has nothing open: training, disputed items, then work with what measures it.

        None when there is nothing, and for who was left out by hand.
        """
        if self.stopped(labeler):
            return None
        seen = self._seen(labeler)
        for item in self._of_use("training", seen):
            return item, "training"
        for item in self._disputed.values():
            if item.id not in seen and not self._in_adjudication(item, now):
                return item, "adjudication"
        # What somebody has begun comes before the rest, so that agreement shows early.
        begun = max(self._lacking(seen, now), key=lambda found: (found[0].priority, found[1]), default=None)
        work = begun[0] if begun else self._first_fresh(labeler)
        return work and (self._measurement(labeler, seen) or (work, "work"))

    def stopped(self, labeler: str) -> bool:
        """Whether a labeler was left out by hand, and is given nothing more."""
        return labeler in self._state.left_out or labeler in self._config.leave_out

    def left(self, labeler: str, now: float) -> int:
        """How many items there are for a labeler to do now, those open included."""
        seen = self._seen(labeler)
        found = (self.open(labeler, now), self._of_use("training", seen), self._lacking(seen, now), self._fresh)
        return 0 if self.stopped(labeler) else sum(1 for some in found for _ in some)

    def done(self, now: float) -> bool:
        """Whether every item has its answers, and nobody is just adjudicating one.

        For answers that do not count others are waited for only while there is a labeler, of those who have begun, who
        has not seen the item or is just at it.
        """
        active = set(self._state.of_labeler) - set(self._out)
        return (
            not self._fresh
            and all(self._has_what_it_can(item, active, now) for item in list(self._begun.values()))
            and not any(self._being_adjudicated(item, now) for item in list(self._disputed.values()))
        )

    def _has_what_it_can(self, item: Item, active: set[str], now: float) -> bool:
        work = list(self._state.work(item))
        at_it = any(not one.submitted and self._may_count(one, now) for one in work)
        have = {one.labeler for one in work}
        return sum(one.submitted for one in work) >= wanted(item, self._config) and active <= have and not at_it

    def _judge(self, item: Item) -> None:
        if item.use != "work":
            return
        lacks = len(counted(self._state, item, self._out, self._config)) < wanted(item, self._config)
        given = bool(self._state.of_item[item.id])
        for found, fits in (
            (self._fresh, not given),
            (self._begun, given and lacks),
            (self._disputed, disputed(self._state, item, self._out, self._config)),
        ):
            if fits:
                found[item.id] = item
            else:
                found.pop(item.id, None)

    def _seen(self, labeler: str) -> set[str]:
        return {one.item.id for one in self._state.given_to(labeler)}

    def _of_use(self, use: Use, seen: set[str]) -> Iterator[Item]:
        return (item for item in self._state.items.values() if item.use == use and item.id not in seen)

    def _young(self, assignment: Assignment, now: float) -> bool:
        return now - assignment.changed < self._config.open_s

    def _active(self, item: Item, now: float) -> int:
        """Answers of an item that count or may soon."""
        return sum(self._may_count(one, now) for one in self._state.work(item))

    def _may_count(self, one: Assignment, now: float) -> bool:
        if one.submitted:
            return refusal(self._state, one, self._out, self._config) is None
        return one.labeler not in self._out and self._young(one, now)

    def _lacking(self, seen: set[str], now: float) -> Iterator[tuple[Item, int]]:
        """Work that was begun and wants one more labeler, with the answers that it has or may soon have."""
        for item in list(self._begun.values()):
            if item.id not in seen and (active := self._active(item, now)) < wanted(item, self._config):
                yield item, active

    def _first_fresh(self, labeler: str) -> Item | None:
        """What nobody was given: the first in the labeler's own order of the items."""
        if (order := self._orders.get(labeler)) is None:
            order = self._orders[labeler] = list(self._of_use("work", set()))
            random.Random(f"items {self._seed} {labeler}").shuffle(order)
            order.sort(key=lambda item: item.priority)
        while order and order[-1].id not in self._fresh:
            order.pop()
        return order[-1] if order else None

    def _in_adjudication(self, item: Item, now: float) -> bool:
        return any(one.use == "adjudication" and self._may_count(one, now) for one in self._state.given(item))

    def _being_adjudicated(self, item: Item, now: float) -> bool:
        done = adjudicated(self._state, item, self._out, self._config)
        return not done and self._in_adjudication(item, now)

    def _measurement(self, labeler: str, seen: set[str]) -> tuple[Item, Use] | None:
        """A gold item or a repeat, where it is time for one and there is one."""
        given = [one for one in self._state.given_to(labeler) if one.use != "training"]
        drawn = random.Random(f"use {self._seed} {labeler} {len(given)}").random()
        if drawn < self._config.gold_share:
            golds = list(self._of_use("gold", seen))
            return (random.Random(f"gold {self._seed} {labeler} {len(given)}").choice(golds), "gold") if golds else None
        if drawn < self._config.gold_share + self._config.repeat_share:
            again = {one.item.id for one in given if one.use == "repeat"}
            for one in given[:-REPEAT_AFTER]:
                if one.use == "work" and one.ranks and one.item.id not in again:
                    return one.item, "repeat"
        return None


def shuffled(seed: int, item: Item, labeler: str, use: str) -> tuple[int, ...]:
    """The order in which a labeler sees the outputs of an item: for each place an index. A pure function."""
    count = len(item.responses)
    return tuple(random.Random(f"outputs {seed} {labeler} {use} {item.id}").sample(range(count), count))
