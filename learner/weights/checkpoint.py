"""Checkpoints: directories that are whole or not there.

FOLDER/version-000012/ holds what the learner's ranks saved, state.json, and manifest.json with size and sha256 of every
file. It is written aside, made durable and renamed; the name is what makes it count. What a crash leaves behind has
another name and is removed; what is damaged later fails its manifest and is put into quarantine.

The optimizer's files are pickles, which run code when they are loaded. So a checkpoint is opened only when every file
is in the manifest, as it was written, and nothing in it belongs to another user or may be written by everybody.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_server.preferences.records import ASIDE, sweep, writing

MANIFEST, STATE, NETWORKS = "manifest.json", "state.json", "networks"
_NAME = re.compile(r"version-(\d{6,})")
log = logging.getLogger(__name__)


class NotSaved(RuntimeError):
    """A rank could not write its part. Every rank raises it, so that all are alike and can go on without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint, as its manifest says."""

    version: int
    """completed iterations, or optimizer steps"""
    folder: Path
    """where it is"""
    state: dict[str, Any]
    """JSON values, as they were given to `Checkpoints.write`"""

    @property
    def networks(self) -> Path:
        """What `save_networks` was given to fill."""
        return self.folder / NETWORKS


class Checkpoints:
    """The checkpoints of one stage, of which the last `kept` are kept."""

    def __init__(self, folder: Path, kept: int) -> None:
        assert kept >= 1, kept
        self.folder = folder
        self.kept = kept

    async def write(
        self, version: int, state: Mapping[str, Any], save_networks: Callable[[Path], Awaitable[None]]
    ) -> int:
        """Write a checkpoint and remove those that are too many; returns its size in bytes.

        Whatever is raised leaves the earlier checkpoints as they were: OSError of this process's disk, NotSaved of a
        rank's. A TimeoutError of `save_networks` is no failed save: who does not answer may hang.
        """
        target = self.folder / f"version-{version:06d}"
        assert not target.exists(), target  # a version is completed once
        aside = _open_aside(target)
        try:
            await save_networks(aside / NETWORKS)
            size = await asyncio.to_thread(_seal, aside, version, state)
            await asyncio.to_thread(_put_in_place, aside, target)
        except Exception:  # a cancelled thread may still be at work: then what it leaves is removed at the next start
            shutil.rmtree(aside, ignore_errors=True)
            raise
        for old in self._complete()[self.kept :]:
            with contextlib.suppress(OSError):  # it is tried again after the next one
                _discard(old)
        return size

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is what was written; None when there is none.

        A damaged one is renamed, with a warning, and the one before it is looked at. Raises ValueError for one that
        somebody else could have put there.
        """
        if not self.folder.is_dir():
            return None
        sweep(self.folder)
        for path in self._complete():
            self._check_owner(path)
            version = int(path.name.removeprefix("version-"))
            damage = _damage(path, version)
            if damage is None:
                return Checkpoint(version=version, folder=path, state=json.loads((path / STATE).read_text()))
            quarantine = Path(tempfile.mkdtemp(prefix=f"damaged-{path.name}-", dir=self.folder))
            path.rename(quarantine)  # a folder takes the place of an empty one
            log.warning("checkpoint %s is damaged (%s); it is now %s", path, damage, quarantine.name)
        return None

    def remove(self) -> None:
        """Remove all of them, the damaged ones too."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    def _complete(self) -> list[Path]:
        """Those that have their name, the newest first."""
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("version-")), reverse=True)

    def _check_owner(self, path: Path) -> None:
        with tempfile.TemporaryFile(dir=self.folder) as ours:  # not our user id: a file server may map it
            owner = os.fstat(ours.fileno()).st_uid
        for part in (path, *path.rglob("*")):
            found = part.lstat()
            everybody = bool(found.st_mode & stat.S_IWOTH) and not part.is_symlink()
            if found.st_uid != owner or everybody:
                why = "may be written by everybody" if everybody else f"belongs to user {found.st_uid}"
                raise ValueError(
                    f"{part} {why}, and a checkpoint's optimizer files are pickles, which can run any code when they "
                    f"are loaded. Remedy: if you trust them, make them yours alone (chown, chmod o-w); else remove "
                    f"{path}, and the checkpoint before it is used"
                )


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when the block ends well, in place of what was there.

    It is on disk by then. After an error, or a crash at any moment, `path` is as it was, or not there. Raises
    NotWritten.
    """
    aside = _open_aside(path)
    try:
        with writing(path):
            yield aside
            _put_in_place(aside, path)
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contents(folder: Path, without: str | None = None) -> dict[str, list[Any]]:
    """[size, sha256] of each file, by its path in the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / (without or ""))
    with ThreadPoolExecutor() as threads:
        digests = list(threads.map(file_sha256, paths))
    return {
        str(path.relative_to(folder)): [path.stat().st_size, digest]
        for path, digest in zip(paths, digests, strict=True)
    }


def _manifest(files: Mapping[str, list[Any]], version: int) -> str:
    """A manifest's text, which is a function of what it describes: any other text is damaged."""
    return json.dumps({"version": version, "files": files}, indent=1) + "\n"


def _seal(folder: Path, version: int, state: Mapping[str, Any]) -> int:
    """Write state and manifest; returns the bytes in the folder."""
    (folder / STATE).write_text(json.dumps(state))
    files = contents(folder)
    (folder / MANIFEST).write_text(_manifest(files, version))
    return sum(size for size, _ in files.values())


def _damage(folder: Path, version: int) -> str | None:
    """What is wrong with a checkpoint; None when nothing is."""
    try:
        written = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    found = contents(folder, without=MANIFEST)
    if written == _manifest(found, version).encode():
        return None
    try:
        files = json.loads(written)["files"]
        names = sorted(files.keys() | found.keys(), key=str)
        wrong = next(name for name in names if files.get(name) != found.get(name))
        then, now = files.get(wrong), found.get(wrong)
        if then is None or now is None:
            return f"{wrong} is missing" if now is None else f"{wrong} is not in its manifest"
        return f"{wrong} has other content" if then[0] == now[0] else f"{wrong} has {now[0]} bytes instead of {then[0]}"
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return f"{MANIFEST} has other content"


def _open_aside(path: Path) -> Path:
    """An empty folder beside `path`; what a killed process left there is removed."""
    aside = path.with_name(ASIDE + path.name)
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    return aside


def _put_in_place(aside: Path, path: Path) -> None:
    """Make a folder durable and give it its name."""
    for part in (*aside.rglob("*"), aside):
        _sync(part)
    if path.exists():
        _discard(path)
    aside.rename(path)
    _sync(path.parent)


def _discard(path: Path) -> None:
    """Remove a folder so that it is never seen half removed under its name."""
    trash = path.with_name(f"{ASIDE}old-{path.name}")
    if trash.exists():
        shutil.rmtree(trash)
    path.rename(trash)
    shutil.rmtree(trash)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
