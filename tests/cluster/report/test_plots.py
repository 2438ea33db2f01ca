import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from cluster.report import plots
from cluster.report.plot import BEFORE, SERIES, Plot, svg
from cluster.report.report import summary, write_report
from cluster.rundir.files import Run, read_run
from tests.cluster.report.test_report import Page
from tests.synthetic_run import CAPTION, write_rows, write_run

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


@pytest.fixture
def one(tmp_path: Path) -> Run:
    return read_run(write_run(tmp_path / "one"))


@pytest.fixture
def two(tmp_path: Path) -> Run:
    return read_run(write_run(tmp_path / "two", arms=("ppo", "ppo-noptx")))


@pytest.fixture
def rounds(tmp_path: Path) -> Run:
    table = {"labeler": CAPTION, "rounds": {"2": ROUND | SECOND, "1": ROUND, "x": 3}}
    (tmp_path / "summary.json").write_text(json.dumps(table))
    return read_run(tmp_path)


def titles(run: Run) -> dict[str, list[str]]:
    """Titles of the sections of the page, each with those of its plots."""
    found: dict[str, list[str]] = {}
    source = html.unescape(write_report(run.path).read_text(encoding="utf-8"))
    for section, plot in re.findall("<h2[^>]*>(.*?)</h2>|<figcaption>(.*?)</figcaption>", source):
        found[section or [*found][-1]] = [*found[[*found][-1]], plot] if plot else []
    del found["How it was made"], found["Card"]
    return found


def test_a_run_with_one_arm_gives_every_section(one: Run):
    assert titles(one) == {
        "Learning": [
            f"Gold score, {CAPTION}",
            "Score of the reward model",
            "KL to the SFT model, nats a response",
            "Reward: score minus the KL penalty",
        ],
        "Held-out measurements on the way": [
            f"Gold on held-out prompts, {CAPTION}; 95% CI",
            "Score on held-out prompts",
            "KL on held-out prompts, nats a response",
            "Loss on held-out pretraining text, nats a token",
        ],
        "What it cost": ["Alignment tax: loss on pretraining text", f"Gold bought with KL, {CAPTION}"],
        "Over-optimisation": [f"Gold by distance, {CAPTION}; 95% CI", "Score by distance"],
        "Held-out responses": [f"Gold score of responses, {CAPTION}"],
        "The reward model": ["Loss of the reward model, nats a pair"],
        "Supervised training": ["SFT loss, nats a token", "Score of each epoch: baseline"],
        "Inside PPO": [
            "Policy loss",
            "Value loss",
            "Pretraining loss of the mix",
            "Variance explained by the critic",
            "Response length, tokens",
            "Responses that end by themselves",
            "Entropy, nats a token",
            "Share of clipped tokens",
            "Parity gap, nats, on average",
            "Parity gap, nats, of the worst token",
        ],
        "Time": [],
    }


def test_the_reward_model_is_shown_by_pairs_by_prompts_and_by_rank_gap(one: Run):
    assert list(plots.accuracy(one)) == [
        ("reward model", "0.807", "95% CI 0.78 to 0.84"),
        ("the same, mean of prompts", "0.796", "95% CI 0.76 to 0.83"),
        ('rule "the longer wins"', "0.548", ""),
        ("reward model, 1 apart in rank", "0.790", "480 pairs"),
        ("reward model, 2 apart in rank", "0.880", "240 pairs"),
        ("reward model, 3 apart in rank", "0.970", "160 pairs"),
    ]
    text = Page(write_report(one.path)).text
    assert "the same, mean of prompts 0.796 95% CI 0.76 to 0.83" in text
    assert "ppo an iteration's rollout, on average" in text


def test_held_out_curves_go_from_before_to_after_and_two_points_are_no_curve(one: Run, tmp_path: Path):
    gold, _, kl, _ = plots.plots(one)["held_out"]
    assert "PPO-ptx from 0.120 to 0.620 over 5 points" in gold.alt
    assert "PPO-ptx from 0 to 6.40 over 5 points" in kl.alt
    write_rows(tmp_path / "metrics.jsonl", [{"stage": "ppo", "step": n, "heldout/gold": 0.5} for n in (0, 8)])
    assert plots.plots(read_run(tmp_path))["held_out"] == []


