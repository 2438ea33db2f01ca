import pytest
import torch

from learner.maths.schedules import cosine_to_tenth, ema_update, tf1_eps, warmup


def test_warmup_rises_from_a_tenth() -> None:
    factors = [warmup(1.0, i, 10) for i in (0, 1, 5, 9, 10, 300)]
    assert factors == pytest.approx([0.1, 0.19, 0.55, 0.91, 1.0, 1.0])
    assert warmup(2e-6, 5, 10) == pytest.approx(1.1e-6)


def test_no_warmup_is_a_constant_rate() -> None:
    assert warmup(3e-6, 0, 0) == 3e-6


def test_cosine_falls_to_a_tenth_and_stays() -> None:
    rates = [cosine_to_tenth(9.65e-6, step, 100) for step in (0, 25, 50, 75, 100, 140)]
    expected = [9.65e-6, 8.378111e-6, 5.3075e-6, 2.236889e-6, 9.65e-7, 9.65e-7]
    assert rates == pytest.approx(expected, abs=6e-13)


def test_pytorchs_adam_with_this_eps_takes_tensorflows_steps() -> None:
    """TensorFlow 1: rate * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)."""
    rate, beta1, beta2, eps = 0.1, 0.9, 0.95, 0.01
    parameter = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    adam = torch.optim.Adam([parameter], lr=rate, betas=(beta1, beta2), eps=eps)
    theta, m, v, steps = 1.0, 0.0, 0.0, []
    for t, gradient in enumerate((0.02, -0.01, 0.5, 0.03), start=1):
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        steps.append(rate * (1 - beta2**t) ** 0.5 / (1 - beta1**t) * m / (v**0.5 + eps))
        theta -= steps[-1]
        adam.param_groups[0]["eps"] = tf1_eps(eps, beta2, t)
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        adam.step()
        assert float(parameter.detach()) == pytest.approx(theta, rel=1e-9)
    assert steps[0] < rate * 0.02 / (0.02 + eps) / 2  # less than half of PyTorch's first step


def test_the_average_follows_the_weights_slowly() -> None:
    average = [torch.ones((), dtype=torch.float64)]
    for theta, expected in ((2.0, 1.008), (3.0, 1.023936), (4.0, 1.047745)):
        ema_update(average, [torch.tensor(theta)], 0.992)
        assert float(average[0]) == pytest.approx(expected, abs=6e-7)


def test_what_remains_of_the_initial_weights_after_500_steps() -> None:
    average, zero = [torch.ones(())], [torch.zeros(())]
    for _ in range(500):
        ema_update(average, zero, 0.992)
    assert float(average[0]) == pytest.approx(0.018023, abs=1e-6)


def test_the_average_stays_in_float32_beside_bfloat16_weights_that_require_grad() -> None:
    average = torch.ones(3)
    address = average.data_ptr()
    parameter = torch.nn.Parameter(torch.full((3,), 1.5, dtype=torch.bfloat16))
    ema_update([average], [parameter], 0.9)
    assert average.tolist() == pytest.approx([1.05] * 3)
    assert average.dtype == torch.float32
    assert average.data_ptr() == address
    assert not average.requires_grad


def test_averages_must_match_the_weights_one_to_one_and_be_wide() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        ema_update([torch.ones(1)], [torch.ones(1), torch.ones(1)], 0.9)
    with pytest.raises(AssertionError, match="bfloat16"):
        ema_update([torch.ones(1, dtype=torch.bfloat16)], [torch.ones(1)], 0.9)
