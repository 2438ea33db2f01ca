import json
from pathlib import Path
from typing import Any

import pytest

from actors.evaluation.reading import Drop, Squad, drop_scores, squad_f1
from actors.evaluation.task import Generation
from reward_server.preferences.records import RecordError
from tests.actors.evaluation.verdicts import REAL, figures, file, verdict

HUB = {"id": "a", "title": "New_York", "context": "It is big.", "question": "How big?", "answers": {"text": ["big"]}}


def nested(*questions: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": "v2.0",
        "data": [{"title": "New_York", "paragraphs": [{"context": "It is big.", "qas": questions}]}],
    }


ASKED = [
    {"id": "a", "question": "How big?", "answers": [{"text": "the big", "answer_start": 6}, {"text": "very big city"}]},
    {"id": "b", "question": "Why?", "answers": [], "is_impossible": True, "plausible_answers": [{"text": "It"}]},
]


def squad(folder: Path, shots: int = 0) -> Squad:
    return Squad.load(file(folder, nested(*ASKED)), None, shots)


def test_squad_is_read_from_its_own_file_and_from_rows(tmp_path: Path) -> None:
    indented = tmp_path / "dev.json"
    indented.write_text(json.dumps(nested(*ASKED), indent=1))
    first, second = Squad.read(indented)
    assert (first.title, first.golds, second.golds) == ("New York", (("the big",), ("very big city",)), ())
    assert Squad.read(file(tmp_path, nested(*ASKED))) == [first, second]
    (row,) = Squad.read(file(tmp_path, HUB))
    assert (row.passage, row.golds) == ("It is big.", (("big",),))


def test_squad_asks_as_the_paper_does(tmp_path: Path) -> None:
    task = squad(tmp_path, shots=1)
    (asked,) = task.requests(task.items[0])
    assert isinstance(asked, Generation)
    assert asked.stop == "\n"
    assert asked.prompt == (
        "Answer each question using information in the preceding background paragraph. If there is not enough "
        'information provided, answer with "Not in background."\n\n'
        "Title: New York\n\nBackground: It is big.\n\nQ: How big?\n\nA: the big\n\n"
        "Title: New York\n\nBackground: It is big.\n\nQ: Why?\n\nA:"
    )


@pytest.mark.parametrize(
    ("said", "gold", "f1"),
    [
        ("The Big, Apple!", "big apple", 1),
        ("a big red apple", "the apple", 0.5),  # 1 of 3 said, 1 of 1 meant: 2 * 1 / (3 + 1)
        ("big big", "big", 2 / 3),
        ("small", "big", 0),
        ("", "big", 0),
        ("the", "", 1),
    ],
)
def test_squad_f1_by_hand(said: str, gold: str, f1: float) -> None:
    assert squad_f1(said, gold) == pytest.approx(f1)


