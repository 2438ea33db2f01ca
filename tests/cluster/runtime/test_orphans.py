"""Killing by mark, without Ray."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cluster.runtime.orphans import kill_marked, marked, own_folder

ROOT = Path(__file__).resolve().parents[3]

PARENT = """
import subprocess, sys
from cluster.runtime.orphans import watch
watch(sys.argv[1])
child = "import subprocess as s, time; s.Popen(['sleep', '1000'], start_new_session=True); time.sleep(1000)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
print("up", flush=True)
sys.stdin.read()
"""

HOLDER = """
import multiprocessing, time
semaphore = multiprocessing.get_context("spawn").Semaphore()
print(semaphore._semlock.name, flush=True)
time.sleep(100)
"""

OWNER = """
import os, signal, sys
from pathlib import Path
from cluster.runtime.orphans import own_folder
with own_folder(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_every_process_with_the_mark_is_killed_and_no_other() -> None:
    mark = f"RAYWARD_TEST=kill-{os.getpid()}"
    name, value = mark.split("=")
    ours = [subprocess.Popen(["sleep", "1000"], env={name: value}) for _ in range(2)]
    other = subprocess.Popen(["sleep", "1000"], env={name: value + "0"})
    try:
        wait_for(mark, 2)
        assert kill_marked(mark, within_s=5) == []
        assert [process.wait(timeout=5) for process in ours] == [-9, -9]
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("end", ["by itself", "killed"])
def test_children_and_grandchildren_in_sessions_of_their_own_follow_their_parent(end: str) -> None:
    mark = f"RAYWARD_TEST=watch-{os.getpid()}-{end}"
    name, value = mark.split("=")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, mark],
        cwd=ROOT,
        env={**os.environ, name: value},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    assert parent.stdin is not None
    assert parent.stdout.readline() == b"up\n"
    wait_for(mark, 3)
    if end == "killed":
        parent.kill()
    parent.stdin.close()
    parent.wait(timeout=5)
    parent.stdout.close()
    wait_for(mark, 0)


def test_the_tracker_of_those_killed_removes_what_they_had_in_shared_memory() -> None:
    mark = f"RAYWARD_TEST=tracked-{os.getpid()}"
    env = {**os.environ, "RAYWARD_TEST": mark.split("=")[1]}
    with subprocess.Popen([sys.executable, "-c", HOLDER], env=env, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        semaphore = Path("/dev/shm", f"sem.{holder.stdout.readline().strip().removeprefix('/')}")
        assert semaphore.exists()
        assert kill_marked(mark, within_s=5) == []
    assert not semaphore.exists()


def test_a_folder_goes_with_its_block_or_after_its_process_has_died() -> None:
    with tempfile.TemporaryDirectory() as parent:
        subprocess.run([sys.executable, "-c", OWNER, parent], cwd=ROOT, check=False)
        (left,) = Path(parent).iterdir()
        with own_folder(Path(parent)) as first, own_folder(Path(parent)) as second:
            assert not left.exists()
            assert {first.parent, second.parent} == {Path(parent)}
            assert first.is_dir()
        assert not list(Path(parent).iterdir())


def wait_for(mark: str, count: int) -> None:
    end = time.monotonic() + 5
    while len(marked(mark)) != count:
        assert time.monotonic() < end, f"{len(marked(mark))} processes have the mark, not {count}"
        time.sleep(0.05)
