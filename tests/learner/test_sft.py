"""Supervised fine-tuning: which examples make a batch, and what is learnt of them."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from actors.chat import ChatExample
from learner.config import NetworkConfig, OptimizerConfig, SFTConfig
from learner.sft import sft, sft_batches
from tests.tiny_batches import example

DEMONSTRATIONS = [example(9, 4, seed) for seed in range(23)]
TEXT = [example(12, 1, 1000 + seed) for seed in range(5)]


def config(**settings) -> SFTConfig:
    return SFTConfig(**{"batch_size": 8, "pretraining_share": 0.0} | settings)


# --- batches


def test_every_demonstration_is_seen_once_an_epoch():
    batches = sft_batches(DEMONSTRATIONS, [], config(epochs=3))
    assert [len(batch) for batch in batches] == [8, 8, 7] * 3
    for epoch in range(3):
        seen = [one for batch in batches[3 * epoch : 3 * epoch + 3] for one in batch]
        assert Counter(map(id, seen)) == Counter(map(id, DEMONSTRATIONS))


def test_epochs_are_shuffled_anew_and_by_the_seed_alone():
    first, again, other = (sft_batches(DEMONSTRATIONS, [], config(epochs=2, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[:3] != first[3:]


@pytest.mark.parametrize(
    ("share", "texts", "sizes"), [(0.1, 1, [8, 8, 8, 3]), (0.25, 2, [8, 8, 8, 7]), (0.5, 4, [8, 8, 8, 8, 8, 7])]
)
def test_a_share_of_every_batch_is_pretraining_text(share, texts, sizes):
    batches = sft_batches(DEMONSTRATIONS, TEXT, config(pretraining_share=share))
    assert {sum(one in TEXT for one in batch) for batch in batches} == {texts}
    assert [len(batch) for batch in batches] == sizes * 2  # epochs
    demonstrations = [one for batch in batches for one in batch if one not in TEXT]
    assert Counter(map(id, demonstrations)) == Counter({id(one): 2 for one in DEMONSTRATIONS})


def test_without_text_the_whole_batch_is_demonstrations():
    batches = sft_batches(DEMONSTRATIONS, [], config(pretraining_share=0.5, epochs=1))
    assert [len(batch) for batch in batches] == [8, 8, 7]


def test_a_share_never_leaves_a_batch_without_demonstrations():
    batches = sft_batches(DEMONSTRATIONS, TEXT, config(batch_size=2, pretraining_share=0.9, epochs=1))
    assert [sum(one in DEMONSTRATIONS for one in batch) for batch in batches] == [1] * 23


# --- the loop


class FakeLearner:
    """Records its steps; its loss is the number of steps left."""

    def __init__(self) -> None:
        self.steps: list[tuple[list, float]] = []
        self.measured: list[list] = []

    async def language_model_loss(self, name, examples, max_tokens):
        assert (name, max_tokens) == ("policy", 4096)
        self.measured.append(examples)
        return 6.0 - len(self.steps)

    async def language_model_step(self, name, examples, max_tokens, lr):
        self.steps.append((examples, lr))
        return {"loss": 5.0, "grad_norm": 0.5}


def test_the_rate_falls_to_a_tenth_along_a_cosine_and_every_step_is_logged():
    learner: Any = FakeLearner()
    logged, valid = [], [example(5, 2)]
    settings = config(epochs=1, batch_size=6, optimizer=OptimizerConfig(lr=1.0))  # 23 examples: 4 steps
    found = asyncio.run(sft(learner, DEMONSTRATIONS, [], valid, settings, lambda *line: logged.append(line), "warm"))
    assert found == (6.0, 2.0)
    # .1 + .45 (1 + cos(pi s / 4))
    rates = [1.0, 0.868198, 0.55, 0.231802]
    assert [rate for _, rate in learner.steps] == pytest.approx(rates, abs=1e-6)
    assert [batch for batch, _ in learner.steps] == sft_batches(DEMONSTRATIONS, [], settings)
    assert learner.measured == [valid, valid]
    assert logged[0] == ("warm", 0, {"warm/valid_loss": 6.0, "progress/total": 4.0})
    assert [(stage, step) for stage, step, _ in logged[1:5]] == [("warm", step) for step in (1, 2, 3, 4)]
    assert logged[1][2] == {"warm/loss": 5.0, "warm/lr": 1.0, "warm/grad_norm": 0.5}
    assert logged[5] == ("warm", 4, {"warm/valid_loss": 2.0})


@pytest.mark.parametrize("network", [NetworkConfig(dtype="float32"), NetworkConfig(lora_rank=8)])
def test_a_tiny_model_learns_what_held_out_examples_share(learner, folders, network):
    def said(seed: int) -> ChatExample:
        """Any prompt, always the same reply."""
        ids = (*example(6, 1, seed).ids, 40, 41, 42, 2)
        return ChatExample(ids=ids, loss_mask=(False,) * 6 + (True,) * 4)

    settings = config(epochs=4, optimizer=OptimizerConfig(lr=1e-2))
    asyncio.run(learner.load("policy", "policy", folders / "policy", network, settings.optimizer))
    logged = []
    before, after = asyncio.run(
        sft(
            learner,
            [said(seed) for seed in range(32)],
            [],
            [said(seed) for seed in range(100, 108)],
            settings,
            lambda _, step, metrics: logged.append(metrics.get("sft/loss")),
        )
    )
    losses = [loss for loss in logged if loss is not None]
    assert len(losses) == 16
    assert before > 5  # log 320 = 5.8, and a little for the random weights
    assert after < 0.5 * before
    assert losses[-1] < 0.5 * losses[0]
