"""`rayward plan` and --dry-run as they are typed."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main as cli
from cluster.plan import machines
from cluster.plan.machines import GIB, Machine, cores
from cluster.rundir.lock import owned
from reward_server.preferences.labeling import Comparison, write_comparisons
from reward_server.schema import Message
from tests.tiny_models import tiny_causal_lm

NODE = '[{cpus = 8, memory_gib = 64, gpus = 4, gpu = "A100"}]'


@pytest.fixture(autouse=True)
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores and 24 GiB, wherever this runs."""
    machine = Machine(name="this machine", cpus=2, memory=24 * GIB, gpus=0, device=cores(2, 24 * GIB))
    monkeypatch.setattr(machines, "this_machine", lambda: machine)


def rayward(*words: str | Path) -> int:
    return cli.main([*map(str, words)])


def test_a_plan_is_printed_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert rayward("plan", "--preset", "quickstart") == 0
    text = capsys.readouterr().out
    for said in (
        "2 cores, 24.0 GiB, 0 GPUs",
        "smollm2-135m: 134,515,008 parameters",
        "total_episodes",
        "2 x generator",
        "policy: optimizer",
        "update policy",
        "20 of a prompt, 13 of a response on average",
        "This plan fits.",
    ):
        assert said in text
    assert list(tmp_path.iterdir()) == []


def test_json_has_bytes_seconds_and_counts(capsys: pytest.CaptureFixture[str]):
    words = ("--plan.model", "llama-3.1-8b", "--plan.nodes", NODE, "--cluster.learner_ranks", "2")
    assert rayward("plan", "--json", *words) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["works"] is False
    assert any("node-0/gpu-" in problem for problem in found["problems"])
    assert found["models"]["policy"]["parameters"] == 8_030_261_248
    ppo = found["steps"]["ppo"]
    assert ppo["memory"]["learner-0"]["reference: weights"]["device"] == 2 * 8_030_261_248
    assert ppo["memory"].keys() == {"generator-0", "learner-0", "learner-1", "reward-0"}
    assert ppo["batches"]["total_episodes"] == 256_000
    assert [process["machine"] for process in found["processes"]] == ["node-0"] * 4
    assert ppo["seconds"] == pytest.approx(sum(ppo["phases"].values()))
    assert rayward("plan", *words) == 1
    text = capsys.readouterr().out
    assert "cannot work: " in text
    assert text.rstrip().endswith("This plan cannot work as it stands.")


def test_a_dry_run_plans_one_command_and_says_what_would_stop_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny_causal_lm(tmp_path / "base")
    run = tmp_path / "run"
    assert rayward("sft", "--dry-run", "--run", run, "--models.base", tmp_path / "base", "--sft.max_tokens", "64") == 1
    text = capsys.readouterr().out
    assert "sft: memory" in text
    assert "ppo" not in text
    assert "data.demonstrations is not set" in text
    assert f"reads models.base: {tmp_path / 'base'}\n" in text
    assert not run.exists()


def test_a_dry_run_names_every_file_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("run/data").mkdir(parents=True)
    comparison = '{"id": "a", "prompt": "hi", "completions": [{"text": "a"}, {"text": "b"}]}'
    Path("run/data/completions.jsonl").write_text(comparison + "\n")
    assert rayward("rank", "--dry-run", "--run", "run") == 0
    own = tmp_path / "run" / "data" / "completions.jsonl"
    assert f"reads data.completions: {own}\n" in capsys.readouterr().out
    Path("mine.jsonl").write_text(comparison + "\n")
    assert rayward("rank", "--dry-run", "--run", "run", "--json", "--data.completions", "mine.jsonl") == 0
    assert json.loads(capsys.readouterr().out)["reads"] == {"data.completions": str(tmp_path / "mine.jsonl")}
    with owned(Path("run"), "sft"):
        assert rayward("rank", "--dry-run", "--run", "run") == 1
        assert "cannot work: run is at work: `rayward sft`, PID " in capsys.readouterr().out
    assert not Path("run/owner.json").exists()


def test_the_own_model_of_a_run_is_what_is_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tiny_causal_lm(tmp_path / "sft")
    words = ("--preset", "quickstart", "--run", tmp_path, "--json")
    rayward("plan", *words)
    found = json.loads(capsys.readouterr().out)
    assert found["models"]["policy"]["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "the size of the model is not known: set models.base"),
        ("--plan.model lama", "the size of lama is not known"),
        (
            "--plan.nodes [{cpus=1,memory_gib=1,gpus=1,gpu='X'}] --plan.model smollm2-135m",
            "nothing is known of the GPU",
        ),
    ],
)
def test_what_cannot_be_planned_is_told(words: str, said: str, capsys: pytest.CaptureFixture[str]):
    assert rayward("plan", *words.split()) == 1
    assert said in capsys.readouterr().err


