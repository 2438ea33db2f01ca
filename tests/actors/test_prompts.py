"""Prompt files and the endless, cursor-free order of prompts."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.prompts import (
    Prompt,
    PromptStream,
    Shuffle,
    fitting,
    read_demonstrations,
    read_prompts,
    stable_hash,
)
from reward_server.preferences.records import RecordError
from reward_server.schema import Message
from tests.fakes import FakeEncoding, prompts


def _write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_are_texts_or_conversations_with_or_without_id_and_reference(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = _write(tmp_path / "p.jsonl", [{"prompt": "hi"}, {"id": "x", "prompt": talk, "reference": "r"}])
    assert read_prompts(path) == [
        Prompt(id="row-1", messages=(Message(role="user", content="hi"),), reference=None),
        Prompt(
            id="x",
            messages=(Message(role="system", content="s"), Message(role="user", content="u")),
            reference="r",
        ),
    ]


def test_a_prompt_has_its_user_and_use_case_and_a_run_goes_on_when_they_are_added(tmp_path: Path) -> None:
    without = read_prompts(_write(tmp_path / "p.jsonl", [{"prompt": "hi"}, {"prompt": "ho"}]))
    told = [{"prompt": "hi", "user": 7, "use_case": "chat"}, {"prompt": "ho", "user": None, "use_case": None}]
    found = read_prompts(_write(tmp_path / "q.jsonl", told))
    assert [(one.user, one.use_case) for one in found] == [("7", "chat"), (None, None)]
    assert PromptStream(found, 0).fingerprint == PromptStream(without, 0).fingerprint
    with pytest.raises(RecordError, match=r':1: "use_case" must be a string'):
        read_prompts(_write(tmp_path / "r.jsonl", [{"prompt": "hi", "use_case": 3}]))


def test_demonstrations_need_a_response(tmp_path: Path) -> None:
    good = _write(tmp_path / "good.jsonl", [{"id": "d", "prompt": "hi", "response": "hello"}])
    (demonstration,) = read_demonstrations(good)
    assert (demonstration.id, demonstration.response) == ("d", "hello")
    bad = _write(tmp_path / "bad.jsonl", [{"prompt": "hi", "response": "a"}, {"prompt": "hi"}])
    with pytest.raises(RecordError, match=r'bad\.jsonl:2: "response" is missing.*as in a file of prompts'):
        read_demonstrations(bad)


def test_an_id_used_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "a"}, {"id": "row-1", "prompt": "b"}]
    with pytest.raises(RecordError, match=r":2: id 'row-1' was used in line 1"):
        read_prompts(_write(tmp_path / "p.jsonl", rows))


def test_every_epoch_has_each_prompt_once_in_another_order() -> None:
    stream = PromptStream(prompts(10), seed=1)
    epochs = [[stream[10 * epoch + i] for i in range(10)] for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert {prompt.id for prompt, _ in epoch} == {f"p{i}" for i in range(10)}
        assert {drawn_in for _, drawn_in in epoch} == {number}
    assert len({tuple(prompt.id for prompt, _ in epoch) for epoch in epochs}) == 3


@given(st.integers(1, 50), st.integers(0, 2**40), st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_the_order_is_a_pure_function_of_the_number(size: int, seed: int, numbers: list[int]) -> None:
    forwards = [Shuffle(size=size, seed=seed)[n] for n in numbers]
    backwards = [Shuffle(size=size, seed=seed)[n] for n in reversed(numbers)]
    assert forwards == backwards[::-1]


@given(st.integers(1, 30), st.integers(0, 100), st.integers(0, 3))
def test_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    shuffle = Shuffle(size=size, seed=seed)
    drawn = [shuffle[epoch * size + i] for i in range(size)]
    assert Counter(position for position, _ in drawn) == Counter(range(size))
    assert {number for _, number in drawn} == {epoch}


def test_seeds_give_different_orders() -> None:
    orders = {tuple(PromptStream(prompts(10), seed)[n][0].id for n in range(10)) for seed in range(5)}
    assert len(orders) == 5


def test_a_stream_needs_a_prompt() -> None:
    with pytest.raises(ValueError, match="no prompt to sample from"):
        PromptStream([], seed=0)


def test_the_fingerprint_changes_with_prompts_order_and_seed() -> None:
    base = prompts(4)
    streams = [
        PromptStream(base, 0),
        PromptStream(base[::-1], 0),
        PromptStream(base[:3], 0),
        PromptStream(base, 1),
    ]
    assert len({stream.fingerprint for stream in streams}) == 4
    assert PromptStream(prompts(4), 0).fingerprint == streams[0].fingerprint


def test_the_hash_is_the_same_in_every_process_and_has_63_bits() -> None:
    assert stable_hash(0, 1, 2, 3) == 6557501004800223390
    assert stable_hash("a", "b") != stable_hash("ab")
    assert all(0 <= stable_hash(i) < 2**63 for i in range(1000))


def test_prompts_that_are_too_long_or_cannot_be_encoded_are_all_named_and_count_as_bad_rows(tmp_path: Path) -> None:
    class Strict(FakeEncoding):
        def prompt(self, messages):  # type: ignore[no-untyped-def]
            if messages[0].content == "b":
                raise ValueError("the template refuses b")
            return super().prompt(messages)

    fits = fitting(Strict(), max_prompt_tokens=5)
    path = _write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"id": "x", "prompt": "b"}, {"prompt": "aaaa"}, {"b": 1}])
    with pytest.raises(RecordError) as caught:
        read_prompts(path, 2, fits)
    told = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in told] == [f"{path}:2", f"{path}:3", f"{path}:4", str(path)]
    assert "prompt 'x': the template refuses b" in told[0]
    assert "prompt 'row-3' has 6 tokens, more than the 5 allowed" in told[1]
    assert "3 bad rows; only 2 may be skipped" in told[3]
    assert [prompt.id for prompt in read_prompts(path, 3, fits)] == ["row-1"]
