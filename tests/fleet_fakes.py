"""Generators that die, hang and are slow when a test says so, in this process, and a run of them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from actors.config import RolloutConfig
from actors.engine import GeneratorError
from actors.prompts import PromptStream
from actors.rollout import rollout
from actors.trajectory import Completion, Trajectory
from actors.transfer import Manifest, Rendezvous
from cluster.config.schema import FleetConfig
from cluster.fleet.fleet import Fleet
from cluster.fleet.worker import GeneratorHandle
from cluster.runtime.health import ActorDied
from learner.config import ParityConfig, PublishConfig
from learner.data.buffer import Buffer
from learner.data.ledger import Ledger
from learner.weights.publish import Probe, Publisher
from tests.fakes import FakeEncoding, FakeGenerator, FakeScorer, prompts

T = TypeVar("T")
DEADLINE_S = 10.0
LOGPROBS = [[-1.0, -2.0]]
QUICK = FleetConfig(backoff_s=0.01, watch_s=0.02, replacement_deadline_s=0.3)


@dataclass(eq=False)
class FakeWorker:
    """A generator whose tokens carry the version that it was given last; each call is cut short by its death."""

    name: str
    life: int
    seconds: float = 0.002
    """how long a wave takes"""
    fatal: str = ""
    """the method in which it dies"""
    refuses: str = ""
    """the method that fails although the process lives"""
    hangs_in: str = ""
    """the method that never answers; "" for none, "all" from the first wave on"""
    version: int = -1
    answer: list[list[float]] = field(default_factory=lambda: LOGPROBS)
    calls: list[str] = field(default_factory=list)
    tokens: int = 0
    stopped: bool = False
    _death: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    _inner: FakeGenerator = field(default_factory=FakeGenerator)

    def kill(self) -> None:
        if not self._death.done():
            self._death.set_result(None)

    async def _do(self, method: str, seconds: float = 0.0) -> None:
        self.calls.append(method)
        if method == self.fatal:
            self.kill()
        stuck = self.hangs_in == method or (self.hangs_in == "all" and "generate" in self.calls)
        await asyncio.wait({self._death}, timeout=60.0 if stuck else seconds)
        if self._death.done():
            raise ActorDied(self.name, f"killed in {method}")
        if method == self.refuses:
            raise GeneratorError(f"{self.name} cannot {method}")

    async def generate(
        self, query_ids: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
    ) -> list[Completion]:
        for _ in range(4):
            await self._do("generate", self.seconds / 4)
            self.tokens += len(seeds)
        self._inner.version = self.version
        return await self._inner.generate(query_ids, seeds, max_new_tokens, temperature)

    async def progress(self) -> int:
        await self._do("progress")
        return self.tokens

    async def join(self, rendezvous: Rendezvous, rank: int) -> None:
        await self._do("join")

    async def begin_update(self, recompute: bool = False) -> None:
        await self._do("begin_update")

    async def receive(self, manifest: Manifest) -> dict[str, int]:
        await self._do("receive")
        return {"w": 7}

    async def finish_update(self, version: int) -> None:
        await self._do("finish_update")
        self.version = version

    async def abort_update(self) -> None:
        await self._do("abort_update")

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        await self._do("logprobs")
        return self.answer

    async def echo(self, sequences: Sequence[Sequence[int]]) -> list[tuple[list[float], list[float]]]:
        await self._do("echo")
        return [(row, row) for row in self.answer]

    async def stop(self) -> None:
        self.stopped = True


class FakeSource:
    """The learner as publishing sees it."""

    async def listen_transfer(self, world_size: int, epoch: int) -> Rendezvous:
        return Rendezvous(host="h", port=1, world_size=world_size, epoch=epoch, deadline_s=1, secret="s")

    async def connect_transfer(self) -> None: ...

    async def transfer_manifest(self) -> Manifest:
        return Manifest(names=("w",), dtypes=("float32",), shapes=((1,),), bucket_bytes=64)

    async def send_weights(self) -> dict[str, int]:
        return {"w": 7}

    async def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return LOGPROBS


@dataclass
class Run:
    """A learner that takes, publishes and advances, on a fleet of fake workers."""

    path: Path
    wanted: int = 2
    staleness: int = 0
    config: FleetConfig = QUICK
    silence_s: float = 5.0
    limit: int = 4
    """generators that fit"""
    shape: Callable[[FakeWorker], None] = lambda worker: None
    """changes a worker before it starts; may raise, so that it does not"""
    waves: RolloutConfig = field(default_factory=lambda: RolloutConfig(prompts_per_wave=2, max_new_tokens=6))
    prompts_per_batch: int = 8
    workers: list[FakeWorker] = field(default_factory=list)
    batches: list[list[Trajectory]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fleet = Fleet(self.start, self.wanted, self.config, self.silence_s, self.validate)
        self.stream = PromptStream(prompts(9), seed=3)
        self.ledger = self.path / "ledger.jsonl"
        self.buffer = Buffer(
            self.prompts_per_batch,
            1,
            self.staleness,
            ledger=Ledger(self.ledger, self.stream),
            waiting=self.fleet.joining,
        )

    @contextlib.asynccontextmanager
    async def start(self, name: str) -> AsyncIterator[GeneratorHandle]:
        worker = FakeWorker(name, life=sum(worker.name == name for worker in self.workers))
        self.workers.append(worker)
        await asyncio.sleep(0.01)
        self.shape(worker)
        try:
            yield worker
        finally:
            worker.kill()

    def validate(self, wanted: int) -> None:
        if wanted > self.limit:
            raise ValueError(f"{wanted} do not fit")

    def work(self, generator: Any, leave: asyncio.Event) -> Any:
        return rollout(generator, FakeScorer(), self.stream, self.buffer, FakeEncoding(), self.waves, 11, leave)

    async def publish(self, version: int) -> None:
        self.metrics.append(await self.fleet.publish(version))

    async def train(self, iterations: int, update: Callable[[int], Awaitable[None]] | None = None) -> None:
        """`update(version)` happens between the batch of a version and its publication."""
        async with asyncio.timeout(DEADLINE_S), self.fleet:
            config = PublishConfig(deadline_s=0.5, parity=ParityConfig(mean_bound=0.1, max_bound=0.3))
            self.fleet.publisher = Publisher(FakeSource(), config, [Probe(ids=[1, 2, 3])])
            await self.publish(0)
            try:
                async with self.fleet.working(self.work, self.buffer.fail):
                    for version in range(iterations):
                        self.batches.append(await self.buffer.take(DEADLINE_S))
                        if update is not None:
                            await update(version)
                        await self.publish(version + 1)
                        self.buffer.advance()
            finally:
                self.buffer.close()

    def worker(self, name: str) -> FakeWorker:
        """The latest in a place."""
        return next(worker for worker in reversed(self.workers) if worker.name == name)


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition to come true."""
    try:
        async with asyncio.timeout(DEADLINE_S / 2):
            while not condition():
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError(f"never: {what}") from None
