"""Figures of the suite by hand, their intervals, and differences paired by item."""

import numpy as np
import pytest

from actors.evaluation.task import Metric, Task, spread
from cluster.pipeline.evaluation.figures import Figure, differences, figures, saved, tables, taxes


class Shares(Task):
    """Items with an accuracy, and one figure that few have."""

    name, claim = "shares", "alignment tax"

    @property
    def metrics(self):
        return {"accuracy": Metric(), "accuracy/rare": Metric(), "loss": Metric(better="lower")}

    @classmethod
    def read(cls, path, max_bad_rows=0):
        return []

    def requests(self, item):
        return []

    async def judge(self, item, answers):
        return {}


TASK = Shares([])


def verdicts(*right, **more):
    return {f"i{n}": {"accuracy": (float(one), 1.0), **more} for n, one in enumerate(right)}


def test_a_figure_is_a_ratio_of_sums_with_an_interval_over_items():
    found = figures(TASK, verdicts(1, 1, 0, 1))["accuracy"]
    assert (found.value, found.n) == (0.75, 4)
    assert found.ci[0] < 0.75 < found.ci[1] <= 1.0
    many = figures(TASK, verdicts(*([1, 1, 0, 1] * 250)))["accuracy"]
    half = 1.96 * (0.75 * 0.25 / 1000) ** 0.5
    assert many.ci == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)


def test_items_weigh_as_much_as_they_add():
    bits = {"a": {"loss": (30.0, 10.0)}, "b": {"loss": (10.0, 30.0)}}
    assert figures(TASK, bits)["loss"].value == 1.0


def test_a_figure_that_few_items_have_is_over_those_and_one_that_none_has_is_left_out():
    some = verdicts(1, 0, 1)
    some["i2"] = {**some["i2"], "accuracy/rare": (1.0, 1.0)}
    found = figures(TASK, some)
    assert found["accuracy/rare"].n == 1
    assert "loss" not in found


def test_models_that_are_the_same_differ_by_nothing_at_all():
    assert differences(TASK, verdicts(1, 0, 1, 1), verdicts(1, 0, 1, 1)) == {
        "accuracy": Figure(value=0.0, ci=(0.0, 0.0), n=4)
    }


def test_a_difference_is_paired_and_over_the_items_that_both_answered():
    dice = np.random.default_rng(1)
    hard = dice.random(400) < 0.5
    ours, theirs = verdicts(*hard), verdicts(*(hard & (dice.random(400) < 0.9)))
    theirs["elsewhere"] = {"accuracy": (1.0, 1.0)}
    found = differences(TASK, ours, theirs)["accuracy"]
    assert found.n == 400
    assert 0.0 < found.ci[0] < found.value < found.ci[1]
    apart = [figures(TASK, one)["accuracy"].ci for one in (ours, theirs)]
    assert apart[0][0] < apart[1][1], "unpaired intervals overlap"


def test_a_tax_is_what_got_worse():
    fell = Figure(value=-0.1, ci=(-0.2, 0.0), n=3)
    found = taxes(TASK, {"accuracy": fell, "loss": fell})
    assert found == {"accuracy": Figure(value=0.1, ci=(0.0, 0.2), n=3), "loss": fell}


def test_the_mix_saved_a_share_of_the_tax():
    base, without, mixed = (verdicts(*[1] * right, *[0] * (100 - right)) for right in (80, 40, 70))
    found = saved(TASK, base, without, mixed)
    assert found is not None
    assert found.value == pytest.approx(0.75)
    assert found.ci[0] < 0.75 < found.ci[1]
    assert saved(TASK, base, base, mixed) is None


def test_a_table_has_a_row_a_model_and_leaves_parts_of_figures_out():
    rows = {label: {"shares": {"accuracy": Figure(value=0.5, ci=(0.4, 0.6), n=2)}} for label in ("base", "sft")}
    rows["sft"]["shares"]["accuracy/qa/rare"] = rows["sft"]["shares"]["accuracy"]
    (found,) = tables("alignment tax", [TASK], rows)
    assert [column.header for column in found.columns] == ["", "accuracy"]
    assert list(found.columns[1].cells) == ["0.500 [0.400, 0.600]"] * 2


def test_few_items_are_spread_over_a_file():
    items: list = list(range(10))
    assert spread(items, 4) == [0, 2, 5, 7]
    assert spread(items, 12) == items
