"""Reward modelling: encoding and splitting comparisons, the loop, the normalisation, and a preference learnt."""

import asyncio
import random
from typing import Any

import pytest
import torch

from learner.config import NetworkConfig, OptimizerConfig, RewardModelingConfig
from learner.reward_modeling import (
    RankedGroup,
    held_out_agreement,
    normaliser,
    ranked_groups,
    reward_modeling,
    split_groups,
)
from reward_server.labeling import Comparison
from reward_server.model import load_reward_model, normalisation
from reward_server.schema import Message
from tests.fakes import ASSISTANT, EOS, USER, FakeEncoding
from tests.tiny_batches import tokens

ENCODING: Any = FakeEncoding()
ASK = (Message(role="user", content="a"),)


def group(number: int, ranks: tuple[int, ...] = (0, 1)) -> RankedGroup:
    """Completions whose last token is 100 + their rank, of prompt `number`."""
    return RankedGroup(
        sequences=tuple((number + 3, 5, 100 + rank) for rank in ranks),
        ranks=ranks,
        response_lengths=tuple(1 + rank for rank in ranks),
    )


def config(**settings) -> RewardModelingConfig:
    return RewardModelingConfig(**{"prompts_per_batch": 4, "valid_share": 0.25} | settings)


# --- from comparisons to groups


def test_completions_are_encoded_after_their_prompt_with_an_eos_only_where_they_ended():
    comparison = Comparison(id="x", prompt=ASK, responses=("b", "cc"), ended=(True, False), ranks=(1, 0), labeler=None)
    (found,) = ranked_groups([comparison], ENCODING)
    query = (USER, 4, ASSISTANT)
    assert found.sequences == ((*query, 5, EOS), (*query, 6, 6))
    assert found.ranks == (1, 0)
    assert found.response_lengths == (2, 2)


def test_a_comparison_without_ranks_is_an_error_that_names_it():
    unranked = Comparison(id="row 7", prompt=ASK, responses=("b", "c"), ended=(True, True), ranks=None, labeler=None)
    with pytest.raises(ValueError, match=r"'row 7' has no ranks: rank it first"):
        ranked_groups([unranked], ENCODING)


def test_whole_prompts_are_held_out_by_the_seed():
    groups = [group(i) for i in range(8)]
    train, held_out = split_groups(groups, config(seed=3))
    assert (len(train), len(held_out)) == (6, 2)
    assert sorted(map(groups.index, train + held_out)) == list(range(8))
    assert split_groups(groups, config(seed=3)) == (train, held_out)
    assert any(split_groups(groups, config(seed=seed))[1] != held_out for seed in range(3))


def test_at_least_one_prompt_is_held_out_and_one_is_left():
    assert [len(part) for part in split_groups([group(0), group(1)], config(valid_share=0.01))] == [1, 1]
    with pytest.raises(ValueError, match="1 comparisons are too few"):
        split_groups([group(0)], config())
    with pytest.raises(ValueError, match="2 comparisons are too few"):
        split_groups([group(0), group(1)], config(valid_share=0.9))


# --- normalisation


def test_a_shift_makes_demonstrations_score_zero_on_average():
    assert normaliser(torch.tensor([1.0, 2.0, 6.0]), unit_variance=False) == (1.0, -3.0)


def test_unit_variance_scales_too():
    # mean 3, population variance (4 + 1 + 9) / 3
    gain, bias = normaliser(torch.tensor([1.0, 2.0, 6.0]), unit_variance=True)
    assert gain == pytest.approx((3 / 14) ** 0.5)
    assert bias == pytest.approx(-3 * gain)


def test_demonstrations_that_all_score_the_same_are_only_shifted():
    assert normaliser(torch.tensor([2.0, 2.0]), unit_variance=True) == (1.0, -2.0)


# --- the loop


class FakeLearner:
    """Scores a sequence by a number that belongs to its last token; records what it is asked."""

    def __init__(self, score) -> None:
        self.score = score
        self.steps: list[tuple] = []
        self.scale = (1.0, 0.0)

    async def ranking_step(self, name, groups, ranks, normaliser, max_tokens, lr):
        self.steps.append((groups, ranks, normaliser, lr))
        return {"pairs": 4.0, "correct": 3.0, "log_loss": 2.0, "grad_norm": 0.5}

    async def last_values(self, name, sequences, max_tokens):
        gain, bias = self.scale
        return torch.tensor([gain * self.score(ids[-1]) + bias for ids in sequences])

    async def normalise(self, name, gain, bias):
        self.scale = (gain, bias)


def train(learner, groups, settings, demonstrations=((1, 104), (1, 106))):
    logged = []
    found = asyncio.run(reward_modeling(learner, groups, demonstrations, settings, lambda *line: logged.append(line)))
    return found, logged