def best_of_n(run: Path, model: str) -> Run:
    """The run with best of n of a model beside."""
    with (run / "metrics.jsonl").open("a") as file:
        for k, kl, gold in ((1, 0.0, 0.1), (2, 0.25, 0.3), (4, 0.64, 0.4)):
            row = {"kl": kl, "gold": gold, "score": 2 * gold}
            figures = {f"best_of_n/{name}": value for name, value in row.items()}
            file.write(json.dumps({"stage": "best-of-n", "step": k, **figures}) + "\n")
    summary = json.loads((run / "summary.json").read_text())
    table = {"model": model, "file": "prompts_heldout"}
    (run / "summary.json").write_text(json.dumps(summary | {"best_of_n": table}))
    return read_run(run)


def drawn(plot: Plot) -> dict[str, list[list[float]]]:
    """The points of each curve by its name."""
    axes = Figure().add_subplot()
    plot.draw(axes)
    names = axes.get_legend_handles_labels()[1]
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    return {name: np.asarray(lines[name].get_xydata()).tolist() for name in names}


def test_gold_and_score_are_drawn_by_the_root_of_the_kl_of_ppo_and_best_of_n(tmp_path: Path):
    run = best_of_n(write_run(tmp_path), "sft")
    gold, score = plots.over_optimisation({"": run})
    found = drawn(gold)
    assert found.keys() == {"PPO-ptx", "best of n"}
    assert found["best of n"] == [[0.0, 0.1], [0.5, 0.3], [0.8, 0.4]]
    x, y = zip(*found["PPO-ptx"], strict=True)
    assert x == pytest.approx([0, 1.6**0.5, 3.2**0.5, 4.8**0.5, 6.4**0.5])  # a quarter of 6.4 nats each
    assert y == pytest.approx([0.12, 0.245, 0.37, 0.495, 0.62])
    assert [y for _, y in drawn(score)["best of n"]] == pytest.approx([0.2, 0.6, 0.8])
    assert plots.plots(run)["over_optimisation"][0].alt == gold.alt


def test_the_curves_of_several_runs_are_in_the_same_axes_by_their_names(tmp_path: Path):
    runs = {name: read_run(write_run(tmp_path / name)) for name in ("beta-0.02", "beta-0.2")}
    gold, _ = plots.over_optimisation(runs)
    assert drawn(gold).keys() == {"beta-0.02: PPO-ptx", "beta-0.2: PPO-ptx"}


def test_best_of_n_of_the_policy_is_not_measured_from_the_sft_model(tmp_path: Path):
    gold, _ = plots.over_optimisation({"": best_of_n(write_run(tmp_path), "policy")})
    assert "best of n" not in gold.alt


def test_before_and_after_alone_are_no_curve_of_over_optimisation(tmp_path: Path):
    measured = {"heldout/gold": 0.5, "heldout/score": 1.0, "heldout/kl": 1.0}
    write_rows(tmp_path / "metrics.jsonl", [{"stage": "ppo", "step": n, **measured} for n in (0, 8)])
    assert list(plots.over_optimisation({"": read_run(tmp_path)})) == []


def test_two_arms_are_compared_first_in_the_same_axes(one: Run, two: Run):
    (gold,), (tax,) = plots.plots(two)["gold"], plots.tax(two)
    assert titles(two)["What the pretraining mix does"] == [gold.title, tax.title]
    assert "PPO-ptx from" in gold.alt
    assert "; PPO from" in gold.alt
    assert tax.alt.endswith("PPO-ptx from 3.97 to 4.01; PPO from 3.97 to 4.71.")
    everything, expected = ([title for found in titles(run).values() for title in found] for run in (two, one))
    assert sorted(everything) == sorted(expected)


def test_arms_that_differ_in_something_else_are_told_apart_by_their_stage(tmp_path: Path):
    run = read_run(write_run(tmp_path, arms=("ppo", "ppo-high-kl")))
    assert [name for _, name, _ in plots.arms(run)] == ["PPO-ptx (ppo)", "PPO-ptx (ppo-high-kl)"]
    assert next(iter(titles(run))) == "The runs compared"


