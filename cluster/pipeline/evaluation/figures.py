"""Figures of the suite: each with its 95 % interval, and the difference between two models, paired by item."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from actors.evaluation.task import Verdict
from cluster.pipeline.evaluation.harness.tasks import Measured
from learner.maths.intervals import percentile_interval, resampled_totals

TAX = "alignment tax"
"""The claim whose differences are a tax."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A value over items."""

    value: float
    ci: tuple[float, float]
    """95 % bootstrap interval over the items"""
    n: int
    """items behind it"""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.ci[0]:.3f}, {self.ci[1]:.3f}]"


def figures(task: Measured, verdicts: Mapping[str, Verdict]) -> dict[str, Figure]:
    """A model's figures on a task; one that no item has is left out."""
    found = {}
    for name, metric in task.metrics.items():
        if (vectors := _vectors(name, list(verdicts.values()))) is not None:
            found[name] = Figure(
                value=float(metric.total(vectors.sum(0))),
                ci=percentile_interval(resampled_totals(vectors, metric.total)),
                n=len(vectors),
            )
    return found


def differences(task: Measured, ours: Mapping[str, Verdict], theirs: Mapping[str, Verdict]) -> dict[str, Figure]:
    """What one model has more than another on the items that both answered, by metric: a paired bootstrap."""
    found, both = {}, [item for item in ours if item in theirs]
    for name, metric in task.metrics.items():
        has = [item for item in both if name in ours[item] and name in theirs[item]]
        one, other = (_vectors(name, [verdicts[item] for item in has]) for verdicts in (ours, theirs))
        if one is not None and other is not None:
            gaps = resampled_totals(one, metric.total) - resampled_totals(other, metric.total)
            value = float(metric.total(one.sum(0)) - metric.total(other.sum(0)))
            found[name] = Figure(value=value, ci=percentile_interval(gaps), n=len(has))
    return found


def taxes(task: Measured, gaps: Mapping[str, Figure]) -> dict[str, Figure]:
    """What differences to the base model cost: positive where the model is worse."""
    metrics = task.metrics  # which goes over the items
    return {name: gap if metrics[name].better == "lower" else _negative(gap) for name, gap in gaps.items()}


def _negative(figure: Figure) -> Figure:
    low, high = figure.ci
    return Figure(value=0.0 - figure.value, ci=(0.0 - high, 0.0 - low), n=figure.n)


def _vectors(name: str, verdicts: Sequence[Verdict]) -> NDArray[np.float64] | None:
    found = [verdict[name] for verdict in verdicts if name in verdict]
    return np.array(found, dtype=np.float64) if found else None


def saved(
    task: Measured, base: Mapping[str, Verdict], without: Mapping[str, Verdict], mixed: Mapping[str, Verdict]
) -> Figure | None:
    """Share of the tax of PPO that the pretraining mix saved, by the task's first metric; None where PPO cost nothing.

    Its interval is wide, or has no bound, where the tax without the mix is hardly one.
    """
    name, metric = next(iter(task.metrics.items()))
    items = [item for item in base if all(name in some.get(item, {}) for some in (base, without, mixed))]
    found = [_vectors(name, [some[item] for item in items]) for some in (base, without, mixed)]
    if not items or (value := _share(*(float(metric.total(one.sum(0))) for one in found if one is not None))) is None:
        return None
    samples = [resampled_totals(one, metric.total) for one in found if one is not None]
    shares = np.array([np.nan if (one := _share(*draw)) is None else one for draw in zip(*samples, strict=True)])
    return Figure(value=value, ci=percentile_interval(shares), n=len(items))


def _share(base: float, without: float, mixed: float) -> float | None:
    return (mixed - without) / (base - without) if base != without else None


def tables(
    title: str, tasks: Sequence[Measured], rows: Mapping[str, Mapping[str, Mapping[str, Figure]]]
) -> Iterator[Table]:
    """A table a task with a row a model, of the figures that are no part of another one (such as one type of bias)."""
    for task in tasks:
        shown = {
            label: {name: one for name, one in found.get(task.name, {}).items() if name.count("/") < 2}
            for label, found in rows.items()
        }
        if any(shown.values()):
            notes = "; ".join(dict.fromkeys(metric.note for metric in task.metrics.values() if metric.note))
            yield table(f"{title}: {task.name}", shown, notes)


def table(title: str, rows: Mapping[str, Mapping[str, Figure | int]], note: str = "") -> Table:
    """A row a model, a column a figure with its 95 % interval, or a count."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    found = Table("", title=title, title_justify="left", box=None, header_style="dim", caption=note or None)
    for name in names:
        found.add_column(name, overflow="fold")
    for label, row in rows.items():
        found.add_row(label, *(str(row[name]) if name in row else "" for name in names))
    return found
