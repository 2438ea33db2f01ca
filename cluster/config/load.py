"""Settings from TOML files and the command line, for any tree of pydantic sections.

A setting has a dotted key: field `coef` of the section `kl` of the section `ppo` is `ppo.kl.coef`; in TOML
`[ppo.kl]` and `coef = 0.05`, on the command line `--ppo.kl.coef 0.05`. What is given later wins. TOML lacks
None: `"none"` means it. Nothing here knows any particular section.
"""

import contextlib
import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tomli_w
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from cluster.config.annotations import admits_none, describe, section_of
from cluster.config.redaction import SECRET_NAME, holder
from reward_server.preferences.records import write_whole

Section = TypeVar("Section", bound=BaseModel)
PRESETS = Path(__file__).parent / "presets"
COMMAND_LINE = "command line"
SECRET_REMEDY = "Remedy: set it in the environment or in a file of mode 0600; settings are shown, and kept with the run"
"""For a key or token that somebody puts into a setting."""


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
        """Its type and bounds in words, e.g. `float >= 0`."""
        return describe(self.field)

    @property
    def default_text(self) -> str:
        """`default 0.05`, as it is written in TOML, or `required`."""
        return "required" if self.default is ... else f"default {as_toml(self.default)}"

    @property
    def doc(self) -> str:
        """What it means, on one line."""
        return " ".join((self.field.description or "").split())


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


def settings(section: type[BaseModel], default: BaseModel | None = None, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a section and of the sections in it, in the order in which they are declared.

    default: the instance that the section around it holds by default; its values come before the class's own.
    """
    for name, field in section.model_fields.items():
        value = getattr(default, name, ...)
        if value is ... and not field.is_required():
            value = field.get_default(call_default_factory=True, validated_data={})
        inner = section_of(field.annotation)
        yield Setting(key=prefix + name, field=field, default=value, section=inner)
        if inner is not None:
            yield from settings(inner, value if isinstance(value, inner) else None, f"{prefix}{name}.")


def read_toml(section: type[BaseModel], path: Path) -> list[Given]:
    """The values in a TOML file.

    Raises ConfigError when the file cannot be read, is not TOML, or has an unknown key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}). Remedy: correct the path") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a TOML file: {error}. Remedy: correct it there") from error
    known = _by_key(section)
    lines = _lines(text)
    given = [
        Given(
            key=key,
            value=value,
            text=as_toml(value),
            origin=f"{path}, line {lines[key]}" if key in lines else str(path),
        )
        for key, value in _leaves(known, table)
    ]
    _refuse_unknown(known, given)
    return given


def read_overrides(section: type[BaseModel], pairs: Iterable[tuple[str, str | None]]) -> list[Given]:
    """The values of `--key value` on the command line; `pairs` has the keys without their dashes.

    A key without a value switches a true-or-false setting on. Raises ConfigError for an unknown key.
    """
    known = _by_key(section)
    given = []
    for name, text in pairs:
        key = name.replace("-", "_")
        if text is None:
            if key in known and known[key].section:
                raise ConfigError(f"--{key} is a section. Remedy: --{key}.NAME VALUE; --help {key} lists its settings")
            if key in known and known[key].field.annotation is not bool:
                raise ConfigError(f"--{key} has no value. It takes {known[key].type}: {known[key].doc}")
            text = "true"
        value = _parse(known[key], text) if key in known else text
        given.append(Given(key=key, value=value, text=text, origin=COMMAND_LINE))
    _refuse_unknown(known, given)
    return given


def compose(section: type[Section], given: Sequence[Given]) -> Section:
    """The section with its defaults, overlaid by what was given, in order.

    Raises ConfigError with a line for every value that does not fit or holds a secret.
    """
    if secret := [f"{one.key} ({one.origin}) holds {held}" for one in given if (held := holder(one.text))]:
        raise ConfigError("\n".join(f"{line}. {SECRET_REMEDY}" for line in secret))
    known = _by_key(section)
    tree: dict[str, Any] = {}
    for setting in known.values():
        if isinstance(setting.default, BaseModel):  # its values may differ from the defaults of its class
            _put(tree, setting.key, setting.default.model_dump())
        elif setting.section and setting.default is ...:
            _put(tree, setting.key, {})  # so that what is missing in it is named, not the whole of it
    for one in given:
        none = one.value == "none" and admits_none(known[one.key].field.annotation)
        _put(tree, one.key, None if none else one.value)
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(known, given, one) for one in error.errors())
        raise ConfigError("\n".join(lines)) from error


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
        return "[" + ", ".join(as_toml(part) for part in value) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    if not isinstance(value, bool | int):
        value = "none" if value is None else str(value)
    return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")


