"""Long waits say so: a line in the log a minute, with who waits for whom."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator

REPORT_S = 60.0
"""Seconds between two lines about the same wait."""
log = logging.getLogger(__name__)


@contextlib.contextmanager
def reported(what: Callable[[], str], every_s: float | None = None) -> Iterator[None]:
    """While the block lasts, log `what()` after each `every_s` seconds (REPORT_S), e.g. "the learner waits for ..".

    To be entered where an event loop runs; bounds nothing, the wait's own deadline does that.
    """
    loop, started = asyncio.get_running_loop(), time.monotonic()
    seconds = REPORT_S if every_s is None else every_s

    def report() -> None:
        nonlocal timer
        log.warning("for %.0f s %s", time.monotonic() - started, what())
        timer = loop.call_later(seconds, report)

    timer = loop.call_later(seconds, report)
    try:
        yield
    finally:
        timer.cancel()
