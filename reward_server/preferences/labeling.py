"""Comparisons of completions: reading and writing them, and ranking completions with a simulated labeler."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import TypeVar
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from reward_server.config import LabelerConfig
from reward_server.functions import call_function, load_function
from reward_server.preferences.forms import has_prompt, row_prompt, row_text, side_of_pair
from reward_server.preferences.records import RecordError, json_lines, read_records, row_names, write_whole
from reward_server.preferences.trees import is_tree, sibling_groups
from reward_server.schema import Message

VADER = "simulated:vader"
"""Name of the labeler that likes positive sentiment."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One prompt with K completions, ranked or to be ranked; one alone, or all tied, says nothing of any other."""

    id: str
    """unique in its file"""
    prompt: tuple[Message, ...]
    """the conversation up to the completions"""
    responses: tuple[str, ...]
    """the K completions"""
    ended: tuple[bool, ...]
    """K flags: the completion ended by itself, rather than being truncated"""
    ranks: tuple[int, ...] | None
    """K ranks, 0 for the best, equal ones for a tie; None before anybody ranked them"""
    labeler: str | None
    """who ranked them"""
    group: str | None = None
    """what it belongs to, such as a tree of conversations; a group is never split between training and held out"""
    seconds: float | None = None
    """how long the labeler worked on it, in seconds"""
    control: bool | None = None
    """drawn at random, where others were chosen because reward models are unsure of them; None where nobody chose"""
    qualities: tuple[int | None, ...] | None = None
    """K qualities of the completions, each on its own: 1 (worst) to 7 (best), or None"""
    flags: tuple[tuple[str, ...], ...] | None = None
    """K lists of names, such as hallucination, of what the labeler found in a completion"""
    guidelines: str | None = None
    """version of the instructions that the labeler had"""
    page: str | None = None
    """version of the page that the labeler worked on"""
    use_case: str | None = None
    """what the prompt is for"""

    def __post_init__(self) -> None:
        """Raise ValueError unless everything has K entries, K is at least 1, and ranks are not negative."""
        count = len(self.responses)
        if count < 1:
            raise ValueError("a comparison needs completions, this one has none")
        if len(self.ended) != count or (self.ranks is not None and len(self.ranks) != count):
            given = len(self.ended) if self.ranks is None else len(self.ranks)
            raise ValueError(f'"ranks" has {given} entries for {count} completions; give each completion one')
        if self.ranks is not None and min(self.ranks) < 0:
            raise ValueError(f'"ranks" must be 0 (best) or more, not {list(self.ranks)}')
        for name, value in (("qualities", self.qualities), ("flags", self.flags)):
            if value is not None and len(value) != count:
                raise ValueError(f'"{name}" has {len(value)} entries for {count} completions; give each completion one')


Used = TypeVar("Used", default=Comparison)


def read_comparisons(
    path: str | Path, max_bad_rows: int = 0, use: Callable[[Comparison], Used] = lambda one: one
) -> list[Used]:
    """Read a data file of comparisons, of pairs, or of ranked trees; returns what `use` makes of each.

    A comparison is {"id"?, "prompt": str | [messages], "completions": [{"text", "ended"?}], "ranks"?,
    "labeler"?, "group"?} and, by their names, the other fields of `Comparison`. A pair is {"chosen", "rejected"}: two
    whole conversations that differ in the last turn (see forms.py), or two replies to a prompt beside them. A tree (see
    trees.py) gives a comparison for every message with two ranked replies or more; the other replies are left out, with
    a warning that counts them. Raises RecordError with file:line and reason of every bad row; `use` raises ValueError
    to refuse one.
    """
    name, left_out = row_names(), 0

    def parse(row: dict[str, Any], line_number: int) -> list[Used]:
        nonlocal left_out
        own, more = name(row, line_number), 0
        if is_tree(row):
            comparisons, more = _tree(own, row)
        else:
            comparisons = [_pair(own, row) if "chosen" in row else _comparison(own, row)]
        found = [use(comparison) for comparison in comparisons]
        left_out += more
        return found

    found = [comparison for row in read_records(path, parse, max_bad_rows) for comparison in row]
    if not found:
        raise RecordError(f"{path}: no message in it has two ranked replies, so there is nothing to compare")
    if left_out:
        log.warning(
            "%s: %d comparisons; left out %d replies without a rank, or without a ranked sibling",
            path,
            len(found),
            left_out,
        )
    return found


