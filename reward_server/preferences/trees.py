"""Ranked conversation trees (OpenAssistant): sibling replies of the assistant, at any depth, are one comparison.

A tree is {"message_tree_id", "prompt": message}, a message {"text", "role": "prompter" | "assistant", "rank"?,
"replies": [message, ..]}; of siblings the one of rank 0 is the best.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from reward_server.schema import Message

_ROLES = {"prompter": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Siblings:
    """The ranked replies to one message."""

    name: str
    """the tree's id, and the place: the number of the reply taken at each message from the root"""
    prompt: tuple[Message, ...]
    """the path from the root to the message that they answer"""
    responses: tuple[str, ...]
    """their texts, at least 1"""
    ranks: tuple[int, ...]
    """theirs, 0 is best"""
    unranked: int
    """siblings that were left out, since nobody ranked them or they were deleted"""


def is_tree(row: dict[str, Any]) -> bool:
    """Tell a row that is a whole tree from one comparison."""
    return isinstance(row.get("prompt"), dict)


def sibling_groups(name: str, tree: dict[str, Any]) -> list[Siblings]:
    """Every group of assistant replies with a rank, from the root down. Raises ValueError for a malformed message."""
    return list(_below(name, tree["prompt"], (), "prompt"))


def _below(name: str, message: Any, path: tuple[Message, ...], where: str) -> Iterator[Siblings]:
    text, role, replies = _parts(message, where)
    path = (*path, Message(role=_ROLES[role], content=text))  # pyright: ignore[reportArgumentType]
    found = [
        (*_parts(reply, f"{where}.replies.{number}"), _rank(reply, f"{where}.replies.{number}"))
        for number, reply in enumerate(replies)
    ]
    answers = [(text, rank) for text, role, _, rank in found if role == "assistant"]
    ranked = [(text, rank) for text, rank in answers if rank is not None and text.strip()]
    if answers and role == "prompter":
        yield Siblings(
            name=name,
            prompt=path,
            responses=tuple(text for text, _ in ranked),
            ranks=tuple(rank for _, rank in ranked),
            unranked=len(answers) - len(ranked),
        )
    for number, reply in enumerate(replies):
        yield from _below(f"{name}.{number}", reply, path, f"{where}.replies.{number}")


def _parts(message: Any, where: str) -> tuple[str, str, list[Any]]:
    if isinstance(message, dict):
        text, role, replies = message.get("text"), message.get("role"), message.get("replies", [])
        if isinstance(text, str) and role in _ROLES and isinstance(replies, list):
            return text, role, replies
    raise ValueError(
        f'{where} must be {{"text": str, "role": "prompter" or "assistant", "replies": [..]}}, not {message!r:.60}'
    )


def _rank(message: dict[str, Any], where: str) -> int | None:
    rank = message.get("rank")
    if message.get("deleted") is True or rank is None:
        return None
    if type(rank) is not int or rank < 0:
        raise ValueError(f"{where}.rank must be an integer, 0 for the best, or missing, not {rank!r:.60}")
    return rank
