"""What a log is as data: each ranking at its own completions, and whatever is not used with its reason."""

from pathlib import Path

import pytest

from actors.prompts import read_demonstrations
from reward_server.labeling.export import NotUsed, exported
from reward_server.labeling.items import Answer
from reward_server.preferences.labeling import read_comparisons, write_comparisons
from reward_server.preferences.records import json_lines, write_whole
from tests.labeling import TEXTS, Desk, item, ranked, rated


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.fsync", lambda file: None)


def test_ranks_ratings_and_flags_are_at_the_completions_that_they_were_given_to(tmp_path: Path):
    names = ("violent", "harm", "opinion", "advice")
    items = [item(f"i{n}", 4, control=n == 0, use_case="chat") for n in range(6)]
    desk = Desk(tmp_path, items, flags=names, quality=True)
    orders = set()
    for _ in range(6):
        one = desk.take("p1")
        orders.add(one.order)
        # What a person sees: the texts. Ranks go by the text, wherever it stands.
        place = {text: n for n, text in enumerate(TEXTS[:4])}
        assert ranked(one, (2, 0, 2, 1)).ranks == tuple((3, 1, 3, 2)[place[text]] for text in one.responses)
        desk.submit(one, rated(one, (2, 0, 2, 1), (1, 7, 2, 5), names), seconds=12.5)
    assert len(orders) > 1
    rows = exported(desk.events, desk.config).comparisons
    assert [row.id for row in rows] == [f"i{n}:p1" for n in range(6)]
    for row in rows:
        assert row.responses == TEXTS[:4]
        assert (row.ranks, row.qualities) == ((2, 0, 2, 1), (1, 7, 2, 5))
        assert row.flags == tuple((name,) for name in names)
        assert (row.labeler, row.seconds, row.control, row.use_case) == ("p1", 12.5, row.id == "i0:p1", "chat")
        assert row.group is None
    write_comparisons(tmp_path / "rows.jsonl", rows)
    assert tuple(read_comparisons(tmp_path / "rows.jsonl")) == rows


def test_ranks_with_gaps_become_dense(tmp_path: Path):
    desk = Desk(tmp_path, [item("a", 4)])
    desk.rank("p1", 8, 3, 3, 0)
    assert exported(desk.events, desk.config).comparisons[0].ranks == (2, 1, 1, 0)


def test_training_gold_and_repeats_are_no_data(tmp_path: Path):
    measures = [item("g", 2, use="gold", ranks=(0, 1)), item("t", 2, use="training", ranks=(0, 1))]
    desk = Desk(tmp_path, [*measures, *(item(f"i{n}") for n in range(40))], gold_share=0.3, repeat_share=0.3)
    uses = set[str]()
    while (one := desk.next("p1")) is not None:
        uses.add(one.use)
        desk.submit(one, ranked(one, tuple(range(len(one.order)))))
    assert uses == {"training", "gold", "repeat", "work"}
    names = [row.id for row in exported(desk.events, desk.config).comparisons]
    assert sorted(names) == sorted(f"i{n}:p1" for n in range(40))


def test_who_and_what_is_left_out_is_told_with_the_reason(tmp_path: Path):
    desk = Desk(tmp_path, [item("a")], overlap=4, words_per_minute=60, leave_out=())
    given = {labeler: desk.take(labeler) for labeler in ("p1", "p2", "p3", "p4")}
    desk.clock.now += 60
    for labeler, seconds in (("p1", 30), ("p2", 2), ("p3", 30)):
        desk.submit(given[labeler], ranked(given[labeler], (0, 1, 2)), seconds)
    desk.submit(given["p4"], Answer(cannot="all the same"), 1)
    desk.leave_out("p3", "was asleep")
    found = exported(desk.events, desk.config)
    assert [row.id for row in found.comparisons] == ["a:p1"]
    assert found.left_out == (
        NotUsed(assignment=given["p2"].id, item="a", labeler="p2", reason="too fast: 2 s for 5 words"),
        NotUsed(assignment=given["p3"].id, item="a", labeler="p3", reason="labeler left out: was asleep"),
    )
    assert found.unranked == (NotUsed(assignment=given["p4"].id, item="a", labeler="p4", reason="all the same"),)
    out = desk.config.model_copy(update={"leave_out": ("p1",)})
    assert exported(desk.events, out).left_out[0].reason == "labeler left out: by label.leave_out"
    slow = desk.config.model_copy(update={"words_per_minute": 0})
    assert [row.id for row in exported(desk.events, slow).comparisons] == ["a:p1", "a:p2"]


def test_an_adjudication_is_data_and_marked(tmp_path: Path):
    desk = Desk(tmp_path, [item("a", group="talk")], overlap=2)
    desk.rank("p1", 0, 1, 2)
    desk.rank("p2", 2, 1, 0)
    desk.rank("p3", 0, 1, 2)
    found = exported(desk.events, desk.config)
    assert [(row.id, row.group) for row in found.comparisons] == [(f"a:p{n}", "talk") for n in (1, 2, 3)]
    assert found.adjudications == ("a:p3",)


def test_demonstrations_are_rows_of_their_own(tmp_path: Path):
    desk = Desk(
        tmp_path,
        [item("d", 0, task="demonstration"), item("e", 0, task="demonstration")],
        tasks=("demonstration",),
        demonstrations=tmp_path / "prompts.jsonl",
    )
    texts = {}
    for text in ("Dear all,\n", None):
        one = desk.take("p1")
        texts[one.item.id] = text
        desk.submit(one, Answer(text=text) if text else Answer(cannot="unclear"), seconds=40)
    found = exported(desk.events, desk.config)
    ((name, text),) = [(name, text) for name, text in texts.items() if text]
    assert found.demonstrations == (
        {
            "id": f"{name}:p1",
            "prompt": [{"role": "user", "content": f"prompt {name}"}],
            "response": text,
            "labeler": "p1",
            "seconds": 40,
            "page": "page-1",
        },
    )
    assert [one.reason for one in found.unranked] == ["unclear"]
    write_whole(tmp_path / "rows.jsonl", json_lines(found.demonstrations))
    assert [row.response for row in read_demonstrations(tmp_path / "rows.jsonl")] == [text]


def test_drafts_and_what_was_taken_back_are_no_data(tmp_path: Path):
    desk = Desk(tmp_path, [item("a"), item("b")])
    desk.rank("p1")
    desk.undo("p1")
    other = desk.take("p2")
    desk.draft(other, ranked(other, (0, 1, 2)))
    assert exported(desk.events, desk.config).comparisons == ()
