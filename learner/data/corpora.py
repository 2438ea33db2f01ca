"""What supervised training reads: demonstrations as examples, and pretraining text packed into full
sequences."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from actors.chat import ChatExample, TextEncoding
from actors.prompts import Shuffle, stable_hash
from reward_server.preferences.forms import row_text
from reward_server.preferences.records import read_records

Item = TypeVar("Item")


def read_texts(path: str | Path, max_bad_rows: int = 0) -> list[str]:
    """Read the documents of a data file of {"text": str} rows. Raises RecordError (file:line, reason, remedy)."""
    return read_records(path, lambda row, _line: row_text(row, "text"), max_bad_rows)


def split_held_out(
    items: Sequence[Item], key: Callable[[Item], str], fraction: float, seed: int
) -> tuple[list[Item], list[Item]]:
    """Split items into (train, held out), both in their order; about `fraction` of the keys are held out.

    Items with one key stay together, so that a duplicated document, or two demonstrations of one instruction, never
    leak. At least one key is held out unless `fraction` is 0. Raises ValueError when nothing would be left to train on.
    """
    keys = sorted({key(item) for item in items}, key=lambda name: (stable_hash("held out", seed, name), name))
    count = max(round(fraction * len(keys)), 1) if fraction > 0 else 0
    if count >= len(keys):
        raise ValueError(
            f"holding out {fraction:g} of {len(keys)} different items leaves none to train on; give more data"
        )
    held_out = set(keys[:count])
    return (
        [item for item in items if key(item) not in held_out],
        [item for item in items if key(item) in held_out],
    )


def pack(texts: Iterable[str], encoding: TextEncoding, sequence_tokens: int) -> Tensor:
    """Concatenate documents, each followed by the EOS, and cut them into full sequences, i32[N, sequence_tokens].

    What is left over at the end is dropped. Raises ValueError when the text does not fill one sequence.
    """
    assert sequence_tokens >= 2, sequence_tokens
    tokens = array("i")
    for text in texts:
        tokens.extend(encoding.document(text))
    count = len(tokens) // sequence_tokens
    if count == 0:
        raise ValueError(
            f"the text has {len(tokens)} tokens, which does not fill one sequence of {sequence_tokens}; "
            "give more text or shorter sequences"
        )
    packed = torch.tensor(tokens[: count * sequence_tokens], dtype=torch.int32)
    return packed.view(count, sequence_tokens)


def text_examples(packed: Tensor) -> list[ChatExample]:
    """Turn packed sequences into examples in which every token but the first is a target."""
    return [ChatExample(ids=tuple(row), loss_mask=(False, *[True] * (len(row) - 1))) for row in packed.tolist()]


class TextStream:
    """The endless order of a run's pretraining sequences: sequence number -> example. Has no cursor."""

    def __init__(self, packed: Tensor, seed: int) -> None:
        """Take packed sequences, i32[N, S]."""
        self._packed = packed
        self._shuffle = Shuffle(size=len(packed), seed=seed)

    def __getitem__(self, number: int) -> ChatExample:
        position, _ = self._shuffle[number]
        return text_examples(self._packed[position : position + 1])[0]

    @property
    def fingerprint(self) -> str:
        """Identify sequences, order and seed: a run must not be resumed with another fingerprint."""
        return f"{stable_hash(self._shuffle.seed, self._packed.tolist()):016x}"

    def iteration(self, iteration: int, minibatches: int, sequences_per_minibatch: int) -> list[list[ChatExample]]:
        """Return the sequences of one PPO iteration, which no earlier iteration of the epoch has used."""
        first = iteration * minibatches * sequences_per_minibatch
        return [
            [self[first + part * sequences_per_minibatch + i] for i in range(sequences_per_minibatch)]
            for part in range(minibatches)
        ]
