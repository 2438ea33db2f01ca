"""Dynamic batching: what several clients ask for at the same time is scored together, and each request id once.

A source computes one batch at a time in a thread of its own. Whatever arrives meanwhile waits, so the batches grow with
the load by themselves and nobody waits for a timer. A batch is bounded by tokens. It serves those first who have the
least left, so that a small post never waits for all of a large one, and a large one always gets a share.
"""

import asyncio
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from reward_server.bodies import Busy
from reward_server.config import Limits
from reward_server.schema import Message, ScoreReply, ScoreRequest
from reward_server.sources import Source

T = TypeVar("T")
PROBE = ScoreRequest(id="health", prompt=(Message(role="user", content="Hello"),), response="Hi", ended=True)
_OLDEST = 4  # the post that has waited longest gets one part in so many of a batch, whoever else there is


class Contradiction(Exception):
    """A known request id came with another content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What was computed at once."""

    responses: int
    """responses that were scored"""
    tokens: int
    """tokens of theirs that the source read"""
    seconds: float
    """time that it took, with the tokenising of what had arrived"""


@dataclass(slots=True, eq=False)
class _Post:
    """What one client asked for and nobody had asked for before."""

    requests: list[ScoreRequest]
    """emptied when it is done: its replies are remembered, its texts are not"""
    replies: list[ScoreReply | None]
    """what is known so far, by place"""
    left: list[tuple[int, int]] | None = None
    """(tokens, place) of what is not scored yet, the longest last, so that the lengths of a batch are alike; None until
    the source was asked for them"""
    error: Exception | None = None
    """why it gets no scores"""
    done: "asyncio.Future[list[ScoreReply]]" = field(default_factory=asyncio.Future)
    """all replies, in the order of the requests"""

    @property
    def over(self) -> bool:
        return self.error is not None or self.left == []


