"""How well text is predicted: bits per byte of pretraining documents."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.evaluation.task import Answer, Likelihood, Logprob, Metric, Request, Task, Verdict
from reward_server.preferences.forms import row_text
from reward_server.preferences.records import read_records, row_names


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text."""

    id: str
    text: str


class BitsPerByte(Task[Document]):
    """`bits_per_byte`: -log2 p(text) over its bytes in UTF-8, which compares models of different tokenizers.

    A document is read in windows that know nothing of one another, so what is said is a little more than with a longer
    context, for every model alike.
    """

    name = "bits_per_byte"
    claim = "alignment tax"

    def __init__(
        self, items: Sequence[Document], examples: Sequence[Document] = (), *, window_bytes: int = 4096
    ) -> None:
        """`window_bytes` of text are asked about at once; as tokens they are no more, and about a quarter."""
        super().__init__(items, examples)
        self._window_bytes = window_bytes

    @classmethod
    def read(cls, path: Path, max_bad_rows: int = 0) -> list[Document]:
        name = row_names()

        def parse(row: dict[str, Any], line: int) -> Document:
            return Document(id=name(row, line), text=row_text(row, "text").strip())

        return read_records(path, parse, max_bad_rows)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {"bits_per_byte": Metric(better="lower")}

    def requests(self, item: Document) -> Sequence[Request]:
        return [Likelihood(context="", continuation=one) for one in windows(item.text, self._window_bytes)]

    async def judge(self, item: Document, answers: Sequence[Answer]) -> Verdict:
        nats = -sum(answer.total for answer in answers if isinstance(answer, Logprob))
        return {"bits_per_byte": (nats / math.log(2), float(len(item.text.encode())))}


def windows(text: str, most: int) -> list[str]:
    """Cut a text into windows of at most `most` bytes, before spaces where it has any; none is blank.

    A window is longer only where more than that many bytes of spaces stand together.
    """
    found, begin, end, size = [], 0, 0, 0
    for piece in re.findall(r"\s*\S+", text):
        for part in [piece] if len(piece.encode()) <= most else piece:
            added = len(part.encode())
            if size + added > most and text[begin:end].strip():
                found.append(text[begin:end])
                begin, size = end, 0
            end, size = end + len(part), size + added
    return [*found, text[begin:]]
