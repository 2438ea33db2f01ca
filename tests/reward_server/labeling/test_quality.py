"""Agreement against published and hand-computed numbers, and who is measured how."""

from pathlib import Path

import pytest

from reward_server.labeling.items import Answer
from reward_server.labeling.quality import krippendorff_alpha
from tests.labeling import Desk, item, ranked

# Krippendorff (2011), section "Any number of observers": four observers of twelve units, some of them missing.
OBSERVERS = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
    (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.fsync", lambda file: None)


def test_alpha_of_the_published_example():
    units = [[value for value in unit if value is not None] for unit in zip(*OBSERVERS, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.815, abs=0.0005)


def test_alpha_by_hand():
    assert krippendorff_alpha([[0, 0], [1, 1]]) == 1.0
    # Two units, both apart: each value pairs with the other one in all cases, by chance in 8 of 12.
    assert krippendorff_alpha([[0, 1], [1, 0]]) == pytest.approx(1 - 1 / (8 / 12))
    assert krippendorff_alpha([[0, 0], [0, 0]]) is None
    assert krippendorff_alpha([[0], [1]]) is None
    assert krippendorff_alpha([]) is None


def everybody(desk: Desk, ranks: dict[str, tuple[int, ...]]) -> None:
    for labeler, own in ranks.items():
        desk.rank(labeler, *own)


def test_agreement_in_all_by_labeler_and_by_use_case(tmp_path: Path):
    desk = Desk(tmp_path, [item("a", 4, use_case="chat")], overlap=3)
    everybody(desk, {"p1": (0, 1, 2, 3), "p2": (0, 1, 2, 2), "p3": (3, 2, 1, 0)})
    found = desk.project.progress()
    # p1 and p2 agree on 5.5 of 6 pairs, p1 and p3 on none, p2 and p3 on the half of one.
    assert (found.agreement.pairs.value, found.agreement.pairs.count) == (pytest.approx(6 / 18), 18)
    assert found.use_cases == {"chat": found.agreement}
    by = {one.labeler: one.agreement.pairs for one in found.labelers}
    assert (by["p1"].value, by["p1"].count) == (pytest.approx(5.5 / 12), 12)
    assert by["p2"].value == pytest.approx(6 / 12)
    assert by["p3"].value == pytest.approx(0.5 / 12)
    assert found.agreement.alpha is not None
    assert found.agreement.alpha < 0


def test_alpha_of_rankings_is_of_middle_places(tmp_path: Path):
    desk = Desk(tmp_path, [item("a", 4)], overlap=2)
    everybody(desk, {"p1": (0, 0, 0, 1), "p2": (0, 1, 2, 3)})
    # Twice the middle places are 2, 2, 2, 6 and 0, 2, 4, 6: the last is the last for both.
    assert desk.project.progress().agreement.alpha == krippendorff_alpha([[2, 0], [2, 2], [2, 4], [6, 6]])
    assert desk.project.progress().agreement.pairs.value == pytest.approx((3 + 3 / 2) / 6)


def test_one_labeler_agrees_with_nobody(tmp_path: Path):
    desk = Desk(tmp_path, [item("a")], overlap=2)
    desk.rank("p1")
    found = desk.project.progress()
    assert (found.agreement.pairs.value, found.agreement.pairs.count, found.agreement.alpha) == (None, 0, None)


def test_a_labeler_below_the_bound_of_gold_is_left_out_after_five(tmp_path: Path):
    golds = [item(f"g{n}", 2, use="gold", ranks=(0, 1)) for n in range(8)]
    desk = Desk(tmp_path, [*golds, *(item(f"i{n}", 2) for n in range(99))], gold_share=0.5, min_gold=0.6)
    seen = 0
    while seen < 5:
        assert desk.project.progress().labelers == () or desk.project.progress().labelers[0].left_out is None
        one = desk.take("p1")
        seen += one.use == "gold"
        right = one.use == "work" or seen in (1, 2)
        desk.submit(one, Answer(cannot="both") if seen == 5 else ranked(one, (0, 1) if right else (1, 0)))
    (found,) = desk.project.progress().labelers
    assert (found.gold.value, found.gold.count, found.golds) == (0.4, 5, 5)
    assert found.left_out == "40% of gold pairs are right, below label.min_gold = 60%"
    assert desk.project.progress().given == 0
    while desk.project.progress().labelers[0].left_out:
        one = desk.take("p1")
        desk.submit(one, ranked(one, (0, 1)))
    assert desk.project.progress().labelers[0].gold.value == 5 / 8, "who gets better is back"
    assert desk.project.progress().given > 0


def test_repeats_are_compared_with_the_first_time(tmp_path: Path):
    desk = Desk(tmp_path, [item(f"i{n}") for n in range(99)], repeat_share=0.5)
    repeats = 0
    while repeats < 2:
        one = desk.take("p1")
        repeats += one.use == "repeat"
        desk.submit(one, ranked(one, (0, 2, 1) if one.use == "repeat" and repeats == 2 else (0, 1, 2)))
    (found,) = desk.project.progress().labelers
    assert (found.repeats.value, found.repeats.count) == (pytest.approx(5 / 6), 6)


def test_time_pace_and_what_is_open(tmp_path: Path):
    desk = Desk(tmp_path, [item(f"i{n}") for n in range(9)])
    for seconds in (1.0, 9.0, 5.0):
        desk.rank("p1", seconds=seconds)
        desk.clock.now += 600
    desk.take("p1")
    (found,) = desk.project.progress().labelers
    assert (found.done, found.open, found.seconds, found.per_hour) == (3, 1, 5.0, 6.0)
    desk.clock.now += 3600
    assert desk.project.progress().per_hour == 0.0


def test_time_that_the_page_claims_is_no_longer_than_the_item_was_there(tmp_path: Path):
    desk = Desk(tmp_path, [item("a")], words_per_minute=60)
    one = desk.take("p1")
    desk.clock.now += 4
    desk.submit(one, ranked(one, (0, 1, 2)), seconds=1000)
    assert desk.project.progress().labelers[0].too_fast == 1


def test_cannot_be_ranked_is_an_answer_that_needs_no_time(tmp_path: Path):
    desk = Desk(tmp_path, [item("a")], words_per_minute=60)
    one = desk.take("p1")
    desk.submit(one, Answer(cannot="in Welsh"), seconds=1)
    found = desk.project.progress()
    assert (found.given, found.unranked) == (1, 1)
    assert desk.project.quota_reached
