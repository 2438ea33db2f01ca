"""The replicas of a reward server, as a client sees them: who is asked next, and what an answer must be like."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

_RETRIED_STATUS = frozenset({408, 425, 429})
_OF_ONE_REQUEST = frozenset({400, 413, 422})
_REST_S = 5.0  # for which a replica that failed is left alone, as long as there is another one


class RewardRefused(ValueError):
    """The server refuses the request itself (token, size, text), so asking again cannot help."""


class RequestRefused(RewardRefused):
    """The server refuses this one request, such as a text that is too long for it; it may answer others."""


class Unanswered(Exception):
    """One attempt failed in a way that another may not. The text names the replica and the reason."""


@dataclass(slots=True, eq=False)
class Replica:
    """One copy of the service."""

    url: str
    """where it is, without a slash at the end"""
    under_way: int = 0
    """attempts of this client that it has not answered yet"""
    rests_until: float = 0.0
    """monotonic seconds until which others are asked first"""


class Replicas:
    """The copies of one service, and the connections to them. For use in one event loop."""

    def __init__(self, urls: Sequence[str], token: str | None, called: str = "the reward server") -> None:
        """Remember where they are, and what errors call them; the first attempt connects."""
        self.called = called
        self.all = tuple(Replica(url.rstrip("/")) for url in urls)
        self._headers = {"content-type": "application/json"}
        if token is not None:
            self._headers["authorization"] = f"Bearer {token}"
        self._http: httpx.AsyncClient | None = None

    @property
    def rested(self) -> bool:
        """Whether there is one that has not failed lately."""
        return any(replica.rests_until <= time.monotonic() for replica in self.all)

    def next(self) -> Replica:
        """Who is to be asked: of those that have not failed lately, the one with the fewest posts under way."""
        now = time.monotonic()
        return min(self.all, key=lambda one: (one.rests_until > now, one.under_way, one.rests_until))

    async def ask(self, replica: Replica, path: str, body: bytes | None, limit: int, seconds: float) -> bytes:
        """GET a path, or POST a body to it, once; returns an answer of at most `limit` bytes.

        Raises Unanswered when there is none within `seconds` or the server fails, RewardRefused when it refuses.
        """
        replica.under_way += 1
        try:
            async with asyncio.timeout(seconds):
                answer = await self._answer(replica.url, path, body, limit)
        except TimeoutError as error:
            raise self.failed(replica, f"no answer within {seconds:.3g} s") from error
        except httpx.RequestError as error:
            raise self.failed(replica, f"{type(error).__name__}: {error}") from error
        finally:
            replica.under_way -= 1
        status, said = answer
        if status == 200:
            return said
        reason = f"HTTP {status}: {said[:500].decode(errors='replace')}"
        if status >= 500 or status in _RETRIED_STATUS:
            raise self.failed(replica, reason)
        refused = RequestRefused if status in _OF_ONE_REQUEST else RewardRefused
        raise refused(f"{self.called} {replica.url} refuses {path}: {reason}")

    def failed(self, replica: Replica, reason: str) -> Unanswered:
        """Leave a replica alone for a moment; the error to raise."""
        replica.rests_until = time.monotonic() + _REST_S
        return Unanswered(f"{replica.url}: {reason}" if len(self.all) > 1 else reason)

    async def _answer(self, url: str, path: str, body: bytes | None, limit: int) -> tuple[int, bytes]:
        if self._http is None:
            # Not the proxies and passwords of the environment: a token is only for the server that was named.
            self._http = httpx.AsyncClient(headers=self._headers, timeout=None, trust_env=False)
        async with self._http.stream("GET" if body is None else "POST", url + path, content=body) as response:
            answer = bytearray()
            async for piece in response.aiter_bytes():
                answer += piece
                if len(answer) > limit:
                    raise httpx.DecodingError(f"the answer is longer than {limit} bytes")
        return response.status_code, bytes(answer)

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.aclose()
            self._http = None
