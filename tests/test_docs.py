"""The README and docs/ say what the code does: commands, settings, data rows, files and functions."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.prompts import read_demonstrations, read_prompts
from cluster.cli.commands import COMMANDS
from cluster.cli.parser import bind, load, parse
from cluster.config.load import settings
from cluster.config.schema import Config
from learner.data.corpora import read_texts
from reward_server.app import serve
from reward_server.preferences.labeling import read_comparisons
from reward_server.schema import ScoreReply, ScoreRequest
from reward_server.sources import RuleSource

ROOT = Path(__file__).parent.parent
PACKAGES = ("reward_server", "actors", "learner", "cluster")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
README = PAGES[0].read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
READERS = {
    "demonstrations": read_demonstrations,
    "prompts": read_prompts,
    "comparisons": read_comparisons,
    "pretraining": read_texts,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def command_lines() -> list[str]:
    return re.findall(r"rayward ([a-z-]+ .*)", "\n".join(blocks("sh")))


def test_every_fault_has_tests_that_exist():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|(.*)$", page, re.MULTILINE)
    assert sorted(int(number) for number, _ in rows) == list(range(1, 31))
    for number, row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert tests, number
        for file, name in tests:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), (number, file, name)


@pytest.mark.parametrize("line", command_lines())
def test_a_command_of_the_readme_is_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(blocks("toml")[0], encoding="utf-8")
    name, *words = shlex.split(line.partition(" > ")[0], comments=True)
    if COMMANDS[name].sections:
        load(Config, parse(COMMANDS[name], words))
    else:
        bind(COMMANDS[name], words)


def test_every_step_has_its_command_in_the_readme():
    assert {line.split()[0] for line in command_lines()} == COMMANDS.keys() - {"quickstart"}


def test_a_row_of_the_readme_is_read(tmp_path: Path):
    known = {setting.key for setting in settings(Config)}
    table = re.findall(r"^\| (`data\..*?) \| `(\{.*\})` \|$", README, re.MULTILINE)
    assert len(table) == 6
    for number, (keys, row) in enumerate(table):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(row + "\n", encoding="utf-8")
        for key in re.findall(r"`(data\.\w+)`", keys):
            assert key in known
            kind = next(kind for kind in READERS if kind in key)
            assert len(READERS[kind](path)) == 1


def test_settings_named_in_the_pages_exist():
    known = {setting.key for setting in settings(Config)}
    tables = {key.split(".")[0] for key in known}
    for page in PAGES:
        for name in re.findall(r"`(?:--)?([a-z_]+(?:\.[a-z_]+)+)\b", page.read_text(encoding="utf-8")):
            table, _, last = name.partition(".")
            if table in tables and last not in ("py", "toml", "json", "jsonl"):
                assert name in known, f"{page.name} names {name}"


def test_targets_of_make_exist():
    made = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"^(?:make |.*?`make )([a-z]+)", text, re.MULTILINE):
            assert target in made, f"{page.name} names make {target}"


def test_links_and_paths_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        links = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
        links += [f"/{path}" for path in re.findall(rf"`((?:{'|'.join(PACKAGES)}|tests)/[\w/.]+)", text)]
        for link in links:
            path = ROOT / link[1:] if link.startswith("/") else page.parent / link
            assert path.exists(), f"{page.name} names {link}"


def test_functions_named_in_the_pages_exist():
    for page in PAGES:
        for file, dotted in re.findall(r"`([\w/]+\.py):([\w.]+)`", page.read_text(encoding="utf-8")):
            inside: list[ast.stmt] = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
            for name in dotted.split("."):
                found = [
                    node
                    for node in inside
                    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name
                ]
                assert found, f"{page.name} names {file}:{dotted}"
                inside = found[0].body


def test_every_room_has_its_line_in_where_to_look():
    table = ARCHITECTURE.split("\n## Where to look")[1].split("\n## ")[0]
    rooms = {
        str(path.parent.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")
    }
    named = [
        name for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in re.findall(r"`([\w/]+)/`", row)
    ]
    assert set(named) == rooms - {"cluster"}
    assert len(named) == len(rooms) - 1
    assert len(ARCHITECTURE.splitlines()) <= 200


SCORING = (ROOT / "docs" / "scoring.md").read_text(encoding="utf-8")


class Watched(RuleSource):
    """Counts words, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(None)
        self.seen: list[str] = []

    def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        self.seen += [request.id for request in requests]
        return super().score(requests)


def test_the_example_client_of_the_scoring_page_repeats_a_post_that_is_computed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    source = Watched()
    server = serve(source, token="open-sesame")
    try:
        monkeypatch.setenv("SCORES", server.url)
        monkeypatch.setenv("RAYWARD_REWARD_TOKEN", "open-sesame")
        exec(re.findall(r"```python\n(.*?)```", SCORING, re.DOTALL)[0], {})
        assert capsys.readouterr().out == "[2.0]\n[2.0]\n"
        assert source.seen == ["run-7/prompt-12/0"]
        monkeypatch.setenv("RAYWARD_REWARD_TOKEN", "wrong")
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            exec(re.findall(r"```python\n(.*?)```", SCORING, re.DOTALL)[0], {})
    finally:
        server.close()


def test_the_sources_of_the_scoring_page_are_a_right_configuration(tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_text(re.findall(r"```toml\n(.*?)```", SCORING, re.DOTALL)[0])
    call = parse(COMMANDS["serve"], ["--config", str(file)])
    assert [part.name for part in load(Config, call).scoring.parts] == ["reward_model", "brevity", "no_links"]


@pytest.mark.parametrize("line", re.findall(r"^rayward ([a-z]+ .*)", SCORING, re.MULTILINE))
def test_a_command_of_the_scoring_page_is_understood(line: str):
    name, *words = shlex.split(line, comments=True)
    load(Config, parse(COMMANDS[name], words))
