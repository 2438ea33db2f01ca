"""The commands submit, jobs, logs and stop: rayward's commands as jobs of a running Ray cluster."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console as Rich
from rich.table import Table

from cluster.cli.command_line import load, own_parser, parse
from cluster.cli.commands import COMMANDS
from cluster.config.load import ConfigError, nearest
from cluster.config.redaction import SECRET_NAME
from cluster.config.schema import Config
from cluster.jobs.package import mebibytes
from cluster.jobs.submit import JobRow, Order, check, connect, follow, job, logs, stop
from cluster.jobs.submit import jobs as every_job
from cluster.jobs.submit import submit as start
from cluster.runtime.exit_codes import DONE, FAILED, INTERRUPTED
from cluster.tracking.console import duration


def submit(given: argparse.Namespace) -> int:
    """Submit a command and follow its log; the job's outcome is the exit code."""
    order = _ordered(given)
    files = check(order)
    if given.dry_run:
        _say(_foreseen(order, files, given.json), given.json)
        return DONE
    client = connect(given.address)
    name = start(client, order)
    if given.detach:
        _say({"id": name} if given.json else f"{name}\nrayward logs {name} --follow shows what it does", given.json)
        return DONE
    sys.stderr.write(f"submitted as {name}; Ctrl-C leaves it running\n")
    return _followed(client, name, given.json)


def jobs(given: argparse.Namespace) -> int:
    """List the jobs of a cluster."""
    found = every_job(connect(given.address))
    _say([asdict(one) for one in found] if given.json else _table(found), given.json)
    return DONE


def show_logs(given: argparse.Namespace) -> int:
    """Print what a job has printed."""
    client = connect(given.address)
    if given.follow:
        return _followed(client, given.id, given.json)
    text = logs(client, given.id)
    if given.json:
        _say(asdict(job(client, given.id)) | {"log": text}, as_json=True)
    else:
        sys.stdout.write(text)
    return DONE


def stop_job(given: argparse.Namespace) -> int:
    """Stop a job and wait until it has stopped."""
    last = stop(connect(given.address), given.id)
    _say(asdict(last) if given.json else f"{last.id} is {last.status}", given.json)
    return DONE


def _ordered(given: argparse.Namespace) -> Order:
    """What the job is to be. Raises ConfigError for what it would only find out itself, on the cluster."""
    name, words = given.command, given.words
    possible = [known for known, command in COMMANDS.items() if command.submits]
    if name not in possible:
        variable, is_variable, _ = name.partition("=")
        if is_variable and SECRET_NAME.search(variable.upper()):
            raise ConfigError(
                f"{variable} is a secret, and a job carries none. Remedy: set it in the environment in which the "
                "cluster's machines start Ray"
            )
        near = nearest(name, possible)
        remedy = f"Did you mean {near}?" if near else f"One of {', '.join(possible)}"
        raise ConfigError(f"{name!r} cannot be submitted. {remedy}")
    command, settings = COMMANDS[name], None
    if command.own:
        run_dir, told = Path(own_parser(name).parse_args(words).run), [name, *words]
    else:
        call = parse(command, words)
        run_dir, named = call.run_dir, call.file is not None or call.preset is not None
        config = load(Config, call) if command.sections else None  # what is wrong is said here, not there
        settings = config if named else None
        # The run directory first: a command without settings takes the first word that stands alone for one.
        told = [name, "--run", str(run_dir), *call.arguments, *(f"--{flag}" for flag in sorted(call.flags))]
        told += [f"--{call.variant}"] if call.variant else []
        told += [] if named else [word for key, value in call.overrides for word in (f"--{key}", value or "")]
        if "cluster" in command.sections and not any(key == "cluster.address" for key, _ in call.overrides):
            told += ["--cluster.address", "auto"]
    return Order(
        words=tuple(told),
        run_dir=run_dir,
        settings=settings,
        include=tuple(given.include),
        id=given.id,
        cpus=given.cpus,
    )


def _foreseen(order: Order, files: dict[str, int], as_json: bool) -> Any:
    """What would be sent, and nothing is."""
    told = {"entrypoint": order.entrypoint, "metadata": order.metadata, "id": order.id, "cpus": order.cpus}
    if as_json:
        return told | {"bytes": sum(files.values()), "files": files}
    lines = [f"{what:<12}{json.dumps(value) if isinstance(value, dict) else value}" for what, value in told.items()]
    for part, count in Counter(name.partition("/")[0] for name in files).items():
        size = sum(size for name, size in files.items() if name.partition("/")[0] == part)
        lines.append(f"{'files':<12}{part}, {mebibytes(size)}" + (f" in {count} files" if count > 1 else ""))
    return "\n".join([*lines, f"{'in all':<12}{mebibytes(sum(files.values()))}; nothing was sent"])


def _followed(client: Any, name: str, as_json: bool) -> int:
    try:
        last = follow(client, name, sys.stderr if as_json else sys.stdout)
    except KeyboardInterrupt:
        sys.stderr.write(f"{name} goes on: rayward logs {name} --follow shows it, rayward stop {name} ends it\n")
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
