"""Who runs where: the processes of a run, started on Ray and stopped with the block that asked for them."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol, cast

import ray

from actors import waves
from actors.config import GeneratorConfig
from actors.generator import Generator
from cluster.config import ClusterConfig
from cluster.remote import ActorOptions, RemoteHandle, remote
from cluster.resources import Plan, Process, check, default_plan, machine_cores, machine_gpus
from learner.group import LearnerGroup
from learner.publish import Receiver
from learner.worker import LearnerWorker
from reward_server.client import RewardClient
from reward_server.config import SourceConfig
from reward_server.service import TOKEN_VARIABLE, RewardService


def plan_run(config: ClusterConfig, max_staleness: int, waves_in_flight: int) -> Plan:
    """Threads and cores of every process; raises ResourceError when they do not fit this machine."""
    cores, gpus = machine_cores(), machine_gpus()
    plan = default_plan(
        generators=config.generators,
        cores=cores,
        gpus=gpus,
        max_staleness=max_staleness,
        learner_ranks=config.learner_ranks,
        waves_in_flight=waves_in_flight,
    )
    if config.address == "local":
        check(plan, cores=cores, gpus=gpus)
    return plan


class Sampler(waves.Generator, Receiver, Protocol):
    """What a run asks of a generator's handle: to sample, and to take new weights."""


class Processes:
    """Starts the processes of a plan; those of one block end with it."""

    def __init__(self, config: ClusterConfig, plan: Plan, log_dir: Path) -> None:
        self.config = config
        self.plan = plan
        self.log_dir = log_dir

    @contextlib.asynccontextmanager
    async def learner(self) -> AsyncIterator[LearnerGroup]:
        """All learner ranks, connected with each other, without networks."""
        ranks = self.config.learner_ranks
        async with contextlib.AsyncExitStack() as stack:
            handles = [
                await stack.enter_async_context(
                    self._process(LearnerWorker, f"learner-{rank}", rank, ranks, self._threads(f"learner-{rank}"))
                )
                for rank in range(ranks)
            ]
            group = LearnerGroup(handles)
            await group.start(_one_machine(), self.config.start_deadline_s)
            yield group

    @contextlib.asynccontextmanager
    async def generators(self, config: GeneratorConfig, model_path: Path) -> AsyncIterator[list[Sampler]]:
        """All generators, with the weights of `model_path` as version 0."""
        async with contextlib.AsyncExitStack() as stack:
            handles = []
            for index in range(self.config.generators):
                name = f"generator-{index}"
                own = config.model_copy(update={"threads": self._threads(name)})
                handles.append(await stack.enter_async_context(self._process(Generator, name, own, model_path, name)))
            await asyncio.gather(*(h.call("start", deadline_s=config.start_deadline_s + 30) for h in handles))
            yield cast(list[Sampler], handles)  # a handle has the methods of its class, which no type checker sees
            await asyncio.gather(*(handle.stop() for handle in handles), return_exceptions=True)

    @contextlib.asynccontextmanager
    async def reward(self, config: SourceConfig, model_path: Path | None) -> AsyncIterator[RewardClient]:
        """The reward service, and a client of it."""
        async with self._process(RewardService, "reward", config, model_path, self._threads("reward")) as service:
            url = await service.call("start", _one_machine(), deadline_s=self.config.start_deadline_s)
            client = RewardClient(url, token=os.environ.get(TOKEN_VARIABLE), deadline_s=self.config.step_deadline_s)
            try:
                await client.healthy()
                yield client
            finally:
                await client.close()

    @contextlib.asynccontextmanager
    async def _process(self, cls: type, name: str, *args: Any) -> AsyncIterator[RemoteHandle]:
        process: Process = self.plan.process(name)
        options = ActorOptions(
            name=name,
            cpus=process.cpus,
            gpus=process.gpus,
            threads=process.threads,
            pin=process.pin if self.config.address == "local" else None,
            log_file=self.log_dir / f"{name}.log",
            deadline_s=self.config.step_deadline_s,
        )
        handle = remote(cls, *args, options=options)
        try:
            await handle.ready(self.config.start_deadline_s)
            yield handle
        finally:
            handle.kill()

    def _threads(self, name: str) -> int:
        return self.plan.process(name).threads


def _one_machine() -> bool:
    return sum(node["Alive"] for node in ray.nodes()) <= 1
