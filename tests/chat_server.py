"""Stands in for an OpenAI-compatible server of a chat model, which answers, fails or says nothing as a test wants."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

Answer = str | int | None | dict[str, Any]
"""A text, a status, silence, or a whole body."""


class ChatServer:
    """Answers POST /v1/chat/completions by a function of the question."""

    def __init__(self, answer: Callable[[str], Answer]) -> None:
        self.answer = answer
        self.url = ""
        self.asked: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        assert (scope["method"], scope["path"]) == ("POST", "/v1/chat/completions")
        request = json.loads(body)
        question = request["messages"][-1]["content"]
        self.requests.append(request)
        self.asked.append(question)
        self.tokens.append(next((value.decode() for name, value in scope["headers"] if name == b"authorization"), None))
        answer = self.answer(question)
        if answer is None:
            await asyncio.sleep(0.8)
        status = answer if isinstance(answer, int) else 200
        said = {"choices": [{"index": 0, "message": {"role": "assistant", "content": answer}}]}
        reply = answer if isinstance(answer, dict) else said if status == 200 else {"error": f"no, {status}"}
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(reply).encode()})


@contextmanager
def serving(answer: Callable[[str], Answer]) -> Iterator[ChatServer]:
    app, listener = ChatServer(answer), socket.create_server(("127.0.0.1", 0))
    config: Any = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    app.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    try:
        yield app
    finally:
        server.should_exit = True
        thread.join(10)
