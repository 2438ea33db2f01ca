"""A learner for tests of publishing: a Hugging Face model in this process, and a sender of its weights."""

import asyncio
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.transfer import Bucket, Manifest, Rendezvous, TransferError
from learner.config import PublishConfig
from learner.weights.sender import WeightSender


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

    def train(self, size: float = 0.1) -> None:
        """Move every weight by noise of `size` of its tensor's spread."""
        with torch.no_grad():
            for weight in self.model.parameters():
                noise = torch.randn(weight.shape, generator=self._generator)
                weight += size * weight.std() * noise.to(weight.dtype)

    async def listen_transfer(self, world_size: int, epoch: int) -> Rendezvous:
        return self.sender.listen(world_size, epoch)

    async def connect_transfer(self) -> None:
        await asyncio.to_thread(self.sender.connect)

    async def transfer_manifest(self) -> Manifest:
        return self.sender.manifest(self.model.named_parameters())

    async def send_weights(self) -> dict[str, int]:
        named = list(self.model.named_parameters())
        return await asyncio.to_thread(self.sender.send, self.sender.manifest(named), named)

    async def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return [token_logprobs(self.model, sequence).tolist() for sequence in sequences]


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
