"""The commands status and top: what a run is doing, once or live. They only read the run directory."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console as Rich
from rich.live import Live

from cluster.cli import DONE, FAILED
from cluster.commands import COMMANDS, command_parser
from cluster.status import INTERVAL_S, read, render

_GONE = ("failed", "killed", "silent")


def status(words: Sequence[str]) -> int:
    """Show what every process of a run is doing; 1 when the run failed, was killed or has fallen silent."""
    parser = _parser("status")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    given = parser.parse_args(words)
    found = read(given.run)
    if given.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        Rich(highlight=False).print(render(found, given.run))
    return FAILED if found["state"] in _GONE else DONE


def top(words: Sequence[str]) -> int:
    """Show the same live, with the newest stage's curves, until the run ends or Ctrl-C."""
    given = _parser("top").parse_args(words)
    found = read(given.run)
    with Live(render(found, given.run, curves=True), auto_refresh=False) as live:
        while found["state"] in ("running", "silent"):
            time.sleep(INTERVAL_S / 2)
            found = read(given.run)
            live.update(render(found, given.run, curves=True), refresh=True)
    return FAILED if found["state"] in _GONE else DONE


def _parser(name: str) -> argparse.ArgumentParser:
    parser = command_parser(name)
    parser.add_argument("run", type=Path, nargs="?", default=Path(COMMANDS[name].run), help="the run directory")
    return parser
