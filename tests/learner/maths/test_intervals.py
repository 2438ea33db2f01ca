import pytest
import torch

from learner.maths.intervals import bootstrap_interval, wilson_interval


def test_wilson_interval_of_a_win_rate_with_ties() -> None:
    """61 wins, 33 losses, 6 ties."""
    assert wilson_interval(61 + 6 / 2, 100) == pytest.approx((0.542354, 0.727288), abs=6e-7)


def test_wilson_interval_at_the_ends() -> None:
    """With no successes the upper end is z^2 / (n + z^2) = 3.841459 / 13.841459."""
    low, high = wilson_interval(0, 10)
    assert (low, high) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((1 - high, 1.0))
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_bootstrap_approaches_the_normal_interval() -> None:
    """A share of 0.64 of 400 has standard error 0.024."""
    won = (torch.arange(400) < 256).float()
    low, high = bootstrap_interval(won, torch.ones(400, dtype=torch.long), 2000, seed=0)
    assert low == pytest.approx(0.64 - 1.96 * 0.024, abs=0.006)
    assert high == pytest.approx(0.64 + 1.96 * 0.024, abs=0.006)


def test_bootstrap_resamples_units_and_not_what_is_counted_in_them() -> None:
    """Ten units of 100 equal outcomes are ten observations: the interval is as wide as that of ten."""
    won = torch.tensor([1.0] * 5 + [0.0] * 5)
    single = bootstrap_interval(won, torch.ones(10, dtype=torch.long), 1000, seed=3)
    hundredfold = bootstrap_interval(100 * won, torch.full((10,), 100), 1000, seed=3)
    assert hundredfold == pytest.approx(single)
    assert single == pytest.approx((0.2, 0.8), abs=0.11)


def test_bootstrap_repeats_itself_and_does_not_touch_the_global_generator() -> None:
    x, ones = torch.rand(20, generator=torch.Generator().manual_seed(1)), torch.ones(20, dtype=torch.long)
    state = torch.get_rng_state()
    first = bootstrap_interval(x, ones, 100, seed=5)
    assert bootstrap_interval(x, ones, 100, seed=5) == first
    assert bootstrap_interval(x, ones, 100, seed=6) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_a_single_unit_has_a_point_for_an_interval() -> None:
    assert bootstrap_interval(torch.tensor([3.0]), torch.tensor([4]), 10, seed=0) == (0.75, 0.75)
