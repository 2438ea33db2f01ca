"""The processes of a command: each kind is started when it is first asked for, and kept until the command ends."""

from collections.abc import Callable
from contextlib import AbstractContextManager, AsyncExitStack
from pathlib import Path
from typing import Any, Self

from cluster.config.schema import Config
from cluster.fleet.fleet import Fleet
from cluster.fleet.processes import Processes
from learner.worker.group import LearnerGroup
from reward_server.client import RewardClient

Announce = Callable[[str], AbstractContextManager[Any]]
"""Shows that something is under way while a block lasts."""


class ProcessPool:
    """An async context manager; leaving it stops what was started, the youngest first."""

    def __init__(self, processes: Processes, config: Config, announce: Announce) -> None:
        self.announce = announce
        self.weights: Path | None = None
        """folder of the model that the generators sample from"""
        self._processes = processes
        self._config = config
        self._learner: LearnerGroup | None = None
        self._fleet: Fleet | None = None
        self._rewards: RewardClient | None = None
        self._scored_by: Path | None = None
        self._stack = AsyncExitStack()
        self._generators_stack = AsyncExitStack()
        self._rewards_stack = AsyncExitStack()

    @property
    def scores_beside(self) -> bool:
        """See Plan."""
        return self._processes.plan.scores_beside

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._processes.monitor.attending())
        for stack in (self._generators_stack, self._rewards_stack):
            self._stack.push_async_callback(stack.aclose)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def learner(self) -> LearnerGroup:
        """The learner, without networks, or with those that were left in it."""
        if self._learner is None:
            with self.announce("start the learner"):
                self._learner = await self._stack.enter_async_context(self._processes.learner())
        return self._learner

    async def generators(self, model: Path) -> Fleet:
        """The generators, with whatever weights they have; started with those of `model`, see `weights`."""
        if self._fleet is None:
            with self.announce("start the vLLM actors"):
                starting = self._processes.generators(self._config.generator, model)
                self._fleet = await self._generators_stack.enter_async_context(starting)
            self.weights = model
        return self._fleet

    async def fresh_generators(self, model: Path) -> Fleet:
        """The generators with the weights of `model`, started anew unless they have them."""
        if self._fleet is not None and self.weights != model:
            await self._generators_stack.aclose()
            self._fleet = None
        return await self.generators(model)

    async def rewards(self, model: Path | None) -> RewardClient:
        """The reward service with this model where one is used, started anew for another one."""
        if self._rewards is None or self._scored_by != model:
            await self._rewards_stack.aclose()
            with self.announce("start the reward service"):
                starting = self._processes.reward(self._config.scoring, model)
                self._rewards = await self._rewards_stack.enter_async_context(starting)
            self._scored_by = model
        return self._rewards
