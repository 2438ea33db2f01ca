"""Step 1 of InstructGPT: supervised fine-tuning on demonstrations (paper section 3.5, appendix C.1)."""

import random
from collections.abc import Sequence
from typing import Protocol

from actors.chat import ChatExample
from learner.config import SFTConfig
from learner.group import LearnerGroup
from learner.schedules import cosine_to_tenth
from learner.skips import Skips


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
    skips = Skips(stage, config.max_skipped_steps)
    for step, batch in enumerate(batches):
        lr = cosine_to_tenth(config.optimizer.lr, step, len(batches))
        sums = await learner.language_model_step("policy", batch, config.max_tokens_per_microbatch, lr)
        found = {f"{stage}/{key}": sums[key] for key in ("loss", "grad_norm") if key in sums}
        log(stage, step + 1, {**found, f"{stage}/lr": lr, **skips.count(step + 1, [sums])})
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
