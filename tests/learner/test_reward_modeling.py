"""Reward modelling: encoding and splitting comparisons, the loop, the normalisation, and a preference learnt."""

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from learner.config import NetworkConfig, OptimizerConfig, RewardModelingConfig
from learner.progress import Progress
from learner.reward_modeling import (
    RankedGroup,
    held_out_accuracy,
    item_numbers,
    ranked_group,
    reward_modeling,
    split_groups,
    weighed,
)
from reward_server.model import load_reward_model, normalisation
from reward_server.preferences.labeling import Comparison
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
        family=str(number),
    )


def config(**settings) -> RewardModelingConfig:
    return RewardModelingConfig(**{"prompts_per_batch": 4, "valid_share": 0.25, "checkpoint_every": 0} | settings)


# --- from comparisons to groups


def test_completions_are_encoded_after_their_prompt_with_an_eos_only_where_they_ended():
    comparison = Comparison(id="x", prompt=ASK, responses=("b", "cc"), ended=(True, False), ranks=(1, 0), labeler=None)
    found = ranked_group(comparison, ENCODING)
    query = (USER, 4, ASSISTANT)
    assert found.sequences == ((*query, 5, EOS), (*query, 6, 6))
    assert found.ranks == (1, 0)
    assert found.response_lengths == (2, 2)


def test_a_comparison_without_ranks_is_an_error_that_names_it():
    unranked = Comparison(id="row 7", prompt=ASK, responses=("b", "c"), ended=(True, True), ranks=None, labeler=None)
    with pytest.raises(ValueError, match=r"'row 7' has no ranks: rank it first"):
        ranked_group(unranked, ENCODING)


def test_whole_prompts_are_held_out_by_the_seed():
    groups = [group(i) for i in range(8)]
    train, held_out = split_groups(groups, config(seed=3))
    assert (len(train), len(held_out)) == (6, 2)
    assert train == [one for one in groups if one not in held_out]
    assert sorted(map(groups.index, train + held_out)) == list(range(8))
    assert split_groups(groups, config(seed=3)) == (train, held_out)
    assert any(split_groups(groups, config(seed=seed))[1] != held_out for seed in range(3))


def test_at_least_one_prompt_is_held_out_and_one_is_left():
    assert [len(part) for part in split_groups([group(0), group(1)], config(valid_share=0.01))] == [1, 1]
    with pytest.raises(ValueError, match=r"holding out 0.25 of 1 different items leaves none to train on"):
        split_groups([group(0)], config())
    with pytest.raises(ValueError, match=r"holding out 0.9 of 2 different items leaves none to train on"):
        split_groups([group(0), group(1)], config(valid_share=0.9))


