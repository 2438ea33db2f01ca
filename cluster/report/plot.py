"""A plot, rendered as SVG that takes its colours from the page, so that it serves light and dark, or as PNG."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

_STYLE = mpl.rc_params_from_file(Path(__file__).with_name("report.mplstyle"), use_default_template=False)
INK, MUTED, GRID, BEFORE = _STYLE["text.color"], _STYLE["axes.edgecolor"], _STYLE["grid.color"], "#7d8590"
SERIES: tuple[str, ...] = tuple(_STYLE["axes.prop_cycle"].by_key()["color"])
_VARIABLES = {"ink": INK, "muted": MUTED, "grid": GRID, "before": BEFORE}
_VARIABLES |= {f"series-{index}": colour for index, colour in enumerate(SERIES)}
"""Colour by its name in the page's style sheet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Something to draw, and what it says for those who do not see it."""

    title: str
    """what is shown, with its unit"""
    alt: str
    """alternative text"""
    draw: Callable[[Axes], None]
    """draws on empty axes"""
    height: float = 2.9
    """inches, at a width of 5.2 inches"""


def svg(plot: Plot, prefix: str, small: bool) -> str:
    """Render a plot as inline SVG that fills its column of the page.

    prefix: keeps its ids apart from those of other plots.
    small: for a column of a third of the page rather than a half, with letters of the same size.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.8, 0.85 * plot.height) if small else (5.2, plot.height), layout="constrained")
        plot.draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page has its own font
    text = re.sub(r'(?<=id=")|(?<=xlink:href="#)|(?<=url\(#)', f"{prefix}-", text)
    text = text.replace("xlink:href", "href")
    for name, colour in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def png(plots: Sequence[Plot], caption: str) -> bytes:
    """Render up to four plots as one PNG, two in a row, with a line of caption below."""
    columns, rows = min(2, len(plots)), math.ceil(len(plots) / 2)
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.6 * columns, 3.5 * rows + 0.3), layout=layout, facecolor="white")
        for place, plot in zip(figure.subfigures(rows, columns, squeeze=False).flat, plots, strict=False):
            plot.draw(place.add_subplot())
            place.suptitle(plot.title, x=0.02, horizontalalignment="left", fontsize=11, weight="bold")
        figure.supxlabel(caption, fontsize=9, color=MUTED)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()
