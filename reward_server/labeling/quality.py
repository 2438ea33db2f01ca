"""How good answers are, and which of them count: reading time, gold items, repeats, agreement of labelers.

All of it is a function of the state that the log makes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

import numpy as np

from reward_server.labeling.config import LabelConfig
from reward_server.labeling.items import Assignment, Item
from reward_server.labeling.log import State
from reward_server.preferences.sheets import pair_credit

MIN_GOLDS = 5
"""Gold items before a labeler can be left out for them."""
_HOUR_S = 3600.0
_MIN_PACE_S = 60.0  # a pace of less time says nothing
_pair_credit = lru_cache(maxsize=2**14)(pair_credit)  # of the same few rankings, for thousands of items


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A mean of credits: of pairs of completions on which two rankings agree."""

    value: float | None
    """0 to 1; None without a pair"""
    count: int
    """what it is a mean over: pairs of completions, for each two rankings"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far labelers agree on the items that two of them ranked, or more."""

    pairs: Share
    """of pairs of completions, over all pairs of labelers; the paper has 72.6 % (section 3.4)"""
    alpha: float | None
    """Krippendorff's, ordinal, of completions' places; 1 is perfect, 0 as by chance; None where nothing differs"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelerProgress:
    """What one labeler has done, and how well."""

    labeler: str
    """the labeler's id"""
    done: int
    """items submitted, of all kinds"""
    open: int
    """items that the labeler has been given and not submitted"""
    seconds: float | None
    """median time on an item of work"""
    per_hour: float
    """items submitted in the last hour, or at that pace since the first was given"""
    gold: Share
    """pairs of gold items that are right"""
    golds: int
    """gold items submitted"""
    repeats: Share
    """pairs on which the labeler agrees with the own earlier ranking of the same item"""
    too_fast: int
    """items of work submitted faster than they can be read"""
    agreement: Agreement
    """with the others, on the items of this labeler"""
    left_out: str | None
    """why nothing of the labeler is exported; None when it is"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where the labelling stands."""

    labelers: tuple[LabelerProgress, ...]
    """everybody who was given something"""
    items: int
    """items of work"""
    wanted: int
    """answers that the items want in all"""
    given: int
    """how many of those there are, which count"""
    per_hour: float
    """items submitted in the last hour by all"""
    agreement: Agreement
    """of all who count"""
    use_cases: Mapping[str, Agreement]
    """the same by use case, where prompts have one"""
    adjudication: tuple[str, ...]
    """ids of items that labelers disagree on, and one more has to rank"""
    unranked: int
    """answers that say why an item cannot be ranked"""


def wanted(item: Item, config: LabelConfig) -> int:
    """How many answers an item wants; a demonstration is written once."""
    return config.overlap if item.task == "rank" else 1


def too_fast(state: State, assignment: Assignment, config: LabelConfig) -> bool:
    """Whether an item of work was ranked in less time than its words take to read."""
    answer = assignment.answer
    if not assignment.submitted or not config.words_per_minute or answer is None or answer.cannot is not None:
        return False
    return _seconds(assignment) < state.words[assignment.item.id] / config.words_per_minute * 60


def gold_share(state: State, labeler: str) -> tuple[Share, int]:
    """How much of a labeler's gold items is right, and how many those are. What "cannot be ranked" is all wrong."""
    golds = [one for one in state.given_to(labeler) if one.use == "gold" and one.submitted]
    credit = [
        pair_credit(one.item.ranks, ranks) if (ranks := one.ranks) else (0.0, pair_credit(one.item.ranks, one.order)[1])
        for one in golds
        if one.item.ranks
    ]
    return _share(credit), len(golds)


def left_out(state: State, config: LabelConfig) -> dict[str, str]:
    """Labelers of whom nothing counts, with the reason."""
    found = dict.fromkeys(config.leave_out, "by label.leave_out") | state.left_out
    for labeler in list(state.of_labeler):
        share, golds = gold_share(state, labeler)
        if labeler not in found and golds >= MIN_GOLDS and share.value is not None and share.value < config.min_gold:
            found[labeler] = f"{share.value:.0%} of gold pairs are right, below label.min_gold = {config.min_gold:.0%}"
    return found


def refusal(state: State, assignment: Assignment, out: Mapping[str, str], config: LabelConfig) -> str | None:
    """Why a submitted answer does not count; None when it does. `out` are the labelers left out."""
    if (reason := out.get(assignment.labeler)) is not None:
        return f"labeler left out: {reason}"
    if too_fast(state, assignment, config):
        words = state.words[assignment.item.id]
        return f"too fast: {_seconds(assignment):.0f} s for {words} words"
    return None


def counted(state: State, item: Item, out: Mapping[str, str], config: LabelConfig) -> list[Assignment]:
    """The submitted answers to an item that count as work, the oldest assignment first."""
    return [one for one in state.work(item) if one.submitted and refusal(state, one, out, config) is None]


def disputed(state: State, item: Item, out: Mapping[str, str], config: LabelConfig) -> bool:
    """Whether the labelers of an item agree on less of it than the bound, so that one more has to rank it."""
    if config.overlap < 2 or item.use != "work" or item.task != "rank":
        return False
    answers = counted(state, item, out, config)
    share = _share(_credit(answers))
    return len(answers) >= config.overlap and share.value is not None and share.value < config.adjudicate_below


def agreement(groups: Iterable[Sequence[Assignment]], labeler: str | None = None) -> Agreement:
    """How far answers agree that are grouped by item; with `labeler`, only on the labeler's items and pairs."""
    both = [group for group in groups if labeler is None or any(one.labeler == labeler for one in group)]
    rankings = [[ranks for one in group if (ranks := one.ranks)] for group in both]
    units = [unit for group in rankings if group for unit in zip(*map(_places, group), strict=True)]
    return Agreement(
        pairs=_share(c for group in both for c in _credit(group, labeler)), alpha=krippendorff_alpha(units)
    )


