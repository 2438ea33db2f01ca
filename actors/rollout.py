"""The rollout of one generator: kept busy with waves of prompts, whose responses are scored and put into the buffer."""

import asyncio
from dataclasses import dataclass, field
from typing import Protocol
from uuid import uuid4

from actors.chat import TextEncoding
from actors.config import RolloutConfig
from actors.prompts import Prompt, PromptStream, stable_hash
from actors.sampling import Generator, GeneratorFailed, PromptWaves
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
    beside: bool = True,
) -> None:
    """Keep one generator busy until `leave` is set, and return when the waves under way are done.

    Cancelled, or when the buffer is closed, it gives their tickets back at once. `waits`: of the run. `beside`: a
    response is scored as soon as it is complete, else all of a wave together, while the generator rests.

    Sampling seeds are a hash of (seed, ticket number, k, attempt), so that a response depends on the prompt and the
    weights, not on who sampled it. Raises GeneratorFailed for a broken generator. PromptFailed, a prompt that cannot be
    encoded and whatever the scorer raises end the run: the buffer is told before they are raised.
    """
    waves = _Rollout(
        generator=generator,
        tickets=buffer,
        encoding=encoding,
        config=config,
        leave=leave,
        scorer=scorer,
        stream=stream,
        buffer=buffer,
        seed=seed,
        waits=waits or Waits(),
        beside=beside,
    )
    for error in await waves.work(config.waves_in_flight):
        if not isinstance(error, BufferClosed):
            if not isinstance(error, GeneratorFailed):
                buffer.fail(error)
            raise error


@dataclass(slots=True, kw_only=True)
class _Rollout(PromptWaves):
    """Waves whose responses are scored and put into the buffer."""

    scorer: Scorer
    stream: PromptStream
    buffer: TrajectoryBuffer
    seed: int
    waits: Waits
    # makes the ids of score requests differ from those of another run at the same reward server
    nonce: str = field(default_factory=lambda: uuid4().hex[:12])

    def prompt(self, ticket: Ticket) -> Prompt:
        return self.stream[ticket.number][0]

    def seeds(self, ticket: Ticket) -> list[int]:
        samples = range(self.config.samples_per_prompt)
        return [stable_hash(self.seed, ticket.number, k, ticket.attempt) for k in samples]

    async def ready(self) -> None:
        with self.waits.reported(self.generator.name, lambda: "the reward service, which is paused"):
            await self.scorer.ready()

    async def take(self, answers: dict[Ticket, list[Completion]]) -> dict[Ticket, str]:
        for ticket in answers:
            self.buffer.generated(ticket)
        keyed = [
            (ticket, self._key(ticket, k), completion)
            for ticket, completions in answers.items()
            for k, completion in enumerate(completions)
        ]
        requests = [
            ScoreRequest(
                id=f"{self.nonce}/{key}",
                prompt=self.prompt(ticket).messages,
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
        trajectories: dict[Ticket, list[Trajectory]] = {ticket: [] for ticket in answers}
        for (ticket, key, completion), reply in zip(keyed, replies, strict=True):
            trajectories[ticket].append(
                Trajectory(
                    key=key,
                    prompt=self.prompt(ticket).messages,
                    completion=completion,
                    score=self.config.missing_eos.apply(reply.score, completion.ended),
                    parts={**reply.parts, "raw_score": reply.score},
                )
            )
        return self._put(trajectories)

    def _put(self, trajectories: dict[Ticket, list[Trajectory]]) -> dict[Ticket, str]:
        stale: dict[Ticket, str] = {}
        for ticket, samples in trajectories.items():
            try:
                self.buffer.put(ticket, samples)
            except StaleTrajectories as error:
                stale[ticket] = str(error)
        if stale:
            self.lose(list(stale), "stale", next(iter(stale.values())))
        return stale

    def _key(self, ticket: Ticket, k: int) -> SampleKey:
        prompt, epoch = self.stream[ticket.number]
        return SampleKey(prompt_id=prompt.id, epoch=epoch, k=k, attempt=ticket.attempt)
