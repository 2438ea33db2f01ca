"""Skipped steps: counted for the log, forgiven one by one, fatal in a row."""

import pytest

from learner.worker.skipped_steps import NonFiniteSteps, SkippedSteps

GOOD = {"loss/policy": 1.0, "grad_norm/policy": 2.0}
BAD = {"skipped/policy": 1.0, "nonfinite/policy/loss/policy": 1.0, "loss/value": 1.0}


def test_skipped_steps_are_counted_by_network():
    skipped = SkippedSteps("ppo", 3)
    assert skipped.count(1, [GOOD, GOOD]) == {}
    assert skipped.count(2, [BAD, GOOD, {**BAD, "skipped/value": 1.0}]) == {
        "optimizer/skipped_policy": 2.0,
        "optimizer/skipped_value": 1.0,
    }


def test_steps_in_a_row_end_the_run_and_the_error_names_loop_step_and_cause():
    skipped = SkippedSteps("ppo", 3)
    skipped.count(1, [GOOD, BAD])
    with pytest.raises(NonFiniteSteps, match=r"ppo, step 2: 3 .* of the policy network .* since loss/policy was not"):
        skipped.count(2, [BAD, BAD, GOOD])  # the row goes on over calls


def test_a_good_step_starts_the_count_anew():
    skipped = SkippedSteps("sft", 2)
    for step in range(5):
        skipped.count(step, [{"skipped": 1.0}])
        skipped.count(step, [{"loss": 1.0}])


def test_every_network_has_a_row_of_its_own():
    skipped = SkippedSteps("ppo", 2)
    for step in range(5):
        skipped.count(step, [BAD, {"skipped/value": 1.0}])


def test_without_a_culprit_the_gradient_is_named():
    with pytest.raises(NonFiniteSteps, match=r"sft, step 4: 1 optimizer steps in a row .* the gradient was not"):
        SkippedSteps("sft", 1).count(4, [{"skipped": 1.0}])
