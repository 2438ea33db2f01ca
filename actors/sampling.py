"""Sampling that feeds no buffer: completions to be ranked, and held-out responses to be judged."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from actors.config import RolloutConfig
from actors.prompts import Prompt, stable_hash
from actors.trajectory import Completion
from actors.waves import Generator
from reward_server.schema import Message

log = logging.getLogger(__name__)


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
    (seed, prompt id, k), so the same prompts and weights give the same responses whoever samples them. A generator that
    fails gets no further chunk, and the others are given its own. Raises what the last one raised, or TimeoutError that
    names the prompts of its chunk, which took too long.
    """
    size = config.prompts_per_wave
    waiting = list(range(0, len(prompts), size))[::-1]
    free, found = list(generators), dict[int, list[Completion]]()
    working: dict[asyncio.Task[list[Completion]], tuple[Generator, int]] = {}
    error: BaseException | None = None
    try:
        while waiting or working:
            while free and waiting:
                generator, start = free.pop(0), waiting.pop()
                chunk = prompts[start : start + size]
                task = asyncio.create_task(_chunk(generator, chunk, encoding, config, samples, seed))
                working[task] = generator, start
            if not working:
                raise error or ValueError("there is no generator to sample with")
            done, _ = await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                generator, start = working.pop(task)
                error = task.exception()
                if error is None:
                    found[start] = task.result()
                    free.append(generator)
                    advance(len(found[start]) // samples)
                else:
                    waiting.append(start)
                    log.warning("prompt %r and those after it need another generator: %s", prompts[start].id, error)
    finally:
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
    flat = [completion for start in sorted(found) for completion in found[start]]
    return [flat[first : first + samples] for first in range(0, len(flat), samples)]


async def _chunk(
    generator: Generator,
    chunk: Sequence[Prompt],
    encoding: Encoding,
    config: RolloutConfig,
    samples: int,
    seed: int,
) -> list[Completion]:
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
    return flat
