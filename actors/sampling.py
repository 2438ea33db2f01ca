"""Sampling with generators: within a deadline for everybody, and over many prompts for what feeds no buffer."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Protocol

from actors.chat import TextEncoding
from actors.config import RolloutConfig
from actors.prompts import Prompt, stable_hash
from actors.trajectory import Completion

log = logging.getLogger(__name__)


class GeneratorFailed(RuntimeError):
    """A generator is gone, or failed wave after wave. Its tickets are forfeited; other generators can go on."""


class Generator(Protocol):
    """What sampling needs of `actors.generator.Generator`; GeneratorFailed says that it will never sample again."""

    @property
    def name(self) -> str: ...  # who it is, for those who wait for it
    async def generate(
        self, query_ids: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
    ) -> list[Completion]: ...


async def responses(
    generator: Generator,
    prompts: Sequence[Prompt],
    queries: Sequence[list[int]],
    seeds: Sequence[Sequence[int]],
    config: RolloutConfig,
) -> list[list[Completion]]:
    """The responses to each prompt, one a seed of its, all sampled at once; `queries` are the encoded prompts.

    Raises what the generator raises, or TimeoutError that names the prompts when `config.wave_deadline_s` is over.
    """
    flat = [query for query, own in zip(queries, seeds, strict=True) for _ in own]
    limit = asyncio.timeout(config.wave_deadline_s)
    try:
        async with limit:
            found = await generator.generate(flat, list(chain(*seeds)), config.max_new_tokens, config.temperature)
    except TimeoutError:
        if not limit.expired():
            raise
        raise TimeoutError(
            f"{len(flat)} responses, to prompt {prompts[0].id!r} and those after it, were not sampled within "
            f"{config.wave_deadline_s:g} s; see the generators' logs, or raise rollout.wave_deadline_s"
        ) from None
    assert len(found) == len(flat), f"{len(found)} responses came back for {len(flat)} queries"
    rest = iter(found)
    return [list(islice(rest, len(own))) for own in seeds]


async def sample(
    generators: Sequence[Generator],
    prompts: Sequence[Prompt],
    encoding: TextEncoding,
    config: RolloutConfig,
    samples: int,
    seed: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[Completion]]:
    """`samples` responses to each prompt, in the order of the prompts, for no buffer: to be ranked or judged.

    Chunks of `config.prompts_per_wave` prompts go to whichever generator is free. The seed of a response is a hash of
    (seed, prompt id, k), so the same prompts and weights give the same responses whoever samples them. A generator that
    fails gets no further chunk, and the others are given its own. Raises what the last one raised, or TimeoutError that
    names the prompts of its chunk, which took too long.
    """
    size = config.prompts_per_wave
    waiting = list(range(0, len(prompts), size))[::-1]
    free, found = list(generators), dict[int, list[list[Completion]]]()
    working: dict[asyncio.Task[list[list[Completion]]], tuple[Generator, int]] = {}
    error: BaseException | None = None
    try:
        while waiting or working:
            while free and waiting:
                generator, start = free.pop(0), waiting.pop()
                chunk = prompts[start : start + size]
                queries = [encoding.prompt(prompt.messages) for prompt in chunk]
                seeds = [[stable_hash(seed, prompt.id, k) for k in range(samples)] for prompt in chunk]
                task = asyncio.create_task(responses(generator, chunk, queries, seeds, config))
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
                    advance(len(found[start]))
                else:
                    waiting.append(start)
                    log.warning("prompt %r and those after it need another generator: %s", prompts[start].id, error)
    finally:
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
    return [group for start in sorted(found) for group in found[start]]
