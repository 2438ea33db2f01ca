import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.maths.advantages import explained_variance, gae, masked_mean, masked_sum, penalised_rewards, whiten

NAN, INF = float("nan"), float("inf")

# A full response of five tokens, and one of three whose padding holds garbage.
LOGPROBS = torch.tensor([[-1.2, -0.7, -2.3, -0.4, -0.9], [-0.5, -1.5, -0.8, NAN, 7.0]], dtype=torch.float64)
REF_LOGPROBS = torch.tensor([[-1.0, -0.9, -2.0, -0.6, -1.1], [-0.6, -1.1, -1.0, 3.0, INF]], dtype=torch.float64)
VALUES = torch.tensor([[0.1, 0.25, -0.05, 0.4, 0.6], [0.3, -0.2, 0.1, INF, NAN]], dtype=torch.float64)
SCORE = torch.tensor([0.85, -1.0], dtype=torch.float64)
MASK = torch.arange(5) < torch.tensor([[5], [3]])
REWARDS = [[0.004, -0.004, 0.006, -0.004, 0.846], [-0.002, 0.008, -1.004, 0.0, 0.0]]
ADVANTAGES = [[0.645154, 0.517004, 0.864215, 0.4297, 0.246], [-1.20576, -0.7408, -1.104, 0.0, 0.0]]
RETURNS = [[0.745154, 0.767004, 0.814215, 0.8297, 0.846], [-0.90576, -0.9408, -1.004, 0.0, 0.0]]


def close(actual: Tensor, expected: object, atol: float = 6e-7) -> None:
    """Equal to six printed digits."""
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)


def golden_rewards() -> Tensor:
    return penalised_rewards(LOGPROBS, REF_LOGPROBS, MASK, SCORE, 0.02)


def padded(x: Tensor, fill: float = NAN) -> Tensor:
    """The same batch with two more columns and one more row of padding."""
    return torch.nn.functional.pad(x, (0, 2, 0, 1), value=fill)


def padded_mask(mask: Tensor) -> Tensor:
    return torch.nn.functional.pad(mask, (0, 2, 0, 1), value=False)


def test_rewards_are_the_kl_penalty_and_the_score_at_the_last_token() -> None:
    close(golden_rewards(), REWARDS)


def test_rewards_with_a_zero_coefficient_are_the_score_alone() -> None:
    rewards = penalised_rewards(LOGPROBS, REF_LOGPROBS, MASK, SCORE, 0.0)
    close(rewards, [[0.0, 0.0, 0.0, 0.0, 0.85], [0.0, 0.0, -1.0, 0.0, 0.0]])


def test_a_row_without_tokens_earns_nothing_even_with_a_score() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    zeros = torch.zeros(2, 2)
    rewards = penalised_rewards(zeros, zeros, mask, torch.tensor([0.5, NAN]), 0.02)
    close(rewards, [[0.5, 0.0], [0.0, 0.0]])


def test_gae_of_a_full_and_a_padded_response() -> None:
    advantages, returns = gae(golden_rewards(), VALUES, MASK, 1.0, 0.95)
    close(advantages, ADVANTAGES)
    close(returns, RETURNS)


def test_gae_with_the_score_one_token_after_the_end() -> None:
    """Trainers that reward the slot after the EOS get other numbers than ours, from the same formula."""
    rewards = torch.tensor([[-0.002, 0.008, -0.004, -1.0, 0.0]], dtype=torch.float64)
    values = torch.tensor([[0.3, -0.2, 0.1, 0.05, 9.0]], dtype=torch.float64)
    advantages, returns = gae(rewards, values, torch.arange(5)[None] < 4, 1.0, 0.95)
    close(advantages, [[-1.158379, -0.690925, -1.0515, -1.05, 0.0]])
    close(returns, [[-0.858379, -0.890925, -0.9515, -1.0, 0.0]])


def test_one_step_errors_are_what_lambda_zero_leaves() -> None:
    advantages, _ = gae(golden_rewards()[:1], VALUES[:1], MASK[:1], 1.0, 0.0)
    close(advantages, [[0.154, -0.304, 0.456, 0.196, 0.246]])


def test_lambda_one_gives_the_reward_still_to_come() -> None:
    """Returns then do not depend on the values: discount 1/2 and rewards 1, 2, 4 give 3, 4, 4."""
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    for values in (torch.zeros(1, 3), torch.tensor([[5.0, -3.0, 0.25]])):
        advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 0.5, 1.0)
        close(returns, [[3.0, 4.0, 4.0]])
        close(advantages, torch.tensor([[3.0, 4.0, 4.0]]) - values)


def test_a_response_of_only_the_end_token() -> None:
    mask = torch.tensor([[True, False]])
    advantages, returns = gae(torch.tensor([[0.7, 9.0]]), torch.tensor([[0.2, 9.0]]), mask, 1.0, 0.95)
    close(advantages, [[0.5, 0.0]])
    close(returns, [[0.7, 0.0]])


