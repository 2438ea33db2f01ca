import math

import pytest

from cluster.config.schema import AlertsConfig
from cluster.tracking.alerts import Alerts


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def told():
    return []


@pytest.fixture
def alerts(told, clock):
    return Alerts(AlertsConfig(kl_above=10, gap_above=0.2, stalled_s=60), told.append, clock=clock)


def kinds(told):
    return [alert.kind for alert in told]


def test_a_healthy_step_tells_nothing(alerts, told):
    alerts.step("ppo", 1, {"kl/mean": 10.0, "parity/mean_gap": 0.2, "optimizer/skipped_policy": 0.0})
    alerts.tick()
    assert told == []


@pytest.mark.parametrize(
    ("metrics", "kind", "words"),
    [
        ({"kl/mean": 10.1}, "kl", "step 7 of ppo: the KL to the SFT model is 10.1 nats"),
        ({"parity/mean_gap": 0.21}, "gap", "parity/mean_gap is 0.21 nats, above 0.2"),
        ({"importance/log_ratio_mean": 0.5}, "gap", "importance/log_ratio_mean is 0.5"),
        ({"loss/policy": math.nan, "a/b": math.inf}, "non-finite", "not finite: a/b, loss/policy"),
        ({"optimizer/skipped_value": 2.0}, "non-finite", "2 optimizer steps were skipped"),
    ],
)
def test_a_step_out_of_bounds_is_told_with_its_place_and_value(alerts, told, metrics, kind, words):
    alerts.step("ppo", 7, metrics)
    assert kinds(told) == [kind]
    assert words in told[0].text


def test_what_comes_and_goes_is_told_once_and_once_when_it_is_over(alerts, told):
    for step, kl in enumerate((11, 9, 12, 9, 9, 11, 9, 9, 9, 9, 9, 9, 11), start=1):
        alerts.step("ppo", step, {"kl/mean": float(kl)})
        alerts.step("ppo", step, {"checkpoint/seconds": 1.0})  # tells nothing of the KL
    assert [(alert.kind, alert.over) for alert in told] == [("kl", False), ("kl", True), ("kl", False)]
    assert [alert.text.split(":")[0] for alert in told] == [f"step {n} of ppo" for n in (1, 9, 13)]
    assert "kl is within its bounds again" in told[1].text


def test_steps_that_were_skipped_are_over_after_steps_that_were_not(alerts, told):
    alerts.step("ppo", 1, {"optimizer/skipped_policy": 1.0, "grad_norm/value": 1.0})
    for step in (2, 3, 4):
        alerts.step("ppo", step, {"grad_norm/policy": 1.0, "grad_norm/value": 1.0})
        alerts.step("ppo", step, {"checkpoint/seconds": 1.0})
    assert [(alert.kind, alert.over, alert.text.split(":")[0]) for alert in told] == [
        ("non-finite", False, "step 1 of ppo"),
        ("non-finite", True, "step 4 of ppo"),
    ]


def test_generators_that_stay_away_are_told_and_those_that_are_on_their_way_are_not(alerts, told):
    for size in (2, 1, 1, 2, 1, 1, 1, 1, 2, 2, 2):
        alerts.step("ppo", 1, {"fleet/size": float(size), "fleet/wanted": 2.0})
    assert [(alert.kind, alert.over) for alert in told] == [("fleet", False), ("fleet", True)]
    assert "1 of 2 generators have been at work for 3 steps" in told[0].text


@pytest.mark.parametrize(
    ("name", "kind", "values", "words"),
    [
        (
            "response/eos_rate",
            "eos",
            (0.5, 0.0, 0.01, 0.02, 0.0, 0.01, 0.0, 0.4, 0.4, 0.4),
            "0.0% of the responses end",
        ),
        (
            "score/std",
            "scores",
            (0.5, 0.0, 0.0, 1e-3, 0.0, 1e-9, 0.0, 0.4, 0.4, 0.4),
            "responses of a batch score the same",
        ),
    ],
)
def test_what_makes_learning_pointless_is_told_after_three_steps_and_when_it_is_over(
    alerts, told, name, kind, values, words
):
    for step, value in enumerate(values, start=1):
        alerts.step("ppo", step, {name: value})
        alerts.step("ppo", step, {"checkpoint/seconds": 1.0})
    assert [(alert.kind, alert.over, alert.text.split(":")[0]) for alert in told] == [
        (kind, False, "step 7 of ppo"),
        (kind, True, "step 10 of ppo"),
    ]
    assert words in told[0].text


def test_silence_is_told_once_and_ends_with_a_step(alerts, told, clock):
    alerts.step("ppo", 3, {})
    for later in (60, 1, 1, 500):
        clock.now += later
        alerts.tick()
    assert kinds(told) == ["stalled"]
    assert "no step was logged for 61 s since step 3 of ppo" in told[0].text
    alerts.step("ppo", 4, {})
    assert told[1].over
    assert "step 4 of ppo was logged, after 562 s" in told[1].text
    clock.now += 61
    alerts.tick()
    assert kinds(told) == ["stalled", "stalled", "stalled"]


def test_a_pause_is_told_once_and_once_when_it_is_over(told):
    wrong = [None, "no scores: refused", "no scores: refused", None, None]
    alerts = Alerts(AlertsConfig(), told.append, lambda: wrong.pop(0))
    for _ in range(5):
        alerts.tick()
        alerts.step("ppo", 1, {"kl/mean": 0.0})
    assert [(alert.kind, alert.over, alert.text) for alert in told] == [
        ("paused", False, "no scores: refused"),
        ("paused", True, "no longer paused"),
    ]


def test_a_rule_that_is_off_tells_nothing(told, clock):
    alerts = Alerts(AlertsConfig(kl_above=None, gap_above=None, stalled_s=0), told.append, clock=clock)
    alerts.step("ppo", 1, {"kl/mean": 1e6, "parity/mean_gap": 9.0})
    clock.now += 1e6
    alerts.tick()
    assert told == []
