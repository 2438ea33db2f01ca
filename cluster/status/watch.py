"""The commands status and top: what a run is doing, once or live, of a run directory or of a job of a cluster."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from rich.console import Console as Rich
from rich.live import Live

from cluster.runtime.exit_codes import DONE, FAILED
from cluster.status.screen import render, screen
from cluster.status.snapshot import INTERVAL_S, read

_GONE = ("failed", "killed", "silent")
_GOES_ON = ("pending", "running", "paused", "silent")


def status(given: argparse.Namespace) -> int:
    """Show what every process of a run is doing; 1 when the run failed, was killed or has fallen silent."""
    with contextlib.closing(_looks(given, live=False)) as looks:
        found = next(looks)
        if given.json:
            sys.stdout.write(json.dumps(found, indent=2) + "\n")
        else:
            console = Rich(highlight=False)
            console.print(render(found, given.run, console.width))
    return FAILED if found["state"] in _GONE else DONE


def top(given: argparse.Namespace) -> int:
    """Show the same live, with the curves of the stage at work, until the run ends or Ctrl-C."""
    console, found = Rich(highlight=False), {}
    with contextlib.closing(_looks(given, live=True)) as looks, contextlib.ExitStack() as stack:
        shown = None if given.json else stack.enter_context(Live(console=console, screen=True, auto_refresh=False))
        for found in looks:
            if shown is None:
                sys.stdout.write(json.dumps(found) + "\n")
                sys.stdout.flush()
            else:
                shown.update(screen(found, given.run, console.width, console.height), refresh=True)
    if shown is not None:
        console.print(screen(found, given.run, console.width, console.height))
    return FAILED if found["state"] in _GONE else DONE


def _looks(given: argparse.Namespace, live: bool) -> Generator[dict[str, Any]]:
    """The status of what was named, again and again while it goes on where `live`."""
    if _names_a_job(given):
        from cluster.jobs.errand import looks_of_job  # Ray's client takes a second to import
        from cluster.jobs.submit import JobError

        try:
            yield from looks_of_job(given.address, given.run, live)
        except JobError as error:
            raise JobError(f"{given.run} is no run directory here, and as a job: {error}") from error
        return
    run = Path(given.run)
    while True:
        found = read(run)
        yield found
        if not live or found["state"] not in _GOES_ON:
            return
        time.sleep(INTERVAL_S / 2)


def _names_a_job(given: argparse.Namespace) -> bool:
    """Any name that is no path can be a job's id; a run directory that is here comes first."""
    return bool(given.address) or ("/" not in given.run and not Path(given.run).exists())
