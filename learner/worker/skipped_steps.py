"""Steps that were left out because a loss or a gradient was not finite: counted, and too many in a row end the run."""

from collections.abc import Sequence

_SKIPPED, _CAUSE = "skipped", "nonfinite"


class NonFiniteSteps(RuntimeError):
    """Several optimizer steps in a row had a loss or a gradient that is not finite."""


class SkippedSteps:
    """Follows the optimizer steps of one loop. A skipped step changed nothing, so a single one does no harm."""

    def __init__(self, loop: str, limit: int) -> None:
        """`loop`: how errors name it; `limit`: skipped steps in a row, of one network, that end the run."""
        self.loop = loop
        self.limit = limit
        self._in_a_row: dict[str, int] = {}

    def count(self, step: int, sums: Sequence[dict[str, float]]) -> dict[str, float]:
        """Take the sums of some optimizer steps, in order; returns how many were skipped, as metrics.

        A sum "skipped" or "skipped/<network>" says that a step was left out, "nonfinite/.." beside it what was not
        finite. Raises NonFiniteSteps once `limit` steps in a row were skipped.
        """
        found: dict[str, float] = {}
        for minibatch in sums:
            skipped = {key for key in minibatch if key.split("/")[0] == _SKIPPED}
            self._in_a_row = {key: self._in_a_row.get(key, 0) + 1 for key in skipped}
            for key in sorted(skipped):
                metric = "optimizer/" + key.replace("/", "_")
                found[metric] = found.get(metric, 0.0) + 1.0
                if self._in_a_row[key] >= self.limit:
                    raise NonFiniteSteps(self._reason(step, key, minibatch))
        return found

    def _reason(self, step: int, key: str, minibatch: dict[str, float]) -> str:
        prefix = key.replace(_SKIPPED, _CAUSE, 1) + "/"
        culprits = [name.removeprefix(prefix) for name in sorted(minibatch) if name.startswith(prefix)]
        network = f" of the {key.removeprefix(_SKIPPED + '/')} network" if "/" in key else ""
        return (
            f"{self.loop}, step {step}: {self.limit} optimizer steps{network} in a row were skipped, since "
            f"{' and '.join(culprits) or 'the gradient'} was not finite. The weights are those of the last good step. "
            "Lower the learning rate, clip the gradient (clip_grad_norm), or look for extreme scores or texts in the "
            "data; max_skipped_steps is how many skipped steps in a row end a run"
        )
