"""Win rates: how often one model's replies are preferred to another's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Verdicts = Mapping[str, float]
"""the labeler's verdict on a model's response, by prompt id"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """How often a judge prefers one model's response to the other's; a tie is half a win."""

    rate: float
    """(wins + ties / 2) / prompts"""
    ci: tuple[float, float]
    """95 % interval of the rate (Wilson)"""
    wins: int
    """prompts"""
    losses: int
    """prompts"""
    ties: int
    """prompts on which neither was preferred"""


def tally(outcomes: Sequence[float]) -> WinRate | None:
    """The win rate of outcomes: 1 a win, 0.5 a tie, 0 a loss; None without any."""
    if not outcomes:
        return None
    from learner.maths.intervals import wilson_interval

    won, count = sum(outcomes), len(outcomes)
    wins, losses = outcomes.count(1), outcomes.count(0)
    ci = wilson_interval(won, count)
    return WinRate(rate=won / count, ci=ci, wins=wins, losses=losses, ties=count - wins - losses)


def win_rate(ours: Verdicts, theirs: Verdicts, tie_margin: float) -> WinRate | None:
    """Compare verdicts on the prompts that both answered; None without any."""
    gaps = [ours[key] - theirs[key] for key in ours.keys() & theirs.keys()]
    return tally([0.5 if abs(gap) <= tie_margin else float(gap > 0) for gap in gaps])
