"""The tickets of a buffer: which are out, at whom and since when, and which are to be issued again."""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence

from actors.trajectory import Ticket
from learner.data.ledger import Ledger

_NAMED_IN_ERRORS = 8


class Tickets:
    """Issues every number once, and again with the next attempt when it was forfeited."""

    def __init__(self, first: int, ledger: Ledger, clock: Callable[[], float]) -> None:
        self.admitted = first
        """Number of the first that was never issued."""
        self.again: list[Ticket] = []
        """Those to be tried again, a heap."""
        self.issued = 0
        """How many were handed out, every attempt counted."""
        self.dropped: Counter[str] = Counter()
        """How many were forfeited, by reason."""
        self._out: dict[Ticket, tuple[str, float]] = {}  # at whom, since when
        self._ledger = ledger
        self._clock = clock

    def __contains__(self, ticket: Ticket) -> bool:
        return ticket in self._out

    def __len__(self) -> int:
        """How many are out."""
        return len(self._out)

    @property
    def unfinished(self) -> list[Ticket]:
        """Those that are out or to be tried again, in order."""
        return sorted([*self._out, *self.again])

    def issue(self, holder: str, version: int) -> Ticket:
        """Hand one out to `holder`, those to be tried again first."""
        if self.again:
            ticket = heapq.heappop(self.again)
        else:
            ticket = Ticket(number=self.admitted, attempt=0)
            self.admitted += 1
        self.issued += 1
        self._out[ticket] = (holder, self._clock())
        self._ledger.record("issued", ticket, version=version)
        return ticket

    def answer(self, ticket: Ticket) -> None:
        """Take one back that is out, with its samples."""
        del self._out[ticket]

    def forfeit(self, ticket: Ticket, reason: str) -> bool:
        """Take one back without samples, to be issued again; False for one that is not out."""
        if self._out.pop(ticket, None) is None:
            return False
        self._ledger.record("dropped", ticket, reason=reason)
        self.dropped[reason] += 1
        heapq.heappush(self.again, Ticket(number=ticket.number, attempt=ticket.attempt + 1))
        return True

    def holders(self, missing: Sequence[int]) -> str:
        """How many are at whom: "8 at generator-1 for 9 s, 4 with no actor"."""
        held, ages = self._by_number(), dict[str, list[float]]()
        for _, holder, age in (held[number] for number in missing if number in held):
            ages.setdefault(holder, []).append(age)
        states = [f"{len(found)} at {holder} for {max(found):.0f} s" for holder, found in sorted(ages.items())]
        if nowhere := sum(number not in held for number in missing):
            states.append(f"{nowhere} with no actor")
        return ", ".join(states)

    def describe(self, missing: Sequence[int]) -> str:
        """Where each of them is, by name."""
        held, states = self._by_number(), []
        for number in missing[:_NAMED_IN_ERRORS]:
            where = "attempt {0}, out for {2:.1f} s at {1}".format(*held[number]) if number in held else "with no actor"
            states.append(f"{self._ledger.name(number)} {where}")
        if len(missing) > len(states):
            states.append(f"and {len(missing) - len(states)} more")
        return f"{'; '.join(states)}. Look at the logs of the actors that had them"

    def _by_number(self) -> dict[int, tuple[int, str, float]]:
        """(attempt, at whom, seconds) of what is out."""
        now = self._clock()
        return {ticket.number: (ticket.attempt, holder, now - since) for ticket, (holder, since) in self._out.items()}