@given(st.integers(1, 9), st.integers(0, 2**31), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_gae_is_the_explicit_discounted_sum(length: int, seed: int, discount: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, length, generator=generator, dtype=torch.float64)
    mask = torch.ones(1, length, dtype=torch.bool)
    advantages, _ = gae(rewards[None], values[None], mask, discount, lam)
    r, v = rewards.tolist(), [*values.tolist(), 0.0]
    deltas = [r[t] + discount * v[t + 1] - v[t] for t in range(length)]
    explicit = [sum((discount * lam) ** (s - t) * deltas[s] for s in range(t, length)) for t in range(length)]
    close(advantages[0], explicit, atol=1e-9)


def test_padding_changes_neither_rewards_nor_advantages() -> None:
    mask = padded_mask(MASK)
    score = torch.cat([SCORE, torch.tensor([NAN], dtype=torch.float64)])
    rewards = penalised_rewards(padded(LOGPROBS), padded(REF_LOGPROBS, 5.0), mask, score, 0.02)
    assert torch.equal(rewards, padded(golden_rewards(), 0.0))
    advantages, returns = gae(rewards, padded(VALUES), mask, 1.0, 0.95)
    plain_advantages, plain_returns = gae(golden_rewards(), VALUES, MASK, 1.0, 0.95)
    assert torch.equal(advantages, padded(plain_advantages, 0.0))
    assert torch.equal(returns, padded(plain_returns, 0.0))


def test_permuting_responses_permutes_advantages() -> None:
    flipped, _ = gae(golden_rewards().flip(0), VALUES.flip(0), MASK.flip(0), 1.0, 0.95)
    plain, _ = gae(golden_rewards(), VALUES, MASK, 1.0, 0.95)
    assert torch.equal(flipped, plain.flip(0))


def test_whitening_advantages_over_the_whole_batch() -> None:
    advantages, _ = gae(golden_rewards(), VALUES, MASK, 1.0, 0.95)
    close(masked_mean(advantages, MASK), -0.043561)
    expected = [[0.881645, 0.717596, 1.162071, 0.605835, 0.370676], [-1.487766, -0.892557, -1.3575, 0.0, 0.0]]
    close(whiten(advantages, MASK), expected)
    close(whiten(padded(advantages), padded_mask(MASK)), padded(torch.tensor(expected), 0.0))


def test_whitening_rewards_without_shifting_their_mean() -> None:
    expected = [[0.030299, 0.013051, 0.034611, 0.013051, 1.845637], [0.017363, 0.038923, -2.142933, 0.0, 0.0]]
    close(whiten(golden_rewards(), MASK, shift_mean=False), expected)


SQUARE = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
TRIANGLE = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])


def test_whitening_uses_the_population_variance() -> None:
    everything = torch.ones(3, 3, dtype=torch.bool)
    shifted = [[-1.549193, -1.161895, -0.774597], [-0.387298, 0.0, 0.387298], [0.774597, 1.161895, 1.549193]]
    close(whiten(SQUARE, everything), shifted, atol=2e-6)
    close(whiten(SQUARE, everything, shift_mean=False)[0], [0.050807, 0.438105, 0.825403], atol=2e-6)


def test_whitening_under_a_mask() -> None:
    shifted = [[-1.352247, -0.845154, -0.338062], [0.169031, 0.676123, 0.0], [1.690308, 0.0, 0.0]]
    unshifted = [[0.11442, 0.621513, 1.128605], [1.635697, 2.14279, 0.0], [3.156975, 0.0, 0.0]]
    close(whiten(SQUARE, TRIANGLE), shifted, atol=2e-6)
    close(whiten(SQUARE, TRIANGLE, shift_mean=False), unshifted, atol=2e-6)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_whitening_what_does_not_vary_gives_zero(tokens: int) -> None:
    mask = torch.arange(7)[None] < tokens
    close(whiten(torch.full((1, 7), 1000.1), mask), torch.zeros(1, 7))


@given(st.integers(0, 2**31), st.floats(0.1, 10.0), st.floats(-10.0, 10.0))
def test_whitening_forgets_scale_and_offset(seed: int, scale: float, offset: float) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [4]])
    close(whiten(scale * x + offset, mask), whiten(x, mask), atol=1e-4)


def test_means_and_sums_under_a_mask() -> None:
    x, mask = torch.tensor([1.0, NAN, 3.0]), torch.tensor([True, False, True])
    assert masked_sum(x, mask) == 4.0
    assert masked_mean(x, mask) == 2.0
    assert masked_mean(x, torch.zeros(3, dtype=torch.bool)) == 0.0
    assert masked_mean(torch.empty(0), torch.empty(0, dtype=torch.bool)) == 0.0


def test_nothing_flows_back_from_the_padding() -> None:
    x = torch.tensor([1.0, NAN, 3.0], requires_grad=True)
    masked_mean(x, torch.tensor([True, False, True])).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.5, 0.0, 0.5]


def test_explained_variance() -> None:
    """Returns 1, 2, 3 (variance 2/3); errors 0, 1, 0 (mean square 1/3): half of it is explained."""
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, NAN]]), torch.tensor([[True, True, True, False]])
    assert explained_variance(torch.tensor([[1.0, 3.0, 3.0, NAN]]), returns, mask) == pytest.approx(0.5)
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((1, 4), 2.0), returns, mask) == pytest.approx(0.0)
    assert explained_variance(returns, torch.full((1, 4), 2.0), mask) == 0.0
