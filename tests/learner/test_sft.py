"""Supervised fine-tuning: which examples make a batch, and what is learnt of them."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from actors.chat import ChatExample
from learner.config import BASELINE, NetworkConfig, OptimizerConfig, SFTConfig
from learner.progress import Progress
from learner.sft import HeldOutLoss, SFTData, best_epoch, sft, sft_batches
from tests.tiny_batches import example

DEMONSTRATIONS = [example(9, 4, seed) for seed in range(23)]
TEXT = [example(12, 1, 1000 + seed) for seed in range(5)]


def config(**settings) -> SFTConfig:
    return SFTConfig(**{"batch_size": 8, "pretraining_share": 0.0, "checkpoint_every": 0} | settings)


# --- batches


def test_every_demonstration_is_seen_once_an_epoch():
    epochs = sft_batches(DEMONSTRATIONS, [], config(epochs=3))
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[8, 8, 7]] * 3
    for epoch in epochs:
        assert Counter(id(one) for batch in epoch for one in batch) == Counter(map(id, DEMONSTRATIONS))


def test_epochs_are_shuffled_anew_and_by_the_seed_alone():
    first, again, other = (sft_batches(DEMONSTRATIONS, [], config(epochs=2, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[0] != first[1]


def texts_of(epochs):
    """How many texts each batch has."""
    return [sum(one in TEXT for one in batch) for epoch in epochs for batch in epoch]


@pytest.mark.parametrize(("share", "full"), [(0.1, {0, 1}), (0.25, {2}), (0.3, {2, 3}), (0.5, {4}), (0.875, {7})])
def test_a_share_of_the_batches_is_pretraining_text_exactly(share, full):
    epochs = sft_batches(DEMONSTRATIONS, TEXT, config(pretraining_share=share, epochs=10))
    batches = [batch for epoch in epochs for batch in epoch]
    assert all(len(batch) == 8 for epoch in epochs for batch in epoch[:-1])
    assert {sum(one in TEXT for one in batch) for batch in batches if len(batch) == 8} == full
    texts, examples = sum(texts_of(epochs)), sum(map(len, batches))
    assert abs(texts - share * examples) < 1
    demonstrations = [one for batch in batches for one in batch if one not in TEXT]
    assert Counter(map(id, demonstrations)) == Counter({id(one): 10 for one in DEMONSTRATIONS})
    assert all(one in DEMONSTRATIONS for one in (batch[0] for batch in batches))


def test_the_papers_tenth_of_32_is_three_or_four_texts_a_batch():
    demonstrations = [example(4, 1, seed) for seed in range(29 * 10)]
    texts = texts_of(sft_batches(demonstrations, TEXT, config(batch_size=32, pretraining_share=0.1, epochs=1)))
    assert texts[:10] == [3, 3, 4, 3, 3, 3, 3, 4, 3, 3]


def test_a_batch_too_small_for_one_text_still_gets_its_share():
    texts = texts_of(sft_batches(DEMONSTRATIONS[:18], TEXT, config(batch_size=2, pretraining_share=0.1, epochs=1)))
    assert sum(texts) == 2  # of 20
    assert max(texts) == 1


def test_text_is_used_up_before_any_of_it_is_repeated():
    epochs = sft_batches(DEMONSTRATIONS, TEXT, config(pretraining_share=0.5, epochs=2))
    used = [TEXT.index(one) for epoch in epochs for batch in epoch for one in batch if one in TEXT]
    assert [sorted(used[start : start + 5]) for start in range(0, 45, 5)] == [[0, 1, 2, 3, 4]] * 9
    assert used[:5] != used[5:10]


def test_without_text_the_whole_batch_is_demonstrations():
    (batches,) = sft_batches(DEMONSTRATIONS, [], config(pretraining_share=0.5, epochs=1))
    assert [len(batch) for batch in batches] == [8, 8, 7]


def test_a_share_that_leaves_no_demonstration_in_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"no room for a demonstration in a batch of 2: lower it, or raise batch_size"):
        config(batch_size=2, pretraining_share=0.9)
    assert config(batch_size=10, pretraining_share=0.9).batch_size == 10


def test_the_baseline_is_the_papers():
    assert (BASELINE.epochs, BASELINE.pretraining_share, BASELINE.residual_dropout) == (16, 0.0, 0.2)
    assert BASELINE.select == "reward"


# --- the loop


class FakeLearner:
    """Records its steps; its loss is the number of steps left."""

    def __init__(self) -> None:
        self.steps: list[tuple[list, float]] = []
        self.measured: list[list] = []

    async def language_model_loss(self, name, examples, max_tokens):
        assert (name, max_tokens) == ("policy", 4096)
        self.measured.append(examples)
        return len(examples) * (6.0 - len(self.steps))

    async def language_model_step(self, name, examples, max_tokens, lr):
        self.steps.append((examples, lr))
        return {"loss": 5.0, "grad_norm": 0.5}


def run(learner, data: SFTData, settings: SFTConfig):
    """(held-out losses, lines logged, epochs kept)"""
    logged, kept = [], []

    async def keep(epoch: int) -> None:
        kept.append((epoch, len(learner.steps) if isinstance(learner, FakeLearner) else 0))

    losses = asyncio.run(sft(learner, data, settings, Progress("warm", lambda *line: logged.append(line)), keep))
    return losses, logged, kept


def test_the_rate_falls_to_a_tenth_along_a_cosine_and_every_step_is_logged():
    learner: Any = FakeLearner()
    valid = [example(5, 2)]
    settings = config(epochs=1, batch_size=6, optimizer=OptimizerConfig(lr=1.0))  # 23 examples: 4 steps
    losses, logged, _ = run(learner, SFTData(demonstrations=DEMONSTRATIONS, valid=valid), settings)
    assert losses == [
        HeldOutLoss(demonstrations=6.0, pretraining=None),
        HeldOutLoss(demonstrations=2.0, pretraining=None),
    ]
    # .1 + .45 (1 + cos(pi s / 4))
    rates = [1.0, 0.868198, 0.55, 0.231802]
    assert [rate for _, rate in learner.steps] == pytest.approx(rates, abs=1e-6)
    assert [batch for batch, _ in learner.steps] == sft_batches(DEMONSTRATIONS, [], settings)[0]
    assert learner.measured == [valid, valid]
    assert logged[0] == ("warm", 0, {"warm/valid_loss": 6.0, "progress/total": 4.0})
    assert [(stage, step) for stage, step, _ in logged[1:5]] == [("warm", step) for step in (1, 2, 3, 4)]
    assert logged[1][2] == {"warm/loss": 5.0, "warm/lr": 1.0, "warm/grad_norm": 0.5, "progress/total": 4.0}
    assert logged[5] == ("warm", 4, {"warm/valid_loss": 2.0})


def test_each_epoch_is_measured_on_both_held_out_sets_and_can_be_kept():
    learner: Any = FakeLearner()
    data = SFTData(
        demonstrations=DEMONSTRATIONS[:16],
        valid=[example(5, 2)],
        pretraining=TEXT,
        pretraining_valid=[example(5, 1), example(6, 1)],
    )
    losses, logged, kept = run(learner, data, config(epochs=2))  # 2 steps an epoch
    assert [(loss.demonstrations, loss.pretraining) for loss in losses] == [(6.0, 12.0), (4.0, 8.0), (2.0, 4.0)]
    assert kept == [(1, 2), (2, 4)]
    measured = [(step, m) for _, step, m in logged if "warm/valid_loss" in m]
    assert measured[1:] == [
        (2, {"warm/valid_loss": 4.0, "warm/pretraining_valid_loss": 8.0}),
        (4, {"warm/valid_loss": 2.0, "warm/pretraining_valid_loss": 4.0}),
    ]


def test_the_best_epoch_has_the_lowest_sum_of_both_losses():
    def losses(*pairs):
        return [HeldOutLoss(demonstrations=one, pretraining=other) for one, other in pairs]

    assert best_epoch(losses((0.0, 0.0), (2.0, 3.0), (1.5, 3.2), (1.4, 3.6))) == 2
    assert best_epoch(losses((0.0, None), (2.0, None), (1.5, None), (1.5, None))) == 2


@pytest.mark.parametrize("network", [NetworkConfig(dtype="float32"), NetworkConfig(lora_rank=8)])
def test_a_tiny_model_learns_what_held_out_examples_share(learner, folders, network):
    def said(seed: int) -> ChatExample:
        """Any prompt, always the same reply."""
        ids = (*example(6, 1, seed).ids, 40, 41, 42, 2)
        return ChatExample(ids=ids, loss_mask=(False,) * 6 + (True,) * 4)

    settings = config(epochs=4, optimizer=OptimizerConfig(lr=1e-2))
    asyncio.run(learner.load("policy", "policy", folders / "policy", network, settings.optimizer))
    data = SFTData(demonstrations=[said(i) for i in range(32)], valid=[said(i) for i in range(100, 108)])
    held_out, logged, _ = run(learner, data, settings)
    losses = [metrics["warm/loss"] for *_, metrics in logged if "warm/loss" in metrics]
    before, after = held_out[0].demonstrations, held_out[-1].demonstrations
    assert len(losses) == 16
    assert before > 5  # log 320 = 5.8, and a little for the random weights
    assert after < 0.5 * before
    assert losses[-1] < 0.5 * losses[0]
