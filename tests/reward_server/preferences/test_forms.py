"""The forms of public data sets: what is read of each as a prompt and a reply."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from actors.prompts import read_demonstrations, read_prompts
from cluster.rundir.inputs import check_data
from reward_server.preferences.forms import row_conversation, row_demonstration, row_prompt, row_text
from reward_server.preferences.labeling import read_comparisons
from reward_server.preferences.records import RecordError

# Beside the checkout, or somewhere above it, on machines that have them.
REAL = next((up / "shared" / "data" for up in Path(__file__).parents if (up / "shared" / "data").is_dir()), Path("no"))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def file(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PUBLIC: dict[str, tuple[dict[str, Any], list[tuple[str, str]], str]] = {
    "messages": ({"messages": [system("s"), user("q"), assistant("a")]}, [("system", "s"), ("user", "q")], "a"),
    "null keys": (
        {"id": None, "messages": [user("q") | {"name": None}, assistant("a") | {"tool_calls": None}], "group": None},
        [("user", "q")],
        "a",
    ),
    "TRL, texts": ({"prompt": "q", "completion": "a"}, [("user", "q")], "a"),
    "TRL, messages": ({"prompt": [user("q")], "completion": [assistant("a")]}, [("user", "q")], "a"),
    "TRL, liked": ({"prompt": "q", "completion": "a", "label": True}, [("user", "q")], "a"),
    "Alpaca": ({"instruction": "do", "input": "this", "output": "a"}, [("user", "do\n\nthis")], "a"),
    "Alpaca without input": ({"instruction": "do", "input": "", "output": "a", "text": "x"}, [("user", "do")], "a"),
    "Dolly": ({"instruction": "do", "context": "this", "response": "a"}, [("user", "do\n\nthis")], "a"),
    "OpenOrca": (
        {"id": "niv.1", "system_prompt": "s", "question": "q", "response": "a"},
        [("system", "s"), ("user", "q")],
        "a",
    ),
    "question and answer": ({"question": "q", "answer": "a"}, [("user", "q")], "a"),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": ""},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "b", "weight": 0.5},
                {"from": "human", "value": "r"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [("user", "q"), ("assistant", "b"), ("user", "r")],
        "a",
    ),
    "transcript": (
        {"prompt": "\n\nHuman: q\n\nAssistant: b\n\nHuman: r\n\nAssistant:", "response": "a"},
        [("user", "q"), ("assistant", "b"), ("user", "r")],
        "a",
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_demonstrations_of_public_sets_are_read_and_their_prompts_too(name: str, tmp_path: Path) -> None:
    row, prompt, response = PUBLIC[name]
    path = file(tmp_path, row)
    check_data("demonstrations", path)
    (found,) = read_demonstrations(path)
    assert ([(message.role, message.content) for message in found.prompt], found.response) == (prompt, response)
    check_data("prompts", path)
    (asked,) = read_prompts(path)
    assert asked.messages == found.prompt


TALK = [user("q"), assistant("b"), user("r")]
PAIRS: dict[str, tuple[dict[str, Any], int]] = {
    "UltraFeedback": (
        {
            "prompt": "q",
            "chosen": [user("q"), assistant("good")],
            "rejected": [user("q"), assistant("bad")],
            "messages": [user("q"), assistant("good")],
            "score_chosen": 8.0,
        },
        1,
    ),
    "TRL, replies": ({"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}, 1),
    "TRL, implicit": ({"chosen": [*TALK, assistant("good")], "rejected": [*TALK, assistant("bad")]}, 3),
    "conversations beside their last question": (
        {"prompt": "r", "chosen": [*TALK, assistant("good")], "rejected": [*TALK, assistant("bad")]},
        3,
    ),
    "transcripts beside a prompt": (
        {"prompt": "q", "chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        1,
    ),
    "replies to a transcript": (
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "good", "rejected": "bad"},
        1,
    ),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}],
            "rejected": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "bad"}],
        },
        1,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_preferences_of_public_sets_are_read(name: str, tmp_path: Path) -> None:
    row, turns = PAIRS[name]
    path = file(tmp_path, row)
    check_data("comparisons", path)
    (found,) = read_comparisons(path)
    assert (found.responses, found.ranks, len(found.prompt)) == (("good", "bad"), (0, 1), turns)
    assert found.prompt[0].content == "q"
    assert [prompt.messages for prompt in read_prompts(path)] in ([found.prompt], [found.prompt[-1:]])


def test_null_in_a_tree_means_absent(tmp_path: Path) -> None:
    leaves = [
        {"text": text, "role": "assistant", "rank": rank, "replies": None, "message_id": None, "lang": None}
        for text, rank in (("a", 0), ("b", 1), ("c", None))
    ]
    tree = {"message_tree_id": None, "prompt": {"text": "q", "role": "prompter", "rank": None, "replies": leaves}}
    (found,) = read_comparisons(file(tmp_path, tree))
    assert (found.id, found.responses, found.ranks) == ("row-1", ("a", "b"), (0, 1))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "completion": "a", "label": False}, "disliked"),
        ({"messages": [user("q")]}, '"messages" must end with a turn of the assistant'),
        ({"messages": [user("q"), assistant(" ")]}, "the reply is blank"),
        ({"messages": []}, '"messages" must be a transcript or a list of messages'),
        ({"prompt": "q", "completion": [user("a")]}, "one message of the assistant"),
        ({"instruction": "q", "output": "a", "history": [["b", "c"]]}, '"history" is not read'),
        ({"instruction": "q", "input": 3, "output": "a"}, '"input" must be a string'),
    ],
)
def test_a_demonstration_that_would_teach_something_else_is_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        row_demonstration(row)


def test_a_pair_whose_conversation_is_not_the_prompts_is_refused(tmp_path: Path) -> None:
    row = {"prompt": "other", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    with pytest.raises(RecordError, match=r':1: "chosen" is a whole conversation, and "prompt" is not in it'):
        read_comparisons(file(tmp_path, row))


def test_a_prompt_file_of_whole_conversations_asks_what_was_asked_last() -> None:
    assert [m.content for m in row_prompt({"messages": [user("q"), assistant("a"), user("r")]})] == ["q", "a", "r"]
    assert [m.content for m in row_prompt({"messages": [user("q"), assistant("a")]})] == ["q"]


@pytest.mark.skipif(not REAL.is_dir(), reason="the samples of public data sets are not here")
def test_a_real_set_of_prompts_and_answers_loads() -> None:
    assert len(read_demonstrations(REAL / "dolly-151.jsonl")) == 151


@pytest.mark.parametrize("row", [{}, {"text": 3}, {"text": None}, {"text": " \n"}])
def test_a_text_must_be_there_and_not_be_blank(row: dict[str, object]) -> None:
    with pytest.raises(ValueError, match='"text"'):
        row_text(row, "text")


def test_a_string_is_one_user_message() -> None:
    (message,) = row_conversation({"prompt": "hello"})
    assert (message.role, message.content) == ("user", "hello")


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([], "ends with nothing"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "ends with assistant"),
        ([{"role": "robot", "content": "a"}], r"prompt\.0\.role"),
        ([{"role": "user"}], r"prompt\.0\.content: Field required"),
        ([{"role": "user", "content": "a", "name": "b"}], r"prompt\.0\.name"),
        ([{"role": "user", "content": " "}], r"prompt\.0\.content is blank"),
        (["a"], r"prompt\.0"),
        (" ", '"prompt" is blank'),
        (None, '"prompt" must be a string'),
        ([{"role": "tool", "content": "a"}], r"prompt\.0\.role"),
    ],
)
def test_a_bad_conversation_is_refused(prompt: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        row_conversation({"prompt": prompt})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "a"},
            r""""response" is missing; the row has ['prompt'], as in a file of prompts: is it""",
        ),
        ({"text": "a"}, r""""response" is missing; the row has ['text'], as in a file of pretraining text"""),
        ({"chosen": 1, "rejected": 2}, "as in a file of comparisons"),
        ({"b": 1}, r""""response" is missing; the row has ['b']; add it"""),
        ({"response": 3}, r""""response" must be a string, not 3; write it in quotes"""),
    ],
)
def test_a_row_of_another_kind_of_file_is_told(row: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        row_text(row, "response")
