"""What a PPO iteration is watched by."""

import time
from collections.abc import Sequence
from statistics import fmean

from actors.trajectory import Trajectory
from learner.data.batch import Batch, staleness
from learner.maths.advantages import explained_variance, masked_mean
from learner.maths.kl import k2, k3, kl_per_response
from learner.maths.losses import add_sums
from learner.worker.ppo_steps import Targets


class Laps:
    """Seconds between calls, by name."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def __call__(self, name: str) -> None:
        """End a lap."""
        now = time.monotonic()
        self._laps[f"time/{name}"] = now - self._last
        self._last = now

    def times(self) -> dict[str, float]:
        """Seconds of each lap, and of all together."""
        return {**self._laps, "time/iteration": self._last - self._start}


def part_means(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean of each part of the scores, as parts/<name>, over the responses that have it."""
    names = dict.fromkeys(name for t in trajectories for name in t.parts)
    return {f"parts/{name}": fmean(t.parts[name] for t in trajectories if name in t.parts) for name in names}


def iteration_metrics(
    batch: Batch,
    version: int,
    targets: Targets,
    beta: float,
    sums: Sequence[dict[str, float]],
) -> dict[str, float]:
    """Metrics of one iteration: of the batch as it was sampled, and of the update's minibatches.

    KL and reward are per response (nats, and score - beta * KL, before any whitening); the rest is per token.
    """
    mask, old = batch.mask, targets.evaluation
    kl = kl_per_response(old.logprobs, old.ref_logprobs, mask)
    total = batch.score - beta * kl
    lengths = batch.response_len.float()
    update = add_sums(sums)
    # Each sum beside the count that makes it a mean; a step that was skipped has neither.
    counts = {
        "loss/policy": "tokens",
        "ratio/mean": "tokens",
        "policy/clip_fraction": "tokens",
        "policy/approx_kl": "tokens",
        "loss/pretraining": "pretraining_tokens",
        "loss/value": "value_tokens",
        "value/clip_fraction": "value_tokens",
    }
    norms = {name for name in update if name.startswith("grad_norm/")}
    return {
        "score/mean": batch.score.mean().item(),
        "score/std": batch.score.std(correction=0).item(),
        "kl/mean": kl.mean().item(),
        "kl/std": kl.std(correction=0).item(),
        "kl/k2": k2(old.logprobs, old.ref_logprobs)[mask].sum().item() / len(batch),
        "kl/k3": k3(old.logprobs, old.ref_logprobs)[mask].sum().item() / len(batch),
        "kl/coef": beta,
        "reward/mean": total.mean().item(),
        "reward/std": total.std(correction=0).item(),
        "response/length": lengths.mean().item(),
        "response/eos_rate": batch.ended.float().mean().item(),
        "policy/entropy": float(masked_mean(old.entropies, mask)),
        "value/mean": float(masked_mean(old.values, mask)),
        "value/explained_variance": explained_variance(old.values, targets.returns, mask),
        **{name: update[name] / update[count] for name, count in counts.items() if name in update},
        **({"ratio/max": update["ratio/max"]} if "ratio/max" in update else {}),
        **({"ratio/first_minibatch": sums[0]["ratio/mean"] / sums[0]["tokens"]} if "tokens" in sums[0] else {}),
        **{name: update[name] / sum(name in minibatch for minibatch in sums) for name in norms},
        **{name: value for name, value in update.items() if name.startswith("time/")},
        "progress/version": float(version + 1),
        **staleness(batch, version),
    }
