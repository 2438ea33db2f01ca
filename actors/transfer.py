"""What learner and generators agree on when weights travel: the meeting point, the layout, the checksums."""

import hmac
import math
import secrets
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore, Work  # pyright: ignore[reportPrivateImportUsage]

_ALIGNMENT = 16  # bytes; a view of any dtype, and of the checksum's words, starts on such a boundary
_WORD = 8  # bytes of a checksum's word
_CHUNK = 1 << 17  # words added up at once on a CPU; small enough to stay in a core's cache
_MODULUS = 1 << 64


class TransferError(RuntimeError):
    """The group that carries weights broke or missed its deadline; the text says what was awaited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the members of one epoch of the transfer group meet."""

    host: str
    """Address at which the learner listens."""
    port: int
    """TCP port of the learner's store; 0 for NCCL, which needs none."""
    world_size: int
    """The sender, which is rank 0, and every worker of every generator."""
    epoch: int
    """Number of this membership; a member of another epoch never meets this one."""
    deadline_s: float
    """Seconds that any single wait inside the group may take."""
    secret: str = field(repr=False)
    """Known to the members alone, as it comes to them with the call to join: for NCCL the group's own id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Which tensors travel, in order, and how they are packed: all that a receiver must know beforehand."""

    names: tuple[str, ...]
    """Names as in the model's checkpoint."""
    dtypes: tuple[str, ...]
    """Type of each tensor on the wire, such as "bfloat16"."""
    shapes: tuple[tuple[int, ...], ...]
    """Full, unsharded shape of each tensor."""
    bucket_bytes: int
    """Tensors share a bucket up to this size; a larger tensor travels alone."""

    @classmethod
    def of(cls, named: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Self:
        """Describe named tensors."""
        pairs = list(named)
        return cls(
            names=tuple(name for name, _ in pairs),
            dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in pairs),
            shapes=tuple(tuple(tensor.shape) for _, tensor in pairs),
            bucket_bytes=bucket_bytes,
        )

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self._nbytes(index) for index in range(len(self.names)))

    def dtype(self, index: int) -> torch.dtype:
        """Type of one tensor on the wire."""
        return getattr(torch, self.dtypes[index])

    def buckets(self) -> Iterator["Bucket"]:
        """Lay the tensors out in order; the same on both sides, since it depends on the manifest alone."""
        slots: list[Slot] = []
        end = 0
        for index in range(len(self.names)):
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            if slots and start + self._nbytes(index) > self.bucket_bytes:
                yield Bucket(slots=tuple(slots), size=end)
                slots, start = [], 0
            end = start + self._nbytes(index)
            slots.append(Slot(index=index, start=start, stop=end))
        if slots:
            yield Bucket(slots=tuple(slots), size=end)

    def unpack(self, bucket: "Bucket", buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name the tensors in a received buffer; they are views of it."""
        for slot in bucket.slots:
            flat = buffer[slot.start : slot.stop].view(self.dtype(slot.index))
            yield self.names[slot.index], flat.view(self.shapes[slot.index])

    def _nbytes(self, index: int) -> int:
        return math.prod(self.shapes[index]) * self.dtype(index).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Place of one tensor in its bucket."""

    index: int
    """Number of the tensor in the manifest."""
    start: int
    """First byte in the bucket."""
    stop: int
    """One past the last byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Tensors that travel in one message."""

    slots: tuple[Slot, ...]
    """The tensors, by increasing start."""
    size: int
    """Bytes of the message."""


def checksum(tensor: Tensor) -> int:
    """Exact checksum of a tensor's bytes: sum over 8-byte words x_i * (2i + 1), modulo 2**64.

    Integers wrap alike on every device, so the value does not depend on where or in which order it is added
    up. An odd weight is invertible, so a change of any single word always shows; so does an exchange of two
    words, unless they differ by a multiple of a high power of two.
    """
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    rest = data.numel() % _WORD
    if rest:
        data = torch.cat([data, data.new_zeros(_WORD - rest)])
    elif data.storage_offset() % _WORD or data.data_ptr() % _WORD:
        data = data.clone()  # a view as words has to start on a word
    words = data.view(torch.int64)
    chunk = _CHUNK if words.is_cpu else _CHUNK << 7  # a GPU wants fewer, larger kernels
    weights = 2 * torch.arange(min(chunk, words.numel()), device=words.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), chunk):
        part = words[start : start + chunk]
        total += torch.sum(part * weights[: part.numel()]) + 2 * start * torch.sum(part)
    return int(total.item()) % _MODULUS


