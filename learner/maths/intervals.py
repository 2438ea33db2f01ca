"""95 % confidence intervals of shares and means."""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

Z95 = NormalDist().inv_cdf(0.975)
"""Standard normal quantile of a two-sided 95 % interval, 1.959964."""


def wilson_interval(successes: int | float, trials: int) -> tuple[float, float]:
    """Wilson's score interval of a share (1927); a tie may count as half a success. No trials: (0, 1)."""
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z95**2
    centre = share + z2 / (2 * trials)
    half = Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    scale = 1 + z2 / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap_interval(
    sums: Float[Tensor, " n"], counts: Int[Tensor, " n"], resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap of `sum(sums) / sum(counts)` over n independent units, say prompts (Efron 1979).

    For a plain mean over units pass counts of 1. The result is a function of the arguments, seed included.
    """
    assert len(sums) > 0, "a bootstrap over no units"
    assert resamples > 0, f"{resamples} resamples"
    generator = torch.Generator().manual_seed(seed)
    sums, counts = sums.detach().double().cpu(), counts.cpu()
    means = torch.empty(resamples, dtype=torch.float64)
    for i in range(resamples):
        drawn = torch.randint(len(sums), (len(sums),), generator=generator)
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def resampled_totals(
    vectors: NDArray[np.float64],
    total: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    resamples: int = 1000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Bootstrap of a figure that is a function of a sum over n independent units: its value on each resample, [R].

    vectors: [n, k], what each unit adds; total: sums [.., k] -> figures [..]. The units drawn depend on n, resamples
    and seed alone, so that the difference of two results for the same units is a paired bootstrap (Efron 1979).
    """
    assert len(vectors), "a bootstrap over no units"
    times = np.random.default_rng(seed).multinomial(len(vectors), np.full(len(vectors), 1 / len(vectors)), resamples)
    return total(times @ vectors)


def percentile_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95 % of resampled values, those that are not numbers left out."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)
