"""Who runs where: the processes of a run, started on Ray and stopped with the block that asked for them."""

import contextlib
import dataclasses
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import ray

from actors.config import GeneratorConfig
from actors.generator import Generator
from cluster.config.schema import ClusterConfig
from cluster.fleet.fleet import Fleet
from cluster.fleet.reward_replicas import reward_replicas
from cluster.fleet.worker import GeneratorHandle
from cluster.runtime.actor import Handle, remote
from cluster.runtime.health import Health, Monitor
from cluster.runtime.placement import Placement
from cluster.runtime.resources import Plan, Process, ResourceError, machine_cores, machine_gpus
from learner.worker.group import LearnerGroup
from learner.worker.worker import LearnerWorker
from reward_server.bearer import bearer_token
from reward_server.client import RewardClient
from reward_server.config import UNTRUSTED, LoadingConfig, SourceConfig
from reward_server.service import RewardService

_JEMALLOC = Path(ray.__file__).with_name("core") / "libjemalloc.so"  # comes with Ray
# glibc returns freed tensors and faults their pages in again; this keeps them.
KEEPS_MEMORY = {
    "LD_PRELOAD": str(_JEMALLOC),
    "MALLOC_CONF": "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1",
}
_CACHE = "TORCHINDUCTOR_CACHE_DIR"  # what torch.compile compiled: for all ranks, and for who resumes


class Processes:
    """Starts the processes of a plan; those of one block end with it."""

    def __init__(
        self,
        config: ClusterConfig,
        plan: Plan,
        log_dir: Path,
        placement: Placement | None = None,
        monitor: Monitor | None = None,
        loading: LoadingConfig = UNTRUSTED,
    ) -> None:
        """A process that has no bundle, such as a generator that joins later, goes wherever there is room.

        `monitor` is told of every process, and of the client of the reward service.
        """
        self.config = config
        self.plan = plan
        self.log_dir = log_dir
        self.placement = placement
        self.monitor = monitor or Monitor()
        self.loading = loading

    @contextlib.asynccontextmanager
    async def learner(self) -> AsyncIterator[LearnerGroup]:
        """All learner ranks, connected with each other, without networks."""
        ranks = self.config.learner_ranks
        async with contextlib.AsyncExitStack() as stack:
            handles = []
            for rank in range(ranks):
                name, apart = f"learner-{rank}", self.plan.gpus_apart
                starting = self._process(LearnerWorker, name, rank, ranks, self._threads(name), apart, self.loading)
                handles.append(await stack.enter_async_context(starting))
            group = LearnerGroup(handles)
            await group.start(_one_machine(), self.config.start_deadline_s)
            yield group

    @contextlib.asynccontextmanager
    async def generators(self, config: GeneratorConfig, model_path: Path) -> AsyncIterator[Fleet]:
        """All generators, with the weights of `model_path` as version 0."""

        @contextlib.asynccontextmanager
        async def start(name: str) -> AsyncIterator[GeneratorHandle]:
            own = config.model_copy(update={"threads": self._threads(name)})
            async with self._process(
                Generator, name, own, model_path, name, self.plan.gpus_apart, self.loading
            ) as handle:
                await handle.call("start", deadline_s=config.start_deadline_s + 30)
                yield cast(GeneratorHandle, handle)  # a handle has the methods of its class, which no type checker sees

        waits = self.monitor.waits
        fleet = Fleet(
            start, self.config.generators, self.config.fleet, config.progress_deadline_s, self._validate, waits
        )
        async with fleet:
            yield fleet

    @contextlib.asynccontextmanager
    async def reward(self, config: SourceConfig, model_path: Path | None) -> AsyncIterator[RewardClient]:
        """The replicas of the reward service, and a client of them."""
        loopback = _one_machine()
        # What others could reach asks for a token: the user's, or one of this run, which travels from process to
        # process as a call's argument. What makes an actor (arguments, environment) Ray shows to the cluster.
        token = bearer_token() or (None if loopback else secrets.token_urlsafe(32))

        @contextlib.asynccontextmanager
        async def start(name: str) -> AsyncIterator[tuple[Health, str]]:
            async with self._process(
                RewardService, name, config, model_path, self._threads(name), self.loading
            ) as service:
                url = await service.call("start", loopback, token, deadline_s=self.config.start_deadline_s)
                yield service.health, url

        def connect(urls: Sequence[str]) -> RewardClient:
            return RewardClient(urls, token=token, retry_s=config.retry_s, pause_s=config.pause_s)

        names = [process.name for process in self.plan.processes if process.name.startswith("reward-")]
        fleet, waits = self.config.fleet, self.monitor.waits
        async with reward_replicas(names, start, connect, fleet, waits, config.retry_s) as client:
            self.monitor.reward_clients.add(client)
            try:
                yield client
            finally:
                self.monitor.reward_clients.discard(client)

    @contextlib.asynccontextmanager
    async def _process(self, cls: type, name: str, *args: Any) -> AsyncIterator[Handle]:
        variables = dict[str, str]()
        if cls is not Generator:  # vLLM chooses its own allocator and cache
            if _JEMALLOC.exists():
                variables |= {name: os.environ.get(name, value) for name, value in KEEPS_MEMORY.items()}
            variables[_CACHE] = str(self.log_dir.resolve().with_name("cache"))  # torch's import has set this process's
        handle = remote(
            cls,
            *args,
            process=self._planned(name),
            log_file=self.log_dir / f"{name}.log",
            placement=self.placement.bundle(name) if self.placement else None,
            deadline_s=self.config.step_deadline_s,
            variables=variables,
        )
        self.monitor.health.add(handle.health)
        try:
            await handle.ready(self.config.start_deadline_s)
            yield handle
        finally:
            self.monitor.health.discard(handle.health)
            handle.kill()

    def _threads(self, name: str) -> int:
        return self._planned(name).threads

    def _planned(self, name: str) -> Process:
        """The plan for a process; a generator beyond those of the plan is like the first, wherever there is room."""
        if name.startswith("generator-") and all(process.name != name for process in self.plan.processes):
            return dataclasses.replace(self.plan.process("generator-0"), name=name, pin=None)
        return self.plan.process(name)

    def _validate(self, generators: int) -> None:
        """Raise ResourceError when there cannot be so many generators."""
        planned = sum(process.name.startswith("generator-") for process in self.plan.processes)
        if self.config.address == "local":
            if generators > planned:
                raise ResourceError(
                    f"{generators} generators do not fit: this run shares out {machine_cores()} cores and "
                    f"{machine_gpus()} GPUs for {planned}. Start it with cluster.max_generators = {generators}"
                )
            return
        each, extra = self._planned("generator-0"), generators - planned
        has = ray.cluster_resources()
        needs = {"CPU": self.plan.cpus + extra * each.cpus, "GPU": self.plan.gpus + extra * each.gpus}
        for kind, number in needs.items():
            if number > has.get(kind, 0.0):
                raise ResourceError(
                    f"{generators} generators do not fit: the run would need {number:g} {kind}s, and the cluster has "
                    f"{has.get(kind, 0.0):g}. Ask for fewer, or add machines"
                )


def _one_machine() -> bool:
    return sum(node["Alive"] for node in ray.nodes()) <= 1
