"""The command `rayward`: read the command line and the configuration, run a step, answer with an exit code.

0: done. 1: the run failed. 2: the command line or configuration is wrong. 130: Ctrl-C. 143: SIGTERM.
"""

import contextlib
import errno
import importlib
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel

from cluster.commands import COMMANDS, PRESETS, Command, dry_flags, help_text, overview, presets
from cluster.console import Console
from cluster.settings import ConfigError, compose, nearest, read_overrides, read_toml, save_toml
from reward_server.records import write_whole

Config = TypeVar("Config", bound=BaseModel)
OPTIONS = ("run", "config", "preset")
DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
# Their text alone says what happened; of any other error the type belongs to it.
_TOLD = (ValueError, OSError, RuntimeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One command line, taken apart."""

    run_dir: Path
    """Where the run keeps its files."""
    file: Path | None
    """Settings to read."""
    preset: str | None
    """Settings to begin with."""
    variant: str | None
    """Flag that stands for another preset."""
    flags: frozenset[str]
    """Flags that are either given or not."""
    arguments: tuple[str, ...]
    """Words after the run directory."""
    remembered: Path | None
    """Settings that an earlier command left in the run directory."""
    overrides: list[tuple[str, str | None]]
    """(key, text) of everything else; None where there is no text."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, by default this process's; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        return DONE if words else WRONG
    name = words[0]
    try:
        if name not in COMMANDS:
            near = nearest(name, COMMANDS)
            raise ConfigError(f"there is no command {name!r}. " + (f"Did you mean {near}?" if near else "See --help"))
        command = COMMANDS[name]
        if command.own:
            return _own(name, command, words[1:])
        if "-h" in words or "--help" in words:
            sys.stdout.write(help_text(name, _config_class() if command.sections else None))
            return DONE
        call = parse(command, words[1:])
        config = load(_config_class(), call) if command.sections else None
        if command.inspects or "dry-run" in call.flags:
            return _inspect(name, command, call, config)
        if "json" in call.flags and "json" not in command.flags:
            raise ConfigError("--json goes with --dry-run: a run itself writes RUN/metrics.jsonl and RUN/summary.json")
        return _run(name, command, call, config, words, _checked(config, name, call.run_dir) if config else ())
    except ConfigError as error:
        sys.stderr.write("".join(f"rayward {name}: {line}\n" for line in str(error).splitlines()))
        return WRONG
    except KeyboardInterrupt:
        return INTERRUPTED


def parse(command: Command, words: Sequence[str]) -> Call:
    """Take the words after a command apart. Raises ConfigError."""
    options: dict[str, str] = {}
    variant: str | None = None
    flags: set[str] = set()
    arguments: list[str] = []
    overrides: list[tuple[str, str | None]] = []
    known = {**dry_flags(command), **command.flags}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, given, text = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            if not command.sections and "run" not in options:
                options["run"] = word
            elif len(arguments) < len(command.arguments):
                arguments.append(word)
            else:
                raise ConfigError(f"{word!r} stands alone. Remedy: write --KEY VALUE, with quotes around spaces")
            continue
        if name in command.variants and not given:
            variant = name
            continue
        if name in known and not given:
            flags.add(name)
            continue
        value = text if given else rest.pop(0) if rest and not rest[0].startswith("--") else None
        if name not in OPTIONS:
            if near := nearest(name, (*OPTIONS, *command.variants, *known), likeness=0.75):
                raise ConfigError(f"there is no option --{name}. Did you mean --{near}?")
            overrides.append((name, value))
        elif not value:
            raise ConfigError(f"--{name} needs a value")
        else:
            options[name] = value
    if overrides and not command.sections:
        raise ConfigError(f"--{overrides[0][0]} is not known here: this command takes a run directory only")
    if missing := list(command.arguments)[len(arguments) :]:
        raise ConfigError(f"{' and '.join(missing)} is missing. Remedy: {command.example}")
    run_dir = Path(options.get("run") or (f"runs/{variant}" if variant else command.run))
    file = Path(options["config"]) if "config" in options else None
    saved = run_dir / "config.toml"
    named = file or "preset" in options or variant
    remembers = saved.is_file() and ("resume" in flags or ("run" in options and not named))
    if {"resume", "restart"} <= flags:
        raise ConfigError("--resume goes on and --restart starts over: give one of them")
    return Call(
        run_dir=run_dir,
        file=file,
        preset=None if remembers else options.get("preset") or variant or (None if file else command.preset),
        variant=variant,
        flags=frozenset(flags),
        arguments=tuple(arguments),
        remembered=saved if remembers else None,
        overrides=overrides,
    )


def load(section: type[Config], call: Call) -> Config:
    """Compose preset or earlier settings, file, and the command line, in this order. Raises ConfigError."""
    given = []
    if call.preset:
        path = PRESETS / f"{call.preset}.toml"
        if not path.is_file():
            raise ConfigError(f"there is no preset {call.preset!r}. Remedy: one of {', '.join(presets())}")
        given += read_toml(section, path)
    for file in filter(None, (call.remembered, call.file)):
        given += read_toml(section, file)
    return compose(section, [*given, *read_overrides(section, call.overrides)])


def _own(name: str, command: Command, words: Sequence[str]) -> int:
    try:
        return _entry(command)(words)
    except SystemExit as error:  # argparse, after --help or a mistake
        return error.code if isinstance(error.code, int) else WRONG
    except ConfigError:
        raise
    except _TOLD as error:
        sys.stderr.write(f"rayward {name}: {error}\n")
        return FAILED


def _entry(command: Command) -> Any:
    module, _, function = command.entry.partition(":")
    return getattr(importlib.import_module(module), function)


def _config_class() -> Any:
    return importlib.import_module("cluster.config").Config


def _checked(config: Any, name: str, run_dir: Path) -> Sequence[str]:
    """What is odd about the configuration. Raises ConfigError with a line for everything that is wrong."""
    found = importlib.import_module("cluster.checks").check_config(config, name, run_dir)
    if found.problems:
        raise ConfigError("\n".join(found.problems))
    return found.warnings


def _inspect(name: str, command: Command, call: Call, config: Any) -> int:
    """Print what would be done, or how things stand: nothing is started, and nothing written."""
    try:
        if command.inspects:
            good = _entry(command)(config, call.run_dir, name, "json" in call.flags)
        else:
            dry_run = importlib.import_module("cluster.planning").dry_run
            good = dry_run(config, call.run_dir, name, call.flags, call.arguments)
    except _TOLD as error:
        sys.stderr.write("".join(f"error: {reason}\n" for reason in _reasons(error)))
        return FAILED
    return DONE if good else FAILED


def _run(name: str, command: Command, call: Call, config: Any, words: Sequence[str], warnings: Sequence[str]) -> int:
    """Run the command; what goes wrong is said in a line, and its traceback is kept in a file."""
    logs = call.run_dir / "logs"
    if config is None and not call.run_dir.is_dir():
        raise ConfigError(f"there is no run directory {call.run_dir}. Remedy: name one that a command has written")
    try:
        logs.mkdir(parents=True, exist_ok=True)
        if not all(os.access(folder, os.W_OK) for folder in (call.run_dir, logs)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(f"{logs} cannot be written ({error.strerror}). Remedy: name another --run DIR") from error
    with Console(logs) as console, _sigterm_exits():
        for warning in warnings:
            console.warning(warning)
        variant = f" --{call.variant}" if call.variant else ""
        resume = f" Go on with: rayward {name}{variant} --run {call.run_dir} --resume"
        on = resume if "resume" in command.flags else ""
        try:
            return _work(name, command, call, config, words, console)
        except KeyboardInterrupt:
            console.error(f"stopped by Ctrl-C; what is done is in {call.run_dir}.{on}")
            return INTERRUPTED
        except SystemExit as error:
            console.error(f"stopped; what is done is in {call.run_dir}.{on}")
            return error.code if isinstance(error.code, int) else FAILED
        except ConfigError as error:
            console.error(str(error))
            return WRONG
        except BaseException as error:
            for reason in dict.fromkeys(_reasons(error)):
                console.error(reason)
            file = logs / "error.log"
            with contextlib.suppress(OSError), file.open("a", encoding="utf-8") as lines:
                lines.write(f"{datetime.now().isoformat(timespec='seconds')} rayward {shlex.join(words)}\n")
                traceback.print_exception(error, file=lines)
            console.line(f"The traceback is in {file}, and what libraries printed in {logs}")
            return FAILED


def _work(name: str, command: Command, call: Call, config: Any, words: Sequence[str], console: Console) -> int:
    entry = _entry(command)
    if config is None:
        flags = {flag: flag in call.flags for flag in command.flags}
        return entry(call.run_dir, console, *call.arguments, **flags) or DONE
    from cluster.environment import write_environment
    from cluster.history import earlier_run
    from cluster.stages import ResumeRefused, Start
    from cluster.status import reporting
    from cluster.steps import Job
    from cluster.tracking import Tracker

    saved = call.run_dir / "config.toml"
    before = saved.read_text(encoding="utf-8") if saved.is_file() else None
    save_toml(config, saved)
    write_environment(call.run_dir, ["rayward", *words])
    console.line(f"rayward {name}: everything goes to {call.run_dir}")
    settings = config.model_dump(mode="json")
    run_id = earlier_run(call.run_dir, name) if "resume" in call.flags else None
    with (
        Tracker(call.run_dir, config.tracking, name, settings=settings, console=console, run_id=run_id) as tracker,
        reporting(call.run_dir, name),
    ):
        start = next(iter(call.flags & {"resume", "restart"}), "new")
        flags = {flag: flag == call.variant for flag in command.variants}
        told = shlex.join(["rayward", *words])
        job = Job(config=config, run_dir=call.run_dir, tracker=tracker, command=told, start=cast(Start, start))
        try:
            entry(job, **flags)
        except ResumeRefused:  # the run directory keeps the settings of what it holds
            if before is not None:
                write_whole(saved, before)
            raise
    return DONE


@contextlib.contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM unwinds the stack like Ctrl-C, so that everything the run started is stopped."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reasons(error: BaseException) -> Iterator[str]:
    """What went wrong, of each of the errors in a group."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _reasons(one)
    elif str(error) and isinstance(error, _TOLD):
        yield str(error)
    else:
        yield f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
