import math
import statistics
from dataclasses import replace

import pytest
import torch

from learner.maths.accuracy import (
    PartAccuracy,
    RankGap,
    calibration_bins,
    ordered_pairs,
    pair_credit,
    part_accuracy,
    reward_accuracy,
    sum_by_prompt,
)

GROUP = torch.tensor([9, 9, 9, 2, 2, 5])
RANKS = torch.tensor([0, 1, 1, 3, 0, 0])
SCORES = torch.tensor([1.0, 0.0, 1.0, 2.0, 0.75, 4.0])
LENGTHS = torch.tensor([10, 4, 12, 7, 7, 100])


def test_pairs_join_completions_of_one_prompt_and_different_rank() -> None:
    pairs = ordered_pairs(GROUP, RANKS)
    found = set(zip(pairs.winners.tolist(), pairs.losers.tolist(), strict=True))
    assert found == {(0, 1), (0, 2), (4, 3)}
    assert sorted(pairs.pairs_per_prompt.tolist()) == [1, 2]
    assert sorted(pairs.completions_per_prompt.tolist()) == [2, 3]
    sizes = pairs.pairs_per_prompt[pairs.prompts]
    assert dict(zip(pairs.winners.tolist(), sizes.tolist(), strict=True)) == {0: 2, 4: 1}
    assert sum_by_prompt(torch.ones(3), pairs).tolist() == pairs.pairs_per_prompt.tolist()


def test_equal_scores_earn_half() -> None:
    assert pair_credit(torch.tensor([0.3, 0.0, -2.0])).tolist() == [1.0, 0.5, 0.0]


def test_calibration_compares_confidence_with_success() -> None:
    """Margins 0.1 and -0.3 share a bin, 0.5 opens the next, -1.2 lies two further on."""
    first, second, third = calibration_bins(torch.tensor([0.1, -0.3, 0.5, -1.2], dtype=torch.float64))
    assert (first.margin, first.count, first.observed) == (0.25, 2, 0.5)
    sigmoid = [1 / (1 + math.exp(-x)) for x in (0.1, 0.3, 0.5, 1.2)]
    assert first.predicted == pytest.approx((sigmoid[0] + sigmoid[1]) / 2)
    assert (second.margin, second.count, second.observed) == (0.75, 1, 1.0)
    assert second.predicted == pytest.approx(sigmoid[2])
    assert (third.margin, third.count, third.observed) == (1.25, 1, 0.0)
    assert third.predicted == pytest.approx(sigmoid[3])


def test_no_pairs_have_no_bins() -> None:
    assert calibration_bins(torch.empty(0)) == ()


def test_accuracy_of_scores_with_rankings() -> None:
    """Margins 1 and 0 for the first prompt, -1.25 for the second; the third has a single completion."""
    result = reward_accuracy(SCORES, GROUP, RANKS, LENGTHS, resamples=200, seed=0)
    assert (result.pairs, result.prompts) == (3, 2)
    assert result.accuracy == pytest.approx(1.5 / 3)
    assert result.prompt_accuracy == pytest.approx((0.75 + 0.0) / 2)
    losses = [math.log1p(math.exp(-margin)) for margin in (1.0, 0.0, -1.25)]
    assert result.log_loss == pytest.approx(sum(losses) / 3)
    assert result.longer_wins == pytest.approx((1 + 0 + 0.5) / 3)
    assert result.by_rank_gap == (RankGap(gap=1, accuracy=0.75, count=2), RankGap(gap=3, accuracy=0.0, count=1))
    assert [(b.margin, b.count) for b in result.bins] == [(0.25, 1), (1.25, 2)]
    assert result.accuracy_ci == (0.0, 0.75)
    assert result.prompt_accuracy_ci == (0.0, 0.75)
    assert result.score_std == pytest.approx(statistics.pstdev(SCORES.tolist()))
    # the first bin has one pair, of equal scores; in the other sigmoid(1) and sigmoid(1.25) won one of two
    sigmoid = [1 / (1 + math.exp(-x)) for x in (1.0, 1.25)]
    assert result.calibration_error == pytest.approx(2 / 3 * (sum(sigmoid) / 2 - 0.5))


def test_accuracy_counts_pairs_and_prompt_accuracy_counts_prompts_and_so_do_their_intervals() -> None:
    """99 prompts of one pair, all right; one prompt of K = 9 with its 36 pairs all wrong."""
    group = torch.tensor([i for i in range(99) for _ in range(2)] + [99] * 9)
    ranks = torch.tensor([0, 1] * 99 + list(range(9)))
    scores = torch.tensor([1.0, 0.0] * 99 + [float(rank) for rank in range(9)])
    found = reward_accuracy(scores, group, ranks, torch.ones_like(ranks), resamples=400, seed=0)
    assert found.accuracy == pytest.approx(99 / 135)
    assert found.prompt_accuracy == pytest.approx(0.99)
    assert found.accuracy_ci[0] < 0.6  # that one prompt is drawn three times, and weighs 36 pairs each
    assert found.prompt_accuracy_ci[0] >= 0.96
    assert [(one.gap, one.count) for one in found.by_rank_gap] == [(1, 107), *((gap, 9 - gap) for gap in range(2, 9))]


def test_accuracy_ignores_order_and_offset_of_the_scores() -> None:
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    moved = reward_accuracy(SCORES[order] + 3, GROUP[order], RANKS[order], LENGTHS[order], resamples=50, seed=0)
    plain = reward_accuracy(SCORES, GROUP, RANKS, LENGTHS, resamples=50, seed=0)
    assert moved.score_std == pytest.approx(plain.score_std)
    assert replace(moved, score_std=plain.score_std) == plain


def test_rankings_of_one_item_are_one_prompt_and_the_parts_are_measured_alone() -> None:
    """Two labelers rank A and B alike, a third the other way round; a second prompt is ranked by the first alone."""
    scores = torch.tensor([2.0, 1.0] * 3 + [0.0, 3.0])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    items = torch.tensor([0] * 6 + [1] * 2)
    ranks = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])
    found = reward_accuracy(scores, group, ranks, torch.ones_like(ranks), resamples=200, seed=0, items=items)
    assert (found.pairs, found.prompts) == (4, 2)
    assert found.accuracy == pytest.approx(2 / 4)
    assert found.prompt_accuracy == pytest.approx((2 / 3 + 0) / 2)
    assert found.accuracy_ci == (0.0, pytest.approx(2 / 3))  # either prompt twice: never a labeler alone

    def of(*rankings: int) -> PartAccuracy | None:
        return part_accuracy(scores, group, ranks, items, torch.isin(group, torch.tensor(rankings)), 200, 0)

    assert of(0, 3) == PartAccuracy(pairs=2, prompts=2, accuracy=0.5, accuracy_ci=(0.0, 1.0))
    assert of(2) == PartAccuracy(pairs=1, prompts=1, accuracy=0.0, accuracy_ci=(0.0, 0.0))
    assert of(9) is None


def test_rankings_that_are_all_ties_are_refused() -> None:
    with pytest.raises(ValueError, match="none of the 6 completions is ranked above another"):
        reward_accuracy(SCORES, GROUP, torch.zeros_like(RANKS), LENGTHS, resamples=10, seed=0)
