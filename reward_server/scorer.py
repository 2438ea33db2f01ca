"""From requests to scores with a reward model: encode, batch by tokens, forward, normalise."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from reward_server.config import UNTRUSTED, LoadingConfig
from reward_server.encoding import ChatEncoding
from reward_server.fusion import compile_pieces
from reward_server.model import Normalisation, load_reward_model, normalisation, raw_values
from reward_server.packing import pack, packs
from reward_server.schema import ScoreReply, ScoreRequest


class InputTooLong(ValueError):
    """A prompt with its response does not fit into the reward model."""


class NonFiniteScore(RuntimeError):
    """The reward model answered with NaN or an infinity."""


def token_batches(lengths: Sequence[int], max_tokens: int, padded: bool = False) -> list[list[int]]:
    """Group indices into batches of at most `max_tokens` tokens, with their padding if they are `padded`.

    The longest come first, so a budget too large for the memory fails on the first batch. A sequence longer
    than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if not batches or room < lengths[index if not padded else batches[-1][0]]:
            batches.append([])
            room = max_tokens
        batches[-1].append(index)
        room -= lengths[batches[-1][0] if padded else index]
    return batches


def raw_scores(model: PreTrainedModel, sequences: Sequence[Sequence[int]], max_batch_tokens: int) -> list[float]:
    """Raw head output at the last token of each sequence, in the order given; without gradients.

    The last token is the EOS of a response that ended and the last sampled token of one that was truncated
    (InstructGPT; summarize-from-feedback).
    """
    results = [math.nan] * len(sequences)
    device = next(model.parameters()).device
    with torch.inference_mode():
        for batch in token_batches([len(sequence) for sequence in sequences], max_batch_tokens, not packs(model)):
            lengths = [len(sequences[index]) for index in batch]
            ids = torch.tensor([token for index in batch for token in sequences[index]], device=device)
            values = raw_values(model, ids, lengths, torch.tensor(lengths, device=device).cumsum(0) - 1)
            for index, score in zip(batch, values.tolist(), strict=True):
                results[index] = score
    return results


def encode_request(
    encoding: ChatEncoding, request: ScoreRequest, max_tokens: int, truncate_prompt: bool = False
) -> list[int]:
    """Token ids of query ++ response, the response with its EOS when it ended.

    When they exceed `max_tokens`, the prompt loses tokens from its left if `truncate_prompt`; otherwise, or
    when not one token of the prompt would be left, raises InputTooLong.
    """
    query = encoding.prompt(request.prompt)
    response = encoding.response(request.response, request.ended)
    excess = len(query) + len(response) - max_tokens
    if excess <= 0:
        return query + response
    if truncate_prompt and excess < len(query):
        return query[excess:] + response
    remedy = (
        "shorten the response (max_new_tokens)"
        if truncate_prompt
        else "drop such prompts, lower max_new_tokens, or set truncate_prompt to cut prompts from the left"
    )
    raise InputTooLong(
        f"request {request.id!r} has {len(query)} prompt tokens and {len(response)} response tokens, "
        f"together {excess} more than the {max_tokens} that the reward model reads; {remedy}"
    )


class RewardModelSource:
    """Scores by a reward model's folder. To be used by one thread at a time."""

    def __init__(
        self,
        path: str | Path,
        dtype: Literal["float32", "bfloat16"] = "float32",
        max_batch_tokens: int = 8192,
        max_tokens: int | None = None,
        truncate_prompt: bool = False,
        loading: LoadingConfig = UNTRUSTED,
        compiled: bool = False,
        raw: bool = False,
    ) -> None:
        """Remember what to load; `load`, or else the first score, does it.

        `max_tokens` bounds one sequence, by default by the positions that the model has. With `raw` the score is the
        head's output, whatever normalisation the folder has.
        """
        self.path = str(path)
        self.dtype = dtype
        self.max_batch_tokens = max_batch_tokens
        self.max_tokens = max_tokens
        self.truncate_prompt = truncate_prompt
        self.loading = loading
        self.compiled = compiled
        self.raw = raw
        self._loaded: tuple[PreTrainedModel, ChatEncoding, Normalisation] | None = None
        self._encoded: WeakKeyDictionary[ScoreRequest, list[int]] = WeakKeyDictionary()

    def load(self) -> None:
        """Load the model onto the accelerator if there is one, else the CPU, unless that was done.

        Raises ValueError when the folder has no normalisation, or a tokenizer that is not the model's.
        """
        if self._loaded is not None:
            return
        encoding = ChatEncoding.load(self.path, self.loading)
        model = pack(load_reward_model(self.path, getattr(torch, self.dtype), self.loading))
        if self.compiled:
            compile_pieces(model)
        normalise = Normalisation(gain=1.0, bias=0.0) if self.raw else normalisation(model)
        config = model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None:
            self.max_tokens = min(self.max_tokens or positions, positions)
        nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
        self._loaded = model, encoding, normalise

    def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        """Score requests in their order; parts hold the raw head output.

        Raises InputTooLong, NonFiniteScore, or ValueError for a prompt that cannot be encoded.
        """
        sequences = self._sequences(requests)
        assert self._loaded is not None
        model, _, normalise = self._loaded
        raw = raw_scores(model, sequences, self.max_batch_tokens)
        for request, value in zip(requests, raw, strict=True):
            if not math.isfinite(value):
                raise NonFiniteScore(
                    f"the reward model {self.path} gave {value} for request {request.id!r}; its weights are "
                    f"broken or {self.dtype} overflows"
                )
        return [
            ScoreReply(id=request.id, score=normalise(value), parts={"raw": value})
            for request, value in zip(requests, raw, strict=True)
        ]

    def tokens(self, requests: list[ScoreRequest]) -> list[int]:
        """Tokens of each prompt with its response. They are kept for `score`, for as long as the requests are.

        Raises InputTooLong, or ValueError for a prompt that cannot be encoded.
        """
        return [len(sequence) for sequence in self._sequences(requests)]

    def _sequences(self, requests: list[ScoreRequest]) -> list[list[int]]:
        self.load()
        assert self._loaded is not None
        encoding, limit = self._loaded[1], self.max_tokens or 2**31
        for request in requests:
            if request not in self._encoded:
                self._encoded[request] = encode_request(encoding, request, limit, self.truncate_prompt)
        return [self._encoded[request] for request in requests]
