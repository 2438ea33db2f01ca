"""What a field's type says: in words for people, and whether it holds a section."""

from collections.abc import Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def describe(field: FieldInfo) -> str:
    """The field's type and bounds in words: `float >= 0 and < 1`, `"fixed" or "adaptive"`, `list of int`."""
    return _words(field.annotation, field.metadata)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class of a field that holds a section, or may; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    sections = (section_of(part) for part in _alternatives(annotation))
    return next((section for section in sections if section is not None), None)


def admits_none(annotation: Any) -> bool:
    """Whether the field may be None."""
    return annotation is NoneType or any(admits_none(part) for part in _alternatives(annotation))


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, an Annotated looked through; nothing for any other type."""
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[:1]
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()


def _words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """`metadata` has the bounds; in a union they are those of its first member."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], [*annotation.__metadata__, *metadata])
    if origin in (Union, UnionType):
        return " or ".join([_words(arguments[0], metadata), *map(_words, arguments[1:])])
    if origin is Literal:
        return " or ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in arguments)
    if origin in (tuple, list, set, frozenset):
        return f"list of {_words(arguments[0])}"
    if origin is dict:
        return f"table of {_words(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    name = {NoneType: "none", Path: "path", str: "text", bool: "true or false"}.get(annotation)
    bounds = " and ".join(_bounds(metadata))
    return " ".join(filter(None, [name or getattr(annotation, "__name__", str(annotation)), bounds]))


def _bounds(metadata: Iterable[Any]) -> Iterable[str]:
    for one in metadata:
        yield from _bounds(one.metadata if isinstance(one, FieldInfo) else ())
        yield from (f"{sign} {getattr(one, name):g}" for name, sign in BOUNDS.items() if hasattr(one, name))
