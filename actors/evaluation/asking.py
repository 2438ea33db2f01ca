"""Asking a model: the requests of many items go through the generators of a fleet, and each item is judged at once.

Nothing is sampled for the buffer. Items have the budget of attempts that prompts have (`actors/sampling.py`).
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.chat import TextEncoding
from actors.config import RolloutConfig
from actors.evaluation.task import Answer, Generation, Item, Likelihood, Logprob, Reply, Request, Task, Verdict
from actors.prompts import stable_hash
from actors.sampling import Answers, Fleet, Generator, Waves
from actors.trajectory import Completion, Ticket
from reward_server.schema import Message

_LANES = 2  # waves under way at a generator, so that it never waits for a verdict


class Reader(Generator, Protocol):
    """A generator that also tells log-probs, as `actors.generator.Generator` documents."""

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]: ...


class Encoding(TextEncoding, Protocol):
    """What asking needs of `reward_server.encoding.ChatEncoding`, which documents it."""

    document_end: int

    def plain(self, text: str) -> list[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A request as token ids."""

    ids: list[int]
    """prompt, or context and continuation"""
    given: int
    """of which so many come before what is asked for"""
    room: int
    """tokens that may follow"""


def encode(request: Request, encoding: Encoding, chat: bool) -> Encoded:
    """Token ids of a request; with `chat` a prompt or context is a user's message, and what follows the reply to it.

    Otherwise both are plain text, whose spaces before a continuation are tokens of that, as in training. Raises
    ValueError for what the encoding refuses.
    """
    if isinstance(request, Generation):
        ids = _before(request.prompt, encoding, chat)
        return Encoded(ids=ids, given=len(ids), room=request.max_tokens)
    if not request.continuation.strip():
        raise ValueError("a continuation without text has no likelihood")
    if not request.context:
        ids = encoding.plain(request.continuation)
        if ids == encoding.response(request.continuation, ended=False):  # the model has no BOS
            ids = [encoding.document_end, *ids]
        return Encoded(ids=ids, given=1, room=0)
    if chat:
        given = _before(request.context.strip(), encoding, chat)
        return Encoded(
            ids=[*given, *encoding.response(request.continuation.strip(), ended=False)], given=len(given), room=0
        )
    ids = encoding.plain(request.context + request.continuation)
    given = encoding.plain(request.context.rstrip())
    return Encoded(ids=ids, given=min(len(given), len(ids) - 1), room=0)


def _before(prompt: str | tuple[Message, ...], encoding: Encoding, chat: bool) -> list[int]:
    if not isinstance(prompt, str):
        return encoding.prompt(prompt)
    return encoding.prompt([Message(role="user", content=prompt)]) if chat else encoding.plain(prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """An item of a task, its answers, and what they are worth."""

    task: Task[Any]
    item: Item
    requests: Sequence[Request]
    answers: Sequence[Answer]
    verdict: Verdict


async def ask(
    fleet: Fleet,
    encoding: Encoding,
    items: Sequence[tuple[Task[Any], Item]],
    config: RolloutConfig,
    took: Callable[[Asked], None],
    *,
    chat: bool,
    seed: int,
) -> None:
    """Ask about every item, `config.prompts_per_wave` at a time; `took` is told of each when it is judged.

    The seed of a sample is a hash of (seed, task, item, request), so that answers depend on neither batch nor order.
    Raises what `judge` raises, and as `actors.sampling.sample` does.
    """
    answers: Answers[Asked] = Answers(len(items), lambda done: None)

    def waves(generator: Reader, leave: asyncio.Event) -> _Asking:
        return _Asking(
            generator=generator,
            tickets=answers,
            encoding=encoding,
            config=config,
            leave=leave,
            found=answers,
            items=items,
            took=took,
            chat=chat,
            seed=seed,
        )

    await answers.collect(fleet, waves, _LANES)


@dataclass(slots=True, kw_only=True)
class _Asking(Waves[Asked]):
    """Waves of items."""

    generator: Reader  # pyright: ignore[reportIncompatibleVariableOverride]
    encoding: Encoding  # pyright: ignore[reportIncompatibleVariableOverride]
    found: Answers[Asked]
    items: Sequence[tuple[Task[Any], Item]]
    took: Callable[[Asked], None]
    chat: bool
    seed: int

    def name(self, ticket: Ticket) -> str:
        task, item = self.items[ticket.number]
        return f"{task.name}/{item.id}"

    async def answer(self, ticket: Ticket) -> Asked:
        task, item = self.items[ticket.number]
        requests = task.requests(item)
        encoded = [encode(request, self.encoding, self.chat) for request in requests]
        said: dict[int, Answer] = {}
        async with asyncio.timeout(self.config.wave_deadline_s):
            if asked := [n for n, request in enumerate(requests) if isinstance(request, Likelihood)]:
                for n, row in zip(asked, await self.generator.logprobs([encoded[n].ids for n in asked]), strict=True):
                    tail = row[encoded[n].given - 1 :]  # row[j] is of token j + 1
                    said[n] = Logprob(total=math.fsum(tail), tokens=len(tail))
            for (room, temperature), some in _alike(requests).items():
                seeds = [stable_hash(self.seed, self.name(ticket), n) for n in some]
                sampled = await self.generator.generate([encoded[n].ids for n in some], seeds, room, temperature)
                said |= {n: _said(one, requests[n]) for n, one in zip(some, sampled, strict=True)}
        answers = [said[n] for n in range(len(requests))]
        verdict = await task.judge(item, answers)
        return Asked(task=task, item=item, requests=requests, answers=answers, verdict=verdict)

    async def take(self, answers: dict[Ticket, Asked]) -> dict[Ticket, str]:
        self.found.take(answers)
        for one in answers.values():
            self.took(one)
        return {}


def _alike(requests: Sequence[Request]) -> dict[tuple[int, float], list[int]]:
    """The numbers of the generations that can be one call."""
    found = defaultdict[tuple[int, float], list[int]](list)
    for n, request in enumerate(requests):
        if isinstance(request, Generation):
            found[request.max_tokens, request.temperature].append(n)
    return found


def _said(completion: Completion, request: Request) -> Reply | str:
    """The answer up to its stop, without spaces around it."""
    assert isinstance(request, Generation)
    text = (completion.text if request.stop is None else completion.text.partition(request.stop)[0]).strip()
    return text if isinstance(request.prompt, str) else Reply(text=text, ended=completion.ended)
