"""The generators of a run: who samples, who is given the next version, who is replaced, who comes and who goes.

A newcomer takes no work until it has the learner's weights, by a full publication with its proofs. That happens when
everybody is given a version, or while the learner waits for samples. Ray and vLLM are unknown here.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Self

from actors import waves
from actors.waits import Waits
from cluster.config.schema import FleetConfig
from cluster.fleet.worker import Place, Start, Worker
from learner.weights.publish import NobodyLeft, Publisher

log = logging.getLogger(__name__)

Work = Callable[[waves.Generator, asyncio.Event], Coroutine[Any, Any, None]]
"""(generator, leave) -> what keeps it busy until `leave` is set."""


class FleetError(RuntimeError):
    """Too few generators are left; the text names those that are gone, with the causes."""


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
        """`silence_s`: how long a generator with work may make no token; `validate` raises for a number too many;
        `waits`: of the run.
        """
        self.wanted = wanted
        self.config = config
        self.publisher: Publisher | None = None
        """Who hands over the weights; without one, generators serve with those they were started with."""
        self._start = start
        self._silence_s = silence_s
        self._validate = validate
        self._waits = waits or Waits()
        self._places: dict[str, Place] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._used_up: dict[str, str] = {}  # places that stay empty, with the cause
        self._restarts = 0  # in places that are closed
        self._version = 0
        self._publishing = asyncio.Lock()
        self._news = asyncio.Event()
        self._work: Work | None = None
        self._tasks: dict[asyncio.Task[None], Worker] = {}
        self._fail: Callable[[BaseException], None] = lambda error: None

    async def __aenter__(self) -> Self:
        """Start all generators; raises what kept the first of them from starting."""
        try:
            self._fill()
            places = list(self._places.values())
            while any(place.worker is None for place in places):
                await self._news.wait()
                for place in places:
                    if place.error is not None:
                        raise place.error
            for place in places:
                self._serve(place)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.wanted = 0
        keepers = list(self._keepers.values())
        for place in self._places.values():
            self._dismiss(place)
        await asyncio.gather(*keepers, return_exceptions=True)

    @property
    def serving(self) -> list[Worker]:
        """The generators that have the published weights and take work."""
        reached = [place for place in self._places.values() if place.serving and not place.leaving]
        return [place.worker for place in reached if place.worker and not place.worker.gone]

    def metrics(self) -> dict[str, float]:
        """How many there are, how many there should be, and how many were replaced so far."""
        restarts = self._restarts + sum(place.restarts for place in self._places.values())
        sizes = {"fleet/size": len(self.serving), "fleet/wanted": self.wanted, "fleet/restarts": restarts}
        return {name: float(value) for name, value in sizes.items()}

    def scale(self, wanted: int) -> None:
        """Have another number of generators, from the next version on.

        Those that are too many finish their waves and leave; places that were left empty are tried again. Raises
        ValueError for a number that cannot be.
        """
        if wanted < 1:
            raise ValueError(f"{wanted} generators cannot sample: ask for at least 1")
        self._validate(wanted)
        self.wanted = wanted
        self._used_up.clear()
        staying = [place for place in reversed(self._places.values()) if not place.leaving]
        staying.sort(key=lambda place: (place.serving, place.worker is not None))
        for place in staying[: max(0, len(staying) - wanted)]:
            self._dismiss(place)
        self._fill()

    # --- work

    async def wait_serving(self) -> list[Worker]:
        """The generators that serve, at least one. Raises FleetError when none comes within the deadline."""
        async with self.joining() as admitting:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.config.replacement_deadline_s):
                    with self._waits.reported("the fleet", lambda: f"a first generator: {self._absences()}"):
                        while not self.serving and self._places and not admitting.done():
                            await self._news.wait()
        if not self.serving:
            raise FleetError(f"no generator is left: {self._absences()}")
        return self.serving

    @contextlib.asynccontextmanager
    async def rollouts(self, work: Work, fail: Callable[[BaseException], None]) -> AsyncIterator[None]:
        """Have every generator work, newcomers too, until the block ends.

        `work` raises GeneratorFailed for a generator that has to be replaced. `fail` is told why there can be no
        more samples.
        """
        self._work, self._fail = work, fail
        for place in self._places.values():
            if place.serving:
                self._start_work(place)
        watching = asyncio.create_task(self._watch_absence())
        try:
            yield
        finally:
            self._work, self._fail = None, lambda error: None
            tasks = [watching, *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- versions

    async def publish(self, version: int) -> dict[str, float]:
        """Give everybody who is there the learner's weights: the boundary at which generators join and leave.

        One that is lost on the way is replaced; with nobody there, the version waits for whoever comes.
        Raises as Publisher.publish does when a proof or the transfer itself fails.
        """
        async with self._publishing:
            self._version = version
            there = [place for place in self._places.values() if not place.leaving]
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

    async def _admit(self) -> None:
        try:
            while True:
                news = self._news
                async with self._publishing:
                    await self._hand_over([p for p in self._places.values() if not p.serving and not p.leaving])
                await news.wait()
        except Exception as error:
            self._fail(error)
            self._ring()
            raise

    async def _hand_over(self, places: Sequence[Place]) -> dict[str, float]:
        """Publish the present version to the generators of these places; who gets it serves, who does not is lost."""
        reached = [(place, place.worker) for place in places if place.worker is not None]
        await asyncio.gather(*(worker.check() for _, worker in reached))
        reached = [(place, worker) for place, worker in reached if not worker.gone]
        metrics: dict[str, float] = {}
        lost: dict[str, str] = {}
        if reached and self.publisher is not None:
            try:
                done = await self.publisher.publish([worker.handle for _, worker in reached], self._version)
                metrics, lost = done.metrics, done.lost
            except NobodyLeft as error:
                lost = error.lost
        for place, worker in reached:
            if worker.name in lost:
                worker.give_up(lost[worker.name])
            elif place.worker is worker and not place.serving:
                self._serve(place)
        return metrics

    # --- places

    def _fill(self) -> None:
        """Open places until there are as many as wanted; one that somebody still leaves has to wait."""
        staying = sum(not place.leaving for place in self._places.values())
        names = [f"generator-{index}" for index in range(self.wanted)]
        free = [name for name in names if name not in self._places and name not in self._used_up]
        for name in free[: max(0, self.wanted - staying)]:
            self._places[name] = place = Place(name, self.config, self._ring, self._waits)
            self._keepers[name] = asyncio.create_task(self._keep(place), name=name)

    async def _keep(self, place: Place) -> None:
        try:
            if not await place.keep(self._start, self._silence_s, self._publishing.locked):
                self._leave_empty(place)
        finally:
            del self._places[place.name], self._keepers[place.name]
            self._restarts += place.restarts
            self._fill()
            self._ring()

    def _leave_empty(self, place: Place) -> None:
        self._used_up[place.name] = place.cause
        left = len(self._places) - 1
        text = f"{place.name} was replaced {self.config.max_restarts} times in a row and is lost again: {place.cause}"
        if left < self.config.min_generators:
            self._fail(FleetError(f"{text}. {left} generators are left, {self.config.min_generators} are needed"))
        else:
            log.error("%s. Its place stays empty, and the run goes on with %d", text, left)

    def _dismiss(self, place: Place) -> None:
        """Let a generator finish its waves and leave; one that has none leaves at once."""
        place.leaving = True
        if place.worker is None:
            self._keepers[place.name].cancel()
        else:
            place.worker.leave.set()
            if place.worker not in self._tasks.values():
                place.worker.give_up("it was to leave")

    def _serve(self, place: Place) -> None:
        place.serving = True
        if self._work is not None:
            self._start_work(place)
        self._ring()

    def _start_work(self, place: Place) -> None:
        assert place.worker is not None, place.name
        assert self._work is not None, "nothing to do"
        task = asyncio.create_task(self._run(place.worker, self._work), name=place.name)
        self._tasks[task] = place.worker
        task.add_done_callback(self._tasks.pop)

    async def _run(self, worker: Worker, work: Work) -> None:
        try:
            await work(worker, worker.leave)
        except waves.GeneratorFailed as error:
            worker.give_up(str(error))
        except Exception as error:
            self._fail(error)
        if worker.leave.is_set():
            worker.give_up("it was to leave")

    async def _watch_absence(self) -> None:
        """Stop the run when nobody has been there for too long."""
        since, limit = time.monotonic(), self.config.replacement_deadline_s
        while (alone := time.monotonic() - since) < limit:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(limit - alone, self.config.watch_s)):
                    await self._news.wait()
            if any(place.worker for place in self._places.values()):
                since = time.monotonic()
        self._fail(FleetError(f"no generator has come back for {limit:g} s: {self._absences()}"))

    def _absences(self) -> str:
        """Who is missing, and why."""
        causes = {place.name: place.cause for place in self._places.values() if place.worker is None}
        return (
            "; ".join(f"{name}: {cause}" for name, cause in {**self._used_up, **causes}.items()) or "nobody is missing"
        )

    def _ring(self) -> None:
        """Wake whoever waits for a change."""
        self._news.set()
        self._news = asyncio.Event()
