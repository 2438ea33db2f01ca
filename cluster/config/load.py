"""Settings from TOML files and the command line, for any tree of pydantic sections.

A setting has a dotted key: field `coef` of the section `kl` of the section `ppo` is `ppo.kl.coef`; in TOML
`[ppo.kl]` and `coef = 0.05`, on the command line `--ppo.kl.coef 0.05`. What is given later wins. TOML lacks
None: `"none"` means it. A path counts from where it is given, a file's folder or the working directory, and is absolute
from then on. Nothing here knows any particular section.
"""

import contextlib
import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import formatannotation
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from reward_server.config import NameOrPath
from reward_server.preferences.records import write_whole
from reward_server.redaction import SECRET_NAME, holder

Section = TypeVar("Section", bound=BaseModel)
COMMAND_LINE = "command line"
PRESETS = Path(__file__).parent / "presets"
_SECRET = "Remedy: set it in the environment or in a file of mode 0600; settings are shown, and kept with the run"
_IN_SECTION = "Remedy: --{0}.NAME VALUE; --help {0} lists its settings"
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def presets() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


class ConfigError(ValueError):
    """The configuration is wrong. The text names each key, its value, where it came from and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One field in the tree of sections."""

    key: str
    """Dotted key."""
    field: FieldInfo
    """Pydantic's record of its type, bounds and doc."""
    default: Any
    """The value when nothing is given; `...` when one must be given."""
    section: type[BaseModel] | None
    """The section it holds, whose fields are settings too; None for a plain value."""

    @property
    def type(self) -> str:
        """Its type and bounds as Python has them, e.g. `float >= 0 and < 1`, `int >= 1 | None`."""
        found = ((sign, getattr(one, name, None)) for one in self.field.metadata for name, sign in _BOUNDS.items())
        bounds = " and ".join(f"{sign} {bound:g}" for sign, bound in found if bound is not None)
        name, none, _ = re.sub(r"\b(\w+\.)+(?=\w)", "", formatannotation(self.field.annotation)).partition(" | None")
        return f"{name} {bounds}".strip() + none

    @property
    def default_text(self) -> str:
        """`default 0.05`, as it is written in TOML."""
        return f"default {as_toml(self.default)}"

    @property
    def doc(self) -> str:
        """What it means, on one line."""
        return " ".join((self.field.description or self.section.__doc__ or "").split())

    def fits(self, value: Any) -> bool:
        """Whether it may have this value."""
        with contextlib.suppress(ValidationError):
            annotated: Any = Annotated[self.field.annotation, self.doc, *self.field.metadata]
            TypeAdapter(annotated).validate_python(value)
            return True
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A value that somebody gave."""

    key: str
    """Dotted key of a setting that exists."""
    value: Any
    """As TOML has it."""
    text: str
    """As it was written."""
    origin: str
    """Where: file and line, or the command line."""

    def __str__(self) -> str:
        return f"{self.key} = {self.text} ({self.origin})"


def settings(section: type[BaseModel], default: BaseModel | None = None, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a section and of the sections in it, in the order in which they are declared.

    default: the instance that the section around it holds by default; its values come before the class's own.
    """
    default = section.model_construct() if default is None else default
    for name, field in section.model_fields.items():
        value, inner = getattr(default, name), _section_of(field.annotation)
        yield Setting(key=prefix + name, field=field, default=value, section=inner)
        if inner is not None:
            yield from settings(inner, value, f"{prefix}{name}.")


