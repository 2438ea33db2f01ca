"""The kinds of plots that a report is made of.

Each function returns a `Plot`: its title, a text that tells its figures to those who do not see it, and how to draw it
on given axes, so that the same code serves page and overview. Lines also differ by dashes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from cluster.report.plot import BEFORE, INK, MUTED, SERIES, Plot

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
    log: bool = False,
    smooth: bool = False,
    level: tuple[float, str] | None = None,
    path: bool = False,
) -> Plot:
    """Curves with bands, and a dotted line at a `level` of a name.

    smooth: draw a running mean over the values themselves, which become faint. path: mark every point, and the last.
    """

    def draw(axes: Axes) -> None:
        for curve, dashes in zip(curves, cycle(_DASHES), strict=False):
            x, y, few, colour = np.array(curve.x), np.array(curve.y), len(curve.x) <= _FEW, curve.colour
            if smooth and len(y) >= 40:
                axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
                kernel = np.full(len(y) // 15, 1 / (len(y) // 15))
                x, y = np.convolve(x, kernel, "valid"), np.convolve(y, kernel, "valid")
            axes.plot(x, y, color=colour, linestyle=dashes, marker="o" if few else None, label=curve.name)
            if curve.low and few:
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
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: rounded(value))
            axes.yaxis.set_minor_formatter(NullFormatter())
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


def bars(title: str, rows: Sequence[tuple[str, str, float]], unit: str, shares: bool = True) -> Plot:
    """Horizontal bars in the order of the rows (name, colour, value), with values and shares of the whole."""

    def draw(axes: Axes) -> None:
        names, colours, values = zip(*rows, strict=True)
        found = axes.barh(-np.arange(len(rows)), values, color=colours, height=0.62)
        total = sum(values) or 1.0
        labels = [rounded(value) + (f"  ({100 * value / total:.0f}%)" if shares else "") for value in values]
        axes.bar_label(found, labels, padding=5, color=INK)
        axes.set(xlim=(0, 1.28 * max(values) or 1.0), ylim=(-len(rows) + 0.4, 0.6), xlabel=unit)
        _name_rows(axes, [fill(name, 30, max_lines=2, placeholder=" …") for name in names])

    told = "; ".join(f"{name} {rounded(value)}" for name, _, value in rows)
    return Plot(title=title, alt=f"Bar chart, {title}, {unit}: {told}.", draw=draw, height=0.9 + 0.32 * len(rows))


def accuracy(title: str, rows: Sequence[tuple[str, str, float, tuple[float, float] | None]]) -> Plot:
    """Shares from 0 to 1, rows of (name, colour, share, 95 % confidence interval), and the mark of chance."""

    def draw(axes: Axes) -> None:
        names = []
        for row, (name, colour, share, interval) in enumerate(rows):
            if interval:
                axes.plot(interval, (-row, -row), color=colour, linewidth=6, alpha=0.35)
            axes.plot(share, -row, "o", color=colour, markersize=9)
            names.append(f"{name}\n{share:.3f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""))
        axes.axvline(0.5, **_DOTTED)
        axes.annotate("chance", (0.5, -len(rows) + 0.35), (4, 2), textcoords="offset points", color=MUTED)
        axes.set(xlim=(min(0.4, *(row[2] - 0.05 for row in rows)), 1), ylim=(-len(rows) + 0.3, 0.7))
        axes.set_xlabel("share of pairs; bar: 95% CI")
        _name_rows(axes, names)

    told = "; ".join(f"{name} {share:.3f}" for name, _, share, _ in rows)
    return Plot(title=title, alt=f"{title}: {told}; chance 0.5.", draw=draw, height=1.3 + 0.7 * len(rows))


def calibration(title: str, bins: Sequence[tuple[float, float, int]]) -> Plot:
    """Predicted against observed shares, bins of (predicted, observed, count); the count is a dot's area."""

    def draw(axes: Axes) -> None:
        predicted, observed, counts = np.array(bins).T
        axes.plot((0, 1), (0, 1), **_DOTTED, linewidth=1.4)
        axes.annotate("perfect", (0.97, 0.97), (-4, -12), textcoords="offset points", ha="right", color=MUTED)
        axes.plot(predicted, observed, color=SERIES[0], linewidth=1.2, alpha=0.6)
        axes.scatter(predicted, observed, s=14 + 160 * counts / counts.max(), color=SERIES[0], alpha=0.75, linewidths=0)
        left = max(0.0, math.floor(10 * min(predicted.min(), observed.min(), 0.5)) / 10)
        axes.set(xlim=(left, 1.02), ylim=(left, 1.02), xlabel="predicted", ylabel="observed")

    told = "; ".join(f"{one:.2f} predicted, {other:.2f} observed, {count} pairs" for one, other, count in bins)
    return Plot(title=title, alt=f"Calibration curve, {title}: {told}.", draw=draw)


def scatter(
    title: str, groups: Sequence[tuple[str, str, Sequence[float], Sequence[float]]], xlabel: str, ylabel: str
) -> Plot:
    """Points by group of (name, colour, x, y), each with its correlation in the legend."""
    names = [f"{name}, r = {_correlation(x, y)}" for name, _, x, y in groups]

    def draw(axes: Axes) -> None:
        for label, (_, colour, x, y), marker in zip(names, groups, cycle("os^D"), strict=False):
            axes.scatter(x, y, s=16, color=colour, alpha=0.55, linewidths=0, marker=marker, label=label)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        _legend(axes)

    told = "; ".join(f"{label}, {len(group[2])} responses" for label, group in zip(names, groups, strict=True))
    return Plot(title=title, alt=f"Scatter plot, {title}: {told}.", draw=draw, height=3.3)


def rounded(value: float) -> str:
    """A number with three digits that count."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    return f"{value:,.{max(0, min(6, 2 - math.floor(math.log10(abs(value)))))}f}"


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(-np.arange(len(names)), names)
    axes.tick_params(axis="y", colors=INK)
    axes.grid(visible=False, axis="y")


def _legend(axes: Axes) -> None:
    """Of several, above the axes, in as many columns as fit."""
    names = axes.get_legend_handles_labels()[1]
    if len(names) > 1:
        letters = axes.bbox.width * 72 / axes.figure.dpi / 5  # that fit beside one another
        columns = max(1, min(len(names), int(letters / (max(map(len, names)) + 7))))
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, borderaxespad=0.2)


def _correlation(x: Sequence[float], y: Sequence[float]) -> str:
    if len(x) < 3 or np.std(x) == 0 or np.std(y) == 0:
        return "undefined"
    return f"{np.corrcoef(x, y)[0, 1]:.2f}"
