"""The preset `instructgpt` held against the paper, value by value, with the place of each in it (arXiv 2203.02155)."""

from pathlib import Path
from typing import Any

import pytest

from actors.config import MissingEos
from cluster.config.load import PRESETS, compose, read_toml
from cluster.config.schema import Config

PRESET = compose(Config, read_toml(Config, PRESETS / "instructgpt.toml"))

PUBLISHED: dict[str, tuple[Any, str]] = {
    "sft.epochs": (2, "C.3"),
    "sft.batch_size": (32, "C.1"),
    "sft.pretraining_share": (0.1, "C.3: 10 %"),
    "sft.select": ("loss", "C.3: low loss on demonstrations and pretraining validation sets"),
    "sft.max_tokens": (2048, "C: context"),
    "sft.optimizer.lr": (5e-6, "C.3: 1.3B"),
    "sft.optimizer.beta1": (0.9, "C"),
    "sft.optimizer.beta2": (0.95, "C"),
    "baseline.epochs": (16, "C.1"),
    "baseline.batch_size": (32, "C.1"),
    "baseline.pretraining_share": (0.0, "C.1"),
    "baseline.residual_dropout": (0.2, "C.1"),
    "baseline.select": ("reward", "3.5: reward-model score on validation prompts"),
    "baseline.max_tokens": (2048, "C: context"),
    "baseline.optimizer.lr": (9.65e-6, "C.1: 1.3B"),
    "baseline.optimizer.beta1": (0.9, "C"),
    "baseline.optimizer.beta2": (0.95, "C"),
    "reward.epochs": (1, "C.2"),
    "reward.prompts_per_batch": (64, "C.2"),
    "reward.unit_variance": (False, "3.5, C.2: a bias"),
    "reward.optimizer.lr": (9e-6, "C.2"),
    "reward.optimizer.beta1": (0.9, "C"),
    "reward.optimizer.beta2": (0.95, "C"),
    "ppo.prompts_per_batch": (512, "C.4"),
    "ppo.minibatch_size": (64, "C.4"),
    "ppo.epochs": (1, "C.4: inner epochs"),
    "ppo.max_staleness": (0, "3.5: on policy"),
    "ppo.clip": (0.2, "C.4"),
    "ppo.discount": (1.0, "C.4: no discount"),
    "ppo.warmup_iterations": (10, "C.4"),
    "ppo.ema_decay": (0.992, "C.4"),
    "ppo.policy_optimizer.beta1": (0.9, "C"),
    "ppo.policy_optimizer.beta2": (0.95, "C"),
    "ppo.critic_optimizer.lr": (9e-6, "C.4: 1.3B and 6B"),
    "ppo.critic_optimizer.beta1": (0.9, "C"),
    "ppo.critic_optimizer.beta2": (0.95, "C"),
    "ppo.kl.coef": (0.02, "C.4"),
    "ppo.kl.target": (None, "C.4: fixed"),
    "ppo.pretraining.coef": (27.8, "C.4"),
    "ppo.pretraining.sequences_per_episode": (8.0, "C.4"),
    "ppo.pretraining.sequence_tokens": (2048, "C: context"),
    "rollout.samples_per_prompt": (1, "C.4"),
    "rollout.max_prompt_tokens": (1024, "C: prompts over 1k tokens are left out"),
    "rollout.max_new_tokens": (1024, "C: responses of 1k tokens at most"),
    "rollout.temperature": (1.0, "C.4"),
    "generator.max_model_len": (2048, "C: context"),
}
UNPUBLISHED: dict[str, tuple[Any, str]] = {
    "sft.residual_dropout": (0.2, "that of the baseline"),
    "sft.mask_prompt": (True, "responses only"),
    "baseline.mask_prompt": (True, "responses only"),
    "sft.optimizer.eps": (1e-5, "lm-human-preferences"),
    "baseline.optimizer.eps": (1e-5, "lm-human-preferences"),
    "reward.optimizer.eps": (1e-5, "lm-human-preferences"),
    "ppo.policy_optimizer.eps": (1e-5, "lm-human-preferences"),
    "ppo.critic_optimizer.eps": (1e-5, "lm-human-preferences"),
    "sft.optimizer.clip_grad_norm": (0.0, "off"),
    "baseline.optimizer.clip_grad_norm": (0.0, "off"),
    "reward.optimizer.clip_grad_norm": (0.0, "off"),
    "ppo.policy_optimizer.clip_grad_norm": (0.0, "off"),
    "ppo.critic_optimizer.clip_grad_norm": (0.0, "off"),
    "reward.normaliser": ("pairs", "whether ties shrink the divisor of eq. 1"),
    "ppo.policy_optimizer.lr": (8.05e-6, "within the sweep of E.9, 2.55e-6 to 2.55e-5"),
    "ppo.pretraining.normaliser": ("tokens", "how the two terms of PPO-ptx are weighed"),
    "sft.optimizer.adam_style": ("torch", "where eps is added"),
    "ppo.policy_optimizer.adam_style": ("torch", "where eps is added"),
    "ppo.gae_lambda": (0.95, "Stiennon et al. 2020"),
    "ppo.value_clip": (0.2, "lm-human-preferences"),
    "ppo.whiten_rewards": (False, "lm-human-preferences whitens"),
    "rollout.missing_eos": (MissingEos(rule="replace", value=-1.0), "score of a response without an EOS"),
}


def value(key: str) -> Any:
    found: Any = PRESET
    for part in key.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("key", PUBLISHED)
def test_the_preset_has_the_papers_value(key: str):
    expected, place = PUBLISHED[key]
    assert value(key) == expected, f"{key}: paper, {place}"


@pytest.mark.parametrize("key", UNPUBLISHED)
def test_what_the_paper_does_not_publish_is_what_the_docs_say(key: str):
    expected, why = UNPUBLISHED[key]
    assert value(key) == expected, f"{key}: {why}"


def test_256_thousand_episodes():
    episodes = PRESET.ppo.iterations * PRESET.ppo.prompts_per_batch * PRESET.rollout.samples_per_prompt
    assert episodes == 256_000  # C.4, "256k"
    assert PRESET.ppo.prompts_per_batch * PRESET.rollout.samples_per_prompt / PRESET.ppo.minibatch_size == 8  # C.4


def test_prompts_of_a_comparison_are_answered_four_to_nine_times():
    assert 4 <= PRESET.sample.completions_per_prompt <= 9  # 3.5


def test_the_policys_rate_is_within_the_papers_sweep():
    assert 2.55e-6 <= PRESET.ppo.policy_optimizer.lr <= 2.55e-5  # E.9
    assert PRESET.ppo.policy_optimizer.lr <= 8.05e-6  # E.9: above it PPO without the mix diverged


def test_the_docs_name_what_the_paper_does_not_publish():
    page = (Path(__file__).parents[3] / "docs" / "algorithm.md").read_text(encoding="utf-8")
    section = page.split("## What the paper does not publish")[1].split("\n## ")[0]
    for key in UNPUBLISHED:
        name = key.rsplit(".", 1)[-1]
        assert f"{name}`" in section, f"{key} is not in the list"