def read_toml(section: type[BaseModel], path: Path, folder: Path | None = None) -> list[Given]:
    """The values in a TOML file, whose paths count from `folder`, by default its own.

    Raises ConfigError when it cannot be read or is not TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}). Remedy: correct the path") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a TOML file: {error}. Remedy: correct it there") from error
    plain, lines = {one.key for one in settings(section) if not one.section}, _lines(text)
    given = (
        Given(key=key, value=value, text=as_toml(value), origin=f"{path}{lines.get(key, '')}")
        for key, value in _leaves(plain, table)
    )
    return moved(section, given, _from(folder or path.absolute().parent))


def read_overrides(section: type[BaseModel], pairs: Iterable[tuple[str, str | None]]) -> list[Given]:
    """The values of `--key value` on the command line; `pairs` has the keys without their dashes.

    A value is the text itself if it fits, else the text read as TOML, so that 0.05, true, [1, 2] and words need no
    quotes. A key without one switches a true-or-false setting on. Raises ConfigError where there is no value.
    """
    known, given = {one.key: one for one in settings(section)}, []
    for name, text in pairs:
        key = name.replace("-", "_")
        setting = known.get(key)
        if text is None and setting and setting.section:
            raise ConfigError(f"--{key} is a section. {_IN_SECTION.format(key)}")
        if text is None and setting and setting.field.annotation is not bool:
            raise ConfigError(f"--{key} has no value. It takes {setting.type}: {setting.doc}")
        values: list[Any] = [text := "true" if text is None else text]
        with contextlib.suppress(tomllib.TOMLDecodeError):
            values.append(tomllib.loads(f"v = {text}")["v"])
        value = next(filter(setting.fits, values), values[-1]) if setting else text
        given.append(Given(key=key, value=value, text=text, origin=COMMAND_LINE))
    return moved(section, given, _from(Path.cwd()))


def moved(section: type[BaseModel], given: Iterable[Given], move: Callable[[str, bool], str]) -> list[Given]:
    """The same with `move(path, whether it may be a name)` for each path."""
    fields, found = {one.key: one.field for one in settings(section)}, []
    for one in given:
        value = _moved(fields[one.key], one.value, move) if one.key in fields else one.value
        text = value if isinstance(value, str) else as_toml(value)
        found.append(one if value == one.value else replace(one, value=value, text=text))
    return found


def compose(section: type[Section], given: Sequence[Given]) -> Section:
    """The section with its defaults, overlaid by what was given, in order.

    Raises ConfigError with a line for every key that does not exist, and value that does not fit or holds a secret.
    """
    known, errors = {one.key: one for one in settings(section)}, []
    tree = section.model_construct().model_dump()
    for one in given:
        if held := holder(one.text):
            errors.append(f"{one.key} ({one.origin}) holds {held}. {_SECRET}")
        elif one.key not in known:
            errors.append(_unknown(one, known))
        else:
            *sections, name = one.key.split(".")
            table = tree
            for part in sections:
                if not isinstance(table.get(part), dict):
                    table[part] = {}
                table = table[part]
            table[name] = None if one.value == "none" and known[one.key].fits(None) else one.value
    try:
        if not errors:
            return section.model_validate(tree)
    except ValidationError as error:
        errors = [_explain(known, given, one) for one in error.errors()]
    raise ConfigError("\n".join(dict.fromkeys(errors)))


def to_toml(config: BaseModel) -> str:
    """Every setting, so that the text read back gives an equal config."""
    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def save_toml(config: BaseModel, path: Path) -> None:
    """Write every setting into a file."""
    write_whole(path, to_toml(config))


def as_toml(value: Any) -> str:
    """A value as it is written in TOML, on one line."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {as_toml(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps("none" if value is None else value, default=str, ensure_ascii=False)


def nearest(word: str, words: Iterable[str], likeness: float = 0.6) -> str | None:
    """Which of `words` was probably meant by `word`; of a dotted key the front is easily left out."""
    words = list(words)
    ends = [other for other in words if other.endswith("." + word)]
    return next(iter(ends or difflib.get_close_matches(word, words, n=1, cutoff=likeness)), None)


def _from(folder: Path) -> Callable[[str, bool], str]:
    """Makes a path from `folder` absolute."""

    def absolute(text: str, named: bool) -> str:
        path = folder / os.path.expanduser(text)
        return text if named and not (text.startswith((".", "/", "~")) or os.path.exists(path)) else str(path)

    return absolute


