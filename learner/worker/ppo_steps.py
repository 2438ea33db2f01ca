"""One rank's part of a PPO iteration: what its networks say of a batch, and the steps of policy and critic.

Every rank is given the whole batch and takes its own share of it, so counts over the global batch are known without
communication, and all results are sums or zero-filled arrays that add up over ranks (`learner.worker.group` adds them).
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from actors.chat import ChatExample
from learner.data.batch import Batch
from learner.maths.losses import add_sums, policy_loss_sum, value_loss_sum
from learner.worker.loaded import LoadedNetworks
from learner.worker.supervised import backward_language_model, targets_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What the learner's networks say of a batch before it is trained on."""

    logprobs: Tensor
    """f32 [B, T] of the policy as it is now; 0 in the padding"""
    ref_logprobs: Tensor
    """f32 [B, T] of the reference policy; 0 in the padding"""
    values: Tensor
    """f32 [B, T] of the critic; 0 in the padding"""
    entropies: Tensor
    """f32 [B, T] of the policy's next-token distributions (nats); 0 in the padding"""

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return Evaluation(
            **{name: getattr(self, name) + getattr(other, name) for name in Evaluation.__dataclass_fields__}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What a PPO update learns from, beside the batch."""

    evaluation: Evaluation
    """log-probs and values from before the update"""
    advantages: Tensor
    """f32 [B, T], whitened"""
    returns: Tensor
    """f32 [B, T]"""
    weights: Tensor | None
    """f32 [B, T] importance weights of stale tokens, or None when every token is fresh"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOStep:
    """The constants of a PPO update that a rank needs."""

    clip: float
    """of the probability ratio"""
    value_clip: float | None
    """of the value's change; None does not clip it"""
    pretraining_coef: float
    """gamma of PPO-ptx; 0 leaves the pretraining term out"""
    temperature: float
    """sampling temperature, applied to the logits here too"""
    max_tokens: int
    """tokens of a micro-batch at most"""
    pretraining_max_tokens: int
    """the same for the pretraining text"""
    pretraining_normaliser: Literal["tokens", "sequences"]
    """what the pretraining loss, summed over tokens, is divided by the number of"""
    policy_lr: float
    """learning rate of the policy in this iteration"""
    critic_lr: float
    """learning rate of the critic in this iteration"""


def evaluate(
    networks: LoadedNetworks, batch: Batch, minibatches: Sequence[list[int]], max_tokens: int, temperature: float
) -> Evaluation:
    """Log-probs, reference log-probs, values and entropies, in the micro-batches that `update` will train on.

    The same cut makes the probability ratio of the first minibatch exactly 1.
    """
    found = {name: torch.zeros(batch.mask.shape) for name in Evaluation.__dataclass_fields__}
    networks.trunks.forget()
    with torch.no_grad():
        for rows, part in _parts(networks, batch, minibatches, max_tokens, "policy", "reference", "critic"):
            logprobs, entropies = _response_logprobs(networks, "policy", part, temperature)
            reference, _ = _response_logprobs(networks, "reference", part, temperature)
            answers = (logprobs, reference, _response_values(networks, part), entropies)
            for array, answer in zip(found.values(), answers, strict=True):
                array[rows, : part.mask.shape[1]] = answer.cpu()
    return Evaluation(**found)


def response_logprobs(networks: LoadedNetworks, name: str, batch: Batch, max_tokens: int, temperature: float) -> Tensor:
    """Log-probs of the response tokens by one network, f32 [B, T]; 0 in the padding and in other ranks' rows."""
    found = torch.zeros(batch.mask.shape)
    with torch.no_grad():
        for rows, part in _parts(networks, batch, [list(range(len(batch)))], max_tokens, name):
            found[rows, : part.mask.shape[1]] = _response_logprobs(networks, name, part, temperature)[0].cpu()
    return found


def probe_logprobs(networks: LoadedNetworks, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Teacher-forced log-probs of every token after the first, by the policy as it is now."""
    answers = []
    with torch.no_grad():
        for ids in sequences:
            row = torch.tensor(ids)
            logprobs, _ = networks.call("policy", [row], torch.arange(len(ids) - 1), row[1:])
            answers.append(logprobs.tolist())
    return answers


def policy_step(
    networks: LoadedNetworks,
    batch: Batch,
    targets: Targets,
    rows: list[int],
    text: Sequence[ChatExample],
    step: PPOStep,
) -> dict[str, float]:
    """One step of the policy on a minibatch and its pretraining text (InstructGPT eq. 2); its sums.

    The gradient is that of the clipped surrogate plus `pretraining_coef` times that of the language-model loss. Both
    are means over all tokens of the minibatch, whatever the ranks; the second may be a mean over sequences.
    """
    policy, tokens, sums = networks.engine("policy"), int(batch.mask[rows].sum()), {"loss/policy": 0.0}
    started = time.monotonic()
    for micro, part in _parts(networks, batch, [rows], step.max_tokens, "policy"):
        arrays = (targets.evaluation.logprobs, targets.advantages, targets.weights)
        old, advantages, weights = (_cut(array, micro, part, policy.device) for array in arrays)
        new, _ = _response_logprobs(networks, "policy", part, step.temperature)
        loss, stats = policy_loss_sum(new, old, advantages, part.mask.to(policy.device), step.clip, weights)
        policy.backward(loss / tokens)
        sums = add_sums([sums, {"tokens": part.mask.sum(), "loss/policy": loss.item(), **stats}])
    sums["time/policy"] = (time.monotonic() - started) / networks.world_size
    if step.pretraining_coef:
        started, gradient = time.monotonic(), policy.gradients()
        sums["grad_norm/policy"] = policy.norm(gradient) / networks.world_size
        targets_in_text = targets_of(text)
        sums["pretraining_tokens"] = targets_in_text / networks.world_size
        count = targets_in_text if step.pretraining_normaliser == "tokens" else len(text)
        sums["loss/pretraining"] = backward_language_model(
            networks, "policy", text, step.pretraining_max_tokens, step.pretraining_coef / count
        )
        difference = [both.sub_(first) for both, first in zip(policy.gradients(), gradient, strict=True)]
        sums["grad_norm/pretraining"] = policy.norm(difference) / networks.world_size
        sums["time/pretraining"] = (time.monotonic() - started) / networks.world_size
    return networks.step("policy", step.policy_lr, sums, "/policy")


def critic_step(
    networks: LoadedNetworks, batch: Batch, targets: Targets, rows: list[int], step: PPOStep
) -> dict[str, float]:
    """One step of the critic on a minibatch; its sums."""
    critic, tokens, sums = networks.engine("critic"), int(batch.mask[rows].sum()), {"loss/value": 0.0}
    started = time.monotonic()
    for micro, part in _parts(networks, batch, [rows], step.max_tokens, "critic"):
        arrays = (targets.evaluation.values, targets.returns)
        old, returns = (_cut(array, micro, part, critic.device) for array in arrays)
        mask = part.mask.to(critic.device)
        loss, stats = value_loss_sum(_response_values(networks, part), old, returns, mask, step.value_clip)
        critic.backward(loss / tokens)
        networks.trunks.forget(_response_places(part)[0])  # the last to read them in this epoch
        sums = add_sums([sums, {"value_tokens": part.mask.sum(), "loss/value": loss.item(), **stats}])
    sums["time/value"] = (time.monotonic() - started) / networks.world_size
    return networks.step("critic", step.critic_lr, sums, "/value")


def _parts(
    networks: LoadedNetworks, batch: Batch, minibatches: Sequence[list[int]], max_tokens: int, *names: str
) -> Iterator[tuple[list[int], Batch]]:
    """This rank's micro-batches of every minibatch, for the networks `names`: rows of the batch, and these rows."""
    lengths = batch.lengths.tolist()
    for rows in minibatches:
        for micro in networks.microbatches([lengths[row] for row in rows], max_tokens, *names):
            chosen = [rows[i] for i in micro]
            yield chosen, batch.rows(chosen)


def _response_logprobs(networks: LoadedNetworks, name: str, part: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [b, T] of a micro-batch's response tokens, 0 in the padding."""
    sequences, places = _response_places(part)
    answers = networks.call(name, sequences, places, torch.cat(sequences)[places + 1], temperature, again=True)
    return tuple(_spread(answer, part.mask) for answer in answers)  # pyright: ignore[reportReturnType]


def _response_values(networks: LoadedNetworks, part: Batch) -> Tensor:
    """Values [b, T] of the states before each response token, 0 in the padding."""
    return _spread(networks.call("critic", *_response_places(part), again=True), part.mask)


def _response_places(part: Batch) -> tuple[list[Tensor], Tensor]:
    """The sequences, and where each response token's log-prob and value are read in them: one token before it."""
    rows, steps = part.mask.nonzero(as_tuple=True)
    starts = part.lengths.cumsum(0) - part.lengths
    sequences = [ids[:length] for ids, length in zip(part.ids, part.lengths.tolist(), strict=True)]
    return sequences, starts[rows] + part.query_len[rows] - 1 + steps


def _spread(answers: Tensor, mask: Tensor) -> Tensor:
    """[N] answers at the True places of mask [b, T], row by row; 0 elsewhere."""
    mask = mask.to(answers.device)
    return torch.zeros(mask.shape, device=answers.device, dtype=answers.dtype).masked_scatter(mask, answers)


def _cut(array: Tensor | None, rows: list[int], part: Batch, device: torch.device) -> Tensor:
    """The rows of a [B, T] array, as wide as the micro-batch."""
    return array[rows, : part.mask.shape[1]].to(device) if array is not None else None  # pyright: ignore
