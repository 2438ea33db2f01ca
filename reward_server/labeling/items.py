"""What is labelled, and what labelers answer: the types of the log and of the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from reward_server.labeling.config import LabelConfig
from reward_server.preferences.labeling import Comparison
from reward_server.preferences.sheets import dense
from reward_server.schema import Message

MAX_K = 9
"""Most completions of an item: keys 1 to 9 rank them."""
_MAX_REASON = 1000

Shown = TypeVar("Shown")
Rank = Annotated[int, Field(ge=1, le=MAX_K)]
Use = Literal["work", "training", "gold", "repeat", "adjudication"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Item(_Record):
    """What is to be labelled: K completions to rank, or a prompt to write a demonstration for."""

    id: str = Field(min_length=1, max_length=90)
    """Names it in its log; with a labeler's id behind it, it names a comparison."""
    task: Literal["rank", "demonstration"] = "rank"
    """What labelers do with it."""
    use: Literal["work", "training", "gold"] = "work"
    """To have it ranked; to teach; to measure the labeler."""
    prompt: tuple[Message, ...] = Field(min_length=1)
    """The conversation up to the completions."""
    responses: tuple[str, ...] = ()
    """K completions; none for a demonstration."""
    ended: tuple[bool, ...] = ()
    """K flags: the completion ended by itself, rather than being truncated."""
    ranks: tuple[int, ...] | None = None
    """The right answer of training and gold: K ranks, 0 for the best, equal ones for a tie."""
    explanation: str | None = None
    """Why a training item's answer is right."""
    control: bool = True
    """Drawn at random, rather than for what reward models say of it."""
    priority: FiniteFloat = 0.0
    """The highest is given first."""
    use_case: str | None = None
    """What the prompt is for."""
    group: str | None = None
    """What it belongs to; None when it stands alone."""

    @classmethod
    def of(cls, comparison: Comparison, use: Literal["work", "training", "gold"] = "work", **more: object) -> Self:
        """The item of a comparison; for training and gold its ranks are the right answer. Raises ValueError."""
        known = comparison.ranks and dense(comparison.ranks)
        return cls.model_validate(
            {
                "id": comparison.id,
                "use": use,
                "prompt": comparison.prompt,
                "responses": comparison.responses,
                "ended": comparison.ended,
                "ranks": None if use == "work" else known,
                "use_case": comparison.use_case,
                "group": comparison.group,
            }
            | more
        )

    @model_validator(mode="after")
    def _fits_its_task(self) -> Self:
        count = len(self.responses)
        if self.task == "demonstration":
            if count or self.ended or self.ranks or self.use != "work":
                raise ValueError(f"item {self.id!r} asks for a demonstration: it has a prompt and nothing else")
            return self
        if not 2 <= count <= MAX_K:
            raise ValueError(f"item {self.id!r} has {count} completions; 2 to {MAX_K} can be ranked on the page")
        if len(self.ended) != count or (self.ranks is not None and len(self.ranks) != count):
            raise ValueError(f"item {self.id!r} has {count} completions; give each one rank and one flag `ended`")
        if self.use != "work" and self.ranks is None:
            raise ValueError(f"item {self.id!r} is for {self.use}, and has no ranks: rank it")
        return self


class Rating(_Record):
    """What a labeler says of one output alone."""

    quality: int | None = Field(default=None, ge=1, le=7)
    """1 (worst) to 7 (best); None before it is given."""
    flags: tuple[str, ...] = ()
    """Names of what was marked."""


