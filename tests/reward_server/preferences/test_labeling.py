import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings

from reward_server.config import LabelerConfig
from reward_server.functions import UserFunctionError
from reward_server.preferences.labeling import (
    Comparison,
    label,
    load_labeler,
    rank_verdicts,
    read_comparisons,
    write_comparisons,
)
from reward_server.preferences.records import RecordError
from reward_server.schema import Message
from tests.comparisons import ranked_comparisons

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


@settings(deadline=None)
@given(ranked_comparisons())
def test_what_labelers_told_is_read_back(before: list[Comparison]) -> None:
    with TemporaryDirectory() as folder:
        write_comparisons(Path(folder) / "c.jsonl", before)
        assert read_comparisons(Path(folder) / "c.jsonl") == before


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


def said(text, role="prompter", rank=None, replies=()):
    """A message of a tree."""
    return {"text": text, "role": role, "rank": rank, "replies": list(replies)}


def test_ranked_siblings_of_a_tree_at_any_depth_are_comparisons(tmp_path: Path, caplog) -> None:
    deeper = [said("a1 is good", "assistant", 1), said("a1 is bad", "assistant", 0), said("late", "assistant")]
    tree = said(
        "q",
        replies=[
            said(
                "a0", "assistant", 1, [said("and?", replies=deeper), said("so?", replies=[said("x", "assistant", 0)])]
            ),
            said("a1", "assistant", 0, [said("thanks", rank=0), said("no thanks", rank=1)]),
            said("a2", "assistant", 2),
            said("gone", "assistant", 3) | {"deleted": True},
        ],
    )
    path = lines(tmp_path / "trees.jsonl", {"message_tree_id": "t", "prompt": tree}, GOOD | {"id": "plain"})
    first, second, plain = read_comparisons(path)
    assert (first.id, first.responses, first.ranks, first.group) == ("t", ("a0", "a1", "a2"), (1, 0, 2), "t")
    assert [(m.role, m.content) for m in first.prompt] == [("user", "q")]
    assert (second.responses, second.ranks, second.group) == (("a1 is good", "a1 is bad"), (1, 0), "t")
    assert [(m.role, m.content) for m in second.prompt] == [("user", "q"), ("assistant", "a0"), ("user", "and?")]
    assert len({first.id, second.id, plain.id}) == 3
    # "gone" is deleted, "late" has no rank, and "x" has no sibling; what people asked next is no completion
    assert "3 comparisons; left out 3 replies without a rank" in caplog.text


def test_what_the_assistant_adds_to_its_own_reply_is_no_comparison(tmp_path: Path) -> None:
    """Its prompt would end with the assistant."""
    more = [said("b", "assistant", 0), said("c", "assistant", 1)]
    tree = said("q", replies=[said("a", "assistant", 0, more), said("d", "assistant", 1)])
    (one,) = read_comparisons(lines(tmp_path / "trees.jsonl", {"prompt": tree}))
    assert one.responses == ("a", "d")


def test_trees_without_ranked_siblings_are_no_comparisons(tmp_path: Path) -> None:
    path = lines(tmp_path / "trees.jsonl", {"prompt": said("q", replies=[said("a", "assistant", 0)])})
    with pytest.raises(RecordError, match="no message in it has two ranked replies"):
        read_comparisons(path)


def test_a_tree_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    tree = {"message_tree_id": "t", "prompt": said("q", replies=[said(x, "assistant", 0) for x in "ab"])}
    with pytest.raises(RecordError, match=r":2: id 't' was used in line 1"):
        read_comparisons(lines(tmp_path / "trees.jsonl", tree, tree))


def test_a_lone_completion_and_a_group_are_read(tmp_path: Path) -> None:
    (one,) = read_comparisons(lines(tmp_path / "c.jsonl", GOOD | {"completions": [{"text": "a"}], "group": "g"}))
    assert (one.responses, one.group) == (("a",), "g")
    write_comparisons(tmp_path / "again.jsonl", [one])
    assert read_comparisons(tmp_path / "again.jsonl") == [one]


# Beside the checkout, or somewhere above it, on machines that have them.
REAL = next((up / "shared" / "data" for up in Path(__file__).parents if (up / "shared" / "data").is_dir()), Path("no"))


