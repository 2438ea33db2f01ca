"""Checkpoints on a real disk: written whole, read whole, and what becomes of every kind of damage."""

import asyncio
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from learner.weights import checkpoint
from learner.weights.checkpoint import Checkpoints, contents, whole_folder

STATE = {"beta": 0.1 + 0.2, "buffer": {"ready": [[3, 0, [{"score": -1.5}]]]}}


async def networks(folder: Path) -> None:
    """Two ranks' files of a policy, one of a critic."""
    for name, content in (("policy/rank-0.pt", b"0" * 5000), ("policy/rank-1.pt", b"1" * 5000), ("critic/a", b"")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def written(tmp_path: Path, *versions: int, kept: int = 9) -> Checkpoints:
    found = Checkpoints(tmp_path / "ppo", kept)
    for version in versions:
        asyncio.run(found.write(version, STATE | {"version": version}, networks))
    return found


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_what_is_written_is_read_again(tmp_path: Path):
    found = written(tmp_path, 4, 8).newest()
    assert found is not None
    assert (found.version, found.state) == (8, STATE | {"version": 8})
    assert (found.networks / "policy" / "rank-1.pt").read_bytes() == b"1" * 5000
    manifest = json.loads((found.folder / "manifest.json").read_text())
    assert manifest["version"] == 8
    assert manifest["files"].keys() == {
        "state.json",
        "networks/policy/rank-0.pt",
        "networks/policy/rank-1.pt",
        "networks/critic/a",
    }
    assert manifest["files"]["networks/critic/a"] == [
        0,
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    ]


def test_the_last_ones_are_kept(tmp_path: Path):
    checkpoints = written(tmp_path, 2, 4, 1_000_006, 1_000_008, kept=2)
    assert names(checkpoints) == ["version-1000006", "version-1000008"]
    written(tmp_path, 1_000_010, kept=1)
    assert names(checkpoints) == ["version-1000010"]
    checkpoints.remove()
    assert checkpoints.newest() is None
    assert Checkpoints(tmp_path / "never", 1).newest() is None


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


FILES = ["manifest.json", "networks/critic/a", "networks/policy/rank-0.pt", "networks/policy/rank-1.pt", "state.json"]


def _flip(path: Path) -> None:
    """Flip one bit of the first, of the middle and of the last byte."""
    content = bytearray(path.read_bytes())
    for place in {0, len(content) // 2, len(content) - 1}:
        content[place] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": _flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "missing": Path.unlink,
    "renamed": lambda path: path.rename(path.with_name(path.name + ".bak")),
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [(n, d) for n in FILES for d in DAMAGE if n != "networks/critic/a" or d not in ("flipped", "cut", "emptied")],
)
def test_a_damaged_file_puts_the_checkpoint_in_quarantine_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
):
    checkpoints = written(tmp_path, 4, 8)
    path = checkpoints.folder / "version-000008" / name
    assert _files(checkpoints.folder / "version-000008") == FILES
    DAMAGE[damage](path)
    found = checkpoints.newest()
    assert found is not None
    assert found.version == 4
    (quarantined,) = [name for name in names(checkpoints) if name.startswith("damaged-version-000008-")]
    (warning,) = caplog.messages
    assert quarantined in warning
    assert Path(name).name in warning
    found = checkpoints.newest()  # and it stays so
    assert found is not None
    assert found.version == 4
    assert len(caplog.messages) == 1


