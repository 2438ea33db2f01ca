"""Collation, off-by-one positions, minibatches and micro-batches."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.trajectory import Completion, SampleKey, Trajectory
from learner.data.batch import Batch, collate, microbatches, minibatches, staleness

PAD = 99


def trajectory(
    query: Sequence[int], response: Sequence[int], versions: Sequence[int] | None = None, score: float = 0.5
) -> Trajectory:
    return Trajectory(
        key=SampleKey(prompt_id="p", epoch=0, k=0, attempt=0),
        prompt=(),
        completion=Completion(
            query_ids=tuple(query),
            response_ids=tuple(response),
            logprobs=tuple(-i / 10 for i in response),
            versions=tuple(versions or [0] * len(response)),
            ended=response[-1] == 1,
            text="",
        ),
        score=score,
        parts={},
    )


def batch() -> Batch:
    return collate(
        [
            trajectory([10, 11, 12], [20, 1], [3, 4]),
            trajectory([13], [21, 22, 23], [4, 4, 4], score=-1.0),
            trajectory([14, 15], [1], [2]),
        ],
        pad_id=PAD,
    )


def test_collate_writes_query_then_response_then_padding() -> None:
    b = batch()
    assert b.ids.tolist() == [[10, 11, 12, 20, 1], [13, 21, 22, 23, PAD], [14, 15, 1, PAD, PAD]]
    assert b.query_len.tolist() == [3, 1, 2]
    assert b.response_len.tolist() == [2, 3, 1]
    assert b.lengths.tolist() == [5, 4, 3]
    assert b.ended.tolist() == [True, False, True]
    assert b.score.tolist() == [0.5, -1.0, 0.5]
    assert b.versions.tolist() == [[3, 4, -1], [4, 4, 4], [2, -1, -1]]
    assert b.mask.tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    expected = torch.tensor([[-2.0, -0.1, 0.0], [-2.1, -2.2, -2.3], [-0.1, 0.0, 0.0]])
    torch.testing.assert_close(b.behaviour_logprobs, expected)
    assert (b.ids.dtype, b.score.dtype, b.versions.dtype) == (torch.int64, torch.float32, torch.int64)


def test_a_response_token_is_predicted_at_the_index_before_it() -> None:
    b = batch()
    assert b.positions.tolist() == [[2, 3, 4], [0, 1, 2], [1, 2, 2]]
    assert [b.response_ids[i, : b.response_len[i]].tolist() for i in range(3)] == [[20, 1], [21, 22, 23], [1]]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6))
def test_positions_point_right_before_each_response_token_and_stay_legal(
    shapes: list[tuple[int, int]],
) -> None:
    rows = [trajectory(range(100, 100 + q), range(200 + 10 * i, 200 + 10 * i + r)) for i, (q, r) in enumerate(shapes)]
    b = collate(rows, pad_id=PAD)
    assert b.mask.sum() == sum(r for _, r in shapes)
    assert int(b.positions.max()) < b.ids.shape[1]
    for i, (q, r) in enumerate(shapes):
        for t in range(r):
            assert b.positions[i, t] == q - 1 + t
            assert b.ids[i, b.positions[i, t] + 1] == b.response_ids[i, t] == 200 + 10 * i + t


def test_an_eos_id_inside_padding_or_a_pad_id_inside_a_response_does_not_move_the_mask() -> None:
    b = collate([trajectory([7], [PAD, PAD, 1]), trajectory([7], [1])], pad_id=1)
    assert b.ids.tolist() == [[7, PAD, PAD, 1], [7, 1, 1, 1]]
    assert b.mask.tolist() == [[True, True, True], [True, False, False]]


def test_rows_keep_their_order_and_lose_the_padding_that_they_do_not_need() -> None:
    b = batch().rows([2, 0])
    assert b.ids.tolist() == [[14, 15, 1, PAD, PAD], [10, 11, 12, 20, 1]]
    assert b.versions.tolist() == [[2, -1], [3, 4]]
    one = batch().rows([2])
    assert one.ids.tolist() == [[14, 15, 1]]
    assert one.behaviour_logprobs.shape == (1, 1)
    assert len(one) == 1


def test_rows_of_a_batch_equal_the_batch_of_the_rows() -> None:
    rows = [trajectory([1, 2], [3, 4, 5]), trajectory([1], [3]), trajectory([1, 2, 3, 4], [3, 4])]
    taken, made = collate(rows, PAD).rows([1, 2]), collate(rows[1:], PAD)
    for name in ("ids", "query_len", "response_len", "ended", "score", "behaviour_logprobs", "versions"):
        assert torch.equal(getattr(taken, name), getattr(made, name)), name


def test_staleness_is_the_age_of_the_oldest_token() -> None:
    # oldest versions 3, 4, 2 at version 5: ages 2, 1, 3; of the six tokens one is 2 and one is 3 versions old
    shares = {"staleness/age_0": 0.0, "staleness/age_1": 4 / 6, "staleness/age_2": 1 / 6, "staleness/age_3": 1 / 6}
    expected = {"staleness/mean": 2.0, "staleness/max": 3.0, "staleness/mixed": 1 / 3, **shares}
    assert staleness(batch(), version=5) == pytest.approx(expected)


def test_an_empty_batch_or_response_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="empty batch"):
        collate([], PAD)
    empty = Completion(query_ids=(1,), response_ids=(), logprobs=(), versions=(), ended=True, text="")
    row = Trajectory(
        key=SampleKey(prompt_id="p", epoch=0, k=0, attempt=0),
        prompt=(),
        completion=empty,
        score=0.0,
        parts={},
    )
    with pytest.raises(AssertionError, match="at least its EOS"):
        collate([row], PAD)


def test_minibatches_are_disjoint_random_and_the_same_for_a_seed() -> None:
    parts = minibatches(512, 64, seed=3)
    assert [len(part) for part in parts] == [64] * 8
    assert sorted(i for part in parts for i in part) == list(range(512))
    assert parts == minibatches(512, 64, seed=3)
    assert parts != minibatches(512, 64, seed=4)
    assert parts[0] != sorted(parts[0])


@pytest.mark.parametrize(("size", "minibatch_size"), [(10, 3), (10, 20), (10, 0)])
def test_a_minibatch_size_that_does_not_divide_the_batch_is_refused(size: int, minibatch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch of 10 trajectories .* minibatches of {minibatch_size};"):
        minibatches(size, minibatch_size, seed=0)


def _tokens(group: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[i] for i in group)


@given(
    st.lists(st.integers(1, 300), max_size=60),
    st.integers(1, 500),
    st.integers(1, 8),
    st.booleans(),
)
def test_microbatches_cover_all_fit_and_are_balanced(
    lengths: list[int], max_tokens: int, ranks: int, padded: bool
) -> None:
    split = microbatches(lengths, max_tokens, ranks, padded=padded)
    assert len(split) == ranks
    assert len({len(steps) for steps in split}) == 1, "every rank takes part in every collective"
    groups = [group for steps in split for group in steps]
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        tokens = len(group) * max((lengths[i] for i in group), default=0) if padded else _tokens(group, lengths)
        assert tokens <= max_tokens or len(group) == 1
    loads = [sum(_tokens(group, lengths) for group in steps) for steps in split]
    assert max(loads) - min(loads) <= max((_tokens(group, lengths) for group in groups), default=0)
    if not padded and max(lengths, default=0) <= max_tokens:
        # Graham's bound for one step, and no step is opened while an earlier one has room.
        spent = sum(max(_tokens(split[rank][step], lengths) for rank in range(ranks)) for step in range(len(split[0])))
        assert spent <= sum(lengths) / ranks + len(split[0]) * max(lengths, default=0)
    assert split == microbatches(lengths, max_tokens, ranks, padded=padded)
    if len(lengths) >= ranks:
        assert all(any(steps) for steps in split), "no rank is idle while there is work for all"


def test_a_giant_stands_alone_and_others_fill_the_room() -> None:
    assert microbatches([4, 9, 4, 30, 5], max_tokens=10, ranks=1) == [[[3], [1], [4, 0], [2]]]
    assert microbatches([4, 9, 4, 30, 5], max_tokens=13, ranks=1) == [[[3], [1, 2], [4, 0]]]


def test_attention_over_long_sequences_counts() -> None:
    """By tokens 12 beside 4 + 4 + 4 is even; with attention's part the long one costs 24, each short one 5.3."""
    assert microbatches([12, 4, 4, 4, 2, 2], 100, 2) == [[[0, 4]], [[1, 2, 3, 5]]]
    assert microbatches([12, 4, 4, 4, 2, 2], 100, 2, width=1) == [[[0]], [[1, 2, 3, 4, 5]]]


