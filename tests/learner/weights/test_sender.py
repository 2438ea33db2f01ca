"""Sending weights over gloo: what arrives, and what happens when a receiver does not take it."""

import base64
import ctypes
import inspect
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from actors.transfer import GlooGroup, Manifest, Rendezvous, TransferError, checksum
from learner.weights.sender import NcclWeightSender, WeightSender

MB = 1 << 20


def connected(sender: WeightSender, receive: Callable[[GlooGroup], object], receivers: int = 1) -> list[object]:
    """Connect a sender to receivers in threads; the list fills with what these return."""
    meeting = sender.listen(1 + receivers, epoch=1)
    results: list[object] = []

    def run(rank: int) -> None:
        results.append(receive(GlooGroup(meeting, rank)))

    for rank in range(1, 1 + receivers):
        threading.Thread(target=run, args=(rank,), daemon=True).start()
    sender.connect()
    return results


def receiving(manifest: Manifest) -> Callable[[GlooGroup], dict[str, Tensor]]:
    """Receive as actors.weights does."""

    def receive(group: GlooGroup) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for bucket in manifest.buckets():
            buffer = torch.empty(bucket.size, dtype=torch.uint8)
            group.wait(group.broadcast(buffer), "a bucket")
            tensors |= manifest.unpack(bucket, buffer)
        return tensors

    return receive


def send(sender: WeightSender, named: list[tuple[str, Tensor]]) -> dict[str, int]:
    return sender.send(sender.manifest(named, ()), named)


