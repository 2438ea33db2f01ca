"""What trains, through the command line, killed with SIGKILL and resumed, beside a run left alone: the same bits."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.main import main
from tests.tiny_models import tiny_causal_lm, tiny_reward_model

ITERATIONS = 4
SETTINGS = {
    "ppo.iterations": ITERATIONS,
    "ppo.checkpoint_every": 2,
    "ppo.prompts_per_batch": 12,
    "ppo.minibatch_size": 6,
    "ppo.warmup_iterations": 3,
    "ppo.policy_optimizer.lr": 5e-3,
    "ppo.critic_optimizer.lr": 5e-3,
    "ppo.kl.target": 2.0,
    "ppo.kl.horizon": 50,
    "ppo.network.dtype": "float32",
    "ppo.pretraining.sequence_tokens": 32,
    "ppo.pretraining.sequences_per_episode": 0.5,
    "generator.dtype": "float32",
    "generator.max_model_len": 64,
    "generator.kv_cache_gib": 0.1,
    "scoring.dtype": "float32",
    "rollout.prompts_per_wave": 6,
    "rollout.max_prompt_tokens": 40,
    "rollout.max_new_tokens": 8,
    "evaluation.prompts": 6,
    "evaluation.every": 1,
    "tracking.mode": "disabled",
}
TRAINING = {  # 30 steps each
    "sft": {
        "batch_size": 6,
        "max_tokens": 64,
        "pretraining_share": 0.2,
        "residual_dropout": 0.1,
        "epochs": 6,
        "select": "loss",
    },
    "reward": {"prompts_per_batch": 3, "epochs": 6},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data."""
    root = tmp_path_factory.mktemp("resume")
    tiny_causal_lm(root / "sft", hidden=128)  # which vLLM wants on a CPU
    tiny_reward_model(root / "reward")
    prompts = [{"id": f"p{i}", "prompt": f"say {chr(ord('a') + i)}"} for i in range(10)]
    texts = [{"text": f"the quick brown fox number {i} jumps over the lazy dog"} for i in range(40)]
    rows: dict[str, list[dict[str, Any]]] = {"prompts": prompts, "prompts_heldout": prompts[:6]}
    rows |= {"pretraining": texts, "pretraining_valid": texts[:8]}
    rows["demonstrations"] = [{"prompt": f"say {i}", "response": "good " * (i % 4 + 1)} for i in range(25)]
    rows["comparisons"] = [{"prompt": f"say {i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(18)]
    for name, values in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return root


def command(made: Path, run: Path, *words: str) -> list[str]:
    settings: dict[str, Any] = SETTINGS | {f"models.{name}": made / name for name in ("sft", "reward")}
    for name in ("prompts", "prompts_heldout", "pretraining", "pretraining_valid"):
        settings[f"data.{name}"] = made / f"{name}.jsonl"
    options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return ["ppo", "--run", str(run), *options, *words]


def start_and_kill(words: list[str], checkpoint: Path) -> None:
    """SIGKILL the command while it works on the step after that checkpoint."""
    program = [sys.executable, "-m", "cluster.cli.main", *words]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 200
        while not checkpoint.is_dir():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < end, "no checkpoint was written"
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def logged(run: Path) -> dict[int, dict[str, float]]:
    """What each step logged last, times apart."""
    steps: dict[int, dict[str, float]] = {}
    for row in lines(run):
        times = ("time", "checkpoint/", "heldout/seconds")
        kept = {k: v for k, v in row.items() if not k.startswith(times) and not k.endswith("_s")}
        steps.setdefault(row["step"], {}).update(kept)
    return steps


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_was_killed_and_resumed_is_bitwise_the_one_that_was_not(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(made, whole)) == 0
    start_and_kill(command(made, parts), parts / "checkpoints" / "ppo" / "version-000002")
    assert main(command(made, parts)) == 2
    assert "holds a stage 'ppo' that is begun. Remedy: --resume goes on with it" in capfd.readouterr().err
    assert main(command(made, parts, "--resume")) == 0
    shown = capfd.readouterr().out
    assert f"goes on after iteration 2, from {parts}/checkpoints/ppo/version-000002" in shown
    for name in ("policy", "policy_ema", "policy_best"):
        one, other = ((run / name / "model.safetensors").read_bytes() for run in (whole, parts))
        assert one == other, name
    assert logged(parts) == logged(whole)
    for name in ("sft", "ppo-000001", "ppo-000002", "ppo-000003", "ppo"):
        one, other = ((run / "evaluations" / f"{name}.jsonl").read_text() for run in (whole, parts))
        assert one == other
    assert main(["audit", str(parts), "--json"]) == 0
    stage = json.loads(capfd.readouterr().out)["stages"]["ppo"]
    assert (stage["trained"], stage["twice"], stage["resumed"], stage["outstanding"]) == (48, 0, 1, 0)
    assert stage["issued"] == 48 + sum(stage["dropped"].values())  # of the kill, and of the wave after the last batch


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("stage", "ranks"), [("sft", 1), ("reward", 1)])
def test_a_model_whose_training_was_killed_and_resumed_is_bitwise_the_one_left_alone(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], stage: str, ranks: int
):
    section = TRAINING[stage] | {"checkpoint_every": 2, "network.dtype": "float32", "optimizer.lr": 5e-3}
    settings = {f"{stage}.{name}": value for name, value in section.items()}
    settings |= {"models.base" if stage == "sft" else "models.sft": made / "sft"}
    files = ("demonstrations", "pretraining" if stage == "sft" else "comparisons")
    settings |= {f"data.{name}": made / f"{name}.jsonl" for name in files}
    settings |= {"ppo.pretraining.sequence_tokens": 32} if stage == "sft" else {}
    settings |= {"cluster.learner_ranks": ranks, "tracking.mode": "disabled"}
    words = [stage, *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*words, "--run", str(whole)]) == 0
    checkpoints = parts / "checkpoints" / stage
    start_and_kill([*words, "--run", str(parts)], checkpoints / "version-000004")
    assert checkpoints.is_dir(), "it was complete before it could be killed"
    assert main([*words, "--run", str(parts), "--resume"]) == 0
    done = re.search(rf"{stage}: goes on after step (\d+), from {checkpoints}/version-", capfd.readouterr().out)
    assert done
    assert 4 <= int(done[1]) < 30
    one, other = ((run / stage / "model.safetensors").read_bytes() for run in (whole, parts))
    assert one == other
    assert logged(parts) == logged(whole)
    steps = [row["step"] for row in lines(parts) if f"{stage.replace('reward', 'reward_model')}/lr" in row]
    assert steps == list(range(1, 31))
    assert not checkpoints.exists()