def write_comparisons(path: str | Path, comparisons: Iterable[Comparison]) -> None:
    """Write comparisons so that `read_comparisons` reads them back; a file appears whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, json_lines(map(comparison_row, comparisons)))


def comparison_row(comparison: Comparison) -> dict[str, Any]:
    """A comparison as a row that `read_comparisons` reads; what is None is left out."""
    row: dict[str, Any] = {
        "id": comparison.id,
        "prompt": [message.model_dump() for message in comparison.prompt],
        "completions": [
            {"text": text, "ended": ended} for text, ended in zip(comparison.responses, comparison.ended, strict=True)
        ],
    }
    more = {name: getattr(comparison, name) for name in ("ranks", "labeler", "group", *_TOLD)}
    return row | {name: value for name, value in more.items() if value is not None}


def _comparison(name: str, row: dict[str, Any]) -> Comparison:
    completions = row.get("completions")
    if not isinstance(completions, list):
        raise ValueError(
            f'a row has "prompt" and "completions", or "chosen" and "rejected"; this one has {sorted(row)}'
        )
    read = [_completion(number, completion) for number, completion in enumerate(completions)]
    ranks, labeler = row.get("ranks"), row.get("labeler")
    if ranks is not None and not (isinstance(ranks, list) and all(type(rank) is int for rank in ranks)):
        raise ValueError(f'"ranks" must be a list of integers, 0 for the best, not {ranks!r:.60}')
    if labeler is not None and not isinstance(labeler, str):
        raise ValueError(f'"labeler" must be a string, not {labeler!r:.60}')
    return Comparison(
        id=name,
        prompt=row_prompt(row),
        responses=tuple(text for text, _ in read),
        ended=tuple(ended for _, ended in read),
        ranks=None if ranks is None else tuple(ranks),
        labeler=labeler,
        group=row_text(row, "group") if row.get("group") is not None else None,
        **_told(row),
    )


def _told(row: dict[str, Any]) -> dict[str, Any]:
    """What labelers told beside the ranks, by the names of fields. Raises ValueError."""
    found = {name: row[name] for name in _TOLD if name in row}
    for name, value in found.items():
        fits, wanted = _TOLD[name]
        if not fits(value):
            raise ValueError(f'"{name}" must be {wanted}, not {value!r:.60}')
    lists = {"qualities": tuple, "flags": lambda value: tuple(map(tuple, value))}
    return {name: lists[name](value) if name in lists else value for name, value in found.items()}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


_TOLD: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seconds": (lambda x: type(x) in (int, float) and 0 <= x < math.inf, "a number of seconds, 0 or more"),
    "control": (lambda x: isinstance(x, bool), "true or false"),
    "qualities": (
        lambda x: _is_list(x, lambda quality: quality is None or (type(quality) is int and 1 <= quality <= 7)),
        "a list of integers from 1 to 7, or null",
    ),
    "flags": (lambda x: _is_list(x, lambda names: _is_list(names, _is_text)), "a list of lists of names"),
    "guidelines": (_is_text, "a text that is not blank"),
    "page": (_is_text, "a text that is not blank"),
    "use_case": (_is_text, "a text that is not blank"),
}
"""Optional fields of a row that are read as they are: what fits, and in words."""


def _tree(name: str, row: dict[str, Any]) -> tuple[list[Comparison], int]:
    """The comparisons of a tree, and how many replies of the assistant are in none of them."""
    found = sibling_groups(name, row)
    comparisons = [
        Comparison(
            id=group.name,
            prompt=group.prompt,
            responses=group.responses,
            ended=(True,) * len(group.responses),
            ranks=group.ranks,
            labeler=None,
            group=name,
        )
        for group in found
        if len(group.responses) > 1
    ]
    return comparisons, sum(g.unranked + (len(g.responses) == 1) for g in found)


def _completion(number: int, completion: Any) -> tuple[str, bool]:
    if isinstance(completion, dict):
        text, ended = completion.get("text"), completion.get("ended", True)
        if isinstance(text, str) and isinstance(ended, bool):
            return text, ended
    raise ValueError(f'completions.{number} must be {{"text": str, "ended": true or false}}, not {completion!r:.60}')


def _pair(name: str, row: dict[str, Any]) -> Comparison:
    asked = row_prompt(row) if has_prompt(row) else None
    prompt, chosen = side_of_pair(row, "chosen", asked)
    other_prompt, rejected = side_of_pair(row, "rejected", asked)
    if prompt != other_prompt:
        raise ValueError('"chosen" and "rejected" differ before their last turn; give them one prompt')
    return Comparison(
        id=name,
        prompt=prompt,
        responses=(chosen, rejected),
        ended=(True, True),
        ranks=(0, 1),
        labeler=None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Labeler:
    """A simulated labeler, which judges completions by their text; it is no person."""

    name: str
    """what comparisons record as their labeler"""
    caption: str
    """words that must stand wherever its verdicts are shown"""
    verdicts: Callable[[Sequence[str]], list[float]]
    """one number per response, higher is better"""
    tie_margin: float
    """verdicts at most this far apart are a tie"""

    def rank(self, responses: Sequence[str]) -> tuple[int, ...]:
        """Ranks of one prompt's responses: 0 is best, equal is a tie."""
        return rank_verdicts(self.verdicts(responses), self.tie_margin)