def _moved(field: FieldInfo, value: Any, move: Callable[[str, bool], str], kind: str | None = None) -> Any:
    """A value of a field, with its paths moved; `kind` is that of the row that it is in."""
    parts = get_args(field.annotation)
    named = any(isinstance(one, NameOrPath) and one.kind == kind for one in field.metadata)
    if get_origin(field.annotation) is tuple and (named or Path in parts):
        each = value.split(",") if isinstance(value, str) else value
        return [move(one, named) if isinstance(one, str) else one for one in each] if isinstance(each, list) else each
    if isinstance(value, str) and value != "none":
        return move(value, named) if named or Path in (field.annotation, *parts) else value
    if isinstance(value, list) and (row := next(filter(None, map(_section_of, parts)), None)):
        return [_moved_row(row, one, move) if isinstance(one, dict) else one for one in value]
    return value


def _moved_row(section: type[BaseModel], row: Mapping[str, Any], move: Callable[[str, bool], str]) -> dict[str, Any]:
    fields = section.model_fields
    kind = row.get("kind", fields["kind"].default) if "kind" in fields else None
    return {key: _moved(fields[key], value, move, kind) if key in fields else value for key, value in row.items()}


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class of a field that holds a section, or may; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType, Annotated) else ()
    return next(filter(None, map(_section_of, parts)), None)


def _leaves(plain: Collection[str], table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and key not in plain:
            yield from _leaves(plain, value, key + ".")
        else:
            yield key, value


def _lines(text: str) -> dict[str, str]:
    """`, line N` of each plain `key = value` in a TOML text, from 1; keys in inline tables are left out."""
    lines: dict[str, str] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([\w.\s-]+)\]", line):
            table = re.sub(r"\s", "", header[1]) + "."
        elif pair := re.match(r"\s*([\w-]+(?:\s*\.\s*[\w-]+)*)\s*=", line):
            lines.setdefault(table + re.sub(r"\s", "", pair[1]), f", line {number}")
    return lines


def _unknown(one: Given, known: Iterable[str]) -> str:
    if SECRET_NAME.search(one.key.replace(".", "_").upper()):
        return f"{one.key} = [hidden] ({one.origin}): there is no such key. {_SECRET}"
    near = nearest(one.key, known)
    remedy = f"Did you mean {near}?" if near else "Remedy: --help all, after the command, lists every key"
    return f"{one}: there is no such key. {remedy}"


def _explain(known: Mapping[str, Setting], given: Sequence[Given], error: Any) -> str:
    """One of pydantic's errors in a line: key, value, origin, reason, remedy."""
    key = ""
    for part in error["loc"]:  # ends in places inside a list, which are no part of the key
        longer = f"{key}.{part}" if key else str(part)
        key = longer if longer in known else key
    inside = ".".join(map(str, error["loc"])).removeprefix(key)
    reason = error["msg"].removeprefix("Value error, ").rstrip(".")
    setting = known.get(key)
    if setting is None or setting.section:
        parts = [str(one) for one in given if one.key.startswith(key)]
        if setting and any(one.key == key for one in given):
            reason = f"it is a section. {_IN_SECTION.format(key)}"
        return f"{key or 'configuration'}: {reason}" + (f" [given: {', '.join(parts)}]" if key and parts else "")
    source = next((one for one in reversed(given) if f"{key}.".startswith(f"{one.key}.")), None)
    value = f"{source.text} ({source.origin})" if source else as_toml(setting.default)
    where = f", at {inside[1:]}" if inside else ""
    takes = f"It takes {setting.type}, {setting.default_text}: {setting.doc}"
    return f"{key} = {value}{where}: {reason[:1].lower()}{reason[1:]}. {takes}".rstrip(": ")


def _without_none(value: Any, in_list: bool = False) -> Any:
    """None becomes "none"; in the tables of a list, where "none" has no such meaning, it is left out."""
    if isinstance(value, dict):
        kept = {name: part for name, part in value.items() if part is not None or not in_list}
        return {name: _without_none(part, in_list) for name, part in kept.items()}
    if isinstance(value, list):
        return [_without_none(part, in_list=True) for part in value]
    return "none" if value is None else value
