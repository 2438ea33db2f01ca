"""The rollout of one generator: kept busy with waves of prompts, whose responses are scored and put into the buffer.

Nothing is lost silently: a ticket ends as scored samples in the buffer, or is forfeited with a reason and
issued again, or stops the run with an error that names its prompt.
"""

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Protocol
from uuid import uuid4

from actors.chat import TextEncoding
from actors.config import RolloutConfig
from actors.prompts import Prompt, PromptStream, encode_prompt, stable_hash
from actors.sampling import Generator, GeneratorFailed, responses
from actors.trajectory import (
    BufferClosed,
    Completion,
    SampleKey,
    StaleTrajectories,
    Ticket,
    Trajectory,
    TrajectoryBuffer,
)
from actors.waits import Waits
from reward_server.schema import ScoreReply, ScoreRequest

# A generator that fails twice in a row is taken to be broken; so a ticket that it has spoilt twice still has
# its last attempt left for another one.
_FAILED_WAVES = 2
log = logging.getLogger(__name__)


class PromptFailed(RuntimeError):
    """A prompt could not be sampled in as many attempts as it may have."""


class Scorer(Protocol):
    """What the rollout needs of `reward_server.client.RewardClient`, which documents it."""

    async def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]: ...
    async def ready(self) -> None: ...


