"""What padding costs: tokens computed beside tokens that count, and a learner's pass over packed and padded sequences.

    .venv/bin/python benchmarks/padding.py

The table is arithmetic. The seconds want the machine to themselves: policy and critic of 27 million parameters (Qwen2's
shape, bfloat16) read and train on the same 32 sequences, packed and padded in turns, five times.
"""

import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from actors.trajectory import Trajectory
from learner.config import NetworkConfig, OptimizerConfig
from learner.data.batch import collate, microbatches
from learner.worker.ppo_steps import PPOStep, Targets
from learner.worker.worker import LearnerWorker
from reward_server.address import free_port
from reward_server.encoding import ChatEncoding
from reward_server.model import Normalisation, new_reward_model, set_normalisation
from tests.tiny_batches import trajectory
from tests.tiny_models import save_reward_model, tiny_tokenizer

BUDGET, REPEATS = 4096, 5


def log_normal(count: int, mean: float, spread: float) -> list[int]:
    """Lengths as those of chat (spread 0.7) and of reasoning (1.0), always the same."""
    numbers = random.Random(0)
    return [max(8, round(mean * numbers.lognormvariate(-(spread**2) / 2, spread))) for _ in range(count)]


def spent(lengths: list[int], budget: int, ranks: int) -> int:
    """Tokens of time: steps are collective, so that all ranks take as long as the one with most."""
    split = microbatches(lengths, budget, ranks)
    return ranks * sum(max(sum(lengths[i] for i in rank[step]) for rank in split) for step in range(len(split[0])))


def padded(lengths: list[int], budget: int, ranks: int) -> int:
    """The same where every micro-batch is a rectangle of neighbours in length."""
    longest_first = sorted(lengths, reverse=True)
    groups: list[int] = []
    while longest_first:
        size = max(1, budget // longest_first[0])
        groups.append(longest_first[0] * len(longest_first[:size]))
        del longest_first[:size]
    return ranks * sum(groups[::ranks])


def main() -> None:
    """Print the table, then the seconds."""
    print("sequences                        ranks   useful/spent   what the longest allows   in rectangles")
    chat, reasoning = log_normal(64, 512, 0.7), log_normal(1024, 2048, 1.0)
    rows = [("64 of 512 tokens, budget 8,192", chat, 8192, ranks) for ranks in (1, 2, 4, 8, 16)]
    rows.append(("1,024 of 2,048, budget 32,768", reasoning, 32768, 64))
    for name, lengths, budget, ranks in rows:
        useful = sum(lengths)
        allowed = useful / max(useful, ranks * max(lengths))
        figures = useful / spent(lengths, budget, ranks), allowed, useful / padded(lengths, budget, ranks)
        print(f"{name:32} {ranks:5}   {figures[0]:12.2f}   {figures[1]:23.2f}   {figures[2]:13.2f}")
    with tempfile.TemporaryDirectory() as folder:
        seconds(Path(folder))


def seconds(folder: Path) -> None:
    """Print how long evaluate and update of one batch take, packed and padded."""
    worker = LearnerWorker(0, 1, torch.get_num_threads())
    worker.start("127.0.0.1", free_port("127.0.0.1"), 60.0)
    save_models(folder)
    network, optimizer = NetworkConfig(), OptimizerConfig(lr=1e-6)
    worker.load("policy", "policy", folder / "policy", network, optimizer)
    worker.load("reference", "policy", folder / "policy", network)
    worker.load("critic", "value", folder / "reward", network, optimizer)
    lengths = log_normal(32, 128, 0.7)
    found: dict[str, list[float]] = {"sdpa_by_sequence": [], "sdpa": []}
    for repeat in range(-1, REPEATS):
        for attention, taken in found.items():
            for name in ("policy", "reference", "critic"):
                worker.networks.module(name).model.set_attn_implementation(attention)
            began = time.monotonic()
            iteration(
                worker, [trajectory(length // 2, length - length // 2, i, 0.5) for i, length in enumerate(lengths)]
            )
            if repeat >= 0:
                taken.append(time.monotonic() - began)
    for label, taken in zip(("packed", "padded"), found.values(), strict=True):
        spread = f"{min(taken):.2f} to {max(taken):.2f}"
        print(f"{label}: {statistics.median(taken):.2f} s for {sum(lengths)} tokens ({spread})")
    packed, rectangles = (statistics.median(taken) for taken in found.values())
    print(f"packed is {rectangles / packed:.2f} times as fast, on {torch.get_num_threads()} threads")


def save_models(folder: Path) -> None:
    """A policy and a reward model of Qwen2's shape, with random weights."""
    tiny_tokenizer(folder / "policy")
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True}
    config = Qwen2Config(vocab_size=8192, num_key_value_heads=2, max_position_embeddings=4096, **shape, **tokens)
    Qwen2ForCausalLM(config).save_pretrained(folder / "policy")
    reward = new_reward_model(folder / "policy", torch.float32, 0)
    set_normalisation(reward, Normalisation(gain=1.0, bias=0.0))
    save_reward_model(reward, ChatEncoding.load(folder / "policy"), folder / "reward")


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


if __name__ == "__main__":
    main()
