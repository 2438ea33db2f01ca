"""What later commands find of earlier ones."""

import json
from pathlib import Path

import pytest

from cluster.rundir.history import earlier_run, forget_stage, forget_steps, has_all, last_steps, remember_run
from tests.full_disk import FullDisk
from tests.synthetic_run import write_rows


def test_each_command_has_its_own_wandb_run(tmp_path: Path):
    assert earlier_run(tmp_path, "ppo") is None
    remember_run(tmp_path, "ppo", "a1", finished=True)
    remember_run(tmp_path, "sft", "b2", finished=True)
    remember_run(tmp_path, "ppo", "c3", finished=False)
    assert (earlier_run(tmp_path, "ppo"), earlier_run(tmp_path, "sft")) == ("c3", "b2")
    assert [has_all(tmp_path, name) for name in ("ppo", "sft", "reward")] == [False, True, False]


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b'{"ppo": {}}', b'{"ppo": "x"}'])
def test_what_is_noted_of_wandb_never_stops_a_run(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "wandb-runs.json").write_bytes(content)
    assert earlier_run(tmp_path, "ppo") is None
    assert f"{tmp_path}/wandb-runs.json is damaged" in caplog.text
    remember_run(tmp_path, "ppo", "a1", finished=True)
    FullDisk(monkeypatch).full = True
    remember_run(tmp_path, "ppo", "b2", finished=False)
    assert "wandb-runs.json cannot be written (No space left on device)" in caplog.text
    assert earlier_run(tmp_path, "ppo") == "a1"


def test_the_last_step_of_each_area_of_a_stage_is_found_behind_a_torn_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    assert last_steps(tmp_path) == {}
    rows = [
        {"stage": "sft", "step": 3, "sft/loss": 1.0},
        {"stage": "ppo", "step": 7, "score/mean": 1.0, "score/std": 1.0},
        {"stage": "ppo", "step": 5, "score/mean": 1.0, "heldout/gold": 0.5},
        {"step": 9, "score/mean": 1.0},
    ]
    write_rows(tmp_path / "metrics.jsonl", rows)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "ppo", "st')
    steps = {("sft", "sft"): 3, ("ppo", "score"): 7, ("ppo", "heldout"): 5}
    assert last_steps(tmp_path) == steps
    assert "metrics.jsonl:4 is damaged" in caplog.text
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n[]\n")
    assert last_steps(tmp_path) == steps
    assert "metrics.jsonl:5 is damaged, and left out" in caplog.text


def test_a_stage_is_forgotten_and_the_others_are_not(tmp_path: Path):
    write_rows(tmp_path / "metrics.jsonl", [{"stage": "ppo", "step": 1}, {"stage": "ppo-noptx", "step": 1}])
    write_rows(tmp_path / "phases.jsonl", [{"phase": "ppo: 2 iterations", "stage": "ppo", "seconds": 1.0}])
    forget_stage(tmp_path, "ppo")
    (left,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert left["stage"] == "ppo-noptx"
    assert (tmp_path / "phases.jsonl").read_text() == ""


def test_the_steps_that_are_done_again_are_forgotten_with_a_torn_line(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    assert not forget_steps(tmp_path, "sft", 2)
    rows = [{"stage": stage, "step": step} for stage in ("reward", "sft") for step in range(4)]
    write_rows(file, rows)
    assert not forget_steps(tmp_path, "sft", 3)
    with file.open("a") as lines:
        lines.write('{"stage": "sft", "st')
    assert forget_steps(tmp_path, "sft", 1)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows[:6]
    assert file.read_text().endswith("\n"), "what is appended begins a line of its own"