def test_lengths_like_those_of_a_batch_leave_hardly_a_rank_waiting() -> None:
    """64 log-normal sequences of 512 tokens in the mean: what is computed over what the longest one allows."""
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0))
    lengths = (512 * torch.exp(0.7 * noise - 0.245)).long().tolist()
    for ranks in (1, 2, 4, 8, 16):
        split = microbatches(lengths, 8192, ranks)
        spent = sum(max(_tokens(split[rank][step], lengths) for rank in range(ranks)) for step in range(len(split[0])))
        assert max(sum(lengths) / ranks, max(lengths)) >= 0.97 * spent, ranks


def test_few_sequences_are_split_over_the_ranks_and_filled_up_with_nothing() -> None:
    assert microbatches([5, 5, 5, 5], max_tokens=100, ranks=2) == [[[0, 2]], [[1, 3]]]
    assert microbatches([5], max_tokens=100, ranks=2) == [[[0]], [[]]]
    assert microbatches([], max_tokens=100, ranks=2) == [[], []]


def test_equal_work_is_shared_equally() -> None:
    split = microbatches([100] * 8, max_tokens=200, ranks=2)
    assert [sum(map(len, steps)) for steps in split] == [4, 4]


def test_the_rank_with_the_least_work_so_far_gets_the_larger_microbatch() -> None:
    assert microbatches([8, 7, 6, 5], max_tokens=8, ranks=2) == [[[0], [3]], [[1], [2]]]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_minibatches_are_a_partition_into_equal_parts_and_a_function_of_the_seed(
    count: int, size: int, seed: int
) -> None:
    parts = minibatches(count * size, size, seed)
    assert [len(part) for part in parts] == [size] * count
    assert sorted(i for part in parts for i in part) == list(range(count * size))
    assert parts == minibatches(count * size, size, seed)


@given(st.integers(1, 60), st.integers(1, 60))
def test_a_batch_that_cannot_be_cut_evenly_is_refused(size: int, minibatch_size: int) -> None:
    if size % minibatch_size:
        with pytest.raises(
            ValueError, match=f"{size} trajectories cannot be split into minibatches of {minibatch_size}"
        ):
            minibatches(size, minibatch_size, seed=0)
    else:
        assert len(minibatches(size, minibatch_size, seed=0)) == size // minibatch_size
