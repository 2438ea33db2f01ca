"""The real W&B, online: a server that works, one that is not there, one that never answers, and one that stops to."""

import io
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from cluster.config.schema import TrackingConfig
from cluster.tracking.console import Console
from cluster.tracking.tracker import Tracker
from reward_server.address import free_port
from tests.wandb_runs import history, records
from tests.wandb_server import KEY, WandbServer, wandb_server

STEPS = 100
DEADLINE_S = 6.0


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    wandb.teardown()  # it reads the address of its server once a process
    yield
    wandb.teardown()


def train(
    run_dir: Path, url: str, monkeypatch: pytest.MonkeyPatch, between: Callable[[int], None] = lambda step: None
) -> tuple[Tracker, str, float, float]:
    """A run of some steps; (tracker, what it printed, seconds of the slowest step, seconds of the end)."""
    monkeypatch.setenv("WANDB_BASE_URL", url)
    shown, slowest = io.StringIO(), 0.0
    config = TrackingConfig(mode="online", close_deadline_s=DEADLINE_S)
    with Tracker(run_dir, config, "ppo", console=Console(stream=shown)) as tracker:
        for step in range(1, STEPS + 1):
            between(step)
            started = time.monotonic()
            tracker.log("ppo", step, {"score/mean": step / 2})
            slowest = max(slowest, time.monotonic() - started)
        ended = time.monotonic()
    return tracker, shown.getvalue(), slowest, time.monotonic() - ended


def steps(rows: list[dict[str, Any]]) -> list[int]:
    return [row["ppo/step"] for row in rows if "ppo/step" in row]


def sync(told: str, server: WandbServer) -> None:
    """Do what the run's last line says, as it stands there."""
    command = told.splitlines()[-1].removeprefix("To send this run to W&B: ")
    folder = command.split()[-1].split("/wandb/")[0]
    environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_DIR": folder}
    line = f"{Path(sys.executable).parent}/{command}"
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_that_is_online_is_sent_while_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with wandb_server() as server:
        tracker, told, slowest, _ = train(tmp_path / "mine", server.url, monkeypatch)
    (run, *_) = server.runs
    assert (run["name"], run["groupName"], run["jobType"]) == (tracker.run_id, "mine", "ppo")
    assert steps(server.rows) == list(range(1, STEPS + 1))
    assert "wandb sync" not in told
    assert slowest < 0.5


@pytest.mark.parametrize("answers", ["refuses", "is silent"])
def test_a_server_that_is_not_there_costs_neither_time_nor_data(
    answers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with wandb_server() as server:
        server.silent = answers == "is silent"
        url = server.url if server.silent else f"http://127.0.0.1:{free_port('127.0.0.1')}"
        with caplog.at_level(logging.WARNING):
            tracker, told, slowest, end = train(tmp_path, url, monkeypatch)
    assert slowest < 0.5
    assert end < DEADLINE_S + 2
    (warning,) = [record.message for record in caplog.records if record.name.startswith("cluster")]
    assert warning.startswith("W&B is offline for this run (")
    assert steps(history(records(tmp_path, tracker.run_id))) == list(range(1, STEPS + 1))
    with wandb_server() as back:
        sync(told, back)
    assert steps(back.rows) == list(range(1, STEPS + 1))
    assert KEY not in told + caplog.text


def test_a_server_that_falls_silent_costs_neither_time_nor_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with wandb_server() as server:

        def between(step: int) -> None:
            end = time.monotonic() + 30
            while step == 2 and not server.runs and time.monotonic() < end:
                time.sleep(0.05)
            server.silent = step >= 2

        _, told, slowest, end = train(tmp_path, server.url, monkeypatch, between)
        assert server.runs
    assert "W&B could not finish (TimeoutError" in caplog.text
    assert slowest < 0.5
    assert end < DEADLINE_S + 2
    with wandb_server() as back:
        sync(told, back)
    assert steps(back.rows) == list(range(1, STEPS + 1))
