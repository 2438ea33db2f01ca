"""Win rates by every kind of judge, as the command makes them: real engines, reward service and chat model."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from reward_server.address import free_port
from tests.stage_runs import rows
from tests.tiny_models import tiny_causal_lm, tiny_reward_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(390), pytest.mark.whole_machine]

VLLM = {
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
ITEMS = 3


@pytest.fixture
def judge(tmp_path: Path) -> Iterator[str]:
    """The address of a chat model that has learnt nothing."""
    tiny_causal_lm(tmp_path / "judge", hidden=128, max_positions=4096, seed=7)
    port, log = free_port("127.0.0.1"), tmp_path / "judge.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path / "judge")]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    with log.open("w") as said, subprocess.Popen(command, env=os.environ | VLLM, stdout=said, stderr=said) as server:
        try:
            until = time.monotonic() + 150
            while True:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1#tiny"
        finally:
            server.terminate()


def test_every_kind_of_judge_compares_what_models_say(tmp_path: Path, judge: str) -> None:
    run = tmp_path / "run"
    for seed, name in enumerate(("base", "sft")):
        tiny_causal_lm(run / name, hidden=128, seed=seed)
    gold = tiny_reward_model(tmp_path / "gold", seed=3)
    gold.config.rayward_normalisation = None
    gold.save_pretrained(tmp_path / "gold")
    prompts = rows(tmp_path / "prompts.jsonl", *({"id": f"p{n}", "prompt": f"hello {n}"} for n in range(ITEMS)))
    votes = tmp_path / "votes.csv"
    votes.write_text("prompt,model_a,model_b,verdict\np0,base,sft,b\np2,sft,base,a\n")
    command = [
        sys.executable,
        "-m",
        "cluster.cli.main",
        "evaluate",
        "--run",
        str(run),
        "--evaluation.suite",
        "win_rate",
    ]
    command += ["--data.prompts_heldout", str(prompts), "--rollout.max_new_tokens", "8", "--tracking.mode", "disabled"]
    command += ["--evaluation.judges", f"labeler,{tmp_path / 'gold'},{votes},{judge}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((run / "summary.json").read_text())["suite"]["sft"]["win_rate"]
    by_labeler, by_model, by_people, by_chat = (one["base"] for one in found.values())
    assert list(found)[1:3] == [str(tmp_path / "gold"), "people (votes.csv)"]
    for one in (by_labeler, by_model):
        assert one["win_rate"]["wins"] + one["win_rate"]["ties"] + one["win_rate"]["losses"] == ITEMS
    assert by_model["win_rate"]["ties"] == 0
    assert (by_people["win_rate"]["rate"], by_people["votes"]) == (1.0, 2)
    (answers,) = (run / "evaluations" / "win_rate").glob("*.answers.jsonl")
    given = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(given) == 2 * ITEMS, "both orders"
    assert by_chat["unparsed"] == len({row["id"] for row in given if row["verdict"] is None})
    assert "judged by tiny at 127.0.0.1" in " ".join(done.stdout.split())
