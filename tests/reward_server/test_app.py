import asyncio
import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from reward_server.app import Limits, ScoreServer, create_app, serve
from reward_server.bodies import Bodies
from reward_server.schema import ScoreBatch, ScoreReply, ScoreRequest
from reward_server.scorer import InputTooLong
from reward_server.sources import Source


class CountingSource(Source):
    """Scores the length of a response, and remembers what it was asked; some responses are special."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False

    def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        self.seen.append([request.id for request in requests])
        assert self.gate.wait(10)
        if self.broken:
            raise RuntimeError("out of memory")
        if any(request.response == "long" for request in requests):
            raise InputTooLong("request 'x' has 9 tokens")
        if any(request.response == "lost" for request in requests):
            return []
        return [ScoreReply(id=request.id, score=float(len(request.response))) for request in requests]

    def tokens(self, requests: list[ScoreRequest]) -> list[int]:
        return [len(request.response) for request in requests]


@pytest.fixture
def source() -> CountingSource:
    return CountingSource()


@pytest.fixture
def server(source: CountingSource) -> Iterator[ScoreServer]:
    with serving(source) as running:
        yield running


@contextmanager
def serving(source: CountingSource, **options: object) -> Iterator[ScoreServer]:
    running = serve(source, **options)  # pyright: ignore[reportArgumentType]
    try:
        yield running
    finally:
        source.gate.set()
        running.close()


def wire(name: str, response: str = "abc") -> dict[str, object]:
    return {"id": name, "prompt": [{"role": "user", "content": "hi"}], "response": response, "ended": True}


def post(server: ScoreServer, *requests: dict[str, object], headers: dict[str, str] | None = None) -> httpx.Response:
    return httpx.post(f"{server.url}/score", json={"requests": list(requests)}, headers=headers, timeout=20)


def test_one_finite_score_a_request_in_their_order(server: ScoreServer) -> None:
    answer = post(server, wire("b", "12"), wire("a", "12345"))
    assert answer.status_code == 200
    assert answer.json() == {
        "replies": [{"id": "b", "score": 2.0, "parts": {}}, {"id": "a", "score": 5.0, "parts": {}}]
    }


def test_a_repeated_id_is_answered_from_memory(server: ScoreServer, source: CountingSource) -> None:
    first = post(server, wire("a"), wire("b"))
    again = post(server, wire("b"), wire("c"), wire("a"))
    assert first.json()["replies"] == [again.json()["replies"][index] for index in (2, 0)]
    assert source.seen == [["a", "b"], ["c"]]


def test_a_retry_while_the_first_is_computed_waits_for_it(server: ScoreServer, source: CountingSource) -> None:
    source.gate.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/score", json={"requests": [wire("a")]}, timeout=0.3)
    answers: list[httpx.Response] = []
    retry = threading.Thread(target=lambda: answers.append(post(server, wire("a"))))
    retry.start()
    time.sleep(0.2)
    source.gate.set()
    retry.join(10)
    assert answers[0].json()["replies"][0]["score"] == 3.0
    assert source.seen == [["a"]]


def test_an_id_with_another_content_is_a_conflict(server: ScoreServer) -> None:
    post(server, wire("a", "one"))
    answer = post(server, wire("a", "other"))
    assert answer.status_code == 409
    assert "'a' was used before with another content" in answer.json()["detail"]


def test_a_failure_is_no_score_and_is_forgotten(server: ScoreServer, source: CountingSource) -> None:
    source.broken = True
    answer = post(server, wire("a"))
    assert answer.status_code == 500
    assert answer.json()["detail"] == "RuntimeError: out of memory"
    source.broken = False
    assert post(server, wire("a")).json()["replies"][0]["score"] == 3.0


def test_what_the_source_refuses_is_422_and_what_it_loses_500(server: ScoreServer) -> None:
    answer = post(server, wire("a", "long"))
    assert answer.status_code == 422
    assert answer.json()["detail"] == "InputTooLong: request 'x' has 9 tokens"
    answer = post(server, wire("b", "lost"))
    assert answer.status_code == 500
    assert "0 replies, but not the 1 asked for" in answer.json()["detail"]


def test_memory_of_ids_is_bounded(source: CountingSource) -> None:
    with serving(source, limits=Limits(remember=2)) as server:
        for name in ("a", "b", "c", "c", "b", "a"):
            assert post(server, wire(name)).status_code == 200
    assert source.seen == [["a"], ["b"], ["c"], ["a"]]


def test_one_clients_bad_request_does_not_fail_those_it_was_merged_with(
    server: ScoreServer, source: CountingSource
) -> None:
    source.gate.clear()
    statuses: dict[str, int] = {}

    def ask(name: str, response: str) -> None:
        statuses[name] = post(server, wire(name, response)).status_code

    threads = [
        threading.Thread(target=ask, args=pair) for pair in (("0", "abc"), ("1", "good"), ("2", "long"), ("3", "fine"))
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    source.gate.set()
    for thread in threads:
        thread.join(10)
    assert statuses == {"0": 200, "1": 200, "2": 422, "3": 200}


def test_the_metrics_tell_what_was_asked_refused_and_computed_and_by_which_copy(
    server: ScoreServer, source: CountingSource
) -> None:
    post(server, wire("a", "12"), wire("b", "1234"))
    post(server, wire("c", "long"))
    post(server, wire("a", "other"))
    httpx.post(f"{server.url}/score", content=b"{", headers={"content-type": "application/json"})
    page = httpx.get(f"{server.url}/metrics").text
    copy = f'replica="{socket.gethostname()}:{os.getpid()}"'
    for line in (
        f'rayward_reward_posts_total{{{copy},status="200"}} 1.0',
        f'rayward_reward_posts_total{{{copy},status="422"}} 2.0',
        f'rayward_reward_refused_total{{reason="cannot be scored",{copy}}} 1.0',
        f'rayward_reward_refused_total{{reason="malformed",{copy}}} 1.0',
        f'rayward_reward_refused_total{{reason="contradiction",{copy}}} 1.0',
        f"rayward_reward_responses_total{{{copy}}} 2.0",
        f"rayward_reward_tokens_total{{{copy}}} 6.0",
        f"rayward_reward_batch_responses_sum{{{copy}}} 2.0",
        f"rayward_reward_seconds_count{{{copy}}} 4.0",
        f"rayward_reward_waiting_posts{{{copy}}} 0.0",
        f"rayward_reward_waiting_responses{{{copy}}} 0.0",
        f"rayward_reward_known_ids{{{copy}}} 2.0",
    ):
        assert line in page, line
    computing = re.search(r"rayward_reward_computing_seconds_total\{.*\} (\S+)", page)
    assert computing is not None
    assert 0 < float(computing[1]) < 5


def test_the_openapi_page_describes_the_body_and_the_reply(server: ScoreServer) -> None:
    schema = httpx.get(f"{server.url}/openapi.json").json()
    route = schema["paths"]["/score"]["post"]
    body = route["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    reply = route["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    assert (body, reply) == ("#/components/schemas/ScoreBatch", "#/components/schemas/ScoreBatchReply")
    shapes = schema["components"]["schemas"]
    assert shapes["ScoreBatch"]["properties"]["requests"]["items"] == {"$ref": "#/components/schemas/ScoreRequest"}
    assert set(shapes["ScoreRequest"]["required"]) == {"id", "prompt", "response", "ended"}
    assert set(route["responses"]) == {"200", "408", "409", "413", "415", "421", "422", "500", "503"}


def test_the_page_of_the_api_needs_no_token_nor_anything_from_elsewhere(source: CountingSource) -> None:
    with serving(source, token="sesame-open") as server:
        page = httpx.get(f"{server.url}/docs")
        assert page.status_code == 200
        assert "sesame-open" not in page.text
        loaded = re.findall(r'(?:href|src)="([^"]*)"', page.text)
        assert len(loaded) == 3
        for name in loaded:
            assert not name.startswith(("http:", "https:", "//", "/")), name
            answer = httpx.get(f"{server.url}/{name}")
            assert answer.status_code == 200
            assert len(answer.content) > 500
        assert httpx.get(f"{server.url}/docs/index.html").status_code == 404
        found = re.search(r'"spec": (\{.*\}),\n', page.text)
        assert found is not None
        schema = httpx.get(f"{server.url}/openapi.json", headers={"authorization": "Bearer sesame-open"}).json()
        assert json.loads(found[1]) == schema, "the page describes what is served"


def test_the_description_names_the_bearer_token_where_one_is_needed(source: CountingSource) -> None:
    """Else the page would have no "Authorize"."""
    with serving(source, token="sesame-open") as server:
        schema = httpx.get(f"{server.url}/openapi.json", headers={"authorization": "Bearer sesame-open"}).json()
    assert all("401" in route["responses"] for path in schema["paths"].values() for route in path.values())
    (scheme,) = schema["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert all(
        route["security"] == [{"HTTPBearer": []}] for path in schema["paths"].values() for route in path.values()
    )
    assert set(schema["paths"]) == {"/score", "/health", "/metrics"}
    with serving(source) as server:
        assert "securitySchemes" not in httpx.get(f"{server.url}/openapi.json").json()["components"]


def test_more_than_may_wait_is_turned_away(source: CountingSource) -> None:
    with serving(source, limits=Limits(max_waiting=1)) as server:
        source.gate.clear()
        waiting = threading.Thread(target=post, args=(server, wire("a")))
        waiting.start()
        while not source.seen:
            time.sleep(0.01)
        answer = post(server, wire("b"))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        source.gate.set()
        waiting.join(10)
        assert post(server, wire("b")).status_code == 200


def test_limits_on_requests_and_bytes(source: CountingSource) -> None:
    with serving(source, limits=Limits(max_requests=2, max_body_bytes=5_000)) as server:
        answer = post(server, wire("a"), wire("b"), wire("c"))
        assert answer.status_code == 413
        assert "more than 2 requests in one post" in answer.json()["detail"]
        answer = post(server, wire("a", "x" * 6_000))
        assert answer.status_code == 413
        assert "more than 5000 bytes" in answer.json()["detail"]

        def chunks() -> Iterator[bytes]:
            for _ in range(10):
                yield b" " * 1_000

        headers = {"content-type": "application/json"}
        assert httpx.post(f"{server.url}/score", content=chunks(), headers=headers).status_code == 413
    assert source.seen == []


def silent(server: ScoreServer, sent: bytes = b"") -> socket.socket:
    """A connection on which no more is said."""
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    connection.sendall(sent)
    connection.setblocking(False)
    return connection


def is_open(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def until(said: Callable[[], object], within_s: float = 10) -> None:
    end = time.monotonic() + within_s
    while not said():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_silent_connections_are_closed_and_shut_nobody_out(source: CountingSource) -> None:
    with serving(source, limits=Limits(max_connections=20, header_s=60)) as server:
        connections = [silent(server) for _ in range(500)]
        assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
        until(lambda: sum(map(is_open, connections)) <= 20)
        assert any(map(is_open, connections))
    with serving(source, limits=Limits(header_s=0.5)) as server:
        connections = [silent(server) for _ in range(20)]
        until(lambda: not any(map(is_open, connections)))


def test_headers_have_a_deadline_however_they_trickle(source: CountingSource) -> None:
    with serving(source, limits=Limits(header_s=0.5)) as server:
        connection = silent(server, b"POST /score HTTP/1.1\r\nHost: localhost\r\nX: ")
        end = time.monotonic() + 10
        while is_open(connection):
            assert time.monotonic() < end
            with suppress(ConnectionError):
                connection.send(b"x")
            time.sleep(0.1)


def head(length: int) -> bytes:
    lines = ("POST /score HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {length}")
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


def test_a_body_has_a_deadline_too(source: CountingSource) -> None:
    with serving(source, limits=Limits(read_s=0.3)) as server:
        connection = silent(server, head(100) + b"{")
        connection.settimeout(10)
        assert connection.recv(100).startswith(b"HTTP/1.1 408 Request Timeout")


def test_a_post_that_is_cut_off_is_one_line_in_the_log(
    server: ScoreServer, source: CountingSource, caplog: pytest.LogCaptureFixture
) -> None:
    silent(server, head(100) + b"{" * 7).close()
    until(lambda: 'reason="cut off"' in httpx.get(f"{server.url}/metrics").text)
    (line,) = caplog.messages
    assert line == "127.0.0.1 hung up before its post was whole: nothing of it is taken"
    assert source.seen == []


def test_the_bytes_of_all_posts_under_way_are_bounded(source: CountingSource) -> None:
    with serving(source, limits=Limits(max_bytes=5_000)) as server:
        source.gate.clear()
        waiting = threading.Thread(target=post, args=(server, wire("a", "x" * 3_000)))
        waiting.start()
        until(lambda: source.seen)
        answer = post(server, wire("b", "x" * 3_000))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "hold more than 5000 bytes" in answer.json()["detail"]
        source.gate.set()
        waiting.join(10)
        assert post(server, wire("b", "x" * 3_000)).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"requests": [' + b",".join([b"{}"] * 3) + b"]}",
        b'{"requests": [{"id": "a", "prompt": [' + b"0," * 1_000,
        b"[" * 1_000,
    ],
)
def test_requests_are_counted_before_they_are_parsed(server: ScoreServer, source: CountingSource, body: bytes) -> None:
    with serving(source, limits=Limits(max_requests=2)) as server:
        answer = httpx.post(f"{server.url}/score", content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()) == (413, {"detail": "more than 2 requests in one post; send fewer"})


@given(st.lists(st.text('\\"{}[],a\u00fc\n', max_size=12), min_size=1, max_size=6), st.integers())
def test_whatever_the_texts_the_requests_are_counted_right(texts: list[str], seed: int) -> None:
    body = json.dumps({"requests": [wire(text, text) for text in texts]}).encode()
    cuts = sorted(random.Random(seed).choices(range(len(body)), k=4))

    async def read(most: int) -> bytes:
        async def pieces() -> AsyncIterator[bytes]:
            for start, end in pairwise([0, *cuts, len(body)]):
                yield body[start:end]

        async with Bodies(Limits(max_requests=most)).read(pieces()) as whole:
            return bytes(whole)

    assert asyncio.run(read(len(texts))) == body
    if len(texts) > 1:
        with pytest.raises(ValueError, match="more than"):
            asyncio.run(read(len(texts) - 1))


def test_a_post_that_has_an_id_twice_holds_nobody_up(source: CountingSource) -> None:
    requests = [wire(str(number)) for number in range(30_000)]
    answers: list[httpx.Response] = []
    with serving(source, limits=Limits(max_requests=40_000)) as server:
        posting = threading.Thread(target=lambda: answers.append(post(server, *requests, requests[-1])))
        posting.start()
        slowest = 0.0
        while posting.is_alive():
            started = time.monotonic()
            assert httpx.get(f"{server.url}/health", timeout=20).status_code == 200
            slowest = max(slowest, time.monotonic() - started)
    assert answers[0].status_code == 422
    assert "request id '29999' occurs more than once" in answers[0].json()["detail"]
    assert slowest < 3


def test_without_a_token_only_the_names_of_the_loopback_are_answered(source: CountingSource) -> None:
    with serving(source) as server:
        for name, status in {"localhost:1": 200, "[::1]": 200, "127.0.0.1": 200, "a_b.example": 421, "": 421}.items():
            assert httpx.get(f"{server.url}/health", headers={"host": name}).status_code == status, name
        answer = httpx.post(f"{server.url}/score", json={"requests": [wire("a")]}, headers={"host": "rebound.example"})
        assert answer.status_code == 421
        assert "answers only as 127.0.0.1 or localhost, not 'rebound.example'" in answer.json()["detail"]
    with serving(source, token="sesame-open") as server:
        headers = {"host": "scores.example", "authorization": "Bearer sesame-open"}
        assert httpx.get(f"{server.url}/health", headers=headers).status_code == 200


def test_no_answer_holds_a_secret_or_what_a_terminal_obeys(
    source: CountingSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789abcdef")
    monkeypatch.setattr(source, "score", lambda requests: {}["canary-0123456789abcdef\x1b[2J"])
    with serving(source) as server:
        for answer in (post(server, wire("a")), httpx.get(f"{server.url}/health")):
            assert answer.json()["detail"].endswith("KeyError: '[HF_TOKEN]\\x1b[2J'")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "Invalid JSON"),
        (b'{"requests": []}', "requests"),
        (b'{"requests": [{"id": "a"}]}', "requests.0.prompt"),
        (b"\xff\xfe", "Invalid JSON"),
        (b"[" * 100_000, "recursion limit"),
    ],
)
def test_a_malformed_body_is_422_with_the_place(server: ScoreServer, body: bytes, reason: str) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/score", content=body, headers=headers)
    assert answer.status_code == 422
    assert reason in answer.json()["detail"]


def test_only_json_is_read_so_that_web_pages_cannot_post(server: ScoreServer, source: CountingSource) -> None:
    answer = httpx.post(f"{server.url}/score", content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    assert source.seen == []


def test_a_token_is_needed_everywhere_once_it_is_set(source: CountingSource) -> None:
    with serving(source, token="sesame-open") as server:
        for headers in (None, {"authorization": "Bearer wrong"}, {"authorization": "sesame-open"}):
            assert post(server, wire("a"), headers=headers).status_code == 401
            for path in ("health", "metrics", "openapi.json"):
                assert httpx.get(f"{server.url}/{path}", headers=headers).status_code == 401
        assert source.seen == []
        right = {"authorization": "Bearer sesame-open"}
        assert post(server, wire("a"), headers=right).status_code == 200
        assert httpx.get(f"{server.url}/health", headers=right).json() == {"status": "ok"}
        assert httpx.get(f"{server.url}/openapi.json", headers=right).status_code == 200


def test_health_scores_a_probe(server: ScoreServer, source: CountingSource) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert [[name.partition("/")[0] for name in batch] for batch in source.seen] == [["health"]]
    source.broken = True
    answer = httpx.get(f"{server.url}/health")
    assert answer.status_code == 503
    assert "out of memory" in answer.json()["detail"]


def test_health_that_gets_no_turn_is_no_health(source: CountingSource) -> None:
    with serving(source, limits=Limits(health_s=0.2)) as server:
        source.gate.clear()
        answer = httpx.get(f"{server.url}/health", timeout=10)
        assert answer.status_code == 503
        assert "no turn for the probe within 0.2 s" in answer.json()["detail"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "example.org"])
def test_an_address_that_others_reach_needs_a_token(source: CountingSource, host: str) -> None:
    with pytest.raises(ValueError, match="without a token"):
        serve(source, host=host)


def test_an_empty_token_is_refused(source: CountingSource) -> None:
    with pytest.raises(ValueError, match="token is empty"):
        serve(source, token=" ")


def test_a_taken_port_is_an_error_and_a_closed_server_is_gone(source: CountingSource) -> None:
    first = serve(source)
    port = int(first.url.rpartition(":")[2])
    said = rf"cannot listen on 127\.0\.0\.1:{port} \(Address already in use\); take another port, or 0"
    with pytest.raises(OSError, match=said):
        serve(source, port=port)
    first.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{first.url}/health")
    serve(source, port=port).close()


def test_a_cancelled_post_does_not_undo_its_work(source: CountingSource) -> None:
    async def cancel_then_ask_again() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(source))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"requests": [wire("a")]}
            source.gate.clear()
            first = asyncio.create_task(client.post("/score", json=body))
            while not source.seen:
                await asyncio.sleep(0.01)
            first.cancel()
            await asyncio.wait([first])
            source.gate.set()
            return await client.post("/score", json=body)

    answer = asyncio.run(cancel_then_ask_again())
    assert answer.json()["replies"][0]["score"] == 3.0
    assert source.seen == [["a"]]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = {
    "id": st.just("a") | JSON,
    "prompt": st.just([{"role": "user", "content": "x"}]) | st.lists(st.fixed_dictionaries({"role": JSON}), max_size=2),
    "response": st.text(max_size=5) | JSON,
    "ended": st.booleans() | JSON,
}
# A batch with a field or two spoilt, left out or made up gets further than any JSON does.
BATCHES = st.fixed_dictionaries(
    {"requests": st.lists(st.fixed_dictionaries({}, optional=FIELDS | {"extra": JSON}), max_size=3)}
)
BODIES = (JSON | BATCHES).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60)


@settings(max_examples=300, deadline=None)
@given(BODIES)
def test_any_body_is_a_right_batch_or_refused_with_a_reason(body: bytes) -> None:
    source = CountingSource()

    async def post() -> httpx.Response:
        app = httpx.ASGITransport(create_app(source))
        async with httpx.AsyncClient(transport=app, base_url="http://localhost") as client:
            return await client.post("/score", content=body, headers={"content-type": "application/json"})

    reply = asyncio.run(post())
    try:
        batch = ScoreBatch.model_validate_json(body)
    except ValidationError:
        assert reply.status_code == 422
        assert len(reply.json()["detail"]) > 5
        assert source.seen == [], "what is malformed is never scored"
    else:
        assert reply.status_code in (200, 422), reply.text  # the source may refuse: "long"
        assert reply.status_code == 422 or len(reply.json()["replies"]) == len(batch.requests)
