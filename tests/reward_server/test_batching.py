"""What is computed together: bounds of tokens and responses, whose turn it is, and what a failure spoils."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable

import pytest

from reward_server.batching import Batching, Turn
from reward_server.config import Limits
from reward_server.schema import Message, ScoreReply, ScoreRequest
from reward_server.sources import Source


class Letters(Source):
    """A token a letter of the response; "bad" cannot be read, "odd" cannot be scored. Computes while `gate` is set."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()

    def tokens(self, requests: list[ScoreRequest]) -> list[int]:
        self.threads.add(threading.get_ident())
        if any(request.response == "bad" for request in requests):
            raise ValueError("too long")
        return [len(request.response) for request in requests]

    def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        self.threads.add(threading.get_ident())
        self.batches.append([request.id for request in requests])
        assert self.gate.wait(10)
        if any(request.response == "odd" for request in requests):
            raise RuntimeError("no such word")
        return [ScoreReply(id=request.id, score=float(len(request.response))) for request in requests]


def request(name: str, response: str) -> ScoreRequest:
    return ScoreRequest(id=name, prompt=(Message(role="user", content="hi"),), response=response, ended=True)


def post(name: str, *lengths: int) -> list[ScoreRequest]:
    return [request(f"{name}{n}", "x" * length) for n, length in enumerate(lengths)]


def run(
    source: Letters,
    *posts: list[ScoreRequest],
    computed: Callable[[Turn], None] = lambda turn: None,
    **limits: int,
) -> list[list[float] | BaseException]:
    """What each post is answered, when the first is computed alone while the others arrive."""

    async def ask() -> list[list[float] | BaseException]:
        batching = Batching(source, Limits(**limits), computed)  # pyright: ignore[reportArgumentType]

        async def scores(requests: list[ScoreRequest]) -> list[float]:
            return [reply.score for reply in await batching.score(requests)]

        source.gate.clear()
        first = asyncio.create_task(scores(posts[0]))
        while not source.batches:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(scores(one)) for one in posts[1:]]
        while batching.waiting < len(posts):
            await asyncio.sleep(0.001)
        source.gate.set()
        answers = await asyncio.gather(first, *others, return_exceptions=True)
        assert batching.waiting == batching.responses == 0
        return answers

    return asyncio.run(asyncio.wait_for(ask(), 20))


def test_a_batch_is_bounded_by_tokens_and_its_lengths_are_alike() -> None:
    source, turns = Letters(), []
    answers = run(source, post("a", 1), post("b", 3, 9, 6, 2, 8), computed=turns.append, batch_tokens=10)
    assert answers == [[1.0], [3.0, 9.0, 6.0, 2.0, 8.0]]
    assert source.batches == [["a0"], ["b1"], ["b4"], ["b2", "b0"], ["b3"]]
    assert [(turn.responses, turn.tokens) for turn in turns] == [(1, 1), (1, 9), (1, 8), (2, 9), (1, 2)]


def test_a_response_that_is_larger_than_the_bound_stands_alone() -> None:
    source = Letters()
    assert run(source, post("a", 1), post("b", 50, 2), batch_tokens=10) == [[1.0], [50.0, 2.0]]
    assert source.batches == [["a0"], ["b0"], ["b1"]]


def test_a_small_post_does_not_wait_for_a_large_one_that_came_first() -> None:
    source = Letters()
    run(source, post("large", *[10] * 20), post("small", 5, 5), batch_tokens=40)
    turn = next(n for n, batch in enumerate(source.batches) if "small0" in batch)
    assert turn == 1, "the first turn after it arrived"
    assert source.batches[1] == ["large4", "small0", "small1", "large5", "large6"]
    assert len(source.batches) == 6


def test_a_large_post_gets_its_share_while_small_ones_keep_coming() -> None:
    source = Letters()
    small = [post(f"s{n}-", 10, 10, 10) for n in range(9)]
    run(source, post("large", *[10] * 20), *small, batch_tokens=40)
    large = [sum(name.startswith("large") for name in batch) for batch in source.batches]
    assert large[:5] == [4, 1, 1, 1, 1], "one quarter of each batch"


