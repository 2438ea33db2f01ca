"""Prompts and demonstrations from JSONL files, and the endless order in which a run goes through prompts."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from actors.chat import TextEncoding
from reward_server.preferences.records import read_records, row_conversation, row_id, row_text
from reward_server.schema import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A conversation that a reply is wanted to."""

    id: str
    """unique in its file"""
    messages: tuple[Message, ...]
    """the conversation, which ends with a user message"""
    reference: str | None
    """a person's reply to it, where one is known"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A conversation with the reply that a person gave."""

    id: str
    """unique in its file"""
    prompt: tuple[Message, ...]
    """the conversation, which ends with a user message"""
    response: str
    """the reply to learn"""
    group: str | None = None
    """the instruction it was made of, where several demonstrations were; they stay in one split"""


class _Named(Protocol):
    @property
    def id(self) -> str: ...


Record = TypeVar("Record", bound=_Named)


def read_prompts(path: str | Path, max_bad_rows: int = 0) -> list[Prompt]:
    """Read rows {"id"?: str, "prompt": str | [messages], "reference"?: str}.

    Raises RecordError (file:line, reason, remedy) for what `read_records` refuses, and for an id used twice.
    """

    def parse(row: dict[str, Any], line_number: int) -> Prompt:
        reference = row_text(row, "reference") if row.get("reference") is not None else None
        return Prompt(id=row_id(row, line_number), messages=row_conversation(row), reference=reference)

    return _read_unique(path, parse, max_bad_rows)


def read_demonstrations(path: str | Path, max_bad_rows: int = 0) -> list[Demonstration]:
    """Read rows {"id"?: str, "prompt": str | [messages], "response": str, "group"?: str}. Raises as `read_prompts`."""

    def parse(row: dict[str, Any], line_number: int) -> Demonstration:
        return Demonstration(
            id=row_id(row, line_number),
            prompt=row_conversation(row),
            response=row_text(row, "response"),
            group=row_text(row, "group") if row.get("group") is not None else None,
        )

    return _read_unique(path, parse, max_bad_rows)


def _read_unique(path: str | Path, parse: Callable[[dict[str, Any], int], Record], max_bad_rows: int) -> list[Record]:
    lines: dict[str, int] = {}

    def parse_once(row: dict[str, Any], line_number: int) -> Record:
        record = parse(row, line_number)
        if record.id in lines:
            raise ValueError(f"id {record.id!r} was used in line {lines[record.id]}; give each row its own")
        lines[record.id] = line_number
        return record

    return read_records(path, parse_once, max_bad_rows)


def check_prompts(prompts: Sequence[Prompt], encoding: TextEncoding, max_prompt_tokens: int) -> None:
    """Encode every prompt, so that one that cannot be sampled from is found before anything heavy starts.

    Raises ValueError that names the first five bad prompts by id.
    """
    bad: list[str] = []
    for prompt in prompts:
        try:
            encode_prompt(prompt, encoding, max_prompt_tokens)
        except ValueError as error:
            bad.append(str(error))
    if bad:
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(f"{len(bad)} of {len(prompts)} prompts cannot be used: {'; '.join(bad[:5])}{more}")


def encode_prompt(prompt: Prompt, encoding: TextEncoding, max_prompt_tokens: int) -> list[int]:
    """Encode one prompt. Raises ValueError that names it when it is too long or the encoding refuses it."""
    try:
        ids = encoding.prompt(prompt.messages)
    except ValueError as error:
        raise ValueError(f"prompt {prompt.id!r}: {error}") from error
    if len(ids) > max_prompt_tokens:
        raise ValueError(
            f"prompt {prompt.id!r} has {len(ids)} tokens, more than the {max_prompt_tokens} allowed; "
            "remove or shorten it, or raise max_prompt_tokens"
        )
    return ids


def stable_hash(*parts: object) -> int:
    """Hash parts with a plain text form to 63 bits, the same in every process and every version of Python."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Shuffle:
    """An endless sequence of the positions 0..size-1, shuffled anew each epoch.

    A pure function of (size, seed, n): resuming it needs no state but the number n.
    """

    size: int
    """how many items there are"""
    seed: int
    """seed of the run"""

    def __getitem__(self, n: int) -> tuple[int, int]:
        """Return (position of the n-th item, epoch)."""
        epoch, offset = divmod(n, self.size)
        return _order(self.size, self.seed, epoch)[offset], epoch


@lru_cache(maxsize=8)
def _order(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(stable_hash("order", seed, epoch)).shuffle(order)
    return tuple(order)


class PromptStream:
    """The endless order of a run's prompts: ticket number -> (prompt, epoch). Has no cursor."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Take prompts in the order of their file. Raises ValueError when there is none."""
        if not prompts:
            raise ValueError("there is no prompt to sample from; give a prompts file with at least one row")
        self._prompts = tuple(prompts)
        self._shuffle = Shuffle(size=len(prompts), seed=seed)

    def __getitem__(self, number: int) -> tuple[Prompt, int]:
        position, epoch = self._shuffle[number]
        return self._prompts[position], epoch

    @property
    def fingerprint(self) -> str:
        """Identify prompts, order and seed: a run must not be resumed with another fingerprint."""
        texts = [(prompt.id, [(m.role, m.content) for m in prompt.messages]) for prompt in self._prompts]
        return f"{stable_hash(self._shuffle.seed, texts):016x}"
