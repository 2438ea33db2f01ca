"""A learner for tests of publishing: a Hugging Face model in this process, and a sender of its weights."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.transfer import Bucket, Manifest, Rendezvous, TransferError
from learner.config import PublishConfig
from learner.weights.sender import WeightSender
from learner.worker.networks import changing_weights

T = TypeVar("T")


def token_logprobs(model: PreTrainedModel, ids: Sequence[int], temperature: float = 1.0) -> Tensor:
    """log p(x_j | x_<j) of one sequence, j = 1 .. len-1, under softmax(logits / temperature)."""
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)])).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


class HfLearner:
    """What a Publisher asks of a learner, over one model."""

    def __init__(
        self, model: PreTrainedModel, config: PublishConfig, sender: type[WeightSender] = WeightSender
    ) -> None:
        self.model = model
        self.sender = sender(config.bucket_mb, config.deadline_s)
        self._generator = torch.Generator().manual_seed(0)
        self._thread = ThreadPoolExecutor(1)  # of the calls in their order, as in a rank's process

    def train(self, size: float = 0.1) -> None:
        """Move every weight that is not frozen by noise of `size` of its tensor's spread."""
        with torch.no_grad():
            for weight in filter(lambda weight: weight.requires_grad, self.model.parameters()):
                noise = torch.randn(weight.shape, generator=self._generator)
                weight += size * weight.std() * noise.to(weight.dtype)

    async def listen_transfer(self, world_size: int, epoch: int) -> Rendezvous:
        return await self._called(self.sender.listen, world_size, epoch)

    async def connect_transfer(self) -> None:
        await self._called(self.sender.connect)

    async def transfer_manifest(self) -> Manifest:
        return await self._called(self._manifest)

    async def send_weights(self) -> dict[str, int]:
        return await self._called(lambda: self.sender.send(self._manifest(), self.model.named_parameters()))

    async def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return [token_logprobs(self.model, sequence).tolist() for sequence in sequences]

    def _manifest(self) -> Manifest:
        return self.sender.manifest(self.model.named_parameters(), changing_weights(self.model))

    async def _called(self, method: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, method, *args)


class CorruptingSender(WeightSender):
    """Flips one bit of the first byte of every bucket, after its checksums were taken."""

    def _pack(
        self, manifest: Manifest, bucket: Bucket, tensors: Iterator[tuple[str, Tensor]], checksums: dict[str, int]
    ) -> Tensor:
        buffer = super()._pack(manifest, bucket, tensors, checksums)
        buffer[0] ^= 1
        return buffer


class DyingSender(WeightSender):
    """Leaves the group once the second bucket is due."""

    def _pack(
        self, manifest: Manifest, bucket: Bucket, tensors: Iterator[tuple[str, Tensor]], checksums: dict[str, int]
    ) -> Tensor:
        if checksums:
            raise TransferError("this sender gives up")
        return super()._pack(manifest, bucket, tensors, checksums)
