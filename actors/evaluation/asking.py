"""Asking a model: the requests of many items go through the generators of a fleet, and each item is judged at once.

Nothing is sampled for the buffer. A batch of items that a generator could not answer is given to another one.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.evaluation.task import Answer, Generation, Item, Likelihood, Logprob, Request, Task, Verdict
from actors.prompts import stable_hash
from actors.sampling import Fleet, Generator, GeneratorFailed
from actors.trajectory import Completion
from reward_server.schema import Message

_LANES = 2  # batches under way at a generator, so that it never waits for a verdict
_ATTEMPTS = 3


class Reader(Generator, Protocol):
    """A generator that also tells log-probs, as `actors.generator.Generator` documents."""

    async def logprobs(self, sequences: list[list[int]]) -> list[list[float]]: ...


class Encoding(Protocol):
    """What asking needs of `reward_server.encoding.ChatEncoding`."""

    @property
    def document_end(self) -> int: ...
    def prompt(self, messages: Sequence[Message]) -> list[int]: ...
    def response(self, text: str, ended: bool) -> list[int]: ...
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
    context = request.context.rstrip()
    ids = encoding.plain(context + request.context[len(context) :] + request.continuation)
    given = encoding.plain(context)
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
    took: Callable[[Asked], None],
    *,
    chat: bool,
    batch: int,
    seed: int,
    deadline_s: float,
) -> None:
    """Ask about every item, in batches of about `batch` requests; `took` is told of each when it is judged.

    The seed of a sample is a hash of (seed, task, item, request), so that answers depend on neither batch nor order.
    Raises what `judge` raises, what the fleet fails with, and RuntimeError that names the items which no generator
    could answer in three attempts.
    """
    waiting = deque((one, 0) for one in _batches(items, batch))
    complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    left = len(waiting)

    def fail(error: BaseException) -> None:
        if not complete.done():
            complete.set_exception(error)

    async def lane(generator: Reader, leave: asyncio.Event) -> None:
        nonlocal left
        while waiting and not leave.is_set():
            some, attempt = waiting.popleft()
            done = False
            try:
                async with asyncio.timeout(deadline_s):
                    answers = await _answers(generator, encoding, some, chat, seed)
                for (task, item, requests), found in zip(some, answers, strict=True):
                    verdict = await task.judge(item, found)
                    took(Asked(task=task, item=item, requests=requests, answers=found, verdict=verdict))
                done = True
                left -= 1
                if not left and not complete.done():
                    complete.set_result(None)
            except (GeneratorFailed, TimeoutError) as error:
                names = ", ".join(f"{task.name}/{item.id}" for task, item, _ in some[:4])
                if attempt + 1 >= _ATTEMPTS:
                    raise RuntimeError(f"{len(some)} items ({names}, ..) had no answer in {_ATTEMPTS} attempts: {error}") from error
                raise GeneratorFailed(f"{names}: {error or f'no answer within {deadline_s:g} s'}") from error
            finally:
                if not done:
                    waiting.append((some, attempt + 1))

    async def work(generator: Any, leave: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as lanes:
            for _ in range(_LANES):
                lanes.create_task(lane(generator, leave))

    if left:
        async with fleet.joining(), fleet.working(work, fail):
            await complete
