"""`rayward scale`: a run is asked for another number of generators, and answers, in a file of its directory.

A file needs no port, no token and no address, and can be written wherever the run's directory can be.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator
from json import dumps, loads
from pathlib import Path
from typing import Any

from cluster.fleet.fleet import Fleet
from cluster.tracking.console import Console
from reward_server.preferences.records import write_whole

LOOK_S = 1.0
"""Seconds between two looks at the file."""
ANSWER_S = 20.0
"""Seconds in which a run that is there has answered."""
log = logging.getLogger(__name__)


def scale(run_dir: Path, console: Console, wanted: str, json: bool = False) -> None:
    """Ask the run at work in a directory for another number of generators.

    Raises ValueError with the run's reason when it refuses, TimeoutError when nobody answers.
    """
    if not wanted.isdecimal() or (number := int(wanted)) < 1:
        raise ValueError(f"{wanted!r} generators cannot be asked for: give a number from 1 on")
    file, ticket, end = run_dir / "scale.json", secrets.token_hex(8), time.monotonic() + ANSWER_S
    write_whole(file, dumps({"id": ticket, "generators": number}))
    try:
        while "answer" not in (found := _read(file)) and found.get("id") == ticket and time.monotonic() < end:
            time.sleep(LOOK_S / 5)
        if found.get("id") != ticket:
            raise RuntimeError(f"another request to {run_dir} came in between; ask again")
        if "answer" not in found:
            raise TimeoutError(f"nobody answered within {ANSWER_S:g} s: no run is at work in step 3 in {run_dir}")
    finally:
        if _read(file).get("id") == ticket:
            file.unlink(missing_ok=True)
    if found["refused"]:
        raise ValueError(f"the run in {run_dir} refuses: {found['answer']}")
    console.line(dumps({"generators": number, "answer": found["answer"]}) if json else found["answer"])


@contextlib.asynccontextmanager
async def obeying(fleet: Fleet, run_dir: Path) -> AsyncIterator[None]:
    """Answer requests while the block lasts; one from before it is forgotten."""
    file = run_dir / "scale.json"
    file.unlink(missing_ok=True)
    looking = asyncio.create_task(_look(fleet, file))
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


async def _look(fleet: Fleet, file: Path) -> None:
    while True:
        await asyncio.sleep(LOOK_S)
        request = _read(file)
        if not isinstance(request.get("generators"), int) or "answer" in request:
            continue
        before, wanted = fleet.wanted, request["generators"]
        try:
            fleet.scale(wanted)
        except ValueError as error:
            answer = {"refused": True, "answer": str(error)}
        else:
            how = "newcomers take part from the next version on" if wanted > before else "who leaves finishes its work"
            answer = {"refused": False, "answer": f"from {before} to {wanted} generators; {how}"}
            log.warning("asked for %d generators instead of %d", wanted, before)
        write_whole(file, dumps(request | answer))


def _read(file: Path) -> dict[str, Any]:
    """What is in the file; nothing where there is none, or no request."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(found := loads(file.read_text(encoding="utf-8")), dict):
            return found
    return {}
