"""Lines for which there is no room wait, and none is lost, torn or written twice."""

import asyncio
import errno
import json
import time
from pathlib import Path

import pytest

from learner.data.journal import Disk, Journal, append_line
from reward_server.preferences.records import NotWritten
from tests.full_disk import FullDisk, fill, small_disk


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


def until(true) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_lines_wait_in_order_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    disk = FullDisk(monkeypatch)
    run, path = Disk(retry_s=0.02), tmp_path / "a.jsonl"
    one, other = Journal(path, run), Journal(tmp_path / "b.jsonl", run)
    one.append({"n": 0})
    disk.full = True
    for n in (1, 2):
        one.append({"n": n})
        other.append({"n": n})
    assert path.read_bytes() == b'{"n": 0}\n', "and nothing of another line"
    assert run.paused is not None
    assert run.paused.reason == f"{path} cannot be written (No space left on device). Remedy: make room on its disk"
    with pytest.raises(NotWritten, match="lines without room"):
        one.sync()
    until(lambda: disk.refused > 8)  # it is tried again
    assert run.paused_s > 0
    disk.full = False
    until(lambda: run.paused is None)
    one.append({"n": 3})
    one.sync()
    assert (numbers(path), numbers(tmp_path / "b.jsonl")) == ([0, 1, 2, 3], [1, 2])
    assert f"paused: {path} cannot be written" in caplog.text
    assert "the pause is over" in caplog.text


def test_who_waits_for_room_goes_on_with_it_and_stops_when_there_is_none_for_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    disk = FullDisk(monkeypatch)
    run = Disk(pause_s=0.3, retry_s=0.02)
    asyncio.run(run.ready())
    Journal(tmp_path / "a.jsonl", run).append({"n": 0})
    disk.full = True
    Journal(tmp_path / "b.jsonl", run).append({"n": 0})
    began = time.monotonic()
    with pytest.raises(NotWritten, match=r"b\.jsonl cannot be written .* no room for 0 s; with it, --resume goes on"):
        asyncio.run(run.ready())
    assert time.monotonic() - began > 0.2
    run.pause_s = 60
    asyncio.run(_freed(run, disk))
    assert numbers(tmp_path / "b.jsonl") == [0]


async def _freed(run: Disk, disk: FullDisk) -> None:
    asyncio.get_running_loop().call_later(0.1, setattr, disk, "full", False)
    await run.ready()


def test_what_could_not_be_saved_is_saved_again_and_other_errors_are_raised(tmp_path: Path):
    run = Disk(retry_s=0.01)
    errors: list[Exception] = [RuntimeError("rank 0: SafetensorError: No space left on device (os error 28)")]
    errors.append(NotWritten(errno.EDQUOT, "RUN/sft cannot be written (Disk quota exceeded)"))

    async def save() -> str:
        if errors:
            raise errors.pop()
        return "saved"

    assert asyncio.run(run.saved(save)) == "saved"
    assert run.paused is None
    errors.append(NotWritten(errno.ENOSPC, "No space left on device"))
    assert run.written(lambda: asyncio.run(save())) == "saved"
    errors.append(RuntimeError("rank 0 is dead"))
    with pytest.raises(RuntimeError, match="is dead"):
        asyncio.run(run.saved(save))
    run.pause_s = 0.0
    with pytest.raises(NotWritten, match="--resume goes on"):
        run.written(lambda: append_line(Path("/dev/full"), {}))


@pytest.mark.parametrize(("left", "kept"), [("", 1), ("{", 1), ("x" * 200_000, 1), (None, 0)])
def test_what_a_killed_writer_left_of_a_line_is_cut_off(tmp_path: Path, left: str | None, kept: int):
    path = tmp_path / "a.jsonl"
    path.write_text("x" * 200_000 if left is None else f'{{"n": 0}}\n{left}')
    Journal(path).append({"n": 1})
    append_line(path, {"n": 2})
    assert numbers(path) == [*range(kept), 1, 2]


def test_another_error_is_raised_with_the_path(tmp_path: Path):
    with pytest.raises(
        NotWritten, match=rf"{tmp_path} cannot be written \(Is a directory\)\. Remedy: see to the folder"
    ):
        Journal(tmp_path).append({})


def test_a_real_disk_that_is_full_and_is_made_room_on(tmp_path: Path):
    with small_disk(tmp_path):
        run, path, rest = Disk(retry_s=0.02), tmp_path / "a.jsonl", tmp_path / "rest"
        lines = Journal(path, run)
        lines.append({"n": 0})
        fill(rest)
        for n in range(1, 1000):
            lines.append({"n": n})
        assert run.paused
        assert 0 < len(numbers(path)) < 1000
        rest.unlink()
        until(lambda: run.paused is None)
        lines.close()
        assert numbers(path) == list(range(1000))
