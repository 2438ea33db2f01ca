"""Models, files and figures of a run directory."""

import json
from dataclasses import replace

import pytest

from cluster.config.schema import Config, TrackingConfig
from cluster.pipeline.job import Job
from cluster.rundir.lineage import read_lineage
from cluster.tracking.tracker import Tracker


@pytest.fixture
def job(tmp_path):
    """Makes a job of overrides."""

    def make(**sections) -> Job:
        run_dir = tmp_path / "run"
        run_dir.mkdir(exist_ok=True)
        tracker = Tracker(run_dir, TrackingConfig(mode="disabled"), "test")
        return Job(config=Config.model_validate(sections), run_dir=run_dir, tracker=tracker)

    return make


def model_folder(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def rows(path, *values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


# --- models and files


def test_a_configured_model_comes_before_the_runs_own(job, tmp_path):
    own, other = model_folder(tmp_path / "run" / "sft"), model_folder(tmp_path / "other")
    assert job().model("sft") == own
    assert job(models={"sft": other}).model("sft") == other


@pytest.mark.parametrize(("name", "command"), [("sft", "sft"), ("reward", "reward"), ("policy", "ppo")])
def test_a_missing_model_names_the_command_that_makes_it_and_the_key(job, name, command):
    with pytest.raises(ValueError, match=rf"no {name} model in .*/run/{name}: run `rayward {command}`.*models\.{name}"):
        job().model(name)


def test_a_configured_model_that_is_not_there_is_not_replaced_by_the_runs_own(job, tmp_path):
    model_folder(tmp_path / "run" / "sft")
    with pytest.raises(ValueError, match="/nowhere"):
        job(models={"sft": tmp_path / "nowhere"}).model("sft")


def test_a_configured_file_comes_before_the_runs_own(job, tmp_path):
    own = rows(tmp_path / "run" / "data" / "completions.jsonl", {})
    assert job().file("completions") == own
    assert job(data={"completions": tmp_path / "mine.jsonl"}).file("completions") == tmp_path / "mine.jsonl"


def test_ppo_starts_from_the_sft_model_or_from_what_it_is_told(job, tmp_path):
    own, other = model_folder(tmp_path / "run" / "sft"), model_folder(tmp_path / "round-1" / "policy")
    assert job().model("init") == own
    assert job(models={"init": other}).model("init") == other
    with pytest.raises(ValueError, match=r"no init model in /nowhere: run `rayward ppo`.*models\.init"):
        job(models={"init": "/nowhere"}).model("init")


def test_the_round_of_a_run_is_recorded_in_the_runs_lineage(job, tmp_path):
    part = replace(job(), run_dir=tmp_path / "run" / "round-1", root=tmp_path / "run")
    part.run_dir.mkdir()
    (part.run_dir / "sheet.csv").write_text("")
    part.made("sheet", part.run_dir / "sheet.csv")
    (made,) = read_lineage(tmp_path / "run")
    assert (made.path, made.inputs) == ("round-1/sheet.csv", ())


def test_a_missing_file_names_the_key_and_where_it_was_looked_for(job):
    with pytest.raises(ValueError, match=r"data\.prompts is not set and .*/run/data/prompts\.jsonl does not exist"):
        job().file("prompts")


# --- summary.json


def summary(job: Job):
    return json.loads((job.run_dir / "summary.json").read_text())


def test_figures_are_merged_under_their_keys(job):
    one = job()
    one.summarise("sft", valid_before=3.0, valid_after=2.0)
    one.summarise("ppo", "ppo", gold_after=0.5)
    one.summarise("ppo", "ppo-noptx", gold_after=0.6)
    one.summarise("sft", valid_after=1.5)
    one.summarise(labeler="simulated labeler (VADER)")
    assert summary(one) == {
        "sft": {"valid_before": 3.0, "valid_after": 1.5},
        "ppo": {"ppo": {"gold_after": 0.5}, "ppo-noptx": {"gold_after": 0.6}},
        "labeler": "simulated labeler (VADER)",
    }


@pytest.mark.parametrize("content", ["{", "[]", '{"ppo": 1}'])
def test_figures_that_are_damaged_are_kept_and_cost_nothing_new(job, content, caplog):
    one = job()
    (one.run_dir / "summary.json").write_text(content)
    one.summarise("ppo", "ppo", gold_after=0.5)
    assert summary(one) == {"ppo": {"ppo": {"gold_after": 0.5}}}
    assert (one.run_dir / "damaged-summary.json").read_text() == content
    assert "summary.json was damaged" in caplog.text
