"""Step 2 of InstructGPT: a reward model from ranked completions (paper section 3.5, eq. 1)."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from learner.config import RewardModelingConfig
from learner.data.corpora import split_held_out
from learner.maths.accuracy import RewardAccuracy, reward_accuracy
from learner.maths.schedules import cosine_to_tenth
from learner.progress import Progress, due
from learner.worker.group import LearnerGroup
from learner.worker.skipped_steps import SkippedSteps
from reward_server.encoding import ChatEncoding
from reward_server.model import Normalisation
from reward_server.preferences.labeling import Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedGroup:
    """One prompt's completions in tokens."""

    sequences: tuple[tuple[int, ...], ...]
    """query ++ response, with the EOS where the response ended by itself; K of them"""
    ranks: tuple[int, ...]
    """0 is best, equal is a tie"""
    response_lengths: tuple[int, ...]
    """tokens of each response, for the "longer wins" baseline"""
    family: str
    """what it must not be parted from in a split: its conversation tree, else the text of its prompt"""

    @property
    def has_pair(self) -> bool:
        """Some completion is ranked above another; one alone, or all tied, teach nothing."""
        return len(set(self.ranks)) > 1

    @property
    def identical_pairs(self) -> int:
        """Pairs of completions with the same tokens and different ranks: no score can tell them apart."""
        ranks: dict[tuple[int, ...], list[int]] = {}
        for ids, rank in zip(self.sequences, self.ranks, strict=True):
            ranks.setdefault(ids, []).append(rank)
        return sum(map(_pairs, ranks.values()))


def ranked_group(comparison: Comparison, encoding: ChatEncoding) -> RankedGroup:
    """Encode a ranked comparison. Raises ValueError, naming it, without ranks or with more tokens than positions."""
    if comparison.ranks is None:
        raise ValueError(f"comparison {comparison.id!r} has no ranks: rank it first (rayward rank)")
    try:
        query = encoding.prompt(comparison.prompt)
    except ValueError as error:
        raise ValueError(f"comparison {comparison.id!r}: {error}") from error
    responses = [
        encoding.response(text, ended) for text, ended in zip(comparison.responses, comparison.ended, strict=True)
    ]
    longest = len(query) + max(map(len, responses))
    if encoding.positions and longest > encoding.positions:
        raise ValueError(
            f"comparison {comparison.id!r} has {longest} tokens, more than the {encoding.positions} positions of "
            f"{encoding.name}; shorten or remove it, or let data.max_bad_rows be as many as there are"
        )
    return RankedGroup(
        sequences=tuple(tuple(query + response) for response in responses),
        ranks=comparison.ranks,
        response_lengths=tuple(map(len, responses)),
        family=comparison.group or " ".join(map(str, query)),
    )


def split_groups(
    groups: Sequence[RankedGroup], config: RewardModelingConfig
) -> tuple[list[RankedGroup], list[RankedGroup]]:
    """(train, held out): groups of one prompt, or of one conversation tree, are on one side.

    Groups without a pair are in neither, since they teach and measure nothing; pairs of identical completions that are
    ranked differently are kept, and cost log 2 each. Raises ValueError when nothing is left to train on or to measure
    with.
    """
    useful = [group for group in groups if group.has_pair]
    return split_held_out(useful, lambda group: group.family, config.valid_share, config.seed)


