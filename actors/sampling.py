"""Sampling with generators: waves of prompts within a deadline and a budget of attempts, for whoever needs responses.

Nothing is lost silently: a ticket ends as responses that are taken, or is forfeited with a reason and issued again, or
stops its user with an error that names its prompt.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from asyncio import FIRST_COMPLETED, FIRST_EXCEPTION
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from actors.chat import TextEncoding
from actors.config import RolloutConfig
from actors.prompts import Prompt, encode_prompt, stable_hash
from actors.trajectory import Completion, Ticket

# A generator that fails twice in a row is taken to be broken; so a ticket that it has spoilt twice still has
# its last attempt left for another one.
_FAILED_WAVES = 2
_TOGETHER_S = 0.01  # what is complete so soon after another response is taken with it
AnswerT = TypeVar("AnswerT")
log = logging.getLogger(__name__)


class GeneratorFailed(RuntimeError):
    """A generator is gone, or failed wave after wave. Its tickets are forfeited; other generators can go on."""


class PromptFailed(RuntimeError):
    """A prompt could not be sampled in as many attempts as it may have."""


class EmptyResponse(RuntimeError):
    """A response without a token."""


class Generator(Protocol):
    """What sampling needs of `actors.generator.Generator`; GeneratorFailed says that it will never sample again."""

    @property
    def name(self) -> str: ...  # who it is, for those who wait for it
    async def generate(
        self, query_ids: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
    ) -> list[Completion]: ...


class Fleet(Protocol):
    """What sampling needs of `cluster.fleet.fleet.Fleet`, which documents it."""

    def joining(self) -> AbstractAsyncContextManager[object]: ...
    def working(
        self,
        work: Callable[[Generator, asyncio.Event], Coroutine[Any, Any, None]],
        fail: Callable[[BaseException], None],
    ) -> AbstractAsyncContextManager[None]: ...


class Tickets(Protocol):
    """What waves need of whoever issues tickets; `learner.data.buffer.Buffer` documents it."""

    async def admit(self, n: int, holder: str) -> list[Ticket]: ...
    def forfeit(self, ticket: Ticket, reason: str) -> None: ...
    def fail(self, error: BaseException) -> None: ...


async def responses(
    generator: Generator, prompt: Prompt, query: list[int], seeds: Sequence[int], config: RolloutConfig
) -> list[Completion]:
    """The responses to a prompt, one a seed, sampled at once; `query` is the encoded prompt.

    Raises what the generator raises, TimeoutError when `config.wave_deadline_s` is over, and ValueError for what no
    generator could sample; these two name the prompt.
    """
    limit, count = asyncio.timeout(config.wave_deadline_s), len(seeds)
    try:
        async with limit:
            found = await generator.generate([query] * count, list(seeds), config.max_new_tokens, config.temperature)
    except TimeoutError:
        if not limit.expired():
            raise
        raise TimeoutError(
            f"the responses to prompt {prompt.id!r} were not sampled within {config.wave_deadline_s:g} s; see the "
            "generators' logs, or raise rollout.wave_deadline_s"
        ) from None
    except ValueError as error:
        raise ValueError(f"prompt {prompt.id!r} cannot be sampled: {error}") from error
    assert len(found) == count, f"{len(found)} responses came back for {count} queries"
    if not all(completion.response_ids for completion in found):
        raise EmptyResponse("a response has no token, not even an EOS")
    return found


@dataclass(slots=True, kw_only=True)
class Waves(ABC, Generic[AnswerT]):
    """Sends waves of tickets through one generator; who uses it says what is asked for them and who takes the answers.

    A ticket is tried `config.max_attempts` times, the last time alone, which finds a prompt that breaks its neighbours,
    or the generator.
    """

    generator: Generator
    tickets: Tickets
    encoding: TextEncoding
    config: RolloutConfig
    leave: asyncio.Event
    """set when it is to take no more work"""
    beside: bool = True
    """whether what is complete is taken while the rest of its wave is sampled, or when all of it is"""
    failed_waves: int = 0
    """in a row"""
    _idle: set[asyncio.Task[None]] = field(default_factory=set)  # these wait for tickets: they have nothing to lose

    @abstractmethod
    def name(self, ticket: Ticket) -> str:
        """What a ticket is called in errors."""

    @abstractmethod
    async def answer(self, ticket: Ticket) -> AnswerT:
        """What the generator says. Raises ValueError for what no generator could answer."""

    @abstractmethod
    async def take(self, answers: dict[Ticket, AnswerT]) -> dict[Ticket, str]:
        """Use answers of a wave, of which others may still be made; the tickets that were lost, with the cause."""

    async def ready(self) -> None:
        """Wait until answers can be used."""

    async def work(self, lanes: int) -> list[BaseException]:
        """Have so many waves under way until `leave` is set and those are done, or one fails; what they raised.

        Cancelled, it gives their tickets back at once.
        """
        tasks = [asyncio.create_task(self._run()) for _ in range(lanes)]
        leaving = asyncio.create_task(self.leave.wait())
        try:
            await asyncio.wait([*tasks, leaving], return_when=asyncio.FIRST_COMPLETED)
            if self.leave.is_set():
                for lane in self._idle:
                    lane.cancel()
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in (leaving, *tasks):
                task.cancel()
            await asyncio.wait([leaving, *tasks])
        return [error for lane in tasks if not lane.cancelled() and (error := lane.exception())]

    async def _run(self) -> None:
        """Admit tickets and send their waves until `leave` is set. Whatever ends it, no ticket stays in flight."""
        while not self.leave.is_set():
            tickets = await self._admit()
            try:
                await self.ready()
                last_attempts = [t for t in tickets if t.attempt + 1 >= self.config.max_attempts > 1]
                together = [t for t in tickets if t not in last_attempts]
                for wave in (together, *([ticket] for ticket in last_attempts)):
                    if wave:
                        await self._wave(wave)
            except BaseException as error:
                reasons = {asyncio.CancelledError: "stopped", GeneratorFailed: "generator lost"}
                reason = reasons.get(type(error), "run failed")
                for ticket in tickets:
                    self.tickets.forfeit(ticket, reason)
                raise

    async def _admit(self) -> list[Ticket]:
        task = asyncio.current_task()
        assert task is not None
        self._idle.add(task)
        try:
            return await self.tickets.admit(self.config.prompts_per_wave, self.generator.name)
        finally:
            self._idle.discard(task)

    async def _wave(self, tickets: list[Ticket]) -> None:
        """Have tickets answered at the same time, and what is complete taken, one take at a time."""
        calls = {asyncio.create_task(self.answer(ticket)): ticket for ticket in tickets}
        lost: dict[Ticket, str] = {}
        try:
            while calls:
                await asyncio.wait(calls, return_when=FIRST_COMPLETED if self.beside else FIRST_EXCEPTION)
                done, _ = await asyncio.wait(calls, timeout=_TOGETHER_S)
                answers = {calls.pop(call): call for call in list(calls) if call in done}
                lost |= await self._use(answers, list(calls.values()))
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        if lost:
            self.count_failure(lost)
        else:
            self.failed_waves = 0

    async def _use(self, answers: dict[Ticket, asyncio.Task[AnswerT]], others: list[Ticket]) -> dict[Ticket, str]:
        """Take the answers that are good; the tickets of the others, lost, with the cause.

        `others` of the wave, which have none yet, are lost too where it is the generator.
        """
        errors = {ticket: error for ticket, call in answers.items() if (error := call.exception())}
        good = {ticket: call.result() for ticket, call in answers.items() if ticket not in errors}
        causes = {ticket: f"{type(error).__name__}: {error}" for ticket, error in errors.items()}
        gone = next((error for error in errors.values() if isinstance(error, GeneratorFailed)), None)
        for error in errors.values():
            if isinstance(error, ValueError):  # whoever asks is to blame: another generator could not do it either
                raise error
        if gone:
            self.lose([*errors, *others], "generator lost", str(gone))
        elif errors:
            empty = [ticket for ticket, error in errors.items() if isinstance(error, EmptyResponse)]
            for some, reason in ((empty, "empty response"), ([*errors.keys() - {*empty}], "generation failed")):
                if some:
                    self.lose(some, reason, causes[some[0]])
        if good:
            causes |= await self.take(good)
        if gone:
            raise gone
        return causes

    def lose(self, tickets: list[Ticket], reason: str, why: str) -> None:
        """Forfeit tickets; raise PromptFailed for one that has had its last attempt."""
        log.warning("forfeited %d tickets from %d on, %s: %s", len(tickets), tickets[0].number, reason, why)
        error = None
        if spent := [ticket for ticket in tickets if ticket.attempt + 1 >= self.config.max_attempts]:
            error = PromptFailed(
                f"{self.name(spent[0])} could not be sampled in {spent[0].attempt + 1} attempts; the last: {reason}, "
                f"{why}. Remove it, or see to the generators"
            )
            self.tickets.fail(error)  # before it could be given to anybody else
        for ticket in tickets:
            self.tickets.forfeit(ticket, reason)
        if error is not None:
            raise error

    def count_failure(self, lost: Mapping[Ticket, str]) -> None:
        """Raise GeneratorFailed when too many waves in a row failed."""
        self.failed_waves += 1
        if self.failed_waves >= _FAILED_WAVES:
            names = ", ".join(map(self.name, list(lost)[:4]))
            raise GeneratorFailed(
                f"{self.failed_waves} waves in a row failed; the last, of {len(lost)} prompts, {names} and on: "
                f"{list(lost.values())[-1]}"
            )


@dataclass(slots=True, kw_only=True)
class PromptWaves(Waves[list[Completion]]):
    """Waves of prompts, answered with responses to each."""

    @abstractmethod
    def prompt(self, ticket: Ticket) -> Prompt:
        """The prompt of a ticket."""

    @abstractmethod
    def seeds(self, ticket: Ticket) -> list[int]:
        """One for each response to it."""

    def name(self, ticket: Ticket) -> str:
        return f"prompt {self.prompt(ticket).id!r}"

    async def answer(self, ticket: Ticket) -> list[Completion]:
        prompt = self.prompt(ticket)
        query = encode_prompt(prompt, self.encoding, self.config.max_prompt_tokens)
        return await responses(self.generator, prompt, query, self.seeds(ticket), self.config)


async def sample(
    fleet: Fleet,
    prompts: Sequence[Prompt],
    encoding: TextEncoding,
    config: RolloutConfig,
    samples: int,
    seed: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[Completion]]:
    """`samples` responses to each prompt, in the order of the prompts, for no buffer: to be ranked or judged.

    Whoever is free takes the next `config.prompts_per_wave` prompts, newcomers of the fleet too. The seed of a response
    is a hash of (seed, prompt id, k), so the same prompts and weights give the same responses whoever samples them.
    Raises PromptFailed, ValueError for what nobody can sample, and what the fleet fails with.
    """
    answers: Answers[list[Completion]] = Answers(len(prompts), advance)

    def waves(generator: Generator, leave: asyncio.Event) -> _Sampling:
        return _Sampling(
            generator=generator,
            tickets=answers,
            encoding=encoding,
            config=config,
            leave=leave,
            answers=answers,
            prompts=prompts,
            samples=samples,
            seed=seed,
        )

    await answers.collect(fleet, waves)
    return [answers.found[number] for number in range(len(prompts))]


class Answers(Generic[AnswerT]):
    """The tickets of what has no answer yet, and the answers."""

    def __init__(self, count: int, advance: Callable[[int], None]) -> None:
        self.found: dict[int, AnswerT] = {}
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count = count
        self._advance = advance
        self._out: set[Ticket] = set()
        self._waiting: asyncio.PriorityQueue[Ticket] = asyncio.PriorityQueue()
        for number in range(count):
            self._waiting.put_nowait(Ticket(number=number, attempt=0))

    async def collect(
        self, fleet: Fleet, waves: Callable[[Any, asyncio.Event], Waves[AnswerT]], lanes: int = 1
    ) -> None:
        """Have the generators of a fleet work, each with its `waves` in so many lanes, until all is answered.

        Raises what they and the fleet fail with.
        """

        async def work(generator: Generator, leave: asyncio.Event) -> None:
            for error in await waves(generator, leave).work(lanes):
                raise error

        if self._count:
            async with fleet.joining(), fleet.working(work, self.fail):
                await self.complete

    async def admit(self, n: int, holder: str) -> list[Ticket]:
        tickets = [await self._waiting.get()]
        while len(tickets) < n and not self._waiting.empty():
            tickets.append(self._waiting.get_nowait())
        self._out.update(tickets)
        return tickets

    def forfeit(self, ticket: Ticket, reason: str) -> None:
        if ticket in self._out and not self.complete.done():
            self._out.remove(ticket)
            self._waiting.put_nowait(Ticket(number=ticket.number, attempt=ticket.attempt + 1))

    def take(self, answers: dict[Ticket, AnswerT]) -> None:
        """Keep answers."""
        self._out -= answers.keys()
        self.found |= {ticket.number: answer for ticket, answer in answers.items()}
        self._advance(len(answers))
        if len(self.found) == self._count and not self.complete.done():
            self.complete.set_result(None)

    def fail(self, error: BaseException) -> None:
        if not self.complete.done():
            self.complete.set_exception(error)


@dataclass(slots=True, kw_only=True)
class _Sampling(PromptWaves):
    """Waves whose responses are answers."""

    answers: Answers[list[Completion]]
    prompts: Sequence[Prompt]
    samples: int
    seed: int

    def prompt(self, ticket: Ticket) -> Prompt:
        return self.prompts[ticket.number]

    def seeds(self, ticket: Ticket) -> list[int]:
        return [stable_hash(self.seed, self.prompt(ticket).id, k) for k in range(self.samples)]

    async def take(self, answers: dict[Ticket, list[Completion]]) -> dict[Ticket, str]:
        self.answers.take(answers)
        return {}
