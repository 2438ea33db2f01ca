"""Ray sessions seen from outside: programs that start or join one, and the signals that end them."""

import contextlib
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.runtime.orphans import SESSION_MARK, marked
from cluster.runtime.session import _messages_to, start_ray
from cluster.tracking.console import Console

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import asyncio, json, subprocess, sys, tempfile
import ray
from pathlib import Path
from cluster.runtime.actor import remote
from cluster.runtime.resources import Process
from cluster.runtime.session import start_ray
from cluster.runtime.signals import Stopped, ended_by_signals

class Parent:
    def child(self):
        return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid
    def folder(self):
        return tempfile.gettempdir()

async def main():
    handle = remote(Parent, process=Process(name="parent"))
    pids = [await handle.ready(deadline_s=60), await handle.child()]
    facts = {"address": ray.get_runtime_context().gcs_address, "cpus": ray.cluster_resources()["CPU"]}
    node = ray._private.worker._global_node
    facts["daemons"] = {name: found[0].process.pid for name, found in node.all_processes.items()}
    facts["folders"] = [node.get_session_dir_path(), await handle.folder()]
    print(json.dumps(facts | {"pids": pids}))
    sys.stdout.flush()
    await asyncio.sleep(1000)

try:
    with ended_by_signals(), start_ray(cpus=2, log_dir=Path(sys.argv[1])):
        asyncio.run(main())
except Stopped as error:
    print(error.by)
    raise
"""


def launch(logs: Path, **env: str) -> subprocess.Popen[str]:
    unset = ("RAY_ADDRESS", "RAY_AUTH_MODE")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(logs)],
        cwd=ROOT,
        env=environment | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def report(program: subprocess.Popen[str]) -> dict[str, Any]:
    """The one line a program prints when its actor is up."""
    assert program.stdout is not None
    assert program.stderr is not None
    line = program.stdout.readline()
    assert line, program.stderr.read()
    return json.loads(line)


def family(program: subprocess.Popen[str]) -> str:
    """The mark of the Ray session that the program started, read off one of Ray's processes."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            if (entry / "stat").read_text().rpartition(")")[2].split()[1] == str(program.pid):
                for variable in (entry / "environ").read_text().split("\0"):
                    if variable.startswith(SESSION_MARK):
                        return variable
    raise AssertionError("the program has no Ray")


def gone(mark: str, pids: list[int], within_s: float) -> bool:
    end = time.monotonic() + within_s
    while left := marked(mark) + [pid for pid in pids if Path(f"/proc/{pid}/cmdline").is_file()]:
        if time.monotonic() > end:
            return not left
        time.sleep(0.1)
    return True


