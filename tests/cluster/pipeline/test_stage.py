"""A stage is one file and one line: the example of docs/architecture.md is added, and everything else follows."""

import inspect
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from actors.prompts import read_prompts
from cluster.cli import main as cli
from cluster.cli.commands import COMMANDS, _of
from cluster.pipeline.stage import Stage
from cluster.pipeline.stages import STAGES
from tests.full_disk import FullDisk
from tests.stage_runs import make_job, run_stage

PAGE = (Path(__file__).parents[3] / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The words of the command of the page's stage, in a new run directory with prompts."""
    (example,) = re.findall(r"```python\n(class .*?)```", PAGE, re.DOTALL)
    found: dict[str, Any] = {"Stage": Stage, "read_prompts": read_prompts, "__name__": "example"}
    exec(example, found)
    monkeypatch.setitem(STAGES, "count", found["CountWords"])
    monkeypatch.setitem(COMMANDS, "count", _of(found["CountWords"]))
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"id": "a", "prompt": "what is a tide"}\n{"id": "b", "prompt": "name a river"}\n')
    words = ["--run", str(tmp_path / "run"), "--data.prompts", str(prompts), "--tracking.mode", "disabled"]
    return ["count", *words]


def test_the_stage_of_the_page_is_ten_lines_and_a_command(count: list[str], tmp_path: Path, capfd: Any):
    run = tmp_path / "run"
    assert cli.main([*count, "--dry-run"]) == 0
    assert "It can start." in capfd.readouterr().out
    assert not run.exists()
    assert cli.main(count) == 0
    assert (run / "words.txt").read_text() == "7\n"
    assert json.loads((run / "stages" / "count.json").read_text())["complete"]
    assert '"path": "words.txt"' in (run / "lineage.jsonl").read_text()
    assert cli.main(count) == 2
    assert "--resume leaves it as it is" in capfd.readouterr().err
    assert cli.main([*count, "--resume"]) == 0
    assert "count: complete, and left as it is" in capfd.readouterr().out
    assert cli.main(["count", "--help"]) == 0
    assert "Count the words of the prompts." in capfd.readouterr().out
    assert cli.main(["--help"]) == 0
    assert "Count the words of the prompts." in capfd.readouterr().out


def test_what_it_reads_is_checked_before_anything_is_recorded(count: list[str], tmp_path: Path, capfd: Any):
    (tmp_path / "p.jsonl").write_text('{"prompt": 3}\n')
    assert cli.main([*count, "--dry-run"]) == 1
    assert cli.main(count) in (1, 2)
    assert "p.jsonl:1" in capfd.readouterr().err
    assert not (tmp_path / "run" / "stages").exists()


def test_a_stage_is_complete_when_all_that_it_logged_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk = FullDisk(monkeypatch)

    class Logging(Stage):
        name, results = "logging", ("result",)

        async def run(self, processes: Any, inputs: Any) -> None:
            (self.job.run_dir / "result").mkdir()
            disk.full = True
            self.job.tracker.log("logging", 1, {"a/b": 1.0})
            threading.Timer(0.3, setattr, (disk, "full", False)).start()

    job = make_job(tmp_path / "run")
    job.monitor.disk.retry_s = 0.02
    run_stage(Logging(job))
    assert disk.refused > 2
    assert json.loads((job.run_dir / "metrics.jsonl").read_text())["step"] == 1
    assert json.loads((job.run_dir / "stages" / "logging.json").read_text())["complete"]


def test_five_calls_lead_from_the_command_to_a_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """PPO's own way to the loop, two more, is held in test_ppo.py: seven in all."""
    found: list[str] = []

    class Deep(Stage):
        name, purpose, files, example, sections = "deep", "p", "f", "rayward deep", ("tracking",)

        async def run(self, processes: Any, inputs: Any) -> None:
            cluster = str(Path(__file__).parents[3] / "cluster")
            found.extend(one.function for one in inspect.stack() if one.filename.startswith(cluster))

    monkeypatch.setitem(STAGES, "deep", Deep)
    monkeypatch.setitem(COMMANDS, "deep", _of(Deep))
    assert cli.main(["deep", "--run", str(tmp_path), "--tracking.mode", "disabled"]) == 0
    assert found == ["_work", "execute", "_run_stage", "main"]  # and its own `run` is the fifth
