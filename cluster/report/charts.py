"""The kinds of plots that a report is made of.

Each function returns a `Plot`: its title, a text that tells its figures to those who do not see it, and how to draw it
on given axes, so that the same code serves page and overview. Lines also differ by dashes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cluster.report.plot import BEFORE, MUTED, SERIES, Plot

_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
_DOTTED: dict[str, Any] = {"color": MUTED, "linestyle": (0, (1, 1.5))}
_FEW = 6  # points that are marked one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One line of a plot, maybe in a band whose ends are NaN where there is none."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    colour: str = SERIES[0]


def lines(
    title: str,
    xlabel: str,
    curves: Sequence[Curve],
    *,
    smooth: bool = False,
    level: tuple[float, str] | None = None,
    path: bool = False,
) -> Plot:
    """Curves with bands, and a dotted line at a `level` of a name.

    smooth: draw a running mean over the values themselves, which become faint. path: mark every point, and the
    last.
    """

    def draw(axes: Axes) -> None:
        for index, curve in enumerate(curves):
            dashes = _DASHES[(index + index // len(SERIES)) % len(_DASHES)]  # no two of 16 in order look the same
            x, y, few, colour = np.array(curve.x), np.array(curve.y), len(curve.x) <= _FEW, curve.colour
            if smooth and len(y) >= 40:
                axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
                kernel = np.full(len(y) // 15, 1 / (len(y) // 15))
                x, y = np.convolve(x, kernel, "valid"), np.convolve(y, kernel, "valid")
            axes.plot(x, y, color=colour, linestyle=dashes, marker="o" if few else None, label=curve.name)
            if curve.low and (few or path):
                axes.vlines(x, curve.low, curve.high, color=colour, linewidth=6, alpha=0.3)
            elif curve.low:
                axes.fill_between(x, curve.low, curve.high, color=colour, alpha=0.2 / (1 + len(curves)), linewidth=0)
            if path:
                axes.plot(x, y, ".", color=colour, markersize=4)
                axes.plot(x[-1], y[-1], "o", color=colour, markersize=7)
        if level:
            axes.axhline(level[0], **_DOTTED)
            place = {"xytext": (-4, 2), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(level[1], (1, level[0]), color=MUTED, ha="right", **place)
        if not path:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.02)
        axes.set_xlabel(xlabel)
        _legend(axes)

    told = "; ".join(
        f"{one.name} from {rounded(one.y[0])} to {rounded(one.y[-1])} over {len(one.y)} points" for one in curves
    )
    return Plot(title=title, alt=f"Line chart, {title}, by {xlabel}: {told}.", draw=draw)


def histogram(title: str, groups: Sequence[tuple[str, str, Sequence[float]]]) -> Plot:
    """Distributions of the same quantity, groups of (name, colour, values); the means are dotted lines."""
    values = [value for *_, group in groups for value in group]
    ends = (-1.0, 1.0) if max(map(abs, values)) <= 1 else (min(values), max(values))

    def draw(axes: Axes) -> None:
        edges = np.linspace(*ends, 21).tolist()
        for name, colour, group in groups:
            weights, mean = np.full(len(group), 100 / len(group)), float(np.mean(group))
            axes.hist(group, edges, weights=weights, color=colour, alpha=0.45 if colour == BEFORE else 0.16)
            if colour != BEFORE:
                axes.hist(group, edges, weights=weights, color=colour, histtype="step", linewidth=1.6)
            axes.axvline(mean, color=colour, linestyle=_DOTTED["linestyle"], linewidth=1.6)
            axes.plot([], [], color=colour, linewidth=6, alpha=0.7, label=f"{name} {mean:+.2f}")
        axes.set(xlabel="dotted, and in the legend: the mean", ylabel="% of the responses")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _legend(axes)

    told = "; ".join(f"{name} mean {rounded(float(np.mean(one)))}, {len(one)} responses" for name, _, one in groups)
    return Plot(title=title, alt=f"Histogram, {title}: {told}.", draw=draw)


def dumbbells(title: str, rows: Sequence[tuple[str, str, float, float]], unit: str) -> Plot:
    """What each row moved from and to, rows of (name, colour, before, after)."""

    def draw(axes: Axes) -> None:
        # At least this much, so that a small change looks small.
        reach = max(0.2, *(abs(after - before) for *_, before, after in rows))
        for row, (name, colour, before, after) in enumerate(rows):
            arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 2, "shrinkA": 0, "shrinkB": 3}
            axes.annotate("", xy=(after, -row), xytext=(before, -row), arrowprops=arrow)
            axes.plot(before, -row, "o", color=BEFORE, markersize=7)
            axes.plot(after, -row, "o", color=colour, markersize=9)
            place, change = (min(before, after), -row), f"{before:.2f} → {after:.2f}  ({after - before:+.2f})"
            axes.annotate(name, place, (0, 13), textcoords="offset points", weight="bold")
            axes.annotate(change, place, (0, -18), textcoords="offset points", color=MUTED)
        ends = [value for row in rows for value in row[2:]]
        axes.set(xlim=(min(ends) - 0.1 * reach, max(ends) + 0.35 * reach), ylim=(-len(rows) + 0.3, 0.7))
        axes.set(yticks=[], xlabel=unit)

    told = "; ".join(f"{name} from {rounded(before)} to {rounded(after)}" for name, _, before, after in rows)
    return Plot(title=title, alt=f"{title}, {unit}: {told}.", draw=draw, height=1.5 + 0.8 * len(rows))


def rounded(value: float) -> str:
    """A number with three digits that count."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    return f"{value:,.{max(0, min(6, 2 - math.floor(math.log10(abs(value)))))}f}"


def _legend(axes: Axes) -> None:
    """Of several, above the axes."""
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0.2)
