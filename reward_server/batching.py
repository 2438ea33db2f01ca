"""Dynamic batching: what several clients ask for at the same time is scored together, and each request id once.

A source computes one batch at a time in a thread of its own. Whatever arrives meanwhile waits and becomes the next
batch, so the batches grow with the load by themselves and nobody waits for a timer.
"""

import asyncio
import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from reward_server.schema import Message, ScoreReply, ScoreRequest
from reward_server.sources import Source

PROBE = ScoreRequest(id="health", prompt=(Message(role="user", content="Hello"),), response="Hi", ended=True)


class Contradiction(Exception):
    """A known request id came with another content."""


class Busy(Exception):
    """Too many posts are waiting."""


@dataclass(slots=True, eq=False)
class _Post:
    """What one client asked for and nobody had asked for before."""

    requests: list[ScoreRequest]
    replies: "asyncio.Future[list[ScoreReply]]" = field(default_factory=asyncio.Future)


class Batching:
    """Scores requests of any number of clients with one source. Belongs to one event loop."""

    def __init__(
        self,
        source: Source,
        max_waiting: int,
        max_batch: int,
        remember: int,
        computed: Callable[[int], None] = lambda requests: None,
    ) -> None:
        """`max_waiting`: posts computed or waiting; `max_batch`: requests computed at once, a larger post stands alone;
        `remember`: scores kept by request id; `computed` is told the size of each batch."""
        self._source = source
        self._max_waiting = max_waiting
        self._max_batch = max_batch
        self._remember = remember
        self._computed = computed
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")
        self._known: OrderedDict[str, tuple[bytes, _Post, int]] = OrderedDict()
        self._queue: deque[_Post] = deque()
        self._under_way = 0
        self._worker: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Posts that are computed or wait."""
        return len(self._queue) + self._under_way

    async def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        """Replies in the order of the requests; ids scored before, or being scored, are not scored again.

        Raises Contradiction, Busy, and what the source raises.
        """
        digests = [hashlib.sha256(request.model_dump_json().encode()).digest() for request in requests]
        for request, digest in zip(requests, digests, strict=True):
            if request.id in self._known and self._known[request.id][0] != digest:
                raise Contradiction(
                    f"request id {request.id!r} was used before with another content; use an id for one response only"
                )
        new = [pair for pair in zip(requests, digests, strict=True) if pair[0].id not in self._known]
        if new:
            if self.waiting >= self._max_waiting:
                raise Busy(f"{self.waiting} posts are waiting; ask again later")
            post = self._enqueue([request for request, _ in new])
            for position, (request, digest) in enumerate(new):
                self._known[request.id] = digest, post, position
        entries = [self._known[request.id] for request in requests]
        while len(self._known) > self._remember:
            self._known.popitem(last=False)
        # Shielded: a client that hangs up must not undo the work that its retry will ask for.
        return [(await asyncio.shield(post.replies))[position] for _, post, position in entries]

    async def probe(self) -> None:
        """Score a fixed response; raises what the source raises."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._scored, [PROBE])

    def _enqueue(self, requests: list[ScoreRequest]) -> _Post:
        post = _Post(requests)
        post.replies.add_done_callback(lambda replies: replies.exception())  # nobody may be left to hear of it
        self._queue.append(post)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return post

    async def _work(self) -> None:
        while self._queue:
            posts = [self._queue.popleft()]
            while self._queue and sum(len(p.requests) for p in (*posts, self._queue[0])) <= self._max_batch:
                posts.append(self._queue.popleft())
            self._under_way = len(posts)
            try:
                await self._compute(posts)
            finally:
                self._under_way = 0

    async def _compute(self, posts: list[_Post]) -> None:
        requests = [request for post in posts for request in post.requests]
        try:
            replies = await asyncio.get_running_loop().run_in_executor(self._thread, self._scored, requests)
        except Exception as error:
            if len(posts) > 1:  # one client's bad request must not fail its neighbours
                for post in posts:
                    await self._compute([post])
                return
            for request in requests:
                self._known.pop(request.id, None)
            posts[0].replies.set_exception(error)
            return
        self._computed(len(requests))
        for post in posts:
            post.replies.set_result(replies[: len(post.requests)])
            replies = replies[len(post.requests) :]

    def _scored(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        replies = self._source.score(requests)
        if [reply.id for reply in replies] != [request.id for request in requests]:
            raise RuntimeError(f"the source gave {len(replies)} replies, but not the {len(requests)} asked for")
        return replies