def test_squad_takes_the_best_of_the_golds_and_tells_the_unanswerable_apart(tmp_path: Path) -> None:
    found = figures(squad(tmp_path), ["very big"], ["Not in background. It does not say."])
    assert found == {  # "very big" against "very big city": 2 * 2 / (2 + 3)
        "f1": pytest.approx(90),
        "exact_match": 50,
        "f1/answerable": pytest.approx(80),
        "exact_match/answerable": 0,
        "f1/unanswerable": 100,
        "exact_match/unanswerable": 100,
    }
    assert figures(squad(tmp_path), [""], ["It"])["f1"] == 0
    assert figures(squad(tmp_path), [" Big. "], [""])["exact_match"] == 100
    assert list(Squad.load(file(tmp_path, HUB), None).metrics)[2:] == ["f1/answerable", "exact_match/answerable"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**HUB, "answers": None}, '"answers" must be a list'),
        ({**HUB, "answers": [{"no": "text"}]}, "one or more texts"),
        ({key: value for key, value in HUB.items() if key != "context"}, '"context" is missing'),
        ({"data": [{"title": "t"}]}, "not nested as in the published file"),
        (nested(ASKED[0], ASKED[0]), ":2: id 'a' was used in line 1"),
    ],
)
def test_questions_of_squad_that_cannot_be_used_are_told(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(RecordError, match=said):
        Squad.read(file(tmp_path, row))


def number(value: str) -> dict[str, Any]:
    return {"number": value, "date": {"day": "", "month": "", "year": ""}, "spans": []}


DATE = {"number": "", "date": {"day": "4", "month": "July", "year": "1776"}, "spans": []}
SPANS = {"number": "", "date": {}, "spans": ["Ann", "Bob Lee"]}


def drop_question(**other: Any) -> dict[str, Any]:
    return {"query_id": "q", "question": "Who?", "answer": SPANS, "validated_answers": [number("2"), DATE], **other}


def test_drop_is_read_from_its_own_file_and_from_the_hubs_forms(tmp_path: Path) -> None:
    own = tmp_path / "drop.json"
    own.write_text(json.dumps({"nfl_1": {"passage": "They ran.", "qa_pairs": [drop_question()]}}, indent=1))
    (item,) = Drop.read(own)
    assert item.golds == (("Ann", "Bob Lee"), ("2",), ("4 July 1776",))
    columns = {"number": ["2", ""], "date": [{}, DATE["date"]], "spans": [[], []], "worker_id": ["", ""]}
    assert Drop.read(file(tmp_path, drop_question(passage="They ran.", validated_answers=columns))) == [item]
    flat = {"passage": "They ran.", "question": "Who?", "query_id": "q", "answers_spans": {"spans": ["2", "Ann"]}}
    assert Drop.read(file(tmp_path, flat))[0].golds == (("2",), ("Ann",))
    (asked,) = Drop([item], [item]).requests(item)
    assert isinstance(asked, Generation)
    assert asked.prompt == (
        "Answer each question using information in the preceding passage\n\n"
        "Passage: They ran.\nQuestion: Who?\nAnswer: Ann, Bob Lee\n\nPassage: They ran.\nQuestion: Who?\nAnswer:"
    )


@pytest.mark.parametrize(
    ("said", "gold", "f1", "exact"),
    [
        (["the 1,000"], ["1000.0"], 1, 1),  # "1,000" without its comma is the number that "1000.0" is
        (["3.5"], ["35"], 0, 0),  # the point of a number stays
        (["25 to 44"], ["25-44"], 0.8, 0),  # a hyphen separates: 2 words of 3 and 2
        (["4 July"], ["5 July"], 0, 0),  # no number of the gold
        (["5 August"], ["5 July"], 0.5, 0),
        (["red red house"], ["red house"], 1, 0),  # sets of words
        (["Bob Lee", "Ann"], ["Ann", "Bob Lee"], 1, 1),
        (["Ann"], ["Ann", "Bob Lee"], 0.5, 0),
        (["Ann", "Ann Lee"], ["Ann Lee"], 0.5, 0),
        (["a b", "b"], ["b", "b c"], 0.83, 0),  # ("a b": "b c") and ("b": "b"), "a" being an article: (2/3 + 1) / 2
        ([""], ["Ann"], 0, 0),
    ],
)
def test_drop_by_hand(said: list[str], gold: list[str], f1: float, exact: float) -> None:
    assert drop_scores(said, gold) == (f1, exact)


def test_drop_matches_texts_as_well_as_they_can_be() -> None:
    # the pair that is best by itself ("x y z" and "x y z w", 6/7) would leave 0 for the other
    assert drop_scores(["x y z", "z w"], ["x y z w", "x y"]) == (round((4 / 5 + 2 / 3) / 2, 2), 0.0)


def test_drop_takes_the_best_of_the_golds_and_reads_commas_where_there_are_several(tmp_path: Path) -> None:
    task = Drop.load(file(tmp_path, drop_question(passage="They ran.")), None)
    assert verdict(task, " Bob Lee, Ann ") == {"f1": (100.0, 1.0), "exact_match": (100.0, 1.0)}
    assert figures(task, ["July 4, 1776"]) == {"f1": 100, "exact_match": 0}
    assert figures(task, ["2"]) == {"f1": 100, "exact_match": 100}
    assert figures(task, [""]) == {"f1": 0, "exact_match": 0}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (drop_question(passage="p", answer=number(""), validated_answers=[]), "holds a number, a date or a text"),
        (drop_question(), '"passage" is missing'),
        ({"nfl": {"qa_pairs": [drop_question()]}}, "not nested as in the published file"),
    ],
)
def test_questions_of_drop_that_cannot_be_used_are_told(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(RecordError, match=said):
        Drop.read(file(tmp_path, row))


@pytest.mark.skipif(not REAL.is_dir(), reason="needs samples of the public sets")
def test_xquad_is_read() -> None:
    task = Squad.load(REAL / "xquad-en-part.json", None)
    assert len(task.items) > 200
    assert verdict(task, task.items[0].golds[0][0])["f1"] == (100.0, 1.0)
