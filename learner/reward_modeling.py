"""Step 2 of InstructGPT: a reward model from ranked completions (paper section 3.5, eq. 1)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.agreement import Agreement, agreement
from learner.config import RewardModelingConfig
from learner.group import LearnerGroup
from learner.schedules import cosine_to_tenth
from learner.sft import Log
from learner.skips import Skips
from reward_server.encoding import ChatEncoding
from reward_server.labeling import Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedGroup:
    """One prompt's completions in tokens."""

    sequences: tuple[tuple[int, ...], ...]
    """query ++ response, with the EOS where the response ended by itself; K of them"""
    ranks: tuple[int, ...]
    """0 is best, equal is a tie"""
    response_lengths: tuple[int, ...]
    """tokens of each response, for the "longer wins" baseline"""


def ranked_groups(comparisons: Sequence[Comparison], encoding: ChatEncoding) -> list[RankedGroup]:
    """Encode ranked comparisons. Raises ValueError naming a comparison that has no ranks."""
    groups = []
    for comparison in comparisons:
        if comparison.ranks is None:
            raise ValueError(f"comparison {comparison.id!r} has no ranks: rank it first (rayward rank)")
        query = encoding.prompt(comparison.prompt)
        responses = [
            encoding.response(text, ended) for text, ended in zip(comparison.responses, comparison.ended, strict=True)
        ]
        groups.append(
            RankedGroup(
                sequences=tuple(tuple(query + response) for response in responses),
                ranks=comparison.ranks,
                response_lengths=tuple(map(len, responses)),
            )
        )
    return groups


def split_groups(
    groups: Sequence[RankedGroup], config: RewardModelingConfig
) -> tuple[list[RankedGroup], list[RankedGroup]]:
    """(train, held out) by prompt."""
    order = random.Random(config.seed).sample(range(len(groups)), len(groups))
    held_out = max(1, round(config.valid_share * len(groups)))
    if held_out >= len(groups):
        raise ValueError(f"{len(groups)} comparisons are too few to hold some out: give at least 2 prompts")
    return [groups[i] for i in order[held_out:]], [groups[i] for i in order[:held_out]]


async def reward_modeling(
    learner: LearnerGroup,
    groups: Sequence[RankedGroup],
    demonstrations: Sequence[tuple[int, ...]],
    config: RewardModelingConfig,
    log: Log,
) -> Agreement:
    """Train the learner's "reward" network and normalise it; returns its agreement with held-out rankings.

    `demonstrations` are whole sequences (query ++ response ++ EOS) whose mean score becomes 0.
    """
    train, held_out = split_groups(groups, config)
    size, budget = config.prompts_per_batch, config.max_tokens_per_microbatch
    steps = config.epochs * -(-len(train) // size)
    order, step = random.Random(config.seed + 1), 0
    skips = Skips("reward", config.max_skipped_steps)
    for _ in range(config.epochs):
        shuffled = order.sample(train, len(train))
        for batch in (shuffled[start : start + size] for start in range(0, len(train), size)):
            lr = cosine_to_tenth(config.optimizer.lr, step, steps)
            sums = await learner.ranking_step(
                "reward", [g.sequences for g in batch], [g.ranks for g in batch], config.normaliser, budget, lr
            )
            step += 1
            measured = {**_batch_metrics(sums), **skips.count(step, [sums])}
            log("reward", step, {**measured, "reward_model/lr": lr, "progress/total": float(steps)})
    gain, bias = normaliser(await learner.last_values("reward", demonstrations, budget), config.unit_variance)
    await learner.normalise("reward", gain, bias)
    found = await held_out_agreement(learner, held_out, budget)
    log("reward", step, {"reward_model/accuracy": found.accuracy, "reward_model/longer_wins": found.longer_wins})
    return found


def normaliser(raw: Tensor, unit_variance: bool) -> tuple[float, float]:
    """(gain, bias) that give the raw scores of demonstrations mean 0, and standard deviation 1 if asked."""
    deviation = float(raw.double().std(correction=0))
    gain = 1.0 / deviation if unit_variance and deviation > 0 else 1.0
    return gain, -gain * float(raw.double().mean())


async def held_out_agreement(learner: LearnerGroup, groups: Sequence[RankedGroup], budget: int) -> Agreement:
    """How the reward model's scores agree with rankings that it was not trained on."""
    sequences = [s for group in groups for s in group.sequences]
    scores = await learner.last_values("reward", sequences, budget)
    return agreement(
        scores,
        torch.tensor([i for i, group in enumerate(groups) for _ in group.sequences]),
        torch.tensor([rank for group in groups for rank in group.ranks]),
        torch.tensor([length for group in groups for length in group.response_lengths]),
        resamples=1000,
        seed=0,
    )


def _batch_metrics(sums: dict[str, float]) -> dict[str, float]:
    if "skipped" in sums:
        return {}
    pairs = max(sums.get("pairs", 0.0), 1.0)
    return {
        "reward_model/loss": sums.get("log_loss", 0.0) / pairs,
        "reward_model/batch_accuracy": sums.get("correct", 0.0) / pairs,
        "reward_model/grad_norm": sums["grad_norm"],
    }
