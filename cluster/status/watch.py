"""The commands status and top: what a run is doing, once or live."""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console as Rich
from rich.live import Live

from cluster.runtime.exit_codes import DONE, FAILED
from cluster.status.screen import render, screen
from cluster.status.snapshot import INTERVAL_S, read

_GONE = ("failed", "killed", "silent")
_GOES_ON = ("running", "paused", "silent")


def status(run: Path, *, as_json: bool) -> int:
    """Show what every process of a run is doing; 1 when the run failed, was killed or has fallen silent."""
    found = read(run)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        console = Rich(highlight=False)
        console.print(render(found, str(run), console.width))
    return FAILED if found["state"] in _GONE else DONE


def top(run: Path, *, as_json: bool) -> int:
    """Show the same live, with the curves of the stage at work, until the run ends or Ctrl-C."""
    console, found = Rich(highlight=False), read(run)
    live = None if as_json else Live(console=console, screen=True, auto_refresh=False)
    with live or nullcontext():
        while True:
            if live is None:
                sys.stdout.write(json.dumps(found) + "\n")
                sys.stdout.flush()
            else:
                live.update(screen(found, str(run), console.width), refresh=True)
            if found["state"] not in _GOES_ON:
                break
            time.sleep(INTERVAL_S / 2)
            found = read(run)
    if live is not None:
        console.print(screen(found, str(run), console.width))
    return FAILED if found["state"] in _GONE else DONE
