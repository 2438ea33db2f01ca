"""What each labeler gets: as many labelers an item as wanted, nobody one twice, and measurements among the work."""

from collections import Counter
from pathlib import Path

import pytest

from reward_server.labeling.items import Answer
from tests.labeling import Desk, item, ranked


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.fsync", lambda file: None)


def known(name: str, use: str, *ranks: int, **more: object):
    return item(name, len(ranks), use=use, ranks=ranks, **more)


def test_an_item_goes_to_as_many_as_overlap_says_and_never_twice_to_one(tmp_path: Path):
    desk = Desk(tmp_path, [item(f"i{n}") for n in range(5)], overlap=2)
    given = Counter[str]()
    for labeler in ("p1", "p2", "p3", "p1", "p2", "p3", "p1", "p2", "p3", "p1"):
        if desk.next(labeler):
            given[desk.rank(labeler).item.id] += 1
    assert set(given.values()) == {2}
    assert len(given) == 5
    assert desk.project.quota_reached
    assert [desk.next(labeler) for labeler in ("p1", "p2", "p3", "p4")] == [None] * 4


def test_what_somebody_has_begun_comes_first_so_that_agreement_shows_early(tmp_path: Path):
    desk = Desk(tmp_path, [item(f"i{n}") for n in range(20)], overlap=2)
    first = [desk.rank("p1").item.id for _ in range(3)]
    assert sorted(desk.rank("p2").item.id for _ in range(3)) == sorted(first)


def test_the_orders_of_items_and_outputs_differ_by_labeler_and_are_the_same_again(tmp_path: Path):
    def orders(folder: str, labeler: str) -> list[tuple[str, tuple[int, ...]]]:
        desk = Desk(tmp_path / folder, [item(f"i{n}", 6) for n in range(8)])
        found = [desk.rank(labeler) for _ in range(8)]
        desk.project.close()
        return [(one.item.id, one.order) for one in found]

    one, other = orders("a", "p1"), orders("b", "p2")
    assert orders("c", "p1") == one
    assert [name for name, _ in one] != [name for name, _ in other]
    assert all(sorted(order) == list(range(6)) for _, order in one)
    assert sum(order == dict(other)[name] for name, order in one) < 3
    assert len({order for _, order in one}) > 4


def test_the_highest_priority_comes_first(tmp_path: Path):
    desk = Desk(tmp_path, [item(f"i{n}", priority=n % 4, control=n == 2) for n in range(4)])
    assert [desk.rank("p1").item.id for _ in range(4)] == ["i3", "i2", "i1", "i0"]


def test_an_item_that_is_open_too_long_is_given_on_and_whoever_had_it_loses_nothing(tmp_path: Path):
    desk = Desk(tmp_path, [item("a")], open_s=100)
    one = desk.take("p1")
    desk.draft(one, ranked(one, (2, 1, 0)))
    desk.clock.now += 99
    assert desk.next("p2") is None
    assert not desk.project.quota_reached
    desk.clock.now += 1
    other = desk.rank("p2")
    assert other.item.id == "a"
    assert desk.project.quota_reached
    back = desk.take("p1")
    assert (back.id, back.answer) == (one.id, ranked(one, (2, 1, 0)))
    desk.submit(back, ranked(back, (2, 1, 0)))
    assert desk.next("p1") is None


def test_an_item_that_was_never_begun_is_not_asked_for_again_when_another_has_done_it(tmp_path: Path):
    desk = Desk(tmp_path, [item("a"), item("b")], open_s=100)
    first = desk.take("p1")
    desk.clock.now += 50
    assert desk.take("p1") == first, "the one that is open"
    desk.clock.now += 50
    done = {desk.rank("p2").item.id, desk.rank("p2").item.id}
    assert done == {"a", "b"}
    assert desk.next("p1") is None
    desk.submit(first, ranked(first, (0, 1, 2)))
    assert desk.project.progress().given == 2, "no more than was wanted"


