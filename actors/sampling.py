"""Sampling that feeds no buffer: completions to be ranked, and held-out responses to be judged."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from actors.config import RolloutConfig
from actors.prompts import Prompt, stable_hash
from actors.trajectory import Completion
from actors.waves import Generator
from reward_server.schema import Message


class Encoding(Protocol):
    """What sampling needs of `reward_server.encoding.ChatEncoding`."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation and open the assistant's turn."""
        ...


async def sample(
    generators: Sequence[Generator],
    prompts: Sequence[Prompt],
    encoding: Encoding,
    config: RolloutConfig,
    samples: int,
    seed: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[Completion]]:
    """`samples` responses to each prompt, in the order of the prompts.

    Chunks of `config.prompts_per_wave` prompts go to whichever generator is free. The seed of a response is a hash of
    (seed, prompt id, k), so the same prompts and weights give the same responses whoever samples them. Raises
    TimeoutError that names the prompts of a chunk that took too long, and what a generator raises.
    """
    size = config.prompts_per_wave
    waiting = list(range(0, len(prompts), size))[::-1]
    found: dict[int, list[list[Completion]]] = {}

    async def work(generator: Generator) -> None:
        while waiting:
            start = waiting.pop()
            chunk = prompts[start : start + size]
            queries = [encoding.prompt(prompt.messages) for prompt in chunk for _ in range(samples)]
            seeds = [stable_hash(seed, prompt.id, k) for prompt in chunk for k in range(samples)]
            limit = asyncio.timeout(config.wave_deadline_s)
            try:
                async with limit:
                    flat = await generator.generate(queries, seeds, config.max_new_tokens, config.temperature)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise TimeoutError(
                    f"{len(queries)} responses, to prompt {chunk[0].id!r} and those after it, were not sampled within "
                    f"{config.wave_deadline_s:g} s; see the generators' logs, or raise rollout.wave_deadline_s"
                ) from None
            assert len(flat) == len(queries), f"{len(flat)} responses came back for {len(queries)} queries"
            found[start] = [flat[i : i + samples] for i in range(0, len(flat), samples)]
            advance(len(chunk))

    await asyncio.gather(*(work(generator) for generator in generators))
    return [group for start in sorted(found) for group in found[start]]