def test_each_epoch_takes_every_training_prompt_once_with_all_its_completions():
    groups = [group(i, ranks=(0, 1, 1, 2)) for i in range(8)]
    learner = FakeLearner(lambda token: -float(token))
    settings = config(epochs=2, normaliser="all", optimizer=OptimizerConfig(lr=1.0))
    _, logged = train(learner, groups, settings)
    training, _ = split_groups(groups, settings)  # 6 prompts: batches of 4 and 2
    assert [len(step[0]) for step in learner.steps] == [4, 2, 4, 2]
    for epoch in (learner.steps[:2], learner.steps[2:]):
        seen = [sequences for step in epoch for sequences in step[0]]
        assert sorted(seen) == sorted(one.sequences for one in training)
        assert all(ranks == (0, 1, 1, 2) for step in epoch for ranks in step[1])
    assert {step[2] for step in learner.steps} == {"all"}
    assert [step[3] for step in learner.steps] == pytest.approx([1.0, 0.868198, 0.55, 0.231802], abs=1e-6)
    assert logged[0] == (
        "reward",
        1,
        {
            "reward_model/loss": 0.5,
            "reward_model/batch_accuracy": 0.75,
            "reward_model/grad_norm": 0.5,
            "reward_model/lr": 1.0,
            "progress/total": 4.0,
        },
    )


def test_the_result_is_measured_on_held_out_prompts_after_normalising():
    learner = FakeLearner(lambda token: 100.0 - token)  # better ranks score higher
    found, logged = train(learner, [group(i, ranks=(0, 1, 2)) for i in range(8)], config())
    assert learner.scale == (1.0, 5.0)  # demonstrations score -4 and -6
    assert (found.prompts, found.pairs, found.accuracy) == (2, 6, 1.0)
    assert found.longer_wins == 0.0  # a worse completion is a longer one here
    assert logged[-1] == ("reward", 2, {"reward_model/accuracy": 1.0, "reward_model/longer_wins": 0.0})


def test_ties_form_no_pair():
    learner: Any = FakeLearner(lambda token: 100.0 - token)
    found = asyncio.run(held_out_agreement(learner, [group(0, (0, 0)), group(1, (0, 1, 1)), group(2, (1, 1))], 64))
    assert (found.prompts, found.pairs) == (1, 2)


def test_held_out_prompts_that_are_all_tied_are_an_error():
    learner: Any = FakeLearner(float)
    with pytest.raises(ValueError, match="no pair to measure accuracy on"):
        asyncio.run(held_out_agreement(learner, [group(0, (0, 0))], 64))


# --- a real model


GOOD = 42


def preference(number: int) -> RankedGroup:
    """Four random completions of random lengths; the more often one says GOOD, the better it is."""
    dice = random.Random(number)
    query = tokens(4, 2000 + number)
    times = [dice.randint(0, 2) for _ in range(4)]
    responses = []
    for k, count in enumerate(times):
        response = [one for one in tokens(dice.randint(4, 8), 10 * number + k) if one != GOOD]
        for _ in range(count):
            response[dice.randrange(len(response))] = GOOD
        responses.append((*response, 2))
    said = [response.count(GOOD) for response in responses]
    order = sorted(set(said), reverse=True)
    return RankedGroup(
        sequences=tuple(query + response for response in responses),
        ranks=tuple(order.index(count) for count in said),
        response_lengths=tuple(map(len, responses)),
    )


@pytest.mark.parametrize("network", [NetworkConfig(dtype="float32"), NetworkConfig(lora_rank=8)])
def test_a_tiny_model_learns_a_preference_that_length_does_not_tell(learner, worker, folders, tmp_path, network):
    groups = [preference(number) for number in range(120)]
    demonstrations = [preference(1000 + number).sequences[0] for number in range(16)]
    settings = config(
        epochs=4, prompts_per_batch=12, network=network, optimizer=OptimizerConfig(lr=1e-2), valid_share=0.3
    )
    asyncio.run(learner.load("reward", "new_value", folders / "policy", network, settings.optimizer))
    found, logged = train(learner, groups, settings, demonstrations)
    assert found.pairs > 100
    assert 0.3 < found.longer_wins < 0.7
    assert found.accuracy > 0.85
    assert found.accuracy_ci[0] > max(found.longer_wins, 0.7)
    assert logged[-2][2]["reward_model/loss"] < 0.5 * 0.693
    values = asyncio.run(learner.last_values("reward", demonstrations, 256))
    assert values.mean().item() == pytest.approx(0.0, abs=1e-3)
    asyncio.run(learner.save("reward", tmp_path))
    stored = normalisation(load_reward_model(tmp_path, torch.float32))
    assert stored.gain == 1.0
    assert stored.bias == worker._engines["reward"].module.bias