@pytest.mark.skipif(not REAL.is_dir(), reason="the samples of public data sets are not here")
@pytest.mark.parametrize(("name", "count"), [("helpful", 1185), ("harmless", 1154)])
def test_real_pairs_load(name: str, count: int) -> None:
    pairs = read_comparisons(REAL / f"hh-{name}-base.jsonl.gz", max_bad_rows=20)
    assert len(pairs) > count - 20
    assert {len(pair.responses) for pair in pairs} == {2}
    assert all(pair.prompt[-1].role == "user" for pair in pairs)
    assert any(len(pair.prompt) > 1 for pair in pairs)


@pytest.mark.skipif(not REAL.is_dir(), reason="the samples of public data sets are not here")
def test_real_trees_load(caplog) -> None:
    found = read_comparisons(REAL / "oasst-trees.jsonl")
    assert len({comparison.group for comparison in found}) == 60
    assert {len(comparison.responses) for comparison in found} > {2, 3, 4}
    assert {len(comparison.prompt) for comparison in found} >= {1, 3}
    for comparison in found:
        assert comparison.ranks is not None
        assert sorted(comparison.ranks) == list(range(len(comparison.ranks)))  # people gave no ties here
        assert [message.role for message in comparison.prompt] == ["user", "assistant"] * (
            len(comparison.prompt) // 2
        ) + ["user"]
    assert "replies without a rank" in caplog.text


GOOD = {"prompt": "p", "completions": [{"text": "a"}, {"text": "b"}]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p"}, 'this one has ["prompt"]'.replace('"prompt"]', "'prompt']")),
        (GOOD | {"completions": []}, "a comparison needs completions, this one has none"),
        (GOOD | {"completions": [{"text": "a"}, {"text": 3}]}, "completions.1 must be"),
        (GOOD | {"completions": [{"text": "a"}, {"text": "b", "ended": "no"}]}, "completions.1 must be"),
        (GOOD | {"completions": ["a", "b"]}, "completions.0 must be"),
        (GOOD | {"ranks": [0]}, '"ranks" has 1 entries for 2 completions'),
        (GOOD | {"ranks": [0, 1.5]}, '"ranks" must be a list of integers'),
        (GOOD | {"ranks": [True, False]}, '"ranks" must be a list of integers'),
        (GOOD | {"ranks": [-1, 0]}, '"ranks" must be 0 (best) or more'),
        (GOOD | {"labeler": 3}, '"labeler" must be a string'),
        (GOOD | {"group": 3}, '"group" must be a string'),
        (GOOD | {"seconds": -1}, '"seconds" must be a number of seconds, 0 or more, not -1'),
        (GOOD | {"seconds": True}, '"seconds" must be a number of seconds'),
        (GOOD | {"control": "yes"}, '"control" must be true or false'),
        (GOOD | {"qualities": [8, 1]}, '"qualities" must be a list of integers from 1 to 7, or null'),
        (GOOD | {"qualities": [7]}, '"qualities" has 1 entries for 2 completions'),
        (GOOD | {"flags": [["violent"], "sexual"]}, '"flags" must be a list of lists of names'),
        (GOOD | {"flags": [["violent"]]}, '"flags" has 1 entries for 2 completions'),
        (GOOD | {"page": " "}, '"page" must be a text that is not blank'),
        (GOOD | {"guidelines": 3}, '"guidelines" must be a text'),
        ({"prompt": {"text": "q", "role": "user"}}, 'prompt must be {"text": str, "role": "prompter" or'),
        ({"prompt": said("q", replies=[said("a", "assistant", 0), {"text": "b"}])}, "prompt.replies.1 must be"),
        ({"prompt": said("q", replies=[said("a", "assistant", -1)])}, "prompt.replies.0.rank must be an integer"),
        ({"prompt": said("q"), "message_tree_id": ""}, '"id" must have 1 to 100 characters'),
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


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise RuntimeError('no key')", "failed on 1 responses: RuntimeError: no key"),
        ("return [1.0] * 2", "returned 2 numbers for 1 responses"),
        ("return [float('inf')]", "returned inf for response 0, not a finite number"),
        ("return 'good'", "returned 4 numbers for 1 responses"),
    ],
)
def test_a_bad_labeler_is_told_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    name = f"bad_labeler_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"def verdicts(responses):\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserFunctionError, match=f"^{name}:verdicts {said}"):
        load_labeler(LabelerConfig(name=f"{name}:verdicts"))
