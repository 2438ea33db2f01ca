"""Win rates by the labeler's verdicts."""

import pytest

from cluster.pipeline.win_rates import win_rate


def test_a_tie_is_half_a_win_and_the_interval_is_wilsons():
    ours = {str(n): 1.0 for n in range(61)} | {str(n): 0.0 for n in range(61, 100)}
    theirs = (
        {str(n): 0.0 for n in range(61)} | {str(n): 0.5 for n in range(61, 94)} | {str(n): 0.04 for n in range(94, 100)}
    )
    found = win_rate(ours, theirs, tie_margin=0.05)
    assert found is not None
    assert (found.wins, found.losses, found.ties, found.rate) == (61, 33, 6, 0.64)
    assert found.ci == pytest.approx((0.542354, 0.727288), abs=1e-6)


def test_only_prompts_that_both_answered_count():
    found = win_rate({"a": 1.0, "b": 1.0}, {"b": 0.0, "c": 5.0}, tie_margin=0.0)
    assert found is not None
    assert (found.wins, found.losses, found.ties) == (1, 0, 0)
    assert win_rate({"a": 1.0}, {"b": 1.0}, tie_margin=0.0) is None


def test_the_other_side_has_the_rest():
    ours, theirs = {"a": 1.0, "b": 0.0, "c": 0.2}, {"a": 0.0, "b": 1.0, "c": 0.0}
    one, other = win_rate(ours, theirs, 0.1), win_rate(theirs, ours, 0.1)
    assert one is not None
    assert other is not None
    assert one.rate + other.rate == 1
