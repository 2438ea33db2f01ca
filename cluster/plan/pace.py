"""What processes reach of their device's peak: stated for GPUs and described machines, measured on this one's cores."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from cluster.config.schema import Config
from cluster.plan.estimates import Rates
from cluster.plan.hardware import MEASURED, PRODUCT, Machine, best_seconds, matrix_product
from cluster.plan.roofline import Pace
from cluster.plan.shapes import Shape
from cluster.runtime.resources import Process

_TOKENS, _ROWS, _SEQUENCE = 1024, 32, 128  # of a pass, of a decoding step; tokens of a sequence in a pass
_SECONDS = 0.2  # of each measurement
_MOST = 2e10  # operations of a pass that is measured; of a large layer fewer tokens are taken
DEEPSPEED = 1 / 0.68 - 1
"""What it adds: it had 0.68 of a bare loop's rate with 27 million parameters, bfloat16, ZeRO-1 and 2, on two cores."""
CPU_FORWARD, CPU_TRAINING, CPU_DECODE, CPU_READ = 0.7, 0.6, 0.4, 0.7
"""Shares of the peak of cores that are not here to be measured: those of two cores of an AMD EPYC with avx512_bf16."""
ENGINE_LAYER, ENGINE_SEQUENCE, ENGINE_WORD = 9e-4, 3e-4, 1.2e-8
"""Seconds of vLLM's step on a CPU beside its products: for each layer, for each sequence, and of this for each word of
the vocabulary. From models of 27 and 135 million parameters, 1 to 64 sequences, eager, on two cores of that EPYC."""
GPU_STEP, GPU_LAYER, GPU_SEQUENCE = 2e-3, 3e-4, 2e-5
"""Seconds of a decoding step on a GPU beside its computing, of each layer where nothing is compiled, of a sequence.
Guesses of common size."""


def pace_of(config: Config) -> Pace:
    """The rates of every process of a configuration."""

    def pace(shape: Shape, process: Process, machine: Machine, wide: bool) -> Rates:
        if machine.gpus:
            return _gpu(config, shape)
        if machine.device.source != MEASURED:
            return _cpu(shape, CPU_FORWARD, CPU_TRAINING, CPU_DECODE, "as measured on an AMD EPYC")
        widths = (shape.hidden, shape.inner, shape.heads, shape.kv_heads, shape.head_dim, shape.gated)
        forward, training, decode = _shares(widths, wide)
        return _cpu(shape, forward, training, decode, "a layer of the model's widths, timed here")

    return pace


def _cpu(shape: Shape, forward: float, training: float, decode: float, source: str) -> Rates:
    return Rates(
        forward=forward,
        training=training,
        sharding=DEEPSPEED,
        decode=decode,
        read=CPU_READ,
        step=ENGINE_LAYER * shape.layers,
        sequence=ENGINE_SEQUENCE + ENGINE_WORD * shape.vocabulary,
        source=source,
    )


def _gpu(config: Config, shape: Shape) -> Rates:
    share, eager = config.plan.efficiency, config.generator.enforce_eager
    return Rates(
        forward=share,
        training=share,
        sharding=0.0,  # plan.efficiency is of training with it
        decode=share,
        read=share,
        step=GPU_STEP + (GPU_LAYER * shape.layers if eager else 0),
        sequence=GPU_SEQUENCE,
        source=f"plan.efficiency = {share:g} of the data sheet",
    )


@lru_cache(maxsize=32)
def _shares(widths: tuple[int, int, int, int, int, bool], wide: bool) -> tuple[float, float, float]:
    """Shares of the peak that a layer of these widths has: forward, forward and backward, and with few rows.

    On one thread, as several would wait for each other where something else runs; the peak of several is measured.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        peak = 2 * PRODUCT**3 / best_seconds(matrix_product(), _SECONDS, 1) / (2 if wide else 1)
        block = _Block(*widths).to(torch.float32 if wide else torch.bfloat16)
        size = sum(parameter.numel() for parameter in block.parameters())
        tokens = max(_ROWS, min(_TOKENS, int(_MOST / (2 * size))))
        shape = (max(1, tokens // _SEQUENCE), min(tokens, _SEQUENCE), widths[0])
        states = torch.randn(shape, dtype=block.up.weight.dtype)
        row = torch.randn(_ROWS, 1, widths[0], dtype=states.dtype)
        count = shape[0] * shape[1]
        with torch.no_grad():
            forward = best_seconds(lambda: block(states), _SECONDS, 1)
            decode = best_seconds(lambda: block(row), _SECONDS, 1)
        states.requires_grad_()
        training = best_seconds(lambda: block(states).sum().backward(), _SECONDS, 1)
    finally:
        torch.set_num_threads(before)
    rates = 2 * size * count / forward, 6 * size * count / training, 2 * size * _ROWS / decode
    return rates[0] / peak, rates[1] / peak, rates[2] / peak


class _Block(nn.Module):
    """A transformer layer of given widths, whose weights mean nothing: it is timed."""

    def __init__(self, hidden: int, inner: int, heads: int, kv_heads: int, head_dim: int, gated: bool) -> None:
        super().__init__()
        self.heads = (heads, kv_heads, kv_heads)
        self.head_dim = head_dim
        self.gated = gated
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2))
        self.attention = nn.Linear(hidden, sum(self.heads) * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, hidden, bias=False)
        self.up = nn.Linear(hidden, inner * (2 if gated else 1), bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]"""
        batch, tokens, _ = states.shape
        parts = self.attention(self.norms[0](states)).split([n * self.head_dim for n in self.heads], dim=-1)
        query, key, value = (part.view(batch, tokens, -1, self.head_dim).transpose(1, 2) for part in parts)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        states = states + self.out(seen.transpose(1, 2).reshape(batch, tokens, -1))
        wide = self.up(self.norms[1](states))
        if self.gated:
            gate, other = wide.chunk(2, dim=-1)
            return states + self.down(nn.functional.silu(gate) * other)
        return states + self.down(nn.functional.gelu(wide))
