"""The rollout of one generator: it is kept busy with waves until it is told to leave."""

import asyncio

from actors.config import RolloutConfig
from actors.prompts import PromptEncoding, PromptStream
from actors.trajectory import BufferClosed, TrajectoryBuffer
from actors.waits import Waits
from actors.waves import Generator, GeneratorFailed, Scorer, Waves


async def rollout(
    generator: Generator,
    scorer: Scorer,
    stream: PromptStream,
    buffer: TrajectoryBuffer,
    encoding: PromptEncoding,
    config: RolloutConfig,
    seed: int,
    leave: asyncio.Event,
    waits: Waits | None = None,
) -> None:
    """Keep one generator busy until `leave` is set, and return when the waves under way are done.

    Cancelled, or when the buffer is closed, it gives their tickets back at once. `waits`: of the run.

    Sampling seeds are a hash of (seed, ticket number, k, attempt), so that a response depends on the prompt
    and the weights, not on who sampled it. Raises GeneratorFailed for a broken generator. PromptFailed, a
    prompt that cannot be encoded and whatever the scorer raises end the run: the buffer is told before they
    are raised.
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
