"""The learner and the generators of a command of several rounds: started when first needed, kept until its end."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

from cluster.build import Processes, Sampler
from cluster.heldout import HeldOut
from cluster.steps import Job
from learner.group import LearnerGroup
from learner.publish import Publisher


class Workplace:
    """An async context manager; leaving it stops what was started."""

    def __init__(self, job: Job, processes: Processes) -> None:
        """Start nothing as yet."""
        self.processes = processes
        self.weights: Path | None = None
        """folder of the model that the generators sample from"""
        self._job = job
        self._stack = AsyncExitStack()
        self._learner: LearnerGroup | None = None
        self._generators: Sequence[Sampler] = ()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def learner(self) -> LearnerGroup:
        """The learner, without networks."""
        if self._learner is None:
            with self._job.tracker.phase("start the learner"):
                self._learner = await self._stack.enter_async_context(self.processes.learner())
        return self._learner

    async def generators(self, model: Path, exactly: bool = True) -> Sequence[Sampler]:
        """The generators with the weights of `model`: started with them, or given them by the learner.

        Where not `exactly`, they may have any weights, as PPO gives them its own; they are started with `model`.
        """
        if not self._generators:
            with self._job.tracker.phase("start the vLLM actors"):
                started = self.processes.generators(self._job.config.generator, model)
                self._generators = await self._stack.enter_async_context(started)
            self.weights = model
        elif exactly and self.weights != model:
            await self._hand_over(model)
            self.weights = model
        return self._generators

    async def _hand_over(self, model: Path) -> None:
        config, learner = self._job.config, await self.learner()
        with self._job.tracker.phase(f"hand the weights of {model.parent.name}/{model.name} to the actors"):
            await learner.load("policy", "policy", model, config.ppo.network)
            await learner.open_sender(config.publish)
            workers, probes = config.generator.tensor_parallel_size, HeldOut(self._job).probes()
            published = await Publisher(learner, config.publish, probes, workers).publish(self._generators, 0)
            if published.lost:
                raise RuntimeError(f"generators were lost while they were given {model}: {published.lost}")
            await learner.unload()