class Batching:
    """Scores requests of any number of clients with one source. Belongs to one event loop."""

    def __init__(self, source: Source, limits: Limits, computed: Callable[[Turn], None] = lambda turn: None) -> None:
        """`computed` is told of each batch."""
        self._source = source
        self._limits = limits
        self._computed = computed
        self.scored = 0
        """Responses scored so far."""
        self._began: float | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")
        self._known: OrderedDict[str, tuple[bytes, _Post, int]] = OrderedDict()
        self._queue: list[_Post] = []
        self._worker: asyncio.Task[None] | None = None
        self._probe: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Posts that are computed or wait."""
        return len(self._queue)

    @property
    def responses(self) -> int:
        """Responses of theirs that have no score yet."""
        return sum(reply is None for post in self._queue for reply in post.replies)

    @property
    def known(self) -> int:
        """Request ids that are not computed again."""
        return len(self._known)

    async def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        """Replies in the order of the requests; ids scored before, or being scored, are not scored again.

        Raises Contradiction, Busy, and what the source raises.
        """
        digests = await asyncio.to_thread(_digests, requests)
        for request, digest in zip(requests, digests, strict=True):
            if request.id in self._known and self._known[request.id][0] != digest:
                raise Contradiction(
                    f"request id {request.id!r} was used before with another content; use an id for one response only"
                )
        new = [pair for pair in zip(requests, digests, strict=True) if pair[0].id not in self._known]
        if new:
            if self.waiting >= self._limits.max_waiting:
                raise Busy(f"{self.waiting} posts are waiting; ask again later")
            post = self._enqueue([request for request, _ in new])
            for place, (request, digest) in enumerate(new):
                self._known[request.id] = digest, post, place
        entries = [self._known[request.id] for request in requests]
        while len(self._known) > self._limits.remember:
            self._known.popitem(last=False)
        # Shielded: a client that hangs up must not undo the work that its retry will ask for.
        return [(await asyncio.shield(post.done))[place] for _, post, place in entries]

    async def probe(self) -> None:
        """Score a fixed response, once for all who ask meanwhile; raises what the source raises."""
        if self._probe is None or self._probe.done():
            # An id of its own: another server behind this one must not answer from memory.
            request = PROBE.model_copy(update={"id": f"health/{secrets.token_hex(6)}"})
            self._probe = asyncio.create_task(self._in_thread(self._scored, [request]))
            self._probe.add_done_callback(lambda probe: probe.cancelled() or probe.exception())
        await asyncio.shield(self._probe)

    @property
    def computing_s(self) -> float:
        """Seconds for which the source has been at its present batch; 0 while it has none."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def _timed(self, call: Callable[[list[ScoreRequest]], list[T]], requests: list[ScoreRequest]) -> list[T]:
        self._began = time.monotonic()
        try:
            return call(requests)
        finally:
            self._began = None

    async def _in_thread(self, call: Callable[..., object], *arguments: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    def _enqueue(self, requests: list[ScoreRequest]) -> _Post:
        post = _Post(requests, [None] * len(requests))
        post.done.add_done_callback(lambda replies: replies.exception())  # nobody may be left to hear of it
        self._queue.append(post)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return post

    async def _work(self) -> None:
        while self._queue:
            await self._in_thread(self._turn, list(self._queue))
            for post in [post for post in self._queue if post.over]:
                self._queue.remove(post)
                self._finish(post)

    def _finish(self, post: _Post) -> None:
        if post.error is None:
            post.done.set_result([reply for reply in post.replies if reply is not None])
        else:
            for request in post.requests:
                if self._known.get(request.id, (b"", None, 0))[1] is post:
                    del self._known[request.id]
            post.done.set_exception(post.error)
        post.requests = []

    def _turn(self, posts: list[_Post]) -> None:
        """Runs in the source's thread, which alone touches the posts meanwhile."""
        started = time.monotonic()
        for post in posts:
            if post.left is None:
                self._measure(post)
        batch = _share([post for post in posts if not post.over], self._limits.batch_tokens, self._limits.max_batch)
        self._score([(post, place) for post, _, place in batch])
        scored = [tokens for post, tokens, place in batch if post.replies[place] is not None]
        self.scored += len(scored)
        self._computed(Turn(responses=len(scored), tokens=sum(scored), seconds=time.monotonic() - started))

    def _measure(self, post: _Post) -> None:
        try:
            tokens = self._timed(self._source.tokens, post.requests)
        except Exception as error:
            post.error = error
        else:
            post.left = sorted(
                ((count, place) for place, count in enumerate(tokens)), key=lambda one: (one[0], -one[1])
            )

    def _score(self, batch: list[tuple[_Post, int]]) -> None:
        try:
            replies = self._scored([post.requests[place] for post, place in batch])
        except Exception as error:
            posts = list(dict.fromkeys(post for post, _ in batch))
            if len(posts) == 1:
                posts[0].error = error
                return
            for post in posts:  # one client's bad request must not fail its neighbours
                self._score([one for one in batch if one[0] is post])
            return
        for (post, place), reply in zip(batch, replies, strict=True):
            post.replies[place] = reply

    def _scored(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        replies = self._timed(self._source.score, requests) if requests else []
        if [reply.id for reply in replies] != [request.id for request in requests]:
            raise RuntimeError(f"the source gave {len(replies)} replies, but not the {len(requests)} asked for")
        return replies


def _digests(requests: Sequence[ScoreRequest]) -> list[bytes]:
    return [hashlib.sha256(request.model_dump_json().encode()).digest() for request in requests]


def _share(posts: Sequence[_Post], max_tokens: int, max_responses: int) -> list[tuple[_Post, int, int]]:
    """Take what is computed at once, as (post, tokens, place): at most so many tokens and responses, at least one.

    The first post, which has waited longest, is sure of a quarter; then come those with the least left.
    """
    taken: list[tuple[_Post, int, int]] = []
    total = 0

    def take(post: _Post, max_tokens: int, max_responses: int) -> None:
        nonlocal total
        while post.left and (not taken or (total + post.left[-1][0] <= max_tokens and len(taken) < max_responses)):
            tokens, place = post.left.pop()
            total += tokens
            taken.append((post, tokens, place))

    for post in posts[:1]:
        take(post, max_tokens // _OLDEST, max_responses // _OLDEST)
    for post in sorted(posts, key=lambda post: (sum(tokens for tokens, _ in post.left or ()), len(post.left or ()))):
        take(post, max_tokens, max_responses)
    return taken
