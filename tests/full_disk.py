"""A disk that is full until it is not, for whatever a run writes itself."""

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import pytest

from learner.data import journal


class FullDisk:
    """While `full`, no line is written to the end and no small file is made."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.full = False
        self.refused = 0
        fsync, disk = os.fsync, self

        class File(FileIO):
            def write(self, data: bytes, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
                if disk.full and len(data) > 3:
                    return super().write(data[:3])  # as much as there is room for
                disk.check()
                return super().write(data)

        def checked(file: int) -> None:
            self.check()
            fsync(file)

        patch.setattr(journal, "FileIO", File)
        patch.setattr(os, "fsync", checked)

    def check(self) -> None:
        if self.full:
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "64k") -> Iterator[None]:
    """A real disk at a folder, where one can be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(file: Path) -> None:
    """Take all room that is left."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as rest:
        while rest.write(b"0" * 4096):
            pass
