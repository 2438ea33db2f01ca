"""What a shared trunk saves: a PPO iteration of the learner with frozen first layers, which are computed once or not.

    taskset -c 0 .venv/bin/python -m benchmarks.trunk

Policy, reference and critic of SmolLM2-135M's shape (random weights, bfloat16) with LoRA on the last 12 of 30 layers,
and the quickstart's batch: 64 sequences of 20 + 13 tokens in two minibatches, with its pretraining text. CPU time of
one thread, with and without in turns.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from learner.config import NetworkConfig, OptimizerConfig
from learner.data.batch import collate, minibatches
from learner.worker.ppo_steps import PPOStep, Targets
from learner.worker.worker import LearnerWorker
from reward_server.address import free_port
from reward_server.encoding import ChatEncoding
from reward_server.model import Normalisation, new_reward_model, set_normalisation
from tests.tiny_batches import example, trajectory
from tests.tiny_models import save_reward_model, tiny_tokenizer

REPEATS = 3
STEP = PPOStep(
    clip=0.2,
    value_clip=0.2,
    pretraining_coef=1.0,
    temperature=0.7,
    max_tokens=1536,
    pretraining_max_tokens=1536,
    pretraining_normaliser="tokens",
    policy_lr=1e-3,
    critic_lr=1e-3,
)


def main() -> None:
    """Print the median seconds of evaluate and update, each way."""
    torch.set_num_threads(1)
    worker = LearnerWorker(0, 1, 1)
    worker.start("127.0.0.1", free_port("127.0.0.1"), 60.0)
    network, optimizer = NetworkConfig(lora_rank=16, last_layers=12), OptimizerConfig(lr=1e-3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_models(folder)
        worker.load("policy", "policy", folder / "policy", network, optimizer, 0.992)
        worker.load("reference", "policy", folder / "policy", network)
        worker.load("critic", "value", folder / "reward", network, optimizer)
    found, taken = (
        worker.networks.trunks.trunks,
        {True: list[tuple[float, float]](), False: list[tuple[float, float]]()},
    )
    for repeat in range(-1, REPEATS):
        for shared, times in taken.items():
            worker.networks.trunks.trunks = found if shared else {}
            if repeat >= 0:
                times.append(iteration(worker))
            else:
                iteration(worker)
    for shared, times in taken.items():
        for name, seconds in zip(("evaluate", "update"), zip(*times, strict=True), strict=True):
            spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
            print(f"{'shared' if shared else 'alone'} {name}: {statistics.median(seconds):.2f} s ({spread})")


def save_models(folder: Path) -> None:
    """A policy and a reward model whose trunk is the same."""
    tiny_tokenizer(folder / "policy")
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=49_152, num_key_value_heads=3, max_position_embeddings=8192, **shape, **tokens)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "policy")
    reward = new_reward_model(folder / "policy", torch.bfloat16, 0)
    set_normalisation(reward, Normalisation(gain=1.0, bias=0.0))
    save_reward_model(reward, ChatEncoding.load(folder / "policy"), folder / "reward")


def iteration(worker: LearnerWorker) -> tuple[float, float]:
    """CPU seconds of evaluate and of update."""
    batch = collate([trajectory(20, 13, i, 0.5) for i in range(64)], pad_id=0)
    rows, text = minibatches(64, 32, seed=0), [[example(64, 1, i) for i in range(8)]] * 2
    times = [time.process_time()]
    old = worker.evaluate(batch, rows, STEP.max_tokens, STEP.temperature)
    times.append(time.process_time())
    noise = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    targets = Targets(evaluation=old, advantages=noise, returns=old.values + noise, weights=None)
    worker.update(batch, targets, rows, text, STEP)
    times.append(time.process_time())
    return times[1] - times[0], times[2] - times[1]


if __name__ == "__main__":
    main()
