"""Log-probs of chosen tokens straight from hidden states, without ever holding all the logits.

At a vocabulary of 150,000 the logits of 16 sequences of 2,048 tokens are 20 GB in float32; the hidden
states are a hundredth of that. So rows go through the head a chunk at a time, and the backward pass
computes each chunk's logits again instead of keeping them.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def token_logprobs(
    hidden: Float[Tensor, "n d"],
    head_weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    targets: Int[Tensor, " n"],
    temperature: float,
    chunk: int,
    softcap: float | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Log-prob of `targets[i]` and entropy of its distribution, nats, float32 (float64 for such weights).

    Logits are `hidden @ head_weight.T + bias` in the dtype of the weight whatever autocast says, then in
    float32 `softcap * tanh(logits / softcap)` if given (Gemma 2), then divided by `temperature`. Row i of
    `hidden` is the state *before* token i. Gradients reach hidden, weight and bias through the log-probs;
    the entropy is detached. Memory beyond inputs and gradients is a few tensors of `[chunk, v]`.
    """
    assert chunk > 0, f"chunk={chunk}"
    assert temperature > 0, f"temperature={temperature}"
    hidden = hidden.to(head_weight.dtype)
    return _TokenLogprobs.apply(hidden, head_weight, bias, targets, temperature, chunk, softcap)


def _logits(
    hidden: Tensor, head_weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Logits of one chunk of rows and, with a softcap, its slope (the derivative of the cap) at each."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.nn.functional.linear(hidden, head_weight, bias)
    logits = logits.to(_softmax_dtype(head_weight))
    if softcap is None:
        return logits.div_(temperature), None
    saturation = logits.div_(softcap).tanh_()
    slope = 1.0 - saturation.square()
    return saturation.mul_(softcap / temperature), slope


def _softmax_dtype(head_weight: Tensor) -> torch.dtype:
    return torch.promote_types(head_weight.dtype, torch.float32)


class _TokenLogprobs(torch.autograd.Function):
    """Keeps only the inputs and one normaliser a row for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk: int,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(len(hidden), dtype=_softmax_dtype(head_weight))
        normalisers, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits, _ = _logits(hidden[rows], head_weight, bias, temperature, softcap)
            normalisers[rows] = logits.logsumexp(dim=1)
            logprobs[rows] = logits.gather(1, targets[rows, None].long())[:, 0] - normalisers[rows]
            probabilities = (logits - normalisers[rows, None]).exp_()
            entropy[rows] = normalisers[rows] - probabilities.mul_(logits).sum(dim=1)
        ctx.save_for_backward(hidden, head_weight, bias, targets, normalisers)
        ctx.settings = temperature, chunk, softcap
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_logprobs, _ = grad_outputs
        hidden, head_weight, bias, targets, normalisers = ctx.saved_tensors
        temperature, chunk, softcap = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Summed over chunks in float32: bfloat16 would drop the late chunks' small terms.
        wide = _softmax_dtype(head_weight)
        grad_weight = torch.zeros_like(head_weight, dtype=wide) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if wants_bias else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits, slope = _logits(hidden[rows], head_weight, bias, temperature, softcap)
            # d logprob / d logit_j = 1[j = target] - p_j
            scale = grad_logprobs[rows, None] / temperature
            grad_logits = logits.sub_(normalisers[rows, None]).exp_().mul_(-scale)
            grad_logits.scatter_add_(1, targets[rows, None].long(), scale)
            if slope is not None:
                grad_logits.mul_(slope)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            grad_logits = grad_logits.to(head_weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ head_weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[rows]
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(head_weight.dtype),
            None if grad_bias is None else grad_bias.to(head_weight.dtype),
            *(None,) * 4,
        )
