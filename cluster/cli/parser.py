"""The words of a command line, read, explained and completed.

A command without settings is a function, and tyro does all of it. What a command with settings takes becomes a
dataclass for tyro's help and completion alone: `cluster.config.load` reads its values, so that a list is TOML as in a
file, and an error is a line with key, value, origin and remedy.
"""

import contextlib
import dataclasses
import functools
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import tyro
from pydantic import BaseModel
from tyro.conf import arg

from cluster.config.load import (
    PRESETS,
    ConfigError,
    Given,
    Setting,
    compose,
    nearest,
    presets,
    read_overrides,
    read_toml,
    settings,
)
from cluster.config.schema import Config
from cluster.runtime.exit_codes import EXIT_CODES

Section = TypeVar("Section", bound=BaseModel)
OFTEN = (
    *("models.base", "data.demonstrations", "data.comparisons", "data.prompts"),
    *("cluster.address", "cluster.generators", "cluster.learner_ranks"),
    *("prompts.prefix_chars", "prompts.per_user", "prompts.heldout_share"),
    *("sft.epochs", "sft.optimizer.lr", "baseline.epochs", "reward.epochs", "sample.completions_per_prompt"),
    *("ppo.iterations", "ppo.prompts_per_batch", "ppo.kl.coef", "ppo.max_staleness", "rollout.max_new_tokens"),
    *("labeler.name", "rounds.count", "rounds.labelers", "scoring.parts", "serve.host", "serve.port"),
    *("label.invite", "label.host", "label.port", "label.overlap", "label.order"),
    *("evaluation.prompts", "best_of_n.n", "best_of_n.file", "tracking.mode", "plan.nodes"),
)
"""Settings that people give most, which the help of a command shows first."""
_HINT = """--KEY VALUE gives a setting, e.g. --tracking.mode disabled; in TOML: [tracking] mode = "disabled". A list: \
--tracking.tags '["a", "b"]'. Nothing at all: none. The section called as the command may be left out of \
KEY. What is often given is shown below; --help SECTION shows all of one, --help all every setting. Sections:"""
_OPTIONS = ("run", "config", "preset")
_MARKERS = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command."""

    name: str
    """Its word."""
    group: str
    """Under which heading the overview lists it."""
    purpose: str
    """What it is for, on one line."""
    files: str
    """What it reads and writes."""
    example: str
    """A complete command line."""
    work: Callable[..., Any]
    """What it does: a function of what it is told, or of the configuration and run directory; or a stage."""
    sections: tuple[str, ...] = ()
    """Fields of Config whose settings it reads; none for a command that takes no configuration."""
    run: str = "runs/rlhf"
    """Run directory when none is named."""
    preset: str | None = None
    """Preset when neither a preset nor a file is named."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Flags that are either given or not, beside settings: flag -> meaning."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """Flags that each stand for another preset, and a run directory of that name: flag -> meaning."""
    submits: bool = True
    """Whether it can be a job of a cluster."""
    wraps: bool = False
    """Whether another command follows its options, with all that it is told."""

    @property
    def settings(self) -> list[Setting]:
        """The settings that it reads."""
        return [one for one in settings(Config) if not one.section and one.key.split(".")[0] in self.sections]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a command with settings is told."""

    run_dir: Path
    """Where the run keeps its files."""
    sources: tuple[Path, ...]
    """TOML files with settings; of two, the later wins."""
    fresh: bool
    """Whether a preset or a file is among them."""
    variant: str | None
    """Flag that stands for another preset."""
    flags: frozenset[str]
    """Flags that are either given or not."""
    overrides: list[tuple[str, str | None]]
    """(key, text) of everything else; None where there is no text."""


def parse(command: Command, words: Sequence[str]) -> Call:
    """What the words tell a command with settings. Raises ConfigError."""
    options: dict[str, str] = {}
    flags: set[str] = set()
    overrides: list[tuple[str, str | None]] = []
    rest, known, keys = [*words], (*command.flags, *command.variants), {one.key for one in command.settings}
    while rest:
        name, equals, text = (word := rest.pop(0)).removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} stands alone. Remedy: write --KEY VALUE, with quotes around spaces")
        if name in known:
            flags.add(name)
            continue
        value = text if equals else rest.pop(0) if rest and not rest[0].startswith("--") else None
        if name not in _OPTIONS:
            if "." not in name and (near := nearest(name, (*_OPTIONS, *known), likeness=0.75)):
                raise ConfigError(f"there is no option --{name}. Did you mean --{near}?")
            own = f"{command.name.replace('-', '_')}.{name}"
            overrides.append((own if own in keys else name, value))
        elif value is None:
            raise ConfigError(f"--{name} needs a value")
        else:
            options[name] = value
    if {"resume", "restart"} <= flags:
        raise ConfigError("--resume goes on and --restart starts over: give one of them")
    run, file, preset = (options.get(name) for name in _OPTIONS)
    run, file = (text and os.path.expanduser(text) for text in (run, file))
    variant = next(iter(flags & command.variants.keys()), None)
    run_dir, preset = Path(run or (f"runs/{variant}" if variant else command.run)), preset or variant
    saved = run_dir / "config.toml"
    remembers = saved.is_file() and ("resume" in flags or bool(run and not (file or preset)))
    preset = None if remembers else preset or (None if file else command.preset)
    if preset and preset not in presets():
        raise ConfigError(f"there is no preset {preset!r}. Remedy: one of {', '.join(presets())}")
    first = saved if remembers else PRESETS / f"{preset}.toml" if preset else None
    return Call(
        run_dir=run_dir,
        sources=tuple(filter(None, (first, Path(file) if file else None))),
        fresh=bool(file or preset),
        variant=variant,
        flags=frozenset(flags - command.variants.keys()),
        overrides=overrides,
    )


def load(section: type[Section], call: Call) -> Section:
    """Compose preset or earlier settings, file, and the command line, in this order. Raises ConfigError."""
    return compose(section, read(section, call))


def read(section: type[BaseModel], call: Call) -> list[Given]:
    """What preset or earlier settings, file, and the command line give, in this order. Raises ConfigError."""
    saved = call.run_dir / "config.toml"  # in which earlier versions kept paths as they were given
    files = (read_toml(section, source, Path.cwd() if source == saved else None) for source in call.sources)
    return [*(one for file in files for one in file), *read_overrides(section, call.overrides)]


def bind(command: Command, words: Sequence[str]) -> functools.partial[int | None]:
    """A command without settings, with all that the words tell it. Raises ConfigError."""

    @functools.wraps(command.work)
    def told(*args: Any, **options: Any) -> functools.partial[int | None]:
        return functools.partial(command.work, *args, **options)

    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--run=") else [word])]
    at = 0 if command.wraps else len(words)
    flags = {f"--{name.replace('_', '-')}" for name, one in signature(told).parameters.items() if one.default is False}
    while at < len(words) and words[at].startswith("-"):
        at += 1 if "=" in words[at] or words[at] in flags else 2
    words, inner = words[:at], words[at:]
    if "--run" in words[:-1]:  # is the first word, too
        at = words.index("--run")
        words[: at + 2] = [os.path.expanduser(words[at + 1]), *words[:at]]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            bound = _tyro(told, words, prog=f"rayward {command.name}", add_help=False)
    except SystemExit:
        said = " ".join(re.sub(r"\u256d.*|[\u2500-\u257f]", " ", errors.getvalue()).split())  # without its box
        raise ConfigError(f"{said}. Remedy: rayward {command.name} --help") from None
    return functools.partial(bound, words=tuple(inner)) if command.wraps else bound


def help_text(command: Command, about: str | None = None) -> str:
    """The help of a command, or of one of its settings, a section of them, or "all". Raises ConfigError."""
    shown, name = command.settings, f"rayward {command.name}"
    if about is not None:
        key = about.removeprefix("--").replace("-", "_")
        found = [one for one in shown if key in ("all", one.key) or one.key.startswith(f"{key}.")]
        if not found:
            near = nearest(key, [one.key for one in shown])
            remedy = f"Did you mean {near}?" if near else f"Remedy: {name} --help lists the sections"
            raise ConfigError(f"{command.name} has no setting or section {about!r}. {remedy}")
        return _printed(_type_of(None, found), ["--help"], prog=name, description="")
    lines = [command.purpose, command.files, f"Example: {command.example}"]
    if shown:
        counts = Counter(one.key.split(".")[0] for one in shown)
        lines.append(f"{_HINT} {', '.join(f'{section} ({count})' for section, count in counts.items())}.")
    lines.append("Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()))
    often = [one for one in shown if one.key in OFTEN]
    kind = _type_of(command, often) if shown else command.work
    return _printed(kind, ["--help"], prog=name, description="\n\n".join(lines))


def completion_script(commands: Mapping[str, Command], shell: str) -> str:
    """A script with which a shell completes commands, options, settings and their values."""

    def one_of(some: Iterable[Command]) -> Any:
        named = [Annotated[Any, tyro.conf.subcommand(one.name, constructor=told(one))] for one in some]
        return Union[tuple(named)]  # noqa: UP007

    def told(command: Command) -> Any:
        kind = _type_of(command, command.settings, closed=True) if command.sections else command.work
        if not command.wraps:
            return kind
        inner = one_of(one for one in commands.values() if one.submits)
        own = Annotated[Any, arg(name="", constructor=kind)]
        return dataclasses.make_dataclass("Words", [("own", own), ("inner", inner)])

    return _printed(one_of(commands.values()), ["--tyro-print-completion", shell], prog="rayward")


def _tyro(kind: Any, words: Sequence[str], **more: Any) -> Any:
    return tyro.cli(kind, args=words, use_underscores=True, config=_MARKERS, **more)


def _printed(kind: Any, words: Sequence[str], **more: Any) -> str:
    """What tyro prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        _tyro(kind, words, **more)
    return text.getvalue().replace("dry_run", "dry-run")  # tyro parts words in one way only, and settings have _


