"""One rank's part of the steps on examples that people wrote or ranked: language-model and K-wise ranking steps."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from actors.chat import ChatExample
from learner.maths.losses import add_sums, kwise_loss, lm_loss_sum
from learner.worker.dropout import training_mode
from learner.worker.loaded import LoadedNetworks
from learner.worker.networks import ValueNetwork
from reward_server.model import Normalisation, set_normalisation


def language_model_loss(
    networks: LoadedNetworks, name: str, examples: Sequence[ChatExample], max_tokens: int
) -> dict[str, float]:
    """Sum of negative log-likelihood (nats) over this rank's share of `examples`."""
    with torch.no_grad():
        micro = networks.microbatches([len(e.ids) for e in examples], max_tokens, name)
        return {"nll": sum((_nll(networks, name, [examples[i] for i in rows]).item() for rows in micro), 0.0)}


def language_model_step(
    networks: LoadedNetworks, name: str, examples: Sequence[ChatExample], max_tokens: int, lr: float
) -> dict[str, float]:
    """One optimizer step on the mean negative log-likelihood over all targets of `examples`, dropout on."""
    with training_mode(networks.module(name)):
        total = backward_language_model(networks, name, examples, max_tokens, 1.0 / targets_of(examples))
    return networks.step(name, lr, {"nll": total})


def backward_language_model(
    networks: LoadedNetworks, name: str, examples: Sequence[ChatExample], max_tokens: int, scale: float
) -> float:
    """Add the gradient of the summed negative log-likelihood times `scale`; returns this rank's share of the sum."""
    total = 0.0
    for micro in networks.microbatches([len(e.ids) for e in examples], max_tokens, name):
        loss = _nll(networks, name, [examples[i] for i in micro])
        networks.engine(name).backward(loss * scale)
        total += loss.item()
    return total


def ranking_step(
    networks: LoadedNetworks,
    name: str,
    groups: Sequence[Sequence[tuple[int, ...]]],
    ranks: Sequence[Sequence[int]],
    weights: Sequence[float],
    normaliser: Literal["pairs", "all"],
    max_tokens: int,
    lr: float,
) -> dict[str, float]:
    """One optimizer step of the K-wise loss: all completions of a prompt in one batch element, one forward each.

    The loss is the mean over the rankings that have a pair, by their weights: only the weights' ratios matter.
    """
    total = sum(weight for weight, r in zip(weights, ranks, strict=True) if len(set(r)) > 1) or 1.0
    sums: dict[str, float] = {"loss": 0.0}
    for micro in networks.microbatches([sum(map(len, g)) for g in groups], max_tokens, name):
        scores = _last_values(networks, name, [ids for i in micro for ids in groups[i]])
        group = torch.tensor([i for i in micro for _ in groups[i]], device=scores.device)
        order = torch.tensor([rank for i in micro for rank in ranks[i]], device=scores.device)
        by = scores.new_tensor([weights[i] for i in micro for _ in groups[i]])
        loss, _, stats = kwise_loss(scores, group, order, normaliser, by)
        networks.engine(name).backward(loss / total)
        sums = add_sums([sums, {"loss": loss.item(), **stats}])
    return networks.step(name, lr, sums)


def last_values(networks: LoadedNetworks, name: str, sequences: Sequence[tuple[int, ...]], max_tokens: int) -> Tensor:
    """Value at the last token of each sequence, f32 [N], 0 for those that are another rank's."""
    values = torch.zeros(len(sequences))
    with torch.no_grad():
        for micro in networks.microbatches([len(s) for s in sequences], max_tokens, name):
            values[micro] = _last_values(networks, name, [sequences[i] for i in micro]).cpu()
    return values


def normalise(networks: LoadedNetworks, name: str, gain: float, bias: float) -> None:
    """Store the reward model's normalisation with it."""
    network = networks.module(name)
    assert isinstance(network, ValueNetwork), name
    network.gain, network.bias = gain, bias
    set_normalisation(network.model, Normalisation(gain=gain, bias=bias))


def targets_of(examples: Sequence[ChatExample]) -> int:
    """How many tokens of the examples are trained."""
    return sum(sum(example.loss_mask) for example in examples)


def _nll(networks: LoadedNetworks, name: str, examples: Sequence[ChatExample]) -> Tensor:
    sequences = [torch.tensor(e.ids) for e in examples]
    ends = torch.tensor([trained for e in examples for trained in e.loss_mask]).nonzero()[:, 0]
    logprobs, _ = networks.call(name, sequences, ends - 1, torch.cat(sequences)[ends])
    return lm_loss_sum(logprobs, torch.ones_like(logprobs, dtype=torch.bool))


def _last_values(networks: LoadedNetworks, name: str, sequences: Sequence[tuple[int, ...]]) -> Tensor:
    ends = torch.tensor([len(s) for s in sequences]).cumsum(0) - 1
    return networks.call(name, [torch.tensor(s) for s in sequences], ends)
