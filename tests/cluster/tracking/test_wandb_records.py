"""What the real W&B writes of commands whose records it is given, read back from its files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.config.schema import Config, TrackingConfig
from cluster.rundir.lineage import record
from cluster.tracking.console import Console
from cluster.tracking.tracker import Tracker
from tests.wandb_runs import history, records
from tests.wandb_server import KEY, wandb_server

Work = Callable[[Tracker], None]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Work], list[dict[str, Any]]]:
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)

    def work_as(name: str, work: Work) -> list[dict[str, Any]]:
        settings = Config().model_dump(mode="json")
        with Tracker(
            tmp_path / "mine", TrackingConfig(tags=("t",)), name, settings=settings, console=Console()
        ) as tracker:
            work(tracker)
        return records(tmp_path / "mine", tracker.run_id)

    return work_as


def of(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [one[kind] for one in found if kind in one]


def artefacts(found: list[dict[str, Any]]) -> list[tuple[str, str, str, bool]]:
    """(name, type, digest, whether it is an input) of each, W&B's own tables left out."""
    rows = [one for one in of(found, "artifact") if one["type"] != "run_table"]
    return [(one["name"], one["type"], one["digest"], one.get("useAfterCommit", False)) for one in rows]


def test_a_run_has_its_group_its_config_its_axes_its_tables_and_its_alerts(command: Any, tmp_path: Path):
    def work(tracker: Tracker) -> None:
        tracker.log("sft", 1, {"sft/loss": 2.0})
        tracker.log("ppo", 1, {"score/mean": 0.5, "staleness/age_0": 0.25, "staleness/age_1": 0.75})
        tracker.samples("ppo", 1, [{"prompt": "hi", "gold": 1.0}], {"gold": [0.0, 1.0]})
        tracker.log("ppo", 2, {"kl/mean": 80.0})

    found = command("ppo", work)
    (run,) = of(found, "run")
    assert (run["project"], run["runGroup"], run["jobType"]) == ("rayward", "mine", "ppo")
    assert (run["displayName"], run["tags"]) == ("mine ppo", ["t"])
    config = {one["key"]: json.loads(one["valueJson"]) for one in run["config"]["update"]}
    assert config["ppo"]["kl"]["coef"] == 0.02
    assert config.keys() - {"_wandb"} == Config.model_fields.keys()
    axes = {one["globName"]: one["stepMetric"] for one in of(found, "metric")}
    assert axes == {"sft/*": "sft/step", "ppo/*": "ppo/step"}
    sft, ppo, samples, alerting = history(found)
    assert sft == {"sft/step": 1, "sft/loss": 2.0}
    assert (ppo["ppo/step"], ppo["ppo/score/mean"]) == (1, 0.5)
    assert samples["ppo/step"] == 1
    assert samples["ppo/heldout/samples._type"] == "table-file"
    assert samples["ppo/heldout/gold_histogram._type"] == "histogram"
    assert alerting == {"ppo/step": 2, "ppo/kl/mean": 80.0}
    (alert,) = of(found, "alert")
    assert (alert["title"], alert["level"]) == ("mine ppo: kl", "WARN")
    # what is still to be sent lies in the run directory
    files = [one["localPath"] for row in of(found, "artifact") for one in row["manifest"]["contents"]]
    assert len(files) == 1
    assert all(Path(file).is_relative_to(tmp_path / "mine") and Path(file).is_file() for file in files)


def test_the_lineage_of_models_survives_that_the_commands_were_offline(command: Any, tmp_path: Path):
    run, outside = tmp_path / "mine", tmp_path / "d.jsonl"
    outside.write_text("{}")

    def makes(kind: str, *inputs: str | Path, content: str) -> Work:
        def work(tracker: Tracker) -> None:
            (run / kind).mkdir(parents=True, exist_ok=True)
            (run / kind / "model.safetensors").write_text(content)
            paths = [run / one if isinstance(one, str) else one for one in inputs]
            tracker.artefact(record(run, kind, run / kind, paths, f"rayward {kind}", Config()), run)

        return work

    data, sft = artefacts(command("sft", makes("sft", outside, content="1")))
    used, reward = artefacts(command("reward", makes("reward", "sft", content="2")))
    assert (sft[0], sft[1], sft[3]) == ("mine-sft", "sft", False)
    assert used == (*sft[:3], True)  # the same version: W&B tells versions of a name apart by their digest
    first, second, policy = artefacts(command("ppo", makes("policy", "sft", "reward", content="3")))
    assert (first, second) == (used, (*reward[:3], True))
    assert policy[:2] == ("mine-policy", "policy")
    assert (data[1], data[3]) == ("input", True)
    assert data[0].endswith("d.jsonl")
    with wandb_server() as server:
        folders = sorted(map(str, (run / "wandb").glob("offline-run-*")))
        environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_DIR": str(tmp_path)}
        words = [Path(sys.executable).parent / "wandb", "sync", *folders]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    ids = {name: found for (name, _), found in server.versions.items()}
    assert len(ids) == len(server.versions) == 4  # one version of each: data, SFT and reward model, policy
    jobs = {one["name"]: one["jobType"] for one in server.runs if one["jobType"]}
    uses = {(jobs[name], found) for name, found in server.used}
    assert uses == {
        ("sft", ids[data[0]]),
        ("reward", ids["mine-sft"]),
        ("ppo", ids["mine-sft"]),
        ("ppo", ids["mine-reward"]),
    }
    again = artefacts(command("sft", makes("sft", outside, content="other")))[1]
    assert again[0] == sft[0]
    assert again[2] != sft[2]  # the same folder with other weights is another version
