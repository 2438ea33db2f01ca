"""What a log's rankings and demonstrations are as data: a pure function of its events, the same whenever it is made."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from reward_server.labeling.config import LabelConfig
from reward_server.labeling.items import Answer, Assignment
from reward_server.labeling.log import Event, State
from reward_server.labeling.quality import agreement, counted, left_out, refusal
from reward_server.preferences.labeling import Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class NotUsed:
    """An answer that is no comparison or demonstration."""

    assignment: str
    """its id in the log"""
    item: str
    """the id of the item"""
    labeler: str
    """the id of who gave it"""
    reason: str
    """why it does not count, or what the labeler said of an item that cannot be ranked"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Everything that was submitted as work, by item and then in the order in which it was given."""

    comparisons: tuple[Comparison, ...]
    """one for each ranking, with the id ITEM:LABELER"""
    demonstrations: tuple[dict[str, Any], ...]
    """rows as data.demonstrations reads them, with labeler, seconds and versions"""
    adjudications: tuple[str, ...]
    """ids of the comparisons by whoever ranked an item on which others disagree"""
    left_out: tuple[NotUsed, ...]
    """answers that do not count"""
    unranked: tuple[NotUsed, ...]
    """items that cannot be ranked, as a labeler says"""
    alpha: float | None
    """Krippendorff's, of the work that counts; see `Agreement`"""


def exported(events: Iterable[Event], config: LabelConfig) -> Export:
    """What the events of a log amount to, with the thresholds of `config`.

    Training, gold items and repeats measure labelers, and are no data. Raises ValueError or KeyError for events that do
    not follow from one another.
    """
    state = State()
    for event in events:
        state.apply(event)
    out = left_out(state, config)
    given = [
        one
        for item in state.items.values()
        for one in state.given(item)
        if one.submitted and one.use in ("work", "adjudication")
    ]
    reasons = [refusal(state, one, out, config) for one in given]
    used = [one for one, reason in zip(given, reasons, strict=True) if reason is None]
    ranked = [(one, ranks) for one in used if (ranks := one.ranks)]
    ranking = [item for item in state.items.values() if item.use == "work" and item.task == "rank"]
    return Export(
        comparisons=tuple(_comparison(one, ranks) for one, ranks in ranked),
        demonstrations=tuple(_demonstration(one, text) for one in used if (text := _text(one)) is not None),
        adjudications=tuple(_name(one) for one, _ in ranked if one.use == "adjudication"),
        left_out=tuple(_not_used(one, reason) for one, reason in zip(given, reasons, strict=True) if reason),
        unranked=tuple(_not_used(one, one.answer.cannot) for one in used if one.answer and one.answer.cannot),
        alpha=agreement(counted(state, item, out, config) for item in ranking).alpha,
    )


def _name(one: Assignment) -> str:
    return f"{one.item.id}:{one.labeler}"


def _not_used(one: Assignment, reason: str) -> NotUsed:
    return NotUsed(assignment=one.id, item=one.item.id, labeler=one.labeler, reason=reason)


def _text(one: Assignment) -> str | None:
    """A demonstration, where one was written."""
    return one.answer.text if one.item.task == "demonstration" and one.answer and one.answer.cannot is None else None


def _comparison(one: Assignment, ranks: tuple[int, ...]) -> Comparison:
    item, ratings = one.item, (one.answer or Answer()).ratings
    own = one.in_order(ratings) if ratings else ()
    return Comparison(
        id=_name(one),
        prompt=item.prompt,
        responses=item.responses,
        ended=item.ended,
        ranks=ranks,
        labeler=one.labeler,
        group=item.group,
        seconds=one.seconds,
        control=item.control,
        qualities=tuple(rating.quality for rating in own) or None,
        flags=tuple(rating.flags for rating in own) or None,
        guidelines=one.guidelines,
        page=one.page,
        use_case=item.use_case,
    )


def _demonstration(one: Assignment, text: str) -> dict[str, Any]:
    row = {
        "id": _name(one),
        "prompt": [message.model_dump() for message in one.item.prompt],
        "response": text,
        "group": one.item.group,
        "labeler": one.labeler,
        "seconds": one.seconds,
        "guidelines": one.guidelines,
        "page": one.page,
        "use_case": one.item.use_case,
    }
    return {name: value for name, value in row.items() if value is not None}
