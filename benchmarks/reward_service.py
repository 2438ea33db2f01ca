"""How much of the bare reward model's speed the scoring service keeps, and how long clients wait.

    python benchmarks/reward_service.py [MODEL] [--responses 512] [--seconds 30] [--post 32] [--replicas 1]

MODEL is a reward model's folder; without one, a Llama of 27 million parameters with random weights is made for the
occasion. First the model scores responses without a server: all in one call, and a post in a call. Then 1, 8 and 64
clients post so many responses at a time to `rayward serve`, each posting again as soon as it has its answer. With
replicas, the threads are shared out among them, and Ray Serve spreads the posts.

`of bare` is the rate beside that of all in one call. `computing` is the share of the time in which the source computed,
summed over copies (/metrics says it). `turns` is p99 in units of the time that the bare model takes for one post of
every client, which is what a client waits at least when all of them wait.
"""

import argparse
import asyncio
import contextlib
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import httpx
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tiny models of the tests are in no package

from reward_server.client import RewardClient
from reward_server.encoding import ChatEncoding
from reward_server.model import Normalisation, new_reward_model, set_normalisation
from reward_server.schema import Message, ScoreRequest
from reward_server.scorer import RewardModelSource
from tests.tiny_models import tiny_causal_lm

CLIENTS = (1, 8, 64)


def requests(count: int, seed: int) -> list[ScoreRequest]:
    """Prompts of 16 and responses of 16 to 64 short words, the same for one seed."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        count = draw.randint(low, high)
        return " ".join(draw.choices(("tide", "river", "is", "the", "of", "moon", "and"), k=count))

    return [
        ScoreRequest(
            id=f"{seed}-{n}", prompt=(Message(role="user", content=words(16, 16)),), response=words(16, 64), ended=True
        )
        for n in range(count)
    ]


def make_model(folder: Path) -> Path:
    """A random reward model of 27 million parameters with a byte-level tokenizer."""
    tiny_causal_lm(folder / "base", hidden=512, layers=8, max_positions=1024)
    model = new_reward_model(folder / "base", torch.bfloat16, seed=0)
    set_normalisation(model, Normalisation(gain=1.0, bias=0.0))
    model.save_pretrained(str(folder / "reward"))
    ChatEncoding.load(folder / "base").tokenizer.save_pretrained(str(folder / "reward"))
    return folder / "reward"


def bare(model: Path, count: int, post: int, threads: int) -> tuple[float, float]:
    """Responses a second of the model itself: all in one call, and in calls of the size of a post."""
    torch.set_num_threads(threads)
    source = RewardModelSource(model, "bfloat16")
    source.load()
    source.score(requests(post, seed=1))  # warm up
    every = requests(count, seed=0)
    started = time.perf_counter()
    source.score(every)
    middle = time.perf_counter()
    for first in range(0, count, post):
        source.score(requests(post, seed=first + 2))
    return count / (middle - started), count / (time.perf_counter() - middle)


@contextlib.contextmanager
def served(model: Path, run: Path, threads: int, replicas: int) -> Iterator[str]:
    """The URL of `rayward serve` in processes of its own."""
    settings = {
        "scoring.parts": f'[{{name = "model", target = "{model}"}}]',
        "serve.port": "0",
        "serve.replicas": str(replicas),
        "serve.threads": str(max(1, threads // replicas)),
        "tracking.mode": "disabled",
    }
    command = [sys.executable, "-m", "cluster.cli.main", "serve", "--run", str(run)]
    command += [word for key, value in settings.items() for word in (f"--{key}", value)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[1])
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"scores are served at (\S+)/score", line):
                yield found[1]
                break
        else:
            raise RuntimeError(f"the service did not start; see {run}/logs")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def computing(url: str, replicas: int) -> float:
    """Seconds that all copies have computed; each scrape is answered by one of them."""
    seconds: dict[str, float] = {}
    while len(seconds) < replicas:
        page = httpx.get(f"{url}/metrics").text
        seconds |= {
            copy: float(number)
            for copy, number in re.findall(r'computing_seconds_total\{replica="([^"]+)"\} (\S+)', page)
        }
    return sum(seconds.values())


async def load(url: str, clients: int, size: int, seconds: float) -> tuple[float, list[float]]:
    """(responses a second, seconds of each post) with so many clients at once."""
    texts = [requests(size, seed) for seed in range(64)]  # made before, since the clients have the same cores
    waits: list[float] = []

    async def client(number: int, end: float) -> None:
        one, post = RewardClient(url, retry_s=300), 0
        while time.perf_counter() < end:
            name = f"{clients}-{number}-{post}"
            batch = [
                r.model_copy(update={"id": f"{name}-{n}"}) for n, r in enumerate(texts[(number + post) % len(texts)])
            ]
            started = time.perf_counter()
            await one.score(batch)
            waits.append(time.perf_counter() - started)
            post += 1
        await one.close()

    started = time.perf_counter()
    await asyncio.gather(*(client(number, started + seconds) for number in range(clients)))
    return len(waits) * size / (time.perf_counter() - started), sorted(waits)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--responses", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--post", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--replicas", type=int, default=1)
    given = parser.parse_args()
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        model = given.model or make_model(Path(name))
        limit, small = bare(model, given.responses, given.post, given.threads)
        print(f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, load before {busy:.2f}")
        print(f"bare model, {given.responses} at once: {limit:.1f} responses/s; {given.post} at once: {small:.1f}")
        with served(model, Path(name) / "run", given.threads, given.replicas) as url:
            for clients in CLIENTS:
                before, started = computing(url, given.replicas), time.perf_counter()
                rate, waits = asyncio.run(load(url, clients, given.post, given.seconds))
                share = (computing(url, given.replicas) - before) / (time.perf_counter() - started)
                p50, p99 = (waits[min(int(len(waits) * q), len(waits) - 1)] for q in (0.5, 0.99))
                print(
                    f"{clients:>2} clients of {given.post}  {rate:7.1f} responses/s  {rate / limit:5.2f} of bare  "
                    f"p50 {p50:6.2f} s  p99 {p99:6.2f} s  {p99 * limit / (clients * given.post):5.2f} turns  "
                    f"computing {share:4.2f}"
                )


if __name__ == "__main__":
    main()
