"""All ranks of the learner as one: a call goes to every rank, and what they return is added up."""

import asyncio
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from actors.chat import ChatExample
from actors.transfer import Manifest, Rendezvous
from learner.config import NetworkConfig, OptimizerConfig, PublishConfig
from learner.data.batch import Batch
from learner.worker.supervised import targets_of
from learner.worker.worker import Evaluation, PPOStep, Targets


class LearnerGroup:
    """Handles of one `LearnerWorker` a rank, whose methods are awaitable (remote, or in this process)."""

    def __init__(self, ranks: Sequence[Any]) -> None:
        self.ranks = ranks

    async def start(self, loopback: bool, deadline_s: float) -> None:
        """Let the ranks find each other, at an address of the first one's machine."""
        address, port = await self.ranks[0].meeting_point(loopback)
        await self._every("start", address, port, deadline_s)

    async def load(
        self,
        name: str,
        kind: Literal["policy", "value", "new_value"],
        path: Path,
        network: NetworkConfig,
        optimizer: OptimizerConfig | None = None,
        ema_decay: float | None = None,
        chat_template: str | None = None,
        residual_dropout: float = 0.0,
        frozen: bool = False,
    ) -> int:
        """Load a network on every rank (see Rank.load); returns how many of its parameters are trained."""
        settings = (network, optimizer, ema_decay, chat_template, residual_dropout, frozen)
        return (await self._every("load", name, kind, path, *settings))[0]

    async def unload(self) -> None:
        """Forget every network, to make room for the next step's."""
        await self._every("unload")

    async def language_model_loss(self, name: str, examples: Sequence[ChatExample], max_tokens: int) -> float:
        """Mean negative log-likelihood of the examples' targets, nats a token."""
        sums = added(await self._every("language_model_loss", name, examples, max_tokens))
        return sums["nll"] / targets_of(examples)

    async def language_model_step(
        self, name: str, examples: Sequence[ChatExample], max_tokens: int, lr: float
    ) -> dict[str, float]:
        """One optimizer step on the examples: "loss" (mean, nats a token) and "grad_norm", or that it was "skipped"."""
        sums = added(await self._every("language_model_step", name, examples, max_tokens, lr))
        if "nll" in sums:
            sums["loss"] = sums.pop("nll") / targets_of(examples)
        return sums

    async def ranking_step(
        self,
        name: str,
        groups: Sequence[Sequence[tuple[int, ...]]],
        ranks: Sequence[Sequence[int]],
        normaliser: Literal["pairs", "all"],
        max_tokens: int,
        lr: float,
    ) -> dict[str, float]:
        """One optimizer step of the K-wise ranking loss; sums over the batch."""
        return added(await self._every("ranking_step", name, groups, ranks, normaliser, max_tokens, lr))

    async def last_values(self, name: str, sequences: Sequence[tuple[int, ...]], max_tokens: int) -> Tensor:
        """Value at the last token of each sequence, f32 [N]."""
        return sum_of(await self._every("last_values", name, sequences, max_tokens))

    async def normalise(self, name: str, gain: float, bias: float) -> None:
        """Store a reward model's normalisation with it."""
        await self._every("normalise", name, gain, bias)

    async def evaluate(
        self, batch: Batch, minibatches: Sequence[list[int]], max_tokens: int, temperature: float
    ) -> Evaluation:
        """Log-probs, reference log-probs, values and entropies of the batch's response tokens."""
        by_rank = await self._every("evaluate", batch, minibatches, max_tokens, temperature)
        return reduce(Evaluation.__add__, by_rank)

    async def response_logprobs(self, name: str, batch: Batch, max_tokens: int, temperature: float) -> Tensor:
        """Log-probs of the batch's response tokens by one network, f32 [B, T]; 0 in the padding."""
        return sum_of(await self._every("response_logprobs", name, batch, max_tokens, temperature))

    async def update(
        self,
        batch: Batch,
        targets: Targets,
        minibatches: Sequence[list[int]],
        pretraining: Sequence[Sequence[ChatExample]],
        step: PPOStep,
    ) -> list[dict[str, float]]:
        """One PPO iteration's optimizer steps; sums of each minibatch."""
        by_rank = await self._every("update", batch, targets, minibatches, pretraining, step)
        return [added(minibatch) for minibatch in zip(*by_rank, strict=True)]

    async def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Teacher-forced log-probs of every token after the first, by the policy as it is now."""
        return (await self._every("probe_logprobs", sequences))[0]

    async def open_sender(self, config: PublishConfig) -> None:
        """Prepare to send weights."""
        await self.ranks[0].open_sender(config)

    async def listen_transfer(self, world_size: int, epoch: int) -> Rendezvous:
        """Open the meeting point of a transfer group."""
        return await self.ranks[0].listen_transfer(world_size, epoch)

    async def connect_transfer(self) -> None:
        """Meet the generators."""
        await self.ranks[0].connect_transfer()

    async def transfer_manifest(self) -> Manifest:
        """What will be sent."""
        return await self.ranks[0].transfer_manifest()

    async def send_weights(self) -> dict[str, int]:
        """Send the policy's weights to every generator; returns each tensor's checksum."""
        return (await self._every("send_weights"))[0]  # the other ranks hold partitions of them

    async def save(self, name: str, path: Path, ema: bool = False) -> None:
        """Write a network, or its moving average, as a Hugging Face folder."""
        await self._every("save", name, path, ema)

    async def save_state(self, folder: Path) -> None:
        """Write what training goes on from: of every trained network weights, optimizer, average, random numbers."""
        await self._every("save_state", folder)

    async def load_state(self, folder: Path, version: int) -> None:
        """Go on from `save_state`, after `load` of the same networks with the same configuration."""
        await self._every("load_state", folder, version)

    async def _every(self, method: str, *args: Any) -> list[Any]:
        return await asyncio.gather(*(getattr(rank, method)(*args) for rank in self.ranks))


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """Sum of the ranks' arrays, each zero where it is another rank's share."""
    return torch.stack(list(parts)).sum(0)


def added(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sum of dicts, key by key; of what is called max, the maximum."""
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: (max if key.endswith("/max") else sum)(part[key] for part in parts if key in part) for key in keys}
