"""The processes of a command: each kind is started when it is first asked for, and kept until the command ends."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, AsyncExitStack
from pathlib import Path
from typing import Any, Self

from actors.waits import together
from cluster.config.schema import Config
from cluster.fleet.fleet import Fleet
from cluster.fleet.processes import Processes
from learner.worker.group import LearnerGroup
from reward_server.client import RewardClient
from reward_server.config import SourceConfig

Announce = Callable[[str], AbstractContextManager[Any]]
"""Shows that something is under way while a block lasts."""
Missing = dict[str, Callable[[], Coroutine[Any, Any, None]]]
"""What starts each process that a stage asks for and that is not there, by its name."""
log = logging.getLogger(__name__)


class ProcessPool:
    """An async context manager; leaving it stops what was started: the learner, the rewards, then the generators."""

    def __init__(self, processes: Processes, config: Config, announce: Announce) -> None:
        self.announce = announce
        self.plan = processes.plan
        self.weights: Path | None = None
        """folder of the model that the generators sample from"""
        self._processes = processes
        self._config = config
        self._learner: LearnerGroup | None = None
        self._fleet: Fleet | None = None
        self._rewards: RewardClient | None = None
        self._scored_by: tuple[Path | None, SourceConfig] | None = None
        self._stack = AsyncExitStack()
        self._generators_stack = AsyncExitStack()
        self._rewards_stack = AsyncExitStack()
        self._learner_lock, self._generators_lock = asyncio.Lock(), asyncio.Lock()  # whoever starts them has it
        self._ahead: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._processes.monitor.attending())
        for stack in (self._generators_stack, self._rewards_stack):
            self._stack.push_async_callback(stack.aclose)
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._ahead:
            task.cancel()
        await asyncio.gather(*self._ahead, return_exceptions=True)
        await self._stack.aclose()

    async def learner(self) -> LearnerGroup:
        """The learner, without networks, or with those that were left in it."""
        await self._start(self._no_learner())
        assert self._learner is not None
        return self._learner

    async def generators(self, model: Path) -> Fleet:
        """The generators, with whatever weights they have; started with those of `model`, see `weights`."""
        await self._start(self._no_generators(model))
        assert self._fleet is not None
        return self._fleet

    async def fresh_generators(self, model: Path, max_model_len: int | None = None) -> Fleet:
        """The generators with the weights of `model`, started anew unless they have them.

        `max_model_len`: longest sequence of those that start, in tokens, in place of the configured one.
        """
        await self._start(self._no_generators(model, fresh=True, max_model_len=max_model_len))
        assert self._fleet is not None
        return self._fleet

    async def rewards(self, model: Path | None, scoring: SourceConfig | None = None) -> RewardClient:
        """The reward service with this model where one is used, started anew for another one.

        `scoring`: what scores, in place of what is configured.
        """
        await self._start(self._no_rewards(model, scoring))
        assert self._rewards is not None
        return self._rewards

    async def sampling(self, model: Path, scored_by: Path | None) -> tuple[Fleet, RewardClient]:
        """Generators with the weights of `model` (see fresh_generators) and rewards; those missing start together."""
        await self._start(self._no_generators(model, fresh=True) | self._no_rewards(scored_by))
        return await self.generators(model), await self.rewards(scored_by)

    async def all(
        self, model: Path, scored_by: Path | None, fresh: bool = False
    ) -> tuple[LearnerGroup, Fleet, RewardClient]:
        """Learner, generators (`fresh`: see fresh_generators) and rewards; those that are missing start together."""
        missing = self._no_learner() | self._no_generators(model, fresh) | self._no_rewards(scored_by)
        await self._start(missing)
        return await self.learner(), await self.generators(model), await self.rewards(scored_by)

    def prefetch(self, model: Path | None = None) -> None:
        """Start the generators with the weights of `model`, or without one the learner, while stages run without them.

        Nothing happens where they would take turns with what is at work. What does not start is started again when a
        stage asks for it, which is then told why.
        """
        if not self.plan.apart:
            return
        missing = self._no_generators(model) if model else self._no_learner()
        self._ahead += [asyncio.create_task(self._start_ahead(*one), name=f"start {one[0]}") for one in missing.items()]

    async def _start_ahead(self, name: str, start: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await start()
        except Exception as error:
            log.warning("%s did not start ahead, and will be started when a stage needs it: %s", name, error)

    async def _start(self, missing: Missing) -> None:
        """Start what is missing. The first that fails ends the other starts, with their processes, and is raised."""
        if not missing:
            return
        *names, last = missing
        with self.announce("start " + (f"{', '.join(names)} and {last}" if names else last)):
            await together(*(start() for start in missing.values()), at_once=not self.plan.shares_gpus)

    def _no_learner(self) -> Missing:
        async def start() -> None:
            async with self._learner_lock:
                if self._learner is None:
                    self._learner = await self._stack.enter_async_context(self._processes.learner())

        return {} if self._learner else {"the learner": start}

    def _no_generators(self, model: Path, fresh: bool = False, max_model_len: int | None = None) -> Missing:
        async def start() -> None:
            async with self._generators_lock:
                if self._fleet is not None and fresh and self.weights != model:
                    await self._generators_stack.aclose()
                    self._fleet = None
                if self._fleet is None:
                    own = {} if max_model_len is None else {"max_model_len": max_model_len}
                    config = self._config.generator.model_copy(update=own)
                    starting = self._processes.generators(config, model)
                    self._fleet = await self._generators_stack.enter_async_context(starting)
                    self.weights = model

        there = self._fleet and (self.weights == model or not fresh)
        return {} if there else {"the vLLM actors": start}

    def _no_rewards(self, model: Path | None, scoring: SourceConfig | None = None) -> Missing:
        wanted = model, scoring or self._config.scoring

        async def start() -> None:
            await self._rewards_stack.aclose()
            starting = self._processes.reward(wanted[1], model)
            self._rewards, self._scored_by = await self._rewards_stack.enter_async_context(starting), wanted

        return {} if self._rewards and self._scored_by == wanted else {"the reward service": start}
