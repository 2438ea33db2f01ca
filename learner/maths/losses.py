"""The four losses, each as a SUM beside the sums of its statistics.

Callers add the sums of all micro-batches and ranks and divide by global counts, known before the first backward pass.
So a step never depends on how its batch was cut, and a micro-batch of padding alone adds exactly 0. Statistics are
detached sums under the name of the metric that they become once divided; one called max is a maximum.

Inputs are zeroed outside the mask before any arithmetic: selecting among the results alone would let garbage
in the padding reach the gradient, as 0 * NaN.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from learner.maths.accuracy import ordered_pairs, pair_credit, sum_by_prompt
from learner.maths.advantages import masked_mean, masked_sum
from learner.maths.kl import k1, k3

MAX_LOG_RATIO = 20.0
"""Log-ratios are held within +- this before exp, so that no token yields an infinite ratio."""


def add_sums(parts: Iterable[Mapping[str, float | Tensor]]) -> dict[str, float]:
    """The statistics of all parts as numbers, key by key: their sum, and of what is called max the maximum."""
    total: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            number = float(value)
            total[key] = max(total.get(key, number), number) if key.endswith("/max") else total.get(key, 0.0) + number
    return total


def policy_loss_sum(
    new_logprobs: Float[Tensor, "b t"],
    logprobs: Float[Tensor, "b t"],
    advantages: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    clip: float,
    weights: Float[Tensor, "b t"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Clipped surrogate of PPO (Schulman et al. 2017, eq. 7), summed over tokens, to be minimised.

    `max(-A u, -A clip(u, 1 - clip, 1 + clip))` with `u = exp(new_logprobs - logprobs)`; `logprobs` are those of the
    trainer's policy before the update. `weights` multiply each token's loss (decoupled PPO, Hilton et al. 2021) and
    leave the statistics alone. Divide everything by the number of tokens, those of weight 0 included.
    """
    log_ratio = torch.where(mask, k1(new_logprobs, logprobs), 0.0)
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip, 1.0 + clip)
    per_token = torch.maximum(unclipped, clipped)
    if weights is not None:
        per_token = per_token * torch.where(mask, weights, 0.0).detach()
    stats = {
        "ratio/mean": masked_sum(ratio.detach(), mask),
        "ratio/max": torch.where(mask, ratio.detach(), 0.0).amax() if mask.numel() else ratio.new_zeros(()),
        "policy/clip_fraction": (clipped > unclipped).sum().to(ratio.dtype),
        "policy/approx_kl": 0.5 * log_ratio.detach().square().sum(),
    }
    return per_token.sum(), stats


def importance_weights(
    logprobs: Float[Tensor, "b t"],
    behaviour_logprobs: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    cap: float,
    floor: float | None = None,
) -> tuple[Float[Tensor, "b t"], dict[str, float]]:
    """Truncated importance weights `min(w, cap)`, `w = exp(logprobs - behaviour_logprobs)`, of tokens, and metrics.

    With a `floor` they are masked instead: `w` where `floor <= w <= cap`, else 0 (IcePop). They correct for
    tokens sampled by older weights or by another engine than the trainer's. Zero in the padding and where the
    ratio is not finite. Metrics are over the whole batch passed: mean and maximum of |log-ratio| (nats), k3
    estimate of KL(behaviour || trainer), effective sample size of the raw weights as a share of the tokens
    `(sum w)^2 / (N sum w^2)`, share of tokens beyond the bounds, share that was not finite.
    """
    gap = k1(logprobs, behaviour_logprobs).detach()
    finite = mask & gap.isfinite()
    gap = torch.where(finite, gap, 0.0)
    raw = torch.where(finite, gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), 0.0)
    beyond = (raw > cap) | (raw < (floor or 0.0))
    # In float64, as the square of a weight at the clamp is 2e17.
    wide, tokens = raw.double(), mask.sum()
    effective = wide.sum().square() / (tokens * wide.square().sum())
    metrics = {
        "importance/log_ratio_mean": float(masked_mean(gap.abs(), mask)),
        "importance/log_ratio_max": float(gap.abs().amax()) if gap.numel() else 0.0,
        "importance/k3": float(masked_mean(k3(torch.zeros_like(gap), gap), finite)),
        "importance/effective_share": float(effective) if wide.any() else 0.0,
        "importance/clipped_share": float(masked_mean((finite & beyond).double(), mask)),
        "importance/non_finite_share": float(masked_mean((~finite).double(), mask)),
    }
    return raw.clamp(max=cap) if floor is None else torch.where(beyond, 0.0, raw), metrics


def value_loss_sum(
    new_values: Float[Tensor, "b t"],
    values: Float[Tensor, "b t"],
    returns: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    clip: float | None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Half the larger of the clipped and unclipped squared errors, summed over tokens (Ziegler et al., code).

    `new_values` are held within `clip` of the rollout's `values` in the clipped error; None leaves that error out.
    """
    new_values, values, returns = (torch.where(mask, x, 0.0) for x in (new_values, values, returns))
    clipped = new_values if clip is None else new_values.clamp(values - clip, values + clip)
    error, clipped_error = (new_values - returns).square(), (clipped - returns).square()
    stats = {"value/clip_fraction": (clipped_error > error).sum().to(new_values.dtype)}
    return 0.5 * torch.maximum(error, clipped_error).sum(), stats


def lm_loss_sum(logprobs: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Negative log-likelihood in nats, summed over the tokens of the mask (SFT targets, pretraining text)."""
    return -masked_sum(logprobs, mask)


def kwise_loss(
    scores: Float[Tensor, " m"],
    group: Int[Tensor, " m"],
    ranks: Int[Tensor, " m"],
    normaliser: Literal["pairs", "all"],
    weights: Float[Tensor, " m"] | None = None,
) -> tuple[Float[Tensor, ""], int, dict[str, Tensor]]:
    """Pairwise ranking loss of K completions a prompt (InstructGPT eq. 1): (sum over prompts, prompts, sums).

    A prompt contributes the mean over its ordered pairs of `-log sigmoid(score_winner - score_loser)`; ties
    form no pair. `normaliser="pairs"` divides by the ordered pairs, "all" by K(K-1)/2 however many are
    tied. `group[m]` is the prompt of a completion (all of them must be in this call), a lower rank is
    better. `weights`, the same for all completions of a prompt, multiply what it contributes and leave the statistics
    alone. The second result counts the prompts with a pair; the others contribute nothing. Sums: pairs,
    pairs ordered right (ties in score count half), log loss over pairs, per-prompt accuracy over prompts.
    """
    pairs = ordered_pairs(group, ranks)
    margins = scores[pairs.winners] - scores[pairs.losers]
    pair_losses = softplus(-margins)
    weighted = pair_losses if weights is None else pair_losses * weights[pairs.winners]
    count, completions = pairs.pairs_per_prompt, pairs.completions_per_prompt
    divisor = count if normaliser == "pairs" else completions * (completions - 1) // 2
    loss = (sum_by_prompt(weighted, pairs) / divisor).sum()
    credit = pair_credit(margins)
    stats = {
        "pairs": count.sum().to(scores.dtype),
        "correct": credit.sum(),
        "log_loss": pair_losses.detach().sum(),
        "prompt_accuracy": (sum_by_prompt(credit, pairs) / count).sum(),
    }
    return loss, len(count), stats
