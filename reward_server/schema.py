"""The wire types of a score: text, never tokens, as policy and reward model may differ in tokenizer; and a pause."""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

Number = Annotated[FiniteFloat, Field(strict=True)]
Identifier = Annotated[str, Field(min_length=1, max_length=300)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """A run waits for something without which it cannot go on: scores, or room on a disk."""

    since: float
    """seconds since the epoch"""
    reason: str
    """why the last attempt failed"""


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Message(_Wire):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str
    """What is said, without any control token of a chat template."""


class ScoreRequest(_Wire):
    """One response to be scored."""

    id: Identifier
    """Names the response. A retry carries the same id, and counts once."""
    prompt: tuple[Message, ...] = Field(min_length=1)
    """The conversation up to the response."""
    response: str
    """The assistant's reply, without its end-of-turn token. May be empty when the model stopped at once."""
    ended: bool = Field(strict=True)
    """True when the response ended by itself; False when it was truncated, and is encoded without an EOS."""


class ScoreReply(_Wire):
    """The score of one response."""

    id: Identifier
    """The request's id."""
    score: Number
    """What the source says of the response: finite, on the source's own scale."""
    parts: dict[str, Number] = {}
    """The score of every source that went into a mix, before weighting, by source name."""


class ScoreBatch(_Wire):
    """The body of POST /score."""

    requests: list[ScoreRequest] = Field(min_length=1)
    """What to score; every id once."""

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Self:
        seen = set[str]()
        for request in self.requests:
            if request.id in seen:
                raise ValueError(
                    f"request id {request.id!r} occurs more than once in the batch; give each response its own id"
                )
            seen.add(request.id)
        return self


class ScoreBatchReply(_Wire):
    """The reply of POST /score."""

    replies: list[ScoreReply]
    """One reply per request, in the order of the requests."""
