"""What `network.compile` earns and costs: CPU seconds of a pass with and without it, and of the first passes.

    .venv/bin/python benchmarks/compiled.py

One thread on one core, so that others on the machine matter less; plain and compiled take turns on the same rows.
27 million parameters of Qwen2's shape are all trained, of 135 million of Llama's LoRA in the last 12 of 30 layers.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.padding import log_normal
from benchmarks.workload import save_models
from learner.config import NetworkConfig
from learner.worker.networks import Network, load_network

REPEATS = 5
ROWS = (slice(0, 8), slice(8, 24), slice(24, 36), slice(36, 46))  # of sequences of 128 tokens on average
Row = tuple[torch.Tensor, list[int], torch.Tensor, torch.Tensor]


def packed(lengths: list[int]) -> Row:
    """A packed row and the places of the second half of each sequence, which are its response."""
    ids = torch.arange(1, sum(lengths) + 1) * 7919 % 8192
    ends = list(accumulate(lengths))
    places = torch.cat([torch.arange(end - n // 2, end - 1) for end, n in zip(ends, lengths, strict=True)])
    return ids, lengths, places, ids[places + 1]


def read(network: Network, row: Row) -> None:
    """Forward without gradients, as in evaluation."""
    with torch.no_grad():
        network(*row)


def train(network: Network, row: Row) -> None:
    """Forward and backward."""
    network(*row)[0].sum().backward()


def compare(name: str, folder: Path, network: NetworkConfig) -> None:
    """Print the figures of one model."""
    networks = {on: load_network("policy", folder, network.model_copy(update={"compile": on})) for on in (False, True)}
    lengths = log_normal(46, 128, 0.7)
    rows = [packed(lengths[part]) for part in ROWS]
    passes: dict[str, Callable[[Network, Row], None]] = {"forward": read, "forward and backward": train}
    for what, run in passes.items():
        first, taken = {}, {False: [], True: []}
        for on, one in networks.items():
            began = time.monotonic()
            run(one, rows[0])
            first[on] = time.monotonic() - began
        for _ in range(REPEATS):
            for on, one in networks.items():
                began = time.process_time()
                for row in rows:
                    run(one, row)
                taken[on].append(time.process_time() - began)
        plain, compiled = (f"{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in taken.values())
        ratio = statistics.median(c / p for p, c in zip(taken[False], taken[True], strict=True))
        print(
            f"{name}, {what}, {sum(lengths)} tokens: {plain} s plain, {compiled} s compiled, {ratio:.2f} of it; "
            f"first pass {first[False]:.1f} and {first[True]:.1f} s",
            flush=True,
        )


def main() -> None:
    """Both models, with the cache in TORCHINDUCTOR_CACHE_DIR, or else an empty one."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as parent:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{parent}/cache")
        save_models(Path(parent))
        shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
        config = LlamaConfig(vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, **shape)
        LlamaForCausalLM(config).save_pretrained(Path(parent) / "llama")
        compare("27M", Path(parent) / "policy", NetworkConfig())
        compare("135M LoRA", Path(parent) / "llama", NetworkConfig(lora_rank=16, last_layers=12))


if __name__ == "__main__":
    main()
