"""Step 1 of InstructGPT: supervised fine-tuning on demonstrations (paper section 3.5, appendix C.1)."""

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass

from actors.chat import ChatExample
from actors.prompts import Shuffle
from learner.config import SFTConfig
from learner.maths.schedules import cosine_to_tenth
from learner.progress import Progress, due
from learner.worker.group import LearnerGroup
from learner.worker.skipped_steps import SkippedSteps


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTData:
    """Encoded files of supervised fine-tuning."""

    demonstrations: Sequence[ChatExample]
    """what is learnt"""
    valid: Sequence[ChatExample]
    """held-out demonstrations"""
    pretraining: Sequence[ChatExample] = ()
    """text that is mixed in; empty when the share is 0"""
    pretraining_valid: Sequence[ChatExample] = ()
    """held-out text; empty when there is none, and then not measured"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutLoss:
    """What an epoch left of the losses on held-out data, nats a token."""

    demonstrations: float
    """of the held-out demonstrations"""
    pretraining: float | None
    """of the held-out pretraining text, where there is some"""

    @property
    def total(self) -> float:
        """The sum of both: "low loss on demonstrations and pretraining data" as one number to choose by."""
        return self.demonstrations + (self.pretraining or 0.0)


async def sft(
    learner: LearnerGroup,
    data: SFTData,
    config: SFTConfig,
    progress: Progress,
    keep: Callable[[int], Awaitable[None]],
) -> list[HeldOutLoss]:
    """Train the learner's "policy"; returns the held-out losses before (at 0) and after each epoch.

    `keep(epoch)` is awaited after each epoch, from 1, once its losses are known. Where `progress` says that steps are
    done, the learner has been given their checkpoint.
    """
    epochs, stage = sft_batches(data.demonstrations, data.pretraining, config), progress.stage
    batches = [(number, batch) for number, epoch in enumerate(epochs, start=1) for batch in epoch]
    steps, budget = len(batches), config.max_tokens_per_microbatch
    total, skipped_steps = {"progress/total": float(steps)}, SkippedSteps(stage, config.max_skipped_steps)
    losses = [HeldOutLoss(**loss) for loss in progress.state.get("losses", ())]
    if not losses:
        losses.append(await _held_out(learner, data, budget))
        progress.log(0, _named(stage, losses[0]) | total)
    for step, (number, batch) in enumerate(batches[progress.done :], start=progress.done + 1):
        with progress.unbroken() as stopping:
            lr = cosine_to_tenth(config.optimizer.lr, step - 1, steps)
            sums = await learner.language_model_step("policy", batch, budget, lr)
            found = {f"{stage}/{key}": sums[key] for key in ("loss", "grad_norm") if key in sums}
            progress.log(step, found | {f"{stage}/lr": lr} | total | skipped_steps.count(step, [sums]))
            if batch is epochs[number - 1][-1]:
                losses.append(await _held_out(learner, data, budget))
                progress.log(step, _named(stage, losses[-1]))
                await keep(number)
            if due(config.checkpoint_every, step, steps, stopping()):
                await progress.save(step, {"losses": [asdict(loss) for loss in losses]}, learner.save_state)
    return losses


def best_epoch(losses: Sequence[HeldOutLoss]) -> int:
    """The trained epoch of the lowest total loss, the earlier one of equals."""
    return min(range(1, len(losses)), key=lambda epoch: losses[epoch].total)


def sft_batches(
    demonstrations: Sequence[ChatExample], pretraining: Sequence[ChatExample], config: SFTConfig
) -> list[list[list[ChatExample]]]:
    """Every optimizer step's examples, epoch by epoch: each a fresh shuffle of the demonstrations.

    Of each batch `pretraining_share` is text. Where that is no whole number, what is missing or too much is made up
    for in the next batches, so that the share is exact over them. Text is not repeated before all of it was used.
    The last batch of an epoch may be smaller, so that every demonstration is seen once an epoch.
    """
    order, texts = random.Random(config.seed), Shuffle(size=len(pretraining), seed=config.seed)
    share = config.pretraining_share if pretraining else 0.0
    owed, used = 0.0, 0  # texts that earlier batches are short of, or have too many
    epochs: list[list[list[ChatExample]]] = []
    for _ in range(config.epochs):
        left, batches = order.sample(list(demonstrations), len(demonstrations)), []
        while left:
            wanted = min(owed + share * config.batch_size, (owed + share * len(left)) / (1.0 - share))
            count = min(int(wanted + 0.5), config.batch_size - 1)
            own, left = left[: config.batch_size - count], left[config.batch_size - count :]
            batches.append(own + [pretraining[texts[number][0]] for number in range(used, used + count)])
            owed, used = owed + share * len(batches[-1]) - count, used + count
        epochs.append(batches)
    return epochs


async def _held_out(learner: LearnerGroup, data: SFTData, budget: int) -> HeldOutLoss:
    return HeldOutLoss(
        demonstrations=await learner.language_model_loss("policy", data.valid, budget),
        pretraining=(
            await learner.language_model_loss("policy", data.pretraining_valid, budget)
            if data.pretraining_valid
            else None
        ),
    )


def _named(stage: str, loss: HeldOutLoss) -> dict[str, float]:
    text = {} if loss.pretraining is None else {f"{stage}/pretraining_valid_loss": loss.pretraining}
    return {f"{stage}/valid_loss": loss.demonstrations, **text}
