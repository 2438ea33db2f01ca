"""Step 2 of InstructGPT: a reward model from ranked completions (paper section 3.5, eq. 1)."""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from learner.config import RewardModelingConfig
from learner.data.corpora import split_held_out
from learner.maths.accuracy import PartAccuracy, RewardAccuracy, part_accuracy, reward_accuracy
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
    labeler: str | None = None
    """who ranked them"""
    control: bool | None = None
    """drawn at random, where others were chosen; None where nobody chose"""
    weight: float = 1.0
    """of this ranking in the loss, beside the others"""

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
        labeler=comparison.labeler,
        control=comparison.control,
    )


def item_numbers(groups: Sequence[RankedGroup]) -> list[int]:
    """Number, for each group, what it ranks, 0, 1, .. in their order: the same completions by different labelers.

    What nobody signed, or one labeler ranked again, is an item of its own.
    """
    items, before, numbers = dict[object, int](), Counter[object](), list[int]()
    for group in groups:
        completions = (group.family, tuple(sorted(group.sequences)))
        times = before[completions, group.labeler]
        before[completions, group.labeler] += 1
        item = (completions, times) if group.labeler is not None else len(numbers)
        numbers.append(items.setdefault(item, len(items)))
    return numbers


def weighed(groups: Sequence[RankedGroup], weights: Mapping[str, float]) -> list[RankedGroup]:
    """The groups with their weights in the loss, without those of labelers whose weight is 0.

    An item weighs as much as the labeler of it who weighs most (1 where no weight is given), and its rankings share
    that by their labelers' weights. Raises ValueError for a name that no group has, or when nothing is left.
    """
    names = sorted({group.labeler for group in groups if group.labeler is not None})
    if unknown := sorted(weights.keys() - {*names}):
        there = f"they are by {', '.join(names)}" if names else "they do not say who ranked"
        raise ValueError(f"reward.labeler_weights names {', '.join(unknown)}, who ranked no comparison: {there}")
    rows = [(group, weight) for group in groups if (weight := weights.get(group.labeler or "", 1.0)) > 0]
    if groups and not rows:
        raise ValueError("reward.labeler_weights leaves out every comparison: give some labeler a weight above 0")
    items, given = item_numbers([group for group, _ in rows]), defaultdict[int, list[float]](list)
    for item, (_, weight) in zip(items, rows, strict=True):
        given[item].append(weight)
    return [
        replace(group, weight=weight * max(given[item]) / sum(given[item]))
        for item, (group, weight) in zip(items, rows, strict=True)
    ]


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
                "reward",
                [group.sequences for group in batch],
                [group.ranks for group in batch],
                [group.weight for group in batch],
                config.normaliser,
                budget,
                lr,
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
    """Every optimizer step's prompts, each with all rankings of it; each epoch is a fresh shuffle of them."""
    items = defaultdict[int, list[RankedGroup]](list)
    for item, group in zip(item_numbers(train), train, strict=True):
        items[item].append(group)
    order, size = random.Random(config.seed + 1), config.prompts_per_batch
    epochs = [order.sample([*items.values()], len(items)) for _ in range(config.epochs)]
    steps = [epoch[start : start + size] for epoch in epochs for start in range(0, len(epoch), size)]
    return [[group for item in step for group in item] for step in steps]


async def held_out_accuracy(learner: LearnerGroup, groups: Sequence[RankedGroup], budget: int) -> RewardAccuracy:
    """How the reward model's scores agree with rankings that it was not trained on."""
    sequences = [s for group in groups for s in group.sequences]
    scores = await learner.last_values("reward", sequences, budget)
    numbers = torch.tensor([number for number, group in enumerate(groups) for _ in group.sequences])
    ranks = torch.tensor([rank for group in groups for rank in group.ranks])
    lengths = torch.tensor([length for group in groups for length in group.response_lengths])
    items = torch.tensor(item_numbers(groups))[numbers]

    def of(part: Sequence[bool]) -> PartAccuracy | None:
        return part_accuracy(scores, numbers, ranks, items, torch.tensor(part)[numbers], resamples=1000, seed=0)

    labelers = {group.labeler for group in groups}
    names = sorted(name for name in labelers if name is not None) if len(labelers) > 1 else []
    by_labeler = {name: of([group.labeler == name for group in groups]) for name in names}
    chosen = any(group.control is False for group in groups)
    return replace(
        reward_accuracy(scores, numbers, ranks, lengths, resamples=1000, seed=0, items=items),
        by_labeler={name: found for name, found in by_labeler.items() if found},
        control=of([group.control is True for group in groups]) if chosen else None,
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
        **({"reward_model/accuracy_control": found.control.accuracy} if found.control else {}),
    }


def _pairs(ranks: Sequence[int]) -> int:
    """How many pairs of these have different ranks."""
    tied = sum(count * (count - 1) for count in Counter(ranks).values())
    return (len(ranks) * (len(ranks) - 1) - tied) // 2