def compared(prompt: str, number: int, group: str | None = None) -> Comparison:
    """A comparison of two completions that are its own."""
    ask = (Message(role="user", content=prompt),)
    responses = ("b" * number, "c" * number)
    return Comparison(
        id=str(number), prompt=ask, responses=responses, ended=(True, True), ranks=(0, 1), labeler=None, group=group
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_that_is_compared_twice_is_on_one_side(seed):
    comparisons = [compared("abcd"[number % 4], number + 1) for number in range(16)]
    train, held_out = split_groups([ranked_group(one, ENCODING) for one in comparisons], config(seed=seed))
    assert (len(train), len(held_out)) == (12, 4)
    queries = [{one.sequences[0][:3] for one in part} for part in (train, held_out)]
    assert not queries[0] & queries[1]


def test_comparisons_of_one_tree_are_on_one_side():
    """Different prompts, but the longer one holds a completion of the shorter."""
    comparisons = [compared("abcdefgh"[number], number + 1, group=f"tree {number // 4}") for number in range(8)]
    train, held_out = split_groups([ranked_group(one, ENCODING) for one in comparisons], config())
    assert (len(train), len(held_out)) == (4, 4)
    assert {one.family for one in train} ^ {one.family for one in held_out} == {"tree 0", "tree 1"}


def test_comparisons_that_teach_nothing_are_left_out():
    groups = [group(i) for i in range(4)] + [group(5, (0,)), group(6, (2, 2, 2))]
    train, held_out = split_groups(groups, config())
    assert sorted(one.family for one in train + held_out) == ["0", "1", "2", "3"]


def test_identical_completions_ranked_differently_are_kept():
    same = RankedGroup(
        sequences=((1, 5), (1, 6), (1, 5), (1, 5)), ranks=(0, 1, 1, 0), response_lengths=(1,) * 4, family="x"
    )
    assert same.identical_pairs == 2  # the third is worse than the first and the fourth, which say the same
    train, held_out = split_groups([same, group(1)], config())
    assert same in train + held_out


# --- labelers and their weights


def by(labeler: str | None, number: int, *ranks: int) -> RankedGroup:
    """A ranking of the two completions of prompt `number`."""
    return replace(group(number), ranks=ranks or (0, 1), labeler=labeler)


def test_an_item_is_what_different_labelers_ranked():
    rows = [by("p1", 0), by("p2", 1), by("p2", 0, 1, 0), by(None, 0), by(None, 0), by("p1", 0), by("p3", 1)]
    assert item_numbers(rows) == [0, 1, 0, 2, 3, 4, 1]  # what p1 ranked once more is an item of its own
    shuffled = replace(rows[2], sequences=rows[2].sequences[::-1])
    assert item_numbers([rows[0], shuffled]) == [0, 0]
    other = replace(rows[2], family="another")
    assert item_numbers([rows[0], other]) == [0, 1]


def test_without_weights_rankings_of_one_item_share_the_weight_of_one():
    rows = [by("p1", 0), by("p2", 0), by("p1", 1), by(None, 1), by("simulated:vader", 2), by("simulated:vader", 2)]
    assert [one.weight for one in weighed(rows, {})] == [0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
    alone = [group(i) for i in range(4)]
    assert weighed(alone, {}) == alone


def test_a_weight_of_zero_is_a_row_that_is_not_there_and_others_share_by_their_weights():
    rows = [by("p1", 0), by("p2", 0), by("p2", 1), by("p3", 2), by("p1", 2)]
    found = weighed(rows, {"p2": 0.0, "p3": 0.5})
    assert found == weighed([rows[0], rows[3], rows[4]], {"p3": 0.5})
    assert [(one.labeler, one.weight) for one in found] == [
        ("p1", 1.0),
        ("p3", pytest.approx(1 / 3)),  # the item weighs 1, as p1 does
        ("p1", pytest.approx(2 / 3)),
    ]
    assert [one.weight for one in weighed(rows[2:4], {"p2": 0.25, "p3": 2.0})] == [0.25, 2.0]


def test_weights_of_nobody_and_of_everybody_are_refused():
    with pytest.raises(ValueError, match=r"names bob, eve, who ranked no comparison: they are by p1, p2"):
        weighed([by("p2", 0), by("p1", 1)], {"bob": 1.0, "p1": 2.0, "eve": 0.0})
    with pytest.raises(ValueError, match=r"names p1, who ranked no comparison: they do not say who ranked"):
        weighed([group(0)], {"p1": 1.0})
    with pytest.raises(ValueError, match="leaves out every comparison"):
        weighed([by("p1", 0), by("p1", 1)], {"p1": 0.0})


@pytest.mark.parametrize("text", ["p1", "p1=", "p1=-1", "p1=inf", "=1", "p1=nan", "p1=half"])
def test_weights_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="must be names with weights of 0 or more, such as p1=0"):
        RewardModelingConfig(labeler_weights=text)


def test_weights_are_read_by_labeler():
    assert RewardModelingConfig().weights == {}
    assert RewardModelingConfig(labeler_weights=" p1=0.5, a=b=0 ,").weights == {"p1": 0.5, "a=b": 0.0}


def test_labeler_and_control_are_those_of_the_comparison():
    one = replace(compared("a", 1), labeler="p1", control=True)
    found = ranked_group(one, ENCODING)
    assert (found.labeler, found.control, found.weight) == ("p1", True, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_rankings_of_one_item_are_on_one_side(seed):
    rows = [by(labeler, number) for number in range(8) for labeler in ("p1", "p2", "p3")]
    train, held_out = split_groups(weighed(rows, {}), config(seed=seed))
    assert (len(train), len(held_out)) == (18, 6)
    assert not {one.family for one in train} & {one.family for one in held_out}


# --- the loop


class FakeLearner:
    """Scores a sequence by a number that belongs to its last token; records what it is asked."""

    def __init__(self, score) -> None:
        self.score = score
        self.steps: list[tuple] = []
        self.scale = (1.0, 0.0)

    async def ranking_step(self, name, groups, ranks, weights, normaliser, max_tokens, lr):
        self.steps.append((groups, ranks, normaliser, lr, weights))
        return {"pairs": 4.0, "correct": 3.0, "log_loss": 2.0, "prompt_accuracy": 2.5, "grad_norm": 0.5}

    async def last_values(self, name, sequences, max_tokens):
        gain, bias = self.scale
        return torch.tensor([gain * self.score(ids[-1]) + bias for ids in sequences])

    async def normalise(self, name, gain, bias):
        self.scale = (gain, bias)


def train(learner, groups, settings, demonstrations=((1, 104), (1, 106))):
    logged = []
    progress = Progress("reward", lambda *line: logged.append(line))
    found = asyncio.run(reward_modeling(learner, groups, demonstrations, settings, progress))
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
        0,
        {
            "comparisons/train": 6.0,
            "comparisons/held_out": 2.0,
            "comparisons/without_pair": 0.0,
            "comparisons/identical_pairs": 0.0,
        },
    )
    assert logged[1] == (
        "reward",
        1,
        {
            "reward_model/loss": 0.5,
            "reward_model/batch_accuracy": 0.75,
            "reward_model/batch_prompt_accuracy": 0.625,
            "reward_model/grad_norm": 0.5,
            "reward_model/lr": 1.0,
            "progress/total": 4.0,
        },
    )


def test_all_rankings_of_a_prompt_are_in_one_step():
    """Else a step would hold a prompt twice, or its half."""
    learner = FakeLearner(lambda token: -float(token))
    rows = [by(labeler, number) for labeler in ("p1", "p2") for number in range(8)]
    train(learner, weighed(rows, {}), config())
    assert [len(step[0]) for step in learner.steps] == [8, 4]  # 6 prompts: 4 and 2, with two rankings each
    for sequences, _, _, _, weights in learner.steps:
        assert sequences[::2] == sequences[1::2]
        assert set(weights) == {0.5}
    plain = FakeLearner(lambda token: -float(token))
    train(plain, rows[:8], config())
    assert [step[0] for step in plain.steps] == [step[0][::2] for step in learner.steps]


def test_accuracy_is_told_by_labeler_and_on_the_control_alone():
    learner: Any = FakeLearner(lambda token: 100.0 - token)
    rows = [by("p1", 0), by("p2", 0, 1, 0), by("p1", 1), by("p2", 2, 1, 1), by("p3", 3, 0, 0)]
    marked = [replace(one, control=number in (1, 2)) for number, one in enumerate(rows)]
    # p2 ranks the worse one, whose last token is larger, first: only in the first of two, as the other is a tie
    marked[1] = replace(marked[1], sequences=marked[0].sequences)
    found = asyncio.run(held_out_accuracy(learner, marked, 64))
    assert (found.pairs, found.prompts) == (3, 2)
    assert {name: (one.pairs, one.accuracy) for name, one in found.by_labeler.items()} == {
        "p1": (2, 1.0),
        "p2": (1, 0.0),
    }
    assert found.control is not None
    assert (found.control.pairs, found.control.prompts, found.control.accuracy) == (2, 2, 0.5)


def test_one_labeler_and_no_choice_have_no_parts():
    learner: Any = FakeLearner(lambda token: 100.0 - token)
    found = asyncio.run(held_out_accuracy(learner, [by("p1", 0), replace(by("p1", 1), control=True)], 64))
    assert (found.by_labeler, found.control) == ({}, None)


def test_the_result_is_measured_on_held_out_prompts_after_normalising():
    learner = FakeLearner(lambda token: 100.0 - token)  # better ranks score higher
    found, logged = train(learner, [group(i, ranks=(0, 1, 2)) for i in range(8)], config())
    assert learner.scale == (1.0, 5.0)  # demonstrations score -4 and -6
    assert (found.prompts, found.pairs, found.accuracy) == (2, 6, 1.0)
    assert found.longer_wins == 0.0  # a worse completion is a longer one here
    stage, step, metrics = logged[-1]
    assert (stage, step) == ("reward", 2)
    assert metrics == pytest.approx(
        {
            "reward_model/accuracy": 1.0,
            "reward_model/accuracy_low": 1.0,
            "reward_model/accuracy_high": 1.0,
            "reward_model/prompt_accuracy": 1.0,
            "reward_model/prompt_accuracy_low": 1.0,
            "reward_model/prompt_accuracy_high": 1.0,
            "reward_model/log_loss": found.log_loss,
            "reward_model/calibration_error": found.calibration_error,
            "reward_model/longer_wins": 0.0,
            "reward_model/score_std": (2 / 3) ** 0.5,  # of 5, 4 and 3
            "reward_model/accuracy_gap_1": 1.0,
            "reward_model/accuracy_gap_2": 1.0,
        }
    )


def test_prompts_may_have_different_numbers_of_completions():
    groups = [group(i, ranks=tuple(range(2 + i % 8))) for i in range(16)]  # K = 2 to 9
    learner = FakeLearner(lambda token: 100.0 - token)
    found, _ = train(learner, groups, config())
    taken = sum(len(sequences) for step in learner.steps for sequences in step[0])
    kept = [len(one.sequences) for one in split_groups(groups, config())[1]]
    assert taken == sum(len(one.sequences) for one in groups) - sum(kept)
    assert found.pairs == sum(count * (count - 1) // 2 for count in kept)


def test_ties_form_no_pair():
    learner: Any = FakeLearner(lambda token: 100.0 - token)
    found = asyncio.run(held_out_accuracy(learner, [group(0, (0, 0)), group(1, (0, 1, 1)), group(2, (1, 1))], 64))
    assert (found.prompts, found.pairs) == (1, 2)


def test_held_out_prompts_that_are_all_tied_are_an_error():
    learner: Any = FakeLearner(float)
    with pytest.raises(ValueError, match="no pair to measure accuracy on"):
        asyncio.run(held_out_accuracy(learner, [group(0, (0, 0))], 64))


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
        family=str(number),
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
    assert stored.bias == worker.networks.engine("reward").module.bias


def test_a_ranking_given_twice_teaches_what_it_teaches_once(learner, folders, tmp_path):
    """By two labelers who agree: two rows of half the weight."""
    groups = [replace(preference(number), labeler="p1") for number in range(24)]
    demonstrations = [preference(1000 + number).sequences[0] for number in range(4)]
    network, found = NetworkConfig(dtype="float32"), []
    settings = config(prompts_per_batch=6, network=network, optimizer=OptimizerConfig(lr=1e-3))
    for rows in (groups, [replace(one, labeler=name) for one in groups for name in ("p1", "p2")]):
        asyncio.run(learner.load("reward", "value", folders / "reward", network, settings.optimizer))
        accuracy, _ = train(learner, weighed(rows, {}), settings, demonstrations)
        values = asyncio.run(learner.last_values("reward", demonstrations, 256))
        found.append((values, accuracy.accuracy, accuracy.accuracy_ci, accuracy.prompt_accuracy))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert found[0][1:] == found[1][1:]
