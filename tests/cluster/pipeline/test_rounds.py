"""Rounds on stand-ins: what each step is given, where people come in, and going on after a kill at any step."""

import asyncio
import atexit
import contextlib
import csv
import io
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest

from actors.prompts import Prompt
from cluster.config.schema import Config, TrackingConfig
from cluster.pipeline import rounds as module
from cluster.pipeline.job import Job
from cluster.pipeline.ppo import PPO
from cluster.pipeline.rounds import RewardModelOfRound, Rounds, round_prompts
from cluster.pipeline.stage import Stage
from cluster.rundir.lineage import done, latest, read_lineage
from cluster.tracking.tracker import Tracker
from reward_server.labeling.page import server
from reward_server.preferences.labeling import read_comparisons
from reward_server.preferences.sheets import dense
from tests import fakes
from tests.fake_pool import FakePool
from tests.labelers import Served, backwards, by_length, invited
from tests.tiny_models import tiny_tokenizer

CAPTION = "simulated labeler (VADER)"


class Killed(BaseException):
    """As a kill would end the command."""


class Steps:
    """Counts the steps, and ends the command before or in the middle of the one that `kill` names."""

    def __init__(self, kill: str | None = None) -> None:
        self.kill, self.done = kill, []

    def step(self, name: str) -> None:
        if name == self.kill:
            raise Killed(name)
        self.done.append(name)


@cache
def _tokenizer() -> Path:
    folder = Path(tempfile.mkdtemp())
    tiny_tokenizer(folder)
    atexit.register(shutil.rmtree, folder)
    return folder


def model_folder(path: Path, text: str) -> Path:
    shutil.copytree(_tokenizer(), path, dirs_exist_ok=True)
    (path / "config.json").write_text(json.dumps({"of": text}))
    return path


class FakePPO(Stage):
    """Writes what PPO writes; the policy of a round says "good", longer each round, that of SFT "day"."""

    name = "ppo"
    results = PPO.results
    steps: ClassVar[Steps] = Steps()
    started: ClassVar[list[Path]] = []
    inputs = None

    async def run(self, processes: Any, inputs: Any) -> None:
        job, number = self.job, self.job.run_dir.name
        self.steps.step(f"{number} ppo begins")
        self.started.append(job.model("init"))
        assert job.model("reward") == job.run_dir / "reward"
        await processes.generators(job.model("init"))
        for name in ("policy", "policy_ema"):
            model_folder(job.run_dir / name, f"{number} {name}")
        self.steps.step(f"{number} ppo ends")
        (job.run_dir / "evaluations").mkdir()
        golds = {"sft": 0.0, "ppo": 0.5 if number == "round-1" else 0.9}
        for label, gold in golds.items():
            rows = [{"id": str(i), "prompt": "x", "response": "y", "gold": gold * (i < 8)} for i in range(10)]
            file = job.run_dir / "evaluations" / f"{label}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        job.summarise("ppo", "ppo", kl=2.0)
        for name in self.results:
            job.made(name, job.run_dir / name, job.model("init"), job.model("reward"))
        processes.weights = job.run_dir / "policy"


class FakeReward(RewardModelOfRound):
    """Trains nothing."""

    def check(self) -> None:
        with contextlib.suppress(ValueError):  # there are no demonstrations
            super().check()

    async def run(self, processes: Any, inputs: Any) -> None:
        job, base = self.job, self.job.model("sft")
        FakePPO.steps.step(f"{job.run_dir.name} reward")
        assert base == job.run_dir.parent / "sft"
        model_folder(job.run_dir / "reward", job.run_dir.name)
        job.summarise("reward", accuracy=0.7, accuracy_ci=[0.6, 0.8])
        job.made("reward", job.run_dir / "reward", base, job.file("comparisons"))


