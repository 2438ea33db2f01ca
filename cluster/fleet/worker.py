"""One life of a generator: its calls end when it is gone: dead, hanging, given up, or left."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from actors import sampling
from actors.engine import GeneratorError
from actors.sampling import GeneratorFailed
from actors.trajectory import Completion
from cluster.config.schema import FleetConfig
from cluster.runtime.health import ActorDied
from learner.weights.publish import Receiver

_STOP_S = 15.0  # a generator that leaves has so long to end its engine before it is killed
_CHECK_S = 5.0
T = TypeVar("T")


class GeneratorHandle(sampling.Generator, Receiver, Protocol):
    """A generator's handle: to sample, to take new weights, to be asked whether it gets on, and to be stopped."""

    async def progress(self) -> int:
        """Tokens sampled so far. Raises when it is dead."""
        ...

    async def echo(self, sequences: Sequence[Sequence[int]]) -> list[tuple[list[float], list[float]]]:
        """Log-probs of the tokens of sequences, and of the likeliest in their places."""
        ...

    async def stop(self) -> None:
        """End the engine."""


class Worker:
    """A generator that runs, from its start to its loss or leave. Made where an event loop runs."""

    def __init__(self, handle: GeneratorHandle, config: FleetConfig, silence_s: float, paused: Callable[[], bool]):
        """`silence_s`: how long it may make no token while it has work, unless `paused()`, as weights arrive."""
        self.handle = handle
        self.name = handle.name
        self.leave = asyncio.Event()
        """Set when it is to take no more work."""
        self.answers = 0
        """Calls to sample that it has answered."""
        self._calls = 0  # to sample, that it has not answered yet
        self._watch_s = config.watch_s
        self._silence_s = silence_s
        self._paused = paused
        self._departure: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def gone(self) -> bool:
        """Whether it is lost or has left."""
        return self._departure.done()

    async def departure(self) -> str:
        """Wait until it is gone; why."""
        return await asyncio.shield(self._departure)

    def give_up(self, cause: str) -> None:
        """Have it gone, and whoever works with it stop; the first cause stands."""
        if not self._departure.done():
            self._departure.set_result(cause)
            self.leave.set()

    async def generate(
        self, query_ids: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
    ) -> list[Completion]:
        """Sample. Raises GeneratorFailed as soon as the generator is gone, whether it answers or not."""
        return await self._answer(self.handle.generate(query_ids, seeds, max_new_tokens, temperature))

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of the tokens of sequences. Raises as `generate` does."""
        return await self._answer(self.handle.logprobs(sequences))

    async def echo(self, sequences: Sequence[Sequence[int]]) -> list[tuple[list[float], list[float]]]:
        """Log-probs of the tokens of sequences and of the likeliest in their places. Raises as `generate` does."""
        return await self._answer(self.handle.echo(sequences))

    async def _answer(self, asking: Coroutine[Any, Any, T]) -> T:
        call = asyncio.ensure_future(asking)
        call.add_done_callback(lambda task: task.cancelled() or task.exception())  # it may come after the end
        self._calls += 1
        try:
            await asyncio.wait({call, self._departure}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise GeneratorFailed(f"{self.name} is gone: {self._departure.result()}")
            answer = call.result()
            self.answers += 1
            return answer
        except (ActorDied, GeneratorError) as error:
            self.give_up(str(error))
            raise GeneratorFailed(f"{self.name} is gone: {error}") from error
        finally:
            self._calls -= 1
            call.cancel()

    async def watch(self) -> None:
        """Give it up when it is dead, does not answer, or has work and makes no token."""
        tokens, since = -1, time.monotonic()
        while not self.gone:
            await asyncio.sleep(self._watch_s)
            now = await self.check(self._silence_s)
            if now is None:
                self.give_up(f"it answered nothing for {self._silence_s:g} s")
            elif now != tokens or not self._calls or self._paused():
                tokens, since = now, time.monotonic()
            elif (silence := time.monotonic() - since) > self._silence_s:
                self.give_up(f"it made no token for {silence:.0f} s, and {self._calls} prompts wait")

    async def check(self, within_s: float = _CHECK_S) -> int | None:
        """Tokens sampled so far; None if it does not answer at once, as it may be busy. Gives it up if it is dead."""
        try:
            async with asyncio.timeout(within_s):
                return await self.handle.progress()
        except TimeoutError:
            return None
        except Exception as error:
            self.give_up(str(error))
            return None

    async def stop(self) -> None:
        """End its engine in good order, as far as it goes."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_STOP_S):
                await self.handle.stop()