class Answer(_Record):
    """What a labeler gives, whole or not yet. All of it is in the order in which the outputs are shown."""

    ratings: tuple[Rating, ...] = Field(default=(), max_length=MAX_K)
    """One for each output, or none at all."""
    ranks: tuple[Rank | None, ...] = Field(default=(), max_length=MAX_K)
    """One for each output, or none at all: 1 is best, equal ones are a tie, None is not given yet."""
    cannot: str | None = Field(default=None, max_length=_MAX_REASON)
    """Why it cannot be ranked, or no demonstration written."""
    text: str | None = None
    """A demonstration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """An item that was given to a labeler, with what the labeler has made of it so far."""

    id: str
    """unique in its log"""
    item: Item
    """what was given"""
    labeler: str
    """the id of whom it was given to"""
    use: Use
    """what it is for"""
    order: tuple[int, ...]
    """for each place on the page the index of its completion in the item"""
    since: int
    """number of the event that gave, submitted or reopened it"""
    given: float
    """when it was given, in seconds since the epoch"""
    changed: float
    """when it was changed last, in seconds since the epoch"""
    version: int = 0
    """number of changes so far"""
    answer: Answer | None = None
    """the draft, or what was submitted"""
    seconds: float = 0.0
    """how long the labeler has worked on it, in seconds"""
    submitted: bool = False
    """whether the labeler is done with it"""
    guidelines: str | None = None
    """version of the guidelines at the last change"""
    page: str | None = None
    """version of the page at the last change"""
    ranks: tuple[int, ...] | None = None
    """what was submitted, in the order of the item's completions: 0 for the best, without gaps; None unless ranked"""

    @property
    def responses(self) -> tuple[str, ...]:
        """The completions in the order in which they are shown."""
        return tuple(self.item.responses[index] for index in self.order)

    def in_order(self, shown: Sequence[Shown]) -> list[Shown]:
        """K things that are in the order shown, in the order of the item's completions."""
        return [shown[self.order.index(index)] for index in range(len(self.order))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """What a labeler is told after a training item."""

    correct: bool
    """whether the ranking is the right one"""
    ranks: tuple[int, ...]
    """the right one: K ranks in the order shown, 1 for the best"""
    explanation: str | None
    """why"""


class Conflict(Exception):
    """An answer that was made on an older version than there is: another tab has changed it. Carries the newest."""

    def __init__(self, assignment: Assignment) -> None:
        super().__init__(f"assignment {assignment.id} was changed in another window")
        self.assignment = assignment


def fits(answer: Answer, item: Item, config: LabelConfig) -> None:
    """Raise ValueError, saying why, for an answer that cannot be one of the item's, whole or not."""
    count = len(item.responses)
    for name, values in (("ratings", answer.ratings), ("ranks", answer.ranks)):
        if values and len(values) != count:
            raise ValueError(f"{name} has {len(values)} entries for {count} outputs: give each one, or none at all")
    unknown = {name for rating in answer.ratings for name in rating.flags} - set(config.flags)
    if unknown:
        raise ValueError(f"flags has {sorted(unknown)}, and there are {', '.join(config.flags) or 'none'}")
    if answer.text is not None:
        if item.task == "rank":
            raise ValueError("text is for demonstrations, and these outputs are to be ranked")
        if len(answer.text) > config.limits.max_characters:
            raise ValueError(
                f"text has {len(answer.text)} characters, and {config.limits.max_characters} at most are taken"
            )


def complete(answer: Answer, item: Item, config: LabelConfig) -> None:
    """Raise ValueError, saying what is missing, for an answer that cannot be submitted yet."""
    fits(answer, item, config)
    if answer.cannot is not None:
        if not answer.cannot.strip():
            raise ValueError("say why it cannot be done")
        return
    if item.task == "demonstration":
        if not (answer.text or "").strip():
            raise ValueError("the demonstration is empty: write one, or say why it cannot be done")
        return
    missing = [n for n, rank in enumerate(answer.ranks or (None,) * len(item.responses), start=1) if rank is None]
    if missing:
        raise ValueError(f"without a rank: output {', '.join(map(str, missing))}")
    if config.quality:
        ratings = answer.ratings or (Rating(),) * len(item.responses)
        if missing := [n for n, rating in enumerate(ratings, start=1) if rating.quality is None]:
            raise ValueError(f"without a quality: output {', '.join(map(str, missing))}")
