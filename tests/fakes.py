"""In-process stand-ins for what is slow: a tokenizer, a generator, a scorer, and a clock that tests turn."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from actors.prompts import Prompt
from actors.sampling import GeneratorFailed
from actors.trajectory import Completion
from reward_server.schema import Message, ScoreReply, ScoreRequest

PAD, EOS, USER, ASSISTANT = 0, 1, 2, 3
FIRST_LETTER = 4


class FakeEncoding:
    """One token a letter: 4 = "a", 5 = "b", ..; PAD 0, EOS 1, 2 opens any message, 3 the assistant's turn."""

    pad_id = PAD
    eos_id = EOS
    eos_ids = frozenset({EOS})
    name = "fake"
    positions: int | None = None

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return [i for message in messages for i in (USER, *self._letters(message.content))] + [ASSISTANT]

    def response(self, text: str, ended: bool) -> list[int]:
        return self._letters(text) + [EOS] * ended

    def document(self, text: str) -> list[int]:
        return self.response(text, ended=True)

    def text(self, ids: Sequence[int]) -> str:
        return "".join(chr(i - FIRST_LETTER + ord("a")) for i in ids if i >= FIRST_LETTER)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.text([one]) for one in ids]

    def _letters(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") + FIRST_LETTER for letter in text]


def prompts(count: int) -> list[Prompt]:
    """Prompts "p0", "p1", .. that say "a", "b", .."""
    return [
        Prompt(id=f"p{i}", messages=(Message(role="user", content=chr(ord("a") + i % 26)),), reference=None)
        for i in range(count)
    ]


def completion(
    query_ids: Sequence[int] = (USER, 4, ASSISTANT),
    response_ids: Sequence[int] = (4, 5, EOS),
    version: int = 0,
    ended: bool = True,
) -> Completion:
    """A response whose token t has the log-probability -(t + 1) / 8 and that one version sampled."""
    return Completion(
        query_ids=tuple(query_ids),
        response_ids=tuple(response_ids),
        logprobs=tuple(-(t + 1) / 8 for t in range(len(response_ids))),
        versions=(version,) * len(response_ids),
        ended=ended,
        text=FakeEncoding().text(response_ids),
    )


class FakeClock:
    """A monotonic clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeGenerator:
    """Samples letters that depend on the seeds only; tokens carry `version`."""

    name: str = "fake"
    version: int = 0
    fault: Callable[[list[list[int]]], BaseException | None] = lambda queries: None
    """asked before each call is answered; what it returns is raised"""
    turns: Callable[[], int] = lambda: 0
    """how many turns of the event loop a call takes"""
    calls: list[list[list[int]]] = field(default_factory=list)
    """queries of every call: a prompt's, as often as it has samples"""
    seeds: list[int] = field(default_factory=list)
    """seeds of every sample"""

    async def generate(
        self, query_ids: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
    ) -> list[Completion]:
        self.calls.append(query_ids)
        self.seeds += seeds
        for _ in range(self.turns()):
            await asyncio.sleep(0)
        error = self.fault(query_ids)
        if error is not None:
            raise error
        return [self._sample(q, seed, max_new_tokens) for q, seed in zip(query_ids, seeds, strict=True)]

    def _sample(self, query: list[int], seed: int, max_new_tokens: int) -> Completion:
        dice = random.Random(seed)
        letters = [dice.randrange(FIRST_LETTER, FIRST_LETTER + 26) for _ in range(dice.randint(0, 5))]
        ids = [*letters, EOS][:max_new_tokens]
        return completion(query, ids, version=self.version, ended=ids[-1] == EOS)


class FakeFleet:
    """Has each of its generators work; when one fails, the next of `spares` comes in its place."""

    joining = occupied = nullcontext

    def __init__(self, *generators: Any, spares: Sequence[Any] = ()) -> None:
        self.generators, self.spares = generators, list(spares)

    @asynccontextmanager
    async def working(self, work: Any, fail: Callable[[BaseException], None]) -> AsyncIterator[None]:
        async def run(generator: Any) -> None:
            try:
                await work(generator, asyncio.Event())
            except GeneratorFailed as error:
                if self.spares:
                    await run(self.spares.pop(0))
                elif all(task.done() or task is asyncio.current_task() for task in tasks):
                    fail(error)
            except Exception as error:
                fail(error)

        tasks = [asyncio.create_task(run(generator)) for generator in self.generators]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class FakeScorer:
    """Scores a response with the number of its letters."""

    fault: Callable[[list[ScoreRequest]], BaseException | None] = lambda requests: None
    """asked before each reply; what it returns is raised"""
    batches: list[list[ScoreRequest]] = field(default_factory=list)
    """requests of every call"""
    paused_s: float = 0.0
    working: asyncio.Event = field(default_factory=asyncio.Event)
    """unset for as long as a test pauses it"""

    def __post_init__(self) -> None:
        self.working.set()

    async def ready(self) -> None:
        await self.working.wait()

    async def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        self.batches.append(requests)
        await asyncio.sleep(0)
        error = self.fault(requests)
        if error is not None:
            raise error
        return [
            ScoreReply(id=request.id, score=float(len(request.response)), parts={"letters": 1.0})
            for request in requests
        ]
