import re
from xml.etree import ElementTree

import pytest

from cluster.report import charts
from cluster.report.charts import Curve
from cluster.report.plot import BEFORE, GRID, INK, MUTED, SERIES, Plot, png, svg

CURVES = [
    Curve(
        name=f"$x_{index}$ <b> & co",
        x=(0, 1, 2),
        y=(0.1, 0.2, 0.4),
        low=(0, 0.1, 0.3),
        high=(0.2, 0.3, 0.5),
        colour=colour,
    )
    for index, colour in enumerate(SERIES)
]


@pytest.fixture
def plot() -> Plot:
    return charts.lines("Gold", "iteration", CURVES)


@pytest.fixture
def histogram() -> Plot:
    return charts.histogram("Gold", [("SFT", BEFORE, [0.1, 0.2]), ("PPO", SERIES[0], [0.3])])


@pytest.mark.parametrize("small", [True, False])
def test_an_svg_is_well_formed_and_takes_every_colour_from_the_page(plot, histogram, small: bool):
    text = svg(plot, "a", small) + svg(histogram, "b", small)
    ElementTree.fromstring(f"<page>{text}</page>")
    for name in ("ink", "muted", "grid", "before", "series-0", "series-1", "series-2", "series-3"):
        assert f"var(--{name})" in text
    assert not any(colour in text for colour in (INK, MUTED, GRID, BEFORE, *SERIES))
    assert "#000000" not in text
    assert "#ffffff" not in text


def test_an_svg_names_nothing_outside_itself_and_shares_no_id_with_another(plot):
    first, second = svg(plot, "a", False), svg(plot, "b", False)
    assert "http" not in first
    assert "DOCTYPE" not in first
    ids = [set(re.findall(r'id="([^"]*)"', text)) for text in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for text, known in zip((first, second), ids, strict=True):
        targets = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text)
        assert targets
        assert {one or other for one, other in targets} <= known


def test_text_stays_text_and_is_escaped_and_a_dollar_is_a_dollar(plot):
    text = svg(plot, "a", False)
    assert "$x_0$ &lt;b&gt; &amp; co" in text
    assert "DejaVu" not in text  # the page's own font


def test_an_svg_fills_its_column_and_the_same_plot_gives_the_same_text(plot):
    text = svg(plot, "a", False)
    head = text[: text.index(">")]
    assert re.fullmatch(r'<svg viewBox="0 0 374\.4 [\d.]+" aria-hidden="true"', head)
    assert svg(plot, "a", True).startswith('<svg viewBox="0 0 273.6 ')
    assert svg(plot, "a", False) == text


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_an_overview_is_a_png(plot, count: int):
    data = png([plot] * count, "A caption with $ and <")
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width = int.from_bytes(data[16:20], "big")
    assert width == pytest.approx(160 * 5.6 * min(count, 2), abs=2)
