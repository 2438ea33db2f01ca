"""The words of a command line, taken apart: the run directory, options, flags, settings, or a command's own."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from pydantic import BaseModel

from cluster.cli.commands import COMMANDS, Command, dry_flags
from cluster.cli.help import own_help_text
from cluster.config.load import PRESETS, ConfigError, compose, nearest, presets, read_overrides, read_toml

Config = TypeVar("Config", bound=BaseModel)
OPTIONS = ("run", "config", "preset")
"""Options of every command that takes settings."""
SHELLS = ("bash", "zsh", "fish")
_ADDRESS = "dashboard of the cluster, http://HOST:8265; RAY_API_SERVER_ADDRESS when not named, else this machine's"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One command line, taken apart."""

    run_dir: Path
    """Where the run keeps its files."""
    file: Path | None
    """Settings to read."""
    preset: str | None
    """Settings to begin with."""
    variant: str | None
    """Flag that stands for another preset."""
    flags: frozenset[str]
    """Flags that are either given or not."""
    arguments: tuple[str, ...]
    """Words after the run directory."""
    remembered: Path | None
    """Settings that an earlier command left in the run directory."""
    overrides: list[tuple[str, str | None]]
    """(key, text) of everything else; None where there is no text."""


def parse(command: Command, words: Sequence[str]) -> Call:
    """Take the words after a command apart. Raises ConfigError."""
    options: dict[str, str] = {}
    variant: str | None = None
    flags: set[str] = set()
    arguments: list[str] = []
    overrides: list[tuple[str, str | None]] = []
    known = {**dry_flags(command), **command.flags}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, given, text = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            if not command.sections and "run" not in options:
                options["run"] = word
            elif len(arguments) < len(command.arguments):
                arguments.append(word)
            else:
                raise ConfigError(f"{word!r} stands alone. Remedy: write --KEY VALUE, with quotes around spaces")
            continue
        if name in command.variants and not given:
            variant = name
            continue
        if name in known and not given:
            flags.add(name)
            continue
        value = text if given else rest.pop(0) if rest and not rest[0].startswith("--") else None
        if name not in OPTIONS:
            if near := nearest(name, (*OPTIONS, *command.variants, *known), likeness=0.75):
                raise ConfigError(f"there is no option --{name}. Did you mean --{near}?")
            overrides.append((name, value))
        elif not value:
            raise ConfigError(f"--{name} needs a value")
        else:
            options[name] = value
    if overrides and not command.sections:
        raise ConfigError(f"--{overrides[0][0]} is not known here: this command takes a run directory only")
    if missing := list(command.arguments)[len(arguments) :]:
        raise ConfigError(f"{' and '.join(missing)} is missing. Remedy: {command.example}")
    run_dir = Path(options.get("run") or (f"runs/{variant}" if variant else command.run))
    file = Path(options["config"]) if "config" in options else None
    saved = run_dir / "config.toml"
    named = file or "preset" in options or variant
    remembers = saved.is_file() and ("resume" in flags or ("run" in options and not named))
    if {"resume", "restart"} <= flags:
        raise ConfigError("--resume goes on and --restart starts over: give one of them")
    return Call(
        run_dir=run_dir,
        file=file,
        preset=None if remembers else options.get("preset") or variant or (None if file else command.preset),
        variant=variant,
        flags=frozenset(flags),
        arguments=tuple(arguments),
        remembered=saved if remembers else None,
        overrides=overrides,
    )


def load(section: type[Config], call: Call) -> Config:
    """Compose preset or earlier settings, file, and the command line, in this order. Raises ConfigError."""
    given = []
    if call.preset:
        path = PRESETS / f"{call.preset}.toml"
        if not path.is_file():
            raise ConfigError(f"there is no preset {call.preset!r}. Remedy: one of {', '.join(presets())}")
        given += read_toml(section, path)
    for file in filter(None, (call.remembered, call.file)):
        given += read_toml(section, file)
    return compose(section, [*given, *read_overrides(section, call.overrides)])


class OwnParser(argparse.ArgumentParser):
    """The command line of a command that has one of its own; a mistake in it raises ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. Remedy: {self.prog} --help")

    def format_help(self) -> str:
        return own_help_text(self.prog.removeprefix("rayward "), self._actions)


def own_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command that has a command line of its own. Imports nothing heavy."""
    parser = OwnParser(prog=f"rayward {name}", allow_abbrev=False)
    add_own(parser, name)
    if name == "submit":
        what = "the command, and everything that it is told"
        parser.add_argument("command", metavar="COMMAND", help=what)
        parser.add_argument("words", nargs=argparse.REMAINDER, metavar="its words")
    return parser


def add_own(parser: argparse.ArgumentParser, name: str) -> None:
    """Tell a parser what a command with a command line of its own takes. `complete` is what shells offer."""
    if name in ("status", "top"):
        what = "run directory, or the id of a job"
        _offer(parser.add_argument("run", nargs="?", default=COMMANDS[name].run, help=what), "directory")
        parser.add_argument("--address", help=_ADDRESS)
    elif name == "dashboard":
        parser.add_argument("--entity", required=True, help="user or team of W&B")
        parser.add_argument("--project", default="rayward", help="project of W&B (rayward)")
    elif name == "completion":
        parser.add_argument("shell", choices=SHELLS, help="which shell the script is for")
    else:
        parser.add_argument("--address", help=_ADDRESS)
    if name not in ("dashboard", "completion"):
        again = ", a line again and again" if name == "top" else ""
        parser.add_argument("--json", action="store_true", help=f"print JSON{again}, for scripts")
    if name == "submit":
        _add_submit(parser)
    elif name in ("logs", "stop"):
        parser.add_argument("id", help="the job's id, as `rayward jobs` shows it")
    if name == "logs":
        parser.add_argument("--follow", action="store_true", help="go on until the job ends, as submit does")


def _add_submit(parser: argparse.ArgumentParser) -> None:
    include = parser.add_argument(
        "--include",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="a file or folder to send along, such as a module with a reward function; may be given again. What the "
        ".gitignore and .rayignore files of a folder name stays behind",
    )
    _offer(include, "file")
    parser.add_argument("--detach", action="store_true", help="print the job's id and leave it alone")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent, and send nothing")
    parser.add_argument("--id", metavar="ID", help="id of the job; the cluster makes one when not named")
    parser.add_argument(
        "--cpus",
        type=number,
        default=0.0,
        metavar="N",
        help="CPUs to reserve for the command itself, beside those of its processes. It then runs on any machine that "
        "has them free; without, on the head",
    )


def _offer(argument: argparse.Action, what: str) -> None:
    """What shtab completes: files, folders."""
    argument.complete = what  # pyright: ignore[reportAttributeAccessIssue]


def number(text: str) -> float:
    """A number from 0 on. Raises ValueError for anything else; argparse tells its name."""
    found = float(text)
    if not 0 <= found < float("inf"):
        raise ValueError(text)
    return found
