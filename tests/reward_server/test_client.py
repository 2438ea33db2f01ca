import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import uvicorn

from reward_server import client as client_module
from reward_server.app import Limits, create_app, serve
from reward_server.client import RewardClient, RewardRefused, RewardUnavailable
from reward_server.schema import Message, ScoreReply, ScoreRequest
from reward_server.sources import Source

REQUESTS = [
    ScoreRequest(id=f"p/{n}", prompt=(Message(role="user", content="hi"),), response="x" * n, ended=True)
    for n in range(5)
]
SCORES = [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without the patience of a run."""
    monkeypatch.setattr(client_module, "_FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(client_module, "_MAX_DELAY_S", 0.05)


class LengthSource(Source):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        self.seen += [request.id for request in requests if not request.id.startswith("health")]
        return [ScoreReply(id=request.id, score=float(len(request.response))) for request in requests]


class FaultyApp:
    """The real app behind a list of faults, one per request: a status, a change of the body, or "hang"."""

    def __init__(self, source: LengthSource, *faults: Any, token: str | None = None, limits: Limits | None = None):
        self.app = create_app(source, token, limits)
        self.faults = list(faults)
        self.fault_of: Callable[[str], Any] = lambda path: self.faults.pop(0) if self.faults else None
        self.requests = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.requests += 1
        fault = self.fault_of(scope["path"])
        if fault is None:
            await self.app(scope, receive, send)
            return
        sent: list[Any] = []

        async def keep(message: Any) -> None:
            sent.append(message)

        if fault == "hang":
            await asyncio.sleep(0.8)
        await self.app(scope, receive, keep)
        status, body = sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
        if isinstance(fault, int):
            status, body = fault, b"overloaded"
        elif callable(fault):
            body = fault(body)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})


@contextmanager
def running(app: FaultyApp) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@asynccontextmanager
async def connected(*urls: str, **options: Any) -> AsyncIterator[RewardClient]:
    settings: dict[str, Any] = {"retry_s": 10.0, "ask_s": 0.1} | options
    client = RewardClient(urls, **settings)
    try:
        yield client
    finally:
        await client.close()


def score(*urls: str, requests: list[ScoreRequest] = REQUESTS, **options: Any) -> list[ScoreReply]:
    async def ask() -> list[ScoreReply]:
        async with connected(*urls, **options) as client:
            return await client.score(requests)

    return asyncio.run(ask())


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def apply(body: bytes) -> bytes:
        document = json.loads(body)
        change(document)
        return json.dumps(document).encode()

    return apply


FAULTS = {
    "500": 500,
    "503": 503,
    "429": 429,
    "hang": "hang",
    "not JSON": lambda body: b"<html>busy</html>",
    "cut off": lambda body: body[:-7],
    "empty": lambda body: b"",
    "NaN": edit(lambda reply: reply["replies"][1].update(score=float("nan"))),
    "infinite": edit(lambda reply: reply["replies"][1].update(score=float("inf"))),
    "null": edit(lambda reply: reply["replies"][1].update(score=None)),
    "text": edit(lambda reply: reply["replies"][1].update(score="3.0")),
    "one too few": edit(lambda reply: reply["replies"].pop()),
    "one too many": edit(lambda reply: reply["replies"].append(reply["replies"][0])),
    "another order": edit(lambda reply: reply["replies"].reverse()),
    "another id": edit(lambda reply: reply["replies"][2].update(id="someone else's")),
    "endless": lambda body: body + b" " * 1_000_000,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_retried_and_the_scores_are_the_true_ones_counted_once(name: str) -> None:
    source = LengthSource()
    app = FaultyApp(source, FAULTS[name], FAULTS[name])
    with running(app) as url:
        replies = score(url, attempt_s=0.4)
    assert [reply.id for reply in replies] == [request.id for request in REQUESTS]
    assert [reply.score for reply in replies] == SCORES
    assert app.requests == 3
    assert len(source.seen) == len(set(source.seen)) == len(REQUESTS), "a retry must not count twice"


REASONS = {
    "500": "HTTP 500: overloaded",
    "hang": "no answer within",
    "not JSON": "malformed answer at body: Invalid JSON",
    "NaN": "malformed answer at replies.1.score",
    "one too few": "4 scores for 5 requests",
    "another id": 'a score for "someone else\'s" where',
    "endless": "the answer is longer than",
}


@pytest.mark.parametrize("name", REASONS)
def test_a_fault_that_lasts_is_unavailability_with_its_reason_and_never_a_score(name: str) -> None:
    app = FaultyApp(LengthSource(), *[FAULTS[name]] * 100)
    start = time.monotonic()
    with running(app) as url, pytest.raises(RewardUnavailable) as caught:
        score(url, retry_s=0.7, attempt_s=0.3)
    assert 0.6 < time.monotonic() - start < 6
    assert url in str(caught.value)
    assert "within 0.7 s" in str(caught.value)
    assert REASONS[name] in str(caught.value)


def test_a_server_that_is_down_is_named_with_the_refused_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(RewardUnavailable, match=f"127.0.0.1:{port} .*ConnectError"):
        score(f"http://127.0.0.1:{port}", retry_s=0.3)


PAUSES = {
    "500": (500, "HTTP 500: overloaded"),
    "NaN": (FAULTS["NaN"], r"malformed answer at replies\.1\.score"),
    "one too few": (FAULTS["one too few"], "4 scores for 5 requests"),
    "slow": ("hang", r"no answer within 0\.3 s"),
}


@pytest.mark.parametrize("name", PAUSES)
def test_when_the_retries_are_used_up_the_call_is_paused_until_the_scores_are_right(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """/health may say "ok" all the time: only scores end a pause."""
    fault, reason = PAUSES[name]
    source = LengthSource()
    app = FaultyApp(source)
    app.fault_of = lambda path: fault if broken and path == "/score" else None
    broken = True

    async def ask(url: str) -> list[ScoreReply]:
        nonlocal broken
        async with connected(url, retry_s=0.5, pause_s=20.0, attempt_s=0.3 if name == "slow" else 5.0) as client:
            assert client.paused is None
            asking = asyncio.create_task(client.score(REQUESTS))
            while client.paused is None:
                await asyncio.sleep(0.01)
            paused = client.paused
            assert abs(paused.since - time.time()) < 1
            assert re.search(reason, paused.reason), paused.reason
            new = asyncio.create_task(client.ready())
            await asyncio.sleep(0.5)
            assert not asking.done(), "a pause takes longer than the retries"
            assert not new.done(), "nothing new is to be sampled"
            assert client.paused.since == paused.since
            broken = False
            replies = await asyncio.wait_for(asking, 10)
            await asyncio.wait_for(new, 1)
            assert client.paused is None
            assert 0.5 < client.paused_s < 5
            return replies

    with running(app) as url:
        assert [reply.score for reply in asyncio.run(ask(url))] == SCORES
    assert len(source.seen) == len(set(source.seen)), "whatever was asked again counts once"
    said = [record.getMessage() for record in caplog.records if record.name == "reward_server.client"]
    assert len(said) == 2
    assert said[0].startswith("paused: the reward service has given no scores for 0.5 s; it is asked again for 20 s")
    assert re.search(reason, said[0])
    assert said[1].startswith("the pause is over after")


def test_a_server_that_dies_and_comes_back_on_its_port_ends_the_pause_of_all_who_wait() -> None:
    """None of them loses what it has. Two ask again after half a minute at the earliest, but the third wakes them."""
    source = LengthSource()

    async def die_and_live() -> list[list[ScoreReply]]:
        first = serve(source)
        port = int(first.url.rpartition(":")[2])
        async with connected(first.url, retry_s=0.3, pause_s=100.0, ask_s=60.0) as client:
            assert [reply.score for reply in await client.score(REQUESTS)] == SCORES
            await asyncio.to_thread(first.close)

            def ask(text: str) -> asyncio.Task[list[ScoreReply]]:
                return asyncio.create_task(client.score([r.model_copy(update={"response": text}) for r in REQUESTS]))

            patient = [ask("1"), ask("2")]
            while client.paused is None:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)  # the other is paused, too
            assert "ConnectError" in client.paused.reason
            client.ask_s = 0.2
            eager = ask("3")
            await asyncio.sleep(0.5)
            second = serve(source, port=port)
            try:
                replies = await asyncio.wait_for(asyncio.gather(*patient, eager), 15)
                assert client.paused is None
                return replies
            finally:
                await asyncio.to_thread(second.close)

    assert [[reply.score for reply in replies] for replies in asyncio.run(die_and_live())] == [[1.0] * 5] * 3


def test_a_pause_has_a_bound_and_the_error_says_why() -> None:
    async def ask(url: str) -> None:
        async with connected(url, retry_s=0.2, pause_s=0.6) as client:
            try:
                await client.score(REQUESTS)
            finally:
                assert client.paused is None
                assert 0.5 < client.paused_s < 4

    with running(FaultyApp(LengthSource(), *[500] * 100)) as url:
        started = time.monotonic()
        said = "POST /score in [0-9]+ attempts within 0.2 s and a pause of 0.6 s; the last reason: HTTP 500: overloaded"
        with pytest.raises(RewardUnavailable, match=said):
            asyncio.run(ask(url))
        assert 0.8 <= time.monotonic() - started < 5


def test_the_bound_of_a_pause_is_kept_when_the_last_attempt_hangs_to_its_end() -> None:
    """The wait for the next turn is taken of what the attempt has left."""

    async def ask(url: str) -> float:
        async with connected(url, retry_s=0.2, pause_s=1.0, attempt_s=0.5, ask_s=10.0) as client:
            started = time.monotonic()
            with pytest.raises(RewardUnavailable, match="and a pause of 1 s"):
                await client.score(REQUESTS)
            return time.monotonic() - started

    with running(FaultyApp(LengthSource(), *["hang"] * 10)) as url:
        assert 1.2 <= asyncio.run(ask(url)) < 1.65


def test_when_nobody_will_answer_any_more_whoever_waits_is_told_at_once() -> None:
    async def ask() -> None:
        async with connected("http://127.0.0.1:1", retry_s=0.1, pause_s=60.0, ask_s=60.0) as client:
            asking = asyncio.create_task(client.score(REQUESTS))
            while client.paused is None:
                await asyncio.sleep(0.01)
            client.end("reward-0 is lost")
            for score in (asking, client.score(REQUESTS)):
                with pytest.raises(
                    RewardUnavailable, match="no replica of the reward server is left: reward-0 is lost"
                ):
                    await asyncio.wait_for(score, 5)
            assert client.paused is None

    asyncio.run(ask())


def test_who_is_just_asking_when_nobody_will_answer_any_more_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        async with connected("http://127.0.0.1:1", retry_s=0.1, pause_s=60.0, ask_s=60.0) as client:
            unanswered = client._replicas.ask

            async def last(*given: Any) -> bytes:
                if client.paused:
                    client.end("reward-0 is lost")
                return await unanswered(*given)

            monkeypatch.setattr(client._replicas, "ask", last)
            with pytest.raises(RewardUnavailable, match="is left: reward-0 is lost"):
                await asyncio.wait_for(client.score(REQUESTS), 5)

    asyncio.run(ask())


def test_a_post_that_always_fails_pauses_the_run_though_others_are_answered() -> None:
    """Else its neighbours would end its pause again and again, and the run would never stop."""

    class Picky(LengthSource):
        def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
            if any(request.response == "poison" for request in requests):
                raise RuntimeError("no such word")
            return super().score(requests)

    async def ask(url: str) -> None:
        async with connected(url, retry_s=0.2, pause_s=0.8) as client:
            poison = asyncio.create_task(client.score([REQUESTS[0].model_copy(update={"response": "poison"})]))
            while client.paused is None:
                await asyncio.sleep(0.01)
            since = client.paused.since
            for n in range(5):
                await client.score([REQUESTS[1].model_copy(update={"response": "x" * n})])
                assert client.paused is not None
                assert client.paused.since == since
            with pytest.raises(RewardUnavailable, match="no such word"):
                await poison

    with running(FaultyApp(Picky())) as url:
        asyncio.run(ask(url))


def test_a_call_that_is_given_up_ends_its_pause() -> None:
    async def ask() -> None:
        async with connected("http://127.0.0.1:1", retry_s=0.1, pause_s=30.0) as client:
            asking = asyncio.create_task(client.score(REQUESTS))
            while client.paused is None:
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.wait([asking])
            assert client.paused is None
            await asyncio.wait_for(client.ready(), 1)

    asyncio.run(ask())


def test_posts_go_to_the_replica_with_the_fewest_under_way() -> None:
    sources = [LengthSource(), LengthSource()]
    slow, fast = FaultyApp(sources[0], "hang"), FaultyApp(sources[1])

    async def ask(*urls: str) -> list[ScoreReply]:
        async with connected(*urls, batch_requests=1, max_in_flight=1) as client:
            return await client.score(REQUESTS)

    with running(slow) as one, running(fast) as other:
        assert [reply.score for reply in asyncio.run(ask(one, other))] == SCORES
    assert (slow.requests, fast.requests) == (1, 4), "while the first post hangs, the other replica takes the rest"


def test_a_replica_that_fails_is_left_alone_and_its_posts_go_to_another() -> None:
    source = LengthSource()
    dead = FaultyApp(LengthSource(), *[500] * 100)

    async def ask(*urls: str) -> float:
        started = time.monotonic()
        async with connected(*urls, batch_requests=1) as client:
            assert [reply.score for reply in await client.score(REQUESTS)] == SCORES
            assert client.paused is None
        return time.monotonic() - started

    with running(dead) as one, running(FaultyApp(source)) as other:
        assert asyncio.run(ask(one, other)) < 5
        assert asyncio.run(ask("http://127.0.0.1:1", other)) < 5
    assert 1 <= dead.requests <= 4, "only posts that were under way together"


def test_with_all_replicas_down_all_of_them_are_named() -> None:
    with pytest.raises(
        RewardUnavailable, match=r"127.0.0.1:1 and http://127.0.0.1:2 gave no .*127.0.0.1:[12]: Connect"
    ):
        score("http://127.0.0.1:1", "http://127.0.0.1:2", retry_s=0.3)


def test_at_the_start_every_replica_has_to_be_healthy() -> None:
    async def ask(*urls: str) -> None:
        async with connected(*urls, retry_s=0.5) as client:
            await client.healthy()

    with running(FaultyApp(LengthSource())) as one, running(FaultyApp(LengthSource(), 503)) as other:
        asyncio.run(ask(one, other))
        with pytest.raises(RewardUnavailable, match=r"GET /health .*127.0.0.1:1: ConnectError"):
            asyncio.run(ask(one, "http://127.0.0.1:1"))


def test_what_the_server_refuses_is_not_asked_again() -> None:
    app = FaultyApp(LengthSource(), token="sesame-open")
    with running(app) as url:
        with pytest.raises(RewardRefused, match="HTTP 401") as caught:
            score(url, token="wrong-secret")
        assert "wrong-secret" not in str(caught.value)
        assert app.requests == 1
        assert [reply.score for reply in score(url, token="sesame-open")] == SCORES


def test_a_refusal_carries_the_servers_reason() -> None:
    app = FaultyApp(LengthSource(), limits=Limits(max_requests=2))
    with running(app) as url, pytest.raises(RewardRefused, match="more than 2 requests in one post"):
        score(url)
    assert app.requests == 1


def test_many_requests_are_split_into_posts_and_keep_their_order() -> None:
    source = LengthSource()
    requests = [
        ScoreRequest(id=str(n), prompt=REQUESTS[0].prompt, response="y" * (n * 37 % 50), ended=False)
        for n in range(103)
    ]
    app = FaultyApp(source, None, 500, None, limits=Limits(max_requests=10))
    with running(app) as url:
        replies = score(url, requests=requests, batch_requests=10, max_in_flight=2)
    assert [reply.id for reply in replies] == [str(n) for n in range(103)]
    assert [reply.score for reply in replies] == [float(n * 37 % 50) for n in range(103)]
    assert app.requests == 12


def test_no_requests_need_no_server() -> None:
    assert score("http://127.0.0.1:1", requests=[]) == []


def test_the_same_key_may_be_scored_again_with_another_text() -> None:
    with running(FaultyApp(LengthSource())) as url:

        async def twice() -> list[float]:
            async with connected(url) as client:
                first = await client.score([REQUESTS[1]])
                second = await client.score([REQUESTS[1].model_copy(update={"response": "longer"})])
                return [first[0].score, second[0].score]

        assert asyncio.run(twice()) == [1.0, 6.0]


def test_health_waits_for_a_server_that_can_score() -> None:
    async def ask(url: str, retry_s: float) -> None:
        async with connected(url, retry_s=retry_s) as client:
            await client.healthy()

    with running(FaultyApp(LengthSource(), 503, 503)) as url:
        asyncio.run(ask(url, 10.0))
    with (
        running(FaultyApp(LengthSource(), *[503] * 1000)) as url,
        pytest.raises(RewardUnavailable, match=r"GET /health .*HTTP 503"),
    ):
        asyncio.run(ask(url, 0.3))


def test_a_cancelled_call_leaves_a_client_that_works() -> None:
    async def cancel(url: str) -> list[ScoreReply]:
        async with connected(url) as client:
            asking = asyncio.create_task(client.score(REQUESTS))
            await asyncio.sleep(0.2)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            return await client.score(REQUESTS)

    with running(FaultyApp(LengthSource(), "hang")) as url:
        assert [reply.score for reply in asyncio.run(cancel(url))] == SCORES
