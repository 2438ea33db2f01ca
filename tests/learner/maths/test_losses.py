import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.maths.kl import k3
from learner.maths.losses import importance_weights, kwise_loss, lm_loss_sum, policy_loss_sum, value_loss_sum

NAN = float("nan")


def f64(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(actual: Tensor, expected: object) -> None:
    """Equal to six printed digits."""
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=6e-7, rtol=0)


# All four ways out of the clipping range, one token inside it and one of padding.
OLD = f64([[-1.0, -2.0, -0.5], [-1.5, -0.3, -9.0]])
NEW = f64([[-0.7, -2.4, -0.45], [-1.2, -0.8, -9.0]])
ADVANTAGES = f64([[1.0, -0.5, 2.0], [-1.5, 0.8, 3.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
TOKENS = 5


def test_clipped_policy_loss_and_its_statistics() -> None:
    loss, stats = policy_loss_sum(NEW, OLD, ADVANTAGES, MASK, 0.2)
    close(loss / TOKENS, -0.272596)
    close(stats["policy/clip_fraction"] / TOKENS, 0.4)
    close(stats["policy/approx_kl"] / TOKENS, 0.05925)
    close(stats["ratio/mean"], 1.349859 + 0.67032 + 1.051271 + 1.349859 + 0.606531)
    close(stats["ratio/max"], 1.349859)
    close(k3(OLD, NEW)[MASK].mean(), 0.055568)  # of KL(old || new): u - 1 - log u


def test_policy_gradient_stops_where_the_ratio_has_gone_far_enough() -> None:
    """Tokens 1 and 2 left the range in the direction their advantage wants; tokens 4 and 5 in the other."""
    new = NEW.clone().requires_grad_()
    loss, _ = policy_loss_sum(new, OLD, ADVANTAGES, MASK, 0.2)
    (gradient,) = torch.autograd.grad(loss / TOKENS, new)
    close(gradient, [[0.0, 0.0, -0.420508], [0.404958, -0.097045, 0.0]])


def test_policy_gradient_against_finite_differences() -> None:
    new = NEW.clone().requires_grad_()
    weights = f64([[0.5, 2.0, 1.0], [0.25, 1.5, 0.0]])
    assert torch.autograd.gradcheck(lambda x: policy_loss_sum(x, OLD, ADVANTAGES, MASK, 0.2, weights)[0], (new,))


def test_the_first_minibatch_is_on_policy() -> None:
    new = OLD.float().requires_grad_()
    loss, stats = policy_loss_sum(new, OLD.float(), ADVANTAGES.float(), MASK, 0.2)
    assert stats["ratio/mean"] == TOKENS
    assert stats["policy/clip_fraction"] == 0
    assert stats["policy/approx_kl"] == 0
    close(loss, -ADVANTAGES.float()[MASK].sum())
    (gradient,) = torch.autograd.grad(loss, new)
    close(gradient, torch.where(MASK, -ADVANTAGES, 0.0))


def test_weights_scale_each_token_and_not_the_statistics() -> None:
    weights = f64([[2.0, 0.0, 1.0], [0.5, 1.0, NAN]]).requires_grad_()
    loss, stats = policy_loss_sum(NEW, OLD, ADVANTAGES, MASK, 0.2, weights)
    close(loss, 2 * -1.2 + 0 * 0.4 - 2.102542 + 0.5 * 2.024788 - 0.485225)
    assert stats == policy_loss_sum(NEW, OLD, ADVANTAGES, MASK, 0.2)[1]
    assert not loss.requires_grad


def test_an_absurd_ratio_stays_finite() -> None:
    new = f64([[0.0]]).requires_grad_()
    loss, stats = policy_loss_sum(new, f64([[-500.0]]), f64([[-1.0]]), torch.tensor([[True]]), 0.2)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.exp(20))
    assert float(stats["policy/approx_kl"]) == 125_000
    assert new.grad is not None
    assert bool(new.grad.isfinite().all())


def losses_of(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Every token loss with its statistics, and their gradients, of the same tensors."""
    new = new.clone().requires_grad_()
    policy, policy_stats = policy_loss_sum(new, old, advantages, mask, 0.2)
    value, value_stats = value_loss_sum(new, old, advantages, mask, 0.2)
    del policy_stats["ratio/max"]  # which is no sum
    losses = [policy, value, lm_loss_sum(new, mask)]
    gradients = [torch.autograd.grad(loss, new, retain_graph=True)[0] for loss in losses]
    return [loss.detach() for loss in losses] + [*policy_stats.values(), *value_stats.values()], gradients


def test_padding_changes_no_loss_statistic_or_gradient() -> None:
    plain, plain_gradients = losses_of(NEW, OLD, ADVANTAGES, MASK)
    pad = (0, 2, 0, 1)
    new, old, advantages = (torch.nn.functional.pad(x, pad, value=NAN) for x in (NEW, OLD, ADVANTAGES))
    wide, wide_gradients = losses_of(new, old, advantages, torch.nn.functional.pad(MASK, pad, value=False))
    assert torch.stack(plain).tolist() == pytest.approx(torch.stack(wide).tolist())
    for narrow, gradient in zip(plain_gradients, wide_gradients, strict=True):
        close(gradient, torch.nn.functional.pad(narrow, pad))


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_sums_do_not_depend_on_sharding(shards: int) -> None:
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = torch.randn(3, 8, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 0, 5, 2])[:, None]
    whole, gradients = losses_of(new, old, advantages, mask)
    rows = torch.arange(8).chunk(shards)
    parts = [losses_of(new[r], old[r], advantages[r], mask[r]) for r in rows]
    close(torch.stack([torch.stack(values) for values, _ in parts]).sum(0), torch.stack(whole))
    for i, gradient in enumerate(gradients):
        close(torch.cat([shard_gradients[i] for _, shard_gradients in parts]), gradient)


def test_a_microbatch_of_padding_contributes_exactly_zero() -> None:
    everything_off = torch.zeros_like(MASK)
    values, gradients = losses_of(NEW * NAN, OLD, ADVANTAGES, everything_off)
    assert all(value == 0 for value in values)
    assert all(torch.equal(gradient, torch.zeros_like(NEW)) for gradient in gradients)


def test_value_loss_takes_the_worse_of_clipped_and_unclipped() -> None:
    old = f64([[0.5, 0.0, -0.3], [0.2, 0.9, NAN]])
    new = f64([[0.9, 0.1, -0.8], [0.1, 0.6, NAN]])
    returns = f64([[1.0, 0.4, -0.2], [0.5, 0.95, NAN]])
    loss, stats = value_loss_sum(new, old, returns, MASK, 0.2)
    close(loss, 0.5 * (0.09 + 0.09 + 0.36 + 0.16 + 0.1225))
    close(loss / TOKENS, 0.08225)
    close(stats["value/clip_fraction"] / TOKENS, 0.2)


def test_the_value_loss_without_a_clip_is_half_the_squared_error() -> None:
    """Errors .1, .3, .6, .4 and .35 of a padded batch; gradients are the errors themselves."""
    old = f64([[0.5, 0.0, -0.3], [0.2, 0.9, NAN]])
    new = f64([[0.9, 0.1, -0.8], [0.1, 0.6, NAN]]).requires_grad_()
    returns = f64([[1.0, 0.4, -0.2], [0.5, 0.95, NAN]])
    loss, stats = value_loss_sum(new, old, returns, MASK, None)
    close(loss.detach(), 0.5 * (0.01 + 0.09 + 0.36 + 0.16 + 0.1225))
    assert stats["value/clip_fraction"] == 0
    close(torch.autograd.grad(loss, new)[0], [[-0.1, -0.3, -0.6], [-0.4, -0.35, 0.0]])


def test_value_gradient_is_zero_only_where_the_clipped_error_rules() -> None:
    """Errors -0.1 (clipped to -0.3: no gradient), -0.3 and -0.6, whose clipped errors are no larger."""
    old, returns = f64([[0.5, 0.0, -0.3]]), f64([[1.0, 0.4, -0.2]])
    new, mask = f64([[0.9, 0.1, -0.8]]).requires_grad_(), torch.ones(1, 3, dtype=torch.bool)
    loss, _ = value_loss_sum(new, old, returns, mask, 0.2)
    (gradient,) = torch.autograd.grad(loss, new, retain_graph=True)
    close(gradient, [[0.0, -0.3, -0.6]])
    assert torch.autograd.gradcheck(lambda x: value_loss_sum(x, old, returns, mask, 0.2)[0], (new,))


def test_accumulated_lm_loss_is_the_mean_over_tokens_not_over_microbatches() -> None:
    first = lm_loss_sum(f64([-1.0, -2.0, -3.0]), torch.tensor([True, True, True]))
    second = lm_loss_sum(f64([-4.0, NAN, 5.0]), torch.tensor([True, False, False]))
    assert (first + second) / 4 == 2.5


# Scores of completions A, B, C, D of one prompt.
SCORES = f64([1.2, 0.3, -0.5, 0.9])
A_D_B_C = [0, 2, 3, 1]
A_B_C_D = [0, 1, 2, 3]
A_BD_C = [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("ranks", "normaliser", "expected", "pairs", "correct", "gradient"),
    [
        (A_D_B_C, "pairs", 0.348717, 6, 6.0, [-0.144846, 0.055561, 0.110384, -0.0211]),
        (A_B_C_D, "pairs", 0.68205, 6, 4.0, [-0.144846, -0.111105, -0.056282, 0.312233]),
        (A_BD_C, "pairs", 0.330963, 5, 5.0, [-0.173815, -0.004195, 0.132461, 0.045548]),
        (A_BD_C, "all", 0.275802, 5, 5.0, [-0.144846, -0.003496, 0.110384, 0.037957]),
        (A_B_C_D, "all", 0.68205, 6, 4.0, [-0.144846, -0.111105, -0.056282, 0.312233]),
    ],
)
def test_ranking_loss_of_one_prompt(ranks, normaliser, expected, pairs, correct, gradient) -> None:
    scores = SCORES.clone().requires_grad_()
    loss, prompts, stats = kwise_loss(scores, torch.zeros(4, dtype=torch.long), torch.tensor(ranks), normaliser)
    close(loss, expected)
    assert prompts == 1
    assert stats["pairs"] == pairs
    assert stats["correct"] == correct
    assert float(stats["prompt_accuracy"]) == pytest.approx(correct / pairs)
    (actual,) = torch.autograd.grad(loss, scores)
    close(actual, gradient)
    assert abs(float(actual.sum())) < 1e-12


def test_weights_multiply_the_loss_of_a_prompt_and_not_its_statistics() -> None:
    scores = SCORES.repeat(2).float().requires_grad_()
    group, ranks = torch.tensor([7] * 4 + [3] * 4), torch.tensor(A_D_B_C + A_BD_C)
    plain, _, stats = kwise_loss(scores, group, ranks, "pairs")
    ones, _, same = kwise_loss(scores, group, ranks, "pairs", torch.ones(8))
    assert torch.equal(ones, plain)
    assert all(torch.equal(same[name], stats[name]) for name in stats)
    gradients = [torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in (ones, plain)]
    assert torch.equal(*gradients)
    # 0.348717 and 0.330963 each, as above
    half, _, same = kwise_loss(scores, group, ranks, "pairs", torch.tensor([0.5] * 4 + [2.0] * 4))
    assert half.item() == pytest.approx(0.5 * 0.348717 + 2 * 0.330963, abs=1e-5)
    assert all(torch.equal(same[name], stats[name]) for name in stats)


def test_log_loss_is_summed_over_pairs() -> None:
    group = torch.zeros(4, dtype=torch.long)
    sums = [kwise_loss(SCORES, group, torch.tensor(r), "all")[2]["log_loss"] for r in (A_D_B_C, A_B_C_D, A_BD_C)]
    close(torch.stack(sums), [2.092301, 4.092301, 1.654813])


def test_a_batch_is_the_mean_over_prompts_not_over_pairs() -> None:
    group, ranks = torch.tensor([7] * 4 + [3] * 4), torch.tensor(A_D_B_C + A_BD_C)
    loss, prompts, stats = kwise_loss(SCORES.repeat(2), group, ranks, "pairs")
    assert prompts == 2
    close(loss / prompts, 0.33984)
    close(stats["log_loss"] / stats["pairs"], 0.340647)


def test_accuracy_pooled_over_pairs_and_averaged_over_prompts() -> None:
    """Six pairs with four right, one pair that is wrong: 4/7 pooled, (2/3 + 0)/2 by prompt."""
    scores = torch.cat([SCORES, f64([0.0, 1.0])])
    _, prompts, stats = kwise_loss(scores, torch.tensor([0] * 4 + [1] * 2), torch.tensor([*A_B_C_D, 0, 1]), "pairs")
    assert float(stats["correct"] / stats["pairs"]) == pytest.approx(4 / 7)
    assert float(stats["prompt_accuracy"] / prompts) == pytest.approx(1 / 3)


def test_prompts_without_an_ordered_pair_contribute_nothing() -> None:
    scores = f64([0.1, 0.2, 0.3]).requires_grad_()
    loss, prompts, stats = kwise_loss(scores, torch.tensor([0, 1, 1]), torch.tensor([0, 4, 4]), "pairs")
    loss.backward()
    assert prompts == 0
    assert loss == 0
    assert all(value == 0 for value in stats.values())
    assert scores.grad is not None
    assert torch.equal(scores.grad, torch.zeros(3, dtype=torch.float64))


def test_identical_completions_ranked_differently_cost_log_two() -> None:
    loss, _, stats = kwise_loss(f64([0.4, 0.4]), torch.tensor([0, 0]), torch.tensor([0, 1]), "pairs")
    close(loss, math.log(2))
    assert stats["correct"] == 0.5


def test_a_hopeless_margin_costs_its_size_and_stays_finite() -> None:
    loss, _, _ = kwise_loss(torch.tensor([-5000.0, 5000.0]), torch.tensor([0, 0]), torch.tensor([0, 1]), "pairs")
    assert loss == 10_000


@given(st.permutations(range(7)), st.floats(-5.0, 5.0))
def test_ranking_loss_under_permutation_and_shift(order: list[int], shift: float) -> None:
    scores = torch.cat([SCORES, f64([0.7, -0.1, 0.2])])
    group, ranks = torch.tensor([0] * 4 + [1] * 3), torch.tensor([*A_BD_C, 1, 0, 0])
    x, y = scores.clone().requires_grad_(), (scores[order] + shift).requires_grad_()
    loss, _, _ = kwise_loss(x, group, ranks, "pairs")
    moved, _, _ = kwise_loss(y, group[order], ranks[order], "pairs")
    close(moved, loss)
    close(torch.autograd.grad(moved, y)[0], torch.autograd.grad(loss, x)[0][order])


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.floats(-3, 3)), min_size=1, max_size=5), max_size=4))
def test_ranking_loss_against_plain_loops_and_split_over_ranks(prompts: list) -> None:
    expected, counted = 0.0, 0
    parts = []
    for number, completions in enumerate(prompts):
        pairs = [(w, v) for (i, w), (j, v) in itertools.permutations(completions, 2) if i < j]
        if pairs:
            expected += sum(math.log1p(math.exp(v - w)) for w, v in pairs) / len(pairs)
            counted += 1
        scores = f64([score for _, score in completions])
        ranks = torch.tensor([rank for rank, _ in completions])
        parts.append((scores, torch.full((len(completions),), number), ranks))
    if not parts:
        return
    scores, group, ranks = (torch.cat(column) for column in zip(*parts, strict=True))
    loss, n, _ = kwise_loss(scores, group, ranks, "pairs")
    assert n == counted
    assert float(loss) == pytest.approx(expected)
    split = [kwise_loss(s, g, r, "pairs") for s, g, r in parts]
    assert sum(float(part[0]) for part in split) == pytest.approx(expected)
    assert sum(part[1] for part in split) == counted


def test_ranking_gradient_against_finite_differences() -> None:
    scores = SCORES.clone().requires_grad_()
    group, ranks = torch.zeros(4, dtype=torch.long), torch.tensor(A_BD_C)
    assert torch.autograd.gradcheck(lambda x: kwise_loss(x, group, ranks, "pairs")[0], (scores,))
    assert torch.autograd.gradcheck(lambda x: kwise_loss(x, group, ranks, "all")[0], (scores,))


def test_importance_weights_are_truncated_and_measured() -> None:
    """Raw weights 1/2, 1, 4 over three tokens, cut at 2; the fourth is padding."""
    behaviour = f64([[-1.0, -1.0, -1.0, NAN]])
    logprobs = behaviour + f64([[0.5, 1.0, 4.0, 9.0]]).log()
    weights, metrics = importance_weights(logprobs, behaviour, torch.tensor([[True, True, True, False]]), 2.0)
    close(weights, [[0.5, 1.0, 2.0, 0.0]])
    expected = {
        "importance/log_ratio_mean": (math.log(2) + math.log(4)) / 3,
        "importance/log_ratio_max": math.log(4),
        "importance/k3": ((0.5 - 1 + math.log(2)) + (4 - 1 - math.log(4))) / 3,
        "importance/effective_share": 5.5**2 / (3 * (0.25 + 1 + 16)),
        "importance/clipped_share": 1 / 3,
        "importance/non_finite_share": 0.0,
    }
    assert metrics == pytest.approx(expected)


def test_masked_weights_are_raw_within_the_bounds_and_nothing_outside() -> None:
    behaviour = f64([[-1.0, -1.0, -1.0, -1.0, NAN]])
    logprobs = behaviour + f64([[0.5, 0.4, 1.5, 4.0, 9.0]]).log()
    mask = torch.tensor([[True, True, True, True, False]])
    weights, metrics = importance_weights(logprobs, behaviour, mask, cap=2.0, floor=0.5 - 1e-9)
    close(weights, [[0.5, 0.0, 1.5, 0.0, 0.0]])
    assert metrics["importance/clipped_share"] == 0.5


ACTIONS = torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64)  # the advantage of each of four actions
SAMPLER = f64([0.4, 0.3, 0.2, 0.1]).log()  # the policy that sampled, some versions ago
START = f64([0.25, 0.25, 0.3, 0.2]).log()  # the learner's at the start of the update


def _expected_gradient(cap: float | None) -> Tensor:
    """Gradient of the loss of one token, over every action as often as the sampler takes it; cap None: no weights."""
    logits = START.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for action in range(len(ACTIONS)):
        one, mask = (slice(None), [action]), torch.ones(1, 1, dtype=torch.bool)
        new = logits.log_softmax(0)[None][one]
        weights, _ = importance_weights(START[None][one], SAMPLER[None][one], mask, cap or 1.0)
        loss, _ = policy_loss_sum(
            new, START[None][one], ACTIONS[None][one], mask, 0.2, None if cap is None else weights
        )
        total = total + SAMPLER[action].exp() * loss
    (gradient,) = torch.autograd.grad(total, logits)
    return gradient


def test_weighted_stale_samples_have_the_policy_gradient_of_fresh_ones_and_unweighted_ones_have_not() -> None:
    """With four actions every expectation is a sum: d/dlogits of -E_pi[A] at pi = START is -pi * (A - E_pi[A])."""
    pi = START.exp()
    fresh = -pi * (ACTIONS - (pi * ACTIONS).sum())
    torch.testing.assert_close(_expected_gradient(cap=1e9), fresh)
    ignoring = _expected_gradient(cap=None)
    assert (ignoring - fresh).abs().max() > 0.1
    assert torch.cosine_similarity(ignoring, fresh, dim=0) < 0.9
    # a cap that binds (the last action's weight is 2) brings back some of the bias, and less of it than no weights
    capped = _expected_gradient(cap=1.5)
    assert 0.01 < (capped - fresh).abs().max() < (ignoring - fresh).abs().max()


def test_equal_weights_are_fully_effective() -> None:
    weights, metrics = importance_weights(OLD, OLD, MASK, 2.0)
    assert torch.equal(weights, MASK.double())
    assert metrics["importance/effective_share"] == pytest.approx(1.0)
    assert metrics["importance/log_ratio_max"] == 0


def test_tokens_of_no_finite_ratio_get_no_weight_and_are_counted() -> None:
    behaviour = torch.tensor([[-1.0, -math.inf, NAN, -800.0]])
    logprobs = torch.full((1, 4), -1.0)
    weights, metrics = importance_weights(logprobs, behaviour, torch.ones(1, 4, dtype=torch.bool), 2.0)
    assert weights.tolist() == [[1.0, 0.0, 0.0, 2.0]]
    assert metrics["importance/non_finite_share"] == 0.5
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_batch_without_tokens_has_finite_metrics() -> None:
    _, metrics = importance_weights(OLD, OLD, torch.zeros_like(MASK), 2.0)
    assert set(metrics.values()) == {0.0}


def test_importance_weights_carry_no_gradient() -> None:
    weights, _ = importance_weights(NEW.clone().requires_grad_(), OLD, MASK, 2.0)
    assert not weights.requires_grad