def test_json_of_a_run_itself_is_refused(capsys: pytest.CaptureFixture[str]):
    assert rayward("sft", "--json") == 2
    assert "--json goes with --dry-run" in capsys.readouterr().err


def test_a_command_without_processes_says_what_it_reads_and_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    assert rayward("rank", "--dry-run", "--run", run) == 1
    text = capsys.readouterr().out
    assert "rayward rank works in its own process" in text
    assert f"Writes {run}/data/comparisons.jsonl" in text
    assert f"data.completions is not set and {run}" in text
    write_comparisons(tmp_path / "c.jsonl", [RANKED])
    assert rayward("rank", "--dry-run", "--run", run, "--data.completions", tmp_path / "c.jsonl") == 0
    assert capsys.readouterr().out.endswith("It can start.\n")
    assert not run.exists()


RANKED = Comparison(
    id="c1",
    prompt=(Message(role="user", content="Hi"),),
    responses=("yes", "no"),
    ended=(True, True),
    ranks=None,
    labeler=None,
)


def planned(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    rayward(*words, "--preset", "quickstart", "--dry-run", "--json")
    return json.loads(capsys.readouterr().out)


GENERATORS = ["generator-0", "generator-1"]
ALL = ["learner-0", *GENERATORS, "reward-0", "reward-1"]


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        *(("sft", ALL[:1]), ("baseline", ALL[:1]), ("sample", GENERATORS), ("reward", ALL[:1])),
        *(("select", ALL[1:]), ("ppo", ALL), ("rounds", ALL), ("evaluate", ALL), ("serve", ALL[3:4])),
    ],
)
def test_every_command_plans_the_processes_that_it_starts(
    command: str, processes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = planned(capsys, command, "--run", tmp_path / "run")
    assert [process["name"] for process in found["processes"]] == processes
    assert list(found["steps"]) == (["sample", "reward", "ppo"] if command == "rounds" else [command])
    for step in found["steps"].values():
        held = {name for name, items in step["memory"].items() if sum(one["host"] for one in items.values()) > 2**30}
        assert held == set(step["memory"])
    assert not found["works"]  # the run directory has nothing of what it reads
    assert any(str(tmp_path) in problem for problem in found["problems"])


def test_rounds_are_planned_as_often_as_they_are_gone_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = planned(capsys, "rounds", "--run", tmp_path, "--rounds.count", "3", "--rounds.prompts", "100")
    steps = found["steps"]
    assert steps["sample"]["batches"]["prompts"] == 100
    assert steps["reward"]["batches"]["rows"] == 300 - 45  # the comparisons of all rounds, but those held out
    assert {name: step["times"] for name, step in steps.items()} == {"sample": 3, "reward": 2, "ppo": 36}


def test_replicas_of_the_reward_service_are_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ("--run", tmp_path, "--serve.max_replicas", "3")
    found = planned(capsys, "serve", *words)
    assert [process["name"] for process in found["processes"]] == ["reward-0", "reward-1", "reward-2"]
    assert list(found["steps"]["serve"]["phases"]) == ["score"]
    assert found["problems"] == [problem for problem in found["problems"] if "no reward model" in problem]
    rules = planned(capsys, "serve", "--run", tmp_path, "--scoring.parts", '[{kind = "length"}]')
    assert rules["works"]
    assert rules["models"]["reward"]["parameters"] == 0


def test_what_the_run_directory_holds_already_stops_a_dry_run_as_it_would_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "sft.json").write_text('{"made_of": {}, "complete": true}')
    tiny_causal_lm(tmp_path / "base")
    rows = "".join(f'{{"prompt": "{i}", "response": "yes"}}\n' for i in range(40))
    (tmp_path / "d.jsonl").write_text(rows)
    words = ("--models.base", tmp_path / "base", "--data.demonstrations", tmp_path / "d.jsonl")
    small = ("--sft.max_tokens", "64", "--sft.pretraining_share", "0", "--run", tmp_path)
    assert rayward("sft", "--dry-run", *words, *small) == 1
    assert "holds a stage 'sft' that is begun. Remedy: --resume" in capsys.readouterr().out
    assert rayward("sft", "--dry-run", "--restart", *words, *small) == 0
    assert "This plan fits." in capsys.readouterr().out
    assert rayward("quickstart", "--dry-run", "--run", tmp_path) == 1
    assert "holds a run already (sft)" in capsys.readouterr().out
