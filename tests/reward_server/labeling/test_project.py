"""Nothing that anybody does is lost or counted twice, whoever does it, in whatever order, and however often."""

import asyncio
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_server.labeling.export import exported
from reward_server.labeling.items import Answer, Assignment, Conflict, Feedback
from reward_server.labeling.log import FILE, read_events
from reward_server.labeling.project import Project, version
from reward_server.preferences.sheets import dense
from tests.labeling import Clock, Desk, item, ranked

LABELERS = ("p1", "p2", "p3", "p4")
OPEN_S = 60


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.fsync", lambda file: None)


@dataclass
class Session:
    """What a random session has done: what is held against the log in the end."""

    desk: Desk
    overlap: int
    submitted: dict[str, tuple[str, str, tuple[int, ...]]] = field(default_factory=dict)
    done: dict[str, list[str]] = field(default_factory=dict)
    calls: list[Any] = field(default_factory=list)
    keys: Any = field(default_factory=itertools.count)

    async def step(self, labeler: str, action: str, ranks: tuple[int, ...]) -> None:
        project, key = self.desk.project, f"k{next(self.keys)}"
        match action:
            case "wait":
                self.desk.clock.now += OPEN_S * 0.7
            case "reopen":
                project.close()
                self.desk.open()
            case "resend" if self.calls:
                call, before = self.calls[ranks[0] % len(self.calls)]
                assert await call(self.desk.project) == before
            case "undo":
                await self.undo(labeler, key)
            case "next":
                await project.next(labeler)
            case "draft" | "submit" if (one := await project.next(labeler)) is not None:
                await self.answer(labeler, one, action, ranks, key)

    async def undo(self, labeler: str, key: str) -> None:
        found = await self.desk.project.undo(labeler, key)
        own = self.done.setdefault(labeler, [])
        assert (found and found.id) == (own.pop() if own else None)
        if found is not None:
            del self.submitted[found.id]

    async def answer(self, labeler: str, one: Assignment, action: str, ranks: tuple[int, ...], key: str) -> None:
        answer, arguments = ranked(one, ranks), (labeler, one.id, one.version)

        async def call(project: Project) -> int | Feedback | None:
            return await (project.draft if action == "draft" else project.submit)(*arguments, answer, 1.0, key)

        self.calls.append((call, await call(self.desk.project)))
        if action == "submit":
            self.submitted[one.id] = (one.item.id, labeler, ranks)
            self.done.setdefault(labeler, []).append(one.id)
        with pytest.raises(Conflict) as conflict:
            await self.desk.project.draft(*arguments, answer, 1.0, f"{key} late")
        assert conflict.value.assignment.version == one.version + 1

    def check(self) -> None:
        """What must hold of the log, whatever was done."""
        events = self.desk.events
        keys = [event["key"] for event in events if "key" in event]
        assert len(set(keys)) == len(keys)
        given = [(event["by"], event["item"]) for event in events if event["kind"] == "given"]
        assert len(set(given)) == len(given), "an item twice to one labeler"
        self.check_overlap(events)
        found = {row.id: row.ranks for row in exported(events, self.desk.config).comparisons}
        assert found == {f"{name}:{labeler}": dense(ranks) for name, labeler, ranks in self.submitted.values()}

    def check_overlap(self, events: list[dict[str, Any]]) -> None:
        """When an item is given, fewer than wanted have submitted it or have it open since short."""
        done, changed, of = set[str](), dict[str, float](), dict[str, list[str]]()
        for event in events:
            if (one := event.get("assignment")) is None:
                continue
            if event["kind"] == "given":
                others = of.setdefault(event["item"], [])
                active = [o for o in others if o in done or event["time"] - changed[o] < OPEN_S]
                assert len(active) < self.overlap
                others.append(one)
            changed[one] = event["time"]
            (done.add if event["kind"] == "submitted" else done.discard)(one)


STEPS = st.tuples(
    st.sampled_from(LABELERS),
    st.sampled_from(("next", "draft", "submit", "submit", "submit", "undo", "wait", "reopen", "resend")),
    st.tuples(*[st.integers(0, 2)] * 3),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, max_size=40), st.integers(1, 3), st.integers(1, 4))
def test_whatever_is_done_in_whatever_order_nothing_is_lost_or_there_twice(tmp_path_factory, steps, overlap, count):
    folder = tmp_path_factory.mktemp("session")
    desk = Desk(folder, [item(f"i{n}") for n in range(count)], overlap=overlap, open_s=OPEN_S, adjudicate_below=0)
    session = Session(desk, overlap)

    async def run() -> None:
        for step in steps:
            await session.step(*step)

    asyncio.run(run())
    session.check()
    before = exported(desk.events, desk.config), desk.project.progress()
    desk.reopen()
    assert (exported(desk.events, desk.config), desk.project.progress()) == before
    desk.project.close()


