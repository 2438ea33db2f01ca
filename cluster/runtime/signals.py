"""The signals that end a command: one handler, which ends it once, not in the midst of a save."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator

from cluster.runtime.exit_codes import FAILED

_GRACE_S = 90.0  # what a command has started may take so long to end
_ENDS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP, as the terminal is gone"}
log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """Ends the command, from wherever its main thread is; `code` is the exit code, `by` what stopped it."""

    def __init__(self, code: int, by: str) -> None:
        super().__init__(code)
        self.by = by


class _Ending:
    """Of this process, as handlers of signals are."""

    def __init__(self) -> None:
        self.numbers: list[signal.Signals] = []
        self.signals = 0
        self.stopped: Stopped | None = None
        """What ends the command, once something does."""
        self.timer: threading.Timer | None = None
        """Set once that was raised."""
        self.saves = 0

    def handle(self, number: int, frame: object) -> None:
        self.signals += 1
        if self.stopped is None:
            self.stopped = Stopped(128 + number, _ENDS[signal.Signals(number)])
        if self.timer is not None:  # it is ending: that is not to be broken off, unless somebody insists
            if self.signals > 2:
                os._exit(int(str(self.stopped.code)))
        elif not self.saves or self.signals > 1 or self.stopped.code == FAILED:
            self.leave(self.stopped)
        else:
            with contextlib.suppress(RuntimeError):  # the main thread may be in the midst of a line
                log.warning(
                    "%s: this step, or save, is finished first; once more ends the command at once", self.stopped.by
                )

    def leave(self, stopped: Stopped) -> None:
        self.timer = threading.Timer(_GRACE_S, self.give_up)
        self.timer.daemon = True
        self.timer.start()
        raise stopped

    def give_up(self) -> None:
        assert self.stopped is not None
        log.error("what this command has started did not end within %g s: it is left to its watchers", _GRACE_S)
        os._exit(int(str(self.stopped.code)))


_ending = _Ending()


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end the block by Stopped, those of them that are not ignored (as by `nohup`).

    Another one does not break off the end; the third ends the process at once. In the main thread alone.
    """
    global _ending
    if _ending.numbers or threading.current_thread() is not threading.main_thread():
        yield
        return
    _ending = ending = _Ending()
    before = {number: signal.getsignal(number) for number in _ENDS}
    ending.numbers = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    attach()
    try:
        yield
    finally:
        if ending.timer:
            ending.timer.cancel()
        for number in ending.numbers:
            signal.signal(number, before[number])
        ending.numbers = []


def attach() -> None:
    """Have the handler again, after a library has put its own before it."""
    for number in _ending.numbers:
        signal.signal(number, _ending.handle)


@contextlib.contextmanager
def unbroken() -> Iterator[Callable[[], bool]]:
    """A signal that arrives in the block ends the command after it; a second one at once.

    Gives the block what tells whether one has arrived.
    """
    ending = _ending
    ending.saves += 1
    try:
        yield lambda: ending.stopped is not None
    finally:
        ending.saves -= 1
        if ending.stopped and ending.timer is None and not ending.saves:
            ending.leave(ending.stopped)


def end(by: str) -> None:
    """Have the command end as failed, from any thread, when it is of no use to go on."""
    log.error("%s: the command ends", by)
    if _ending.numbers and _ending.stopped is None:
        _ending.stopped = Stopped(FAILED, by)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGTERM)
