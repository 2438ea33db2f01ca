"""Who may ask for what: hosts, origins, tokens, rates. What is refused is in the audit log."""

from typing import NoReturn
from urllib.parse import urlsplit

from fastapi import HTTPException, Request

from reward_server.address import is_loopback
from reward_server.labeling.config import LabelConfig
from reward_server.labeling.page.audit import Audit
from reward_server.labeling.page.limits import Rate
from reward_server.labeling.people import People, Person
from reward_server.listening import host_name

COOKIE = "rayward"
"""The cookie with a person's token."""


class Guard:
    """Lets requests through, or raises HTTPException. Its public methods but `sign_in` are dependencies of routes."""

    def __init__(self, people: People, config: LabelConfig, audit: Audit) -> None:
        self._people = people
        self._audit = audit
        self._url = urlsplit(config.url or "")
        self._local = is_loopback(config.host)
        self._requests = Rate(config.limits.requests_per_minute)
        self._failures = Rate(config.limits.sign_ins_per_minute)

    async def host(self, request: Request) -> None:
        """421 for a name that is not ours, under which another site's page could reach the loopback."""
        name = host_name(request)
        if self._local and not is_loopback(name) and name != self._url.hostname:
            also = f" or {self._url.hostname}" if self._url.hostname else "; set label.url for another name"
            raise HTTPException(421, f"this page is served as 127.0.0.1 or localhost{also}, not as {name!r}")

    async def own_page(self, request: Request) -> None:
        """403 for a post that does not come from our own page."""
        origin = request.headers.get("origin")
        ours = (request.headers.get("host"), self._url.netloc or None)
        if request.headers.get("x-rayward") != "1":
            self._refuse(request, 403, "the header X-Rayward: 1 is missing")
        if origin is not None and urlsplit(origin).netloc not in ours:
            self._refuse(request, 403, f"the page of {origin} may not post here")
        if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            self._refuse(request, 403, "a page of another site may not post here")

    def sign_in(self, request: Request, token: str) -> Person:
        """Whose token it is; 429 after too many wrong ones from an address, 401 for a wrong one."""
        self._slow_down(self._failures, address(request), "too many failed sign-ins from this address")
        person = self._people.who(token)
        if person is None:
            self._refuse(request, 401, "this link is not valid, or was revoked; ask for a new one")
        self._audit.note("signed in", address(request), by=person.id)
        return person

    async def person(self, request: Request) -> Person:
        """Who asks; 401 without a valid cookie, 429 for who asks too often."""
        token = request.cookies.get(COOKIE)
        if token is None:
            raise HTTPException(401, "sign in with the link of your invitation")
        # Whoever is signed in is not held up by the mistakes of a neighbour behind the same address.
        person = self._people.who(token)
        if person is None:
            self._slow_down(self._failures, address(request), "too many failed sign-ins from this address")
            self._refuse(request, 401, "this link is no longer valid; ask for a new one")
        self._slow_down(self._requests, person.id, "too many requests")
        self._requests.count(person.id)
        return person

    async def labeler(self, request: Request) -> Person:
        """Who asks; 403 for an admin, whose rankings would be measured by nobody."""
        person = await self.person(request)
        if person.admin:
            raise HTTPException(403, "an admin's link does not label: invite yourself as a labeler, too")
        return person

    async def admin(self, request: Request) -> Person:
        """Who asks; 403 for who is no admin."""
        person = await self.person(request)
        if not person.admin:
            self._refuse(request, 403, "this needs an admin's link", by=person.id)
        return person

    def secure(self, request: Request) -> bool:
        """Whether browsers reach the page by TLS."""
        return "https" in (self._url.scheme, request.url.scheme)

    def _slow_down(self, rate: Rate, key: str, why: str) -> None:
        if (wait := rate.wait_s(key)) > 0:
            raise HTTPException(429, f"{why}; try again later", {"Retry-After": str(int(wait) + 1)})

    def _refuse(self, request: Request, status: int, why: str, by: str | None = None) -> NoReturn:
        asked = address(request)
        if self._failures.wait_s(asked) == 0:  # so that nobody fills the disk with it
            self._audit.note("refused", asked, by=by, path=request.url.path, why=why)
        self._failures.count(asked)
        raise HTTPException(status, why)


def address(request: Request) -> str:
    """Where a request comes from: of a proxy that `label.url` speaks of, what it says."""
    return request.client.host if request.client else "unknown"
