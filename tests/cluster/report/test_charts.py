import math

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.report import charts
from cluster.report.charts import Curve, rounded
from cluster.report.plot import BEFORE, SERIES, Plot


def drawn(plot: Plot) -> Axes:
    axes = Figure().add_subplot()
    plot.draw(axes)
    return axes


def curve(values: list[float], spread: float = 0.0, name: str = "a") -> Curve:
    low, high = (tuple(one + sign * spread for one in values) if spread else () for sign in (-1, 1))
    return Curve(name=name, x=tuple(range(len(values))), y=tuple(values), low=low, high=high)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234.5, "1,234"),
        (64.04, "64.0"),
        (3.14159, "3.14"),
        (-0.01234, "-0.0123"),
        (1e-9, "0.000000"),
        (math.nan, "nan"),
    ],
)
def test_a_number_has_three_digits_that_count(value: float, text: str):
    assert rounded(value) == text


def test_lines_show_each_curve_and_its_band_and_tell_where_it_begins_and_ends():
    plot = charts.lines("Gold", "iteration", [curve([0.1, 0.5], 0.2, "one"), curve([0.0, 0.2], name="two")])
    told = "one from 0.100 to 0.500 over 2 points; two from 0 to 0.200 over 2 points."
    assert plot.alt == f"Line chart, Gold, by iteration: {told}"
    axes = drawn(plot)
    assert [line.get_label() for line in axes.lines] == ["one", "two"]
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()
    bars = [path.get_extents() for path in axes.collections[0].get_paths()]  # of few points; else a band
    assert [(bar.ymin, bar.ymax) for bar in bars] == [pytest.approx((-0.1, 0.3)), pytest.approx((0.3, 0.7))]
    band = drawn(charts.lines("Gold", "iteration", [curve([0.1] * 9 + [0.5], 0.2)])).collections[0]
    extents = band.get_paths()[0].get_extents()
    assert (extents.ymin, extents.ymax) == pytest.approx((-0.1, 0.7))


def test_a_single_curve_has_no_legend_and_a_single_point_is_seen():
    axes = drawn(charts.lines("Loss", "step", [curve([2.0])]))
    assert axes.get_legend() is None
    assert axes.lines[0].get_marker() == "o"


def test_long_curves_are_smoothed_by_a_running_mean_over_a_fifteenth():
    axes = drawn(charts.lines("Loss", "step", [curve([float(value % 2) for value in range(60)])], smooth=True))
    raw, mean = axes.lines
    assert np.size(raw.get_xdata()) == 60
    assert np.asarray(mean.get_ydata()) == pytest.approx([0.5] * 57)  # windows of four, two zeros and two ones each


def test_a_path_marks_its_end():
    axes = drawn(charts.lines("Gold by KL", "KL", [Curve(name="ppo", x=(0.0, 2.0, 1.0), y=(0.1, 0.3, 0.4))], path=True))
    assert np.ravel(axes.lines[-1].get_xydata()).tolist() == [1.0, 0.4]


def test_a_histogram_counts_in_percent_of_its_own_group():
    plot = charts.histogram("Gold", [("SFT", BEFORE, [-1.0, 0.05, 0.05, 1.0]), ("PPO", SERIES[0], [0.95])])
    assert plot.alt == "Histogram, Gold: SFT mean 0.0250, 4 responses; PPO mean 0.950, 1 responses."
    axes = drawn(plot)
    heights = [patch.get_height() for patch in axes.patches[:20]]  # type: ignore[attr-defined]
    assert heights[0] == heights[-1] == 25
    assert heights[10] == 50
    assert axes.get_xlim()[0] < -1


def test_a_histogram_of_another_scale_covers_it():
    axes = drawn(charts.histogram("Gold", [("SFT", BEFORE, [2.0, 8.0])]))
    assert axes.get_xlim()[0] < 2 < 8 < axes.get_xlim()[1]


def test_equal_values_draw_without_trouble():
    drawn(charts.histogram("Gold", [("SFT", BEFORE, [5.0, 5.0])]))
    drawn(charts.dumbbells("Tax", [("PPO", SERIES[0], 3.0, 3.0)], "nats"))
    drawn(charts.lines("Loss", "step", [curve([1.0, 1.0])]))


def test_a_dumbbell_tells_both_ends_and_shows_a_small_change_small():
    plot = charts.dumbbells("Tax", [("PPO-ptx", SERIES[0], 3.97, 3.98)], "nats a token")
    assert plot.alt == "Tax, nats a token: PPO-ptx from 3.97 to 3.98."
    axes = drawn(plot)
    assert "3.97 → 3.98  (+0.01)" in [text.get_text() for text in axes.texts]
    low, high = axes.get_xlim()
    assert 0.01 / (high - low) < 0.15


def test_a_level_is_named():
    axes = drawn(charts.lines("Win rate", "round", [curve([0.6])], level=(0.5, "even")))
    assert [text.get_text() for text in axes.texts] == ["even"]
    assert np.asarray(axes.lines[-1].get_ydata()).tolist() == [0.5, 0.5]
