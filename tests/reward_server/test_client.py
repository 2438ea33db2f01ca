import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import uvicorn

from reward_server.app import Limits, create_app
from reward_server.client import RewardClient, RewardRefused, RewardUnavailable
from reward_server.schema import Message, ScoreReply, ScoreRequest

REQUESTS = [
    ScoreRequest(id=f"p/{n}", prompt=(Message(role="user", content="hi"),), response="x" * n, ended=True)
    for n in range(5)
]
SCORES = [0.0, 1.0, 2.0, 3.0, 4.0]


class LengthSource:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        self.seen += [request.id for request in requests]
        return [ScoreReply(id=request.id, score=float(len(request.response))) for request in requests]


class FaultyApp:
    """The real app behind a list of faults, one per request: a status, a change of the body, or "hang"."""

    def __init__(self, source: LengthSource, *faults: Any, token: str | None = None, limits: Limits | None = None):
        self.app = create_app(source, token, limits)
        self.faults = list(faults)
        self.requests = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.requests += 1
        fault = self.faults.pop(0) if self.faults else None
        if fault is None:
            await self.app(scope, receive, send)
            return
        sent: list[Any] = []

        async def keep(message: Any) -> None:
            sent.append(message)

        if fault == "hang":
            await asyncio.sleep(1.5)
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
async def connected(url: str, **options: Any) -> AsyncIterator[RewardClient]:
    settings: dict[str, Any] = {"deadline_s": 10.0, "first_delay_s": 0.01, "max_delay_s": 0.05} | options
    client = RewardClient(url, **settings)
    try:
        yield client
    finally:
        await client.close()


def score(url: str, requests: list[ScoreRequest] = REQUESTS, **options: Any) -> list[ScoreReply]:
    async def ask() -> list[ScoreReply]:
        async with connected(url, **options) as client:
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
        score(url, deadline_s=0.8, attempt_s=0.3)
    assert 0.7 < time.monotonic() - start < 4
    assert url in str(caught.value)
    assert "within 0.8 s" in str(caught.value)
    assert REASONS[name] in str(caught.value)


def test_retries_are_bounded_in_number() -> None:
    app = FaultyApp(LengthSource(), *[500] * 100)
    with running(app) as url, pytest.raises(RewardUnavailable, match="in 4 attempts"):
        score(url, max_retries=3)
    assert app.requests == 4


def test_a_server_that_is_down_is_named_with_the_refused_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(RewardUnavailable, match=f"127.0.0.1:{port} .*ConnectError"):
        score(f"http://127.0.0.1:{port}", deadline_s=0.3)


def test_a_server_that_comes_back_is_found_again() -> None:
    source = LengthSource()

    async def down_then_up() -> list[ScoreReply]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        async with connected(f"http://127.0.0.1:{port}") as client:
            asking = asyncio.create_task(client.score(REQUESTS))
            await asyncio.sleep(0.4)
            config = uvicorn.Config(create_app(source), port=port, log_level="critical", lifespan="off")
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, daemon=True)
            thread.start()
            try:
                return await asking
            finally:
                server.should_exit = True
                await asyncio.to_thread(thread.join, 10)

    assert [reply.score for reply in asyncio.run(down_then_up())] == SCORES


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
    with running(app) as url, pytest.raises(RewardRefused, match="5 requests in one post are more than 2"):
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
        replies = score(url, requests, batch_requests=10, max_in_flight=2)
    assert [reply.id for reply in replies] == [str(n) for n in range(103)]
    assert [reply.score for reply in replies] == [float(n * 37 % 50) for n in range(103)]
    assert app.requests == 12


def test_no_requests_need_no_server() -> None:
    assert score("http://127.0.0.1:1", []) == []


def test_the_same_key_may_be_scored_again_with_another_text() -> None:
    with running(FaultyApp(LengthSource())) as url:

        async def twice() -> list[float]:
            async with connected(url) as client:
                first = await client.score([REQUESTS[1]])
                second = await client.score([REQUESTS[1].model_copy(update={"response": "longer"})])
                return [first[0].score, second[0].score]

        assert asyncio.run(twice()) == [1.0, 6.0]


def test_health_waits_for_a_server_that_can_score() -> None:
    async def ask(url: str) -> None:
        async with connected(url, deadline_s=2.0) as client:
            await client.healthy()

    with running(FaultyApp(LengthSource(), 503, 503)) as url:
        asyncio.run(ask(url))
    with (
        running(FaultyApp(LengthSource(), *[503] * 1000)) as url,
        pytest.raises(RewardUnavailable, match=r"GET /health .*HTTP 503"),
    ):
        asyncio.run(ask(url))


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
