import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward_server.config import LabelerConfig
from reward_server.labeling import Comparison, label, load_labeler, rank_verdicts, read_comparisons, write_comparisons
from reward_server.records import RecordError
from reward_server.schema import Message

USER = Message(role="user", content="hi")


def comparison(responses: tuple[str, ...], ranks: tuple[int, ...] | None = None, name: str = "a") -> Comparison:
    return Comparison(
        id=name,
        prompt=(USER,),
        responses=responses,
        ended=(True,) * len(responses),
        ranks=ranks,
        labeler=None,
    )


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_ranks_start_at_the_best_and_have_no_gaps() -> None:
    assert rank_verdicts([0.1, 0.9, -0.5], 0.0) == (1, 0, 2)
    assert rank_verdicts([0.5, 0.5, 0.9, 0.1], 0.0) == (1, 1, 0, 2)


def test_a_tie_reaches_the_margin_from_its_best_and_does_not_chain() -> None:
    # 1.0 and 0.75 are within 0.25; 0.5 is within 0.25 of 0.75 but not of 1.0, and opens the next tie
    assert rank_verdicts([1.0, 0.75, 0.5, 0.25, 0.0], 0.25) == (0, 0, 1, 1, 2)
    assert rank_verdicts([0.25, 0.5, 0.0], 10.0) == (0, 0, 0)


def test_the_vader_labeler_prefers_the_happy_one_and_says_that_it_is_simulated() -> None:
    labeler = load_labeler(LabelerConfig())
    assert labeler.name == "simulated:vader"
    assert "simulated labeler (VADER)" in labeler.caption
    happy, sad, blank = labeler.verdicts(["I love this, it is wonderful!", "This is horrible and sad.", ""])
    assert -1 <= sad < -0.5 < blank == 0.0 < 0.5 < happy <= 1
    assert labeler.rank(["the table", "I love it", "the chair", "I hate it"]) == (1, 0, 1, 2)


def test_labelled_comparisons_are_signed() -> None:
    (ranked,) = label([comparison(("I hate it", "I love it"))], load_labeler(LabelerConfig()))
    assert ranked.ranks == (1, 0)
    assert ranked.labeler == "simulated:vader"


def test_a_function_can_be_the_labeler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judges.py").write_text("def long(responses):\n    return [len(r) for r in responses]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    labeler = load_labeler(LabelerConfig(name="judges:long", tie_margin=1))
    assert labeler.rank(["aaa", "aa", "a"]) == (0, 0, 1)
    assert labeler.caption == "simulated labeler (judges:long)"
    with pytest.raises(ValueError, match="has no function 'short'"):
        load_labeler(LabelerConfig(name="judges:short"))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    before = [
        Comparison(
            id="x",
            prompt=(Message(role="system", content="s"), USER),
            responses=("a\n\u2028", "", "ü"),
            ended=(True, False, True),
            ranks=(0, 2, 0),
            labeler="ann",
        ),
        comparison(("a", "b"), name="y"),
    ]
    write_comparisons(tmp_path / "c.jsonl", before)
    assert read_comparisons(tmp_path / "c.jsonl") == before
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_comparisons(tmp_path / "c.jsonl", [comparison(("a", "b"))])

    def breaking() -> Iterator[Comparison]:
        yield comparison(("c", "d"), name="b")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_comparisons(tmp_path / "c.jsonl", breaking())
    assert [row.id for row in read_comparisons(tmp_path / "c.jsonl")] == ["a"]


def test_pairs_load_as_comparisons_of_two(tmp_path: Path) -> None:
    start = "\n\nHuman: hello\n\nAssistant: hi there\n\nHuman: a joke?\n\nAssistant:"
    path = lines(
        tmp_path / "pairs.jsonl",
        {"chosen": f"{start} Knock knock.", "rejected": f"{start} No.\n\nNever."},
        {"prompt": "p", "chosen": "good", "rejected": "bad", "id": "second"},
        {
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "1"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "2"}],
        },
    )
    first, second, third = read_comparisons(path)
    assert [(m.role, m.content) for m in first.prompt] == [
        ("user", "hello"),
        ("assistant", "hi there"),
        ("user", "a joke?"),
    ]
    assert first.responses == ("Knock knock.", "No.\n\nNever.")
    assert (first.ranks, first.ended, first.labeler) == ((0, 1), (True, True), None)
    assert (second.id, second.prompt, second.responses) == (
        "second",
        (Message(role="user", content="p"),),
        ("good", "bad"),
    )
    assert third.responses == ("1", "2")


GOOD = {"prompt": "p", "completions": [{"text": "a"}, {"text": "b"}]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p"}, 'this one has ["prompt"]'.replace('"prompt"]', "'prompt']")),
        (GOOD | {"completions": []}, "at least 2 completions, this one has 0"),
        (GOOD | {"completions": [{"text": "a"}]}, "at least 2 completions, this one has 1"),
        (GOOD | {"completions": [{"text": "a"}, {"text": 3}]}, "completions.1 must be"),
        (GOOD | {"completions": [{"text": "a"}, {"text": "b", "ended": "no"}]}, "completions.1 must be"),
        (GOOD | {"completions": ["a", "b"]}, "completions.0 must be"),
        (GOOD | {"ranks": [0]}, '"ranks" has 1 entries for 2 completions'),
        (GOOD | {"ranks": [0, 1.5]}, '"ranks" must be a list of integers'),
        (GOOD | {"ranks": [True, False]}, '"ranks" must be a list of integers'),
        (GOOD | {"ranks": [-1, 0]}, '"ranks" must be 0 (best) or more'),
        (GOOD | {"labeler": 3}, '"labeler" must be a string'),
        (GOOD | {"prompt": []}, '"prompt" must end with a user message'),
        ({"chosen": "hello", "rejected": "bye"}, 'must start with "\\n\\nHuman:"'),
        (
            {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"},
            '"chosen" must end with a turn of the assistant',
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"},
            '"chosen" and "rejected" differ before their last turn',
        ),
        ({"chosen": "\n\nHuman: a\n\nAssistant: x"}, '"rejected" must be a transcript'),
    ],
)
def test_a_bad_row_is_reported_with_file_line_and_reason(tmp_path: Path, row: object, reason: str) -> None:
    path = lines(tmp_path / "c.jsonl", GOOD, row)
    with pytest.raises(RecordError) as caught:
        read_comparisons(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)
    assert len(read_comparisons(path, max_bad_rows=1)) == 1


def test_an_id_used_twice_names_the_first_line(tmp_path: Path) -> None:
    path = lines(tmp_path / "c.jsonl", GOOD | {"id": "x"}, GOOD | {"id": "x"})
    with pytest.raises(RecordError, match=r":2: id 'x' was used in line 1"):
        read_comparisons(path)
