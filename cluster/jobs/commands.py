"""The commands submit, jobs, logs and stop: rayward's commands as jobs of a running Ray cluster."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console as Rich
from rich.table import Table

from cluster.jobs.package import mebibytes
from cluster.jobs.submit import JobRow, Order, check, connect, follow, job, logs, stop
from cluster.jobs.submit import jobs as every_job
from cluster.jobs.submit import submit as start
from cluster.runtime.exit_codes import DONE, FAILED, INTERRUPTED
from cluster.tracking.console import duration


def submit(order: Order, address: str | None, *, detach: bool, dry_run: bool, as_json: bool) -> int:
    """Submit a command and follow its log; the job's outcome is the exit code."""
    files = check(order)
    if dry_run:
        _say(_foreseen(order, files, as_json), as_json)
        return DONE
    client = connect(address)
    name = start(client, order)
    if detach:
        _say({"id": name} if as_json else f"{name}\nrayward logs {name} --follow shows what it does", as_json)
        return DONE
    sys.stderr.write(f"submitted as {name}; Ctrl-C leaves it running\n")
    return _followed(client, name, as_json)


def jobs(address: str | None, *, as_json: bool) -> int:
    """List the jobs of a cluster."""
    found = every_job(connect(address))
    _say([asdict(one) for one in found] if as_json else _table(found), as_json)
    return DONE


def show_logs(address: str | None, name: str, *, follow: bool, as_json: bool) -> int:
    """Print what a job has printed."""
    client = connect(address)
    if follow:
        return _followed(client, name, as_json)
    text = logs(client, name)
    if as_json:
        _say(asdict(job(client, name)) | {"log": text}, as_json=True)
    else:
        sys.stdout.write(text)
    return DONE


def stop_job(address: str | None, name: str, *, as_json: bool) -> int:
    """Stop a job and wait until it has stopped."""
    last = stop(connect(address), name)
    _say(asdict(last) if as_json else f"{last.id} is {last.status}", as_json)
    return DONE


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
