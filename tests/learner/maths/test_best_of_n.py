from itertools import combinations

import numpy as np
import pytest

from learner.maths.best_of_n import best_of_k, best_of_k_kl


def test_kl_of_the_best_of_k() -> None:
    """log 2 - 1/2, log 4 - 3/4, and log 16 - 15/16."""
    assert best_of_k_kl(1) == 0.0
    assert [best_of_k_kl(k) for k in (2, 4, 16)] == pytest.approx([0.193147, 0.636294, 1.835089], abs=1e-6)


def test_the_best_of_k_by_hand() -> None:
    """Of the six pairs of four samples the best by score is d in three, c in two, and b in one."""
    scores, gold = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[0.0, 0.3, 0.9, 0.6]])
    assert best_of_k(scores, scores, 2) == pytest.approx([(3 * 4 + 2 * 3 + 2) / 6])
    assert best_of_k(scores, gold, 2) == pytest.approx([(3 * 0.6 + 2 * 0.9 + 0.3) / 6])
    assert best_of_k(scores, gold, 1) == pytest.approx([0.45])  # the mean of the pool
    assert best_of_k(scores, gold, 4) == pytest.approx([0.6])  # of the highest score, not the highest gold


@pytest.mark.parametrize("k", range(1, 8))
def test_it_is_the_mean_over_all_subsets_with_ties_too(k: int) -> None:
    """`max` of subsets in the order of the pool takes the first of equal scores."""
    dice = np.random.default_rng(k)
    scores, gold = dice.integers(0, 4, (5, 7)).astype(float), dice.normal(size=(5, 7))
    expected = [
        np.mean([gold[row, max(some, key=lambda j: scores[row, j])] for some in combinations(range(7), k)])
        for row in range(5)
    ]
    assert best_of_k(scores, gold, k) == pytest.approx(expected)


def test_of_equal_scores_the_best_of_all_is_the_first() -> None:
    assert best_of_k(np.zeros((1, 3)), np.array([[0.5, 0.1, 0.9]]), 3) == pytest.approx([0.5])


def test_a_large_pool_does_not_overflow() -> None:
    """Of evenly spaced scores 0 .. n - 1 the expected maximum of k is k (n + 1) / (k + 1) - 1."""
    scores = np.array([[float(score) for score in range(2000)]])
    assert best_of_k(scores, scores, 1000) == pytest.approx([1000 * 2001 / 1001 - 1])
