"""Learning rates as functions of the step, and the moving average of the weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def warmup(peak: float, iteration: int, warm_iterations: int) -> float:
    """Linear from a tenth of `peak` at iteration 0 to all of it at `warm_iterations`, then constant.

    The ramp of InstructGPT's policy (C.4), counted in PPO iterations, not minibatches. `warm_iterations=0` is
    the constant schedule.
    """
    if iteration >= warm_iterations:
        return peak
    return peak * (0.1 + 0.9 * iteration / warm_iterations)


def cosine_to_tenth(peak: float, step: int, steps: int) -> float:
    """Half a cosine from `peak` at step 0 to a tenth of it at `steps`, constant after (InstructGPT C.1)."""
    assert steps > 0, f"a cosine schedule over {steps} steps"
    return peak * (0.1 + 0.45 * (1.0 + math.cos(math.pi * min(step, steps) / steps)))


def tf1_eps(eps: float, beta2: float, step: int) -> float:
    """The eps with which PyTorch's Adam takes step `step` (from 1) as TensorFlow 1's does.

    `m / (sqrt(v) + eps)`, corrected afterwards, is `m / (sqrt(v_corrected) + eps / sqrt(1 - beta2^step))`: at first a
    larger eps, and so smaller steps.
    """
    return eps / math.sqrt(1.0 - beta2**step)


@torch.no_grad()
def ema_update(averages: Iterable[Tensor], parameters: Iterable[Tensor], decay: float) -> None:
    """`average <- decay * average + (1 - decay) * parameter`, in place, pair by pair (InstructGPT: 0.992).

    Averages must be float32 or wider: a step of 0.008 of a small difference is rounded away in bfloat16.
    Parameters may have any dtype and device; they are moved to their average's.
    """
    for average, parameter in zip(averages, parameters, strict=True):
        assert average.dtype in (torch.float32, torch.float64), f"average kept in {average.dtype}"
        average.lerp_(parameter.to(average), 1.0 - decay)