async def generators(job: Job, processes: Any, model: Path) -> Any:
    """Has nobody hand over weights."""
    fleet = await processes.generators(model)
    if processes.weights != model:
        processes.started.append(model)
        processes.weights = model
    return fleet


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Gives one command: settings of the rounds, the step at which it is killed -> the steps done, models sampled."""
    model_folder(tmp_path / "run" / "sft", "sft")
    data = tmp_path / "run" / "data"
    data.mkdir()
    rows = [{"id": f"p{i}", "prompt": f"hello {i}"} for i in range(12)]
    (data / "preference_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(module, "generators", generators)
    monkeypatch.setattr(module, "PPO", FakePPO)
    monkeypatch.setattr(module, "RewardModelOfRound", FakeReward)

    def command(kill: str | None = None, label: Any = None, **settings) -> tuple[list[str], list[str]]:
        FakePPO.steps, FakePPO.started = Steps(kill), []
        rounds = {"count": 2, "prompts": 4, "labelers": "simulated"} | settings
        sample = {"completions_per_prompt": 3}
        config = Config.model_validate({"rounds": rounds, "sample": sample, "label": {"port": 0} | (label or {})})
        pool: Any = FakePool(generators=[fakes.FakeGenerator()])
        run_dir = tmp_path / "run"
        tracker = Tracker(run_dir, TrackingConfig(mode="disabled"), "rounds")
        rounds = Rounds(Job(config=config, run_dir=run_dir, tracker=tracker, command="rayward rounds"))
        with contextlib.suppress(Killed):
            if rounds.pending():
                asyncio.run(rounds.run(pool, rounds.check()))
            return FakePPO.steps.done, [f"{model.parent.name}/{model.name}" for model in pool.started]
        FakePPO.steps.done.append("killed")
        return FakePPO.steps.done, [f"{model.parent.name}/{model.name}" for model in pool.started]

    return command


ALL = [f"round-{k} {step}" for k in (1, 2) for step in ("reward", "ppo begins", "ppo ends")]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_two_rounds_sample_train_and_compare(run, folder):
    steps, models = run()
    assert steps == ALL
    assert models == ["run/sft"]  # PPO leaves its policy with the generators, which sample the next sheet
    assert FakePPO.started == [folder / "sft"] * 2
    first, second = (read_comparisons(folder / f"round-{k}" / "data" / "comparisons.jsonl") for k in (1, 2))
    assert [one.id for one in first] == [f"r1-000{n}" for n in range(1, 5)]
    assert {one.labeler for one in first + second} == {"simulated:vader"}
    assert not {one.prompt for one in first} & {one.prompt for one in second}
    together = read_comparisons(folder / "round-2" / "data" / "all_comparisons.jsonl")
    assert together == first + second
    rounds = summary(folder)["rounds"]
    assert rounds["1"]["win_rate_sft"] == rounds["1"]["win_rate_sft"] | {"rate": 0.9, "wins": 8, "losses": 0, "ties": 2}
    assert rounds["2"]["win_rate_previous"]["wins"] == 8
    assert "win_rate_previous" not in rounds["1"]
    assert (rounds["2"]["rankings"], rounds["2"]["accuracy"], rounds["2"]["kl"]) == (CAPTION, 0.7, 2.0)
    assert rounds["2"]["gold"] == pytest.approx(0.72)


def test_a_round_may_start_from_the_policy_and_learn_from_the_newest_comparisons(run, folder):
    _, models = run(start="policy", comparisons="newest", sft_completions=1)
    assert models == ["run/sft", "run/sft"]  # for its share of the second sheet
    assert FakePPO.started == [folder / "sft", folder / "round-1" / "policy"]
    assert not (folder / "round-2" / "data" / "all_comparisons.jsonl").exists()
    known = latest(read_lineage(folder))
    assert [one.path for one in known["round-2/data/completions.jsonl"].inputs] == [
        "round-1/policy",
        "sft",
        "round-2/data/preference_prompts.jsonl",
    ]
    assert [one.path for one in known["round-2/policy"].inputs] == ["round-1/policy", "round-2/reward"]
    assert {len(one.responses) for one in read_comparisons(folder / "round-2" / "data" / "completions.jsonl")} == {3}


@pytest.mark.parametrize("kill", ALL)
def test_a_killed_command_goes_on_where_it_was(run, folder, kill):
    before, _ = run(kill)
    assert before == [*ALL[: ALL.index(kill)], "killed"]
    sampled = {path: path.read_bytes() for path in folder.rglob("completions.jsonl")}
    after, _ = run()
    # the step in which it was killed is the one that starts over: PPO as a whole, as it has two marks here
    assert after == ALL[ALL.index(kill.replace("ends", "begins")) :]
    assert all(path.read_bytes() == content for path, content in sampled.items())
    assert run() == ([], [])  # nothing is left to do
    assert list(summary(folder)["rounds"]) == ["1", "2"]
    run(count=3)
    assert FakePPO.steps.done == [step.replace("round-2", "round-3") for step in ALL[3:]]


def test_a_result_that_was_changed_is_not_trained_on(run, folder):
    run("round-1 ppo begins")
    (folder / "round-1" / "reward" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"round-1/reward has changed since `rayward rounds` made it"):
        run()


# --- people


def fill(folder: Path, labeler: str, round_number: int = 1, rank=lambda row: len(row["completion"]) + 1) -> Path:
    """Rank a round's sheet as a person would, and save it."""
    part = folder / f"round-{round_number}"
    rows = list(csv.DictReader(io.StringIO((part / "sheet.csv").read_bytes().decode("utf-8-sig"), newline="")))
    file = part / "rankings" / f"{labeler}.csv"
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(row | {"rank": rank(row)} for row in rows)
    return file


