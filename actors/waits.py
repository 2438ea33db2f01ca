"""Waits: who waits for whom, and since when. A long one says so in the log, a line a minute. And waits for several."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

REPORT_S = 60.0
"""Seconds between two lines about the same wait."""
_SETTLE_S = 0.1  # in which those who are waited for learn of it
_LOOK_S = 0.5  # between two looks at whom is waited for, as those who show it see the last
log = logging.getLogger(__name__)


class Wait:
    """Somebody's wait for somebody else, in words that change as it goes on."""

    def __init__(self, who: str, what: Callable[[], str]) -> None:
        self.who = who
        """Who waits."""
        self.text = what()
        """For whom or what, as of the last look."""
        self._what = what
        self._since = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return time.monotonic() - self._since

    def look(self) -> None:
        """Say anew for whom. To be called on the event loop of those who wait."""
        self.text = self._what()


class Waits:
    """The waits of one command: made once, and given to whoever waits."""

    def __init__(self) -> None:
        self._open: set[Wait] = set()

    @property
    def open(self) -> list[Wait]:
        """Every wait that lasts, the oldest first; from any thread."""
        return sorted(self._open.copy(), key=lambda wait: -wait.seconds)

    @contextlib.contextmanager
    def reported(self, who: str, what: Callable[[], str], every_s: float | None = None) -> Iterator[None]:
        """While the block lasts, `who` waits for `what()`: in `open`, and in the log every `every_s` s (REPORT_S).

        To be entered where an event loop runs; bounds nothing, the wait's own deadline does that.
        """
        loop, wait = asyncio.get_running_loop(), Wait(who, what)
        seconds = REPORT_S if every_s is None else every_s

        def report() -> None:
            nonlocal timer
            wait.look()
            log.warning("for %.0f s %s waits for %s", wait.seconds, wait.who, wait.text)
            timer = loop.call_later(seconds, report)

        def look() -> None:
            nonlocal looking
            wait.look()
            looking = loop.call_later(_LOOK_S, look)

        timer, looking = loop.call_later(seconds, report), loop.call_later(_SETTLE_S, look)
        self._open.add(wait)
        try:
            yield
        finally:
            timer.cancel()
            looking.cancel()
            self._open.discard(wait)


async def together(*calls: Coroutine[Any, Any, Any], at_once: bool = True) -> list[Any]:
    """What all return, at once or one after the other. The first to fail ends the others, and is raised."""
    try:
        if not at_once:
            return [await call for call in calls]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
        return [task.result() for task in tasks]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    finally:
        for call in calls:
            call.close()  # those whose turn has not come