def load_labeler(config: LabelerConfig) -> Labeler:
    """Make the configured labeler: VADER's compound sentiment (Hutto and Gilbert 2014), in [-1, 1], or a function.

    Raises ValueError when its function cannot be found, and UserFunctionError when it fails on a text or breaks its
    contract, `(responses: list[str]) -> list[float]`: better now than after hours of training.
    """
    if config.name == VADER:
        verdicts, judge = partial(_sentiments, SentimentIntensityAnalyzer()), "VADER"
    else:
        verdicts, judge = partial(_calls, config.name, load_function(config.name)), config.name
    caption = f"simulated labeler ({judge})"
    labeler = Labeler(name=config.name, caption=caption, verdicts=verdicts, tie_margin=config.tie_margin)
    labeler.verdicts(["A short text."])
    return labeler


def _sentiments(vader: SentimentIntensityAnalyzer, responses: Sequence[str]) -> list[float]:
    return [vader.polarity_scores(response)["compound"] for response in responses]


def _calls(name: str, function: Callable[..., Iterable[Any]], responses: Sequence[str]) -> list[float]:
    return call_function(name, function, len(responses), list(responses))


def rank_verdicts(verdicts: Sequence[float], tie_margin: float) -> tuple[int, ...]:
    """Turn verdicts into ranks 0, 1, .. without gaps, the highest verdict first.

    A tie reaches `tie_margin` down from the best of the tie, so a chain of small steps does not tie its two ends.
    """
    ranks = [0] * len(verdicts)
    rank, best = -1, math.inf
    for index in sorted(range(len(verdicts)), key=lambda index: -verdicts[index]):
        if best - verdicts[index] > tie_margin:
            rank, best = rank + 1, verdicts[index]
        ranks[index] = rank
    return tuple(ranks)


def label(comparisons: Iterable[Comparison], labeler: Labeler) -> list[Comparison]:
    """The same comparisons, ranked by the labeler and signed with its name."""
    return [
        replace(comparison, ranks=labeler.rank(comparison.responses), labeler=labeler.name)
        for comparison in comparisons
    ]
