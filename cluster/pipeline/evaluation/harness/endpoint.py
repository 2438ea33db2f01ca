"""A fleet as an endpoint: the part of OpenAI's /v1/completions that lm-evaluation-harness's local-completions reads.

It listens on the loopback alone, and to whoever has its token. Prompts are token ids. Requests go through the
generators of a fleet in waves, with the budget of attempts that prompts have.
"""

import asyncio
import hmac
import json
import secrets
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actors.chat import TextEncoding
from actors.config import RolloutConfig
from actors.sampling import Answers, Fleet, Generator, Waves
from actors.trajectory import Ticket

LANES = 2
"""Waves under way at a generator."""
_MOST_BYTES = 64 * 2**20
_CONTENT = "application/json"


class Echoing(Generator, Protocol):
    """A generator that also tells log-probs of a prompt, as `actors.generator.Generator` documents."""

    async def echo(self, sequences: list[list[int]]) -> list[tuple[list[float], list[float]]]: ...


class Request(BaseModel):
    """A post; what else it holds is refused, so that nothing is left out without a word."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    prompt: list[list[int]] = Field(min_length=1)
    max_tokens: int = Field(ge=1)
    temperature: float = Field(default=0, ge=0)
    seed: int = 0
    stop: list[str] = []
    echo: bool = False
    """the prompt's log-probs are wanted, and no more than one token after it"""
    logprobs: int | None = Field(default=None, le=1)


class Desk(Answers[Any]):
    """The requests that have no answer yet."""

    def __init__(self) -> None:
        super().__init__(0, lambda done: None)
        self.answered = 0
        self.asked: dict[int, tuple[Request, list[int]]] = {}
        self._futures: dict[int, asyncio.Future[Any]] = {}
        self._numbers = 0

    async def reply(self, request: Request) -> dict[str, Any]:
        """The body of the answer. Raises what generators fail with."""
        choices = await asyncio.gather(*(self._choice(request, ids) for ids in request.prompt))
        numbered = [{"index": index, **choice} for index, choice in enumerate(choices)]
        return {"object": "text_completion", "model": request.model, "choices": numbered}

    async def _choice(self, request: Request, ids: list[int]) -> dict[str, Any]:
        number, self._numbers = self._numbers, self._numbers + 1
        self.asked[number], self._futures[number] = (request, ids), asyncio.get_running_loop().create_future()
        self._waiting.put_nowait(Ticket(number=number, attempt=0))
        try:
            await asyncio.wait([self._futures[number], self.complete], return_when=asyncio.FIRST_COMPLETED)
            if self.complete.done():
                self.complete.result()
            found = self._futures[number].result()
        finally:
            del self.asked[number], self._futures[number]
        if request.echo:
            own, likeliest = found
            tops = [{"likeliest": one} for one in likeliest]
            return {"text": "", "logprobs": {"token_logprobs": [None, *own], "top_logprobs": [None, *tops]}}
        end = min((at for stop in request.stop if stop and (at := found.text.find(stop)) >= 0), default=None)
        ended = found.ended or end is not None
        return {"text": found.text[:end], "logprobs": None, "finish_reason": "stop" if ended else "length"}

    async def admit(self, n: int, holder: str) -> list[Ticket]:
        while not (tickets := [one for one in await super().admit(n, holder) if one.number in self.asked]):
            pass  # nobody waits for those any more
        return tickets

    def take(self, answers: dict[Ticket, Any]) -> None:
        """Hand answers to who waits for them."""
        self._out -= answers.keys()
        self.answered += len(answers)
        for ticket, answer in answers.items():
            if (future := self._futures.get(ticket.number)) and not future.done():
                future.set_result(answer)


@dataclass(slots=True, kw_only=True)
class _Completing(Waves[Any]):
    """Waves of requests."""

    generator: Echoing  # pyright: ignore[reportIncompatibleVariableOverride]
    desk: Desk

    def name(self, ticket: Ticket) -> str:
        return f"request {ticket.number} of lm-eval"

    async def answer(self, ticket: Ticket) -> Any:
        request, ids = self.desk.asked[ticket.number]
        async with asyncio.timeout(self.config.wave_deadline_s):
            if request.echo:
                (found,) = await self.generator.echo([ids])
            else:
                room, seeds = request.max_tokens, [request.seed]
                (found,) = await self.generator.generate([ids], seeds, room, request.temperature)
        return found

    async def take(self, answers: dict[Ticket, Any]) -> dict[Ticket, str]:
        self.desk.take(answers)
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where it listens."""

    url: str
    token: str
    desk: Desk
    """its `complete` fails when no answers can be had any more"""


@asynccontextmanager
async def serving(fleet: Fleet, encoding: TextEncoding, config: RolloutConfig) -> AsyncIterator[Endpoint]:
    """Listen while the block lasts."""
    desk, token = Desk(), secrets.token_hex(16)

    async def work(generator: Any, leave: asyncio.Event) -> None:
        waves = _Completing(generator=generator, tickets=desk, encoding=encoding, config=config, leave=leave, desk=desk)
        for error in await waves.work(LANES):
            raise error

    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(desk, token, asyncio.get_running_loop()))
    thread = threading.Thread(target=server.serve_forever, name="completions", daemon=True)
    thread.start()
    try:
        async with fleet.joining(), fleet.working(work, desk.fail):
            yield Endpoint(url=f"http://127.0.0.1:{server.server_port}/v1/completions", token=token, desk=desk)
    finally:
        desk.fail(ConnectionError("the endpoint is closed"))
        _ = desk.complete.exception()
        await asyncio.to_thread(server.shutdown)
        server.server_close()


def _handler(desk: Desk, token: str, loop: asyncio.AbstractEventLoop) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept
        timeout = 600.0

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), token.encode()):
                return self._answer(401, {"error": "the bearer token is missing or wrong"})
            if self.path != "/v1/completions" or not 0 < size <= _MOST_BYTES:
                return self._answer(404, {"error": "post a body of at most 64 MiB to /v1/completions"})
            try:
                request = Request.model_validate_json(self.rfile.read(size))
            except ValidationError as error:
                return self._answer(400, {"error": str(error)})
            try:
                self._answer(200, asyncio.run_coroutine_threadsafe(desk.reply(request), loop).result())
            except Exception as error:
                self._answer(503, {"error": f"{type(error).__name__}: {error}"})

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            text = json.dumps(body).encode()
            self.close_connection = self.close_connection or status != 200  # its body may be unread
            self.send_response(status)
            self.send_header("Content-Type", _CONTENT)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
