"""Pictures of a run as a whole: how its rounds did, and what was made of what."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cluster.report.canvas import BEFORE, INK, MUTED, SERIES, Picture
from cluster.report.plots import figure
from cluster.rundir.files import Run, number, visible
from cluster.rundir.lineage import edges, latest, read_lineage

Estimate = tuple[int, float, tuple[float, float] | None]
"""(round, value, 95 % interval)"""
_COLUMNS = {"completions": 0.2, "comparisons": 0.2, "reward": 0.52} | dict.fromkeys(
    ("base", "sft", "baseline", "policy"), 0.82
)
"""where each kind stands in the graph"""


def rounds(run: Run) -> Iterator[Picture]:
    """Win rates, gold and the reward model's accuracy by round, with 95 % intervals."""
    table = round_table(run)
    rates = [
        (f"against {name}", colour, _estimates(table, key, "rate", "ci"))
        for key, name, colour in (
            ("win_rate_sft", "the SFT model", SERIES[0]),
            ("win_rate_previous", "the round before", SERIES[1]),
        )
    ]
    yield from _by_round(f"Win rate, {run.labeler}", rates, level=(0.5, "even"))
    before = next((value for row in table.values() if (value := number(row.get("gold_sft"))) is not None), None)
    level = None if before is None else (before, "SFT")
    gold = [("policy", SERIES[0], _estimates(table, None, "gold", "gold_ci"))]
    yield from _by_round(f"Gold score, {run.labeler}", gold, level)
    who = ", ".join(dict.fromkeys(visible(str(row["rankings"])) for row in table.values() if "rankings" in row))
    accuracy = [("reward model", SERIES[0], _estimates(table, None, "accuracy", "accuracy_ci"))]
    if agree := _estimates(table, None, "labelers_agree", "labelers_agree_ci"):
        accuracy.append(("two labelers", SERIES[1], agree))
    yield from _by_round(f"Reward-model accuracy, {who}", accuracy, level=(0.5, "chance"))


def round_table(run: Run) -> dict[int, Mapping[str, Any]]:
    """The summary's table of rounds, by their number."""
    rows = run.figures("rounds").items()
    return dict(sorted((int(key), row) for key, row in rows if key.isdecimal() and isinstance(row, dict)))


def lineage(run: Run) -> Iterator[Picture]:
    """Models and comparisons with arrows from what each was made of, the first on top."""
    records = read_lineage(run.path)
    kinds = {path: one.kind for path, one in latest(records).items() if one.kind in _COLUMNS}
    arrows = [(source, path) for source, path in edges(records) if source in kinds and path in kinds]
    if arrows:
        yield _graph("What was made of what", kinds, arrows)


def _estimates(table: Mapping[int, Mapping[str, Any]], inside: str | None, value: str, ci: str) -> list[Estimate]:
    found = []
    for index, row in table.items():
        part = row.get(inside) if inside else row
        if isinstance(part, dict) and (point := number(part.get(value))) is not None:
            bounds = part.get(ci)
            pair = [number(bound) for bound in bounds] if isinstance(bounds, list) else []
            low, high = pair if len(pair) == 2 else (None, None)
            found.append((index, point, None if low is None or high is None else (low, high)))
    return found


def _by_round(
    title: str, curves: Sequence[tuple[str, str, list[Estimate]]], level: tuple[float, str] | None
) -> Iterator[Picture]:
    shown = [curve for curve in curves if curve[2]]

    def draw(axes: Axes) -> None:
        for shift, (name, colour, points) in enumerate(shown):
            places = [index + 0.06 * (shift - (len(shown) - 1) / 2) for index, _, _ in points]
            for place, (_, _, interval) in zip(places, points, strict=True):
                if interval:
                    axes.plot((place, place), interval, color=colour, linewidth=6, alpha=0.35)
            axes.plot(places, [value for _, value, _ in points], "o-", color=colour, label=name)
        if level:
            axes.axhline(level[0], color=MUTED, linestyle=(0, (1, 1.5)))
            axes.annotate(
                level[1], (1, level[0]), (-4, 2), ("axes fraction", "data"), "offset points", color=MUTED, ha="right"
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(0.6, max(index for _, _, points in shown for index, _, _ in points) + 0.4)
        axes.set_xlabel("round; bar: 95% CI")
        if len(shown) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0.2)

    told = "; ".join(
        f"{name} {', '.join(f'{figure(value)} in round {index}' for index, value, _ in points)}"
        for name, _, points in shown
    )
    if shown:
        yield Picture(title=title, alt=f"{title}, by round with 95 % intervals: {told}.", draw=draw)


def _graph(title: str, kinds: Mapping[str, str], arrows: Sequence[tuple[str, str]]) -> Picture:
    places = _places(kinds, arrows)
    lowest = min(y for _, y in places.values())
    colours = {"reward": SERIES[1], "policy": SERIES[0], "sft": SERIES[2]}

    def draw(axes: Axes) -> None:
        boxes = {}
        for path, (x, y) in places.items():
            edge = colours.get(kinds[path], BEFORE)
            style = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": edge, "linewidth": 1.2}
            boxes[path] = axes.text(x, y, _short(path), ha="center", va="center", color=INK, fontsize=8, bbox=style)
        for source, path in arrows:
            around = places[source][0] == places[path][0] and places[source][1] - places[path][1] > 1
            arrow = {
                "arrowstyle": "-|>",
                "color": MUTED,
                "linewidth": 0.9,
                "patchA": boxes[source].get_bbox_patch(),
                "patchB": boxes[path].get_bbox_patch(),
                "connectionstyle": f"arc3,rad={0.45 if around else 0}",  # around what is between them
            }
            axes.annotate("", xy=places[path], xytext=places[source], arrowprops=arrow)
        axes.set(xlim=(0, 1), ylim=(lowest - 0.6, 0.6), xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)

    told = "; ".join(
        f"{_short(path)} of {', '.join(_short(source) for source, other in arrows if other == path)}"
        for path in kinds
        if any(other == path for _, other in arrows)
    )
    return Picture(title=title, alt=f"Graph, {title}: {told}.", draw=draw, height=0.9 - 0.5 * lowest)


def _places(kinds: Mapping[str, str], arrows: Sequence[tuple[str, str]]) -> dict[str, tuple[float, int]]:
    """Each node below everything that it was made of, in the column of its kind; no two at one place.

    A record names what was there before, so there is no circle, unless something was made again of its own results:
    the number of nodes bounds the depth.
    """
    depth = dict.fromkeys(kinds, 0)
    for _ in kinds:
        for source, path in arrows:
            depth[path] = min(max(depth[path], depth[source] + 1), len(kinds))
    places: dict[str, tuple[float, int]] = {}
    for path in sorted(kinds, key=depth.__getitem__):
        place = _COLUMNS[kinds[path]], -depth[path]
        while place in places.values():
            place = place[0], place[1] - 1
        places[path] = place
    return places


def _short(path: str) -> str:
    return visible(path.replace("data/", "").removesuffix(".jsonl"))