def test_many_at_once_lose_nothing(tmp_path: Path):
    desk = Desk(tmp_path, [item(f"i{n}") for n in range(60)], overlap=2)
    clicked = {}

    async def work(labeler: str) -> None:
        for number in itertools.count():
            if (one := await desk.project.next(labeler)) is None:
                return
            ranks = tuple((number + place) % 3 for place in range(3))
            await desk.project.draft(labeler, one.id, 0, ranked(one, ranks), 1, f"{labeler} d{number}")
            await desk.project.submit(labeler, one.id, 1, ranked(one, ranks), 2, f"{labeler} s{number}")
            clicked[f"{one.item.id}:{labeler}"] = ranks

    async def run() -> None:
        async with asyncio.timeout(60):
            await asyncio.gather(desk.project.wait_quota(30), *(work(f"p{n}") for n in range(1, 11)))

    asyncio.run(run())
    found = {row.id: row.ranks for row in exported(desk.events, desk.config).comparisons}
    assert found == clicked
    assert len(found) == 120


def test_two_tabs_see_the_same_item_and_the_older_one_is_told_what_the_other_did(tmp_path: Path):
    desk = Desk(tmp_path, [item("a"), item("b")])
    one, other = desk.take("p1"), desk.take("p1")
    assert one == other
    assert desk.draft(one, ranked(one, (0, 1, 2)), seconds=7) == 1
    with pytest.raises(Conflict) as conflict:
        desk.draft(other, ranked(other, (2, 1, 0)))
    newest = conflict.value.assignment
    assert (newest.version, newest.answer, newest.seconds) == (1, ranked(one, (0, 1, 2)), 7)
    desk.submit(newest, ranked(newest, (2, 1, 0)), seconds=5)
    with pytest.raises(Conflict) as conflict:
        desk.submit(newest, ranked(newest, (0, 1, 2)))
    assert conflict.value.assignment.submitted
    assert conflict.value.assignment.seconds == 7, "time does not run back"


def test_another_s_assignment_is_as_unknown_as_one_that_is_not_there(tmp_path: Path):
    desk = Desk(tmp_path, [item("a")])
    one = desk.take("p1")
    for labeler, name in (("p2", one.id), ("p1", "a99")):
        with pytest.raises(KeyError):
            asyncio.run(desk.project.submit(labeler, name, 0, ranked(one, (0, 1, 2)), 1, "k"))


def test_undo_goes_back_one_by_one_and_a_resend_of_it_not_further(tmp_path: Path):
    desk = Desk(tmp_path, [item(f"i{n}") for n in range(3)])
    first, second = desk.rank("p1", 0, 1, 2), desk.rank("p1", 2, 1, 0)
    third = desk.take("p1")
    for _ in range(2):
        back = asyncio.run(desk.project.undo("p1", "u1"))
        assert back is not None
        assert (back.id, back.submitted, back.answer) == (second.id, False, ranked(second, (2, 1, 0)))
    assert desk.take("p1").id == second.id
    again = desk.undo("p1")
    assert again is not None
    assert again.id == first.id
    assert desk.undo("p1") is None
    with pytest.raises(ValueError, match="'u1' was used for another change"):
        asyncio.run(desk.project.draft("p1", first.id, again.version, ranked(first, (0, 1, 2)), 1, "u1"))
    assert [desk.rank("p1").id for _ in range(3)] == [first.id, second.id, third.id]
    assert len(exported(desk.events, desk.config).comparisons) == 3


def test_training_is_told_at_once_in_the_order_shown_and_cannot_be_undone(tmp_path: Path):
    taught = item("t", 4, use="training", ranks=(3, 0, 1, 1), explanation="the second answers")
    desk = Desk(tmp_path, [taught, item("a")])
    one = desk.take("p1")
    told = desk.submit(one, ranked(one, (3, 0, 1, 2)))
    assert told is not None
    assert not told.correct
    assert told.explanation == "the second answers"
    assert {one.responses[place]: rank for place, rank in enumerate(told.ranks)} == {
        "alpha": 3, "beta": 1, "gamma": 2, "delta": 2
    }  # fmt: skip
    assert desk.undo("p1") is None
    right = desk.take("p2")
    assert desk.submit(right, ranked(right, (8, 0, 4, 4))) == Feedback(
        correct=True, ranks=tuple((3, 1, 2, 2)[index] for index in right.order), explanation="the second answers"
    )
    assert desk.rank("p1").item.id == "a"


