"""The generators of a run: who samples, who is given the next version, who is replaced, who comes and who goes.

A newcomer takes no work until it has the learner's weights, by a full publication with its proofs. That happens when
everybody is given a version, or while the learner waits for samples. Ray and vLLM are unknown here.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Self

from actors import sampling
from actors.waits import Waits
from cluster.config.schema import FleetConfig
from cluster.fleet.restarts import Place, keep
from cluster.fleet.worker import GeneratorHandle, Worker
from learner.weights.publish import NobodyLeft, Publisher

log = logging.getLogger(__name__)

Start = Callable[[str], AbstractAsyncContextManager[GeneratorHandle]]
"""Starts the generator of that name; leaving the block ends it."""
Work = Callable[[sampling.Generator, asyncio.Event], Coroutine[Any, Any, None]]
"""(generator, leave) -> what keeps it busy until `leave` is set."""


class FleetError(RuntimeError):
    """Too few generators are left; the text names those that are gone, with the causes."""


@dataclass(eq=False, slots=True)
class Seat(Place):
    """A generator's place."""

    keeper: asyncio.Task[None] | None = None
    """What keeps it filled."""
    worker: Worker | None = None
    """Who is there, with whatever weights."""
    serving: bool = False
    """Whether it has the published weights."""
    leaving: bool = False
    """Whether nobody is to come after it."""
    error: Exception | None = None
    """What the last start failed with."""


