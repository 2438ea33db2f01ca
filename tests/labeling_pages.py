"""Labeling pages that are served on this machine, with labelers who ask them by HTTP."""

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from reward_server.labeling.config import LabelConfig
from reward_server.labeling.items import Item
from reward_server.labeling.log import FILE, read_events
from reward_server.labeling.page.files import version
from reward_server.labeling.page.server import serve_labeling
from reward_server.labeling.people import People
from reward_server.labeling.project import Project
from reward_server.schema import Message


def ranking(name: str, responses: Sequence[str] = ("first", "second", "third", "fourth"), **more: Any) -> Item:
    """An item whose outputs are to be ranked."""
    return Item.model_validate(
        {
            "id": name,
            "prompt": [Message(role="user", content=f"What is {name}?")],
            "responses": tuple(responses),
            "ended": (True,) * len(responses),
        }
        | more
    )


@dataclass(kw_only=True)
class Served:
    """A page, and who may use it."""

    folder: Path
    """with people.json, log.jsonl and audit.jsonl"""
    url: str
    """where it is served"""
    tokens: dict[str, str]
    """by name"""

    def labeler(self, name: str = "Anna") -> "Labeler":
        """Somebody who has signed in."""
        client = httpx.Client(base_url=self.url, headers={"X-Rayward": "1"}, timeout=20)
        client.post("/api/session", json={"token": self.tokens[name]}).raise_for_status()
        return Labeler(client)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Those of the log of one kind."""
        return [event for event in read_events(self.folder / FILE) if event["kind"] == kind]


@dataclass
class Labeler:
    """A browser's view of the API."""

    client: httpx.Client
    ids: list[str] = field(default_factory=list)
    """assignments that were submitted"""

    def next(self) -> dict[str, Any] | None:
        """What is to be done."""
        return self.client.post("/api/next", json={}).raise_for_status().json()["assignment"]

    def change(self, path: str, assignment: dict[str, Any], answer: dict[str, Any], **more: Any) -> httpx.Response:
        """Post a draft or a submission."""
        body = {"assignment": assignment["id"], "version": assignment["version"], "answer": answer, "seconds": 9.5}
        return self.client.post(f"/api/{path}", json={**body, "key": str(uuid.uuid4()), **more})

    def rank(self, ranks: Sequence[int]) -> httpx.Response:
        """Rank what is next, in the order shown, and submit it."""
        assignment = self.next()
        assert assignment is not None
        self.ids.append(assignment["id"])
        return self.change("submit", assignment, whole(ranks)).raise_for_status()


def whole(ranks: Sequence[int | None], quality: int | None = 4) -> dict[str, Any]:
    """An answer with ranks, and the same quality for all."""
    return {"ranks": list(ranks), "ratings": [{"quality": quality, "flags": []} for _ in ranks]}


@contextlib.contextmanager
def serving(
    folder: Path, items: Sequence[Item], names: Sequence[str] = ("Anna",), admin: str = "Chief", **settings: Any
) -> Iterator[Served]:
    """Serve a page for people with these names, who are invited unless they are known."""
    config = LabelConfig.model_validate(
        {"port": 0, "words_per_minute": 0, "gold_share": 0, "repeat_share": 0} | settings
    )
    people = People(folder / "people.json")
    known = {person.name for person in people.all}
    tokens = {name: people.invite(name, admin=name == admin)[1] for name in (*names, admin) if name not in known}
    project = Project(folder, config, items, page=version())
    with contextlib.closing(project):
        server = serve_labeling(project, people, config, folder / "audit.jsonl")
        with contextlib.closing(server):
            yield Served(folder=folder, url=server.url, tokens=tokens)
