"""A generator's place in the fleet, and one life of a generator in it.

Its calls end when it is gone, and it is gone when it is dead, hangs, is given up, or has left. Then the next one is
started in its place, unless that has happened too often.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from actors import waves
from actors.engine import GeneratorError
from actors.trajectory import Completion
from actors.waits import Waits
from actors.waves import GeneratorFailed
from cluster.config.schema import FleetConfig
from cluster.runtime.health import ActorDied
from learner.weights.publish import Receiver

_STOP_S = 15.0  # a generator that leaves has so long to end its engine before it is killed
_CHECK_S = 5.0
log = logging.getLogger(__name__)


class GeneratorHandle(waves.Generator, Receiver, Protocol):
    """A generator's handle: to sample, to take new weights, to be asked whether it gets on, and to be stopped."""

    async def progress(self) -> int:
        """Tokens sampled so far. Raises when it is dead."""
        ...

    async def stop(self) -> None:
        """End the engine."""


class Worker:
    """A generator that runs, from its start to its loss or leave."""

    def __init__(self, handle: GeneratorHandle, watch_s: float, silence_s: float, paused: Callable[[], bool]) -> None:
        """`paused()`: True while no token is to be expected, as weights are handed over."""
        self.handle = handle
        self.name = handle.name
        self.leave = asyncio.Event()
        """Set when it is to take no more work."""
        self.waves_done = 0
        self._waves = 0
        self._watch_s = watch_s
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
        call = asyncio.ensure_future(self.handle.generate(query_ids, seeds, max_new_tokens, temperature))
        call.add_done_callback(lambda task: task.cancelled() or task.exception())  # it may come after the end
        self._waves += 1
        try:
            await asyncio.wait({call, self._departure}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise GeneratorFailed(f"{self.name} is gone: {self._departure.result()}")
            completions = call.result()
            self.waves_done += 1
            return completions
        except (ActorDied, GeneratorError) as error:
            self.give_up(str(error))
            raise GeneratorFailed(f"{self.name} is gone: {error}") from error
        finally:
            self._waves -= 1
            call.cancel()

    async def watch(self) -> None:
        """Give it up when it is dead, does not answer, or has work and makes no token."""
        tokens, since = -1, time.monotonic()
        while not self.gone:
            await asyncio.sleep(self._watch_s)
            try:
                async with asyncio.timeout(self._silence_s):
                    now = await self.handle.progress()
            except TimeoutError:
                self.give_up(f"it answered nothing for {self._silence_s:g} s")
            except Exception as error:
                self.give_up(str(error))
            else:
                if now != tokens or not self._waves or self._paused():
                    tokens, since = now, time.monotonic()
                elif (silence := time.monotonic() - since) > self._silence_s:
                    self.give_up(f"it made no token for {silence:.0f} s, and {self._waves} waves wait")

    async def check(self) -> None:
        """Give it up if it is known to be dead. One that does not answer at once may be busy."""
        try:
            async with asyncio.timeout(_CHECK_S):
                await self.handle.progress()
        except TimeoutError:
            return
        except Exception as error:
            self.give_up(str(error))

    async def stop(self) -> None:
        """End its engine in good order, as far as it goes."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_STOP_S):
                await self.handle.stop()


class Start(Protocol):
    """Starts a generator's process in the place of that name; leaving the block ends it."""

    def __call__(self, name: str) -> AbstractAsyncContextManager[GeneratorHandle]: ...


class Place:
    """Has a generator, and another one when it is lost, until it is told to close or has lost too many."""

    def __init__(self, name: str, config: FleetConfig, changed: Callable[[], None], waits: Waits) -> None:
        """`changed` is called when a generator has started, and when it is gone."""
        self.name = name
        self.worker: Worker | None = None
        """Who is there, with whatever weights."""
        self.serving = False
        """Whether it has the published weights."""
        self.leaving = False
        self.restarts = 0
        self.cause = "it is starting"
        """Why nobody is there."""
        self.error: BaseException | None = None
        """What the last start failed with."""
        self._config = config
        self._changed = changed
        self._waits = waits
        self._losses = 0  # in a row, without a wave in between

    async def keep(self, start: Start, silence_s: float, paused: Callable[[], bool]) -> bool:
        """Have generators until it is left; False when its restarts are used up. See Worker for the last two."""
        while not self.leaving:
            try:
                async with contextlib.AsyncExitStack() as stack:
                    with self._waits.reported(self.name, lambda: f"its engine to start ({self.cause})"):
                        handle = await stack.enter_async_context(start(self.name))
                    await self._host(Worker(handle, self._config.watch_s, silence_s, paused))
            except Exception as error:
                self.error, self.cause = error, f"it did not start: {error}"
            self._changed()
            if self.leaving:
                break
            self._losses += 1
            if self._losses > self._config.max_restarts:
                return False
            await self._rest()
        return True

    async def _host(self, worker: Worker) -> None:
        """Have a started generator until it is gone."""
        self.worker = worker
        watching = asyncio.create_task(worker.watch())
        self._changed()
        try:
            self.cause = await worker.departure()
            if self.leaving:
                await worker.stop()
        finally:
            watching.cancel()
            worker.give_up("its place is closed")
            self._losses = 0 if worker.waves_done else self._losses
            self.worker, self.serving = None, False

    async def _rest(self) -> None:
        """Wait until the next start is due."""
        seconds = self._config.backoff_s * 2 ** (self._losses - 1)
        count = f"{self._losses} of {self._config.max_restarts}"
        log.warning("%s is lost: %s. It is replaced in %g s (%s)", self.name, self.cause, seconds, count)
        self.restarts += 1
        with self._waits.reported(self.name, lambda: f"its turn to be replaced ({count}), lost since {self.cause}"):
            await asyncio.sleep(seconds)