def _type_of(command: Command | None, shown: Iterable[Setting], closed: bool = False) -> Any:
    """A dataclass of what a command with settings can be told, each section a group; `closed`: with their values."""
    fields: list[Any] = []
    if command is not None:
        known, under = tuple(presets()), "settings under those of a file: "
        fields = [
            ("run", *_text("DIR", f"the run directory; {command.run} when not named", Path)),
            ("config", *_text("FILE", "settings from a TOML file", Path)),
            ("preset", *_text("NAME", under + ", ".join(known), str, known if closed else ())),
        ]
        for name, meaning in {**command.variants, **command.flags}.items():
            kind = Annotated[bool, arg(name=name, help=meaning, help_behavior_hint="")]
            fields.append((name.replace("-", "_"), kind, False))
    groups: dict[str, list[Any]] = {}
    docs = {one.key: one.doc for one in settings(Config) if one.section}
    for one in shown:
        prefix, _, name = one.key.rpartition(".")
        of, values = Path if "Path" in one.type else str, [*_values(one.field.annotation)] if closed else []
        groups.setdefault(prefix, []).append((name, *_text(one.type, f"{one.doc} ({one.default_text})", of, values)))
    for prefix, members in groups.items():
        group = dataclasses.make_dataclass("Section", members, frozen=True)
        fields.append((prefix.replace(".", "__"), Annotated[group, arg(name=prefix, help=docs[prefix])], group()))
    return dataclasses.make_dataclass("Words", fields)


def _text(metavar: str, meaning: str, of: Any, values: Sequence[str] = ()) -> tuple[Any, Any]:
    """Type and default of an option: one of some values, a path, or any text."""
    kind, default = (Literal[tuple(values)], values[0]) if values else (of, of())
    return Annotated[kind, arg(metavar=metavar, help=meaning, help_behavior_hint="")], default


def _values(annotation: Any) -> Iterator[str]:
    """The values that a type can have, where they can be counted."""
    if annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _values(part)
