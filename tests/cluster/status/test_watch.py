"""What status and top print of a run directory, and how they end."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.runtime.exit_codes import DONE, FAILED
from cluster.runtime.health import Monitor
from cluster.status import watch
from cluster.status.snapshot import FILE, reporting, snapshot


def write(run: Path, **changes: Any) -> None:
    (run / FILE).write_text(json.dumps(snapshot("ppo", Monitor()) | {"started": time.time()} | changes))


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"ended": "done"}, DONE, "done"),
        ({"ended": "stopped"}, DONE, "stopped"),
        ({"ended": "failed"}, FAILED, "failed"),
        ({"host": "elsewhere", "time": time.time() - 90}, FAILED, "silent for"),
        ({}, DONE, "running on"),
        ({"paused": {"reason": "HTTP 503", "seconds": 7.0}}, DONE, "paused for 7.0 s: HTTP 503"),
    ],
)
def test_a_status_is_printed_and_the_exit_code_says_whether_somebody_should_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], code: int, said: str
) -> None:
    write(tmp_path, **changes)
    assert watch.status(tmp_path, as_json=False) == code
    assert said in " ".join(capsys.readouterr().out.split())
    assert watch.status(tmp_path, as_json=True) == code
    found = json.loads(capsys.readouterr().out)
    assert {"state", "processes", "waits", "progress", "alerts", "curves"} <= found.keys()


def test_top_prints_a_line_of_json_again_and_again_until_the_run_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster.cli.main", "top", str(tmp_path), "--json"]
    with reporting(tmp_path, "ppo", Monitor(), interval_s=0.2):
        top = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert top.stdout is not None
        assert [json.loads(top.stdout.readline())["state"] for _ in range(2)] == ["running", "running"]
    rest, _ = top.communicate(timeout=20)
    assert json.loads(rest.splitlines()[-1])["state"] == "done"
    assert top.returncode == DONE


def test_top_leaves_the_last_screen_when_the_run_has_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, ended="failed")
    assert watch.top(tmp_path, as_json=False) == FAILED
    assert "rayward ppo" in capsys.readouterr().out


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no command has run in"):
        watch.status(tmp_path / "none", as_json=False)