def test_posts_of_one_size_are_answered_in_their_order() -> None:
    source = Letters()
    run(source, *[post(f"p{n}-", 10, 10, 10, 10) for n in range(4)], batch_tokens=40)
    assert source.batches == [[f"p{n}-{k}" for k in range(4)] for n in range(4)]


def test_what_arrives_while_a_batch_is_computed_becomes_the_next_one() -> None:
    source = Letters()
    run(source, post("a", 1), post("b", 1), post("c", 1), post("d", 1))
    assert source.batches == [["a0"], ["b0", "c0", "d0"]]


def test_posts_are_merged_up_to_the_bound_and_answered_apart() -> None:
    source = Letters()
    answers = run(source, post("a", 1, 1), post("b", 1, 1), post("c", 1, 1), post("d", 1, 1), max_batch=3)
    assert source.batches == [["a0", "a1"], ["b0", "b1", "c0"], ["c1", "d0", "d1"]]
    assert answers == [[1.0, 1.0]] * 4


def test_what_takes_no_tokens_is_bounded_by_its_number() -> None:
    source = Letters()
    run(source, post("a", 0), post("b", *[0] * 7), batch_tokens=1, max_batch=3)
    assert [len(batch) for batch in source.batches] == [1, 3, 3, 1]


@pytest.mark.parametrize(("response", "said"), [("bad", "too long"), ("odd", "no such word")])
def test_a_request_that_fails_spoils_its_own_post_only(response: str, said: str) -> None:
    spoilt = [*post("b", 4), request("x", response)]
    answers = run(Letters(), post("a", 1), spoilt, post("c", 2))
    assert answers[0] == [1.0]
    assert said in str(answers[1])
    assert answers[2] == [2.0]


def with_batching(source: Letters, work: Callable[[Batching], Awaitable[None]]) -> None:
    async def within() -> None:
        await work(Batching(source, Limits()))

    asyncio.run(asyncio.wait_for(within(), 20))


def test_a_post_that_failed_is_forgotten_and_may_be_asked_again() -> None:
    source = Letters()

    async def twice(batching: Batching) -> None:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no such word"):
                await batching.score([request("a", "odd")])
        assert batching.known == 0

    with_batching(source, twice)
    assert source.batches == [["a"], ["a"]]


def test_scores_are_remembered_and_texts_are_not() -> None:
    async def once(batching: Batching) -> None:
        asked = post("a", 3)
        text = weakref.ref(asked[0])
        assert [reply.score for reply in await batching.score(asked)] == [3.0]
        del asked
        gc.collect()
        assert text() is None
        assert batching.known == 1
        assert [reply.score for reply in await batching.score(post("a", 3))] == [3.0]

    with_batching(Letters(), once)


def test_the_event_loop_reads_no_tokens() -> None:
    source = Letters()
    run(source, post("a", 1), post("b", 2))
    assert len(source.threads) == 1
    assert threading.get_ident() not in source.threads


def test_many_who_ask_for_health_are_one_probe() -> None:
    source = Letters()

    async def ask(batching: Batching) -> None:
        source.gate.clear()
        probes = [asyncio.create_task(batching.probe()) for _ in range(5)]
        await asyncio.sleep(0.05)
        probes.pop().cancel()  # whoever loses patience does not end it for the others
        source.gate.set()
        await asyncio.gather(*probes)
        await batching.probe()

    with_batching(source, ask)
    assert len(source.batches) == 2


def test_how_long_a_batch_has_been_computed_is_told_from_any_thread_and_counts_from_its_own_start() -> None:
    async def ask() -> None:
        source = Letters()
        source.gate.clear()
        batching = Batching(source, Limits())
        assert batching.computing_s == 0.0
        for name in "ab":
            began, asking = time.monotonic(), asyncio.create_task(batching.score(post(name, 3)))
            await asyncio.sleep(0.3)
            assert 0.15 < await asyncio.to_thread(lambda: batching.computing_s) <= time.monotonic() - began
            source.gate.set()
            await asking
            assert batching.computing_s == 0.0
            source.gate.clear()

    asyncio.run(ask())
