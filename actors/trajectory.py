"""A trajectory: one prompt, one response, and everything about its sampling that training needs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from reward_server.schema import Message


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Ticket:
    """The right to sample one prompt for a batch that is to come."""

    number: int
    """position in the prompt stream; batch i of B prompts takes the numbers i*B .. i*B + B-1"""
    attempt: int
    """0, plus 1 each time the ticket was forfeited and issued again"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleKey:
    """The name of one sample for the whole of a run. A key is trained on at most once."""

    prompt_id: str
    """the prompt's id in its file"""
    epoch: int
    """how many times the prompts had been gone through when this one was drawn"""
    k: int
    """which of the prompt's samples, from 0"""
    attempt: int
    """0, plus 1 each time the sample was lost and asked for again"""

    def __str__(self) -> str:
        return f"{self.prompt_id}/{self.epoch}/{self.k}/{self.attempt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One response as the sampler made it. The tuples over response tokens have one length."""

    query_ids: tuple[int, ...]
    """[Q] token ids of the prompt, with the opening of the assistant's turn"""
    response_ids: tuple[int, ...]
    """[L] token ids of the response, with the EOS when it ended by itself"""
    logprobs: tuple[float, ...]
    """[L] behaviour log-probability of each response token, in nats"""
    versions: tuple[int, ...]
    """[L] version of the weights that sampled each response token"""
    ended: bool
    """True when the response ended with an EOS, False when it was cut off"""
    text: str
    """the response without its EOS and without special tokens"""

    def __post_init__(self) -> None:
        lengths = (len(self.response_ids), len(self.logprobs), len(self.versions))
        assert len(set(lengths)) == 1, f"response ids, logprobs and versions have lengths {lengths}"
        assert self.query_ids, "a completion needs at least one query token, which predicts its first token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """A scored completion, ready to be trained on."""

    key: SampleKey
    """its name"""
    prompt: tuple[Message, ...]
    """the conversation that was replied to"""
    completion: Completion
    """the response"""
    score: float
    """the reward model's score after the missing-EOS rule; the KL penalty is not in it"""
    parts: Mapping[str, float]
    """what the score was made of, by source; "raw_score" is the score before the missing-EOS rule"""

    @property
    def oldest_version(self) -> int:
        """The version that the staleness of this trajectory counts from."""
        return min(self.completion.versions)

    def to_json(self) -> dict[str, Any]:
        """Return the trajectory as JSON values, for a checkpoint."""
        return {
            "key": asdict(self.key),
            "prompt": [message.model_dump() for message in self.prompt],
            "completion": asdict(self.completion),
            "score": self.score,
            "parts": dict(self.parts),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Trajectory":
        """Make the trajectory that `to_json` described."""
        completion = dict(values["completion"])
        for name in ("query_ids", "response_ids", "logprobs", "versions"):
            completion[name] = tuple(completion[name])
        return cls(
            key=SampleKey(**values["key"]),
            prompt=tuple(Message.model_validate(message) for message in values["prompt"]),
            completion=Completion(**completion),
            score=values["score"],
            parts=dict(values["parts"]),
        )


class BufferClosed(Exception):
    """The run is over: there are no more tickets and no more batches."""


class StaleTrajectories(RuntimeError):
    """Sampled with weights that are too old, or too new, to be trained on."""


class TrajectoryBuffer(Protocol):
    """What those who sample need of `learner.data.buffer.Buffer`, which documents it."""

    async def admit(self, n: int, holder: str) -> list[Ticket]: ...
    def generated(self, ticket: Ticket) -> None: ...
    def put(self, ticket: Ticket, trajectories: Sequence[Trajectory]) -> None: ...
    def forfeit(self, ticket: Ticket, reason: str) -> None: ...
    def fail(self, error: BaseException) -> None: ...
