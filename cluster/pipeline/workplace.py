"""The learner and the generators of a command of several rounds: started when first needed, kept until its end."""

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

from cluster.fleet.fleet import Fleet
from cluster.fleet.processes import Processes
from cluster.pipeline.evaluate import HeldOut
from cluster.pipeline.job import Job
from learner.weights.publish import Publisher
from learner.worker.group import LearnerGroup


class Workplace:
    """An async context manager; leaving it stops what was started."""

    def __init__(self, job: Job, processes: Processes) -> None:
        """Start nothing as yet. What it does takes place within a round, whose time is recorded as a whole."""
        self.processes = processes
        self.weights: Path | None = None
        """folder of the model that the generators sample from"""
        self._job = job
        self._stack = AsyncExitStack()
        self._learner: LearnerGroup | None = None
        self._fleet: Fleet | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def learner(self) -> LearnerGroup:
        """The learner, without networks."""
        if self._learner is None:
            with self._job.tracker.console.phase("start the learner"):
                self._learner = await self._stack.enter_async_context(self.processes.learner())
        return self._learner

    async def fleet(self, model: Path, exactly: bool = True) -> Fleet:
        """The generators with the weights of `model`: started with them, or given them by the learner.

        Where not `exactly`, they may have any weights, as PPO gives them its own; they are started with `model`.
        """
        if self._fleet is None:
            with self._job.tracker.console.phase("start the vLLM actors"):
                started = self.processes.generators(self._job.config.generator, model)
                self._fleet = await self._stack.enter_async_context(started)
            self.weights = model
        elif exactly and self.weights != model:
            await self._hand_over(self._fleet, model)
            self.weights = model
        return self._fleet

    async def _hand_over(self, fleet: Fleet, model: Path) -> None:
        config, learner = self._job.config, await self.learner()
        with self._job.tracker.console.phase(f"hand the weights of {model.parent.name}/{model.name} to the actors"):
            await learner.load("policy", "policy", model, config.ppo.network, config.ppo.policy_optimizer, frozen=True)
            await learner.open_sender(config.publish)
            workers, probes = config.generator.tensor_parallel_size, HeldOut(self._job).probes()
            fleet.publisher = Publisher(learner, config.publish, probes, workers, self._job.monitor.waits)
            await fleet.publish(0)
            await learner.unload()
