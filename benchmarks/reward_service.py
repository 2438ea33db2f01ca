"""How much of the bare reward model's speed the scoring service keeps, and how long clients wait.

    python benchmarks/reward_service.py [MODEL] [--responses 2048] [--seconds 20] [--threads 2]

MODEL is a reward model's folder; without one, a Llama of 27 million parameters with random weights is made for the
occasion. First the model scores all responses in one call, without a server. Then 1, 8 and 64 clients post 32 responses
at a time to a server in a process of its own, each posting again as soon as it has its answer.
"""

import argparse
import asyncio
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tiny models of the tests are in no package

from reward_server.app import serve
from reward_server.client import RewardClient
from reward_server.encoding import ChatEncoding
from reward_server.model import Normalisation, new_reward_model, set_normalisation
from reward_server.schema import Message, ScoreRequest
from reward_server.scorer import RewardModelSource
from tests.tiny_models import tiny_causal_lm

POST = 32
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


def bare(model: Path, count: int, threads: int) -> float:
    """Responses a second of the model itself, all in one call."""
    torch.set_num_threads(threads)
    source = RewardModelSource(model, "bfloat16")
    source.load()
    source.score(requests(64, seed=1))  # warm up
    started = time.perf_counter()
    source.score(requests(count, seed=0))
    return count / (time.perf_counter() - started)


def server(pipe: Connection, model: Path, threads: int) -> None:
    """Serve until told to stop."""
    torch.set_num_threads(threads)
    source = RewardModelSource(model, "bfloat16")
    source.load()
    running = serve(source)
    pipe.send(running.url)
    pipe.recv()
    running.close()


async def load(url: str, clients: int, seconds: float) -> tuple[float, list[float]]:
    """(responses a second, seconds of each post) with so many clients at once."""
    end = time.perf_counter() + seconds
    waits: list[float] = []

    async def client(number: int) -> None:
        one = RewardClient(url, retry_s=300)
        post = 0
        while time.perf_counter() < end:
            batch = requests(POST, seed=hash((clients, number, post)) & 0xFFFFFF)
            post += 1
            started = time.perf_counter()
            await one.score(batch)
            waits.append(time.perf_counter() - started)
        await one.close()

    started = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    return len(waits) * POST / (time.perf_counter() - started), sorted(waits)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--responses", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        model = given.model or make_model(Path(name))
        limit = bare(model, given.responses, given.threads)
        print(f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, load before {busy:.2f}")
        print(f"bare model                    {limit:8.1f} responses/s")
        pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=server, args=(theirs, model, given.threads))
        process.start()
        url = pipe.recv()
        for clients in CLIENTS:
            rate, waits = asyncio.run(load(url, clients, given.seconds))
            p50, p99 = (waits[min(int(len(waits) * q), len(waits) - 1)] for q in (0.5, 0.99))
            print(
                f"service, {clients:>2} clients of {POST}     {rate:8.1f} responses/s  {rate / limit:5.2f} of bare  "
                f"p50 {p50:6.2f} s  p99 {p99:6.2f} s"
            )
        pipe.send("stop")
        process.join(30)


if __name__ == "__main__":
    main()
