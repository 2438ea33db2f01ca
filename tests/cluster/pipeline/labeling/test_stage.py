"""`rayward label`, with people who label without a browser."""

import asyncio
import contextlib
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.pipeline.job import Job
from cluster.pipeline.labeling.items import read_items
from cluster.pipeline.labeling.page import log_of, people_of, write_rankings
from cluster.pipeline.labeling.stage import Label
from cluster.rundir.lineage import latest, read_lineage
from reward_server.address import free_port
from reward_server.labeling.page import server
from reward_server.labeling.project import Project
from reward_server.preferences.labeling import read_comparisons
from tests.labelers import Served, backwards, by_length, invited, rank
from tests.stage_runs import make_job, rows, summary

TEXTS = {"c1": ["a", "bb", "ccc"], "c2": ["long", "x", "xx"], "c3": ["yy", "zz", "y"]}
SHORTEST = {"c1": (0, 1, 2), "c2": (2, 0, 1), "c3": (1, 1, 0)}
LONGEST = {"c1": (2, 1, 0), "c2": (0, 2, 1), "c3": (0, 0, 1)}


@pytest.fixture
def served(monkeypatch):
    def people(**rules: Any) -> Served:
        most = rules.pop("most", 1000)
        page = Served(rules, most)
        monkeypatch.setattr(server, "serve_labeling", page)
        return page

    return people


def labeling(folder: Path, **label: Any) -> Job:
    own = {"words_per_minute": 0, "port": 0, "gold_share": 0, "repeat_share": 0}
    job = make_job(folder / "run", label=own | label)
    asked = [
        {"id": name, "prompt": f"say {name}", "completions": [{"text": text} for text in texts], "use_case": "chat"}
        for name, texts in TEXTS.items()
    ]
    rows(job.run_dir / "data" / "completions.jsonl", *asked)
    if not people_of(job).is_file():
        invited(people_of(job), "Anna", "Ben")
    return replace(job, command="rayward label --run run")


def run(job: Job) -> None:
    stage = Label(job)
    asyncio.run(stage.run(None, stage.check()))


def ranked(job: Job) -> dict[str, tuple[int, ...] | None]:
    return {one.id: one.ranks for one in read_comparisons(job.run_dir / "data" / "comparisons.jsonl")}


def both(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}:p1": one[name] for name in one} | {f"{name}:p2": other[name] for name in other}


def test_everybody_ranks_everything_and_the_comparisons_are_what_they_gave(tmp_path, served, capsys):
    job, page = labeling(tmp_path, overlap=2, adjudicate_below=0), served(p1=by_length, p2=backwards)
    run(job)
    assert ranked(job) == both(SHORTEST, LONGEST)
    rows = read_comparisons(job.run_dir / "data" / "comparisons.jsonl")
    assert {(one.use_case, one.control) for one in rows} == {("chat", True)}
    assert rows[0].qualities == (5, 5, 5)
    found = summary(job)
    assert found["rankings"] == "people (p1, p2)"
    # Of the 9 pairs of completions only the tie of c3 is common to both.
    assert (found["labelers_agree"], found["labelers_agree_pairs"]) == (pytest.approx(1 / 9), 9)
    assert found["labelers_alpha"] < 0
    made = latest(read_lineage(job.run_dir))["data/comparisons.jsonl"]
    assert [one.path for one in made.inputs] == ["data/completions.jsonl", "labeling/log.jsonl"]
    told = capsys.readouterr().out
    assert "waits for people: 0 of 6 answers are there, at http://127.0.0.1:8701" in told
    assert "6 rankings of people are in" in told
    before = (job.run_dir / "data" / "comparisons.jsonl").read_bytes()
    run(labeling(tmp_path, overlap=2, adjudicate_below=0))
    assert page.count == 1  # nothing is left to serve
    assert (job.run_dir / "data" / "comparisons.jsonl").read_bytes() == before


