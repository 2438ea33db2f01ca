"""The engine on networks of a few numbers: what adds up, what a step does, what the average follows."""

from typing import Any

import pytest
import torch
from torch import nn

from learner.config import OptimizerConfig
from learner.maths.schedules import tf1_eps
from learner.worker.engine import Engine, _stride, whole

pytestmark = pytest.mark.usefixtures("rank")


class Plane(nn.Module):
    """y = x . w + b, with everything at a known place."""

    def __init__(self, dtype: torch.dtype = torch.float32, weight: tuple[float, ...] = (1.0, -2.0)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = x.to(self.weight.dtype) @ self.weight if len(x) else 0.0
        return product + self.bias.sum()


def engine(network: Any, ema: float | None = None, **settings: Any) -> Engine:
    return Engine(network, OptimizerConfig.model_validate({"lr": 0.1} | settings), ema)


def push(trained: Engine, *x: float) -> None:
    """Add the gradient (x, 1) of (weight, bias)."""
    trained.backward(trained.network(torch.tensor(x)).float())


def flat(gradients: list[torch.Tensor]) -> list[float]:
    return torch.cat([g.flatten() for g in gradients])[:3].tolist()


def average(trained: Engine) -> dict[str, list[float]]:
    with trained.averaged():
        return {name: trained.master(parameter).tolist() for name, parameter in trained.trained}


def values(network: Any, name: str = "weight") -> list[float]:
    return whole(network.get_parameter(name)).tolist()


MODES = pytest.mark.parametrize(
    ("dtype", "stage"),
    [
        (torch.float32, 0),
        *((torch.float32, stage) for stage in (1, 2, 3)),
        *((torch.bfloat16, stage) for stage in (1, 2, 3)),
    ],
    ids=str,
)


@MODES
def test_losses_add_up_until_the_step(dtype, stage):
    trained = engine(Plane(dtype), zero_stage=stage)
    push(trained, 1.0, 0.0)
    push(trained, 2.0, 4.0)
    assert flat(trained.gradients()) == [3.0, 4.0, 2.0]
    assert trained.norm(trained.gradients()) == pytest.approx(29**0.5)
    assert trained.step(0.1) == pytest.approx(29**0.5)
    assert flat(trained.gradients()) == [0.0, 0.0, 0.0]  # the next step starts anew
    push(trained, 0.0, 1.0)
    assert trained.step(0.1) == pytest.approx(2**0.5)


@MODES
def test_a_copy_of_the_gradients_is_not_changed_by_what_follows(dtype, stage):
    trained = engine(Plane(dtype), zero_stage=stage)
    push(trained, 3.0, 4.0)
    first = trained.gradients()
    trained.norm(first)
    push(trained, 1.0, 1.0)
    assert flat(first) == [3.0, 4.0, 1.0]


@MODES
@pytest.mark.parametrize("style", ["torch", "tf1"])
def test_steps_are_those_of_adam_at_the_rate_of_each(dtype, stage, style):
    network, plain = Plane(dtype), Plane()
    trained = engine(network, zero_stage=stage, beta1=0.8, beta2=0.9, eps=0.01, adam_style=style)
    adam = torch.optim.Adam(plain.parameters(), lr=1.0, betas=(0.8, 0.9), eps=0.01)
    steps = ((0.5, (0.01, -3.0)), (0.125, (0.5, 2.0)), (0.0, (9.0, 9.0)), (0.25, (-1.0, 0.0)))
    for number, (rate, x) in enumerate(steps, start=1):
        push(trained, *x)
        trained.step(rate)
        if style == "tf1":
            adam.param_groups[0]["eps"] = tf1_eps(0.01, 0.9, number)
        adam.zero_grad()
        plain(torch.tensor(x)).backward()
        adam.param_groups[0]["lr"] = rate
        adam.step()
    for name, want in plain.named_parameters():
        bound = 1e-6 if dtype == torch.float32 else 0.01  # half a step of bfloat16 below 4
        assert values(network, name) == pytest.approx(want.tolist(), rel=0, abs=bound)


def test_small_gradients_add_up_in_float32_beside_bfloat16_weights():
    trained = engine(Plane(torch.bfloat16))
    push(trained, 256.0, 0.0)
    for _ in range(8):
        push(trained, 0.5, 0.0)  # bfloat16 cannot hold 256.5
    assert flat(trained.gradients()) == [260.0, 0.0, 9.0]


def test_steps_too_small_for_bfloat16_are_kept_in_the_master_weights():
    network = Plane(torch.bfloat16, weight=(1.0, 1.0))
    trained = engine(network, ema=0.0)
    for _ in range(8):
        push(trained, 1.0, 1.0)
        trained.step(0.001)  # half of bfloat16's resolution below 1 is 0.002
    assert values(network)[0] < 1.0
    assert average(trained)["weight"] == pytest.approx([0.992, 0.992], abs=1e-5)


@MODES
def test_clipping_scales_all_gradients_to_one_norm_and_reports_the_norm_before(dtype, stage):
    network = Plane(dtype)
    trained = engine(network, zero_stage=stage, clip_grad_norm=0.03, eps=0.05)
    push(trained, 3.0, 4.0)
    assert trained.step(1.0) == pytest.approx(26**0.5, rel=1e-3)
    # Adam's first step is g / (|g| + eps); with g = 0.03 / sqrt(26) * (3, 4, 1)
    scale = 0.03 / 26**0.5
    expected = [start - scale * g / (scale * g + 0.05) for start, g in ((1.0, 3.0), (-2.0, 4.0), (0.0, 1.0))]
    bound = 1e-4 if dtype == torch.float32 else 0.01
    assert [*values(network), values(network, "bias")[0]] == pytest.approx(expected, abs=bound)


@MODES
def test_the_moving_average_starts_at_the_weights_and_follows_every_step(dtype, stage):
    network = Plane(dtype)
    trained = engine(network, ema=0.75, zero_stage=stage)
    assert average(trained) == {"weight": [1.0, -2.0], "bias": [0.0]}
    for _ in range(2):  # constant gradients: Adam moves by the rate each time, against their sign
        push(trained, 1.0, -1.0)
        trained.step(0.5)
    # weight 1, .5, 0: the average is .75 + .25 * .5 = .875, then .75 * .875 + 0
    assert average(trained)["weight"] == pytest.approx([0.65625, -1.65625], abs=1e-4)
    assert average(trained)["bias"][0] == pytest.approx(0.75 * -0.125 + 0.25 * -1.0, abs=1e-4)


@MODES
def test_frozen_parameters_stay_and_are_not_averaged(dtype, stage):
    network = Plane(dtype)
    network.bias.requires_grad_(False)
    trained = engine(network, ema=0.5, zero_stage=stage)
    push(trained, 1.0, 1.0)
    trained.step(0.5)
    assert values(network, "bias")[0] == 0.0
    assert values(network)[0] == pytest.approx(0.5, abs=0.01)
    assert average(trained).keys() == {"weight"}


@MODES
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_what_is_not_finite_leaves_weights_and_average_alone(dtype, stage, poison, what):
    network = Plane(dtype)
    trained = engine(network, ema=0.5, zero_stage=stage)
    push(trained, 1.0, 1.0)
    bias = network.bias.sum().float()
    trained.backward(bias * poison if what == "gradient" else bias + poison)  # the latter's gradient is 1
    push(trained, 1.0, 1.0)
    assert trained.step(0.5) is None
    assert values(network) == [1.0, -2.0]
    assert average(trained)["weight"] == [1.0, -2.0]
    push(trained, 1.0, -1.0)  # and nothing of it is left
    assert trained.step(0.5) == pytest.approx(3**0.5)
    assert values(network) == pytest.approx([0.5, -1.5], abs=0.01)


@MODES
def test_parameters_that_a_loss_does_not_reach_have_gradients_of_zero(dtype, stage):
    network = Plane(dtype)
    trained = engine(network, zero_stage=stage)
    for reached_before in (False, True):
        if reached_before:
            push(trained, 5.0, 5.0)
            trained.step(0.0)  # nothing of it may be left in the next step
        trained.backward(3.0 * trained.network(torch.zeros(0)).float())
        assert flat(trained.gradients()) == [0.0, 0.0, 3.0]
        assert trained.step(0.5 if not reached_before else 0.0) == pytest.approx(3.0)
        assert values(network) == [1.0, -2.0]
    assert values(network, "bias")[0] == pytest.approx(-0.5, abs=1e-3)


def test_bfloat16_without_zero_is_refused():
    with pytest.raises(ValueError, match="use zero_stage = 1"):
        engine(Plane(torch.bfloat16), zero_stage=0)


def test_the_norm_of_a_large_gradient_is_estimated_from_a_sample(monkeypatch):
    monkeypatch.setattr("learner.worker.engine._SAMPLE", 100)
    assert [_stride(numbers) for numbers in (0, 1, 100, 101, 1000, 1300)] == [1, 1, 1, 11, 11, 13]
    x = torch.linspace(-1, 1, 5000).tolist()
    trained = engine(Plane(weight=tuple(x)), zero_stage=1)
    push(trained, *x)
    samples = trained.gradients()
    assert sum(map(len, samples)) < 110
    assert trained.norm(samples) == pytest.approx(torch.tensor([*x, 1.0]).norm().item(), rel=0.05)