async def reward_modeling(
    learner: LearnerGroup,
    groups: Sequence[RankedGroup],
    demonstrations: Sequence[tuple[int, ...]],
    config: RewardModelingConfig,
    progress: Progress,
) -> RewardAccuracy:
    """Train the learner's "reward" network and normalise it; returns its accuracy on held-out rankings.

    `demonstrations` are whole sequences (query ++ response ++ EOS) whose mean score becomes 0. Where `progress` says
    that steps are done, the learner has been given their checkpoint.
    """
    train, held_out = split_groups(groups, config)
    if not progress.done:
        progress.log(0, _data_metrics(groups, train, held_out))
    batches, budget = _batches(train, config), config.max_tokens_per_microbatch
    steps, skipped_steps = len(batches), SkippedSteps(progress.stage, config.max_skipped_steps)
    for step, batch in enumerate(batches[progress.done :], start=progress.done + 1):
        with progress.unbroken() as stopping:
            lr = cosine_to_tenth(config.optimizer.lr, step - 1, steps)
            sums = await learner.ranking_step(
                "reward", [g.sequences for g in batch], [g.ranks for g in batch], config.normaliser, budget, lr
            )
            measured = {**_batch_metrics(sums, len(batch)), **skipped_steps.count(step, [sums])}
            progress.log(step, {**measured, "reward_model/lr": lr, "progress/total": float(steps)})
            if due(config.checkpoint_every, step, steps, stopping()):
                await progress.save(step, {}, learner.save_state)
    scale = Normalisation.of(await learner.last_values("reward", demonstrations, budget), config.unit_variance)
    await learner.normalise("reward", scale.gain, scale.bias)
    found = await held_out_accuracy(learner, held_out, budget)
    progress.log(steps, _accuracy_metrics(found))
    return found


def _batches(train: Sequence[RankedGroup], config: RewardModelingConfig) -> list[list[RankedGroup]]:
    """Every optimizer step's prompts; each epoch is a fresh shuffle of them."""
    order, size = random.Random(config.seed + 1), config.prompts_per_batch
    epochs = [order.sample(train, len(train)) for _ in range(config.epochs)]
    return [epoch[start : start + size] for epoch in epochs for start in range(0, len(epoch), size)]


async def held_out_accuracy(learner: LearnerGroup, groups: Sequence[RankedGroup], budget: int) -> RewardAccuracy:
    """How the reward model's scores agree with rankings that it was not trained on."""
    sequences = [s for group in groups for s in group.sequences]
    scores = await learner.last_values("reward", sequences, budget)
    return reward_accuracy(
        scores,
        torch.tensor([i for i, group in enumerate(groups) for _ in group.sequences]),
        torch.tensor([rank for group in groups for rank in group.ranks]),
        torch.tensor([length for group in groups for length in group.response_lengths]),
        resamples=1000,
        seed=0,
    )


def _batch_metrics(sums: dict[str, float], prompts: int) -> dict[str, float]:
    if "skipped" in sums:
        return {}
    pairs = max(sums.get("pairs", 0.0), 1.0)
    return {
        "reward_model/loss": sums.get("log_loss", 0.0) / pairs,
        "reward_model/batch_accuracy": sums.get("correct", 0.0) / pairs,
        "reward_model/batch_prompt_accuracy": sums.get("prompt_accuracy", 0.0) / prompts,
        "reward_model/grad_norm": sums["grad_norm"],
    }


def _data_metrics(
    groups: Sequence[RankedGroup], train: Sequence[RankedGroup], held_out: Sequence[RankedGroup]
) -> dict[str, float]:
    counts = {
        "train": len(train),
        "held_out": len(held_out),
        "without_pair": len(groups) - len(train) - len(held_out),
        "identical_pairs": sum(group.identical_pairs for group in groups),
    }
    return {f"comparisons/{name}": float(count) for name, count in counts.items()}


def _accuracy_metrics(found: RewardAccuracy) -> dict[str, float]:
    names = ("accuracy", "prompt_accuracy", "log_loss", "calibration_error", "longer_wins", "score_std")
    intervals = {"accuracy": found.accuracy_ci, "prompt_accuracy": found.prompt_accuracy_ci}
    return {
        **{f"reward_model/{name}": getattr(found, name) for name in names},
        **{f"reward_model/{name}_low": low for name, (low, _) in intervals.items()},
        **{f"reward_model/{name}_high": high for name, (_, high) in intervals.items()},
        **{f"reward_model/accuracy_gap_{one.gap}": one.accuracy for one in found.by_rank_gap},
    }


def _pairs(ranks: Sequence[int]) -> int:
    """How many pairs of these have different ranks."""
    tied = sum(count * (count - 1) for count in Counter(ranks).values())
    return (len(ranks) * (len(ranks) - 1) - tied) // 2
