"""Ask a reward server for scores: deadlines, retries, then a pause, and never a score that the server did not give."""

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from reward_server.replicas import Replica, Replicas, RewardRefused, Unanswered
from reward_server.schema import Pause, ScoreBatch, ScoreBatchReply, ScoreReply, ScoreRequest

__all__ = ["Pause", "RewardClient", "RewardRefused", "RewardUnavailable"]
Answer = TypeVar("Answer")

_FIRST_DELAY_S, _MAX_DELAY_S = 0.2, 5.0
_REPLY_BYTES = 65_536  # of a reply, beside what each request may take
_REPLY_BYTES_PER_REQUEST = 16_384
log = logging.getLogger(__name__)


class RewardUnavailable(RuntimeError):
    """No valid scores before the deadline. The text names the server and the last reason."""


class RewardClient:
    """An asynchronous client of one reward service and its replicas, for use in one event loop."""

    def __init__(
        self,
        urls: str | Sequence[str],
        token: str | None = None,
        *,
        retry_s: float = 120.0,
        pause_s: float = 0.0,
        attempt_s: float = 60.0,
        ask_s: float = 10.0,
        batch_requests: int = 512,
        max_in_flight: int = 4,
        called: str = "the reward server",
    ) -> None:
        """Remember the settings; the first call connects.

        A call of `score` is split into posts of `batch_requests`, of which `max_in_flight` for each replica are under
        way at once. An attempt takes at most `attempt_s` seconds; it goes to the replica with the fewest posts. One
        post is tried again for `retry_s` seconds, with delays that double from 0.2 to 5 s, times a random 0.5 to 1.
        Then it is paused, for at most `pause_s` seconds: each `ask_s`, times a random 0.5 to 1, it is tried once more
        if the service is healthy. Errors say `called` of the service.
        """
        self.urls = (urls,) if isinstance(urls, str) else tuple(urls)
        self.retry_s = retry_s
        self.pause_s = pause_s
        self.attempt_s = attempt_s
        self.ask_s = ask_s
        self.batch_requests = batch_requests
        self.paused: Pause | None = None
        """Why and since when the oldest paused post waits; None while there is none."""
        self._replicas = Replicas(self.urls, token, called)
        self._in_flight = asyncio.Semaphore(max_in_flight * len(self.urls))
        self._paused: dict[object, Pause] = {}
        self._working = asyncio.Event()
        self._working.set()
        self._through = asyncio.Event()
        self._ended = ""
        self._pauses_s = self._paused_at = 0.0

    async def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        """One reply per request, in the same order.

        Retries carry the same ids, so that the server counts them once. Raises RewardUnavailable when the pause is
        over, RewardRefused when the server rejects the requests.
        """
        chunks = [
            requests[start : start + self.batch_requests] for start in range(0, len(requests), self.batch_requests)
        ]
        replies = await _together([self._score_chunk(chunk) for chunk in chunks])
        return [reply for chunk in replies for reply in chunk]

    async def post(self, path: str, body: bytes, read: Callable[[bytes], Answer]) -> Answer:
        """What `read` makes of the answer to any other post; it raises ValueError for one that is not valid.

        Retried as `score` is, but not paused. Raises as `score` does.
        """

        async def ask(seconds: float) -> Answer:
            replica = self._replicas.next()
            answer = await self._replicas.ask(replica, path, body, _REPLY_BYTES + _REPLY_BYTES_PER_REQUEST, seconds)
            try:
                return read(answer)
            except ValueError as error:
                raise self._replicas.failed(replica, str(error)) from error

        async with self._in_flight:
            return await self._answered(f"POST {path}", ask, 0.0)

    async def healthy(self) -> None:
        """Return once every replica has scored a probe; raises like `score`, without a pause, when one does not."""

        def ask(replica: Replica) -> Callable[[float], Coroutine[Any, Any, bytes]]:
            return lambda seconds: self._replicas.ask(replica, "/health", None, _REPLY_BYTES, seconds)

        await _together([self._answered("GET /health", ask(replica), 0.0) for replica in self._replicas.all])

    async def ready(self) -> None:
        """Return at once, or when the pause is over: what is sampled meanwhile could not be scored."""
        await self._working.wait()

    @property
    def paused_s(self) -> float:
        """Seconds of all pauses so far."""
        return self._pauses_s + (time.monotonic() - self._paused_at if self.paused else 0.0)

    def moved(self, index: int, url: str) -> None:
        """Ask replica `index` at another address from now on, where it was started again."""
        self.urls = (*self.urls[:index], url, *self.urls[index + 1 :])
        self._replicas.all[index].url, self._replicas.all[index].rests_until = url.rstrip("/"), 0.0

    def end(self, reason: str) -> None:
        """Nobody will answer any more: raise RewardUnavailable from whatever waits for it, now and later."""
        self._ended = reason
        self._wake()

    async def close(self) -> None:
        """Close the connections."""
        await self._replicas.close()

    async def _score_chunk(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        # A prefix that the text decides: the same key may be scored again with another text (a resumed run, an
        # evaluation), which the server would otherwise have to take for a contradiction.
        wire = [r.model_copy(update={"id": f"{_digest(r)}/{r.id}"}) for r in requests]
        body = ScoreBatch(requests=wire).model_dump_json().encode()
        limit = _REPLY_BYTES + _REPLY_BYTES_PER_REQUEST * len(requests)
        mark = object()

        async def ask(seconds: float) -> list[ScoreReply]:
            replica, until = self._replicas.next(), time.monotonic() + seconds
            if mark in self._paused:
                await self._replicas.ask(replica, "/health", None, _REPLY_BYTES, seconds)
            answer = await self._replicas.ask(replica, "/score", body, limit, max(0.0, until - time.monotonic()))
            try:
                return _checked_replies(answer, [request.id for request in wire])
            except ValueError as error:
                raise self._replicas.failed(replica, str(error)) from error

        async with self._in_flight:
            try:
                replies = await self._answered("POST /score", ask, self.pause_s, mark)
            finally:
                self._go_on(mark)
        return [reply.model_copy(update={"id": request.id}) for request, reply in zip(requests, replies, strict=True)]

    async def _answered(
        self,
        what: str,
        ask: Callable[[float], Coroutine[Any, Any, Answer]],
        pause_s: float,
        mark: object = None,
    ) -> Answer:
        """What `ask(seconds)` returns, asked again for as long as it may be."""
        started, attempts, reason = time.monotonic(), 0, ""
        while not self._ended and (passed := time.monotonic() - started) < self.retry_s + pause_s:
            retrying = self.retry_s - passed
            left = retrying if retrying > 0 else retrying + pause_s
            if retrying <= 0:
                self._pause(mark, reason)
            attempts += 1
            try:
                return await ask(min(self.attempt_s, left))
            except Unanswered as error:
                if attempts == 1 or left >= self.attempt_s or not isinstance(error.__cause__, TimeoutError):
                    reason = str(error)  # else it says only that the deadline was near
            if retrying <= 0:
                left = self.retry_s + pause_s - (time.monotonic() - started)  # the attempt has taken of it
                await self._turn(min(left, self.ask_s * random.uniform(0.5, 1)))
            elif mark is None or not self._replicas.rested:  # else another replica is asked at once
                delay = min(_MAX_DELAY_S, _FIRST_DELAY_S * 2 ** min(attempts - 1, 9)) * random.uniform(0.5, 1)
                await asyncio.sleep(max(0.0, min(delay, self.retry_s - (time.monotonic() - started))))
        if self._ended:
            raise RewardUnavailable(f"no replica of the reward server is left: {self._ended}")
        spent = f"{self.retry_s:g} s" + (f" and a pause of {pause_s:g} s" if pause_s else "")
        raise RewardUnavailable(
            f"{self._replicas.called} {' and '.join(self.urls)} gave no valid answer to {what} in {attempts} attempts "
            f"within {spent}; the last reason: {reason or 'no time was left for an attempt'}"
        )

    def _pause(self, mark: object, reason: str) -> None:
        since = self._paused[mark].since if mark in self._paused else time.time()
        self._paused[mark] = Pause(since=since, reason=reason)
        if self.paused is None:
            log.warning(
                "paused: the reward service has given no scores for %.3g s; it is asked again for %.3g s, and nothing "
                "is sampled until it answers (%s)",
                self.retry_s,
                self.pause_s,
                reason,
            )
            self._working.clear()
            self._paused_at = time.monotonic()
        self.paused = next(iter(self._paused.values()))

    def _go_on(self, mark: object) -> None:
        """A post is done, or given up."""
        if self._paused.pop(mark, None) is None:
            return
        self._wake()  # the other posts that wait need not wait for their turn
        if self.paused is not None and not self._paused:
            seconds = time.monotonic() - self._paused_at
            self._pauses_s += seconds
            self._working.set()
            log.warning("the pause is over after %.0f s", seconds)
        self.paused = next(iter(self._paused.values()), None)

    def _wake(self) -> None:
        self._through.set()
        self._through = asyncio.Event()

    async def _turn(self, seconds: float) -> None:
        """Wait, but not longer than until another paused post was answered, nor where nobody will answer any more."""
        try:
            async with asyncio.timeout(0 if self._ended else seconds):  # which may have come while it asked
                await self._through.wait()
        except TimeoutError:
            pass


async def _together(calls: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """What all return, at the same time; the first to fail cancels the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _digest(request: ScoreRequest) -> str:
    return hashlib.blake2b(request.model_dump_json().encode(), digest_size=6).hexdigest()


def _checked_replies(body: bytes, ids: list[str]) -> list[ScoreReply]:
    """Replies to exactly these ids in this order, every score finite; raises ValueError with what is wrong."""
    try:
        replies = ScoreBatchReply.model_validate_json(body).replies
    except ValidationError as error:
        first: Any = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "body"
        raise ValueError(f"malformed answer at {place}: {first['msg']}") from error
    if len(replies) != len(ids):
        raise ValueError(f"{len(replies)} scores for {len(ids)} requests")
    for reply, wanted in zip(replies, ids, strict=True):
        if reply.id != wanted:
            raise ValueError(f"a score for {reply.id!r} where {wanted!r} was asked for")
    return replies
