"""What later commands find of earlier ones."""

import json
from pathlib import Path

import pytest

from cluster.rundir.history import earlier_run, forget_stage, forget_steps, remember_run, sent_steps
from tests.full_disk import FullDisk
from tests.synthetic_run import write_rows


def test_each_command_has_its_own_wandb_run(tmp_path: Path):
    assert earlier_run(tmp_path, "ppo") is None
    remember_run(tmp_path, "ppo", "a1", {"ppo kl": 5})
    remember_run(tmp_path, "sft", "b2", {"sft sft": 7})
    remember_run(tmp_path, "ppo", "c3", {})
    assert (earlier_run(tmp_path, "ppo"), earlier_run(tmp_path, "sft")) == ("c3", "b2")
    assert [sent_steps(tmp_path, name) for name in ("ppo", "sft", "reward")] == [{}, {"sft sft": 7}, {}]


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b'{"ppo": {}}', b'{"ppo": "x"}'])
def test_what_is_noted_of_wandb_never_stops_a_run(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "wandb-runs.json").write_bytes(content)
    assert earlier_run(tmp_path, "ppo") is None
    assert f"{tmp_path}/wandb-runs.json is damaged" in caplog.text
    remember_run(tmp_path, "ppo", "a1", {"ppo kl": 5})
    FullDisk(monkeypatch).full = True
    remember_run(tmp_path, "ppo", "b2", {})
    assert "wandb-runs.json cannot be written (No space left on device)" in caplog.text
    assert earlier_run(tmp_path, "ppo") == "a1"


def test_a_stage_is_forgotten_and_the_others_are_not(tmp_path: Path):
    write_rows(tmp_path / "metrics.jsonl", [{"stage": "ppo", "step": 1}, {"stage": "ppo-noptx", "step": 1}])
    write_rows(tmp_path / "phases.jsonl", [{"phase": "ppo: 2 iterations", "stage": "ppo", "seconds": 1.0}])
    forget_stage(tmp_path, "ppo")
    (left,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert left["stage"] == "ppo-noptx"
    assert (tmp_path / "phases.jsonl").read_text() == ""


def test_the_steps_that_are_done_again_are_forgotten_with_lines_that_are_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "metrics.jsonl"
    assert not forget_steps(tmp_path, "sft", 2)
    rows = [{"stage": stage, "step": step} for stage in ("reward", "sft") for step in range(4)]
    write_rows(file, [*rows, {"step": 9}])
    with file.open("ab") as lines:
        lines.write(b'\xff\xfe\n[]\n{"stage": "sft", "st')
    assert forget_steps(tmp_path, "sft", 1)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows[:6]
    assert file.read_text().endswith("\n"), "what is appended begins a line of its own"
    damaged = [f"metrics.jsonl:{number} is damaged, and left out" for number in (9, 10, 11)]
    assert all(one in caplog.text for one in damaged)
    assert "metrics.jsonl:12" not in caplog.text, "what a killed command was writing is no damage"
    assert not forget_steps(tmp_path, "sft", 1)
