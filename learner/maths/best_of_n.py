"""Best of n: what the best of k samples is worth, from one pool of n samples a prompt, and how far it is from one."""

import math

import numpy as np
from numpy.typing import NDArray


def best_of_k_kl(k: int) -> float:
    """KL of the best of k samples to the model that they come from, nats: log k - (k - 1) / k (Stiennon et al. 2020).

    It is exact where no two samples score alike, else an upper bound (Beirami et al. 2024).
    """
    assert k >= 1, k
    return math.log(k) - (k - 1) / k


def best_of_k(scores: NDArray[np.float64], values: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Expected value of the best by score of k samples: [P], a prompt each (Nakano et al. 2021; Gao et al. 2023).

    scores, values: [P, n], the pool of each prompt. It is the mean over all subsets of k, so it is unbiased and has
    less variance than one draw: the sample that is j-th from the top (from 0) is the best of C(n - 1 - j, k - 1) of the
    C(n, k) subsets. Of equal scores the first counts as the higher.
    """
    n = scores.shape[1]
    assert 1 <= k <= n, (k, n)
    assert values.shape == scores.shape, (values.shape, scores.shape)
    weights = np.array([math.comb(n - 1 - j, k - 1) / math.comb(n, k) for j in range(n)])
    falling = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(values, falling, axis=1) @ weights
