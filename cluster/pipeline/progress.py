"""How far a PPO stage is: where it goes on after a stop, and what it writes to be able to."""

import logging
import time
from pathlib import Path

from cluster.pipeline.job import Job
from cluster.rundir.stages import ResumeRefused, Stage
from learner.config import PPOConfig
from learner.data.buffer import Buffer
from learner.data.ledger import Ledger
from learner.weights.checkpoint import Checkpoints
from learner.worker.group import LearnerGroup

log = logging.getLogger(__name__)


class Progress:
    """The checkpoints of one PPO stage, from its begin in this process on."""

    def __init__(self, job: Job, stage: Stage, config: PPOConfig) -> None:
        """Begin the stage, or find where it goes on; what a stage that starts over had written is removed.

        Raises ResumeRefused when the newest checkpoint is beyond the last iteration.
        """
        self.job = job
        self.stage = stage
        self.ledger_file, folder = stage.traces
        self.checkpoints = Checkpoints(folder, config.checkpoints_kept)
        self.version, self.beta = 0, config.kl.coef
        self.networks = Path()
        self._failures = 0
        self._buffer = None
        goes_on = stage.standing != "new"
        if goes_on and (found := self.checkpoints.newest()):
            if found.version > config.iterations:
                raise ResumeRefused(
                    f"ppo.iterations is {config.iterations}, but {found.folder} has done {found.version} already. "
                    f"Remedy: at least {found.version}, or remove the newer checkpoints"
                )
            self.version, self.beta, self._buffer = found.version, found.state["beta"], found.state["buffer"]
            self.networks = found.networks
            job.tracker.console.line(f"{stage.name}: goes on after iteration {found.version}, from {found.folder}")
        elif goes_on:
            job.tracker.console.line(f"{stage.name}: there is no checkpoint, so it starts over")
        else:
            self.checkpoints.remove()
            self.ledger_file.unlink(missing_ok=True)
        if goes_on:
            stage.begin()
        else:
            job.enter(stage)

    def restore(self, buffer: Buffer, ledger: Ledger) -> None:
        """Have the buffer, and the ledger, go on where the checkpoint was written."""
        if self._buffer is not None:
            buffer.restore(self._buffer)
        elif self.ledger_file.exists():
            ledger.resumed(0, kept=())

    async def save(self, version: int, beta: float, buffer: Buffer, ledger: Ledger, learner: LearnerGroup) -> None:
        """Write a checkpoint. One that cannot be written is an alarm, not the end: the earlier ones are still there."""
        started = time.monotonic()
        # taken before anything else can run: what is under way now is not in it, and is sampled again
        state = {"beta": beta, "buffer": buffer.snapshot()}
        try:
            ledger.sync()
            size = await self.checkpoints.write(version, state, learner.save_state)
        except (OSError, RuntimeError) as error:
            self._failures += 1
            log.error("checkpoint %d was not written, and the run goes on without it: %s", version, error)
            self.job.tracker.log(self.stage.name, version, {"checkpoint/failures": float(self._failures)})
            return
        ledger.committed(version)
        spent = {"checkpoint/seconds": time.monotonic() - started, "checkpoint/bytes": float(size)}
        self.job.tracker.log(self.stage.name, version, spent | {"checkpoint/failures": float(self._failures)})
