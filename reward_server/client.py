"""Ask a reward server for scores: deadlines, retries, and never a score that the server did not give."""

import asyncio
import random
import secrets
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
from pydantic import ValidationError

from reward_server.schema import ScoreBatch, ScoreBatchReply, ScoreReply, ScoreRequest

Answer = TypeVar("Answer")

_RETRIED_STATUS = frozenset({408, 425, 429})
_REPLY_BYTES = 65_536  # of a reply, beside what each request may take
_REPLY_BYTES_PER_REQUEST = 16_384


class RewardUnavailable(RuntimeError):
    """No valid scores before the deadline. The text names the server and the last reason."""


class RewardRefused(ValueError):
    """The server refuses the request itself (token, size, text), so asking again cannot help."""


class _Retry(Exception):
    """One attempt failed in a way that another may not."""


class RewardClient:
    """An asynchronous client of one reward server, for use in one event loop."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        deadline_s: float = 120.0,
        max_retries: int = 50,
        attempt_s: float = 60.0,
        first_delay_s: float = 0.2,
        max_delay_s: float = 5.0,
        batch_requests: int = 512,
        max_in_flight: int = 4,
    ) -> None:
        """Remember the settings; the first call connects.

        A call of `score` takes at most `deadline_s` seconds, retries included, one attempt `attempt_s`.
        Delays between attempts double from `first_delay_s` to `max_delay_s`, times a random 0.5 to 1. Calls
        are split into posts of `batch_requests`, of which `max_in_flight` are under way at once.
        """
        self.url = url.rstrip("/")
        self.deadline_s = deadline_s
        self.max_retries = max_retries
        self.attempt_s = attempt_s
        self.first_delay_s = first_delay_s
        self.max_delay_s = max_delay_s
        self.batch_requests = batch_requests
        self._headers = {"content-type": "application/json"}
        if token is not None:
            self._headers["authorization"] = f"Bearer {token}"
        self._in_flight = asyncio.Semaphore(max_in_flight)
        self._http: httpx.AsyncClient | None = None

    async def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        """One reply per request, in the same order.

        Retries of this call carry the same ids, so that the server counts them once. Raises RewardUnavailable
        at the deadline, RewardRefused when the server rejects the requests.
        """
        deadline = time.monotonic() + self.deadline_s
        chunks = [
            requests[start : start + self.batch_requests] for start in range(0, len(requests), self.batch_requests)
        ]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._score_chunk(chunk, deadline)) for chunk in chunks]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the first to fail has cancelled the others
        return [reply for task in tasks for reply in task.result()]

    async def healthy(self) -> None:
        """Return once the server has scored a probe; raises like `score` when it does not in time."""
        await self._ask("GET", "/health", None, _REPLY_BYTES, lambda body: None, time.monotonic() + self.deadline_s)

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    async def _score_chunk(self, requests: list[ScoreRequest], deadline: float) -> list[ScoreReply]:
        # A prefix of its own for each call: the same key may be scored again with another text (a resumed
        # run, an evaluation), which the server would otherwise have to take for a contradiction.
        prefix = secrets.token_hex(4)
        wire_ids = [f"{prefix}/{request.id}" for request in requests]
        batch = ScoreBatch(
            requests=[
                request.model_copy(update={"id": wire_id}) for request, wire_id in zip(requests, wire_ids, strict=True)
            ]
        )
        limit = _REPLY_BYTES + _REPLY_BYTES_PER_REQUEST * len(requests)
        async with self._in_flight:
            replies = await self._ask(
                "POST",
                "/score",
                batch.model_dump_json().encode(),
                limit,
                lambda body: _checked_replies(body, wire_ids),
                deadline,
            )
        return [reply.model_copy(update={"id": request.id}) for request, reply in zip(requests, replies, strict=True)]

    async def _ask(
        self,
        method: str,
        path: str,
        body: bytes | None,
        limit: int,
        read: Callable[[bytes], Answer],
        deadline: float,
    ) -> Answer:
        reason = "no time was left for an attempt"
        attempts = 0
        while (left := deadline - time.monotonic()) > 0 and attempts <= self.max_retries:
            attempts += 1
            try:
                async with asyncio.timeout(min(self.attempt_s, left)):
                    return read(await self._attempt(method, path, body, limit))
            except TimeoutError:
                if attempts == 1 or left >= self.attempt_s:  # else it says only that the deadline was near
                    reason = f"no answer within {min(self.attempt_s, left):.3g} s"
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
            except _Retry as error:
                reason = str(error)
            delay = min(self.max_delay_s, self.first_delay_s * 2 ** (attempts - 1)) * random.uniform(0.5, 1)
            await asyncio.sleep(max(0.0, min(delay, deadline - time.monotonic())))
        raise RewardUnavailable(
            f"the reward server {self.url} gave no valid answer to {method} {path} in {attempts} attempts "
            f"within {self.deadline_s:g} s; the last reason: {reason}"
        )

    async def _attempt(self, method: str, path: str, body: bytes | None, limit: int) -> bytes:
        if self._http is None:
            # Not the proxies and passwords of the environment: a token is only for the server that was named.
            self._http = httpx.AsyncClient(headers=self._headers, timeout=None, trust_env=False)
        async with self._http.stream(method, self.url + path, content=body) as response:
            answer = bytearray()
            async for piece in response.aiter_bytes():
                answer += piece
                if len(answer) > limit:
                    raise _Retry(f"the answer is longer than {limit} bytes")
        if response.status_code == 200:
            return bytes(answer)
        said = f"HTTP {response.status_code}: {bytes(answer[:500]).decode(errors='replace')}"
        if response.status_code >= 500 or response.status_code in _RETRIED_STATUS:
            raise _Retry(said)
        raise RewardRefused(f"the reward server {self.url} refuses {method} {path}: {said}")


def _checked_replies(body: bytes, ids: list[str]) -> list[ScoreReply]:
    """Replies to exactly these ids in this order, every score finite, or else a reason to ask again."""
    try:
        replies = ScoreBatchReply.model_validate_json(body).replies
    except ValidationError as error:
        first: Any = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "body"
        raise _Retry(f"malformed answer at {place}: {first['msg']}") from error
    if len(replies) != len(ids):
        raise _Retry(f"{len(replies)} scores for {len(ids)} requests")
    for reply, wanted in zip(replies, ids, strict=True):
        if reply.id != wanted:
            raise _Retry(f"a score for {reply.id!r} where {wanted!r} was asked for")
    return replies
