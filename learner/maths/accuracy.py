"""How well scores agree with a labeler's rankings: ordered pairs, accuracy, calibration."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from learner.maths.intervals import bootstrap_interval

BIN_WIDTH = 0.5
"""Width of a calibration bin, in units of the score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """All pairs of completions of one prompt of which one is ranked better; tied completions form none."""

    winners: Int[Tensor, " p"]
    """Index of the better completion, in the flat order of the batch."""
    losers: Int[Tensor, " p"]
    """Index of the worse one."""
    prompts: Int[Tensor, " p"]
    """Prompt of the pair, numbered 0 .. n-1 over the prompts that have a pair."""
    pairs_per_prompt: Int[Tensor, " n"]
    """Number of pairs of each such prompt, at least 1."""
    completions_per_prompt: Int[Tensor, " n"]
    """Number of completions of each such prompt, at least 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Pairs whose absolute margin falls into one bin."""

    margin: float
    """Centre of the bin, in units of the score."""
    predicted: float
    """Mean of sigmoid(|margin|): how often the higher score should win."""
    observed: float
    """How often the higher score did win; equal scores count half."""
    count: int
    """Number of pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGap:
    """Pairs that lie equally many ranks apart."""

    gap: int
    """ranks between the better and the worse completion, at least 1"""
    accuracy: float
    """share of them whose better completion has the higher score"""
    count: int
    """number of pairs"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartAccuracy:
    """Scores held against rankings, or a part of them such as those of one labeler."""

    pairs: int
    """Number of ordered pairs."""
    prompts: int
    """Number of prompts with at least one."""
    accuracy: float
    """Share of pairs whose better completion has the higher score (equal scores count half), pooled."""
    accuracy_ci: tuple[float, float]
    """95 % bootstrap interval of `accuracy`, resampling prompts: the pairs of one prompt are correlated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardAccuracy(PartAccuracy):
    """Scores held against rankings, over the prompts that have an ordered pair."""

    prompt_accuracy: float
    """The same share within each prompt, averaged over prompts."""
    prompt_accuracy_ci: tuple[float, float]
    """95 % bootstrap interval of `prompt_accuracy`, resampling prompts."""
    log_loss: float
    """Mean over pairs of -log sigmoid(margin), nats; log 2 = 0.693 is what equal scores earn."""
    longer_wins: float
    """Accuracy of the rule "the longer completion wins": a score close to it may have learnt just that."""
    score_std: float
    """Standard deviation of the scores: the scale on which the KL coefficient of PPO has to be read."""
    by_rank_gap: tuple[RankGap, ...]
    """Accuracy by how many ranks apart a pair lies, the closest first."""
    bins: tuple[CalibrationBin, ...]
    """Calibration in bins of |margin|, lowest first, empty bins left out."""
    by_labeler: Mapping[str, PartAccuracy] = field(default_factory=dict)
    """The accuracy on the rankings of each labeler who has a pair; empty where all are by one."""
    control: PartAccuracy | None = None
    """The accuracy on what was drawn at random, where the rest was chosen for what reward models are unsure of."""

    @property
    def calibration_error(self) -> float:
        """Mean |predicted - observed| over the pairs, bin by bin; 0 is a reward model that means its margins."""
        return sum(abs(b.predicted - b.observed) * b.count for b in self.bins) / self.pairs


def ordered_pairs(group: Int[Tensor, " m"], ranks: Int[Tensor, " m"]) -> Pairs:
    """Pairs (winner, loser) of one group, the winner's rank the lower. Group ids may be any integers."""
    better = (group[:, None] == group[None, :]) & (ranks[:, None] < ranks[None, :])
    winners, losers = better.nonzero(as_tuple=True)
    present, prompts, pairs_per_prompt = group[winners].unique(return_inverse=True, return_counts=True)
    completions = (present[:, None] == group[None, :]).sum(dim=1)
    return Pairs(
        winners=winners,
        losers=losers,
        prompts=prompts,
        pairs_per_prompt=pairs_per_prompt,
        completions_per_prompt=completions,
    )


