"""`rayward plan` and --dry-run as they are typed."""

import json
from pathlib import Path

import pytest

from cluster import cli, planning
from cluster.hardware import GIB, Device, Machine
from tests.tiny_models import tiny_causal_lm

NODE = '[{cpus = 8, memory_gib = 64, gpus = 4, gpu = "A100"}]'


@pytest.fixture(autouse=True)
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores that need not be measured."""
    cores = Device(name="2 cores", flops=4e11, bandwidth=3e10, memory=24 * GIB, link=15e9, source="given")
    machine = Machine(name="this machine", cpus=2, memory=24 * GIB, gpus=0, device=cores)
    monkeypatch.setattr(planning, "this_machine", lambda: machine)


def rayward(*words: str | Path) -> int:
    return cli.main([*map(str, words)])


def test_a_plan_is_printed_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert rayward("plan", "--preset", "quickstart") == 0
    text = capsys.readouterr().out
    for said in (
        "this machine: 2 cores, 24.0 GiB, 0 GPUs",
        "smollm2-135m: 134,515,008 parameters",
        "64 prompts x 1 samples, each a trajectory",
        "learner-0",
        "policy: optimizer",
        "6 N T / F with pretraining",
        "This plan fits.",
    ):
        assert said in text
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_cannot_work_is_exit_code_1(capsys: pytest.CaptureFixture[str]):
    assert rayward("plan", "--preset", "quickstart", "--ppo.minibatch_size", "30") == 1
    text = capsys.readouterr().out
    assert "cannot work: ppo.minibatch_size = 30 does not divide" in text
    assert text.rstrip().endswith("This plan cannot work as it stands.")


def test_json_has_bytes_seconds_and_counts(capsys: pytest.CaptureFixture[str]):
    words = ("--plan.model", "llama-3.1-8b", "--plan.nodes", NODE, "--cluster.learner_ranks", "2")
    assert rayward("plan", "--json", *words) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["works"] is False
    assert any("node-0/gpu-" in problem for problem in found["problems"])
    assert found["models"]["policy"]["parameters"] == 8_030_261_248
    memory = found["steps"]["ppo"]["memory"]
    assert memory["learner-0"]["reference: weights"]["device"] == 2 * 8_030_261_248
    assert memory.keys() == {"generator-0", "learner-0", "learner-1", "reward"}
    assert found["steps"]["ppo"]["batches"]["total_episodes"] == 256_000
    assert [process["machine"] for process in found["processes"]] == ["node-0"] * 4
    assert found["iteration"]["least_s"] > 0


def test_a_dry_run_plans_one_command_and_says_what_would_stop_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny_causal_lm(tmp_path / "base")
    run = tmp_path / "run"
    assert rayward("sft", "--dry-run", "--run", run, "--models.base", tmp_path / "base", "--sft.max_tokens", "64") == 1
    text = capsys.readouterr().out
    assert "Step 1, SFT: memory" in text
    assert "Step 3" not in text
    assert "data.demonstrations is not set" in text
    assert not run.exists()


def test_the_own_model_of_a_run_is_what_is_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tiny_causal_lm(tmp_path / "sft")
    words = ("--preset", "quickstart", "--run", tmp_path, "--json")
    rayward("plan", *words)
    found = json.loads(capsys.readouterr().out)
    assert found["models"]["policy"]["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan"], "the size of the model is not known: set models.base"),
        (["plan", "--plan.model", "lama"], "the size of lama is not known"),
        (
            ["plan", "--plan.nodes", '[{cpus = 1, memory_gib = 1, gpus = 1, gpu = "X"}]'],
            "nothing is known of the device",
        ),
    ],
)
def test_what_cannot_be_planned_is_told(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    if "--plan.model" not in words and len(words) > 1:
        words += ["--plan.model", "smollm2-135m"]
    assert rayward(*words) == 1
    assert said in capsys.readouterr().err


def test_json_of_a_run_itself_is_refused(capsys: pytest.CaptureFixture[str]):
    assert rayward("sft", "--json") == 2
    assert "--json goes with --dry-run" in capsys.readouterr().err


def test_a_command_without_processes_has_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert rayward("rank", "--dry-run", "--run", tmp_path / "run") == 0
    assert "starts no other process" in capsys.readouterr().out
