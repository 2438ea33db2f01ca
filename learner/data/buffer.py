"""The experience buffer: which prompts may be sampled now, and the batches that come of them.

One inequality holds the whole system together: a ticket is issued while `admitted < (version + 1 +
max_staleness) * prompts_per_batch`, and batch i is made of the tickets i*B .. i*B + B-1. What trains at
version i was therefore admitted at version i - max_staleness or later, and `max_staleness = 0` is synchronous
PPO without a second code path. (The rule is AReaL's capacity formula, arXiv 2505.24298.)
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from actors.trajectory import BufferClosed, StaleTrajectories, Ticket, Trajectory
from actors.waits import Waits
from learner.data.ledger import Ledger
from learner.data.tickets import Tickets

_ARITHMETIC = ("version", "prompts_per_batch", "samples_per_prompt", "max_staleness")


class Buffer:
    """An asyncio object of one process; none of its methods is called from another thread."""

    def __init__(
        self,
        prompts_per_batch: int,
        samples_per_prompt: int,
        max_staleness: int,
        version: int = 0,
        *,
        ledger: Ledger,
        batches: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        waiting: Callable[[], AbstractAsyncContextManager[object]] = nullcontext,
        paused_s: Callable[[], float] = lambda: 0.0,
        waits: Waits | None = None,
    ) -> None:
        """`batches`: how many the run takes in all, if that is known: nothing is sampled for a later one.

        `waiting`: entered whenever the learner has to wait for a batch, and so has no use for its processes.
        `paused_s`: seconds for which the run has been paused so far; the deadline of a batch does not count them.
        `waits`: of the run.
        """
        assert min(prompts_per_batch, samples_per_prompt) >= 1, (prompts_per_batch, samples_per_prompt)
        assert min(max_staleness, version) >= 0, (max_staleness, version)
        self.prompts_per_batch = prompts_per_batch
        self.samples_per_prompt = samples_per_prompt
        self.max_staleness = max_staleness
        self.version = version
        self._batches = math.inf if batches is None else batches
        self._ledger = ledger
        self._waiting = waiting
        self._paused_s = paused_s
        self._waits = waits or Waits()
        self._taken = version * prompts_per_batch
        self._tickets = Tickets(self._taken, ledger, clock)
        self._ready: dict[int, tuple[Ticket, list[Trajectory]]] = {}
        self._trained = 0
        self._late = 0
        self._bell = _Bell()

    async def admit(self, n: int, holder: str = "an actor") -> list[Ticket]:
        """Wait until a prompt may be sampled, then hand out 1 to n tickets, those to be tried again first.

        `holder` is who samples them, for whoever waits for the answer.
        The wait ends with the learner's next `advance`, with `fail` or with `close`: the learner's own
        deadlines bound it. While the ledger's disk is full nothing is handed out. Raises what `fail` was given,
        BufferClosed, or NotWritten when the disk was full for too long.
        """
        assert n >= 1, n
        await self._ledger.disk.ready()
        while not self._tickets.again and self._capacity() == 0:
            await self._bell.wait()
        self._bell.check()
        count = min(n, len(self._tickets.again) + self._capacity())
        return [self._tickets.issue(holder, self.version) for _ in range(count)]

    def put(self, ticket: Ticket, trajectories: Sequence[Trajectory]) -> None:
        """Store the samples of a ticket.

        A ticket that is no longer in flight (it was forfeited, or has been answered) is counted and left out:
        the first answer stands. Raises StaleTrajectories, and forfeits the ticket, when a token would be
        staler than `max_staleness` when it is trained, or comes of weights newer than the learner's.
        """
        assert [t.key.k for t in trajectories] == list(range(self.samples_per_prompt)), trajectories
        if ticket not in self._tickets:
            self._late += 1
            return
        versions = [version for t in trajectories for version in t.completion.versions]
        oldest = ticket.number // self.prompts_per_batch - self.max_staleness
        # one ahead of the learner's while it publishes: actors have the new weights before it advances
        newest = self._taken // self.prompts_per_batch
        if min(versions) < oldest or max(versions) > newest:
            self.forfeit(ticket, "stale")
            raise StaleTrajectories(
                f"{self._ledger.name(ticket.number)} was sampled with weights of versions {min(versions)} to "
                f"{max(versions)}; it may be trained with versions {oldest} to {newest} only"
            )
        tokens = sum(len(t.completion.response_ids) for t in trajectories)
        spans = {"oldest": min(versions), "newest": max(versions)}
        self._ledger.record("scored", ticket, samples=len(trajectories), tokens=tokens, **spans)
        self._tickets.answer(ticket)
        self._ready[ticket.number] = (ticket, list(trajectories))
        self._bell.ring()

    def generated(self, ticket: Ticket) -> None:
        """Note that a ticket's responses exist and wait for their scores."""
        if ticket in self._tickets:
            self._ledger.record("generated", ticket)

    def forfeit(self, ticket: Ticket, reason: str) -> None:
        """Give a ticket back: its samples are dropped for a reason, and the same prompt is issued again.

        `reason` is one of a few fixed words, counted in the metrics. A ticket that is not in flight is left alone.
        """
        if self._tickets.forfeit(ticket, reason):
            self._bell.ring()

    async def take(self, deadline_s: float) -> list[Trajectory]:
        """Wait for the batch of the present version and return its trajectories, in the order of their tickets.

        To be called once a version. Raises TimeoutError that names what is missing, what `fail` was given,
        BufferClosed, or NotWritten when the disk was full for too long.
        """
        with self._waits.reported("the learner", lambda: "room on the disk, which is full"):
            await self._ledger.disk.ready()
        first = self._taken
        assert first == self.version * self.prompts_per_batch, "advance() comes before the next batch"
        numbers = range(first, first + self.prompts_per_batch)
        await self._complete_within(deadline_s, numbers)
        batch: list[Trajectory] = []
        for number in numbers:
            ticket, trajectories = self._ready.pop(number)
            self._ledger.record("batched", ticket, step=self.version, max_staleness=self.max_staleness)
            batch += trajectories
        self._taken += self.prompts_per_batch
        self._trained += self.prompts_per_batch
        assert self.version - min(t.oldest_version for t in batch) <= self.max_staleness, self.version
        return batch

    async def _complete_within(self, deadline_s: float, numbers: range) -> None:
        left = deadline_s
        while True:
            limit, paused_s = asyncio.timeout(left), self._paused_s()
            try:
                async with limit:
                    return await self._complete(numbers)
            except TimeoutError:
                if not limit.expired():  # then it is what fail() was given
                    raise
            left = self._paused_s() - paused_s
            if left <= 0:
                missing, lack = self._missing(numbers)
                where = self._tickets.describe(missing)
                raise TimeoutError(f"waited {deadline_s:g} s for {lack} are missing: {where}")
            left = max(left, 1.0)

    def advance(self) -> None:
        """Count one more completed iteration; the next tickets may be admitted."""
        assert self._taken == (self.version + 1) * self.prompts_per_batch, "take() comes first"
        self.version += 1
        self._bell.ring()

    def fail(self, error: BaseException) -> None:
        """Wake everybody who waits, now or later, with an error. The first error stands."""
        self._bell.end(error)

    def close(self) -> None:
        """Wake everybody who waits with BufferClosed."""
        self.fail(BufferClosed("the run is over"))
        self._ledger.close()

    def counts(self) -> dict[str, float]:
        """Count samples since the start, over resumes: issued = trained + in_flight + ready + the sum of dropped/*."""
        tickets = {
            "buffer/issued": self._tickets.issued,
            "buffer/trained": self._trained,
            "buffer/in_flight": len(self._tickets),
            "buffer/ready": len(self._ready),
            "buffer/late": self._late,
            **{f"buffer/dropped/{reason}": count for reason, count in sorted(self._tickets.dropped.items())},
        }
        return {name: float(count * self.samples_per_prompt) for name, count in tickets.items()}

    def snapshot(self) -> dict[str, Any]:
        """Return what is ready and what is under way as JSON values, for a checkpoint after `advance`."""
        assert self._taken == self.version * self.prompts_per_batch, "a batch is being trained on"
        return {
            **{name: getattr(self, name) for name in _ARITHMETIC},
            "admitted": self._tickets.admitted,
            "counts": {"issued": self._tickets.issued, "trained": self._trained, "late": self._late},
            "dropped": dict(self._tickets.dropped),
            "unfinished": [[t.number, t.attempt] for t in self._tickets.unfinished],
            "ready": [
                [t.number, t.attempt, [trajectory.to_json() for trajectory in trajectories]]
                for t, trajectories in self._ready.values()
            ],
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot, in a new buffer. What was under way is lost, and sampled again under the same key.

        Raises ValueError when the snapshot was made with another version, batch arithmetic or bound.
        """
        tickets = self._tickets
        assert tickets.issued == 0, "only a new buffer can be restored"
        for name in _ARITHMETIC:
            if snapshot[name] != getattr(self, name):
                raise ValueError(
                    f"the checkpoint's buffer has {name} = {snapshot[name]}, this run has "
                    f"{getattr(self, name)}; resume with the same value"
                )
        tickets.admitted = snapshot["admitted"]
        tickets.again = sorted(Ticket(number=n, attempt=attempt) for n, attempt in snapshot["unfinished"])
        for n, attempt, values in snapshot["ready"]:
            trajectories = [Trajectory.from_json(value) for value in values]
            self._ready[n] = (Ticket(number=n, attempt=attempt), trajectories)
        counts = snapshot["counts"]
        tickets.issued, self._trained, self._late = counts["issued"], counts["trained"], counts["late"]
        tickets.dropped = Counter(snapshot["dropped"])
        if lost := tickets.issued - self._trained - tickets.dropped.total() - len(self._ready):
            tickets.dropped["resumed"] += lost
        self._ledger.resumed(self.version, [ticket for ticket, _ in self._ready.values()])
        self._bell.ring()

    async def _complete(self, numbers: Sequence[int]) -> None:
        """Wait until all these tickets are answered."""
        if all(number in self._ready for number in numbers):
            return
        async with self._waiting():
            with self._waits.reported("the learner", lambda: self._lack(numbers)):
                while any(number not in self._ready for number in numbers):
                    await self._bell.wait()

    def stats(self) -> dict[str, float]:
        """The version, of how many, and samples that are out or ready: what a run's status shows."""
        total = {} if math.isinf(self._batches) else {"iterations": self._batches}
        held = {"out": len(self._tickets), "ready": len(self._ready)}
        samples = {name: float(count * self.samples_per_prompt) for name, count in held.items()}
        return {"version": float(self.version), **total, **samples}

    def _lack(self, numbers: Sequence[int]) -> str:
        missing, lack = self._missing(numbers)
        return f"{lack}: {self._tickets.holders(missing)}"

    def _missing(self, numbers: Sequence[int]) -> tuple[list[int], str]:
        """What is missing of a batch, and how much that is."""
        missing = [number for number in numbers if number not in self._ready]
        return missing, f"batch {self.version}: {len(missing)} of its {len(numbers)} prompts"

    def _capacity(self) -> int:
        ahead = min(self.version + 1 + self.max_staleness, self._batches)
        return max(int(ahead * self.prompts_per_batch) - self._tickets.admitted, 0)


class _Bell:
    """Wakes all that wait in one event loop, or ends their waiting with an error."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()
        self._error: BaseException | None = None

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    async def wait(self) -> None:
        self.check()
        await self._rung.wait()

    def ring(self) -> None:
        self._rung.set()
        self._rung = asyncio.Event()

    def end(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
            self.ring()
