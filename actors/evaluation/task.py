"""A task: the items of a benchmark, what a model is asked about each, and how its answers are judged.

A metric's verdict on one item is a short vector that can be added up over items: for a mean (value, 1), for bits per
byte (bits, bytes), for BLEU the counts of n-grams. So every figure, whatever it is made of, is a function of a sum over
items, and has a bootstrap interval over items, also of the difference between two models.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from reward_server.schema import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """Asks for log p(continuation | context); an empty context stands for the beginning of a text."""

    context: str
    continuation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Asks for a text: what follows a prompt, or the reply to a conversation."""

    prompt: str | tuple[Message, ...]
    max_tokens: int
    stop: str | None = "\n"
    """a text where the answer is cut, if it gets there; the paper cuts at the first newline"""
    temperature: float = 0.0
    sample: int = 0
    """number of this one among several samples of the same prompt: another seed"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """The answer to a `Likelihood`."""

    total: float
    """log-probability of the continuation, nats"""
    tokens: int
    """of the continuation, at least 1"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer to a `Generation` of a conversation."""

    text: str
    """without spaces around it"""
    ended: bool
    """it ended by itself; False: it was cut at `max_tokens`"""


Request = Likelihood | Generation
Answer = Logprob | Reply | str
"""A generation's is a text, that of a conversation a `Reply`."""
Verdict = Mapping[str, tuple[float, ...]]
"""metric -> what the item adds to it"""


def ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """[.., 2] sums -> [..] the first over the second; NaN where the second is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A figure of a task."""

    better: Literal["higher", "lower", "neither"] = "higher"
    total: Callable[[NDArray[np.float64]], NDArray[np.float64]] = ratio
    """of the items' vectors added up, [.., k] -> [..]"""
    note: str = ""
    """what has to be known to read it, such as who judged"""


class Item(Protocol):
    """What every item has."""

    @property
    def id(self) -> str: ...  # unique in its task


ItemT = TypeVar("ItemT", bound=Item)
RowT = TypeVar("RowT")


class Task(ABC, Generic[ItemT]):
    """A benchmark with the items that are asked."""

    name: ClassVar[str]
    claim: ClassVar[str]
    """The claim of the paper that it measures, such as "alignment tax"."""
    version: ClassVar[int] = 1
    """Raised whenever prompts or verdicts change, so that figures of different ones are never mixed."""

    paper_shots: ClassVar[int] = 0
    """Examples that the paper gives with it few-shot; 0: none whatever is asked for."""
    path: Path | str = ""
    """The file, or hub id, that the items are from."""
    judged_by: str = ""
    """Name of the judge or classifier behind its verdicts, where there is one."""

    def __init__(self, items: Sequence[ItemT], examples: Sequence[ItemT] = ()) -> None:
        """`examples` come with their solution before each item, and are none of the items ("few-shot")."""
        self.items = items
        self.examples = examples

    @classmethod
    @abstractmethod
    def read(cls, path: Path, max_bad_rows: int = 0) -> list[ItemT]:
        """The items of a file, in its order. Raises RecordError with every bad row, or for no rows at all."""

    @classmethod
    def load(cls, path: Path, items: int | None, shots: int = 0, max_bad_rows: int = 0, **settings: Any) -> Self:
        """The task with `items` of the file's items (or all) and `shots` of the others as examples, evenly spread.

        `settings` are its own, such as its judge. Raises ValueError where the file has too few.
        """
        found = cls.read(path, max_bad_rows)
        if len(found) <= shots:
            raise ValueError(
                f"{path} has {len(found)} items, too few for {shots} examples and an item to ask: lower "
                "evaluation.shots, or give a larger file"
            )
        examples = spread(found, shots)
        taken = {one.id for one in examples}
        rest = [one for one in found if one.id not in taken]
        task = cls(spread(rest, items or len(rest)), examples, **settings)
        task.path = path
        return task

    @property
    @abstractmethod
    def metrics(self) -> Mapping[str, Metric]:
        """Its figures by name, the most important first."""

    @abstractmethod
    def requests(self, item: ItemT) -> Sequence[Request]:
        """What a model is asked about an item."""

    @abstractmethod
    async def judge(self, item: ItemT, answers: Sequence[Answer]) -> Verdict:
        """What the answers, in the order of the requests, add to each metric; a metric may be left out."""


def spread(rows: Sequence[RowT], count: int) -> Sequence[RowT]:
    """`count` of the rows at even distances, in order, or all when there are fewer: files are often sorted by kind."""
    if count >= len(rows):
        return rows
    return [rows[index * len(rows) // count] for index in range(count)]