def test_people_rank_between_commands(run, folder, capsys):
    assert run(labelers="people") == ([], ["run/sft"])
    told = capsys.readouterr().out
    sheet = (folder / "round-1" / "sheet.csv").read_bytes()
    assert "Round 1 waits for people: rank the 12 completions of 4 prompts in" in told
    assert str(folder / "round-1" / "rankings" / "NAME.csv") in told
    assert run(labelers="people") == ([], [])  # still waits, and starts nothing
    fill(folder, "anna")
    fill(folder, "ben", rank=lambda row: 1)
    steps, models = run(labelers="people")
    assert steps == ALL[:3]
    assert models == ["run/sft"]  # trained, and sampled the sheet of the next round
    assert "Round 2 waits for people" in capsys.readouterr().out
    fill(folder, "anna", round_number=2)
    assert run(labelers="people")[0] == ALL[3:]
    assert (folder / "round-1" / "sheet.csv").read_bytes() == sheet
    ranked = read_comparisons(folder / "round-1" / "data" / "comparisons.jsonl")
    assert {one.labeler for one in ranked} == {"anna+ben"}
    first, second = (summary(folder)["rounds"][number] for number in "12")
    assert first["rankings"] == "people (anna, ben)"
    assert 0 < first["labelers_agree"] < 1
    assert first["labelers_agree_ci"][0] <= first["labelers_agree"] <= first["labelers_agree_ci"][1]
    assert "labelers_agree" not in second
    made_of = latest(read_lineage(folder))["round-1/data/comparisons.jsonl"].inputs
    assert [one.path for one in made_of][1:] == ["round-1/rankings/anna.csv", "round-1/rankings/ben.csv"]


def test_mistakes_of_every_labeler_are_told_before_anything_starts(run, folder):
    run(labelers="people")
    fill(folder, "anna", rank=lambda row: "best" if row["letter"] == "A" else 1)
    fill(folder, "ben", rank=lambda row: -1 if row["comparison"] == "r1-0002" else 1)
    with pytest.raises(ValueError, match="is not a rank") as error:
        run(labelers="people")
    lines = str(error.value).splitlines()
    assert len(lines) == 4 + 3
    assert "anna.csv: row 2, column rank: 'best'" in lines[0]
    assert "ben.csv: row 5, column rank: '-1'" in lines[4]


def test_comparisons_without_ranks_stop_the_command_or_are_left_out_within_the_budget(run, folder, caplog):
    run(labelers="people")
    fill(folder, "anna", rank=lambda row: "" if row["comparison"] == "r1-0002" and row["letter"] != "B" else 1)
    with pytest.raises(ValueError, match=r"1 of 4 comparisons are not ranked whole in .*: r1-0002\. Rank") as error:
        run(labelers="people")
    assert "anna.csv: row 5, column rank: is missing; comparison 'r1-0002' has 1 of 3 ranks" in str(error.value)
    steps, _ = run(labelers="people", max_unranked=1)
    assert steps == ALL[:3]
    assert "has 1 of 3 ranks" in caplog.text
    ranked = read_comparisons(folder / "round-1" / "data" / "comparisons.jsonl")
    assert [one.id for one in ranked] == ["r1-0001", "r1-0003", "r1-0004"]


def test_a_sheet_that_a_kill_prevented_is_written_before_anybody_is_asked(run, folder):
    run(labelers="people")
    (folder / "round-1" / "sheet.csv").unlink()
    run(labelers="people")
    assert (folder / "round-1" / "sheet.csv").is_file()
    assert done(folder, folder / "round-1" / "sheet.csv")


# --- people on the page


@pytest.fixture
def page(folder, monkeypatch):
    """Has p1 rank the shortest best and p2 the longest, each `most` items at most; gives who serves."""
    invited(folder / "labeling" / "people.json", "Anna", "Ben")

    def people(most: int = 1000) -> Served:
        served = Served({"p1": by_length, "p2": backwards}, most)
        monkeypatch.setattr(server, "serve_labeling", served)
        return served

    return people


