"""A shortened tiny quickstart through the command line: real Ray, vLLM and DeepSpeed, from raw chats to the report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from cluster import dashboard
from cluster.dashboard import SECTIONS
from learner.ledger import audit
from reward_server.encoding import ChatEncoding
from tests.wandb_runs import history, records

ITERATIONS = 8
SHORT = {
    "quickstart.pretraining": 150,
    "quickstart.demonstrations": 300,
    "quickstart.preference_prompts": 120,
    "quickstart.prompts": 400,
    "ppo.iterations": ITERATIONS,
    "ppo.warmup_iterations": 0,
    "ppo.prompts_per_batch": 64,
    "ppo.minibatch_size": 32,
    "evaluation.prompts": 48,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    options = [part for key, value in SHORT.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "cluster.cli", "quickstart", "--tiny", "--run", str(folder), *options]
    environment = {**os.environ, "WANDB_API_KEY": "canary-0123456789abcdef0123456789abcdef01234567"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    assert done.stderr == ""  # the chatter of libraries belongs into the log files
    return folder


def rows(run, stage):
    """The metrics of each iteration, which may be logged in parts: its own, its checkpoint's, the held-out ones."""
    steps = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["stage"] == stage:
            steps.setdefault(row["step"], {}).update(row)
    return [row for step, row in steps.items() if step]  # at 0 there are held-out metrics alone


@pytest.mark.timeout(660)
def test_the_reward_rises_in_both_arms(run):
    for arm in ("ppo", "ppo-noptx"):
        scores = [row["score/mean"] for row in rows(run, arm)]
        assert len(scores) == ITERATIONS
        assert fmean(scores[-2:]) > fmean(scores[:2]) + 0.1, scores


def test_the_first_iteration_is_on_policy_and_starts_at_the_reference(run):
    first = rows(run, "ppo")[0]
    assert first["kl/mean"] == pytest.approx(0, abs=1e-4)
    assert first["ratio/first_minibatch"] == pytest.approx(1, abs=1e-5)
    assert first["staleness/max"] == 0
    assert rows(run, "ppo")[-1]["kl/mean"] > 0.01


def test_sampler_and_learner_agree_at_every_publication(run):
    for row in rows(run, "ppo"):
        assert row["parity/mean_gap"] < 1e-3
        assert row["importance/log_ratio_mean"] < 1e-3  # on the tokens that were trained, too


def logged(run):
    """(stage, name) of every metric."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {(row["stage"], name) for row in lines for name in row if "/" in name}


def test_every_plot_of_the_dashboards_has_its_metric(run):
    found = {name if name.startswith(f"{stage}/") else f"{stage}/{name}" for stage, name in logged(run)}
    assert {metric for plots in SECTIONS.values() for metrics in plots.values() for metric in metrics} <= found
    grafana = (Path(dashboard.__file__).parent / "grafana.json").read_text()
    assert {f"ppo/{name}" for name in re.findall(r'name=\\"([^"\\]+)\\"', grafana)} <= found


def test_every_metric_is_in_the_documentation_and_the_other_way_round(run):
    page = (Path(dashboard.__file__).parent.parent / "docs" / "metrics.md").read_text()
    told = set(re.findall(r"`([\w<>-]+(?:/[\w<>-]+)+)`", "".join(re.findall(r"^\| (.*?) \|", page, re.MULTILINE))))
    found = {name.replace(f"{stage}/", "<stage>/", 1) for stage, name in logged(run)}
    found = {re.sub(r"(age|gap)_\d+$", r"\1_<n>", name) for name in found}
    found = {re.sub(r"^buffer/dropped/.*", "buffer/dropped/<reason>", name) for name in found}
    assert found - told == set()
    rare = {name for name in told if name.startswith(("select/", "optimizer/", "buffer/dropped/"))}
    assert told - found <= rare


def test_held_out_prompts_are_answered_before_on_the_way_and_after(run):
    for arm in ("ppo", "ppo-noptx"):
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        curve = {row["step"]: row["heldout/gold"] for row in lines if row["stage"] == arm and "heldout/gold" in row}
        assert list(curve) == [0, 4, ITERATIONS]
        samples = (run / "evaluations" / f"{arm}-000004.jsonl").read_text().splitlines()
        assert curve[4] == pytest.approx(fmean(json.loads(line)["gold"] for line in samples))


def test_wandb_has_the_run_and_what_it_was_made_of(run):
    (started,) = json.loads((run / "wandb-runs.json").read_text()).values()
    found = records(run, started["id"])
    artefacts = [one["artifact"] for one in found if "artifact" in one and one["artifact"]["type"] != "run_table"]
    made, used = (
        {(one["name"], one["digest"]) for one in artefacts if one.get("useAfterCommit", False) is uses}
        for uses in (False, True)
    )
    assert {name for name, _ in used} >= {"run-sft", "run-reward", "run-data-comparisons.jsonl"}
    assert {(name, digest) for name, digest in used if name in ("run-sft", "run-reward")} <= made
    assert {"run-policy", "run-policy_ema", "run-policy-noptx"} <= {name for name, _ in made}
    gold = [row["ppo/step"] for row in history(found) if "ppo/heldout/gold" in row]
    assert gold == [0, 4, ITERATIONS]
    assert [row["ppo/step"] for row in history(found) if "ppo/heldout/samples._type" in row] == gold


def test_every_sample_is_accounted_for(run):
    for arm in ("ppo", "ppo-noptx"):
        found = audit(run / f"ledger-{arm}.jsonl")
        assert found.trained == ITERATIONS * SHORT["ppo.prompts_per_batch"]
        assert found.issued == found.trained + sum(found.dropped.values()) + found.outstanding
        assert found.outstanding == 0
        assert found.violations == ()


def test_the_models_are_plain_folders(run):
    for name in ("base", "sft", "policy", "policy_ema", "policy-noptx"):
        model = AutoModelForCausalLM.from_pretrained(run / name)
        assert model.config.pad_token_id != model.config.eos_token_id
        assert ChatEncoding.load(run / name).tokenizer.chat_template
    reward = AutoModelForSequenceClassification.from_pretrained(run / "reward")
    assert reward.config.num_labels == 1
    assert set(reward.config.rayward_normalisation) == {"gain", "bias"}


def test_the_report_says_whose_verdicts_it_shows(run):
    page = (run / "report.html").read_text()
    assert "simulated labeler (VADER)" in page
    assert "default-src 'none'" in page  # self-contained: the page may load nothing
    assert 'src="http' not in page
    assert (run / "report.png").stat().st_size > 10_000
    shown = (run / "stdout.txt").read_text()
    assert "simulated labeler (VADER)" in shown
    assert len(shown.splitlines()) < 120


def test_no_file_of_the_run_holds_a_secret(run):
    for path in run.rglob("*"):
        if path.is_file():
            assert b"canary-0123456789abcdef" not in path.read_bytes(), path
