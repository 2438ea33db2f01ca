"""What padding costs: tokens computed beside tokens that count, and an iteration on packed and padded sequences.

.venv/bin/python -m benchmarks.padding      # the first of them, for 1 to 64 ranks: seconds, no model
"""

import random
import statistics
import time
from pathlib import Path

import torch

from actors.trajectory import Trajectory
from learner.config import NetworkConfig, OptimizerConfig
from learner.data.batch import collate, microbatches
from learner.worker.ppo_steps import PPOStep, Targets
from learner.worker.worker import LearnerWorker
from reward_server.address import free_port
from tests.tiny_batches import trajectory

BUDGET, REPEATS, RANKS = 4096, 3, (1, 2, 4, 8)


def log_normal(count: int, mean: float, spread: float) -> list[int]:
    """Lengths as those of chat (spread 0.7), always the same."""
    numbers = random.Random(0)
    return [max(8, round(mean * numbers.lognormvariate(-(spread**2) / 2, spread))) for _ in range(count)]


def spent(lengths: list[int], budget: int, ranks: int, padded: bool = False) -> int:
    """Tokens of time: steps are collective, so that all ranks take as long as the one with most."""
    split = microbatches(lengths, budget, ranks, padded=padded)

    def tokens(rows: list[int]) -> int:
        return len(rows) * max((lengths[i] for i in rows), default=0) if padded else sum(lengths[i] for i in rows)

    return ranks * sum(max(tokens(rank[step]) for rank in split) for step in range(len(split[0])))


def table() -> list[tuple[str, int, float, float, float]]:
    """(lengths, ranks, useful by spent, the most that balance allows, useful by padded), as the learner cuts them.

    Nobody can have ended before the longest sequence has.
    """
    cases = [("64, mean 512, log-normal, budget 8,192", log_normal(64, 512, 0.7), 8192, (*RANKS, 16))]
    reasoning = [min(length, 32_768) for length in log_normal(1024, 6000, 1.0)]
    cases += [("1,024, mean 6,000, to 32,768, budget 32,768", reasoning, 32_768, (64,))]
    return [
        (
            name,
            count,
            sum(lengths) / spent(lengths, budget, count),
            sum(lengths) / count / max(sum(lengths) / count, max(lengths)),
            sum(lengths) / spent(lengths, budget, count, padded=True),
        )
        for name, lengths, budget, ranks in cases
        for count in ranks
    ]


def measure(folder: Path) -> dict[str, float]:
    """Tokens that count and are computed, of a batch for up to 8 ranks; seconds of an iteration packed and padded."""
    lengths, shared = log_normal(32, 128, 0.7), log_normal(64, 512, 0.7)
    packed, padded = seconds(folder, lengths)
    return {
        "useful": float(sum(shared)),
        "spent": float(max(spent(shared, 8192, ranks) for ranks in RANKS)),
        "packed": packed,
        "padded": padded,
        "padding": spent(lengths, BUDGET, 1, padded=True) / sum(lengths),
    }


def seconds(folder: Path, lengths: list[int], repeats: int = REPEATS) -> tuple[float, float]:
    """Median seconds of evaluate and update of one batch, packed and padded in turns."""
    worker = LearnerWorker(0, 1, torch.get_num_threads())
    worker.start("127.0.0.1", free_port("127.0.0.1"), 60.0)
    network, optimizer = NetworkConfig(), OptimizerConfig(lr=1e-6)
    worker.load("policy", "policy", folder / "policy", network, optimizer)
    worker.load("reference", "policy", folder / "policy", network)
    worker.load("critic", "value", folder / "reward", network, optimizer)
    batch = [trajectory(length // 2, length - length // 2, i, 0.5) for i, length in enumerate(lengths)]
    found: dict[str, list[float]] = {"sdpa_by_sequence": [], "sdpa": []}
    for repeat in range(-1, repeats):
        for attention, taken in found.items():
            for name in ("policy", "reference", "critic"):
                worker.networks.module(name).model.set_attn_implementation(attention)
            began = time.monotonic()
            iteration(worker, batch)
            if repeat >= 0:
                taken.append(time.monotonic() - began)
    packed, padded = (statistics.median(taken) for taken in found.values())
    return packed, padded


def iteration(worker: LearnerWorker, trajectories: list[Trajectory]) -> None:
    """What the learner does in one iteration."""
    batch, rows = collate(trajectories, pad_id=0), [list(range(len(trajectories)))]
    before = worker.evaluate(batch, rows, BUDGET, 1.0)
    targets = Targets(evaluation=before, advantages=batch.mask.float(), returns=before.values, weights=None)
    step = PPOStep(
        clip=0.2,
        value_clip=0.2,
        pretraining_coef=0.0,
        temperature=1.0,
        max_tokens=BUDGET,
        pretraining_max_tokens=BUDGET,
        pretraining_normaliser="tokens",
        policy_lr=1e-6,
        critic_lr=1e-6,
    )
    worker.update(batch, targets, rows, [[]], step)


def main() -> None:
    """Print the table."""
    for name, ranks, useful, most, padded in table():
        print(f"{name}: {ranks:3} ranks, useful/spent {useful:.3f} (balance allows {most:.3f}), padded {padded:.3f}")


if __name__ == "__main__":
    main()