def ranked(folder: Path, number: int) -> dict[str, tuple[int, ...]]:
    rows = read_comparisons(folder / f"round-{number}" / "data" / "comparisons.jsonl")
    return {one.id: one.ranks or () for one in rows}


PAGE = {"labelers": "page", "label": {"overlap": 2, "words_per_minute": 0, "repeat_share": 0, "adjudicate_below": 0}}


def test_a_round_waits_for_people_on_the_page_and_goes_on_by_itself(run, folder, page, capsys):
    served = page()
    steps, models = run(**PAGE)
    assert (steps, models, served.count) == (ALL, ["run/sft"], 2)
    for number in (1, 2):
        rows = read_comparisons(folder / f"round-{number}" / "data" / "completions.jsonl")
        right = {f"{one.id}:p1": dense([len(text) for text in one.responses]) for one in rows}
        right |= {f"{one.id}:p2": dense([-len(text) for text in one.responses]) for one in rows}
        assert ranked(folder, number) == right
    assert len(read_comparisons(folder / "round-2" / "data" / "all_comparisons.jsonl")) == 16
    first = summary(folder)["rounds"]["1"]
    assert first["rankings"] == "people (p1, p2)"
    assert 0 <= first["labelers_agree"] < 1
    made_of = latest(read_lineage(folder))["round-1/data/comparisons.jsonl"].inputs
    assert [one.path for one in made_of] == ["round-1/data/completions.jsonl", "round-1/labeling/log.jsonl"]
    assert "waits for people: 0 of 8 answers are there" in capsys.readouterr().out
    assert run(**PAGE) == ([], [])


def test_nothing_begins_before_somebody_is_invited(run, folder):
    with pytest.raises(ValueError, match=r"people\.json has no labeler.*rayward label --run .*/run --invite NAME"):
        run(**PAGE)
    assert not (folder / "round-1" / "data" / "completions.jsonl").exists()


def test_guidelines_that_are_not_there_are_told_before_anything_is_sampled(run, folder, page, tmp_path):
    page()
    with pytest.raises(ValueError, match=r"label\.guidelines names .*rules\.txt, which cannot be read"):
        run(**PAGE | {"label": PAGE["label"] | {"guidelines": tmp_path / "rules.txt"}})
    assert not (folder / "round-1" / "data" / "completions.jsonl").exists()


def test_a_round_that_waited_long_enough_stops_and_goes_on_when_given_again(run, folder, page):
    page(most=1)
    label = PAGE["label"] | {"wait_s": 1.5}
    with pytest.raises(TimeoutError, match=r"waited 1\.5 s for people: 2 of 8 answers are there"):
        run(**PAGE | {"label": label})
    assert not (folder / "round-1" / "data" / "comparisons.jsonl").exists()
    page()
    assert run(**PAGE)[0] == ALL
    assert len(ranked(folder, 1)) == 8


def test_a_round_in_which_nothing_counts_says_so(run, folder, page):
    page()
    with pytest.raises(ValueError, match=r"none of the answers in .*log\.jsonl is a ranking that can be used"):
        run(**PAGE | {"label": PAGE["label"] | {"words_per_minute": 1}})


# --- the prompts of a round


def some(count: int) -> list[Prompt]:
    return fakes.prompts(count)


def test_rounds_have_no_prompt_in_common_while_there_are_enough():
    rounds = [round_prompts(some(23), number, 7, seed=5) for number in (1, 2, 3)]
    ids = [one.id for chosen in rounds for one in chosen]
    assert len(ids) == len(set(ids)) == 21
    assert rounds[1] == round_prompts(some(23), 2, 7, seed=5)
    assert rounds[1] != round_prompts(some(23), 2, 7, seed=6)


@pytest.mark.parametrize("number", range(1, 9))
def test_a_round_has_no_prompt_twice_even_when_they_run_out(number):
    assert len({one.id for one in round_prompts(some(10), number, 7, seed=0)}) == 7
    assert len({one.id for one in round_prompts(some(5), number, 7, seed=0)}) == 5


def test_the_sft_model_may_not_sample_everything(run):
    with pytest.raises(ValueError, match=r"rounds\.sft_completions = 3 leaves none of the 3 completions"):
        run(sft_completions=3)


def test_prompts_that_do_not_suffice_are_told(run, caplog):
    run(count=2, prompts=8)
    assert "has 12 prompts for 2 rounds of 8: some are compared in more than one round" in caplog.text
