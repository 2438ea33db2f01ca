"""How the report's pictures look: one style, rendered as SVG that takes its colours from the page, or as PNG.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart. In an SVG each becomes a
variable of the page's style sheet, so that one picture serves light and dark.
"""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, MUTED, GRID = "#1b1f23", "#6b7280", "#e2e5e9"
BEFORE, SERIES = "#7d8590", ("#0072b2", "#d55e00", "#009e73", "#a6568c")
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": True,
    "figure.dpi": 100,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "rayward",
    "text.color": INK,
    "text.parse_math": False,  # a "$" in a name is a dollar
    "xtick.bottom": False,
    "xtick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.color": MUTED,
    "ytick.labelsize": 9,
    "ytick.left": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """Something to draw, and what it says for those who do not see it."""

    title: str
    """what is shown, with its unit"""
    alt: str
    """alternative text"""
    draw: Callable[[Axes], None]
    """draws on empty axes"""
    height: float = 2.9
    """inches, at a width of 5.2 inches"""


def svg(picture: Picture, prefix: str, small: bool) -> str:
    """Render a picture as inline SVG that fills its column of the page.

    prefix: keeps its ids apart from those of other pictures.
    small: for a column of a third of the page rather than a half, with letters of the same size.
    """
    with _style():
        size = (3.8, 0.85 * picture.height) if small else (5.2, picture.height)
        drawing = Figure(figsize=size, layout="constrained")
        picture.draw(drawing.add_subplot())
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page has its own font
    text = re.sub(r'(?<=id=")|(?<=xlink:href="#)|(?<=url\(#)', f"{prefix}-", text)
    text = text.replace("xlink:href", "href")
    for name, colour in {"ink": INK, "muted": MUTED, "grid": GRID, "before": BEFORE}.items():
        text = text.replace(colour, f"var(--{name})")
    for index, colour in enumerate(SERIES):
        text = text.replace(colour, f"var(--series-{index})")
    return text


def png(pictures: Sequence[Picture], caption: str) -> bytes:
    """Render up to four pictures as one PNG, two in a row, with a line of caption below."""
    with _style():
        columns = min(2, len(pictures))
        rows = math.ceil(len(pictures) / 2)
        drawing = Figure(
            figsize=(5.6 * columns, 3.5 * rows + 0.3),
            layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12),
            facecolor="white",
        )
        places = drawing.subfigures(rows, columns, squeeze=False).flat
        for place, picture in zip(places, pictures, strict=False):
            picture.draw(place.add_subplot())
            place.suptitle(picture.title, x=0.02, horizontalalignment="left", fontsize=11, weight="bold")
        drawing.supxlabel(caption, fontsize=9, color=MUTED)
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context():
        mpl.rcParams.update(_STYLE)
        yield
