"""Many labelers at once on the labeling page, served by a process of its own: how long calls take, and what is lost.

    python benchmarks/label_load.py [--labelers 40] [--seconds 120] [--pause 0.25]

Each labeler takes an item, sends a draft for each of its four ranks, and submits it, with a pause before each call that
is shorter than a person's. A tenth of the changes is sent again, as a browser does that has lost the reply. At the end
the server is killed, and what the log says is held against what labelers were told is saved. Prints a line of JSON:
milliseconds of each kind of call and of the server's processor, rankings acknowledged, and those of them that are lost,
altered or there twice. The labelers' side takes a core of its own.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from reward_server.labeling.config import LabelConfig
from reward_server.labeling.items import Item
from reward_server.labeling.log import FILE, read_events
from reward_server.labeling.page.files import version
from reward_server.labeling.page.server import serve_labeling
from reward_server.labeling.people import People
from reward_server.labeling.project import Project
from reward_server.schema import Message

K = 4
_RESENT = 0.1
_ARRIVAL_S = 2.0


def items(count: int) -> list[Item]:
    """Items of K short outputs."""
    return [
        Item(
            id=f"i{n}",
            prompt=(Message(role="user", content=f"Question {n}?"),),
            responses=tuple(f"Answer {n}.{k}, which is neither long nor short." for k in range(K)),
            ended=(True,) * K,
        )
        for n in range(count)
    ]


def serve(folder: Path, count: int, port: int) -> None:
    """Serve the page until the process is killed."""
    config = LabelConfig(port=port, words_per_minute=0, gold_share=0, repeat_share=0.05, quality=False)
    project = Project(folder, config, items(count), page=version())
    server = serve_labeling(project, People(folder / "people.json"), config, folder / "audit.jsonl")
    print(f"served at {server.url}", flush=True)
    signal.pause()


@contextmanager
def served(folder: Path, count: int, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address and the process of a server, which is killed at the end."""
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(folder), "--items", str(count)]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        found = next(filter(None, (re.search(r"served at (\S+)", line) for line in process.stdout)), None)
        if found is None:
            raise RuntimeError("the server did not start; what it said is above")
        yield found[1], process
    finally:
        process.kill()
        process.wait(10)


@dataclass
class Labeler:
    """One person, who is faster than any."""

    client: httpx.AsyncClient
    draw: random.Random
    pause: float
    """mean seconds before a call"""
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """of each call, by its name"""
    acknowledged: dict[str, list[int]] = field(default_factory=dict)
    """ranks in the order shown, by assignment"""

    async def call(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Post after a pause; the reply. Raises HTTPStatusError for a refusal."""
        await asyncio.sleep(self.draw.uniform(0.5, 1.5) * self.pause)
        for _ in range(1 + (self.draw.random() < _RESENT and "key" in body)):
            started = time.perf_counter()
            answer = await self.client.post(f"/api/{name}", json=body)
            self.seconds[name].append(time.perf_counter() - started)
            answer.raise_for_status()
        return answer.json()

    async def work(self, until: float) -> None:
        """Rank one item after another, from some moment of the first seconds on."""
        await asyncio.sleep(self.draw.uniform(0, _ARRIVAL_S))
        while time.perf_counter() < until:
            assignment = (await self.call("next", {}))["assignment"]
            if assignment is None:
                raise RuntimeError("there were too few items: give more with --items")
            ranks: list[int | None] = [None] * K
            sent = {"assignment": assignment["id"], "version": assignment["version"], "seconds": 1.0}
            for place in range(K):
                ranks[place] = self.draw.randint(1, K)
                body = {**sent, "answer": {"ranks": list(ranks)}, "key": str(uuid.UUID(int=self.draw.getrandbits(128)))}
                sent["version"] = (await self.call("draft", body))["version"]
            body = {**sent, "answer": {"ranks": ranks}, "key": str(uuid.UUID(int=self.draw.getrandbits(128)))}
            await self.call("submit", body)
            self.acknowledged[assignment["id"]] = [rank or 0 for rank in ranks]


async def load(url: str, tokens: list[str], seconds: float, pause: float) -> list[Labeler]:
    """All labelers at work for so many seconds."""
    headers, limits = {"X-Rayward": "1"}, httpx.Limits(max_connections=1)
    labelers = [
        Labeler(httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=30), random.Random(n), pause)
        for n in range(len(tokens))
    ]
    for labeler, token in zip(labelers, tokens, strict=True):
        (await labeler.client.post("/api/session", json={"token": token})).raise_for_status()
    until = time.perf_counter() + seconds
    await asyncio.gather(*(labeler.work(until) for labeler in labelers))
    await asyncio.gather(*(labeler.client.aclose() for labeler in labelers))
    return labelers


def lost(folder: Path, labelers: list[Labeler]) -> dict[str, int]:
    """What the log says of the rankings that were acknowledged."""
    told = {name: ranks for labeler in labelers for name, ranks in labeler.acknowledged.items()}
    events = [event for event in read_events(folder / FILE) if event["kind"] == "submitted"]
    logged = {event["assignment"]: event["answer"]["ranks"] for event in events}
    times = Counter(event["assignment"] for event in events)
    return {
        "rankings": len(told),
        "lost": sum(name not in logged for name in told),
        "altered": sum(logged.get(name, ranks) != ranks for name, ranks in told.items()),
        "twice": sum(count > 1 for count in times.values()),
    }


def measure(count: int, seconds: float, pause: float, how_many_items: int) -> dict[str, Any]:
    """The figures of a load of so many labelers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        people = People(folder / "people.json")
        tokens = [people.invite(f"Labeler {n}")[1] for n in range(count)]
        with served(folder, how_many_items) as (url, process):
            server = psutil.Process(process.pid)
            before = sum(server.cpu_times()[:2])
            labelers = asyncio.run(load(url, tokens, seconds, pause))
            computed = sum(server.cpu_times()[:2]) - before
        waits: dict[str, list[float]] = defaultdict(list)
        for labeler in labelers:
            for call, times in labeler.seconds.items():
                waits[call] += times
        figures = {call: _figures(times) for call, times in sorted(waits.items())}
        every = _figures([one for times in waits.values() for one in times])
        cpu = {"server_cpu_ms": round(1000 * computed / every["calls"], 2)}
        return {"labelers": count, "seconds": seconds, **lost(folder, labelers), "all_ms": every, "ms": figures} | cpu


def _figures(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    at = {name: ordered[min(int(len(ordered) * q), len(ordered) - 1)] for name, q in (("p50", 0.5), ("p99", 0.99))}
    return {"calls": len(times), **{name: round(1000 * value, 1) for name, value in at.items()}}


def main() -> None:
    """Serve, or measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labelers", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--pause", type=float, default=0.25)
    parser.add_argument("--items", type=int, default=6000)
    parser.add_argument("--serve", type=Path)
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    if given.serve:
        return serve(given.serve, given.items, given.port)
    before = round(os.getloadavg()[0], 2)
    print(json.dumps({"load_before": before, **measure(given.labelers, given.seconds, given.pause, given.items)}))


if __name__ == "__main__":
    main()
