import json
import re
from pathlib import Path

import pytest

from cluster.cli import main as cli
from cluster.cli.commands import COMMANDS, GROUPS
from cluster.cli.main import overview
from cluster.cli.parser import OFTEN, help_text, parse
from cluster.config.load import ConfigError, settings
from cluster.config.schema import Config
from cluster.runtime.exit_codes import EXIT_CODES

ROOT = Path(__file__).parents[3]
KEYS = {setting.key for setting in settings(Config)}


def test_the_section_that_is_called_as_the_command_may_be_left_out_of_a_key():
    given = parse(COMMANDS["reward"], ["--normalise", "folder", "--sft.epochs=3"]).overrides
    assert given == [("reward.normalise", "folder"), ("sft.epochs", "3")]
    assert parse(COMMANDS["best-of-n"], ["--n", "16"]).overrides == [("best_of_n.n", "16")]


def test_the_overview_has_every_command_once_under_what_it_is_for():
    shown = re.findall(r"^  ([a-z-]+) {2,}[A-Z]", overview(), re.MULTILINE)
    assert sorted(shown) == sorted(COMMANDS)
    assert {command.group for command in COMMANDS.values()} == GROUPS.keys()


def test_the_help_of_a_command_shows_what_is_often_given_and_counts_the_rest():
    text = help_text(COMMANDS["ppo"])
    assert re.search(r"--ppo\.kl\.coef float >= 0\s+beta: .*?\(default 0\.02\)", text, re.DOTALL)
    assert "--ppo.kl.target" not in text
    assert "sft.epochs" not in text
    count = sum(not one.section and one.key.startswith("ppo.") for one in settings(Config))
    assert f"ppo ({count})" in " ".join(text.split())
    assert "--dry-run" in text
    assert set(OFTEN) <= KEYS


@pytest.mark.parametrize(
    ("about", "held", "left_out"),
    [
        ("ppo.kl", {"ppo.kl.coef", "ppo.kl.target", "ppo.kl.horizon"}, {"ppo.clip"}),
        ("--ppo.kl.coef", {"ppo.kl.coef"}, {"ppo.kl.target"}),
        ("all", {"ppo.clip", "tracking.alerts.kl_above", "models.base"}, {"sft.epochs"}),
    ],
)
def test_a_section_a_setting_or_all_of_them_are_shown_when_asked_for(about: str, held: set[str], left_out: set[str]):
    shown = set(re.findall(r"^  --([\w.]+) ", help_text(COMMANDS["ppo"], about), re.MULTILINE))
    assert held <= shown
    assert not left_out & shown


def test_all_is_every_setting_of_the_command():
    shown = re.findall(r"^  --([\w.]+) ", help_text(COMMANDS["ppo"], "all"), re.MULTILINE)
    wanted = [s.key for s in settings(Config) if not s.section and s.key.split(".")[0] in COMMANDS["ppo"].sections]
    assert sorted(shown) == sorted(wanted)


def test_what_is_no_setting_of_the_command_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match=r"ppo has no setting or section 'kl\.coeff'\. Did you mean ppo\.kl\.coef\?"):
        help_text(COMMANDS["ppo"], "kl.coeff")
    with pytest.raises(ConfigError, match=r"rayward ppo --help lists the sections"):
        help_text(COMMANDS["ppo"], "zzzzzz")


def test_help_can_be_asked_for_in_front_too(capsys: pytest.CaptureFixture[str]):
    for words in (["help", "ppo", "ppo.kl"], ["ppo", "--help", "ppo.kl"]):
        assert cli.main(words) == 0
    first, second = capsys.readouterr().out.split("usage:")[1:]
    assert first.strip() == second.strip()
    assert cli.main(["help"]) == 0
    assert cli.main(["help", "pppo"]) == 2


def test_exit_codes_are_the_same_in_help_and_readme():
    """What the codes mean is tested in test_cli.py, each with what leads to it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", readme, re.MULTILINE)} == EXIT_CODES.keys()
    for name in ("ppo", "submit", "audit"):
        text = " ".join(help_text(COMMANDS[name]).split())
        assert all(f"{code} {meaning}" in text for code, meaning in EXIT_CODES.items())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["pppo", "--json"], 2, "there is no command 'pppo'"),
        (["plan", "--json", "--ppo.clip", "-1"], 2, "ppo.clip = -1"),
        (["audit", "no/such/run", "--json"], 2, "there is no run directory no/such/run"),
        (["audit", "{run}", "--json"], 1, "has no ledger"),
        (["status", "no/such/run", "--json"], 1, "no command has run in no/such/run"),
        (["jobs", "--json", "--address", "http://127.0.0.1:1"], 1, "no Ray job server answers"),
        (["jobs", "--json", "--adress", "x"], 2, "Unrecognized options: --adress, x"),
        (["submit", "--json", "ppo", "--run", "runs/mine"], 2, "an absolute path"),
    ],
)
def test_with_json_an_error_is_a_line_of_json_on_standard_error(
    words: list[str], code: int, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    assert cli.main([word.format(run=tmp_path) for word in words]) == code
    shown = capfd.readouterr()
    assert shown.out == ""
    told = json.loads(shown.err)
    assert told["exit_code"] == code
    assert any(said in line for line in told["error"])