async def rollout(
    generator: Generator,
    scorer: Scorer,
    stream: PromptStream,
    buffer: TrajectoryBuffer,
    encoding: TextEncoding,
    config: RolloutConfig,
    seed: int,
    leave: asyncio.Event,
    waits: Waits | None = None,
) -> None:
    """Keep one generator busy until `leave` is set, and return when the waves under way are done.

    Cancelled, or when the buffer is closed, it gives their tickets back at once. `waits`: of the run.

    Sampling seeds are a hash of (seed, ticket number, k, attempt), so that a response depends on the prompt and the
    weights, not on who sampled it. Raises GeneratorFailed for a broken generator. PromptFailed, a prompt that cannot be
    encoded and whatever the scorer raises end the run: the buffer is told before they are raised.
    """
    waves = Waves(generator, scorer, stream, buffer, encoding, config, seed, leave, waits=waits or Waits())
    lanes = [asyncio.create_task(waves.run()) for _ in range(config.waves_in_flight)]
    leaving = asyncio.create_task(leave.wait())
    try:
        await asyncio.wait([*lanes, leaving], return_when=asyncio.FIRST_COMPLETED)
        if leave.is_set():
            for lane in waves.idle:
                lane.cancel()
            await asyncio.wait(lanes, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in (leaving, *lanes):
            task.cancel()
        await asyncio.wait([leaving, *lanes])
    for lane in lanes:
        error = None if lane.cancelled() else lane.exception()
        if error is not None and not isinstance(error, BufferClosed):
            if not isinstance(error, GeneratorFailed):
                buffer.fail(error)
            raise error


@dataclass(slots=True)
class Waves:
    """Sends waves through one generator, one after the other in each task that runs `run`, until it is to leave."""

    generator: Generator
    scorer: Scorer
    stream: PromptStream
    buffer: TrajectoryBuffer
    encoding: TextEncoding
    config: RolloutConfig
    seed: int
    leave: asyncio.Event
    idle: set[asyncio.Task[None]] = field(default_factory=set)
    """Tasks that wait for tickets and so have nothing to lose."""
    waits: Waits = field(default_factory=Waits)
    failed_waves: int = 0
    # makes the ids of score requests differ from those of another run at the same reward server
    nonce: str = field(default_factory=lambda: uuid4().hex[:12])

    async def run(self) -> None:
        """Admit tickets and send their waves until `leave` is set. Whatever ends it, no ticket stays in flight."""
        while not self.leave.is_set():
            tickets = await self._admit()
            try:
                with self.waits.reported(self.generator.name, lambda: "the reward service, which is paused"):
                    await self.scorer.ready()
                last_attempts = [t for t in tickets if t.attempt + 1 >= self.config.max_attempts > 1]
                together = [t for t in tickets if t not in last_attempts]
                for wave in (together, *([ticket] for ticket in last_attempts)):
                    if wave:
                        await self._wave(wave)
            except BaseException as error:
                reasons = {asyncio.CancelledError: "stopped", GeneratorFailed: "generator lost"}
                reason = reasons.get(type(error), "run failed")
                for ticket in tickets:
                    self.buffer.forfeit(ticket, reason)
                raise

    async def _admit(self) -> list[Ticket]:
        task = asyncio.current_task()
        assert task is not None
        self.idle.add(task)
        try:
            return await self.buffer.admit(self.config.prompts_per_wave, self.generator.name)
        finally:
            self.idle.discard(task)

    async def _wave(self, tickets: list[Ticket]) -> None:
        prompts, samples = list(map(self._prompt, tickets)), range(self.config.samples_per_prompt)
        queries = [encode_prompt(prompt, self.encoding, self.config.max_prompt_tokens) for prompt in prompts]
        seeds = [[stable_hash(self.seed, t.number, k, t.attempt) for k in samples] for t in tickets]
        try:
            groups = await responses(self.generator, prompts, queries, seeds, self.config)
        except GeneratorFailed as error:
            self._lose(tickets, "generator lost", str(error))
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            self._lose(tickets, "generation failed", why)
            self._count_failure(tickets, why)
            return
        full: dict[Ticket, list[Completion]] = {}
        for ticket, completions in zip(tickets, groups, strict=True):
            if all(completion.response_ids for completion in completions):
                self.buffer.generated(ticket)
                full[ticket] = completions
            else:
                self._lose([ticket], "empty response", "a response has no token, not even an EOS")
        if full:
            await self._score(full)

    async def _score(self, sampled: dict[Ticket, list[Completion]]) -> None:
        keyed = [
            (ticket, self._key(ticket, k), completion)
            for ticket, completions in sampled.items()
            for k, completion in enumerate(completions)
        ]
        requests = [
            ScoreRequest(
                id=f"{self.nonce}/{key}",
                prompt=self._prompt(ticket).messages,
                response=completion.text,
                ended=completion.ended,
            )
            for ticket, key, completion in keyed
        ]
        scores = f"{len(requests)} scores of the reward service"
        with self.waits.reported(f"a wave of {self.generator.name}", lambda: scores):
            replies = await self.scorer.score(requests)
        got = [reply.id for reply in replies]
        if got != [request.id for request in requests]:
            raise ValueError(f"{len(requests)} responses were to be scored, the replies are to others: {got[:3]}")
        trajectories: dict[Ticket, list[Trajectory]] = {ticket: [] for ticket in sampled}
        for (ticket, key, completion), reply in zip(keyed, replies, strict=True):
            trajectories[ticket].append(
                Trajectory(
                    key=key,
                    prompt=self._prompt(ticket).messages,
                    completion=completion,
                    score=self.config.missing_eos.apply(reply.score, completion.ended),
                    parts={**reply.parts, "raw_score": reply.score},
                )
            )
        self._put(trajectories)

    def _put(self, trajectories: dict[Ticket, list[Trajectory]]) -> None:
        stale: list[Ticket] = []
        why = ""
        for ticket, samples in trajectories.items():
            try:
                self.buffer.put(ticket, samples)
            except StaleTrajectories as error:
                stale.append(ticket)
                why = str(error)
        if not stale:
            self.failed_waves = 0
            return
        self._lose(stale, "stale", why)
        self._count_failure(stale, why)

    def _lose(self, tickets: list[Ticket], reason: str, why: str) -> None:
        """Forfeit tickets; raise PromptFailed for one that has had its last attempt."""
        for ticket in tickets:
            self.buffer.forfeit(ticket, reason)
        log.warning("forfeited %d tickets from %d on, %s: %s", len(tickets), tickets[0].number, reason, why)
        for ticket in tickets:
            if ticket.attempt + 1 >= self.config.max_attempts:
                raise PromptFailed(
                    f"prompt {self._prompt(ticket).id!r} could not be sampled in {ticket.attempt + 1} "
                    f"attempts; the last: {reason}, {why}. Remove the prompt, or see to the generators"
                )

    def _count_failure(self, tickets: list[Ticket], why: str) -> None:
        self.failed_waves += 1
        if self.failed_waves >= _FAILED_WAVES:
            names = [self._prompt(ticket).id for ticket in tickets[:4]]
            raise GeneratorFailed(
                f"{self.failed_waves} waves in a row failed; the last, of {len(tickets)} prompts, {names} and on: {why}"
            )

    def _prompt(self, ticket: Ticket) -> Prompt:
        return self.stream[ticket.number][0]

    def _key(self, ticket: Ticket, k: int) -> SampleKey:
        prompt, epoch = self.stream[ticket.number]
        return SampleKey(prompt_id=prompt.id, epoch=epoch, k=k, attempt=ticket.attempt)
