"""The commands status and top: what a run is doing, once or live. They only read the run directory."""

import argparse
import json
import sys
import time

from rich.console import Console as Rich
from rich.live import Live

from cluster.cli import DONE, FAILED
from cluster.status import INTERVAL_S, read, render

_GONE = ("failed", "killed", "silent")


def status(given: argparse.Namespace) -> int:
    """Show what every process of a run is doing; 1 when the run failed, was killed or has fallen silent."""
    found = read(given.run)
    if given.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        Rich(highlight=False).print(render(found, given.run))
    return FAILED if found["state"] in _GONE else DONE


def top(given: argparse.Namespace) -> int:
    """Show the same live, with the newest stage's curves, until the run ends or Ctrl-C."""
    found = read(given.run)
    with Live(render(found, given.run, curves=True), auto_refresh=False) as live:
        while found["state"] in ("running", "silent"):
            time.sleep(INTERVAL_S / 2)
            found = read(given.run)
            live.update(render(found, given.run, curves=True), refresh=True)
    return FAILED if found["state"] in _GONE else DONE
