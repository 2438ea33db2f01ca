"""`rayward best-of-n` with real engines and a reward service."""

import json
from pathlib import Path

import pytest

from cluster.cli.main import main
from tests.tiny_models import tiny_causal_lm, tiny_reward_model

pytestmark = pytest.mark.slow
SETTINGS = {
    "generator.dtype": "float32",
    "generator.max_model_len": 64,
    "generator.kv_cache_gib": 0.1,
    "scoring.dtype": "float32",
    "rollout.prompts_per_wave": 2,
    "rollout.max_prompt_tokens": 40,
    "rollout.max_new_tokens": 8,
    "rollout.missing_eos.rule": "none",
    "tracking.mode": "disabled",
}


def test_the_best_of_n_responses_of_a_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    tiny_causal_lm(tmp_path / "sft", hidden=128)  # which vLLM wants on a CPU
    tiny_reward_model(tmp_path / "reward")
    prompts = [{"id": f"p{i}", "prompt": f"say {chr(ord('a') + i)}"} for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    run, settings = tmp_path / "run", SETTINGS | {"data.prompts_heldout": tmp_path / "prompts.jsonl"}
    settings |= {f"models.{name}": tmp_path / name for name in ("sft", "reward")}
    words = ["best-of-n", "--run", str(run), *(f"--{key}={value}" for key, value in settings.items()), "--n", "8"]
    assert main([*words, "--dry-run"]) == 0
    assert not run.exists()
    assert main(words) == 0
    rows = [json.loads(line) for line in (run / "best-of-n" / "samples.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [row["id"] for row in prompts]
    for row in rows:
        assert len({one["response"] for one in row["responses"]}) == len({one["score"] for one in row["responses"]}) > 4
    told = json.loads((run / "summary.json").read_text())["best_of_n"]["curve"]
    scores = [point["score"]["value"] for point in told]
    assert [point["k"] for point in told] == [1, 2, 4, 8]
    assert scores == sorted(scores)
    assert scores[-1] == pytest.approx(sum(max(one["score"] for one in row["responses"]) for row in rows) / 5)
    assert "simulated labeler (VADER)" in capfd.readouterr().out
    assert main([*words, "--resume"]) == 0
    assert "best-of-n: complete, and left as it is" in capfd.readouterr().out
