import math
from pathlib import Path
from typing import Any

import pytest

from actors.evaluation.multiple_choice import HellaSwag, TruthfulQA, credit
from actors.evaluation.task import Likelihood, Logprob
from reward_server.preferences.records import RecordError
from tests.actors.evaluation.verdicts import REAL, figures, file, likely, verdict


def test_a_shared_highest_score_is_split_evenly() -> None:
    assert [credit([1, 3, 2], right) for right in range(3)] == [0, 1, 0]
    assert [credit([3, 3, 2], right) for right in range(3)] == [0.5, 0.5, 0]
    assert credit([-4.0] * 4, 2) == 0.25


def swag(**other: Any) -> dict[str, Any]:
    row = {"activity_label": "Cooking", "ctx_a": "A man [step] cooks.", "ctx_b": "then he", "label": "1"}
    return {**row, "endings": ["sleeps.", "[substeps] eats.", "flies."], **other}


def test_hellaswag_asks_as_the_paper_does(tmp_path: Path) -> None:
    rows = [swag(ind=index) for index in range(3)]
    task = HellaSwag.load(file(tmp_path, *rows), None, shots=1)
    assert [one.id for one in task.examples + task.items] == ["0", "1", "2"]  # type: ignore[operator]
    asked = task.requests(task.items[0])
    paragraph = "Cooking: A man cooks. Then he"
    instruction = "Complete each independent paragraph using common-sense reasoning."
    assert asked[2] == Likelihood(context=f"{instruction}\n\n{paragraph} eats.\n\n{paragraph}", continuation=" flies.")


def test_hellaswag_compares_endings_per_token(tmp_path: Path) -> None:
    task = HellaSwag.load(file(tmp_path, swag()), None)
    short, right, long = Logprob(total=-3, tokens=1), Logprob(total=-4, tokens=2), Logprob(total=-9, tokens=3)
    assert verdict(task, short, right, long) == {"accuracy": (1.0, 1.0)}
    assert verdict(task, Logprob(total=-1, tokens=1), right, long) == {"accuracy": (0.0, 1.0)}
    assert verdict(task, *likely(-2, -2, -2)) == {"accuracy": (pytest.approx(1 / 3), 1.0)}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([swag(label="")], ":1: .*\"label\" must be 0 to 2, not ''; the test set has none"),
        ([swag(label=3)], '"label" must be 0 to 2, not 3'),
        ([swag(endings="a")], '"endings" must be a list of texts'),
        ([swag(endings=["a", " "])], "no blank one"),
        ([{"question": "q", "label": 0}], '"endings" is missing'),
        ([swag(ind=1), swag(ind=1)], ":2: id '1' was used in line 1"),
        ([], "the file is empty"),
    ],
)
def test_rows_of_hellaswag_that_cannot_be_used_are_told(tmp_path: Path, rows: list[Any], said: str) -> None:
    with pytest.raises(RecordError, match=said):
        HellaSwag.read(file(tmp_path, *rows))


GENERATION = {
    "question": "Why?",
    "best_answer": "Because.",
    "correct_answers": ["Because", "So it is."],
    "incorrect_answers": ["Magic.", "Never"],
}
CHOICES = {
    "question": "Why?",
    "mc1_targets": {"choices": ["Because.", "Magic.", "Never"], "labels": [1, 0, 0]},
    "mc2_targets": {"choices": ["Because", "So it is.", "Magic.", "Never"], "labels": [1, 1, 0, 0]},
}


def test_every_form_of_truthfulqa_reads_the_same(tmp_path: Path) -> None:
    sheet = tmp_path / "TruthfulQA.csv"
    sheet.write_text(
        "\ufeffQuestion,Best Answer,Correct Answers,Incorrect Answers\n"
        "Why?,Because.,Because; So it is.,Magic.; Never;\n"
    )
    forms = [TruthfulQA.read(path) for path in (file(tmp_path, GENERATION), sheet)]
    forms.append(TruthfulQA.read(file(tmp_path, CHOICES)))
    for (question,) in forms:
        assert question.true == ("Because.", "So it is.")
        assert question.false == ("Magic.", "Never.")


def test_truthfulqa_asks_with_each_of_the_prompts(tmp_path: Path) -> None:
    task = TruthfulQA.load(file(tmp_path, GENERATION), None)
    asked = [one for one in task.requests(task.items[0]) if isinstance(one, Likelihood)]
    assert [one.continuation for one in asked] == 3 * [" Because.", " So it is.", " Magic.", " Never."]
    qa, instruction, both = (asked[index].context for index in (0, 4, 8))
    assert qa.startswith("Q: What is human life expectancy")
    assert qa.count("\nA:") == 7
    assert instruction.startswith("Interpret each question literally")
    assert instruction.endswith(" certain of the answer.\n\nQ: Why?\nA:")
    assert both == instruction.removesuffix("Q: Why?\nA:") + qa


def test_mc1_and_mc2(tmp_path: Path) -> None:
    task = TruthfulQA.load(file(tmp_path, GENERATION), None)
    logs = [math.log(p) for p in (0.3, 0.2, 0.1, 0.4)]  # best, true, false, false
    equal, sure = [-800.0] * 4, [-1.0, -2000.0, -2000.0, -2000.0]  # no exp of them underflows to nothing over nothing
    found = figures(task, likely(*logs, *equal, *sure))
    assert found == {
        "mc1/qa": 0.0,
        "mc2/qa": pytest.approx(0.5),
        "mc1/instruction": pytest.approx(1 / 3),
        "mc2/instruction": 0.5,
        "mc1/qa_instruction": 1.0,
        "mc2/qa_instruction": 1.0,
    }
    # a true answer that is likelier than the best one does not stand in its way
    assert figures(task, likely(*3 * [-2, -1, -3, -3]))["mc1/qa"] == 1.0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**GENERATION, "incorrect_answers": []}, "one or more texts"),
        ({**GENERATION, "correct_answers": " ; "}, "holds no answer"),
        ({"question": "Why?"}, '"best_answer" is missing'),
        ({**CHOICES, "mc1_targets": None}, '"mc1_targets" must be'),
        ({**CHOICES, "mc2_targets": {"choices": ["a", "b"], "labels": [1, 1]}}, "some of both"),
    ],
)
def test_questions_that_cannot_be_used_are_told(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(RecordError, match=said):
        TruthfulQA.read(file(tmp_path, row))


@pytest.mark.skipif(not REAL.is_dir(), reason="needs samples of the public sets")
def test_the_published_files_are_read() -> None:
    assert len(HellaSwag.read(REAL / "hellaswag-200.jsonl")) == 200
    questions = TruthfulQA.read(REAL / "truthfulqa-100.csv")
    assert len(questions) == 100
    assert questions[1].true[0] == "The spiciest part of a chili pepper is the placenta."