def test_every_flipped_byte_of_the_small_files_is_found(tmp_path: Path):
    checkpoints = written(tmp_path, 8)
    folder = checkpoints.folder / "version-000008"
    for name in ("manifest.json", "state.json"):
        content = (folder / name).read_bytes()
        for place in range(len(content)):
            (folder / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert checkpoint._damage(folder, 8), (name, place)
        (folder / name).write_bytes(content)
        assert checkpoint._damage(folder, 8) is None


def test_a_file_that_was_put_in_and_a_folder_under_another_name_are_damage(tmp_path: Path):
    checkpoints = written(tmp_path, 4, 6, 8)
    (checkpoints.folder / "version-000008" / "networks" / "policy" / "more.pt").write_bytes(b"pickle")
    (checkpoints.folder / "version-000006").rename(checkpoints.folder / "version-000007")
    found = checkpoints.newest()
    assert found is not None
    assert found.version == 4


def test_all_damaged_is_as_none(tmp_path: Path):
    checkpoints = written(tmp_path, 4, 8)
    for path in checkpoints.folder.iterdir():
        shutil.rmtree(path / "networks" / "policy")
    assert checkpoints.newest() is None


class Crash(BaseException):
    """The process ends here; nothing cleans up."""


@pytest.mark.parametrize("call", ["mkdir", "write_text", "fsync", "rename", "rmtree"])
def test_a_crash_at_any_moment_of_writing_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    """Crash before the n-th call of a kind, for every n until the writing gets through."""
    owner: Any = {"mkdir": Path, "write_text": Path, "rename": Path, "fsync": os, "rmtree": shutil}[call]
    real = getattr(owner, call)
    for survived in range(40):
        folder = tmp_path / str(survived)
        checkpoints = written(folder, 4, kept=1 if call == "rmtree" else 2)
        left = survived

        def crashing(*args: Any, **settings: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1
            return real(*args, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(owner, call, crashing)
            try:
                asyncio.run(checkpoints.write(8, {"second": True}, networks))
                through = True
            except Crash:
                through = False
        found = checkpoints.newest()
        assert found is not None
        if through:
            assert found.state == {"second": True}
            assert survived > 0
            return
        assert found.state in ({"second": True}, STATE | {"version": 4})
        assert names(checkpoints) in (["version-000004"], ["version-000004", "version-000008"], ["version-000008"])
        written(folder, 12)  # and the next one is written as if nothing had been
        newest = checkpoints.newest()
        assert newest is not None
        assert newest.version == 12
    raise AssertionError("it never got through")


async def full_disk(folder: Path) -> None:
    """The kernel's own answer to a write on a full disk."""
    await networks(folder)
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"0" * 5000)


def test_a_full_disk_leaves_the_earlier_checkpoints_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoints = written(tmp_path, 4, 8, kept=2)
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(checkpoints.write(12, {}, full_disk))
    assert names(checkpoints) == ["version-000004", "version-000008"]

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            asyncio.run(checkpoints.write(12, {}, networks))
    assert names(checkpoints) == ["version-000004", "version-000008"]
    found = checkpoints.newest()
    assert found is not None
    assert found.version == 8


def test_what_others_could_have_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoints = written(tmp_path, 4, 8)
    shard = checkpoints.folder / "version-000008" / "networks" / "policy" / "rank-0.pt"
    shard.chmod(0o666)
    with pytest.raises(ValueError, match=r"rank-0\.pt may be written by everybody.*pickles.*Remedy"):
        checkpoints.newest()
    assert names(checkpoints) == ["version-000004", "version-000008"]
    shard.chmod(0o644)
    if os.geteuid() == 0:
        os.chown(shard, 12345, -1)
        with pytest.raises(ValueError, match=r"rank-0\.pt belongs to user 12345"):
            checkpoints.newest()


# --- folders of models


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "run" / "policy"
    with whole_folder(target) as aside:
        (aside / "config.json").write_text("{}")
        assert not target.exists()
    assert _files(target) == ["config.json"]
    before = contents(target)

    def stop(how: type[BaseException]) -> None:
        with whole_folder(target) as aside:
            (aside / "model.safetensors").write_text("half")
            raise how

    for how in (RuntimeError, Crash):
        with pytest.raises(how):
            stop(how)
        assert contents(target) == before
    with whole_folder(target) as aside:
        (aside / "model.safetensors").write_text("whole")
    assert _files(target) == ["model.safetensors"]
    assert [path.name for path in target.parent.iterdir()] == ["policy"]
    assert contents(target) != before
