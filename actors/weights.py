"""The receiving side of a weight transfer, in the worker processes of vLLM's engine.

The engine imports this module by name (`worker_extension_cls`), which registers both transfer engines.
"""

import os
import select
import signal
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.engine import GENERATOR_PID
from actors.transfer import GlooGroup, Manifest, Rendezvous, checksum


@dataclass(kw_only=True)
class JoinInfo(WeightTransferInitInfo):
    """How a worker joins the transfer group, as vLLM carries it."""

    rendezvous: dict[str, Any]
    """The fields of a Rendezvous."""
    rank_offset: int
    """Rank of this engine's first worker."""


@dataclass(kw_only=True)
class ManifestInfo(WeightTransferUpdateInfo):
    """A Manifest, as vLLM carries it."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    bucket_bytes: int

    def manifest(self) -> Manifest:
        """The manifest as the learner made it."""
        return Manifest(
            names=tuple(self.names),
            dtypes=tuple(self.dtypes),
            shapes=tuple(map(tuple, self.shapes)),
            bucket_bytes=self.bucket_bytes,
        )


class GlooReceiver(WeightTransferEngine[JoinInfo, ManifestInfo]):
    """Receives over gloo and loads at the end, so that a broken transfer leaves the old weights in use."""

    init_info_cls = JoinInfo
    update_info_cls = ManifestInfo

    group: GlooGroup | None = None
    loaded: dict[str, int]
    checksums: dict[str, int]
    staged: list[tuple[str, Tensor]]

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        """Join the group; blocks until every member is there."""
        self.shutdown()
        config = self.parallel_config
        self.loaded = {}
        rank = init_info.rank_offset + config.data_parallel_index * config.world_size + config.rank
        self.group = GlooGroup(Rendezvous(**init_info.rendezvous), rank)

    def start_weight_update(self) -> None:
        """Forget whatever an earlier transfer left."""
        self.discard()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive all buckets. (The parent also synchronises an accelerator, which a CPU does not have.)"""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ManifestInfo) -> None:
        """Receive every bucket, and add up its checksums while the next one is on its way."""
        if self.group is None:
            raise RuntimeError("this engine has not joined a transfer group; call join first")
        manifest = update_info.manifest()
        buckets = list(manifest.buckets())
        buffers = [torch.empty(bucket.size, dtype=torch.uint8) for bucket in buckets]
        works = [self.group.broadcast(buffer) for buffer in buffers]
        for number, (bucket, buffer, work) in enumerate(zip(buckets, buffers, works, strict=True), start=1):
            self.group.wait(work, f"bucket {number} of {len(buckets)} from the learner")
            for name, tensor in manifest.unpack(bucket, buffer):
                self.checksums[name] = checksum(tensor)
                self.staged.append((name, tensor))

    def finish_weight_update(self) -> None:
        """Load what was received; the other weights stay as they are."""
        if not self.staged:
            return
        # Kernels on a CPU keep packed copies: only a layer-wise reload knows how to make them again.
        model: Any = self.model
        initialize_layerwise_reload(model)
        model.load_weights(self.staged)
        finalize_layerwise_reload(model, self.model_config)
        repack_heads(self.model)
        self.loaded |= self.checksums
        self.staged = []

    def discard(self) -> None:
        """Drop what was received; the weights in use were not touched."""
        self.checksums, self.staged = {}, []

    def shutdown(self) -> None:
        """Leave the group."""
        if self.group is not None:
            self.group.close()
        self.group = None


def repack_heads(model: nn.Module) -> None:
    """Let each output head of a vLLM model make its packed copy again (nothing to do on a GPU).

    A head tied to the embeddings has no weights of its own to load, so the reload passes it over, and on
    a CPU its packed copy silently stays that of the old weights.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


class NcclReceiver(NCCLWeightTransferEngine):
    """vLLM's own receiver between GPUs, with our manifest and a checksum of every tensor.

    Loads each bucket as it arrives: a GPU seldom has room for a second copy of the weights. So a broken
    transfer leaves the engine unusable, and `discard` says so.
    """

    loaded: dict[str, int]
    checksums: dict[str, int]

    def parse_init_info(self, init_dict: dict[str, Any]) -> NCCLWeightTransferInitInfo:
        """Put the meeting point into vLLM's words."""
        info = JoinInfo(**init_dict)
        meeting = Rendezvous(**info.rendezvous)
        return NCCLWeightTransferInitInfo(
            nccl_unique_id_b64=meeting.secret,
            rank_offset=info.rank_offset,
            world_size=meeting.world_size,
            packed=True,
        )

    def parse_update_info(self, update_dict: dict[str, Any]) -> NCCLWeightTransferUpdateInfo:
        """Put the manifest into vLLM's words, and take the size of its buckets."""
        info = ManifestInfo(**update_dict)
        self.packed_buffer_size_bytes = info.bucket_bytes
        return NCCLWeightTransferUpdateInfo(names=info.names, dtype_names=info.dtypes, shapes=info.shapes)

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Join the group; blocks until every member is there."""
        self.shutdown()
        self.loaded = {}
        super().init_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        """Open a layer-wise reload."""
        self.checksums = {}
        super().start_weight_update()

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receive and load every bucket, and add up checksums on the way."""
        model: Any = self.model
        load = model.load_weights

        def add_up_and_load(tensors: Iterable[tuple[str, Tensor]]) -> None:
            tensors = list(tensors)
            self.checksums.update((name, checksum(tensor)) for name, tensor in tensors)
            load(tensors)

        model.load_weights = add_up_and_load
        try:
            super().receive_weights(update_info)
        finally:
            del model.load_weights  # the class's own again

    def finish_weight_update(self) -> None:
        """Close the reload."""
        super().finish_weight_update()
        repack_heads(self.model)
        self.loaded |= self.checksums

    def discard(self) -> None:
        """Refuse: the buckets were loaded as they came."""
        raise RuntimeError("part of the weights was replaced already; restart this engine")


class WeightReceiver:
    """Methods that every worker of the engine gets, for the generator to call."""

    weight_transfer_engine: GlooReceiver | NcclReceiver
    _weight_update_active: bool

    def received_checksums(self) -> dict[str, int]:
        """Checksum of each tensor that arrived in the running update, or was loaded before from the same group."""
        receiver = self.weight_transfer_engine
        return receiver.loaded | receiver.checksums

    def abandon_weight_update(self) -> None:
        """End a running update, with the old weights in use."""
        self.weight_transfer_engine.discard()
        if self._weight_update_active:
            self.finish_weight_update()  # pyright: ignore[reportAttributeAccessIssue]  # the worker's own


def die_with_generator() -> None:
    """Watch the generator and the parent; when either is gone, end the parent and this process.

    vLLM's processes would otherwise outlive a killed generator and keep their gigabytes.
    """
    generator = int(os.environ.get(GENERATOR_PID, os.getpid()))
    if generator == os.getpid():
        return
    parent = os.pidfd_open(os.getppid())  # the engine core, or the generator itself
    poll = select.poll()
    for process in (parent, os.pidfd_open(generator)):
        poll.register(process, select.POLLIN)  # readable once the process has ended

    def watch() -> None:
        poll.poll()
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(parent, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="die-with-generator", daemon=True).start()


WeightTransferEngineFactory.register_engine("rayward_gloo", GlooReceiver)
WeightTransferEngineFactory.register_engine("rayward_nccl", NcclReceiver)
die_with_generator()