class Fleet:
    """Keeps `wanted` generators, from `async with` on. An object of one event loop."""

    def __init__(
        self,
        start: Start,
        wanted: int,
        config: FleetConfig,
        silence_s: float,
        validate: Callable[[int], None] = lambda wanted: None,
        waits: Waits | None = None,
    ) -> None:
        """`silence_s`: how long a generator with work may make no token; `validate` raises for a number too many."""
        self.wanted = wanted
        self.config = config
        self.publisher: Publisher | None = None
        """Who hands over the weights; without one, generators serve with those they were started with."""
        self._start = start
        self._silence_s = silence_s
        self._validate = validate
        self._waits = waits or Waits()
        self._seats: dict[str, Seat] = {}
        self._used_up: dict[str, str] = {}  # seats that stay empty, with the cause
        self._restarts = 0  # in seats that are closed
        self._version = 0
        self._publishing = asyncio.Lock()
        self._news = asyncio.Event()
        self._works: dict[Work, Callable[[BaseException], None]] = {}  # with whom to tell why there is no more
        self._tasks: dict[asyncio.Task[None], tuple[Work, Worker]] = {}

    async def __aenter__(self) -> Self:
        """Start all generators; raises what kept the first of them from starting."""
        try:
            self._fill()
            seats = list(self._seats.values())
            while any(seat.worker is None for seat in seats):
                await self._news.wait()
                for seat in seats:
                    if seat.error is not None:
                        raise seat.error
            for seat in seats:
                self._serve(seat)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.wanted = 0
        keepers = [seat.keeper for seat in self._seats.values() if seat.keeper]
        for seat in self._seats.values():
            self._dismiss(seat)
        await asyncio.gather(*keepers, return_exceptions=True)

    @property
    def serving(self) -> list[Worker]:
        """The generators that have the published weights and take work."""
        workers = [seat.worker for seat in self._seats.values() if seat.serving and not seat.leaving]
        return [worker for worker in workers if worker and not worker.gone]

    def metrics(self) -> dict[str, float]:
        """How many there are, how many there should be, and how many were replaced so far."""
        restarts = self._restarts + sum(seat.restarts for seat in self._seats.values())
        sizes = {"fleet/size": len(self.serving), "fleet/wanted": self.wanted, "fleet/restarts": restarts}
        return {name: float(value) for name, value in sizes.items()}

    def scale(self, wanted: int) -> None:
        """Have another number of generators, from the next version on.

        Those that are too many finish their waves and leave; seats that were left empty are tried again. Raises
        ValueError for a number that cannot be.
        """
        if wanted < 1:
            raise ValueError(f"{wanted} generators cannot sample: ask for at least 1")
        self._validate(wanted)
        self.wanted = wanted
        self._used_up.clear()
        staying = [seat for seat in reversed(self._seats.values()) if not seat.leaving]
        staying.sort(key=lambda seat: (seat.serving, seat.worker is not None))
        for seat in staying[: max(0, len(staying) - wanted)]:
            self._dismiss(seat)
        self._fill()

    # --- work

    @contextlib.asynccontextmanager
    async def working(self, work: Work, fail: Callable[[BaseException], None]) -> AsyncIterator[None]:
        """Have every generator work, newcomers too, until the block ends, beside what else they are at.

        `work` raises GeneratorFailed for a generator that has to be replaced. `fail` is told why there can be no
        more samples. Raises FleetError when too few places are left.
        """
        if self._used_up and len(self._seats) < self.config.min_generators:
            raise FleetError(f"{self._shortage(len(self._seats))}: {self._absences()}")
        self._works[work] = fail
        for seat in self._seats.values():
            if seat.serving:
                self._start_work(seat, work)
        watching = asyncio.create_task(self._watch_absence(fail))
        try:
            yield
        finally:
            del self._works[work]
            tasks = [watching, *(task for task, (of, _) in self._tasks.items() if of is work)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _start_work(self, seat: Seat, work: Work) -> None:
        worker = seat.worker
        if worker is None:
            return

        def ended(task: asyncio.Task[None]) -> None:
            del self._tasks[task]
            if worker.leave.is_set() and not self._busy(worker):
                worker.give_up("it was to leave")

        task = asyncio.create_task(self._run(worker, work, self._works[work]), name=seat.name)
        self._tasks[task] = work, worker
        task.add_done_callback(ended)

    def _busy(self, worker: Worker) -> bool:
        return any(of is worker for _, of in self._tasks.values())

    async def _run(self, worker: Worker, work: Work, fail: Callable[[BaseException], None]) -> None:
        try:
            await work(worker, worker.leave)
        except sampling.GeneratorFailed as error:
            worker.give_up(str(error))
        except Exception as error:
            fail(error)

    def _fail(self, error: BaseException) -> None:
        for fail in self._works.values():
            fail(error)

    async def _watch_absence(self, fail: Callable[[BaseException], None]) -> None:
        """Fail when nobody has been there for too long."""
        since, limit = time.monotonic(), self.config.replacement_deadline_s
        while (alone := time.monotonic() - since) < limit:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(limit - alone, self.config.watch_s)):
                    await self._news.wait()
            if any(seat.worker for seat in self._seats.values()):
                since = time.monotonic()
        fail(FleetError(f"no generator has come back for {limit:g} s: {self._absences()}"))

    def _absences(self) -> str:
        """Who is missing, and why."""
        causes = self._used_up | {seat.name: seat.cause for seat in self._seats.values() if seat.worker is None}
        return "; ".join(f"{name}: {cause}" for name, cause in causes.items()) or "nobody is missing"

    # --- versions

    async def publish(self, version: int) -> dict[str, float]:
        """Give everybody who is there the learner's weights: the boundary at which generators join and leave.

        One that is lost on the way is replaced; with nobody there, the version waits for whoever comes.
        Raises as Publisher.publish does when a proof or the transfer itself fails.
        """
        async with self._publishing:
            self._version = version
            there = [seat for seat in self._seats.values() if not seat.leaving]
            return {**await self._hand_over(there), **self.metrics()}

    @contextlib.asynccontextmanager
    async def joining(self) -> AsyncIterator[asyncio.Task[None]]:
        """While the block lasts the learner rests, and newcomers are given the published version without the others.

        Yields what gives it to them. Raises what it raised.
        """
        admitting = asyncio.create_task(self._admit())
        try:
            yield admitting
        finally:
            async with self._publishing:  # a publication that has begun is brought to its end
                admitting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await admitting

    def occupied(self) -> AbstractAsyncContextManager[object]:
        """While the block lasts the learner computes, and newcomers wait for their version."""
        return self._publishing

    async def _admit(self) -> None:
        try:
            while True:
                news = self._news
                async with self._publishing:
                    await self._hand_over([s for s in self._seats.values() if not s.serving and not s.leaving])
                await news.wait()
        except Exception as error:
            self._fail(error)
            self._ring()
            raise

    async def _hand_over(self, seats: Sequence[Seat]) -> dict[str, float]:
        """Publish the present version to the generators of these seats; who gets it serves, who does not is lost."""
        there = [(seat, seat.worker) for seat in seats if seat.worker is not None]
        await asyncio.gather(*(worker.check() for _, worker in there))
        there = [(seat, worker) for seat, worker in there if not worker.gone]
        metrics: dict[str, float] = {}
        lost: dict[str, str] = {}
        if there and self.publisher is not None:
            try:
                done = await self.publisher.publish([worker.handle for _, worker in there], self._version)
                metrics, lost = done.metrics, done.lost
            except NobodyLeft as error:
                lost = error.lost
        for seat, worker in there:
            if worker.name in lost:
                worker.give_up(lost[worker.name])
            elif seat.worker is worker and not seat.serving:
                self._serve(seat)
        return metrics

    # --- seats

    def _fill(self) -> None:
        """Open seats until there are as many as wanted; one that somebody still leaves has to wait."""
        staying = sum(not seat.leaving for seat in self._seats.values())
        names = [f"generator-{index}" for index in range(self.wanted)]
        free = [name for name in names if name not in self._seats and name not in self._used_up]
        for name in free[: max(0, self.wanted - staying)]:
            self._seats[name] = seat = Seat(name)
            seat.keeper = asyncio.create_task(self._keep(seat), name=name)

    async def _keep(self, seat: Seat) -> None:
        try:
            if not await keep(seat, lambda: self._live(seat), self.config, self._waits):
                self._give_up(seat)
        except asyncio.CancelledError:
            if not seat.leaving:  # then all of it ends, and nobody is to come after
                self.wanted = 0
            raise
        finally:
            del self._seats[seat.name]
            self._restarts += seat.restarts
            self._fill()
            self._ring()

    async def _live(self, seat: Seat) -> tuple[str, bool] | None:
        """One generator in a seat, from its start until it is gone; see `keep`."""
        sampled = False
        try:
            async with contextlib.AsyncExitStack() as stack:
                with self._waits.reported(seat.name, lambda: f"its engine to start ({seat.cause})"):
                    handle = await stack.enter_async_context(self._start(seat.name))
                worker = Worker(handle, self.config, self._silence_s, self._publishing.locked)
                seat.worker, watching = worker, asyncio.create_task(worker.watch())
                self._ring()
                try:
                    seat.cause = await worker.departure()
                    if seat.leaving:
                        await worker.stop()
                finally:
                    watching.cancel()
                    worker.give_up("its place is closed")
                    sampled = worker.answers > 0
                    seat.worker, seat.serving = None, False
        except Exception as error:
            seat.error, seat.cause = error, f"it did not start: {error}"
        self._ring()
        return None if seat.leaving else (seat.cause, sampled)

    def _give_up(self, seat: Seat) -> None:
        self._used_up[seat.name] = seat.cause
        left = len(self._seats) - 1
        text = f"{seat.name} was replaced {self.config.max_restarts} times in a row and is lost again: {seat.cause}"
        if left < self.config.min_generators:
            self._fail(FleetError(f"{text}. {self._shortage(left)}"))
        else:
            log.error("%s. Its place stays empty, and the run goes on with %d", text, left)

    def _shortage(self, left: int) -> str:
        return f"{left} generators are left, {self.config.min_generators} are needed"

    def _dismiss(self, seat: Seat) -> None:
        """Let a generator finish its waves and leave; one that has none leaves at once."""
        seat.leaving = True
        if seat.worker is None:
            assert seat.keeper is not None, seat.name
            seat.keeper.cancel()
        else:
            seat.worker.leave.set()
            if not self._busy(seat.worker):
                seat.worker.give_up("it was to leave")

    def _serve(self, seat: Seat) -> None:
        seat.serving = True
        for work in self._works:
            self._start_work(seat, work)
        self._ring()

    def _ring(self) -> None:
        """Wake whoever waits for a change."""
        self._news.set()
        self._news = asyncio.Event()
