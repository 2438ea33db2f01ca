"""Prompts and demonstrations from data files, and the endless order in which a run goes through prompts."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from typing_extensions import TypeVar

from actors.chat import TextEncoding
from reward_server.preferences.forms import row_demonstration, row_prompt, row_text
from reward_server.preferences.records import read_records, row_names
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
    user: str | None = None
    """who wrote it, where that is known"""
    use_case: str | None = None
    """what it is for, such as "summarization", where that is known"""


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


UsedPrompt = TypeVar("UsedPrompt", default=Prompt)
UsedDemonstration = TypeVar("UsedDemonstration", default=Demonstration)


def read_prompts(
    path: str | Path, max_bad_rows: int = 0, use: Callable[[Prompt], UsedPrompt] = lambda one: one
) -> list[UsedPrompt]:
    """Read rows {"id"?, "prompt": str | [messages], "reference"?, "user"?, "use_case"?}; other forms are in forms.py.

    Returns what `use` makes of each, which raises ValueError to refuse one. Raises RecordError (file:line, reason,
    remedy of every bad row) for what `read_records` refuses, and for an id used twice.
    """
    name = row_names()

    def parse(row: dict[str, Any], line_number: int) -> UsedPrompt:
        reference = row_text(row, "reference") if "reference" in row else None
        own, (user, use_case) = name(row, line_number), row_origin(row)
        return use(Prompt(id=own, messages=row_prompt(row), reference=reference, user=user, use_case=use_case))

    return read_records(path, parse, max_bad_rows)


def row_origin(row: dict[str, Any]) -> tuple[str | None, str | None]:
    """Read the optional "user" (a text or a number) and "use_case" of a prompt's row. Raises ValueError."""
    user = row.get("user")
    if isinstance(user, int) and not isinstance(user, bool):
        user = str(user)
    user = row_text({"user": user}, "user") if "user" in row else None
    return user, row_text(row, "use_case") if "use_case" in row else None


def read_demonstrations(
    path: str | Path, max_bad_rows: int = 0, use: Callable[[Demonstration], UsedDemonstration] = lambda one: one
) -> list[UsedDemonstration]:
    """Read rows {"id"?: str, "prompt": str | [messages], "response": str, "group"?: str}, as `read_prompts` does."""
    name = row_names()

    def parse(row: dict[str, Any], line_number: int) -> UsedDemonstration:
        own, (prompt, response) = name(row, line_number), row_demonstration(row)
        group = row_text(row, "group") if "group" in row else None
        return use(Demonstration(id=own, prompt=prompt, response=response, group=group))

    return read_records(path, parse, max_bad_rows)


def fitting(encoding: TextEncoding, max_prompt_tokens: int) -> Callable[[Prompt], Prompt]:
    """What `read_prompts` is to `use`: refuses a prompt that is too long, or that the encoding refuses."""

    def check(prompt: Prompt) -> Prompt:
        encode_prompt(prompt, encoding, max_prompt_tokens)
        return prompt

    return check


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
