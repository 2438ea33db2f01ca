"""Stands in for the processes of a command: what it is given, instead of what Ray would start."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.fakes import FakeFleet


class FakePool:
    """Hands out a learner, generators (a fleet, or a list of them) and rewards; notes what they were asked for."""

    def __init__(self, learner: Any = None, generators: Any = (), rewards: Any = None, apart: bool = False) -> None:
        self.plan = SimpleNamespace(scores_beside=True, apart=apart)
        self.announce: Any = nullcontext
        self.weights: Path | None = None
        self.started: list[Path] = []
        self._learner, self._generators, self._rewards = learner, generators, rewards

    async def learner(self) -> Any:
        return self._learner

    async def generators(self, model: Path, max_model_len: int | None = None) -> Any:
        if self.weights is None:
            self.started.append(model)
            self.weights = model
        return FakeFleet(*self._generators) if isinstance(self._generators, list | tuple) else self._generators

    async def fresh_generators(self, model: Path, max_model_len: int | None = None) -> Any:
        if self.weights != model:
            self.weights = None
        return await self.generators(model)

    async def rewards(self, model: Path | None, scoring: Any = None) -> Any:
        return self._rewards

    async def sampling(self, model: Path, scored_by: Path | None) -> tuple[Any, Any]:
        return await self.fresh_generators(model), await self.rewards(scored_by)

    async def all(self, model: Path, scored_by: Path | None, fresh: bool = False) -> tuple[Any, Any, Any]:
        generators = self.fresh_generators if fresh else self.generators
        return await self.learner(), await generators(model), await self.rewards(scored_by)

    def prefetch(self, model: Path | None = None) -> None:
        pass
