"""Packed text, its endless order, and the held-out split."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.data.corpora import (
    TextStream,
    pack,
    read_texts,
    split_held_out,
    text_examples,
)
from reward_server.preferences.records import RecordError
from tests.fakes import EOS, FakeEncoding

A, B, C, D = 4, 5, 6, 7


def test_documents_are_separated_by_eos_and_the_rest_is_dropped() -> None:
    packed = pack(["ab", "c", "dd"], FakeEncoding(), sequence_tokens=3)  # a b E | c E d | d E
    assert packed.tolist() == [[A, B, EOS], [C, EOS, D]]
    assert packed.dtype == torch.int32


def test_text_that_does_not_fill_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="the text has 3 tokens, which does not fill one sequence of 4"):
        pack(["ab"], FakeEncoding(), sequence_tokens=4)


@given(st.lists(st.text("abc", min_size=1, max_size=8), min_size=1, max_size=10), st.integers(2, 6))
def test_packing_neither_adds_nor_reorders_tokens(texts: list[str], sequence_tokens: int) -> None:
    encoding = FakeEncoding()
    stream = [i for text in texts for i in encoding.response(text, ended=True)]
    if len(stream) < sequence_tokens:
        return
    packed = pack(texts, encoding, sequence_tokens).flatten().tolist()
    assert packed == stream[: len(packed)]
    assert len(stream) - len(packed) < sequence_tokens


def test_every_token_of_packed_text_but_the_first_is_a_target() -> None:
    (example,) = text_examples(torch.tensor([[A, EOS, B]], dtype=torch.int32))
    assert example.ids == (A, EOS, B)
    assert example.loss_mask == (False, True, True)


def test_the_text_stream_is_a_pure_function_and_uses_each_sequence_once_an_epoch() -> None:
    packed = torch.arange(4, 18, dtype=torch.int32).view(7, 2)
    straight = [TextStream(packed, seed=1)[n] for n in range(21)]
    resumed = TextStream(packed, seed=1)
    assert [resumed[n] for n in range(13, 21)] == straight[13:]
    for epoch in range(3):
        firsts = Counter(example.ids[0] for example in straight[7 * epoch : 7 * epoch + 7])
        assert firsts == Counter(range(4, 18, 2))
    assert straight[:7] != straight[7:14]


def test_iterations_take_consecutive_sequences() -> None:
    stream = TextStream(torch.arange(24, dtype=torch.int32).view(12, 2), seed=0)
    iterations = [stream.iteration(i, minibatches=2, sequences_per_minibatch=3) for i in range(2)]
    assert [len(part) for parts in iterations for part in parts] == [3, 3, 3, 3]
    assert [e for parts in iterations for part in parts for e in part] == [stream[n] for n in range(12)]
    assert stream.iteration(1, 2, 3) == iterations[1]


def test_texts_are_read_and_a_bad_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"body": "two"}) + "\n")
    with pytest.raises(RecordError, match=r'text\.jsonl:2: "text" is missing'):
        read_texts(path)
    assert read_texts(path, max_bad_rows=1) == ["one"]


def test_the_held_out_part_is_stable_and_duplicates_stay_together() -> None:
    items = [f"doc{i % 20}" for i in range(60)]
    train, held_out = split_held_out(items, lambda item: item, fraction=0.1, seed=5)
    assert len(set(held_out)) == 2
    assert len(held_out) == 6
    assert not set(train) & set(held_out)
    assert Counter(train + held_out) == Counter(items)
    assert set(split_held_out(items[::-1], lambda item: item, 0.1, seed=5)[1]) == set(held_out)
    assert any(set(split_held_out(items, lambda i: i, 0.1, seed)[1]) != set(held_out) for seed in range(5))


def test_small_splits_hold_out_at_least_one_and_none_only_when_asked() -> None:
    assert len(split_held_out(["a", "b", "c"], lambda item: item, 0.01, seed=0)[1]) == 1
    assert split_held_out(["a", "b"], lambda item: item, 0.0, seed=0) == (["a", "b"], [])
    with pytest.raises(ValueError, match=r"holding out 0\.5 of 1 different items leaves none"):
        split_held_out(["a", "a"], lambda item: item, 0.5, seed=0)
