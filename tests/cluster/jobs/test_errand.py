"""The status of jobs whose run directory cannot be seen from here, of a cluster that a test makes up."""

import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster.jobs import errand
from cluster.jobs.errand import looks_of_job
from cluster.jobs.submit import JobError
from cluster.status.screen import render, screen
from cluster.status.snapshot import FILE, snapshot


class Cluster:
    """Knows one job, and prints what it is told to when an errand is sent."""

    def __init__(self, run: str = "", status: str = "RUNNING", prints: str = "") -> None:
        self.run, self.status, self.prints = run, status, prints
        self.sent: list[dict[str, Any]] = []
        self.taken_back: list[tuple[str, str]] = []

    def get_job_info(self, name: str) -> Any:
        metadata = {"rayward_command": "ppo", "rayward_run": self.run} if self.run else {}
        env = {"working_dir": "gcs://code.zip"}
        details = {"submission_id": name, "status": self.status, "metadata": metadata, "entrypoint": "ppo"}
        return SimpleNamespace(**details, start_time=1000, end_time=None, message="waits for room", runtime_env=env)

    def submit_job(self, **job: Any) -> str:
        self.sent.append(job)
        return "raysubmit_errand"

    def get_job_status(self, name: str) -> Any:
        return SimpleNamespace(value="SUCCEEDED")

    def get_job_logs(self, name: str) -> str:
        return self.prints

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for start in range(0, len(self.prints), 7):
            yield self.prints[start : start + 7]

    def stop_job(self, name: str) -> None:
        self.taken_back.append(("stop", name))

    def delete_job(self, name: str) -> None:
        self.taken_back.append(("delete", name))


def looks(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, live: bool = False) -> list[dict[str, Any]]:
    monkeypatch.setattr(errand, "connect", lambda address: cluster)
    monkeypatch.setattr(errand, "_SETTLE_S", 0.0)
    return list(looks_of_job(None, "raysubmit_a", live))


def test_a_status_is_fetched_by_a_job_with_the_same_code_that_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster("/shared/run", prints="a warning of Ray\n" + json.dumps({"state": "running"}, indent=2) + "\n")
    (found,) = looks(cluster, monkeypatch)
    assert (found["state"], found["job"]["status"]) == ("running", "RUNNING")
    (sent,) = cluster.sent
    assert sent["entrypoint"] == "python -m cluster.cli.main status /shared/run --json"
    assert (sent["runtime_env"], sent["entrypoint_num_cpus"]) == ({"working_dir": "gcs://code.zip"}, 0)
    assert cluster.taken_back == [("delete", "raysubmit_errand")]


def test_a_live_view_reads_one_long_job_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"state": state}) for state in ("running", "running", "done")]
    cluster = Cluster("/shared/run", prints="Ray says\n" + "\n".join(lines) + "\n")
    assert [found["state"] for found in looks(cluster, monkeypatch, live=True)] == ["running", "running", "done"]
    assert cluster.sent[0]["entrypoint"] == "python -m cluster.cli.main top /shared/run --json"
    assert cluster.taken_back[-1] == ("delete", "raysubmit_errand")


def test_a_run_that_fell_silent_with_its_job_has_ended_as_that_did(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster("/shared/run", status="FAILED", prints=json.dumps({"state": "silent"}) + "\n")
    (found,) = looks(cluster, monkeypatch)
    assert (found["state"], found["job"]["status"]) == ("failed", "FAILED")


def test_a_run_directory_that_is_seen_here_needs_no_errand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILE).write_text(json.dumps(snapshot("ppo")))
    cluster = Cluster(str(tmp_path))
    (found,) = looks(cluster, monkeypatch)
    assert (found["command"], found["state"], cluster.sent) == ("ppo", "running", [])


def test_a_job_that_has_not_begun_has_no_processes_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = looks(Cluster("/shared/run", status="PENDING"), monkeypatch)
    assert (found["state"], found["processes"], found["job"]["message"]) == ("pending", [], "waits for room")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(found, "raysubmit_a", 100), screen(found, "raysubmit_a", 100, 24))
    assert console.export_text().startswith(
        "rayward ppo  raysubmit_a: pending: waits for room  (job raysubmit_a is PENDING)"
    )


@pytest.mark.parametrize(
    ("cluster", "told"),
    [
        (Cluster(), "job raysubmit_a has no run directory: it runs 'ppo'"),
        (Cluster("/shared/run", prints="rayward status: /shared/run/status.json does not exist"), "does not exist"),
    ],
)
def test_what_has_no_status_is_told(monkeypatch: pytest.MonkeyPatch, cluster: Cluster, told: str) -> None:
    with pytest.raises(JobError, match=told):
        looks(cluster, monkeypatch)
