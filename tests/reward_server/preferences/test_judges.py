"""A chat model as a judge, whatever it answers or does not; and people's verdicts in a file."""

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reward_server import client as client_module
from reward_server.preferences.judges import ChatJudge, JudgeUnavailable, Opinion, Vote, read_votes, verdict
from reward_server.preferences.records import RecordError
from reward_server.schema import Message
from tests.chat_server import Answer, ChatServer, serving

PROMPT = (Message(role="system", content="Be brief."), Message(role="user", content="Name a {river}."))
SECRET = "a-secret-of-the-judge"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without the patience of a run, and no token."""
    monkeypatch.setattr(client_module, "_FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(client_module, "_MAX_DELAY_S", 0.05)
    monkeypatch.delenv("RAYWARD_JUDGE_TOKEN", raising=False)


def use(server: ChatServer, work: Callable[[ChatJudge], Any], retry_s: float = 10.0) -> Any:
    async def run() -> Any:
        judge = ChatJudge(f"{server.url}#judge/model", retry_s)
        try:
            return await work(judge)
        finally:
            await judge.close()

    return asyncio.run(run())


def opinion(answer: Answer) -> Opinion:
    with serving(lambda question: answer) as server:
        return use(server, lambda judge: judge.compare(PROMPT, "The Rhine.", "Water."))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[A]]", "first"),
        ("Reply B is wrong, so my verdict is [[A]].", "first"),
        (" B.\n", "second"),
        ("Reply B", "second"),
        ("C", "tie"),
        ("[[C]]", "tie"),
        ("<think>At first [[A]], but no.</think>\n\n[[B]]", "second"),
        ("[[A]] or [[B]]", None),
        ("A and B are both fine", None),
        ("I'm sorry, I can't compare these.", None),
        ("[[D]]", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_or_there_is_none(text: str, said: str | None) -> None:
    assert verdict(text) == said


def test_a_chat_model_is_given_the_conversation_and_both_replies_in_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAYWARD_JUDGE_TOKEN", SECRET)
    with serving(lambda question: "[[B]]") as server:
        found = use(server, lambda judge: judge.compare(PROMPT, "The {Rhine}.", "Water."))
    assert found == Opinion(text="[[B]]", verdict="second")
    (request,), (question,) = server.requests, server.asked
    assert (request["model"], request["temperature"]) == ("judge/model", 0)
    assert "system: Be brief.\n\nuser: Name a {river}." in question
    assert question.index("<reply A>\nThe {Rhine}.") < question.index("<reply B>\nWater.")
    assert server.tokens == [f"Bearer {SECRET}"]


def test_what_cannot_be_read_is_kept_and_is_no_verdict() -> None:
    assert opinion("Both have their merits.") == Opinion(text="Both have their merits.", verdict=None)
    refused = opinion(400)  # as for a text that is too long
    assert refused.verdict is None
    assert "HTTP 400" in refused.text
    nothing: dict[str, Any] = {"choices": [{"message": {"content": None, "refusal": "no"}}]}
    assert opinion(nothing) == Opinion(text="", verdict=None)


def test_a_question_of_yes_or_no() -> None:
    answers = iter(["Yes.", "no, it is not", "<think>yes?</think>No", "Nobody knows", 400])
    with serving(lambda question: next(answers)) as server:

        async def work(judge: ChatJudge) -> list[bool | None]:
            return [await judge.ask("Is it?") for _ in range(5)]

        assert use(server, work) == [True, False, False, None, None]
    assert server.asked == ["Is it?"] * 5


def test_what_fails_for_a_moment_is_asked_again() -> None:
    answers: Any = iter([500, 429, {"choices": []}, {"error": "busy"}, "[[A]]"])
    with serving(lambda question: next(answers)) as server:
        found = use(server, lambda judge: judge.compare(PROMPT, "a", "b"))
    assert found.verdict == "first"
    assert len(server.asked) == 5


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (500, "the judge http.*gave no valid answer to POST /chat/completions in .* HTTP 500"),
        (None, "gave no valid answer.*no answer within"),
        ({"choices": "many"}, "gave no valid answer.*the answer is no chat completion with one choice"),
        (401, "refuses /chat/completions: HTTP 401"),
        (404, "refuses /chat/completions: HTTP 404"),
    ],
)
def test_a_judge_that_does_not_answer_stops_with_the_reason(
    answer: Answer, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAYWARD_JUDGE_TOKEN", SECRET)
    with (
        caplog.at_level(logging.DEBUG),
        serving(lambda question: answer) as server,
        pytest.raises(JudgeUnavailable, match=said) as error,
    ):
        use(server, lambda judge: judge.compare(PROMPT, "a", "b"), retry_s=0.3)
    assert SECRET not in f"{error.value}{caplog.text}"


def test_before_anything_else_it_has_to_answer() -> None:
    with serving(lambda question: 400) as server, pytest.raises(JudgeUnavailable, match="HTTP 400"):
        use(server, lambda judge: judge.ready())
    with serving(lambda question: "Sure!") as server:
        use(server, lambda judge: judge.ready())
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "address",
    [
        "http://host/v1",
        "http:///v1#model",
        "ftp://host/v1#model",
        "http://host:port/v1#model",
        "http://host/v1?key=1#model",
        "http://me:hidden@host/v1#model",
    ],
)
def test_an_address_of_another_form_is_refused_without_its_password(address: str) -> None:
    with pytest.raises(ValueError, match=r"must be http\(s\)://HOST/v1#MODEL") as error:
        ChatJudge(address, 1.0)
    assert "hidden" not in str(error.value)


def test_a_token_that_is_none_is_refused_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWARD_JUDGE_TOKEN", "two words")
    with pytest.raises(ValueError, match="RAYWARD_JUDGE_TOKEN holds no token") as error:
        ChatJudge("http://host/v1#m", 1.0)
    assert "two words" not in str(error.value)


# --- people


def votes(folder: Path, *lines: str, header: str = "prompt,model_a,model_b,verdict") -> Path:
    path = folder / "votes.csv"
    path.write_text("\n".join([header, *lines, ""]))
    return path


def test_people_s_verdicts_are_read(tmp_path: Path) -> None:
    path = votes(
        tmp_path,
        "p1,sft,policy,b,anna",
        "p1,policy,sft,Tie,ben",
        "7,sft,policy,model_a,ben",
        header="prompt,model_a,model_b,verdict,who",
    )
    assert read_votes(path, ["p1", "7"], ["sft", "policy"]) == [
        Vote(prompt="p1", models=("sft", "policy"), won=1.0),
        Vote(prompt="p1", models=("policy", "sft"), won=0.5),
        Vote(prompt="7", models=("sft", "policy"), won=0.0),
    ]
    lines = tmp_path / "votes.jsonl"
    lines.write_text(json.dumps({"prompt": 7, "model_a": "sft", "model_b": "policy", "verdict": "b"}) + "\n")
    assert read_votes(lines, ["7"], ["sft", "policy"])[0].won == 1.0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("p9,sft,policy,a", r"votes.csv:3: no prompt that is answered has the id 'p9'"),
        ("p1,sft,ppo,a", r"votes.csv:3: no model is called 'ppo'; those that are measured: sft, policy"),
        ("p1,sft,sft,a", r"votes.csv:3: both models are 'sft'"),
        ("p1,sft,policy,policy", r"votes.csv:3: \"verdict\" must be a, b or tie, not 'policy'"),
        ("p1,sft,policy,", r"votes.csv:3: \"verdict\" is (missing|blank)"),
    ],
)
def test_a_row_that_says_nothing_is_told_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(RecordError, match=said):
        read_votes(votes(tmp_path, "p1,sft,policy,a", line), ["p1"], ["sft", "policy"])


def test_a_file_without_the_columns_or_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r'votes.csv:2: "model_a" is missing; the row has'):
        read_votes(votes(tmp_path, "p1,sft,policy,a", header="prompt,a,b,verdict"), ["p1"], ["sft", "policy"])
    with pytest.raises(RecordError, match="the file is empty"):
        read_votes(votes(tmp_path), ["p1"], ["sft", "policy"])
