"""How far the policy has moved from the reference: per-token estimators and the adaptive coefficient."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def k1(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`d = log pi - log pi_ref` of sampled tokens: unbiased for KL(pi || ref), nats; the reward's penalty.

    As a reward its score-function gradient is exactly the gradient of the KL; that of k2 and k3 is not.
    """
    return logprobs - ref_logprobs


def k2(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`d^2 / 2`: biased, low variance (Schulman 2020, "Approximating KL divergence"); for logging only."""
    return 0.5 * k1(logprobs, ref_logprobs).square()


def k3(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`exp(-d) - 1 + d`: unbiased and never negative (Schulman 2020); for logging only.

    The exponent is held at 20, so that one absurd token cannot turn a logged mean into infinity.
    """
    d = k1(logprobs, ref_logprobs)
    return torch.expm1((-d).clamp(max=20.0)) + d


def kl_per_response(
    logprobs: Float[Tensor, "b t"], ref_logprobs: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]
) -> Float[Tensor, " b"]:
    """Sum of k1 over each response, nats, unclamped; its mean over responses is the KL that is reported."""
    return torch.where(mask, k1(logprobs, ref_logprobs), 0.0).sum(dim=1)


def adapted_coefficient(coef: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """KL coefficient of the next iteration (Ziegler et al. 2019, section 2.2).

    `coef * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon)`, with `kl` and `target` in nats per response.
    The iteration that measured `kl` must have been rewarded with `coef`, the value from before the call.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * episodes / horizon)