def test_half_of_a_character_is_refused_and_nothing_is_taken_of_it(tmp_path: Path):
    desk = Desk(tmp_path, [item("a")])
    one = desk.take("p1")
    with pytest.raises(ValueError, match="surrogates not allowed"):
        asyncio.run(desk.project.submit("p1", one.id, 0, ranked(one, (0, 1, 2)), 1, "\ud800"))
    desk.submit(one, ranked(one, (0, 1, 2)))
    assert [event["kind"] for event in desk.events] == ["item", "given", "submitted"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(), "without a rank: output 1, 2, 3"),
        (Answer(ranks=(1, None, 2)), "without a rank: output 2"),
        (Answer(ranks=(1, 2)), "ranks has 2 entries for 3 outputs"),
        (Answer(ranks=(1, 1, 1)), "without a quality: output 1, 2, 3"),
        (
            Answer.model_validate({"ranks": (1, 1, 1), "ratings": [{"quality": 3}, {}, {"quality": 1}]}),
            "quality: output 2",
        ),
        (
            Answer.model_validate({"ratings": [{"flags": ["nice"]}] * 3}),
            r"flags has \['nice'\], and there are hallucin",
        ),
        (Answer(cannot=" "), "say why"),
        (Answer(text="x"), "text is for demonstrations"),
    ],
)
def test_what_is_not_whole_is_not_taken_with_what_is_missing(tmp_path: Path, answer: Answer, reason: str):
    desk = Desk(tmp_path, [item("a")], quality=True, flags=("hallucination",))
    one = desk.take("p1")
    with pytest.raises(ValueError, match=reason):
        desk.submit(one, answer)
    assert [event["kind"] for event in desk.events] == ["item", "given"]


def test_items_that_have_changed_are_refused_and_new_ones_are_added(tmp_path: Path):
    desk = Desk(tmp_path, [item("a")])
    desk.rank("p1")
    desk.project.close()
    with pytest.raises(ValueError, match="item 'a' has another responses than in"):
        desk.open([item("a", 4)])
    desk.open([item("a", priority=3.0), item("b")])
    assert desk.take("p1").item.id == "b"
    assert [event["item"]["id"] for event in desk.events if event["kind"] == "item"] == ["a", "b"]


def test_versions_of_guidelines_and_page_go_with_each_answer(tmp_path: Path):
    (tmp_path / "guide.txt").write_text("Be kind.", encoding="utf-8")
    desk = Desk(tmp_path, [item("a")], guidelines=tmp_path / "guide.txt")
    desk.rank("p1")
    (row,) = exported(desk.events, desk.config).comparisons
    assert (row.guidelines, row.page) == (version("Be kind."), "page-1")
    assert desk.project.guidelines == "Be kind."
    desk.project.close()
    (tmp_path / "guide.txt").unlink()
    with pytest.raises(ValueError, match=r"label\.guidelines names .*guide\.txt, which cannot be read"):
        desk.open()


def test_a_wait_for_the_quota_has_an_end(tmp_path: Path):
    desk = Desk(tmp_path, [item("a")])
    with pytest.raises(TimeoutError):
        asyncio.run(desk.project.wait_quota(0.05))
    desk.rank("p1")
    asyncio.run(desk.project.wait_quota(0.05))


def test_a_labeler_sees_how_much_is_left_for_the_labeler(tmp_path: Path):
    desk = Desk(tmp_path, [item("a"), item("b"), item("c"), item("t", 2, use="training", ranks=(0, 1))])
    assert (desk.project.own("p1").done, desk.project.own("p1").wanted) == (0, 4)
    desk.rank("p1")
    desk.clock.now += 1800
    desk.rank("p1")
    own = desk.project.own("p1")
    assert (own.done, own.wanted, own.per_hour) == (2, 4, 4.0)
    desk.take("p2")
    desk.rank("p2")
    desk.take("p2")
    assert desk.project.own("p1").wanted == 3, "one of the two is with p2"


def test_a_log_from_before_is_read_by_an_empty_project(tmp_path: Path):
    desk = Desk(tmp_path, [item("a")])
    desk.rank("p1", 2, 0, 1)
    desk.project.close()
    project = Project(tmp_path, desk.config, [], Clock())
    assert project.quota_reached
    project.close()
    assert [event["kind"] for event in read_events(tmp_path / FILE)] == ["item", "given", "submitted"]
