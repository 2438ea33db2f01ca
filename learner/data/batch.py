"""Trajectories as tensors, and how a batch is cut into minibatches and micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from actors.trajectory import Trajectory

NO_VERSION = -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """B trajectories, right padded to S tokens in all and T response tokens.

    Nothing is padded on the left: causal attention then needs no mask, and positions are 0, 1, .. as in the sampler.
    """

    ids: Tensor
    """i64[B, S] query ++ response, then the pad id"""
    query_len: Tensor
    """i64[B] tokens of the query, at least 1"""
    response_len: Tensor
    """i64[B] tokens of the response, its EOS included, at least 1"""
    ended: Tensor
    """bool[B] True where the response ended with an EOS"""
    score: Tensor
    """f32[B] score after the missing-EOS rule"""
    behaviour_logprobs: Tensor
    """f32[B, T] the sampler's log-probability of each response token, 0 at padding"""
    versions: Tensor
    """i64[B, T] weight version that sampled each response token, -1 at padding"""

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Tokens of query and response together, i64[B]."""
        return self.query_len + self.response_len

    @property
    def mask(self) -> Tensor:
        """True at the response tokens, bool[B, T]. Made of lengths: a token id says nothing about padding."""
        steps = torch.arange(self.versions.shape[1], device=self.ids.device)
        return steps < self.response_len[:, None]

    @property
    def positions(self) -> Tensor:
        """Index into S of the state that predicts response token t, i64[B, T]: query_len - 1 + t.

        Log-probabilities and values are both read there. At padding it stays on the last real token, so that
        it is always a legal index.
        """
        steps = torch.arange(self.versions.shape[1], device=self.ids.device)
        return (self.query_len[:, None] - 1 + steps).minimum(self.lengths[:, None] - 1)

    @property
    def response_ids(self) -> Tensor:
        """The response token that each of `positions` predicts, i64[B, T]; any legal id at padding."""
        following = (self.positions + 1).minimum(self.lengths[:, None] - 1)
        return self.ids.gather(1, following)

    def rows(self, indices: Sequence[int]) -> "Batch":
        """Take some rows, in the order given, without the padding that they do not need."""
        chosen = torch.as_tensor(indices, dtype=torch.long, device=self.ids.device)
        taken = {f.name: getattr(self, f.name)[chosen] for f in fields(self)}
        width = int((taken["query_len"] + taken["response_len"]).max())
        steps = int(taken["response_len"].max())
        taken["ids"] = taken["ids"][:, :width]
        for name in ("behaviour_logprobs", "versions"):
            taken[name] = taken[name][:, :steps]
        return Batch(**taken)

    def to(self, device: torch.device | str) -> "Batch":
        """Move every tensor to a device."""
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def collate(trajectories: Sequence[Trajectory], pad_id: int) -> Batch:
    """Make one batch of trajectories, in their order."""
    assert trajectories, "an empty batch has no width"
    completions = [trajectory.completion for trajectory in trajectories]
    assert all(c.response_ids for c in completions), "a response has at least its EOS"
    return Batch(
        ids=padded([c.query_ids + c.response_ids for c in completions], pad_id, torch.long),
        query_len=torch.tensor([len(c.query_ids) for c in completions]),
        response_len=torch.tensor([len(c.response_ids) for c in completions]),
        ended=torch.tensor([c.ended for c in completions]),
        score=torch.tensor([trajectory.score for trajectory in trajectories], dtype=torch.float32),
        behaviour_logprobs=padded([c.logprobs for c in completions], 0.0, torch.float32),
        versions=padded([c.versions for c in completions], NO_VERSION, torch.long),
    )


def padded(rows: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
    """[B, S] with `fill` to the right of each row."""
    out = torch.full((len(rows), max(map(len, rows))), fill, dtype=dtype)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=dtype)
    return out


def staleness(batch: Batch, version: int) -> dict[str, float]:
    """Return how far behind the learner's version the tokens are.

    Mean and maximum over trajectories, each as old as its oldest token; `staleness/age_n` is the share of all tokens
    that are n versions old, for each n up to the oldest; and the share of responses with tokens of several versions.
    """
    oldest = batch.versions.masked_fill(~batch.mask, torch.iinfo(torch.long).max).min(dim=1).values
    newest = batch.versions.masked_fill(~batch.mask, torch.iinfo(torch.long).min).max(dim=1).values
    age = version - oldest
    counts = torch.bincount((version - batch.versions)[batch.mask])
    return {
        "staleness/mean": age.float().mean().item(),
        "staleness/max": float(age.max()),
        "staleness/mixed": (newest > oldest).float().mean().item(),
        **{f"staleness/age_{n}": share for n, share in enumerate((counts / counts.sum()).tolist())},
    }


def minibatches(size: int, minibatch_size: int, seed: int) -> list[list[int]]:
    """Split 0..size-1 at random into disjoint minibatches, the same on every rank for one seed.

    Raises ValueError when the size is not a multiple of the minibatch size: every optimizer step is to weigh the same.
    """
    if minibatch_size < 1 or size % minibatch_size:
        raise ValueError(
            f"a batch of {size} trajectories cannot be split into minibatches of {minibatch_size}; "
            "choose a minibatch size that divides it"
        )
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[start : start + minibatch_size] for start in range(0, size, minibatch_size)]


def microbatches(
    lengths: Sequence[int], max_tokens: int, ranks: int, width: int | None = None, padded: bool = False
) -> list[list[list[int]]]:
    """Split sequences into micro-batches for each rank: `result[rank][step]` is a list of indices.

    A micro-batch holds at most `max_tokens` tokens, with its padding if it is `padded`; a longer sequence stands alone.
    Every rank gets the same number of them, since each is a collective step that takes as long as its costliest: the
    longest sequence comes first, and each goes where it makes its step least longer. [] fills up where there are too
    few. A sequence costs its tokens and, where the hidden size `width` is given, attention's share, which grows with
    their square. Deterministic.
    """
    assert min(max_tokens, ranks) >= 1, (max_tokens, ranks)
    steps: list[list[_Micro]] = []
    roomy: list[list[_Micro]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        attention = length / (12 * width) if width else 0.0  # its multiplications beside all others
        cost = length * (1 + attention)
        least = [min(step, key=lambda micro: micro.cost) for step in roomy]
        fitting = [
            (max(0.0, micro.cost + cost - max(other.cost for other in step)), micro.cost, number)
            for number, (step, micro) in enumerate(zip(roomy, least, strict=True))
            if micro.fits(length, max_tokens, padded)
        ]
        if fitting:
            micro = least[min(fitting)[2]]
        else:
            roomy = [s for s, m in zip(roomy, least, strict=True) if m.fits(min(lengths), max_tokens, padded)]
            steps.append([_Micro() for _ in range(ranks)])
            roomy.append(steps[-1])
            micro = steps[-1][0]
        micro.indices.append(index)
        micro.cost += cost
        micro.tokens += length
        micro.longest = max(micro.longest, length)
    result: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for step in steps:  # the costliest to the rank that has had least
        least_first = sorted(range(ranks), key=lambda rank: load[rank])
        for rank, micro in zip(least_first, sorted(step, key=lambda micro: -micro.cost), strict=True):
            result[rank].append(micro.indices)
            load[rank] += micro.cost
    return result


@dataclass(slots=True)
class _Micro:
    """A micro-batch that is being filled."""

    indices: list[int] = field(default_factory=list)
    cost: float = 0.0
    tokens: int = 0
    longest: int = 0

    def fits(self, length: int, max_tokens: int, padded: bool) -> bool:
        tokens = (len(self.indices) + 1) * self.longest if padded else self.tokens + length
        return not self.indices or tokens <= max_tokens
