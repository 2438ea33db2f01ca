"""Signals seen from outside: programs that save, end slowly, or sit in an event loop."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP

PROGRAM = """
import asyncio, signal, sys, threading, time
from cluster.runtime import signals

async def work():
    try:
        print("up", flush=True)
        if "save" in sys.argv:
            with signals.unbroken():
                await asyncio.sleep(1)
                print("saved", flush=True)
        await asyncio.sleep(30)
    finally:
        print("ending", flush=True)
        await asyncio.sleep(1)
        print("ended", flush=True)

if "nohup" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
if "lost" in sys.argv:
    threading.Timer(0.2, signals.end, ["it is lost"]).start()
try:
    with signals.ended_by_signals():
        asyncio.run(work())
except signals.Stopped as error:
    print(error.by)
    raise
"""


@contextmanager
def program(*words: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PROGRAM, *words]
    pipe = subprocess.PIPE
    running = subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, stdout=pipe, stderr=pipe)
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == "up\n"
        yield running
    finally:
        running.kill()
        running.wait()


@pytest.mark.parametrize(
    ("words", "sent", "code", "said"),
    [
        ((), [INT], 130, ["ending", "ended", "Ctrl-C"]),
        ((), [TERM], 143, ["ending", "ended", "SIGTERM"]),
        ((), [HUP], 129, ["ending", "ended", "SIGHUP, as the terminal is gone"]),
        ((), [INT, INT], 130, ["ending", "ended", "Ctrl-C"]),
        ((), [INT, TERM, INT], 130, ["ending"]),
        (("save",), [TERM], 143, ["saved", "ending", "ended", "SIGTERM"]),
        (("save",), [TERM, INT], 143, ["ending", "ended", "SIGTERM"]),
        (("nohup",), [HUP, TERM], 143, ["ending", "ended", "SIGTERM"]),
        (("lost",), [], 1, ["ending", "ended", "it is lost"]),
        (("lost", "save"), [], 1, ["ending", "ended", "it is lost"]),
    ],
)
def test_signals_end_a_program_once_and_not_in_a_save(
    words: Sequence[str], sent: Sequence[signal.Signals], code: int, said: list[str]
) -> None:
    with program(*words) as running:
        for number in sent:
            time.sleep(0.2)
            running.send_signal(number)
        out, err = running.communicate(timeout=10)
    assert (running.returncode, out.splitlines()) == (code, said), err
    warned = "SIGTERM: this step, or save, is finished first" in err
    assert warned == (words == ("save",))
    assert ("it is lost" in err) == ("lost" in words), err
