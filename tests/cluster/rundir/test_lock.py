"""One command owns a run directory, and a dead one's is taken over."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config.load import ConfigError
from cluster.rundir import lock
from cluster.rundir.lock import FILE, Owner, owned

_HOLD = "import sys, time, pathlib; from cluster.rundir.lock import owned\n"
_HOLD += "with owned(pathlib.Path(sys.argv[1]), 'ppo'): print('mine', flush=True); time.sleep(60)"


@contextlib.contextmanager
def owner_process(run: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(run)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "mine\n"
            yield process
        finally:
            process.kill()


def leave(run: Path, **other: Any) -> Path:
    """What an owner that was killed leaves; by default one of another machine."""
    told = {"command": "ppo", "pid": 7, "host": "node-7", "place": "there", "started": "1", "since": time.time()}
    (run / FILE).write_text(json.dumps(told | other))
    return run / FILE


@contextlib.contextmanager
def again_and_again(work: Callable[[], object]) -> Iterator[None]:
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(0.05):
            work()

    thread = threading.Thread(target=repeat)
    thread.start()
    yield
    over.set()
    thread.join()


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with owner_process(tmp_path) as first:
        with pytest.raises(ConfigError) as refused, owned(tmp_path, "sft"):
            raise AssertionError
        since = json.loads((tmp_path / FILE).read_text())["since"]
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
        assert f"`rayward ppo`, PID {first.pid} on {socket.gethostname()} since {when}" in str(refused.value)
        assert "Remedy: wait for it" in str(refused.value)
        first.kill()  # and is not reaped: a zombie is dead
        while Owner(**json.loads((tmp_path / FILE).read_text())).gone is False:
            time.sleep(0.01)
        with owned(tmp_path, "sft"):
            assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
        assert "is taken over from `rayward ppo`" in caplog.text
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("content", ["", '{"pid": ', "[]"])
def test_a_damaged_file_is_nobodys(tmp_path: Path, content: str):
    (tmp_path / FILE).write_text(content)
    with owned(tmp_path, "sft"):
        assert json.loads((tmp_path / FILE).read_text())["command"] == "sft"


def test_a_process_that_was_given_the_id_again_is_another_one(tmp_path: Path):
    leave(tmp_path, pid=os.getpid(), place=Owner.this("").place)
    with owned(tmp_path, "sft"):
        pass


def test_an_owner_elsewhere_lives_while_it_renews_its_lease(tmp_path: Path):
    file = leave(tmp_path)
    with (
        again_and_again(lambda: os.utime(file)),
        pytest.raises(ConfigError, match="PID 7 on node-7"),
        owned(tmp_path, "sft", renew_s=0.1, lease_s=30),
    ):
        raise AssertionError


def test_an_owner_elsewhere_is_gone_when_its_lease_has_run_out(tmp_path: Path):
    leave(tmp_path)
    began = time.monotonic()
    with owned(tmp_path, "sft", renew_s=0.1, lease_s=0.5):
        assert 0.3 < time.monotonic() - began < 10
    os.utime(leave(tmp_path), (0, 0))
    with owned(tmp_path, "sft"):
        assert time.monotonic() - began < 10, "nobody waits for a lease that has run out"


def test_whose_lease_was_taken_over_stops_and_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    monkeypatch.setattr(lock, "end", told.append)
    with owned(tmp_path, "sft", renew_s=0.05):
        leave(tmp_path)
        time.sleep(0.4)
    (said,) = told
    assert said.startswith(f"{tmp_path} has been taken over by `rayward ppo`, PID 7 on node-7 since ")
    assert json.loads((tmp_path / FILE).read_text())["pid"] == 7


def test_of_many_that_start_at_once_one_is_the_owner(tmp_path: Path):
    leave(tmp_path, place=Owner.this("").place)  # of a process that is dead
    processes = [
        subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    try:
        while sum(process.poll() is None for process in processes) > 1:
            time.sleep(0.05)
        (owner,) = [process for process in processes if process.poll() is None]
        assert json.loads((tmp_path / FILE).read_text())["pid"] == owner.pid
    finally:
        for process in processes:
            process.kill()
            process.communicate()
