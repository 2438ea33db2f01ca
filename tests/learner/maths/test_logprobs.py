import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learner.maths.logprobs import token_logprobs

N, D, V = 13, 4, 11


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((N, D), (V, D), (V,)))
    targets = torch.randint(V, (N,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets


def naive(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = torch.log_softmax(logits / temperature, dim=1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(dim=1)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 5, N, 100])
def test_values_and_gradients_equal_the_naive_ones(chunk: int, temperature: float, softcap: float | None) -> None:
    hidden, weight, bias, targets = inputs()
    logprobs, entropy = token_logprobs(hidden, weight, bias, targets, temperature, chunk, softcap)
    expected, expected_entropy = naive(hidden, weight, bias, targets, temperature, softcap)
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, expected_entropy.detach())
    assert not entropy.requires_grad
    upstream = torch.linspace(-1.0, 2.0, N, dtype=torch.float64)
    actual = torch.autograd.grad(logprobs, (hidden, weight, bias), upstream)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, (hidden, weight, bias), upstream))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_against_finite_differences(softcap: float | None) -> None:
    hidden, weight, bias, targets = inputs()
    for arguments in ((hidden, weight, bias), (hidden, weight)):
        assert torch.autograd.gradcheck(
            lambda h, w, b=None: token_logprobs(h, w, b, targets, 0.7, 4, softcap)[0], arguments
        )


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(1.0, [-0.41703, -1.41703, -2.31703]), (0.7, [-0.266895, -1.695466, -2.981181])],
)
def test_temperature_divides_the_logits(temperature: float, expected: list[float]) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.1]]).repeat(3, 1)
    logprobs, _ = token_logprobs(logits, torch.eye(3), None, torch.arange(3), temperature, 2)
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-6)


def test_entropy_of_a_known_distribution() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    _, entropy = token_logprobs(logits, torch.eye(3), None, torch.tensor([0]), 1.0, 8)
    assert float(entropy) == pytest.approx(1.029653, abs=1e-6)


def test_bfloat16_inputs_give_float32_results_and_bfloat16_gradients() -> None:
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    logprobs, entropy = token_logprobs(hidden, weight, bias, targets, 1.0, 4)
    expected, expected_entropy = naive(hidden, weight, bias, targets, 1.0, None)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, expected_entropy.detach())
    actual = torch.autograd.grad(logprobs.sum(), (hidden, weight, bias))
    reference = torch.autograd.grad(expected.sum(), (hidden, weight, bias))
    assert {gradient.dtype for gradient in actual} == {torch.bfloat16}
    torch.testing.assert_close(actual, reference, atol=0.03, rtol=0.03)


def test_weight_gradients_of_many_chunks_are_not_lost_in_bfloat16() -> None:
    """512 equal terms of about 1/2 each: added up one by one in bfloat16 they would stick at 128."""
    hidden, weight = torch.ones(512, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    logprobs, _ = token_logprobs(hidden, weight.requires_grad_(), None, torch.zeros(512, dtype=torch.long), 1.0, 1)
    logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[256.0], [-256.0]]


def test_autocast_does_not_lower_the_precision_of_the_head() -> None:
    hidden, weight, bias, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = token_logprobs(hidden.bfloat16(), weight, bias, targets, 1.0, 4)
    expected, _ = naive(hidden.bfloat16().float(), weight, bias, targets, 1.0, None)
    torch.testing.assert_close(logprobs, expected)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


def test_only_what_is_trained_gets_a_gradient() -> None:
    hidden, weight, bias, targets = inputs()
    logprobs, _ = token_logprobs(hidden, weight.detach(), bias.detach(), targets, 1.0, 4)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    expected, _ = naive(hidden, weight, bias, targets, 1.0, None)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), hidden)[0])


def test_no_rows_give_an_empty_result_and_zero_gradients() -> None:
    _, weight, bias, _ = inputs()
    empty = torch.empty(0, D, dtype=torch.float64)
    logprobs, entropy = token_logprobs(empty, weight, bias, torch.empty(0, dtype=torch.long), 1.0, 4)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros_like(weight))


class LargestResult(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def memory_of(compute) -> tuple[int, int]:
    """Elements of the largest tensor made by a forward and backward pass, and of all tensors kept between
    them.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 4, generator=generator, requires_grad=True)
    weight = torch.randn(1000, 4, generator=generator, requires_grad=True)
    targets = torch.randint(1000, (256,), generator=generator)
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with LargestResult() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute(hidden, weight, targets).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return largest.elements, sum(saved)


def test_memory_never_holds_all_logits_forward_or_backward() -> None:
    """256 rows by 1000 tokens, 16 at a time; the largest tensor is [16, 1000] and never [256, 1000]."""
    largest, saved = memory_of(lambda h, w, t: token_logprobs(h, w, None, t, 1.0, 16)[0])
    assert largest == 16 * 1000
    assert saved <= 256 * 4 + 1000 * 4 + 2 * 256
    naive_largest, naive_saved = memory_of(lambda h, w, t: naive(h, w, None, t, 1.0, None)[0])
    assert naive_largest == 256 * 1000, "the detector must see what it is looking for"
    assert naive_saved > 256 * 1000
