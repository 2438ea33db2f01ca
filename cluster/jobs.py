"""The commands submit, jobs, logs and stop: rayward's commands as jobs of a running Ray cluster."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console as Rich
from rich.table import Table

from cluster.cli import DONE, FAILED, INTERRUPTED, Call, load, parse
from cluster.commands import COMMANDS, command_parser
from cluster.config import Config
from cluster.console import duration
from cluster.settings import ConfigError, nearest
from cluster.submit import JobRow, connect, follow, job, logs, stop
from cluster.submit import jobs as every_job
from cluster.submit import submit as start

_ADDRESS = "dashboard of the cluster, http://HOST:8265; RAY_API_SERVER_ADDRESS, else this machine, when not named"


def submit(words: Sequence[str]) -> int:
    """Submit a command and follow its log; the job's outcome is the exit code."""
    parser = _parser("submit")
    parser.add_argument("--include", type=Path, action="append", default=[], help="a file or folder to send along")
    parser.add_argument("--detach", action="store_true", help="print the job's id and leave it alone")
    parser.add_argument("command", help="the command, and everything that it is told")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...")
    given = parser.parse_args(words)
    command, call = _checked(given.command, given.words)
    named = call.file is not None or call.preset is not None
    config = load(Config, call) if command.sections else None  # what is wrong with the settings is said here, not there
    told = [given.command, *call.arguments, *(f"--{flag}" for flag in sorted(call.flags))]
    if call.variant:
        told.append(f"--{call.variant}")
    told += [] if named else [word for key, value in call.overrides for word in (f"--{key}", value or "")]
    if "cluster" in command.sections and not any(key == "cluster.address" for key, _ in call.overrides):
        told += ["--cluster.address", "auto"]
    client = connect(given.address)
    name = start(client, told, call.run_dir, config if named else None, given.include)
    if given.detach:
        _say({"id": name} if given.json else f"{name}\nrayward logs {name} --follow shows what it does", given.json)
        return DONE
    sys.stderr.write(f"submitted as {name}; Ctrl-C leaves it running\n")
    return _followed(client, name, given.json)


def jobs(words: Sequence[str]) -> int:
    """List the jobs of a cluster."""
    given = _parser("jobs").parse_args(words)
    found = every_job(connect(given.address))
    _say([asdict(one) for one in found] if given.json else _table(found), given.json)
    return DONE


def show_logs(words: Sequence[str]) -> int:
    """Print what a job has printed."""
    parser = _parser("logs")
    parser.add_argument("--follow", action="store_true", help="go on until the job ends; its outcome is the exit code")
    parser.add_argument("id", help="the job's id, as `rayward jobs` shows it")
    given = parser.parse_args(words)
    client = connect(given.address)
    if given.follow:
        return _followed(client, given.id, given.json)
    sys.stdout.write(logs(client, given.id))
    return DONE


def stop_job(words: Sequence[str]) -> int:
    """Stop a job and wait until it has stopped."""
    parser = _parser("stop")
    parser.add_argument("id", help="the job's id, as `rayward jobs` shows it")
    given = parser.parse_args(words)
    last = stop(connect(given.address), given.id)
    _say(asdict(last) if given.json else f"{last.id} is {last.status}", given.json)
    return DONE


def _parser(name: str) -> argparse.ArgumentParser:
    parser = command_parser(name)
    parser.add_argument("--address", help=_ADDRESS)
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    return parser


def _checked(name: str, words: Sequence[str]) -> tuple[Any, Call]:
    """The command and its words. Raises ConfigError for what the job would only find out later."""
    possible = [known for known, command in COMMANDS.items() if not command.own]
    if name not in possible:
        near = nearest(name, possible)
        remedy = f"Did you mean {near}?" if near else f"One of {', '.join(possible)}"
        raise ConfigError(f"{name!r} cannot be submitted. {remedy}")
    return COMMANDS[name], parse(COMMANDS[name], words)


def _followed(client: Any, name: str, as_json: bool) -> int:
    try:
        last = follow(client, name, sys.stderr if as_json else sys.stdout)
    except KeyboardInterrupt:
        now = job(client, name).status
        sys.stderr.write(f"{name} is {now} and goes on: rayward logs {name} --follow, rayward stop {name}\n")
        return INTERRUPTED
    _say(asdict(last) if as_json else f"{last.id} {last.status} after {duration(last.seconds)}", as_json)
    return DONE if last.status == "SUCCEEDED" else FAILED


def _table(rows: Sequence[JobRow]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("job", "status", "started (UTC)", "for", "command", "run"):
        table.add_column(column, no_wrap=True)
    for one in rows:
        table.add_row(one.id, one.status, one.started, duration(one.seconds), one.command, one.run)
    return table


def _say(what: Any, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(what, indent=2) + "\n")
    else:
        Rich(highlight=False, soft_wrap=True).print(what, markup=False, crop=False)
