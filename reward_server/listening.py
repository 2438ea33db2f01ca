"""What the HTTP servers of this package share: a thread that listens, bounded connections, bodies, the host's name."""

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import AsyncIterator
from typing import TypeVar
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel, ValidationError
from uvicorn.protocols.http.h11_impl import H11Protocol

from reward_server.config import Limits

_log = logging.getLogger(__name__)
CUT = 499
"""Nobody hears it: what nginx writes down when a client hangs up."""
Body = TypeVar("Body", bound=BaseModel)


def host_name(request: Request) -> str:
    """The name under which a server is asked, without its port; empty where there is none."""
    with contextlib.suppress(ValueError):
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    return ""


async def pieces(request: Request) -> AsyncIterator[bytes]:
    """The body of a post as it arrives. Raises HTTPException: 415 where it is no JSON, CUT when the client hangs up."""
    # A web page can make a browser post text to a loopback port, but not JSON without asking first.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the body must be application/json")
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            client = request.client.host if request.client else "a client"
            _log.warning("%s hung up before its post was whole: nothing of it is taken", client)
            raise HTTPException(CUT, "the post was cut off")
        yield message["body"]
        more = message["more_body"]


def parsed(kind: type[Body], body: bytes | bytearray) -> Body:
    """The body of a post. Raises HTTPException, 422, that says where it is malformed."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "body"
        raise HTTPException(422, f"{place:.200}: {first['msg']}") from error


def _bounded(limits: Limits) -> type[H11Protocol]:
    """HTTP on so many connections at most, each of which has to begin a request in time.

    One too many costs the oldest connection without a request.
    """
    idle: dict[H11Protocol, asyncio.TimerHandle] = {}

    class Bounded(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            super().connection_made(transport)
            self._look()
            if len(self.connections) > limits.max_connections:
                oldest = next(iter(idle))
                idle.pop(oldest).cancel()
                oldest.transport.abort()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._look()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._look()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self in idle:
                idle.pop(self).cancel()

        def _look(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                if self in idle:
                    idle.pop(self).cancel()
            elif self not in idle and not self.transport.is_closing():
                idle[self] = self.loop.call_later(limits.header_s, self.transport.abort)

    return Bounded


class Listening:
    """A server that runs in a thread of this process."""

    def __init__(self, server: uvicorn.Server, thread: threading.Thread, url: str, name: str) -> None:
        """Take a server that was started; `listen` makes one."""
        self._server = server
        self._thread = thread
        self._name = name
        self.url = url

    def close(self, deadline_s: float = 10.0) -> None:
        """Stop taking requests, finish those under way; raises TimeoutError when that takes too long."""
        self._server.should_exit = True
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            self._server.force_exit = True
            raise TimeoutError(f"{self._name} {self.url} has not stopped within {deadline_s:g} s")


def listen(
    app: FastAPI,
    name: str,
    host: str,
    port: int,
    limits: Limits | None = None,
    deadline_s: float = 30.0,
    proxied: bool = False,
) -> Listening:
    """Serve an app in a thread and return once it listens; port 0 takes a free one, `name` is for messages.

    With `proxied` a proxy on this machine is believed whom it asks for, and whether by TLS (X-Forwarded-For, -Proto).

    Raises OSError when the port is taken, TimeoutError when it does not listen within `deadline_s` seconds.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise OSError(
            error.errno, f"{name} cannot listen on {host}:{port} ({reason}); take another port, or 0"
        ) from error
    config = uvicorn.Config(
        app,
        http=_bounded(limits or Limits()),
        proxy_headers=proxied,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name=name, daemon=True)
    thread.start()
    until = time.monotonic() + deadline_s
    while not server.started:
        if time.monotonic() > until or not thread.is_alive():
            server.should_exit = True
            raise TimeoutError(f"{name} on {host}:{port} does not listen after {deadline_s:g} s")
        time.sleep(0.01)
    shown = f"[{host}]" if ":" in host else host
    return Listening(server, thread, f"http://{shown}:{listener.getsockname()[1]}", name)
