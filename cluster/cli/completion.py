"""`rayward completion`: a script for a shell, which completes commands, options, settings and their values.

shtab makes it from a tree of argparse parsers, and the tree is made here from the commands and the configuration. The
script needs no Python when somebody presses TAB.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import shtab

from cluster.cli.command_line import add_own
from cluster.cli.commands import COMMANDS, Command, dry_flags
from cluster.cli.help import EVERYTHING
from cluster.config.load import Setting, presets, settings
from cluster.config.schema import Config

_TOML = shtab.glob("*.toml")


def completion(given: argparse.Namespace) -> int:
    """Print the script for the shell that is named."""
    sys.stdout.write(shtab.complete(command_tree(), given.shell))
    return 0


def command_tree() -> argparse.ArgumentParser:
    """Every command as a parser, for what completes or documents it; it parses nothing itself."""
    root = argparse.ArgumentParser("rayward")
    commands = root.add_subparsers()
    for name, command in COMMANDS.items():
        parser = _add(commands, name, command)
        if name == "submit":  # which is followed by another command
            inner = parser.add_subparsers()
            for other, one in COMMANDS.items():
                if one.submits:
                    _add(inner, other, one)
    topics = commands.add_parser("help", help="The help of a command.", add_help=False)
    topics.add_argument("command", choices=tuple(COMMANDS))
    return root


def _add(commands: Any, name: str, command: Command) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=_plain(command.purpose), add_help=False)
    if command.own:
        add_own(parser, name)
        parser.add_argument("--help", action="store_true", help="what it is for, and what it can be told")
        return parser
    shown = [one for one in settings(Config) if one.key.split(".")[0] in command.sections]
    topics = [EVERYTHING, *(one.key for one in shown if one.section)] if shown else None
    parser.add_argument("--help", nargs="?", choices=topics, help="what it is for, and what it can be told")
    run = parser.add_argument("--run", help="the run directory")
    run.complete = shtab.DIRECTORY  # pyright: ignore[reportAttributeAccessIssue]
    if not command.sections:
        word = parser.add_argument("RUN", nargs="?", help="the run directory")
        word.complete = shtab.DIRECTORY  # pyright: ignore[reportAttributeAccessIssue]
    else:
        file = parser.add_argument("--config", help="settings from a TOML file")
        file.complete = _TOML  # pyright: ignore[reportAttributeAccessIssue]
        parser.add_argument("--preset", choices=presets(), help="settings that come with rayward")
    flags = {**command.variants, **dry_flags(command), **command.flags}
    for flag, what in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=_plain(what))
    for setting in shown:
        if setting.section is None:
            _add_setting(parser, setting)
    return parser


def _add_setting(parser: argparse.ArgumentParser, setting: Setting) -> None:
    values = list(dict.fromkeys(_values(setting.field.annotation)))
    option = parser.add_argument(
        f"--{setting.key}",
        nargs="?" if setting.field.annotation is bool else None,
        choices=values or None,
        help=_plain(f"{setting.type}, {setting.default_text}"),
    )
    if Path in (setting.field.annotation, *get_args(setting.field.annotation)):
        option.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]


def _values(annotation: Any) -> Iterable[str]:
    """The values that a type can have, where they can be counted."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is bool:
        yield from ("true", "false")
    elif origin is Literal:
        yield from map(str, arguments)
    elif origin in (Union, UnionType, Annotated):
        for argument in arguments:
            yield from _values(argument)


def _plain(text: str) -> str:
    """A help that argparse does not read as a format."""
    return text.replace("%", "%%")