def wait_for(results: list[object], count: int) -> None:
    end = time.monotonic() + 10
    while len(results) < count:
        assert time.monotonic() < end, f"{len(results)} of {count} receivers are done"
        time.sleep(0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_receiver_gets_every_tensor(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    named = [(f"w{i}", torch.randn(1 + 97 * i, 700, generator=random).to(dtype)) for i in range(6)]
    sender = WeightSender(bucket_mb=1, deadline_s=20)
    manifest = sender.manifest(named, ())
    assert len(list(manifest.buckets())) > 1
    results = connected(sender, receiving(manifest), receivers=2)
    checksums = send(sender, named)
    wait_for(results, 2)
    for tensors in results:
        assert isinstance(tensors, dict)
        assert {name: checksum(tensor) for name, tensor in tensors.items()} == checksums
        for name, tensor in named:
            assert torch.equal(tensors[name], tensor)
    sender.close()


def test_a_group_has_everything_once_and_then_what_changes_with_checksums_of_all() -> None:
    sender = WeightSender(bucket_mb=1, deadline_s=20)
    shapes = [(name, torch.zeros(4)) for name in ("a", "b", "c", "d")]
    whole = sender.manifest(shapes, {"b", "c"})
    assert whole.names == ("a", "b", "c", "d")
    part = Manifest.of(shapes[1:3], whole.bucket_bytes)
    results = connected(sender, lambda group: [receiving(manifest)(group) for manifest in (whole, part, part)])
    for version in range(3):
        named = [(name, torch.full((4,), float(version))) for name, _ in shapes]
        manifest = sender.manifest(shapes, {"b", "c"})
        assert manifest == (part if version else whole)
        assert sender.send(manifest, named) == {name: checksum(tensor) for name, tensor in named}
    wait_for(results, 1)
    assert [{n: t.tolist() for n, t in had.items()} for had in results[0]] == [  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
        dict.fromkeys("abcd", [0.0] * 4),
        dict.fromkeys("bc", [1.0] * 4),
        dict.fromkeys("bc", [2.0] * 4),
    ]
    assert sender.manifest(shapes, ()).total_bytes == 0
    sender.listen(2, epoch=2)
    assert sender.manifest(shapes, {"b", "c"}) == whole
    sender.close()


def test_a_tensor_out_of_order_is_not_sent_in_anothers_place() -> None:
    sender = WeightSender(bucket_mb=1, deadline_s=5)
    manifest = sender.manifest([("a", torch.zeros(4)), ("b", torch.zeros(4))], ())
    connected(sender, lambda group: None)
    with pytest.raises(AssertionError, match="b did not come"):
        sender.send(manifest, [("b", torch.ones(4)), ("a", torch.ones(4))])
    sender.close()


def test_a_receiver_that_leaves_is_an_error_at_once() -> None:
    sender = WeightSender(bucket_mb=64, deadline_s=30)
    left = threading.Event()

    def leave(group: GlooGroup) -> None:
        group.close()
        left.set()

    connected(sender, leave)
    assert left.wait(10)
    started = time.monotonic()
    with pytest.raises(TransferError, match="waiting for the generators to take bucket 1 of 1"):
        send(sender, [("w", torch.zeros(64 * MB, dtype=torch.uint8))])
    assert time.monotonic() - started < 10


def test_a_receiver_that_does_not_read_is_an_error_at_the_deadline() -> None:
    sender = WeightSender(bucket_mb=64, deadline_s=2)
    over = threading.Event()
    results = connected(sender, lambda group: over.wait(30))
    started = time.monotonic()
    with pytest.raises(TransferError, match=r"to take bucket 1 of 1 \(deadline 2 s\)"):
        send(sender, [("w", torch.zeros(64 * MB, dtype=torch.uint8))])
    assert 1 < time.monotonic() - started < 10
    over.set()
    wait_for(results, 1)


def test_a_failed_sender_lets_go_of_the_other_receivers() -> None:
    """Of two receivers one does not read; the other, patient by itself, must not wait longer than the sender."""
    sender = WeightSender(bucket_mb=1, deadline_s=2)
    named = [(f"w{i}", torch.zeros(64 * MB, dtype=torch.uint8)) for i in range(4)]
    manifest = sender.manifest(named, ())
    over = threading.Event()
    ends: list[object] = []
    meeting = sender.listen(3, epoch=1)

    def patient() -> None:
        group = GlooGroup(replace(meeting, deadline_s=60), 1)
        try:
            receiving(manifest)(group)
        except TransferError as error:
            ends.append(error)

    def idle() -> None:
        group = GlooGroup(meeting, 2)
        over.wait(30)
        group.close()

    for work in (patient, idle):
        threading.Thread(target=work, daemon=True).start()
    sender.connect()
    with pytest.raises(TransferError):
        send(sender, named)
    wait_for(ends, 1)
    over.set()


def test_a_meeting_point_is_open_before_anybody_is_told() -> None:
    sender = WeightSender(bucket_mb=1, deadline_s=5)
    first = sender.listen(2, epoch=1)
    second = sender.listen(2, epoch=2)
    assert first.port > 0
    told = {"host": "127.0.0.1", "port": second.port, "world_size": 2, "epoch": 2, "deadline_s": 5}
    assert second == Rendezvous(**told, secret=second.secret)
    assert (first.secret != second.secret, len(second.secret), second.secret in repr(second)) == (True, 64, False)
    assert TCPStore("127.0.0.1", second.port).port == second.port
    sender.close()


def test_the_store_listens_where_it_is_told_alone() -> None:
    sender = WeightSender(bucket_mb=1, deadline_s=5, host="127.0.0.2")
    port = sender.listen(2, epoch=1).port
    listening = [one.laddr for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == port] == ["127.0.0.2"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    sender.close()


def test_who_does_not_know_the_secret_gets_no_weights() -> None:
    """It joins, as a local process could that has seen the port, and takes part in the proof as well as it can."""
    sender = WeightSender(bucket_mb=1, deadline_s=5)
    meeting = sender.listen(2, epoch=1)
    refused: list[object] = []

    def stranger() -> None:
        try:
            refused.append(GlooGroup(replace(meeting, secret="guessed"), 1))
        except TransferError as error:
            refused.append(str(error))

    threading.Thread(target=stranger, daemon=True).start()
    with pytest.raises(TransferError, match=r"ranks \[1\] of the group that carries weights do not know its secret"):
        sender.connect()
    wait_for(refused, 1)
    assert "ranks [0]" in str(refused[0])
    with pytest.raises(AssertionError, match="connect before send"):
        send(sender, [("w", torch.ones(4))])


def test_vllms_sender_between_gpus_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as that goes without a GPU: our arguments fit vLLM's signatures, and every tensor has its checksum."""
    from vllm.distributed.device_communicators import pynccl_wrapper
    from vllm.distributed.weight_transfer import nccl_common, packed_tensor

    joined: dict[str, object] = {}
    sent: list[list[Tensor]] = []
    signature = inspect.signature(packed_tensor.packed_nccl_broadcast_producer)

    def broadcast(**arguments: Any) -> None:
        signature.bind(**arguments)
        assert arguments["buffer_size_bytes"] == 3 << 20
        sent.append([arguments["post_iter_func"](pair) for pair in arguments["iterator"]])

    joining = inspect.signature(nccl_common.uid_init_process_group)

    def join(*given: Any, **named: Any) -> Any:
        joined.update(joining.bind(*given, **named).arguments)
        return SimpleNamespace(destroy=int)

    made = SimpleNamespace(internal=(ctypes.c_byte * 128)(*range(-64, 64)))
    monkeypatch.setattr(pynccl_wrapper, "NCCLLibrary", lambda: SimpleNamespace(ncclGetUniqueId=lambda: made))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(nccl_common, "uid_init_process_group", join)
    monkeypatch.setattr(packed_tensor, "packed_nccl_broadcast_producer", broadcast)
    sender = NcclWeightSender(bucket_mb=3, deadline_s=5)
    meeting = sender.listen(2, epoch=1)
    sender.connect()
    identity = base64.b64decode(meeting.secret)
    assert identity == bytes(made.internal)
    assert joined == {"nccl_unique_id_bytes": identity, "rank": 0, "world_size": 2, "device": 3}
    named = [(name, torch.randn(5, dtype=torch.bfloat16)) for name in ("a", "b", "c")]
    for _ in range(2):
        checksums = sender.send(sender.manifest(named, {"b"}), named)
        assert checksums == {name: checksum(tensor) for name, tensor in named}
    first, second = sent
    assert all(torch.equal(got, tensor) for got, (_, tensor) in zip(first, named, strict=True))
    assert [tensor.tolist() for tensor in second] == [named[1][1].tolist()]
    sender.close()
