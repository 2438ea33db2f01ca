"""How far a training loop is: the checkpoints that it writes, and the one that it goes on from after a stop."""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from learner.weights.checkpoint import Checkpoints, NotSaved
from learner.worker.group import LearnerGroup

Log = Callable[[str, int, dict[str, float]], None]
"""Where a loop's metrics go: (stage, step, metrics)."""
_logger = logging.getLogger(__name__)


def due(every: int, step: int, steps: int, stopping: bool = False) -> bool:
    """Whether a checkpoint follows a step: every so often, and before what comes after the last one. 0: never."""
    return every > 0 and (step % every == 0 or step == steps or stopping)


def _never_stopping() -> AbstractContextManager[Callable[[], bool]]:
    return nullcontext(lambda: False)


class Progress:
    """Of one loop. A step is an optimizer step, or an iteration of PPO."""

    def __init__(
        self,
        stage: str,
        log: Log,
        checkpoints: Checkpoints | None = None,
        unbroken: Callable[[], AbstractContextManager[Callable[[], bool]]] = _never_stopping,
    ) -> None:
        """Find where `checkpoints` say to go on; without any it starts, and saves nothing. Raises ValueError.

        What ends the command waits while `unbroken()` is entered; what that gives says whether something does.
        """
        self.stage = stage
        self.checkpoints = checkpoints
        self.newest = checkpoints.newest() if checkpoints else None
        """what it goes on from"""
        self.done = self.newest.version if self.newest else 0
        """steps that are done already"""
        self.state: Mapping[str, Any] = self.newest.state if self.newest else {}
        """what the loop gave to be kept beside the networks"""
        self.failures = 0
        """checkpoints that could not be written"""
        self._log = log
        self.unbroken = unbroken

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step."""
        self._log(self.stage, step, dict(metrics))

    async def load(self, learner: LearnerGroup) -> None:
        """Have the learner, which has just loaded its networks, go on from the checkpoint, where there is one."""
        if self.newest:
            await learner.load_state(self.newest.networks, self.done)

    async def save(self, step: int, state: Mapping[str, Any], save_networks: Callable[[Path], Awaitable[None]]) -> bool:
        """Write a checkpoint; whether it is there. One that cannot be written is an alarm, not the end."""
        if self.checkpoints is None:
            return False
        started = time.monotonic()
        try:
            with self.unbroken():
                size = await self.checkpoints.write(step, state, save_networks)
        except (OSError, NotSaved) as error:
            if isinstance(error, TimeoutError):  # an OSError to Python; here it is a learner that does not answer
                raise
            self.failures += 1
            _logger.error("checkpoint %d was not written, and the run goes on without it: %s", step, error)
            self.log(step, {"checkpoint/failures": float(self.failures)})
            return False
        spent = {"checkpoint/seconds": time.monotonic() - started, "checkpoint/bytes": float(size)}
        self.log(step, spent | {"checkpoint/failures": float(self.failures)})
        return True
