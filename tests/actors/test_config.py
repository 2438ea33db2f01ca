"""The missing-EOS rules and the rollout's settings."""

import pytest
from pydantic import ValidationError

from actors.config import MissingEos, RolloutConfig


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (MissingEos(), -1.0),
        (MissingEos(rule="replace", value=-2.5), -2.5),
        (MissingEos(rule="subtract", value=0.5), 2.5),
        (MissingEos(rule="none"), 3.0),
    ],
)
def test_a_cut_off_response_of_score_3_is_scored_by_the_rule(rule: MissingEos, expected: float) -> None:
    assert rule.apply(3.0, ended=False) == expected
    assert rule.apply(3.0, ended=True) == 3.0


def test_a_penalty_that_would_be_a_bonus_is_refused() -> None:
    with pytest.raises(ValidationError, match="'subtract' needs a positive penalty"):
        MissingEos(rule="subtract", value=-1.0)


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"prompts_per_wave": 0}, {"top_p": 0.9}])
def test_settings_that_make_no_sense_or_are_unknown_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        RolloutConfig.model_validate(wrong)
