"""The sending side of a weight transfer, in the learner's rank 0; actors/weights.py is the other one."""

import base64
import secrets
import socket
from collections.abc import Container, Iterable, Iterator
from datetime import timedelta
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from actors.transfer import Bucket, GlooGroup, Manifest, Rendezvous, TransferError, checksum

if TYPE_CHECKING:
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator


class WeightSender:
    """Sends a network's weights to all generators at once, over gloo."""

    def __init__(self, bucket_mb: int, deadline_s: float, host: str = "127.0.0.1") -> None:
        """See PublishConfig for the first two; `host`: this machine's address for the generators."""
        self.bucket_mb = bucket_mb
        self.deadline_s = deadline_s
        self.host = host
        self._meeting: Rendezvous | None = None
        self._store: TCPStore | None = None
        self._group: GlooGroup | None = None
        self._complete = False  # whether this group has had every tensor

    def listen(self, world_size: int, epoch: int) -> Rendezvous:
        """Open a meeting point on a free port for `world_size` members with this one; ends an earlier one."""
        self.close()
        listener = socket.create_server((self.host, 0))  # a store of its own would listen on all interfaces
        port, limit = listener.getsockname()[1], timedelta(seconds=self.deadline_s)
        opening: dict[str, Any] = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listener.detach()}
        self._store = TCPStore(self.host, port, timeout=limit, **opening)
        self._meeting = self._rendezvous(port, world_size, epoch, secrets.token_hex(32))
        return self._meeting

    def connect(self) -> None:
        """Meet the receivers; blocks until all have joined, or raises TransferError at the deadline."""
        assert self._meeting is not None, "listen before connect"
        self._group = GlooGroup(self._meeting, 0, self._store)

    def manifest(self, named: Iterable[tuple[str, Tensor]], changing: Container[str]) -> Manifest:
        """What to `send` next: every tensor to a new group, and to one that has had them those that are `changing`."""
        sent = ((name, tensor) for name, tensor in named if not self._complete or name in changing)
        return Manifest.of(sent, self.bucket_mb << 20)

    def send(self, manifest: Manifest, named: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
        """Send those of the named tensors that are in the manifest to all receivers; returns the checksum of all.

        They are taken one by one: no more than two buckets exist at a time. Raises TransferError when a receiver is
        gone or does not read, and closes the group: nobody waits on.
        """
        assert self._group is not None, "connect before send"
        group, tensors = self._group, iter(named)
        buckets = list(manifest.buckets())
        checksums: dict[str, int] = {}
        under_way = []
        try:
            for number, bucket in enumerate(buckets, start=1):
                buffer = self._pack(manifest, bucket, tensors, checksums)  # while the last bucket is under way
                under_way.append((group.broadcast(buffer), f"the generators to take bucket {number} of {len(buckets)}"))
                if len(under_way) > 1:
                    group.wait(*under_way.pop(0))
            checksums |= {name: checksum(tensor) for name, tensor in tensors}
            for sending in under_way:
                group.wait(*sending)
        except TransferError:
            under_way.clear()  # work under way would keep the connections open
            self.close()
            raise
        self._complete = True
        return checksums

    def close(self) -> None:
        """Leave the group and stop listening."""
        if self._group is not None:
            self._group.close()
        self._group = self._store = self._meeting = None
        self._complete = False

    def _rendezvous(self, port: int, world_size: int, epoch: int, secret: str) -> Rendezvous:
        told = {"host": self.host, "port": port, "world_size": world_size, "epoch": epoch, "secret": secret}
        return Rendezvous(**told, deadline_s=self.deadline_s)

    def _pack(
        self, manifest: Manifest, bucket: Bucket, tensors: Iterator[tuple[str, Tensor]], checksums: dict[str, int]
    ) -> Tensor:
        """Copy a bucket's tensors side by side, and add up the checksums of all that come before the last of them."""
        buffer = torch.empty(bucket.size, dtype=torch.uint8)
        for name, target in manifest.unpack(bucket, buffer):
            for given, tensor in tensors:
                checksums[given] = checksum(tensor)
                if given == name:
                    target.copy_(tensor.detach())
                    break
            else:
                raise AssertionError(f"{name} did not come: not in the order of the manifest")
        return buffer


class NcclWeightSender(WeightSender):
    """Sends from one GPU to others, through vLLM's own packed broadcast."""

    _nccl: "PyNcclCommunicator | None" = None

    def listen(self, world_size: int, epoch: int) -> Rendezvous:
        """Have NCCL open a meeting point, which admits those alone who know its id."""
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        self.close()
        secret = base64.b64encode(bytes(NCCLLibrary().ncclGetUniqueId().internal)).decode()
        self._meeting = self._rendezvous(0, world_size, epoch, secret)
        return self._meeting

    def connect(self) -> None:
        """Meet the receivers."""
        from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

        assert self._meeting is not None, "listen before connect"
        device, secret = torch.accelerator.current_device_index(), base64.b64decode(self._meeting.secret)
        self._nccl = uid_init_process_group(secret, rank=0, world_size=self._meeting.world_size, device=device)

    def send(self, manifest: Manifest, named: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
        """Send those of the named tensors that are in the manifest to all receivers; returns the checksum of all."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        assert self._nccl is not None, "connect before send"
        checksums: dict[str, int] = {}
        travelling = set(manifest.names)

        def on_the_wire() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in named:
                checksums[name] = checksum(tensor)
                if name in travelling:
                    yield name, tensor.detach()

        torch.accelerator.synchronize()  # the broadcast reads on streams of its own, and the last step may still write
        packed_nccl_broadcast_producer(
            iterator=on_the_wire(),
            group=self._nccl,
            src=0,
            post_iter_func=itemgetter(1),
            buffer_size_bytes=self.bucket_mb << 20,
        )
        self._complete = True
        return checksums

    def close(self) -> None:
        """Leave the group."""
        if self._nccl is not None:
            self._nccl.destroy()
            self._nccl = None
        super().close()
