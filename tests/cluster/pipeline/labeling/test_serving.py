"""`rayward label` as people start it: a process that is asked over HTTP, stopped, and given again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from reward_server.address import free_port
from reward_server.preferences.labeling import read_comparisons
from tests.labeling_pages import Labeler
from tests.stage_runs import rows

ROOT = Path(__file__).parents[4]


def words(run: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "cluster.cli.main", "label", "--run", str(run), *more]


@contextmanager
def served(run: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words(run, *more), env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        said = next((line for line in process.stdout if "waits for people" in line), None)
        assert said, "it has ended"
        yield process
    finally:
        process.kill()
        process.wait(30)


def invited(run: Path, port: int) -> str:
    command = words(run, "--invite", "Anna", "--label.port", str(port))
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT).stdout
    found = re.search(r"#(\S+)$", told.strip())
    assert found
    return found[1]


def signed_in(port: int, token: str) -> Labeler:
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"X-Rayward": "1"}, timeout=20)
    client.post("/api/session", json={"token": token}).raise_for_status()
    return Labeler(client)


def waits(run: Path) -> list[dict[str, Any]]:
    """What the run's status says that is waited for, once it says so."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if found := json.loads((run / "status.json").read_text())["waits"]:
            return found
        time.sleep(0.2)
    return []


@pytest.mark.slow
def test_what_was_ranked_before_a_stop_or_a_kill_is_there_and_the_command_goes_on(tmp_path):
    run, port = tmp_path / "run", free_port("127.0.0.1")
    completions = [{"text": text} for text in ("one", "two", "three")]
    asked = [{"id": f"c{n}", "prompt": f"count {n}", "completions": completions} for n in range(3)]
    rows(run / "data" / "completions.jsonl", *asked)
    token, comparisons = invited(run, port), run / "data" / "comparisons.jsonl"
    options = ("--label.port", str(port), "--label.words_per_minute", "0", "--tracking.mode", "disabled")
    with served(run, *options) as process:
        anna = signed_in(port, token)
        anna.rank([1, 2, 2])
        (wait,) = waits(run)
        assert wait["who"] == "rayward label"
        assert re.fullmatch(rf"people: \d of 3 answers are there, at http://127.0.0.1:{port}", wait["for"])
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    first = read_comparisons(comparisons)
    assert [sorted(one.ranks or ()) for one in first] == [[0, 1, 1]]
    with served(run):  # its settings are remembered
        signed_in(port, token).rank([2, 1, 3])
    assert len(read_comparisons(comparisons)) == 1  # it was killed, and wrote nothing
    with served(run) as process:
        signed_in(port, token).rank([1, 1, 1])
        assert process.wait(60) == 0
    assert len(found := read_comparisons(comparisons)) == 3
    assert first[0] in found
    assert token not in "".join(path.read_text(errors="ignore") for path in run.rglob("*") if path.is_file())