def test_who_was_asked_because_others_disagree_is_in_the_data_and_not_in_the_agreement(tmp_path):
    job = labeling(tmp_path, overlap=2, adjudicate_below=0.5)

    async def work() -> None:
        project = Project(log_of(job).parent, job.config.label, read_items(job))
        for labeler, rule in (("p1", by_length), ("p2", backwards), ("p3", by_length)):
            await rank(project, labeler, rule)
        project.close()

    asyncio.run(work())
    found = write_rankings(job)
    assert set(found.adjudications) == {f"{name}:p3" for name in TEXTS}
    assert ranked(job) == both(SHORTEST, LONGEST) | {f"{name}:p3": ranks for name, ranks in SHORTEST.items()}
    told = summary(job)
    assert told["rankings"] == "people (p1, p2, p3)"
    assert (told["labelers_agree"], told["labelers_agree_pairs"]) == (pytest.approx(1 / 9), 9)


def test_what_is_there_at_ctrl_c_is_written_and_the_same_command_goes_on(tmp_path, served):
    job = labeling(tmp_path)
    served(p1=by_length, most=2)

    async def stopped() -> None:
        stage = Label(job)
        task = asyncio.create_task(stage.run(None, stage.check()))
        await asyncio.sleep(0.5)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(stopped())
    assert len(first := ranked(job)) == 2
    served(p2=by_length)
    run(labeling(tmp_path))
    assert len(ranked(job)) == 3
    assert ranked(job).items() > first.items()
    assert {name.partition(":")[0]: value for name, value in ranked(job).items()} == SHORTEST


def test_comparisons_that_people_did_not_give_here_are_not_written_over(tmp_path):
    job = labeling(tmp_path)
    rows(job.run_dir / "data" / "comparisons.jsonl", {"id": "mine"})
    with pytest.raises(ValueError, match="`rayward label` has not made it, so it is not written over"):
        Label(job).check()


def test_a_random_order_needs_no_reward_model_and_disagreement_does(tmp_path, served):
    job = labeling(tmp_path, order="disagreement")
    with pytest.raises(ValueError, match=r"label\.order = disagreement asks reward models, and .* has none"):
        Label(job).check()


def test_a_port_that_somebody_has_is_told_before_anything_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        job = labeling(tmp_path, port=taken.getsockname()[1])
        with pytest.raises(ValueError, match=r"label\.port = \d+ cannot be listened on \(Address already in use\)"):
            Label(job).check()
    Label(labeling(tmp_path, port=free_port("127.0.0.1"))).check()


def test_nobody_invited_is_said_with_the_command(tmp_path, served, capsys):
    job = labeling(tmp_path)
    people_of(job).unlink()
    served()

    async def stopped() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await Label(job).run(None, Label(job).check())

    asyncio.run(stopped())
    told = capsys.readouterr().out
    assert f"nobody is invited yet: rayward label --run {job.run_dir} --invite NAME" in told
    assert not (job.run_dir / "data" / "comparisons.jsonl").exists()


def test_demonstrations_are_written_for_step_1(tmp_path, served, monkeypatch):
    from reward_server.labeling.items import Answer
    from tests import labelers

    asks = rows(tmp_path / "asks.jsonl", {"id": "d1", "prompt": "tell me"})
    job = labeling(tmp_path, tasks="demonstration", demonstrations=asks)
    monkeypatch.setattr(labelers, "answered", lambda given, rule: Answer(text=f"about {given.item.id}"))
    served(p1=by_length)
    run(job)
    file = job.run_dir / "labeling" / "exports" / "demonstrations.jsonl"
    (row,) = map(json.loads, file.read_text().splitlines())
    assert row["response"] == "about demonstration:d1"
    assert row["prompt"] == [{"role": "user", "content": "tell me"}]
    assert not (job.run_dir / "data" / "comparisons.jsonl").exists()
    assert "labeling/exports/demonstrations.jsonl" in latest(read_lineage(job.run_dir))
