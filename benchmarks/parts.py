"""Sides that need no whole run: padding, log-probs' memory, the control plane, copies, the service, a lost actor."""

import asyncio
import json
import os
import resource
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from actors.config import RolloutConfig
from actors.prompts import PromptStream
from actors.rollout import rollout
from actors.trajectory import Completion
from benchmarks import padding, reward_service
from learner.data.buffer import Buffer
from learner.data.ledger import Ledger
from learner.maths.logprobs import token_logprobs
from tests.fakes import FakeEncoding, FakeGenerator, FakeScorer, prompts

Figures = dict[str, float]
ROWS, VOCABULARY, WIDTH, CHUNK = 2048, 151_936, 512, 256
SAMPLE_S, WAVE = 0.001, 32


def logprobs(chunk: int | None) -> Figures:
    """Bytes at the most beyond the inputs for log-probs of 2,048 tokens and their gradients; None: all at once."""
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(VOCABULARY, (ROWS,))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if chunk is None:
        found = (hidden @ weight.T).float().log_softmax(1).gather(1, targets[:, None])[:, 0]
    else:
        found, _ = token_logprobs(hidden, weight, None, targets, 1.0, chunk)
    found.sum().backward()
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0 - before}


class _Sleeper(FakeGenerator):
    """An engine of one sample a millisecond, whatever is asked of it at the same time."""

    free_at = 0.0

    async def generate(
        self, query_ids: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
    ) -> list[Completion]:
        self.free_at = max(self.free_at, time.monotonic()) + SAMPLE_S * len(seeds)
        await asyncio.sleep(self.free_at - time.monotonic())
        return await super().generate(query_ids, seeds, max_new_tokens, temperature)


def control_plane(workers: int, seconds: float = 5.0) -> Figures:
    """Samples a second into batches from so many fake engines, through the rollout and the buffer."""

    async def run() -> float:
        stream = PromptStream(prompts(26), seed=0)
        batch = WAVE * workers
        buffer = Buffer(batch, 1, 1, ledger=Ledger(None))
        config, leave, taken = RolloutConfig(prompts_per_wave=WAVE, max_new_tokens=8), asyncio.Event(), 0
        engines = [_Sleeper(f"fake-{index}") for index in range(workers)]
        tasks = [
            asyncio.create_task(rollout(engine, FakeScorer(), stream, buffer, FakeEncoding(), config, 0, leave))
            for engine in engines
        ]
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            taken += len(await buffer.take(60.0))
            buffer.advance()
            for engine in engines:
                engine.version = buffer.version
        rate = taken / (time.monotonic() - started)
        buffer.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        return rate

    return {"samples_s": asyncio.run(run())}


def copies(folder: Path) -> Figures:
    """GB/s at which main memory is copied, in pieces of the policy's size."""
    size = sum(file.stat().st_size for file in (folder / "policy").glob("*.safetensors")) // 2  # of bfloat16
    source, target, seconds = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8), []
    for _ in range(20):
        began = time.monotonic()
        target.copy_(source)
        seconds.append(time.monotonic() - began)
    return {"gb_s": size / statistics.median(seconds) / 1e9}


def service(folder: Path) -> Figures:
    """Responses a second of the bare reward model, and of the service with 8 clients that post 8 each."""
    threads = len(os.sched_getaffinity(0))
    limit, _ = reward_service.bare(folder / "reward", 512, 8, threads)
    with reward_service.served(folder / "reward", folder / f"service-{os.getpid()}", threads, 1) as url:
        asyncio.run(reward_service.load(url, 8, 8, 3.0))
        rate, _ = asyncio.run(reward_service.load(url, 8, 8, 10.0))
    return {"bare": limit, "served": rate}


def kill_actor(process: subprocess.Popen[bytes], run: Path, deadline_s: float) -> Figures:
    """SIGKILL the actor when three steps are done; seconds until its replacement has sampled a response."""
    end = time.time() + deadline_s

    def until(found: Callable[[], float | None], what: str) -> float:
        while (answer := found()) is None:
            if time.time() > end or process.poll() is not None:
                raise RuntimeError(f"{what}: not within {deadline_s:.0f} s; see {run}")
            time.sleep(0.05)
        return answer

    def rows(name: str) -> Iterator[dict]:
        text = (run / name).read_text() if (run / name).exists() else ""
        return (json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n"))

    steps = lambda: next((1.0 for row in rows("metrics.jsonl") if row["step"] >= 3), None)  # noqa: E731
    until(steps, "three steps")
    status = json.loads((run / "status.json").read_text())
    actor = next(one for one in status["processes"] if one["name"] == "generator-0")
    killed = time.time()
    os.kill(actor["vitals"]["pid"], signal.SIGKILL)
    ledger = lambda: (row["time"] for row in rows("ledger-ppo.jsonl") if row["state"] == "generated")  # noqa: E731
    # what the dead actor had handed over is noted in that second, and no engine starts in one
    sampled = until(lambda: next((at for at in ledger() if at > killed + 1.0), None), "a response of the replacement")
    return {"recovery": sampled - killed}


SIDES: dict[str, Callable[[Path], Figures]] = {
    "padding": padding.measure,
    "logprobs": lambda folder: logprobs(CHUNK),
    "logprobs_whole": lambda folder: logprobs(None),
    "control_1": lambda folder: control_plane(1),
    "control_64": lambda folder: control_plane(64),
    "copies": copies,
    "service": service,
}
