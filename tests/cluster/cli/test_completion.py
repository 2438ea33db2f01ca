"""The scripts complete in the shells themselves; zsh and fish where they are installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from cluster.cli import main as cli
from cluster.cli.commands import COMMANDS
from cluster.config.load import presets, settings
from cluster.config.schema import Config

BASH = """
source {script}
function=$(complete -p rayward | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
while read -r -a COMP_WORDS; do
    COMP_WORDS[-1]=${{COMP_WORDS[-1]%_}}
    COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )) COMPREPLY=()
    $function rayward "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
    echo "${{COMPREPLY[@]}}"
done
"""
ZSH = """
zmodload zsh/zpty
zpty -b inner zsh -f -i
zpty -w inner 'PS1=; fpath=({folder} $fpath); autoload -Uz compinit; compinit -u -D; bindkey "^I" complete-word'
zpty -w inner 'echo REA""DY'
zpty -r -m inner shown '*READY*'
zpty -w -n inner $'rayward ppo --ppo.kl.c\t \x15echo DO""NE\n'
zpty -r -m inner shown '*DONE*'
print -r -- "$shown"
zpty -d inner
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory):
    """The script for a shell, in a file."""
    folder = tmp_path_factory.mktemp("completion")

    def write(shell: str) -> Path:
        with pytest.MonkeyPatch.context() as patch, (folder / shell).open("w", encoding="utf-8") as file:
            patch.setattr("sys.stdout", file)
            assert cli.main(["completion", shell]) == 0
        return folder / shell

    return write


@pytest.fixture(scope="module")
def tab(script, tmp_path_factory: pytest.TempPathFactory):
    """What bash offers when TAB is pressed behind each line; a line that ends in _ ends in an empty word."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "mine.toml").touch()
    (folder / "mine.txt").touch()
    (folder / "mined").mkdir()
    program = BASH.format(script=script("bash"))

    def press(*lines: str) -> list[set[str]]:
        done = subprocess.run(
            ["bash", "--norc", "-c", program],
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            text=True,
            timeout=20,
            cwd=folder,
        )
        assert done.stderr == ""
        return [set(line.split()) for line in done.stdout.splitlines()]

    return press


def test_bash_completes_commands_options_settings_and_values(tab):
    keys = {f"--{setting.key}" for setting in settings(Config) if not setting.section}
    offered = tab("rayward _", "rayward ppo --ppo.kl.", "rayward submit _")
    assert offered[0] >= COMMANDS.keys()
    assert offered[1] == {key for key in keys if key.startswith("--ppo.kl.")}
    assert {one for one in offered[2] if one[0] != "-"} == {
        name for name, command in COMMANDS.items() if command.submits
    }
    assert tab(
        "rayward ppo --resu",
        "rayward ppo --dry",
        "rayward quickstart --ti",
        "rayward ppo --ppo.clip 0.2 --preset _",
        "rayward ppo --tracking.mode _",
        "rayward ppo --tracking.tensorboard _",
        "rayward submit --detach ppo --ppo.kl.c",
        "rayward submit --de",
        "rayward logs --fo",
    ) == [
        {"--resume"},
        {"--dry-run"},
        {"--tiny"},
        set(presets()),
        {"offline", "online", "disabled"},
        {"true", "false"},
        {"--ppo.kl.coef"},
        {"--detach"},
        {"--follow"},
    ]


def test_bash_completes_files_and_folders(tab):
    offered = tab("rayward ppo --config m", "rayward ppo --run m", "rayward ppo --data.prompts m")
    assert offered == [{"mine.toml", "mine.txt", "mined"}] * 3


def test_a_setting_that_a_command_does_not_read_is_not_offered(tab):
    assert tab("rayward sft --ppo.", "rayward rank --models.") == [set(), set()]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(script):
    program = f"source {script('fish')}; complete -C 'rayward ppo --ppo.kl.c'"
    done = subprocess.run(["fish", "--no-config", "-c", program], capture_output=True, text=True, timeout=20)
    offered = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert offered == ["--ppo.kl.coef"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes(script, tmp_path: Path):
    shutil.copy(script("zsh"), tmp_path / "_rayward")
    program = ZSH.format(folder=tmp_path)  # zsh completes on a terminal alone
    done = subprocess.run(["zsh", "-f", "-c", program], capture_output=True, text=True, timeout=20)
    assert "rayward ppo --ppo.kl.coef" in done.stdout, done.stdout + done.stderr