def nearest(word: str, words: Iterable[str], likeness: float = 0.6) -> str | None:
    """Which of `words` was probably meant by `word`; of a dotted key the front is easily left out."""
    words = list(words)
    ends = [other for other in words if other.endswith("." + word)]
    return next(iter(ends or difflib.get_close_matches(word, words, n=1, cutoff=likeness)), None)


def _by_key(section: type[BaseModel]) -> dict[str, Setting]:
    return {setting.key: setting for setting in settings(section)}


def _leaves(known: Mapping[str, Setting], table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and (key not in known or known[key].section):
            yield from _leaves(known, value, key + ".")
        else:
            yield key, value


def _lines(text: str) -> dict[str, int]:
    """The line of each plain `key = value` in a TOML text, from 1; keys in inline tables are left out."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([\w.\s-]+)\]", line):
            table = re.sub(r"\s", "", header[1]) + "."
        elif pair := re.match(r"\s*([\w-]+(?:\s*\.\s*[\w-]+)*)\s*=", line):
            lines.setdefault(table + re.sub(r"\s", "", pair[1]), number)
    return lines


def _refuse_unknown(known: Mapping[str, Setting], given: Iterable[Given]) -> None:
    errors = []
    for one in given:
        if one.key not in known:
            near = nearest(one.key, known)
            remedy = f"Did you mean {near}?" if near else "Remedy: --help all, after the command, lists every key"
            secret = SECRET_NAME.search(one.key.replace(".", "_").upper())
            text, remedy = ("[hidden]", SECRET_REMEDY) if secret else (one.text, remedy)
            errors.append(f"{one.key} = {text} ({one.origin}): there is no such key. {remedy}")
    if errors:
        raise ConfigError("\n".join(errors))


def _parse(setting: Setting, text: str) -> Any:
    """The value of a text from the command line: the text itself if it fits the field, else read as TOML.

    So 0.05, true, [1, 2] and plain words all need no quotes. What fits in neither way is left for compose.
    """
    values: list[Any] = [text]
    with contextlib.suppress(tomllib.TOMLDecodeError):
        values.append(tomllib.loads(f"v = {text}")["v"])
    annotated: Any = Annotated[setting.field.annotation, setting.field]
    adapter = TypeAdapter(annotated)
    for value in values:
        with contextlib.suppress(ValidationError):
            adapter.validate_python(value)
            return value
    return values[-1]


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[name] = value


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
        parts = [f"{one.key} = {one.text} ({one.origin})" for one in given if one.key.startswith(key)]
        if setting and any(one.key == key for one in given):
            reason = f"it is a section. Remedy: --{key}.NAME VALUE; --help {key} lists its settings"
        return f"{key or 'configuration'}: {reason}" + (f" [given: {', '.join(parts)}]" if key and parts else "")
    takes = f"It takes {setting.type}, {setting.default_text}: {setting.doc}".rstrip(": ")
    if error["type"] == "missing" and not inside:
        return f"{key} is not given. Remedy: --{key} VALUE. {takes}"
    source = next((one for one in reversed(given) if f"{key}.".startswith(f"{one.key}.")), None)
    value = f"{source.text} ({source.origin})" if source else as_toml(setting.default)
    where = f", at {inside[1:]}" if inside else ""
    return f"{key} = {value}{where}: {reason[:1].lower()}{reason[1:]}. {takes}"


def _without_none(value: Any, in_list: bool = False) -> Any:
    """None becomes "none"; in the tables of a list, where "none" has no such meaning, it is left out."""
    if isinstance(value, dict):
        kept = {name: part for name, part in value.items() if part is not None or not in_list}
        return {name: _without_none(part, in_list) for name, part in kept.items()}
    if isinstance(value, list):
        return [_without_none(part, in_list=True) for part in value]
    return "none" if value is None else value
