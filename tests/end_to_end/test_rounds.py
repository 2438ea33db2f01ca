"""Two rounds through the command line, and the same command again: real Ray, vLLM and DeepSpeed, a tiny model."""

import json
import os
import subprocess
import sys

import pytest

from learner.data.ledger import audit
from tests.tiny_models import tiny_causal_lm

pytestmark = pytest.mark.slow

ROUNDS = 2
HOUSE = """
[cluster]
generators = 1
[generator]
dtype = "float32"
max_model_len = 64
kv_cache_gib = 0.1
[rollout]
prompts_per_wave = 16
max_prompt_tokens = 40
max_new_tokens = 12
[sample]
completions_per_prompt = 3
[labeler]
name = "taste:short"
[reward]
prompts_per_batch = 4
network = { dtype = "float32" }
optimizer = { lr = 1e-3 }
[scoring]
dtype = "float32"
[ppo]
iterations = 2
prompts_per_batch = 16
minibatch_size = 8
warmup_iterations = 0
pretraining = { coef = 0.0, sequence_tokens = 16 }
network = { dtype = "float32" }
policy_optimizer = { lr = 1e-3 }
critic_optimizer = { lr = 1e-3 }
[evaluation]
prompts = 16
[tracking]
mode = "disabled"
"""


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    run = folder / "run"
    tiny_causal_lm(run / "sft", hidden=128)
    asks = [{"id": f"p{i}", "prompt": f"hello world {i}"} for i in range(40)]
    write(run / "data" / "preference_prompts.jsonl", asks[:16])
    write(run / "data" / "prompts.jsonl", asks)
    write(
        run / "data" / "prompts_heldout.jsonl",
        [row | {"prompt": f"is {row['id']} good?"} for row in asks],
    )
    write(run / "data" / "demonstrations.jsonl", [row | {"response": "this is good"} for row in asks[:4]])
    write(run / "data" / "pretraining_valid.jsonl", [{"text": "the quick brown fox jumps over the lazy dog " * 4}])
    (folder / "taste.py").write_text("def short(responses):\n    return [-float(len(one)) for one in responses]\n")
    (folder / "house.toml").write_text(HOUSE)
    command(folder, "first")
    command(folder, "second")
    return run


def command(folder, name):
    words = ["rounds", "--run", folder / "run", "--config", folder / "house.toml", "--rounds.prompts", 8]
    words += ["--rounds.count", ROUNDS, "--rounds.labelers", "simulated", "--rounds.sft_completions", 1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), str(folder)])}
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli.main", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / f"{name}.txt").write_text(done.stdout)


@pytest.mark.timeout(600)
def test_one_set_of_processes_serves_every_round_and_a_second_command_has_nothing_to_do(run):
    shown = (run.parent / "first.txt").read_text()
    assert shown.count("start the vLLM actors ...") == shown.count("start the learner ...") == 1
    assert "hand the weights of run/sft to the actors" in shown  # for the SFT model's share of the second sheet
    again = (run.parent / "second.txt").read_text()
    assert "start" not in again
    assert "The report is in" in again


def test_every_round_has_its_models_and_accounts_for_every_sample(run):
    for number in range(1, ROUNDS + 1):
        part = run / f"round-{number}"
        for name in ("reward", "policy", "policy_ema"):
            assert (part / name / "config.json").is_file()
        assert audit(part / "ledger-ppo.jsonl").trained == 32
    assert (run / "round-1" / "policy" / "model.safetensors").read_bytes() != (
        run / "round-2" / "policy" / "model.safetensors"
    ).read_bytes()


def test_rounds_are_compared_on_the_same_prompts(run):
    rounds = json.loads((run / "summary.json").read_text())["rounds"]
    assert rounds["1"]["rankings"] == rounds["2"]["rankings"] == "simulated labeler (taste:short)"
    for name in ("win_rate_sft", "win_rate_previous"):
        found = rounds["2"][name]
        assert found["wins"] + found["losses"] + found["ties"] == 16
        assert found["ci"][0] <= found["rate"] <= found["ci"][1]
    files = [run / f"round-{k}" / "evaluations" / "sft.jsonl" for k in (1, 2)]
    first, second = ([json.loads(line)["response"] for line in file.open()] for file in files)
    assert first == second  # the same model, prompts and seeds


def test_the_lineage_leads_from_the_last_policy_to_the_first_sheet(run):
    rows = {row["path"]: row for row in map(json.loads, (run / "lineage.jsonl").open())}

    def ancestors(path):
        for source in rows[path]["inputs"]:
            yield source["path"]
            if source["path"] in rows:
                yield from ancestors(source["path"])

    found = set(ancestors("round-2/policy"))
    assert {"sft", "round-2/reward", "round-1/policy", "round-1/reward"} <= found
    assert "round-1/sheet.csv" in rows
