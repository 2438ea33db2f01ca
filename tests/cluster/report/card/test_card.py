import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.repocard import metadata_load

from cluster.config.load import PRESETS, compose, read_toml, settings
from cluster.config.schema import Config
from cluster.report.card.card import MARKER, PAPER, Part, card, write_cards
from cluster.report.plots import suite, win_rates
from cluster.report.report import subject, write_report
from cluster.rundir.files import read_run
from cluster.rundir.lineage import digest, done, record
from cluster.rundir.record import flat
from tests.cluster.report.test_report import Page
from tests.synthetic_run import CAPTION, SUITE, write_rows, write_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of SFT, reward model and PPO on given files, with its lineage and records."""
    given, run = tmp_path / "given", write_run(tmp_path / "run")
    for name, text in (
        ("prompts.jsonl", "{}"),
        ("heldout|1.jsonl", "[]"),
        ("SOURCES.md", "|file|licence|\n|heldout|\n"),
    ):
        given.mkdir(exist_ok=True)
        (given / name).write_text(text)
    (given / "SOURCES.md").write_text("| file | licence |\n| --- | --- |\n| prompts.jsonl | MIT |\n")
    _model(given / "base", "---\nlicense: apache-2.0\nbase_model: org/base\nlanguage: en\n---\n")
    for name in ("sft", "policy"):
        _model(run / name)
    write_rows(run / "data" / "comparisons.jsonl", [{"labeler": "anna"}, {"labeler": "anna"}, {}])
    for kind, path, *inputs in (
        ("sft", "sft", given / "base"),
        ("comparisons", "data/comparisons.jsonl", given / "prompts.jsonl"),
        ("policy", "policy", run / "sft", given / "prompts.jsonl"),
        ("evaluation", "evaluations/ppo.jsonl", run / "policy", given / "heldout|1.jsonl"),
    ):
        record(run, kind, run / path, inputs, "rayward ppo", Config())
    stages = {"sft": {"sft.epochs": 2}, "ppo": {"ppo.kl.coef": 0.1, "ppo.epochs": 1}, "ppo-x": {"ppo.kl.coef": 0.02}}
    for stage, made_of in stages.items():
        (run / "stages").mkdir(exist_ok=True)
        (run / "stages" / f"{stage}.json").write_text(json.dumps({"made_of": made_of, "complete": True}))
    return run


def _model(folder: Path, readme: str | None = None) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(folder.name)
    if readme:
        (folder / "README.md").write_text(readme)


def _parts(run_dir: Path) -> dict[str, Part]:
    return {part.title: part for part in card(read_run(run_dir), ())}


def _write(run_dir: Path) -> Path:
    run = read_run(run_dir)
    return write_cards(run, subject(run), card(run, ()))


def _limits(run_dir: Path) -> str:
    return "\n".join(row[0] for row in _parts(run_dir)["Known limits"].rows)


def _summarise(run_dir: Path, **tables: Any) -> None:
    path = run_dir / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | tables))


def test_data_have_their_hash_use_and_licence(run_dir: Path):
    given = run_dir.parent / "given"
    assert _parts(run_dir)["Data"].rows == [
        ("prompts.jsonl", "given", "comparisons, policy", "MIT", digest(given / "prompts.jsonl")),
        ("heldout|1.jsonl", "given", "evaluation", "unknown", digest(given / "heldout|1.jsonl")),
        (
            *("data/comparisons.jsonl", "prompts.jsonl", "", "as what it was made of"),
            digest(run_dir / "data" / "comparisons.jsonl"),
        ),
    ]
    assert "No licence is known of heldout|1.jsonl." in _limits(run_dir)


def test_models_have_their_hash_and_origin_and_no_path_of_the_machine(run_dir: Path):
    rows = _parts(run_dir)["Models"].rows
    assert [row[:3] for row in rows] == [
        ("base", "given", "apache-2.0"),
        ("sft", "base", "as what it was made of"),
        ("policy", "sft, prompts.jsonl", "as what it was made of"),
    ]
    assert rows[2][3] == digest(run_dir / "policy")
    _write(run_dir)
    assert str(run_dir.parent) not in (run_dir / "card.md").read_text()


def test_a_model_of_the_hub_is_not_hashed_and_names_the_base(run_dir: Path):
    record(run_dir, "sft", run_dir / "sft", ["org/hub"], "rayward sft", Config())
    assert ("org/hub", "given", "unknown", "not hashed: a name of the hub") in _parts(run_dir)["Models"].rows
    _write(run_dir)
    assert (metadata_load(run_dir / "policy" / "README.md") or {})["base_model"] == "org/hub"


def test_a_file_that_is_gone_is_still_told(run_dir: Path):
    (run_dir.parent / "given" / "prompts.jsonl").unlink()
    assert _parts(run_dir)["Data"].rows[0][0] == "prompts.jsonl"


def test_labelers_are_counted_and_their_agreement_told(run_dir: Path):
    agreed = {"labelers_agree": 0.73, "labelers_agree_ci": [0.7, 0.76]}
    _summarise(run_dir, rounds={"2": agreed | {"labelers_alpha": 0.5}, "3": agreed})
    part = _parts(run_dir)["Labelers"]
    assert part.text == f"Rankings: {CAPTION}. Gold: {CAPTION}."
    assert part.rows == [
        ("anna", "ranked 2 comparisons"),
        ("not recorded", "ranked 1 comparisons"),
        ("two labelers in round 2", "agree on 0.730 (0.700 to 0.760) of pairs; Krippendorff's alpha 0.500"),
        ("two labelers in round 3", "agree on 0.730 (0.700 to 0.760) of pairs"),
    ]


def test_who_ranked_for_a_reward_model_from_elsewhere_is_not_made_up(tmp_path: Path):
    write_rows(tmp_path / "evaluations" / "ppo.jsonl", [{"id": "a", "gold": 0.5}])
    (tmp_path / "summary.json").write_text(json.dumps({"labeler": CAPTION}))
    assert _parts(tmp_path)["Labelers"] == Part("Labelers", f"Rankings: not recorded here. Gold: {CAPTION}.", (), [])


def test_settings_are_held_against_the_papers_by_the_records_of_the_stages(run_dir: Path):
    part = _parts(run_dir)["Settings that differ from the paper's"]
    assert part.rows == [("ppo.kl.coef", "0.02", "0.1 (ppo), 0.02 (ppo-x)")]
    assert part.text.startswith("Of 3 settings that the paper gives for its 1.3B policy, 2 are")
    (run_dir / "stages" / "ppo-x.json").write_text("{")
    assert _parts(run_dir)["Settings that differ from the paper's"].rows == [("ppo.kl.coef", "0.02", "0.1")]


def test_the_papers_values_are_those_of_its_preset_and_of_the_help():
    paper, known = dict(flat(PAPER)), {one.key: one for one in settings(Config) if not one.section}
    assert paper.keys() <= known.keys()
    preset = compose(Config, read_toml(Config, PRESETS / "instructgpt.toml")).model_dump(mode="json")
    for key, value in paper.items():
        found: Any = preset
        for name in key.split("."):
            found = found[name]
        assert found in (value if isinstance(value, list) else [value]), key
    # quickstart.pretrain is of no paper, and of the dropout of the SFT model that PPO starts from it says nothing
    told = {
        key
        for key, one in known.items()
        if re.search(r"\(paper: ", one.doc) and not key.startswith("quickstart.") and key != "sft.residual_dropout"
    }
    assert told <= paper.keys(), told - paper.keys()


def test_held_out_figures_have_intervals_and_their_number(tmp_path: Path):
    rows = [{"id": str(n), "gold": gold, "score": 2.0, "kl": 1.0} for n, gold in enumerate((0.0, 0.5))]
    write_rows(tmp_path / "evaluations" / "sft.jsonl", [*rows, {"id": "x"}])
    half = 1.96 * 0.25
    gold = f"0.250 ({0.25 - half:.3f} to {0.25 + half:.3f})"
    assert _parts(tmp_path)["Held-out prompts"].rows == [
        ("SFT", gold, "2.00 (2.00 to 2.00)", "1.00 (1.00 to 1.00)", "3")
    ]


def test_benchmarks_stand_side_by_side_with_interval_judge_and_number(run_dir: Path):
    _summarise(run_dir, suite=SUITE | {"broken": 3})
    parts = _parts(run_dir)
    assert parts["Benchmarks"].head == ("figure", "base", "policy", "n", "judged by")
    assert parts["Benchmarks"].rows == [
        ("hellaswag.accuracy", "0.500 (0.250 to 0.750)", "0.375 (0.250 to 0.750)", "40, 200", ""),
        ("toxicity.mean", "0.500 (0.250 to 0.750)", "", "40", "alt-profanity-check"),
    ]
    assert parts["Benchmarks: differences"].rows == [("hellaswag.accuracy", "-0.125 (-0.250 to 0.000)", "40", "")]
    assert "More than base, paired by item." in parts["Benchmarks: differences"].text
    assert parts["Share of the tax that the mix saved"].rows == [("hellaswag", "0.500 (0.250 to 0.750)", "40", "")]
    assert parts["Win rates"].rows == [
        (
            *("policy", "base", "0.550 (0.400 to 0.700)", "20, 4, 16", "2", "0.500 (0.250 to 0.750)", ""),
            "simulated labeler",
        )
    ]
    assert "Benchmarks of few items: hellaswag (40), toxicity (40), win_rate (40)." in _limits(run_dir)
    assert "Toxicity is not the Perspective API's" in _limits(run_dir)


@pytest.mark.parametrize("table", [3, {"a": 3}, {"a": {"b": 3}}])
def test_damaged_win_rates_have_no_rows(table: Any):
    assert len(list(win_rates({"policy": {"win_rate": table}}))) == 1


def test_a_judge_without_a_verdict_is_told():
    table = {"a": {"base": {"win_rate": None, "unparsed": 3}}}
    assert list(win_rates({"policy": {"win_rate": table}}))[1:] == [("policy", "base", "", "0, 0, 0", "3", "", "", "a")]


@pytest.mark.parametrize("table", [{}, {"figures": 1}, {"figures": {"a": 1, "b": {"c": "d", "e": {"value": "x"}}}}])
def test_a_damaged_suite_has_no_rows(table: dict[str, Any]):
    assert list(suite({"policy": table}, "figures")) == [("figure", "n", "judged by")]


def test_limits_are_those_of_the_run(run_dir: Path, tmp_path: Path):
    told = _limits(run_dir)
    assert f"Gold is the verdict of the {CAPTION}, a program: no person judged a response." in told
    assert "The same labeler ranked what the reward model learnt from" in told
    assert "The policy to keep was chosen by its gold on the held-out prompts" in told
    assert "The held-out evaluation has 96 prompts." in told
    assert "alignment tax (hellaswag, squad, drop, translation, bits_per_byte)" in told
    assert "Perspective" not in told
    _summarise(run_dir, labeler="people", rankings="people (anna)")
    assert "program" not in _limits(run_dir)
    write_rows(tmp_path / "sft" / "metrics.jsonl", [{"stage": "sft", "step": 1, "sft/loss": 3.0}])
    assert [row[0][:13] for row in _parts(tmp_path / "sft")["Known limits"].rows] == ["Not measured:", "There is no l"]


def test_the_model_card_is_valid_and_no_part_of_the_model(run_dir: Path):
    before = digest(run_dir / "policy")
    _write(run_dir)
    readme = run_dir / "policy" / "README.md"
    assert metadata_load(readme) == {
        "base_model": "org/base",
        "language": "en",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf", "ppo"],
    }
    assert not (run_dir / "sft" / "README.md").exists()
    assert digest(run_dir / "policy") == before
    assert done(run_dir, run_dir / "policy")
    (run_dir / "policy" / "more").mkdir()
    (run_dir / "policy" / "more" / "README.md").write_text("is hashed")
    assert digest(run_dir / "policy") != before


def test_a_model_card_that_somebody_wrote_is_left_alone_and_ours_is_replaced(run_dir: Path):
    readme = run_dir / "policy" / "README.md"
    readme.write_text("mine")
    _write(run_dir)
    assert readme.read_text() == "mine"
    readme.write_text(f"old {MARKER}")
    _write(run_dir)
    assert "# policy: SmolLM2-135M-Instruct: SFT" in readme.read_text()


def test_the_card_is_a_page_of_the_report_and_a_file(run_dir: Path):
    page = Page(write_report(run_dir))
    text = (run_dir / "card.md").read_text()
    for shown in (page.text, text):
        for words in ("Settings that differ from the paper's", "0.1 (ppo), 0.02 (ppo-x)", "anna", "Known limits"):
            assert words in shown
    assert "| Alignment tax, PPO-ptx | +0.040 | 3.97 → 4.01 nats a token of pretraining text |" in text
    assert "840 held-out pairs" in text
    assert f"| {digest(run_dir.parent / 'given' / 'prompts.jsonl')} |" in text
    assert "| heldout\\|1.jsonl |" in text
    assert not re.search(r"\n\n\n|[ \t]\n", text)


def test_strangers_texts_mean_nothing_in_markdown(run_dir: Path):
    _summarise(run_dir, model="<img src=x>\n\n# [a](b) `c` \x1b[2J", labeler="| x | <script>")
    _write(run_dir)
    text = (run_dir / "card.md").read_text()
    assert "# \\<img src=x\\> \\# \\[a\\](b) \\`c\\` \\\\x1b\\[2J" in text.splitlines()[2]
    assert "\\| x \\| \\<script\\>" in text
    assert "<script>" not in text.replace("\\<script\\>", "")
