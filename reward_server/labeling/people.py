"""Who may label and who may see progress: names and hashes of tokens, in one file that only its owner can read."""

import contextlib
import fcntl
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reward_server.preferences.records import RecordError, write_whole

FILE = "people.json"
_ID = re.compile(r"^p[0-9]+$")
_NAME_LENGTH = 100


class Person(BaseModel):
    """Somebody who was invited."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: str = Field(pattern=_ID)
    """What stands for the name in the log and in every export: p1, p2, .."""
    name: str
    """As the person is called here."""
    admin: bool = False
    """Sees everybody's progress, and does not label."""
    token: str | None = Field(default=None, repr=False)
    """SHA-256 of the token, in hex; None once it was revoked."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    people: list[Person]


class People:
    """The people of a run. The file is read again when it has changed, so that others can be invited meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, ...] | None = None
        self._people: list[Person] = []

    @property
    def all(self) -> list[Person]:
        """Everybody who was ever invited, in that order. Raises RecordError for a file that cannot be read."""
        self._read()
        return list(self._people)

    @property
    def labelers(self) -> list[Person]:
        """Those who may label now."""
        return [person for person in self.all if person.token and not person.admin]

    def invite(self, name: str, admin: bool = False) -> tuple[str, str]:
        """(id, token) of a person; the token is kept nowhere, and cannot be shown again.

        Somebody whose token was revoked keeps the id. Raises ValueError for a name that is in use, or is none.
        """
        name = name.strip()
        if not name or not name.isprintable() or len(name) > _NAME_LENGTH or _ID.fullmatch(name):
            raise ValueError(
                f"{name[:_NAME_LENGTH]!r} is no name: give 1 to {_NAME_LENGTH} visible characters, and not an id such "
                "as p1"
            )
        token = secrets.token_urlsafe(32)
        with self._changing():
            known = next((person for person in self._people if person.name == name), None)
            if known and known.token:
                raise ValueError(f"{name!r} is invited already, as {known.id}: revoke that first, or take another name")
            own = known.id if known else f"p{len(self._people) + 1}"
            person = Person(id=own, name=name, admin=admin, token=_hash(token))
            others = [one for one in self._people if one.id != own]
            self._write(sorted([*others, person], key=lambda one: int(one.id[1:])))
        return own, token

    def revoke(self, name_or_id: str) -> Person:
        """End what a person's token opens, from the next request on. Raises ValueError when there is nothing to end."""
        with self._changing():
            for index, person in enumerate(self._people):
                if person.token and name_or_id in (person.name, person.id):
                    gone = person.model_copy(update={"token": None})
                    self._write([*self._people[:index], gone, *self._people[index + 1 :]])
                    return gone
            known = ", ".join(f"{person.name} ({person.id})" for person in self._people if person.token)
            raise ValueError(f"{name_or_id!r} is not invited: there are {known or 'none'}")

    def who(self, token: str) -> Person | None:
        """Whose token it is. Takes as long for any, right or wrong."""
        self._read()
        digest, found = _hash(token), None
        for person in self._people:
            if hmac.compare_digest(digest, person.token or ""):
                found = person
        return found

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Be the only one who changes the file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            self._read()
            yield
        finally:
            os.close(folder)

    def _read(self) -> None:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            self._people, self._stamp = [], None
            return
        stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
        if stamp == self._stamp:
            return
        try:
            self._people = _File.model_validate_json(self._path.read_bytes()).people
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            raise RecordError(
                f"{self._path}: {'.'.join(map(str, first['loc'])) or 'it'} is not as it was written ({first['msg']}). "
                "Remedy: put back a copy, or remove it and invite everybody again"
            ) from None
        self._stamp = stamp

    def _write(self, people: list[Person]) -> None:
        text = json.dumps({"people": [person.model_dump() for person in people]}, ensure_ascii=False, indent=1)
        write_whole(self._path, f"{text}\n", mode=0o600)


def _hash(token: str) -> str:
    return sha256(token.encode("utf-8", "replace")).hexdigest()
