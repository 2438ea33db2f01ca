"""The rollout of a run: every generator kept busy with waves until the learner has had enough."""

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from typing import Any

from actors.config import RolloutConfig
from actors.prompts import PromptEncoding, PromptStream
from actors.trajectory import BufferClosed, TrajectoryBuffer
from actors.waves import Generator, GeneratorFailed, Scorer, Waves

log = logging.getLogger(__name__)


async def rollout(
    generator: Generator,
    scorer: Scorer,
    stream: PromptStream,
    buffer: TrajectoryBuffer,
    encoding: PromptEncoding,
    config: RolloutConfig,
    seed: int,
    stop: asyncio.Event,
) -> None:
    """Keep one generator busy until `stop` is set or the buffer is closed; waves under way are then
    forfeited.

    Sampling seeds are a hash of (seed, ticket number, k, attempt), so that a response depends on the prompt
    and the weights, not on who sampled it. Raises GeneratorFailed for a broken generator. PromptFailed, a
    prompt that cannot be encoded and whatever the scorer raises end the run: the buffer is told before they
    are raised.
    """
    waves = Waves(generator, scorer, stream, buffer, encoding, config, seed)
    lanes = [asyncio.create_task(waves.run()) for _ in range(config.waves_in_flight)]
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([*lanes, stopping], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (stopping, *lanes):
            task.cancel()
        await asyncio.wait([stopping, *lanes])
    for lane in lanes:
        error = None if lane.cancelled() else lane.exception()
        if error is not None and not isinstance(error, BufferClosed):
            if not isinstance(error, GeneratorFailed):
                buffer.fail(error)
            raise error


async def supervise(rollouts: Mapping[str, Coroutine[Any, Any, None]], buffer: TrajectoryBuffer) -> None:
    """Run the rollouts of all generators, by name; one whose generator fails is left out while another works.

    Returns when the last one returned. Otherwise raises what ended the last one, after having told the
    buffer.
    """
    tasks = [asyncio.create_task(rollout, name=name) for name, rollout in rollouts.items()]
    running = set(tasks)
    try:
        while running:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if isinstance(error, GeneratorFailed) and running:
                    log.error("generator %r is out: %s; %d go on", task.get_name(), error, len(running))
                elif error is not None:
                    buffer.fail(error)
                    raise error
    finally:
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