def removed(folders: list[str], within_s: float) -> bool:
    end = time.monotonic() + within_s
    while any(map(os.path.exists, folders)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(map(os.path.exists, folders))


def reachable(mark: str) -> list[str]:
    """Where processes with the mark listen, the loopback apart: at least GCS, raylet, and what came with them."""
    found: list[str] = []
    end = time.monotonic() + 30
    while len(found) < 4:
        assert time.monotonic() < end, f"Ray listens at {found} alone"
        found = [
            one.laddr.ip for pid in marked(mark) for one in psutil.Process(pid).net_connections("tcp") if not one.raddr
        ]
    return [address for address in found if not address.removeprefix("::ffff:").startswith(("127.", "::1"))]


@pytest.fixture(scope="module")
def programs(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[signal.Signals, subprocess.Popen[str]]]:
    """Two programs, each with a local Ray of its own, side by side on one machine, for users who never had one."""
    folders = {number: tmp_path_factory.mktemp(number.name) for number in (signal.SIGINT, signal.SIGKILL)}
    running = {number: launch(folder, HOME=str(folder)) for number, folder in folders.items()}
    yield running
    for program in running.values():
        program.kill()
        program.communicate()


def test_each_signal_ends_program_ray_actors_and_their_children(
    programs: dict[signal.Signals, subprocess.Popen[str]], tmp_path: Path
) -> None:
    reports = {number: report(program) for number, program in programs.items()}
    assert len({found["address"] for found in reports.values()}) == 2
    assert all(found["cpus"] == 2 for found in reports.values())
    assert [reachable(family(program)) for program in programs.values()] == [[], []]

    # A program that joins a running cluster leaves it running.
    address = reports[signal.SIGINT]["address"]
    home = Path(str(programs[signal.SIGINT].args[-1]))  # pyright: ignore[reportIndexIssue, reportArgumentType]
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # else Ray takes another address for 127.0.0.1
    guest = launch(tmp_path, RAY_ADDRESS=address, RAY_AUTH_MODE="token", HOME=str(home), **loopback)
    joined = report(guest)
    assert (joined["address"], joined["cpus"]) == (address, 2)
    guest.send_signal(signal.SIGTERM)
    assert guest.communicate(timeout=20) == ("SIGTERM\n", "")
    assert guest.returncode == 143
    assert gone("no such mark", joined["pids"], within_s=10)

    for number, status, said in ((signal.SIGINT, 130, "Ctrl-C\n"), (signal.SIGKILL, -signal.SIGKILL, "")):
        program, mark = programs[number], family(programs[number])
        assert len(marked(mark)) > 3
        program.send_signal(number)
        out, err = program.communicate(timeout=30)
        assert program.returncode == status
        assert (out, err) == (said, ""), "Ray wrote to the console"
        assert gone(mark, reports[number]["pids"], within_s=10), number.name
        assert removed(reports[number]["folders"], within_s=5)


def test_sigterm_while_ray_starts_ends_what_has_started(tmp_path: Path) -> None:
    program, mark = launch(tmp_path), ""
    try:
        while not mark:
            with contextlib.suppress(AssertionError):
                mark = family(program)
        program.send_signal(signal.SIGTERM)
        assert program.communicate(timeout=30)[0] == "SIGTERM\n"
    finally:
        program.kill()
    assert program.returncode == 143
    assert gone(mark, [], within_s=5)


@pytest.mark.parametrize(("daemon", "name"), [("raylet", "raylet"), ("gcs_server", "GCS")])
def test_a_command_whose_ray_is_lost_says_so_and_ends_at_once(daemon: str, name: str, tmp_path: Path) -> None:
    program = launch(tmp_path)
    try:
        facts, mark = report(program), family(program)
        os.kill(facts["daemons"][daemon], signal.SIGKILL)
        killed = time.monotonic()
        out, err = program.communicate(timeout=30)
    finally:
        program.kill()
    assert program.returncode == 1, err
    assert (program.returncode, out) == (1, f"the loss of Ray's {name} (signal 9)\n")
    assert f"the loss of Ray's {name} (signal 9): the command ends" in err
    assert time.monotonic() - killed < 10
    assert gone(mark, facts["pids"], within_s=5)
    assert removed(facts["folders"], within_s=5)
    assert (tmp_path / "ray" / "gcs_server.out").is_file()


def test_errors_of_rays_own_reach_the_console_and_the_rest_its_file_only(tmp_path: Path) -> None:
    shown = io.StringIO()
    with Console(tmp_path, stream=shown), _messages_to(tmp_path / "ray.log"):
        logging.getLogger("ray.data").warning("a worker was restarted")
        logging.getLogger("ray.core").error("the object store is full")
    assert shown.getvalue() == "error: ray.core: the object store is full\n"
    kept = (tmp_path / "ray.log").read_text()
    assert "a worker was restarted" in kept
    assert "the object store is full" in kept


def test_no_cluster_at_the_address_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {address}.*ray start --head"):
        start_ray(cpus=2, log_dir=tmp_path, deadline_s=5).__enter__()
    with pytest.raises(ConnectionError, match=r"Ray Client is not supported.*ray job submit"):
        start_ray("ray://127.0.0.1:10001", cpus=2, log_dir=tmp_path).__enter__()
    with pytest.raises(ConnectionError, match="'nowhere': give host:port, auto or local"):
        start_ray("nowhere", cpus=2, log_dir=tmp_path).__enter__()
    assert time.monotonic() - start < 5
