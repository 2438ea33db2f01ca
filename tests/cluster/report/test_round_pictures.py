"""What the report of a run shows of its rounds and its lineage."""

import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from cluster.report.canvas import svg
from cluster.report.report import summary, write_report
from cluster.report.round_pictures import _places, lineage, rounds
from cluster.rundir.files import Run, read_run
from cluster.rundir.lineage import record
from tests.cluster.report.test_report import Page
from tests.synthetic_run import CAPTION

ROUND = {
    "rankings": "people (anna, ben)",
    "gold": 0.4,
    "gold_ci": [0.3, 0.5],
    "gold_sft": 0.1,
    "accuracy": 0.7,
    "accuracy_ci": [0.6, 0.8],
    "labelers_agree": 0.73,
    "labelers_agree_ci": [0.7, 0.76],
    "win_rate_sft": {"rate": 0.64, "ci": [0.54, 0.73], "wins": 61, "losses": 33, "ties": 6},
}
SECOND = {"rankings": CAPTION, "gold": 0.5, "accuracy": 0.72, "win_rate_previous": {"rate": 0.55, "ci": [0.45, 0.65]}}


class Nothing(BaseModel):
    pass


@pytest.fixture
def run(tmp_path: Path) -> Run:
    table = {"labeler": CAPTION, "rounds": {"2": ROUND | SECOND, "1": ROUND, "x": 3}}
    (tmp_path / "summary.json").write_text(json.dumps(table))
    made = (
        ("sft", "sft", ()),
        ("round-1/reward", "reward", ("sft",)),
        ("round-1/policy", "policy", ("sft", "round-1/reward")),
    )
    for name, kind, inputs in made:
        (tmp_path / name).mkdir(parents=True)
        record(tmp_path, kind, tmp_path / name, [tmp_path / one for one in inputs], "rayward rounds", Nothing())
    return read_run(tmp_path)


def test_rounds_are_drawn_in_order_with_the_labelers_name(run: Run):
    win, gold, accuracy = rounds(run)
    assert (
        "against the SFT model 0.640 in round 1, 0.640 in round 2; against the round before 0.550 in round 2" in win.alt
    )
    assert "policy 0.400 in round 1, 0.500 in round 2" in gold.alt
    assert accuracy.title == f"Reward-model accuracy, people (anna, ben), {CAPTION}"
    assert "two labelers 0.730 in round 1" in accuracy.alt
    assert CAPTION in win.title
    assert CAPTION in gold.title
    for picture in (win, gold, accuracy):
        assert svg(picture, "x", small=True).startswith("<svg")


def test_the_graph_says_what_was_made_of_what(run: Run):
    (graph,) = lineage(run)
    assert graph.alt.endswith("round-1/reward of sft; round-1/policy of sft, round-1/reward.")
    assert svg(graph, "x", small=False).count("round-1/policy") == 1


def test_what_is_made_stands_below_and_no_two_at_one_place():
    kinds = {"policy-b": "policy", "policy": "policy", "reward": "reward", "sft": "sft"}
    arrows = [("sft", "reward"), ("reward", "policy"), ("reward", "policy-b"), ("sft", "policy")]
    places = _places(kinds, arrows)
    assert all(places[path][1] < places[source][1] for source, path in arrows)
    assert len(set(places.values())) == 4


def test_a_result_made_again_of_itself_is_still_drawn():
    places = _places({"sft": "sft", "policy": "policy"}, [("sft", "policy"), ("policy", "sft")])
    assert len(set(places.values())) == 2


def test_the_page_has_rounds_lineage_and_win_rates(run: Run):
    page = Page(write_report(run.path))
    head = page.text[: page.text.index("In each round the newest")]
    assert f"Win rate of round 1 0.64 against the SFT model, 95% CI 0.54 to 0.73 · {CAPTION}" in head
    assert f"Win rate of round 2 0.55 against round 1, 95% CI 0.45 to 0.65 · {CAPTION}" in head
    assert "Lineage" in page.text
    assert f"Gold scores and win rates on this page are verdicts of the {CAPTION}" in page.text
    assert summary(run.path)


def test_rankings_of_people_are_not_called_simulated(tmp_path: Path):
    reward = {"accuracy": 0.7, "longer_wins": 0.5}
    (tmp_path / "summary.json").write_text(
        json.dumps({"rankings": "people (anna)", "labeler": CAPTION, "reward": reward})
    )
    text = Page(write_report(tmp_path)).text
    assert "Completions were ranked by people (anna) . Gold scores on this page are verdicts of the" in text
    assert "Reward-model accuracy 0.700 held-out pairs; longer wins: 0.500 · people (anna)" in text
    assert "held-out comparisons ranked by people (anna)" in text


def test_a_run_without_rounds_or_lineage_has_neither(tmp_path: Path):
    (tmp_path / "summary.json").write_text("{}")
    run = read_run(tmp_path)
    assert [*rounds(run), *lineage(run)] == []
