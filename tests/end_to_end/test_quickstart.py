"""A shortened tiny quickstart through the command line: real Ray, vLLM and DeepSpeed, from raw chats to the report."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from cluster.tracking.workspace import SECTIONS
from learner.data.ledger import audit
from reward_server.address import free_port
from reward_server.encoding import ChatEncoding
from tests.run_monitor import monitored
from tests.wandb_runs import history, records

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
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
    "cluster.reward_replicas": 2,
    "tracking.tensorboard": "true",
}
CANARIES = {
    name: f"canary-{number}-0123456789abcdef0123456789abcdef"
    for number, name in enumerate(("WANDB_API_KEY", "HF_TOKEN", "RAYWARD_REWARD_TOKEN", "RAY_AUTH_TOKEN"))
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    port = free_port("127.0.0.1")
    settings = {**SHORT, "tracking.prometheus_port": port}
    options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "cluster.cli.main", "quickstart", "--tiny", "--run", str(folder), *options]
    environment = {**os.environ, **CANARIES}
    with monitored(folder, port) as seen:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    (folder / "seen.json").write_text(json.dumps(seen))
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


@pytest.mark.whole_machine
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
    grafana = (ROOT / "cluster" / "deploy" / "grafana.json").read_text()
    assert {f"ppo/{name}" for name in re.findall(r'name=\\"([^"\\]+)\\"', grafana)} <= found


def test_every_metric_is_in_the_documentation_and_the_other_way_round(run):
    page = (ROOT / "docs" / "metrics.md").read_text()
    told = set(re.findall(r"`([\w<>-]+(?:/[\w<>-]+)+)`", "".join(re.findall(r"^\| (.*?) \|", page, re.MULTILINE))))
    found = {name.replace(f"{stage}/", "<stage>/", 1) for stage, name in logged(run)}
    found = {re.sub(r"(age|gap)_\d+$", r"\1_<n>", name) for name in found}
    found = {re.sub(r"^buffer/dropped/.*", "buffer/dropped/<reason>", name) for name in found}
    assert found - told == set()
    kinds = ("select/", "best_of_n/", "optimizer/", "buffer/dropped/", "reward_model/accuracy_control")
    rare = {name for name in told if name.startswith(kinds)}
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


PROCESSES = {"controller", "learner-0", "generator-0", "generator-1", "reward-0", "reward-1"}


def test_while_it_works_every_process_says_what_it_takes_and_does(run):
    seen = json.loads((run / "seen.json").read_text())["status"]
    assert {one["state"] for one in seen} <= {"running", "done"}
    told = {}
    for status in seen:
        for one in status["processes"]:
            assert one["state"] in ("starting", "idle", "working", "paused", "silent"), one
            if one["vitals"]:
                told.setdefault(one["name"], []).append(one)
    assert told.keys() == PROCESSES
    facts = {name: [one["vitals"]["facts"] for one in found] for name, found in told.items()}
    most = {name: Counter() for name in facts}
    for name, found in facts.items():
        for fact in found:
            most[name] |= Counter(fact)  # the largest of each
    for name in ("controller", "learner-0", "generator-0", "generator-1"):
        assert most[name]["version"] >= ITERATIONS - 1, name
    assert most["generator-0"]["tokens"] > 1000
    assert most["generator-1"]["running"] > 0
    assert most["reward-0"]["scored"] + most["reward-1"]["scored"] > ITERATIONS * 64
    for name, found in told.items():
        assert found[-1]["vitals"]["resident"] > 100 * 2**20, name
        assert found[-1]["vitals"]["cpu_s"] > 1, name
    assert max(one["cores"] or 0 for one in told["learner-0"]) > 0.5
    assert "language_model_step" in {one["vitals"]["doing"] for one in told["learner-0"]}


def test_while_it_works_it_says_how_far_it_is_and_who_waits_for_whom(run):
    seen = json.loads((run / "seen.json").read_text())["status"]
    waits = [f"{wait['who']} waits for {wait['for']}" for one in seen for wait in one["waits"]]
    expected = r"the learner waits for batch \d+: \d+ of its 64 prompts: .*\d+ at generator-[01] for \d+ s"
    assert any(re.fullmatch(expected, wait) for wait in waits), waits
    assert any(re.fullmatch(r"generator-0 waits for its engine to start .*", wait) for wait in waits), waits
    steps = [one["progress"]["step"] for one in seen if one["progress"] and one["progress"]["stage"] == "ppo"]
    assert steps == sorted(steps)
    assert steps[-1] >= ITERATIONS - 1
    left = [one["progress"]["left_s"] for one in seen if one["progress"] and one["progress"]["stage"] == "ppo"]
    assert 0 < max(filter(None, left)) < 300
    assert "start the vLLM actors" in {phase["phase"] for one in seen for phase in one["phases"]}


def test_prometheus_is_told_of_every_process(run):
    pages = json.loads((run / "seen.json").read_text())["page"]
    text = "\n".join(pages)
    for series in ("resident_bytes", "cpu_seconds_total", "alive", "silent_seconds"):
        found = set(re.findall(rf'rayward_process_{series}{{[^}}]*process="([^"]+)"', text))
        assert found == PROCESSES, series
    assert 'rayward_wait_seconds{run="run",who="the learner"}' in text
    assert 'rayward_paused{run="run"} 0.0' in text


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
    """Nor do the console, the curves of W&B and TensorBoard, checkpoints, and what Ray keeps of the session."""
    files = [path for path in run.rglob("*") if path.is_file()]
    names = {path.relative_to(run).parts[0] for path in files}
    assert names >= {"checkpoints", "logs", "tensorboard", "wandb", "status.json", "seen.json", "stdout.txt"}
    assert {"raylet.out", "gcs_server.out"} <= {path.name for path in files if path.parent == run / "logs" / "ray"}
    for path in files:
        assert b"canary-" not in path.read_bytes(), path
