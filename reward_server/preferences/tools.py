"""The files of labeling tools: what an item and its rankings are in Argilla, Label Studio and Potato.

A tool knows the completions of an item by letters (A, B, ..), which say nothing of who wrote them. The formats are
those of Argilla 2 (`dataset.records.to_json` and `from_json`; values with ranks, as its server and Argilla 1 have them,
are read too), Label Studio 1 (tasks to import and the export "JSON", with the results of a Ranker) and Potato 2 (data
file and the export "jsonl"; the annotated_instances.jsonl of Potato 1 is read too).
"""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from reward_server.preferences.labeling import Comparison

Kind = TypeVar("Kind")
_KINDS = {dict: "an object", list: "a list", str: "a text"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One ranking of an item, as a tool has it."""

    user: str
    """who ranked, as the tool calls them"""
    tiers: tuple[tuple[str, ...], ...]
    """letters of the completions, the best first; those of a tier are tied"""
    seconds: float | None = None
    """how long it took, where the tool tells it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadItem:
    """What a row of a tool's file says of an item."""

    item: str
    """id of the item"""
    shown: Mapping[str, Any]
    """the texts that labelers saw, by the keys of `Tool.shown`, as far as the file repeats them"""
    answers: tuple[Answer, ...]
    """its rankings"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """How a labeling tool writes items and their rankings."""

    shown: Callable[[Comparison, Mapping[str, int]], dict[str, Any]]
    """the texts of an item, given which completion a letter stands for"""
    rows: Callable[[str, dict[str, Any], Sequence[Answer]], list[dict[str, Any]]]
    """the rows of an item, given its id, what is shown and its rankings; without a ranking, it is to be labeled"""
    read: Callable[[Mapping[str, Any], Path], ReadItem]
    """what a row of a file says; raises ValueError for one that is not the tool's"""
    one_list: bool
    """the file is one JSON list, rather than JSON lines"""


def _field(row: Mapping[str, Any], key: str, kind: type[Kind], default: Any = None) -> Kind:
    value = row.get(key, default)
    if not isinstance(value, kind):
        raise ValueError(f'"{key}" must be {_KINDS[kind]}, not {value!r:.60}; is it the file of this tool?')
    return value


def _objects(row: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    values = _field(row, key, list, [])
    if not all(isinstance(value, dict) for value in values):
        raise ValueError(f'"{key}" must be a list of objects, not {values!r:.60}')
    return values


def _user(value: object) -> str:
    """A user by number, name or e-mail address. Raises ValueError."""
    if isinstance(value, dict):
        value = value.get("email") or value.get("id")
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"an answer is by {value!r:.60}, which is no user; export the answers with their users")
    return str(value)


def _order(tiers: Sequence[Sequence[str]]) -> str:
    """Potato's text of a ranking: "B,D=A,C"."""
    return ",".join("=".join(tier) for tier in tiers)


def _tiers(order: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(name.strip() for name in tier.split("=")) for tier in order.split(",") if tier.strip())


def _turns(comparison: Comparison) -> list[dict[str, Any]]:
    return [message.model_dump() for message in comparison.prompt]


def _argilla_user(labeler: str) -> str:
    """Argilla's users are UUIDs; the same for the same labeler."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"rayward labeler {labeler}"))


@cache
def _argilla_labelers() -> dict[str, str]:
    """Labelers by the UUIDs that we wrote for them."""
    return {_argilla_user(labeler): labeler for labeler in (f"p{number}" for number in range(1, 1000))}


def _argilla_shown(comparison: Comparison, letters: Mapping[str, int]) -> dict[str, Any]:
    texts = {f"response-{letter.lower()}": comparison.responses[index] for letter, index in letters.items()}
    return {"prompt": _turns(comparison), **texts}


def _argilla_rows(item: str, shown: dict[str, Any], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """A record. A ranking is a list of names, which has no ties: those are told in the metadata."""
    users = [_argilla_user(answer.user) for answer in answers]
    values = [[f"response-{name.lower()}" for tier in answer.tiers for name in tier] for answer in answers]
    ties = {
        user: _order(answer.tiers)
        for user, answer in zip(users, answers, strict=True)
        if any(len(tier) > 1 for tier in answer.tiers)
    }
    ranking = [{"value": value, "user_id": user} for user, value in zip(users, values, strict=True)]
    return [
        {
            "id": item,
            "fields": shown,
            "metadata": {"ties": json.dumps(ties)} if ties else {},
            "suggestions": {},
            "responses": {"ranking": ranking} if ranking else {},
            "vectors": {},
            "_server_id": None,
        }
    ]


def _argilla_read(row: Mapping[str, Any], path: Path) -> ReadItem:
    fields, metadata = _field(row, "fields", dict), _field(row, "metadata", dict, {})
    ties, answers = json.loads(_field(metadata, "ties", str, "{}")), []
    for response in _objects(_field(row, "responses", dict, {}), "ranking"):
        if response.get("status", "submitted") == "submitted":
            user, tiers = _user(response.get("user_id")), _argilla_tiers(_field(response, "value", list))
            tied = _tiers(str(ties.get(user, ""))) if isinstance(ties, dict) else ()
            if [name for tier in tied for name in tier] == [name for tier in tiers for name in tier]:
                tiers = tied
            answers.append(Answer(user=_argilla_labelers().get(user, user), tiers=tiers))
    return ReadItem(item=str(row.get("id")), shown=fields, answers=tuple(answers))


def _argilla_tiers(values: list[Any]) -> tuple[tuple[str, ...], ...]:
    """Names in their order, or, as the server has them, with ranks of which equal ones are ties."""
    ranked = [
        (value.get("rank", place), value.get("value")) if isinstance(value, dict) else (place, value)
        for place, value in enumerate(values)
    ]
    if not all(type(rank) is int for rank, _ in ranked):
        raise ValueError(f'"value" has ranks that are no integers: {values!r:.60}; rank all completions')
    names = [(rank, str(name).removeprefix("response-").upper()) for rank, name in ranked]
    tiers = groupby(sorted(names, key=lambda pair: pair[0]), key=lambda pair: pair[0])
    return tuple(tuple(name for _, name in tier) for _, tier in tiers)


def _studio_shown(comparison: Comparison, letters: Mapping[str, int]) -> dict[str, Any]:
    items = [{"id": letter, "title": letter, "body": comparison.responses[index]} for letter, index in letters.items()]
    return {"prompt": _turns(comparison), "items": items}


def _studio_rows(item: str, shown: dict[str, Any], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    annotations = [
        {
            "completed_by": {"email": answer.user},
            "was_cancelled": False,
            **({} if answer.seconds is None else {"lead_time": answer.seconds}),
            "result": [
                {
                    "from_name": "rank",
                    "to_name": "responses",
                    "type": "ranker",
                    "value": {
                        "ranker": {str(rank): list(tier) for rank, tier in enumerate(answer.tiers, start=1)},
                    },
                }
            ],
        }
        for answer in answers
    ]
    task = {"data": {"comparison": item, **shown}}
    return [{**task, "annotations": annotations} if annotations else task]


def _studio_read(row: Mapping[str, Any], path: Path) -> ReadItem:
    data, answers = _field(row, "data", dict), []
    for annotation in _objects(row, "annotations"):
        results = [one for one in _objects(annotation, "result") if one.get("type") == "ranker"]
        if results and not annotation.get("was_cancelled"):
            seconds = annotation.get("lead_time")
            answers.append(
                Answer(
                    user=_user(annotation.get("completed_by")),
                    tiers=_studio_tiers(_field(results[0], "value", dict).get("ranker")),
                    seconds=seconds if isinstance(seconds, int | float) and seconds >= 0 else None,
                )
            )
    return ReadItem(item=str(data.get("comparison")), shown=data, answers=tuple(answers))


def _studio_tiers(value: object) -> tuple[tuple[str, ...], ...]:
    """A list without ties, or buckets that are named after ranks; "_" is what was left in the list."""
    if isinstance(value, list):
        return tuple((str(name),) for name in value)
    if not isinstance(value, dict):
        raise ValueError(f'"ranker" must be a list or buckets, not {value!r:.60}; is it the file of this tool?')
    filled = {name: ids for name, ids in value.items() if ids and name != "_"}
    if odd := [name for name, ids in filled.items() if not name.isdecimal() or not isinstance(ids, list)]:
        raise ValueError(f"the bucket {odd[0]!r} is no rank; name the buckets of the Ranker 1, 2, ..")
    return tuple(tuple(map(str, filled[name])) for name in sorted(filled, key=int))


def _potato_shown(comparison: Comparison, letters: Mapping[str, int]) -> dict[str, Any]:
    said = [f"{message.role}: {message.content}" for message in comparison.prompt]
    texts = [f"{letter}: {comparison.responses[index]}" for letter, index in letters.items()]
    return {"text": "\n\n".join(said + texts)}


def _potato_rows(item: str, shown: dict[str, Any], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    ranked = [
        {
            "instance_id": item,
            "user_id": answer.user,
            "labels": {"ranking": {"rank_order": _order(answer.tiers)}},
            "spans": {},
            "links": {},
        }
        for answer in answers
    ]
    return ranked or [{"id": item, **shown}]


def _potato_read(row: Mapping[str, Any], path: Path) -> ReadItem:
    """A row of an export; in Potato 1 the folder that the file is in is called as the user."""
    labels = _field(row, "labels" if "labels" in row else "label_annotations", dict, {})
    ranked = [value for value in labels.values() if isinstance(value, dict) and "rank_order" in value]
    orders = [_field(value, "rank_order", str) for value in ranked]
    if len(orders) > 1:
        raise ValueError(f"the row has {len(orders)} rankings ({', '.join(labels)}); leave one")
    user = _user(row.get("user_id", path.resolve().parent.name)) if orders else ""
    answers = [Answer(user=user, tiers=_tiers(order)) for order in orders if order.strip()]
    shown = {"text": row["text"]} if "text" in row else {}
    return ReadItem(item=str(row.get("instance_id", row.get("id"))), shown=shown, answers=tuple(answers))


TOOLS: dict[str, Tool] = {
    "argilla": Tool(shown=_argilla_shown, rows=_argilla_rows, read=_argilla_read, one_list=True),
    "label-studio": Tool(shown=_studio_shown, rows=_studio_rows, read=_studio_read, one_list=True),
    "potato": Tool(shown=_potato_shown, rows=_potato_rows, read=_potato_read, one_list=False),
}
"""By the name of the format."""
