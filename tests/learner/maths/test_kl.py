import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.maths.kl import adapted_coefficient, k1, k2, k3, kl_per_response

LOGPROBS = torch.tensor([-1.2, -0.7, -2.3, -0.4, -0.9], dtype=torch.float64)
REF_LOGPROBS = torch.tensor([-1.0, -0.9, -2.0, -0.6, -1.1], dtype=torch.float64)
PI = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REF = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "expected", "total"),
    [
        (k1, [-0.2, 0.2, -0.3, 0.2, 0.2], 0.1),
        (k2, [0.02, 0.02, 0.045, 0.02, 0.02], 0.125),
        (k3, [0.021403, 0.018731, 0.049859, 0.018731, 0.018731], 0.127454),
    ],
)
def test_estimators_token_by_token(estimator, expected: list[float], total: float) -> None:
    estimates = estimator(LOGPROBS, REF_LOGPROBS)
    assert estimates.tolist() == pytest.approx(expected, abs=6e-7)
    assert float(estimates.sum()) == pytest.approx(total, abs=6e-7)


def test_expectations_over_a_known_distribution() -> None:
    """k1 and k3 average to the exact KL of 0.025267 nats, k2 to something near it."""
    expectations = [float((PI * estimator(PI.log(), REF.log())).sum()) for estimator in (k1, k2, k3)]
    assert expectations == pytest.approx([0.025267, 0.024862, 0.025267], abs=6e-7)
    assert k3(PI.log(), REF.log()).tolist() == pytest.approx([0.023144, 0.045651, 0.0], abs=6e-7)


@given(st.floats(-1000.0, 0.0), st.floats(-1000.0, 0.0))
def test_k3_is_finite_and_never_negative(logprob: float, ref_logprob: float) -> None:
    estimate = k3(torch.tensor([logprob]), torch.tensor([ref_logprob]))
    assert bool(estimate >= 0)
    assert bool(estimate.isfinite())


def test_the_kl_of_a_response_ignores_its_padding() -> None:
    logprobs = torch.stack([LOGPROBS, torch.full((5,), float("nan"), dtype=torch.float64)])
    logprobs[1, :2] = torch.tensor([-0.5, -1.5])
    ref = torch.stack([REF_LOGPROBS, torch.tensor([-0.6, -1.1, 0.0, 0.0, 0.0], dtype=torch.float64)])
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    assert kl_per_response(logprobs, ref, mask).tolist() == pytest.approx([0.1, -0.3])


def test_the_adaptive_coefficient_follows_the_kl() -> None:
    """Below target, above it, far above (clipped), on target, far below (clipped)."""
    coef, history = 0.15, []
    for kl in (3.0, 6.5, 12.0, 6.0, 0.0):
        coef = adapted_coefficient(coef, kl, 6.0, 10_000.0, 512)
        history.append(coef)
    expected = [0.148464, 0.149097446, 0.150624204, 0.150624204, 0.149081812]
    assert history == pytest.approx(expected, abs=6e-10)
