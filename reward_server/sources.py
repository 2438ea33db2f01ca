"""Where scores come from: a reward model, a function, another server, a rule, or a weighted mix of these with gates."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import regex

from reward_server.bearer import token_of
from reward_server.client import RewardClient
from reward_server.config import UNTRUSTED, LoadingConfig, PartConfig, SourceConfig
from reward_server.functions import call_function, load_function
from reward_server.schema import ScoreReply, ScoreRequest
from reward_server.scorer import RewardModelSource

_SEARCH_S = 2.0  # seconds for which a pattern is looked for in one response


class Source(Protocol):
    """Anything that scores. Called by one thread at a time, with requests of distinct ids."""

    def load(self) -> None:
        """Get ready, so that a mistake shows before the first score. Raises ValueError when that cannot be done."""

    def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        """One reply per request, in the same order; raises rather than make a score up."""
        ...

    def tokens(self, requests: list[ScoreRequest]) -> list[int]:
        """Tokens that models read for each of them, which bound a batch; 0 where there is no model to read any.

        May raise what `score` would.
        """
        return [0] * len(requests)


class FunctionSource(Source):
    """Scores by a function `(prompts: list[list[dict]], responses: list[str]) -> list[float]`."""

    def __init__(self, name: str) -> None:
        """Remember "module:function"; `load`, or else the first score, imports it."""
        self.name = name
        self._function: Any = None

    def load(self) -> None:
        """Import the function; raises ValueError when it cannot be found."""
        if self._function is None:
            self._function = load_function(self.name)

    def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        """Call the function once for all; raises UserFunctionError when it fails or breaks its contract."""
        self.load()
        prompts = [[message.model_dump() for message in request.prompt] for request in requests]
        responses = [request.response for request in requests]
        numbers = call_function(self.name, self._function, len(requests), prompts, responses)
        return [ScoreReply(id=r.id, score=number) for r, number in zip(requests, numbers, strict=True)]


class RemoteSource(Source):
    """Scores by another reward server. Not to be called from a thread that runs an event loop."""

    def __init__(self, url: str, token: str | None = None, retry_s: float = 30.0) -> None:
        """Remember where it is; `token` is its bearer token, `retry_s` bounds a call with its retries.

        Whoever asked this source asks again, with the same ids: what the other server computes meanwhile is not lost.
        """
        self.url = url
        self._token = token
        self.retry_s = retry_s

    def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        """Ask the server; raises RewardUnavailable or RewardRefused."""
        return asyncio.run(self._score(requests))

    async def _score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        client = RewardClient(self.url, token=self._token, retry_s=self.retry_s)
        try:
            return await client.score(requests)
        finally:
            await client.close()


class RuleSource(Source):
    """Scores by a rule: the number of words of the response, or whether a pattern is found in it."""

    def __init__(self, pattern: str | None) -> None:
        """`pattern` is a regular expression; None counts words."""
        self._pattern = None if pattern is None else regex.compile(pattern)

    def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        """Apply the rule to each response; raises ValueError for one on which the pattern takes too long."""
        return [ScoreReply(id=request.id, score=self._of(request)) for request in requests]

    def _of(self, request: ScoreRequest) -> float:
        if self._pattern is None:
            return float(len(request.response.split()))
        try:
            return float(self._pattern.search(request.response, timeout=_SEARCH_S) is not None)
        except TimeoutError:
            raise ValueError(
                f"the pattern {self._pattern.pattern!r} is not done with the {len(request.response)} characters of "
                f"response {request.id!r} after {_SEARCH_S:g} s, as it can match in too many ways; write it without "
                "choices or repetitions inside of a repetition"
            ) from None


class MixSource(Source):
    """The weighted sum of sources and the gates; parts of a reply hold each source's score under its name."""

    def __init__(self, sources: Sequence[tuple[PartConfig, Source]]) -> None:
        """Take the parts with their sources."""
        self.sources = sources

    def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        """score = sum of weight * score over the parts, or `otherwise` of the first gate that it does not pass."""
        totals = [0.0] * len(requests)
        refused: dict[int, float] = {}
        parts: list[dict[str, float]] = [{} for _ in requests]
        for part, source in self.sources:
            for position, reply in enumerate(source.score(requests)):
                if part.gate is None:
                    totals[position] += part.weight * reply.score
                elif not part.gate.passes(reply.score):
                    refused.setdefault(position, part.gate.otherwise)
                parts[position] |= {part.name: reply.score}
                parts[position] |= {f"{part.name}/{name}": value for name, value in reply.parts.items()}
        return [
            ScoreReply(id=request.id, score=refused.get(position, totals[position]), parts=parts[position])
            for position, request in enumerate(requests)
        ]

    def tokens(self, requests: list[ScoreRequest]) -> list[int]:
        """Tokens that all parts together read."""
        return [sum(counts) for counts in zip(*(source.tokens(requests) for _, source in self.sources), strict=True)]


def build_source(
    config: SourceConfig, model_path: str | Path | None = None, loading: LoadingConfig = UNTRUSTED
) -> Source:
    """Make the configured source and load its models and functions, so that a mistake shows at once.

    `model_path` is the run's own reward model, for parts without a target. Raises ValueError when a part cannot be
    loaded, or needs a model and the run has none, or a token that is not set.
    """
    sources = [(part, _part_source(part, config, model_path, loading)) for part in config.parts]
    for _, source in sources:
        source.load()
    (first, source), *others = sources
    return source if first.weight == 1 and not others else MixSource(sources)


def _part_source(
    part: PartConfig, config: SourceConfig, model_path: str | Path | None, loading: LoadingConfig
) -> Source:
    """A new kind of source is a class above, a case here, and a word in PartConfig.kind."""
    match part.kind, part.target:
        case "url", str(url):
            retry_s = min(30.0, config.retry_s / (1 + len(config.parts)))  # all together less than makes a replica hang
            return RemoteSource(url, part.token_variable and token_of(part.token_variable), retry_s)
        case "function", str(name):
            return FunctionSource(name)
        case (("length" | "regex"), pattern):
            return RuleSource(pattern)
        case _, folder:
            if folder is None and model_path is None:
                raise ValueError(
                    f"the reward source {part.name!r} is the run's own reward model, but there is none; train one "
                    "first, or set target to the folder of one"
                )
            path = folder or str(model_path)
            return RewardModelSource(
                path,
                config.dtype,
                config.max_batch_tokens,
                config.max_tokens,
                config.truncate_prompt,
                loading,
                config.compile,
                part.raw,
            )
