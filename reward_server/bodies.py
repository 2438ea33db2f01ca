"""Bodies of posts as they arrive: bounded in bytes, time and requests before anything of them is parsed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from reward_server.config import Limits

_STRUCTURE = b"{}[],"
_TEXT = bytes(set(range(256)) - set(_STRUCTURE))
_MARKS = 256  # of the structure, for each request that is allowed: parsed, each takes many bytes


class Busy(Exception):
    """Too much is waiting."""


class TooLarge(ValueError):
    """A post holds more than one may."""


class TooSlow(ValueError):
    """A body did not come in time."""


class Bodies:
    """The bodies of all posts that have no answer yet. Belongs to one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.bytes = 0
        """What they take together."""

    @contextlib.asynccontextmanager
    async def read(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytearray]:
        """A body, of which the bytes count until the block ends.

        Raises TooLarge, TooSlow, and Busy where all bodies together are too large.
        """
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(self._limits.read_s):
                    await self._fill(body, pieces)
            except TimeoutError as error:
                raise TooSlow(f"the body took longer than {self._limits.read_s:g} s") from error
            yield body
        finally:
            self.bytes -= len(body)

    async def _fill(self, body: bytearray, pieces: AsyncIterator[bytes]) -> None:
        limits, outline = self._limits, _Outline()
        async for piece in pieces:
            body += piece
            self.bytes += len(piece)
            outline.feed(piece)
            if len(body) > limits.max_body_bytes:
                raise TooLarge(f"the body has more than {limits.max_body_bytes} bytes; split it")
            if outline.items > limits.max_requests or outline.marks > _MARKS * limits.max_requests:
                raise TooLarge(f"more than {limits.max_requests} requests in one post; send fewer")
            if self.bytes > limits.max_bytes:
                raise Busy(f"the posts under way hold more than {limits.max_bytes} bytes; ask again later")


class _Outline:
    """What a JSON object that comes in pieces is made of, without parsing it."""

    def __init__(self) -> None:
        self.items = 1
        """Elements of the array in it."""
        self.marks = 0
        """Brackets and commas, strings apart."""
        self._depth = 0
        self._in_string = False
        self._escape = b""

    def feed(self, piece: bytes) -> None:
        text = (self._escape + piece).replace(rb"\\", b"")
        self._escape = b"\\" if text.endswith(b"\\") else b""
        parts = text.removesuffix(b"\\").replace(rb"\"", b"").split(b'"')
        marks = b"".join(parts[self._in_string :: 2]).translate(None, _TEXT)
        self._in_string ^= len(parts) % 2 == 0
        self.marks += len(marks)
        for mark in marks:
            if mark in b"{[":
                self._depth += 1
            elif mark in b"}]":
                self._depth -= 1
            elif self._depth == 2:
                self.items += 1