def test_models_before_ppo_are_grey_and_come_first_and_are_shown_once(two: Run):
    assert plots.labels(two) == [
        ("sft", "SFT", BEFORE),
        ("ppo", "PPO-ptx", SERIES[0]),
        ("ppo-noptx", "PPO", SERIES[1]),
    ]


def test_a_run_of_sft_only_gives_that_only(tmp_path: Path):
    write_rows(
        tmp_path / "metrics.jsonl",
        [
            {"stage": "sft", "step": 1, "sft/loss": 3.0},
            {"stage": "pretraining", "step": 1, "pretraining/loss": 5.0},
        ],
    )
    run = read_run(tmp_path)
    assert titles(run) == {"Supervised training": ["SFT loss, nats a token", "Pretraining loss, nats a token"]}
    assert [plot.title for plot in plots.overview(run)] == titles(run)["Supervised training"]


def test_the_overview_shows_gold_tax_distribution_and_kl(two: Run):
    assert [plot.title for plot in plots.overview(two)] == [
        f"Gold score, {CAPTION}",
        "Alignment tax: loss on pretraining text",
        f"Gold score of responses, {CAPTION}",
        "KL to the SFT model, nats a response",
    ]


def test_samples_without_verdicts_still_have_a_section(tmp_path: Path):
    write_rows(tmp_path / "evaluations" / "policy.jsonl", [{"id": "a", "prompt": "?", "response": "!"}])
    assert titles(read_run(tmp_path)) == {"Held-out responses": []}


@pytest.mark.parametrize(
    "table",
    [
        {"accuracy": "high", "accuracy_ci": [0.1], "by_rank_gap": [3, {"gap": 1}, {"gap": "1", "accuracy": 0.5}]},
        {"by_rank_gap": "none"},
    ],
)
def test_figures_of_the_wrong_kind_give_no_plot_and_no_row(tmp_path: Path, table: dict[str, object]):
    (tmp_path / "summary.json").write_text(json.dumps({"reward": table}))
    assert not any(plots.plots(read_run(tmp_path)).values())
    assert not list(plots.accuracy(read_run(tmp_path)))


def test_phases_of_the_same_name_are_summed_by_stage(tmp_path: Path):
    rows = [("sample", "ppo", 10.0), ("sample", "ppo", 2.5), ("sample", "sft", 5)]
    write_rows(tmp_path / "phases.jsonl", [{"phase": one, "stage": stage, "seconds": s} for one, stage, s in rows])
    write_rows(tmp_path / "metrics.jsonl", [{"stage": "ppo", "step": n, "time/rollout": 1.0 * n} for n in (1, 2)])
    assert list(plots.time_spent(read_run(tmp_path))) == [
        ("ppo", "sample", "12.5"),
        ("sft", "sample", "5.00"),
        ("ppo", "an iteration's rollout, on average", "1.50"),
    ]


def test_rounds_are_drawn_in_order_with_the_labelers_name(rounds: Run):
    win, gold, accuracy = plots.rounds(rounds)
    assert "SFT model from 0.640 to 0.640 over 2 points; against the round before from 0.550" in win.alt
    assert "policy from 0.400 to 0.500 over 2 points" in gold.alt
    assert accuracy.title == f"Reward-model accuracy, people (anna, ben), {CAPTION}"
    assert "two labelers from 0.730" in accuracy.alt
    assert CAPTION in win.title
    assert CAPTION in gold.title
    for plot in (win, gold, accuracy):
        assert svg(plot, "x", small=True).startswith("<svg")


def test_the_page_has_rounds_and_win_rates(rounds: Run):
    page = Page(write_report(rounds.path))
    head = page.text[: page.text.index("In each round the newest")]
    assert (
        f"Win rate of round 1 0.64 against the SFT model, 95% CI 0.54 to 0.73, 100 held-out prompts · {CAPTION}" in head
    )
    assert f"Win rate of round 2 0.55 against round 1, 95% CI 0.45 to 0.65 · {CAPTION}" in head
    assert f"Gold scores and win rates on this page are verdicts of the {CAPTION}" in page.text
    assert summary(rounds.path)
