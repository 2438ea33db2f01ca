"""A disk that is full until it is not, for whatever a run writes itself."""

import errno
import os
from io import FileIO

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