def krippendorff_alpha(units: Iterable[Sequence[int]]) -> float | None:
    """Krippendorff's alpha with the ordinal metric (2011, Computing Krippendorff's Alpha-Reliability).

    A unit has the values that its observers gave it; those with one alone say nothing. None when nothing can differ.
    """
    paired = [unit for unit in units if len(unit) > 1]
    values, codes = np.unique([value for unit in paired for value in unit], return_inverse=True)
    if len(values) < 2:
        return None
    rows = np.repeat(np.arange(len(paired)), [len(unit) for unit in paired])
    counts = np.zeros((len(paired), len(values)))
    np.add.at(counts, (rows, codes), 1)
    per_pair = counts / (counts.sum(axis=1, keepdims=True) - 1)
    coincidences = counts.T @ per_pair - np.diag(per_pair.sum(axis=0))
    totals = counts.sum(axis=0)
    # The distance of two values is how many lie between them, their own halves included.
    middles = np.cumsum(totals) - totals / 2
    distance = (middles[:, None] - middles[None, :]) ** 2
    observed = (coincidences * distance).sum()
    expected = (np.outer(totals, totals) * distance).sum() / (totals.sum() - 1)
    return float(1 - observed / expected)


def pace(state: State, labeler: str, now: float) -> tuple[int, float]:
    """(items submitted, items per hour) of a labeler."""
    given = list(state.given_to(labeler))
    return sum(one.submitted for one in given), _pace(given, now)


def measure(state: State, config: LabelConfig, now: float) -> Progress:
    """Where everything stands at `now`, in seconds since the epoch."""
    out = left_out(state, config)
    work = [item for item in state.items.values() if item.use == "work"]
    answers = {item.id: counted(state, item, out, config) for item in work}
    ranked = {item.id: answers[item.id] for item in work if item.task == "rank"}
    cases = dict.fromkeys(item.use_case for item in work if item.use_case)
    return Progress(
        labelers=tuple(_labeler(state, labeler, config, out, ranked, now) for labeler in list(state.of_labeler)),
        items=len(work),
        wanted=sum(wanted(item, config) for item in work),
        given=sum(min(len(answers[item.id]), wanted(item, config)) for item in work),
        per_hour=_pace(state.assignments.values(), now),
        agreement=agreement(ranked.values()),
        use_cases={
            case: agreement(ranked[item.id] for item in work if item.use_case == case and item.id in ranked)
            for case in cases
        },
        adjudication=tuple(
            item.id for item in work if disputed(state, item, out, config) and not adjudicated(state, item, out, config)
        ),
        unranked=sum(1 for group in answers.values() for one in group if one.answer and one.answer.cannot is not None),
    )


def adjudicated(state: State, item: Item, out: Mapping[str, str], config: LabelConfig) -> bool:
    """Whether one more labeler has ranked an item that was disputed."""
    return any(
        one.use == "adjudication" and one.submitted and refusal(state, one, out, config) is None
        for one in state.given(item)
    )


def _labeler(
    state: State,
    labeler: str,
    config: LabelConfig,
    out: Mapping[str, str],
    ranked: Mapping[str, list[Assignment]],
    now: float,
) -> LabelerProgress:
    given = list(state.given_to(labeler))
    work = [one for one in given if one.use == "work" and one.submitted]
    first = {one.item.id: one.ranks for one in given if one.use == "work"}
    again = [(first[one.item.id], one.ranks) for one in given if one.use == "repeat"]
    gold, golds = gold_share(state, labeler)
    done, per_hour = pace(state, labeler, now)
    return LabelerProgress(
        labeler=labeler,
        done=done,
        open=len(given) - done,
        seconds=median(one.seconds for one in work) if work else None,
        per_hour=per_hour,
        gold=gold,
        golds=golds,
        repeats=_share(pair_credit(a, b) for a, b in again if a and b),
        too_fast=sum(too_fast(state, one, config) for one in work),
        agreement=agreement((ranked[one.item.id] for one in work if one.item.id in ranked), labeler),
        left_out=out.get(labeler),
    )


def _seconds(assignment: Assignment) -> float:
    """How long a labeler worked on what was submitted: as the page says, and no longer than it was there."""
    return min(assignment.seconds, assignment.changed - assignment.given)


def _credit(answers: Sequence[Assignment], labeler: str | None = None) -> list[tuple[float, int]]:
    """(agreements, pairs) of each two rankings of an item, one of them by `labeler` where that is given."""
    ranked = [(one.labeler, ranks) for one in answers if (ranks := one.ranks)]
    return [
        _pair_credit(a, b)
        for k, (one, a) in enumerate(ranked)
        for other, b in ranked[:k]
        if labeler is None or labeler in (one, other)
    ]


def _share(credit: Iterable[tuple[float, int]]) -> Share:
    agreed, pairs = 0.0, 0
    for right, count in credit:
        agreed, pairs = agreed + right, pairs + count
    return Share(value=agreed / pairs if pairs else None, count=pairs)


@lru_cache(maxsize=2**14)
def _places(ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Twice the middle place of each completion, so that those tied share theirs, whatever others tie."""
    return tuple(sum((rank < own) * 2 + (rank == own) for rank in ranks) - 1 for own in ranks)


def _pace(given: Iterable[Assignment], now: float) -> float:
    """Items submitted in the last hour; of less than an hour, at that pace."""
    given = list(given)
    if not given:
        return 0.0
    elapsed = min(max(now - min(one.given for one in given), _MIN_PACE_S), _HOUR_S)
    return sum(one.submitted and now - one.changed <= elapsed for one in given) / elapsed * _HOUR_S
