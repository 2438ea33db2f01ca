import json
from pathlib import Path

import pytest

from cluster.cli.commands import COMMANDS
from cluster.cli.parser import bind
from cluster.config.load import ConfigError
from cluster.report.compare import write_comparison
from tests.cluster.report.test_report import Page
from tests.synthetic_run import CAPTION, SUITE, evaluation, write_rows, write_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "low" / "run", suite=SUITE, iterations=12),
        write_run(tmp_path / "high" / "run", arms=("ppo", "ppo-noptx"), iterations=12),
    ]


def test_several_runs_share_every_plot_and_table(runs: list[Path]):
    path = write_comparison(runs)
    assert path == runs[0] / "comparison.html"
    page = Page(path)
    assert "2 runs compared" in page.text
    told = {str(figure["aria-label"]) for figure in page.all("figure")}
    gold = next(one for one in told if f"Gold score, {CAPTION}, by PPO iteration" in one)
    for name in ("low/run from", "high/run: PPO-ptx from", "high/run: PPO from"):
        assert name in gold
    frontier = next(one for one in told if f"Gold by distance, {CAPTION}" in one)
    assert "low/run: PPO-ptx from 0.120 to 0.620 over 3 points" in frontier
    assert "policy base 0.550" in page.text.replace("low/run: ", "")
    tax = next(one for one in told if "Alignment tax" in one)
    assert tax.endswith(
        "low/run from 3.97 to 4.01; high/run: PPO-ptx from 3.97 to 4.01; high/run: PPO from 3.97 to 4.71."
    )
    assert "hellaswag.accuracy 0.500 (0.250 to 0.750)" in page.text
    assert "low/run: policy" in page.text
    assert "Reward-model accuracy 0.807 (840 held-out pairs" in page.text
    assert "sft 118 118" in page.text
    assert "ppo: an iteration's rollout, on average 5.00 5.00" in page.text


def test_samples_of_the_same_prompt_stand_beside_each_other(tmp_path: Path):
    runs = [tmp_path / "a", tmp_path / "b"]
    for run, more in zip(runs, ("", "!"), strict=True):
        rows = evaluation("ppo", 3, 0.1, 0)
        for row in rows:
            row["response"] += more
        rows[1]["prompt"] = f"another one{more}"
        write_rows(run / "evaluations" / "ppo.jsonl", rows)
        write_rows(run / "evaluations" / "sft.jsonl", evaluation("sft", 3, 0.1, 0))
    page = Page(write_comparison(runs))
    assert "The first 2 prompts by id that two runs answered" in page.text
    assert "another one" not in page.text
    assert page.text.count("a: SFT") == page.text.count("a: PPO") == page.text.count("b: PPO") == 2
    assert "b: SFT" not in page.text


def test_settings_that_differ_are_told(tmp_path: Path):
    for name, beta in (("a", 0.1), ("b", 0.2)):
        run = write_run(tmp_path / name, iterations=3)
        (run / "config.toml").write_text(f"[ppo]\niterations = 3\n\n[ppo.kl]\ncoef = {beta}\n")
    page = Page(write_comparison([tmp_path / "a", tmp_path / "b"]))
    assert "setting a b ppo.kl.coef 0.1 0.2" in page.text
    assert "ppo.iterations" not in page.text


def test_runs_with_nothing_in_common_make_a_page(tmp_path: Path):
    write_rows(tmp_path / "a" / "metrics.jsonl", [{"stage": "sft", "step": 1, "sft/loss": 3.0}])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "summary.json").write_text(json.dumps({"model": "<script>", "suite": {"x": 1}}))
    page = Page(write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "out.html"))
    assert (tmp_path / "out.html").is_file()
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>: a run" in page.text


def call(*words: str | Path) -> None:
    bind(COMMANDS["report"], [*map(str, words)])()


def test_the_command_takes_one_run_or_several(runs: list[Path], capsys: pytest.CaptureFixture[str]):
    call(*runs, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == str(runs[0] / "comparison.html")
    assert [*told["summaries"]] == ["low/run", "high/run"]
    assert not (runs[0] / "report.html").exists()
    call("--run", runs[0], "--json")
    assert (runs[0] / "report.html").is_file()
    assert (runs[0] / "card.md").is_file()


def test_the_terminal_has_the_figures(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    call(*runs, "--output", tmp_path / "page.html")
    out = capsys.readouterr().out
    assert "low/run" in out
    assert "0.807" in out
    assert f"The comparison is in {tmp_path / 'page.html'}".replace("\n", "") in out.replace("\n", "")


def test_mistakes_of_the_command_are_told(runs: list[Path], tmp_path: Path):
    for words, reason in (
        ([runs[0], runs[0]], "a run is named twice"),
        ([runs[0], tmp_path / "gone"], "there is no run directory .*gone"),
        ([runs[0], "--output", tmp_path / "x.html"], "--output is for the page that compares"),
        ([*runs, "--output", tmp_path / "no" / "x.html"], "there is no folder .*no for --output"),
    ):
        with pytest.raises(ConfigError, match=reason):
            call(*words)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no run"):
        call(runs[0], tmp_path / "empty")