def mismatched(sent: dict[str, int], received: dict[str, int]) -> list[str]:
    """Names whose checksum differs, or that one side alone has."""
    return sorted(name for name in sent.keys() | received.keys() if sent.get(name) != received.get(name))


class GlooGroup:
    """A gloo process group of its own; the process's default group, which is DeepSpeed's, is not touched."""

    def __init__(self, rendezvous: Rendezvous, rank: int, store: Store | None = None) -> None:
        """Meet the other members; blocks until all are there. The sender passes the store it listens with.

        Raises TransferError when somebody is missing at the deadline, or does not know the secret.
        """
        self._rendezvous = rendezvous
        limit = timedelta(seconds=rendezvous.deadline_s)
        gloo: Any = ProcessGroupGloo  # its type stub lacks half of it
        options = gloo._Options()
        options._timeout = limit
        with self._awaited(f"{rendezvous.world_size} members to meet (this is rank {rank})"):
            store = store or TCPStore(rendezvous.host, rendezvous.port, timeout=limit)
            options._devices = [gloo.create_device(hostname=_local_address(rendezvous))]
            group = gloo(PrefixStore(f"weights/{rendezvous.epoch}", store), rank, rendezvous.world_size, options)
        self._group: Any = group
        self._prove(rank)

    def broadcast(self, buffer: Tensor) -> Work:
        """Start to send (rank 0) or to receive (others) a bucket of bytes."""
        assert self._group is not None, "the transfer group is closed"
        with self._awaited("a broadcast to start"):
            return self._group.broadcast(buffer, 0)

    def wait(self, work: Work, what: str) -> None:
        """Wait for a started broadcast; raises TransferError that names `what`."""
        with self._awaited(what):
            work.wait()

    def close(self) -> None:
        """Leave; members that still wait for this one get an error."""
        self._group = None

    def _prove(self, rank: int) -> None:
        """Leave a group of which a member does not know the secret: whoever finds the port could have joined."""

        def proof(member: int) -> bytes:
            return hmac.digest(self._rendezvous.secret.encode(), b"%d/" % member + b"".join(nonces), "sha256")

        with self._awaited("all members to prove that they know the secret"):
            nonces = self._gather(secrets.token_bytes(32))
            proofs = self._gather(proof(rank))
        strangers = [member for member, given in enumerate(proofs) if not hmac.compare_digest(given, proof(member))]
        if strangers:
            self.close()
            raise TransferError(f"ranks {strangers} of the group that carries weights do not know its secret")

    def _gather(self, own: bytes) -> list[bytes]:
        """The bytes of every member, by rank."""
        found = [torch.empty(len(own), dtype=torch.uint8) for _ in range(self._rendezvous.world_size)]
        self._group.allgather([found], [torch.frombuffer(bytearray(own), dtype=torch.uint8)]).wait()
        return [one.numpy().tobytes() for one in found]

    @contextmanager
    def _awaited(self, what: str) -> Iterator[None]:
        meeting = self._rendezvous
        try:
            yield
        except (RuntimeError, ValueError) as error:  # c10d raises both, and subclasses of RuntimeError
            raise TransferError(
                f"weight transfer, epoch {meeting.epoch} at {meeting.host}:{meeting.port}: failed while "
                f"waiting for {what} (deadline {meeting.deadline_s:g} s): {error}"
            ) from error


def _local_address(rendezvous: Rendezvous) -> str:
    """This machine's address on the way to the sender; gloo's own choice, the host name, may not resolve."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((rendezvous.host, rendezvous.port))  # sends nothing, only picks a route
        return probe.getsockname()[0]
