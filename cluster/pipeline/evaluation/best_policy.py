"""Which policy of a PPO run to keep: gold falls again where the policy exploits the reward model (Gao et al. 2023)."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.pipeline.job import Job
from cluster.rundir.files import number, read_run

if TYPE_CHECKING:
    from cluster.pipeline.evaluate import Evaluation


class BestPolicy:
    """The policy of the best held-out measurement so far: the largest mean gold; of equal ones, the smaller KL.

    RUN/summary.json says under ppo.<stage>.best which one `folder` holds. A run that goes on from a checkpoint older
    than that keeps it: the policy was measured as any other. A crash while it is replaced leaves none.
    """

    def __init__(self, job: Job, stage: str, folder: Path, done: int) -> None:
        """Go on with what an earlier command kept, where iterations are `done`; else begin without any."""
        self.folder = folder
        self._job = job
        self._stage = stage
        self._best: tuple[float, float] | None = None  # gold, and KL below zero
        if done and folder.is_dir():
            found = read_run(job.run_dir).figures("ppo", stage, "best")
            gold, kl = number(found.get("gold")), number(found.get("kl"))
            self._best = None if gold is None or kl is None else (gold, -kl)
        if self._best is None:
            self._job.summarise("ppo", stage, best=None)

    async def offer(self, iteration: int, found: "Evaluation", save: Callable[[Path], Awaitable[None]]) -> None:
        """Have `save` write the policy of this iteration into `folder` where it is better than what is there."""
        if self._best is not None and (found.gold, -found.kl) <= self._best:
            return
        self._job.summarise("ppo", self._stage, best=None)
        await save(self.folder)
        self._best = found.gold, -found.kl
        figures = {"iteration": iteration, "gold": found.gold, "gold_ci": found.gold_ci, "kl": found.kl}
        self._job.summarise("ppo", self._stage, best=figures)
