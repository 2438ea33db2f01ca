"""Step 1 of InstructGPT: supervised fine-tuning on demonstrations (paper section 3.5, appendix C.1)."""

import random
from collections.abc import Sequence
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field

from actors.chat import ChatExample
from learner.engine import OptimizerConfig
from learner.group import LearnerGroup
from learner.networks import NetworkConfig
from learner.schedules import cosine_to_tenth


class SFTConfig(BaseModel):
    """Supervised fine-tuning, and language-model pretraining of a small model from scratch."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    epochs: int = Field(default=2, ge=1)
    """Passes over the demonstrations (paper: 16 for the baseline, 2 for the policy that PPO starts from)."""
    batch_size: int = Field(default=32, ge=1)
    """Demonstrations an optimizer step (paper: 32)."""
    pretraining_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of pretraining text among a batch's examples (paper: 10 % for the policy that PPO starts from)."""
    mask_prompt: bool = True
    """Learn the responses only; false learns the prompts too."""
    max_tokens: int = Field(default=1024, ge=2)
    """Longest example; a longer response is cut off and then has no EOS to learn."""
    max_tokens_per_microbatch: int = Field(default=4096, ge=1)
    """Padded tokens in one forward pass at most."""
    seed: int = 0
    """Order of the examples."""
    network: NetworkConfig = NetworkConfig()
    """What is trained."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=9.65e-6)
    """Adam; the learning rate falls to a tenth along a cosine."""


class Log(Protocol):
    """Where a loop's metrics go."""

    def __call__(self, stage: str, step: int, metrics: dict[str, float], /) -> None:
        """Record the metrics of one step."""
        ...


async def sft(
    learner: LearnerGroup,
    demonstrations: Sequence[ChatExample],
    pretraining: Sequence[ChatExample],
    valid: Sequence[ChatExample],
    config: SFTConfig,
    log: Log,
    stage: str = "sft",
) -> tuple[float, float]:
    """Train the learner's "policy" on demonstrations; returns the held-out loss (nats a token) before and after."""
    batches = sft_batches(demonstrations, pretraining, config)
    before = await learner.language_model_loss("policy", valid, config.max_tokens_per_microbatch)
    log(stage, 0, {f"{stage}/valid_loss": before, "progress/total": float(len(batches))})
    for step, batch in enumerate(batches):
        lr = cosine_to_tenth(config.optimizer.lr, step, len(batches))
        loss, norm = await learner.language_model_step("policy", batch, config.max_tokens_per_microbatch, lr)
        log(stage, step + 1, {f"{stage}/loss": loss, f"{stage}/lr": lr, f"{stage}/grad_norm": norm})
    after = await learner.language_model_loss("policy", valid, config.max_tokens_per_microbatch)
    log(stage, len(batches), {f"{stage}/valid_loss": after})
    return before, after


def sft_batches(
    demonstrations: Sequence[ChatExample], pretraining: Sequence[ChatExample], config: SFTConfig
) -> list[list[ChatExample]]:
    """Every optimizer step's examples: each epoch a fresh shuffle, pretraining text mixed into every batch.

    The last batch of an epoch may be smaller, so that every demonstration is seen once an epoch.
    """
    order = random.Random(config.seed)
    text = min(round(config.batch_size * config.pretraining_share), config.batch_size - 1) if pretraining else 0
    size = config.batch_size - text
    batches: list[list[ChatExample]] = []
    for _ in range(config.epochs):
        shuffled = order.sample(list(demonstrations), len(demonstrations))
        for start in range(0, len(shuffled), size):
            batches.append(shuffled[start : start + size] + order.choices(pretraining, k=text))
    return batches
