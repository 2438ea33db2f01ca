"""The layout of buckets, the checksums, and the group that carries them."""

import threading
import time

import pytest
import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

import actors.transfer
from actors.transfer import GlooGroup, Manifest, Rendezvous, TransferError, checksum, mismatched


def reference(tensor: torch.Tensor) -> int:
    """The checksum's definition, with Python's unbounded integers."""
    data = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
    data += bytes(-len(data) % 8)
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    return sum(word * (2 * i + 1) for i, word in enumerate(words)) % 2**64


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.tensor([1, 2, 3]), 1 * 1 + 2 * 3 + 3 * 5),
        (torch.tensor([-1]), 2**64 - 1),
        (torch.tensor([0, -1]), 2**64 - 3),
        (torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 2], dtype=torch.uint8), 1 * 1 + 2 * 3),
        (torch.tensor(1.0), 0x3F800000),
        (torch.tensor([1.0, 1.0], dtype=torch.bfloat16), 0x3F803F80),
        (torch.zeros(0), 0),
    ],
)
def test_checksum_of_small_tensors(tensor: torch.Tensor, expected: int) -> None:
    assert checksum(tensor) == expected


@pytest.mark.parametrize("chunk", [1, 4, 1 << 17])
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (33, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_follows_its_definition_whatever_the_chunk(
    shape: tuple[int, ...], dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors.transfer, "_CHUNK", chunk)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert checksum(tensor) == reference(tensor)


def test_checksum_sees_values_not_storage() -> None:
    tensor = torch.randn(6, 4)
    assert checksum(tensor.t()) == checksum(tensor.t().contiguous()) != checksum(tensor)
    odd = torch.arange(33, dtype=torch.uint8)[1:]  # does not start on a word
    assert checksum(odd) == checksum(odd.clone())


def test_checksum_shows_every_flipped_bit_and_every_exchange() -> None:
    words = torch.arange(1, 6)
    original = checksum(words)
    for index in range(5):
        for bit in range(64):
            flipped = words.clone()
            flipped[index] ^= torch.tensor(1) << bit
            assert checksum(flipped) != original
    assert checksum(words.flip(0)) != original


def test_mismatched_names_what_differs_and_what_is_missing() -> None:
    assert mismatched({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5, "d": 4}) == ["b", "c", "d"]
    assert mismatched({"a": 1}, {"a": 1}) == []


def test_tensors_share_buckets_up_to_their_size_on_aligned_places() -> None:
    named = [
        ("a", torch.zeros(3, dtype=torch.bfloat16)),  # 6 bytes
        ("b", torch.zeros(2, 4)),  # 32 bytes, from 16
        ("c", torch.zeros(30)),  # 120 bytes: larger than a bucket, travels alone
        ("d", torch.zeros((), dtype=torch.float32)),  # 4 bytes
    ]
    manifest = Manifest.of(named, bucket_bytes=64)
    found = [[(slot.index, slot.start, slot.stop) for slot in bucket.slots] for bucket in manifest.buckets()]
    assert found == [[(0, 0, 6), (1, 16, 48)], [(2, 0, 120)], [(3, 0, 4)]]
    assert [bucket.size for bucket in manifest.buckets()] == [48, 120, 4]
    assert manifest.total_bytes == 6 + 32 + 120 + 4


def test_unpack_gives_views_of_the_buffer() -> None:
    manifest = Manifest.of([("a", torch.zeros(2, 2)), ("b", torch.zeros(1))], bucket_bytes=64)
    (bucket,) = manifest.buckets()
    buffer = torch.zeros(bucket.size, dtype=torch.uint8)
    tensors = dict(manifest.unpack(bucket, buffer))
    tensors["a"].fill_(1.0)
    assert tensors["a"].shape == (2, 2)
    assert buffer[:16].view(torch.float32).tolist() == [1.0] * 4
    assert buffer[16:].view(torch.float32).tolist() == [0.0]


def test_nobody_waits_for_a_missing_member_beyond_the_deadline() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = Rendezvous(host="127.0.0.1", port=store.port, world_size=2, epoch=3, deadline_s=1.0, secret="s")
    started = time.monotonic()
    with pytest.raises(TransferError, match=r"epoch 3 at 127.0.0.1:\d+.*2 members to meet \(this is rank 0\)"):
        GlooGroup(meeting, 0, store)
    assert time.monotonic() - started < 10


def test_nobody_waits_for_a_store_that_is_not_there() -> None:
    meeting = Rendezvous(host="127.0.0.1", port=1, world_size=2, epoch=1, deadline_s=1.0, secret="s")
    with pytest.raises(TransferError, match="2 members to meet"):
        GlooGroup(meeting, 1)


def test_the_default_process_group_stays_free() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = Rendezvous(host="127.0.0.1", port=store.port, world_size=2, epoch=1, deadline_s=10.0, secret="s")
    before = torch.distributed.is_initialized()
    received = torch.zeros(3, dtype=torch.uint8)

    def receive() -> None:
        group = GlooGroup(meeting, 1)
        group.wait(group.broadcast(received), "the bytes")

    thread = threading.Thread(target=receive)
    thread.start()
    group = GlooGroup(meeting, 0, store)
    group.wait(group.broadcast(torch.tensor([1, 2, 3], dtype=torch.uint8)), "the bytes to go")
    thread.join(10)
    assert received.tolist() == [1, 2, 3]
    assert torch.distributed.is_initialized() == before
