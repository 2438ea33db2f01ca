"""From scores and log-probs to advantages: masked statistics, whitening, penalised rewards and GAE.

Everything here is `[B, T]` over response tokens, right padded, with a mask that is True on the first `L_b` tokens of
row b (the EOS included). What lies in the padding is never read, so it may be anything, NaN included.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from learner.maths.kl import k1


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean of `x` where `mask` is True; exactly 0 when it is True nowhere."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Sum of `x` where `mask` is True. Selects instead of multiplying, for NaN * 0 is NaN."""
    return torch.where(mask, x, 0.0).sum()


def whiten(x: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], shift_mean: bool = True) -> Float[Tensor, "b t"]:
    """`(x - mean) / sqrt(var + 1e-8)` with the population variance over the mask, zero elsewhere.

    `shift_mean=False` adds the mean back (lm-human-preferences whitens rewards so). Statistics are taken in
    float64: a constant `x` then gives 0 and not its own rounding error blown up by the tiny denominator.
    Pass the whole batch, not a rank's share of it: the result depends on every token.
    """
    exact = x.double()
    mean = masked_mean(exact, mask)
    centred = exact - mean
    whitened = centred * torch.rsqrt(masked_mean(centred.square(), mask) + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0).to(x.dtype)


def penalised_rewards(
    logprobs: Float[Tensor, "b t"],
    ref_logprobs: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    score: Float[Tensor, " b"],
    coef: float,
) -> Float[Tensor, "b t"]:
    """`r_t = -coef * (logprobs - ref_logprobs)`, plus the score at the last token (whose KL term stays).

    InstructGPT eq. 2 read per token, as in Ziegler et al. 2019. A row without tokens has no last one: it stays zero.
    """
    has_next = torch.nn.functional.pad(mask[:, 1:], (0, 1), value=False)
    is_last = mask & ~has_next
    penalty = torch.where(mask, -coef * k1(logprobs, ref_logprobs), 0.0)
    return penalty + torch.where(is_last, score[:, None], 0.0)


def gae(
    rewards: Float[Tensor, "b t"],
    values: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    discount: float,
    lam: float,
) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t"]]:
    """Generalised advantage estimates and returns `advantages + values` (Schulman et al. 2016, eq. 16).

    `delta_t = r_t + discount * V_{t+1} - V_t`, `A_t = delta_t + discount * lam * A_{t+1}`, with V = 0 after
    the last token: a truncated response is not bootstrapped either. Both results are zero in the padding;
    advantages are not whitened, since the returns must not depend on that.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    columns = []
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantage = delta + discount * lam * advantage
        next_value = values[:, t]
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def explained_variance(values: Float[Tensor, "b t"], returns: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> float:
    """`1 - mean((R - V)^2) / var(R)` over the mask: 1 is a perfect critic.

    0 is no better than the mean of the returns; returns that do not vary give 0 as well.
    """
    exact = returns.double()
    variance = masked_mean((exact - masked_mean(exact, mask)).square(), mask)
    error = masked_mean((exact - values.double()).square(), mask)
    return float(1.0 - error / variance) if variance > 0 else 0.0