def pair_credit(margins: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """1 where the winner scores higher, 1/2 where both score the same, 0 where it scores lower."""
    return 0.5 * (1.0 + margins.detach().sign())


def sum_by_prompt(x: Float[Tensor, " p"], pairs: Pairs) -> Float[Tensor, " n"]:
    """Sum of a per-pair quantity within each prompt."""
    return x.new_zeros(len(pairs.pairs_per_prompt)).index_add(0, pairs.prompts, x)


def _by_item(
    credit: Float[Tensor, " p"], pairs: Pairs, items: Int[Tensor, " m"]
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """(credit, number of pairs) of each item: all rankings of it together, since they depend on each other."""
    index = items[pairs.winners].unique(return_inverse=True)[1]
    counts = index.bincount()
    return credit.new_zeros(len(counts)).index_add(0, index, credit), counts


def part_accuracy(
    scores: Float[Tensor, " m"],
    group: Int[Tensor, " m"],
    ranks: Int[Tensor, " m"],
    items: Int[Tensor, " m"],
    part: Bool[Tensor, " m"],
    resamples: int,
    seed: int,
) -> PartAccuracy | None:
    """The accuracy on the completions of a `part` alone, otherwise as `reward_accuracy`; None where it has no pair."""
    pairs = ordered_pairs(group[part], ranks[part])
    if len(pairs.winners) == 0:
        return None
    own = scores[part].detach().double()
    credit = pair_credit(own[pairs.winners] - own[pairs.losers])
    won, counts = _by_item(credit, pairs, items[part])
    return PartAccuracy(
        pairs=len(credit),
        prompts=len(won),
        accuracy=float(credit.mean()),
        accuracy_ci=bootstrap_interval(won, counts, resamples, seed),
    )


def calibration_bins(margins: Float[Tensor, " p"]) -> tuple[CalibrationBin, ...]:
    """Predicted against observed share of wins of the higher score, by absolute margin."""
    credit, distance = pair_credit(margins), margins.detach().abs()
    index = (distance / BIN_WIDTH).long()
    bins = []
    for number in index.unique().tolist():
        inside = index == number
        bins.append(
            CalibrationBin(
                margin=(number + 0.5) * BIN_WIDTH,
                predicted=float(distance[inside].sigmoid().mean()),
                observed=float(credit[inside].mean()),
                count=int(inside.sum()),
            )
        )
    return tuple(bins)


def reward_accuracy(
    scores: Float[Tensor, " m"],
    group: Int[Tensor, " m"],
    ranks: Int[Tensor, " m"],
    lengths: Int[Tensor, " m"],
    resamples: int,
    seed: int,
    items: Int[Tensor, " m"] | None = None,
) -> RewardAccuracy:
    """Everything reported about a reward model on ranked completions, `m` of them in all (see `RewardAccuracy`).

    `group` says whose prompt a completion answers, a lower rank is better, `lengths` are in tokens. Where several
    labelers ranked the same completions, each ranking is a group, and `items` says which of them are one prompt's.
    Raises ValueError when no prompt has two completions of different rank.
    """
    pairs = ordered_pairs(group, ranks)
    if len(pairs.winners) == 0:
        raise ValueError(
            f"none of the {len(scores)} completions is ranked above another of its prompt: there is no "
            "pair to measure accuracy on; provide comparisons with at least two different ranks"
        )
    scores = scores.detach().double()
    margins = scores[pairs.winners] - scores[pairs.losers]
    credit = pair_credit(margins)
    won, counts = _by_item(credit, pairs, group if items is None else items)
    by_prompt = won / counts
    gaps = ranks[pairs.losers] - ranks[pairs.winners]
    longer = (lengths[pairs.winners] - lengths[pairs.losers]).double()
    return RewardAccuracy(
        pairs=len(credit),
        prompts=len(won),
        accuracy=float(credit.mean()),
        accuracy_ci=bootstrap_interval(won, counts, resamples, seed),
        prompt_accuracy=float(by_prompt.mean()),
        prompt_accuracy_ci=bootstrap_interval(by_prompt, torch.ones_like(counts), resamples, seed),
        log_loss=float(softplus(-margins).mean()),
        longer_wins=float(pair_credit(longer).mean()),
        score_std=float(scores.std(correction=0)),
        by_rank_gap=tuple(
            RankGap(gap=gap, accuracy=float(credit[gaps == gap].mean()), count=int((gaps == gap).sum()))
            for gap in gaps.unique().tolist()
        ),
        bins=calibration_bins(margins),
    )
