"""How a round's policy does against the SFT model and the policy before it, on the same held-out prompts."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from cluster.pipeline.job import Job
from cluster.rundir.files import Run, number, read_run
from learner.maths.intervals import Z95, wilson_interval

Verdicts = Mapping[str, float]
"""the labeler's verdict on a model's response, by prompt id"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """How often the labeler prefers one model's response to the other's; a tie is half a win."""

    rate: float
    """(wins + ties / 2) / prompts"""
    ci: tuple[float, float]
    """95 % interval of the rate (Wilson)"""
    wins: int
    """prompts"""
    losses: int
    """prompts"""
    ties: int
    """prompts on which the verdicts are at most the labeler's tie margin apart"""


def win_rate(ours: Verdicts, theirs: Verdicts, tie_margin: float) -> WinRate | None:
    """Compare verdicts on the prompts that both answered; None without any."""
    gaps = [ours[key] - theirs[key] for key in ours.keys() & theirs.keys()]
    wins, losses = sum(gap > tie_margin for gap in gaps), sum(gap < -tie_margin for gap in gaps)
    ties = len(gaps) - wins - losses
    if not gaps:
        return None
    won = wins + ties / 2
    return WinRate(rate=won / len(gaps), ci=wilson_interval(won, len(gaps)), wins=wins, losses=losses, ties=ties)


def round_figures(job: Job, round_number: int) -> dict[str, Any]:
    """What RUN/summary.json says of a round, read back from the files of its directory and of those before it."""
    runs = [read_run(job.run_dir / f"round-{k}") for k in range(1, round_number + 1)]
    run, margin = runs[-1], job.config.labeler.tie_margin
    ours = _verdicts(run, "ppo")
    sft = next((found for one in runs if (found := _verdicts(one, "sft"))), {})
    before = _verdicts(runs[-2], "ppo") if len(runs) > 1 else {}
    reward = run.figures("reward")
    rates = {"win_rate_sft": win_rate(ours, sft, margin), "win_rate_previous": win_rate(ours, before, margin)}
    figures = {
        "rankings": run.rankings,
        "gold": fmean(ours.values()) if ours else None,
        "gold_ci": _mean_interval(list(ours.values())),
        "gold_sft": fmean(sft.values()) if sft else None,
        "kl": number(run.figures("ppo", "ppo").get("kl")),
        "accuracy": number(reward.get("accuracy")),
        "accuracy_ci": reward.get("accuracy_ci"),
        "labelers_agree": run.summary.get("labelers_agree"),
        "labelers_agree_ci": run.summary.get("labelers_agree_ci"),
        **{name: asdict(rate) for name, rate in rates.items() if rate},
    }
    return {name: value for name, value in figures.items() if value is not None}


def _verdicts(run: Run, label: str) -> dict[str, float]:
    return {one.id: one.gold for one in run.evaluations.get(label, ()) if one.gold is not None}


def _mean_interval(values: list[float]) -> list[float] | None:
    """95 % interval of a mean by the normal approximation."""
    if len(values) < 2:
        return None
    mean, half = fmean(values), Z95 * stdev(values) / math.sqrt(len(values))
    return [mean - half, mean + half]
