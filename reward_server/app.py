"""The reward server: POST /score and GET /health over one source."""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import socket
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reward_server.schema import Message, ScoreBatch, ScoreBatchReply, ScoreReply, ScoreRequest
from reward_server.sources import Source

_log = logging.getLogger(__name__)
_PROBE = ScoreRequest(id="health", prompt=(Message(role="user", content="Hello"),), response="Hi", ended=True)


class Limits(BaseModel):
    """What one server takes on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_body_bytes: int = Field(default=32 * 2**20, ge=1)
    """Largest body of a post."""
    max_requests: int = Field(default=4096, ge=1)
    """Most responses in a post."""
    max_waiting: int = Field(default=64, ge=1)
    """Posts computed or waiting; one more is turned away with 503."""
    read_s: float = Field(default=30.0, gt=0)
    """Seconds that a client has to send its body."""
    health_s: float = Field(default=60.0, gt=0)
    """Seconds that the probe of /health may take, waiting for its turn included."""
    remember: int = Field(default=100_000, ge=1)
    """Scores kept by request id, so that a retry is answered without computing again."""


class _Contradiction(Exception):
    """A known request id came with another content."""


class _Busy(Exception):
    """Too many posts are waiting."""


class _Scoring:
    """Scores batches one at a time in a thread of its own, and each request id once."""

    def __init__(self, source: Source, limits: Limits) -> None:
        self._source = source
        self._limits = limits
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")
        self._known: OrderedDict[str, tuple[bytes, asyncio.Task[list[ScoreReply]], int]] = OrderedDict()
        self._running: set[asyncio.Task[list[ScoreReply]]] = set()

    async def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        """Replies in the order of the requests; ids scored before, or being scored, are not scored again."""
        digests = [hashlib.sha256(request.model_dump_json().encode()).digest() for request in requests]
        for request, digest in zip(requests, digests, strict=True):
            if request.id in self._known and self._known[request.id][0] != digest:
                raise _Contradiction(
                    f"request id {request.id!r} was used before with another content; use an id for one response only"
                )
        new = [pair for pair in zip(requests, digests, strict=True) if pair[0].id not in self._known]
        if new:
            if len(self._running) >= self._limits.max_waiting:
                raise _Busy(f"{len(self._running)} posts are waiting; ask again later")
            running = self._start([request for request, _ in new])
            for position, (request, digest) in enumerate(new):
                self._known[request.id] = digest, running, position
        entries = [self._known[request.id] for request in requests]
        while len(self._known) > self._limits.remember:
            self._known.popitem(last=False)
        # Shielded: a client that hangs up must not undo the work that its retry will ask for.
        return [(await asyncio.shield(task))[position] for _, task, position in entries]

    async def probe(self) -> None:
        """Score a fixed response; raises what the source raises."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._scored, [_PROBE])

    def _start(self, requests: list[ScoreRequest]) -> asyncio.Task[list[ScoreReply]]:
        task = asyncio.create_task(self._compute(requests))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def _compute(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._scored, requests)
        except BaseException:
            for request in requests:
                self._known.pop(request.id, None)
            raise

    def _scored(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        replies = self._source.score(requests)
        if [reply.id for reply in replies] != [request.id for request in requests]:
            raise RuntimeError(f"the source gave {len(replies)} replies, but not the {len(requests)} asked for")
        return replies


def create_app(source: Source, token: str | None = None, limits: Limits | None = None) -> FastAPI:
    """Make the app; with a `token` every request must carry it as "Authorization: Bearer TOKEN".

    Answers 401 for a wrong token, 409 for an id that was used for another content, 413 and 422 for what is
    too large or malformed, 500 with the reason when the source fails, 503 when too much is waiting. It never
    makes a score up.
    """
    limits = limits or Limits()
    scoring = _Scoring(source, limits)

    def authorised(request: Request) -> None:
        if token is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    app = FastAPI(
        title="Rayward reward server",
        dependencies=[Depends(authorised)],
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )

    @app.post("/score")
    async def score(request: Request) -> Response:
        batch = _batch(await _body(request, limits), limits)
        try:
            replies = await scoring.score(batch.requests)
        except _Contradiction as error:
            raise HTTPException(409, str(error)) from error
        except _Busy as error:
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from error
        except Exception as error:
            refused = isinstance(error, ValueError) and not isinstance(error, ValidationError)
            if not refused:
                _log.exception("scoring %d requests failed", len(batch.requests))
            raise HTTPException(422 if refused else 500, f"{type(error).__name__}: {error}") from error
        return Response(ScoreBatchReply(replies=replies).model_dump_json(), media_type="application/json")

    @app.get("/health")
    async def health() -> dict[str, str]:
        try:
            async with asyncio.timeout(limits.health_s):
                await scoring.probe()
        except TimeoutError as error:
            raise HTTPException(503, f"no turn for the probe within {limits.health_s:g} s") from error
        except Exception as error:
            raise HTTPException(503, f"the probe failed: {type(error).__name__}: {error}") from error
        return {"status": "ok"}

    return app


async def _body(request: Request, limits: Limits) -> bytes:
    # A web page can make a browser post text to a loopback port, but not JSON without asking first.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the body must be application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(limits.read_s):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.max_body_bytes:
                    raise HTTPException(413, f"the body has more than {limits.max_body_bytes} bytes; split it")
    except TimeoutError as error:
        raise HTTPException(408, f"the body took longer than {limits.read_s:g} s") from error
    return bytes(body)


def _batch(body: bytes, limits: Limits) -> ScoreBatch:
    try:
        batch = ScoreBatch.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "body"
        raise HTTPException(422, f"{place}: {first['msg']}") from error
    if len(batch.requests) > limits.max_requests:
        raise HTTPException(
            413, f"{len(batch.requests)} requests in one post are more than {limits.max_requests}; send fewer"
        )
    return batch


class ScoreServer:
    """A reward server that runs in a thread of this process."""

    def __init__(self, server: uvicorn.Server, thread: threading.Thread, url: str) -> None:
        """Take a server that was started; `serve` makes one."""
        self._server = server
        self._thread = thread
        self.url = url

    def close(self, deadline_s: float = 10.0) -> None:
        """Stop taking requests, finish those under way; raises TimeoutError when that takes too long."""
        self._server.should_exit = True
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            self._server.force_exit = True
            raise TimeoutError(f"the reward server {self.url} has not stopped within {deadline_s:g} s")


def serve(
    source: Source,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    limits: Limits | None = None,
    deadline_s: float = 30.0,
) -> ScoreServer:
    """Start a reward server in a thread and return once it listens; port 0 takes a free one.

    Raises ValueError for an address off the loopback without a token, OSError when the port is taken,
    TimeoutError when it does not listen within `deadline_s` seconds.
    """
    if token is not None and not token.strip():
        raise ValueError("the reward server's token is empty; set a secret one, or none on the loopback")
    if token is None and not _is_loopback(host):
        raise ValueError(
            f"the reward server would listen on {host!r}, which others can reach, without a token; set one, "
            "or listen on 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    config = uvicorn.Config(
        create_app(source, token, limits),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="reward-server", daemon=True)
    thread.start()
    until = time.monotonic() + deadline_s
    while not server.started:
        if time.monotonic() > until or not thread.is_alive():
            server.should_exit = True
            raise TimeoutError(f"the reward server on {host}:{port} does not listen after {deadline_s:g} s")
        time.sleep(0.01)
    shown = f"[{host}]" if ":" in host else host
    return ScoreServer(server, thread, f"http://{shown}:{listener.getsockname()[1]}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