def test_training_comes_first_and_gold_and_repeats_are_among_the_work(tmp_path: Path):
    items = [item(f"i{n}") for n in range(200)]
    items += [known(f"g{n}", "gold", 0, 1, 2) for n in range(60)] + [known(f"t{n}", "training", 0, 1) for n in range(2)]
    desk = Desk(tmp_path, items, gold_share=0.2, repeat_share=0.1)
    given = [desk.rank("p1") for _ in range(202)]
    assert [one.item.id for one in given[:2]] == ["t0", "t1"]
    assert Counter(one.use for one in given)["training"] == 2
    measured = Counter(one.use for one in given[2:])
    assert 25 <= measured["gold"] <= 55, "a share of 0.2 of 200, give or take three deviations"
    assert 8 <= measured["repeat"] <= 33
    for use in ("work", "gold", "repeat"):
        names = [one.item.id for one in given if one.use == use]
        assert len(set(names)) == len(names)
    for at, one in enumerate(given):
        if one.use == "repeat":
            first = next(n for n, other in enumerate(given) if other.item.id == one.item.id)
            assert at - first > 5
    other = [desk.rank("p2").use for _ in range(30)]
    assert other[2:] != [one.use for one in given[2:30]], "nobody can tell another which are gold"


def test_gold_alone_is_no_work(tmp_path: Path):
    desk = Desk(tmp_path, [known("g", "gold", 0, 1)], gold_share=0.5)
    assert desk.next("p1") is None
    assert desk.project.quota_reached


def test_an_item_below_the_bound_goes_to_one_more_labeler_who_has_not_seen_it(tmp_path: Path):
    desk = Desk(tmp_path, [item("a"), item("b")], overlap=2, adjudicate_below=0.5)
    while (one := desk.next("p1")) is not None:
        desk.submit(one, ranked(one, (0, 1, 2)))
    while (one := desk.next("p2")) is not None:
        desk.submit(one, ranked(one, (2, 1, 0) if one.item.id == "a" else (0, 2, 1)))
    assert desk.project.progress().adjudication == ("a",), "2 of 3 pairs of b agree, none of a"
    assert desk.project.quota_reached
    extra = desk.take("p3")
    assert (extra.item.id, extra.use) == ("a", "adjudication")
    assert not desk.project.quota_reached, "somebody is at it"
    assert desk.next("p4") is None
    desk.submit(extra, ranked(extra, (0, 1, 2)))
    assert desk.project.quota_reached
    assert desk.project.progress().adjudication == ()
    assert desk.next("p4") is None


def test_what_does_not_count_is_given_to_another_and_waited_for_while_there_is_one(tmp_path: Path):
    desk = Desk(tmp_path, [item("a"), item("b")], words_per_minute=60)
    for labeler in ("p1", "p2"):
        desk.take(labeler)
    desk.clock.now += 100
    fast = desk.rank("p1", seconds=4.9)  # 5 words, of which the prompt has 2
    assert not desk.project.quota_reached
    slow = desk.rank("p2", seconds=5.0)
    assert desk.project.progress().given == 1
    assert not desk.project.quota_reached, "p2 has not seen it"
    again = desk.take("p2")
    assert again.item.id == fast.item.id != slow.item.id
    desk.clock.now += 100
    desk.submit(again, ranked(again, (0, 1, 2)), 4.0)
    assert desk.project.quota_reached, "nobody is left who could do it again"
    assert desk.take("p3").item.id == fast.item.id
    assert not desk.project.quota_reached


def test_who_is_left_out_gets_nothing_and_the_items_go_to_others_until_it_is_taken_back(tmp_path: Path):
    desk = Desk(tmp_path, [item("a"), item("b")], leave_out=("p9",))
    one = desk.rank("p1")
    assert desk.next("p9") is None
    desk.leave_out("p1", "does not read")
    assert desk.next("p1") is None
    assert {desk.rank("p2").item.id for _ in range(2)} == {"a", "b"}
    desk.leave_out("p1", None)
    assert desk.project.progress().given == 2
    assert desk.next("p1") is None, "all is done"
    assert one.item.id in ("a", "b")
    with pytest.raises(ValueError, match="say why"):
        desk.leave_out("p1", " ")


def test_a_demonstration_is_written_once(tmp_path: Path):
    prompts = [item(f"d{n}", 0, task="demonstration") for n in range(2)]
    desk = Desk(
        tmp_path, prompts, overlap=3, tasks=("rank", "demonstration"), demonstrations=tmp_path / "prompts.jsonl"
    )
    for labeler in ("p1", "p2"):
        one = desk.take(labeler)
        with pytest.raises(ValueError, match="the demonstration is empty"):
            desk.submit(one, Answer())
        desk.submit(one, Answer(text="Dear all,"))
    assert desk.project.quota_reached
    assert desk.next("p3") is None
