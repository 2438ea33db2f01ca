"""The command `rayward`: read the command line and the configuration, run a step, answer with an exit code.

0: done. 1: the run failed. 2: the command line or configuration is wrong. 130: Ctrl-C. 143: SIGTERM.
"""

import contextlib
import errno
import importlib
import importlib.metadata
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from cluster.cli.command_line import Call, load, own_parser, parse
from cluster.cli.commands import COMMANDS, Command
from cluster.cli.help import help_text, overview
from cluster.config.load import ConfigError, nearest, save_toml
from cluster.config.redaction import redact
from cluster.runtime.exit_codes import DONE, FAILED, INTERRUPTED, WRONG
from cluster.tracking.console import Console
from reward_server.preferences.records import write_whole

# Their text alone says what happened; of any other error the type belongs to it.
_TOLD = (ValueError, OSError, RuntimeError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, by default this process's; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help", *words[2:]]
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(overview())
        return DONE if words else WRONG
    if words[0] == "--version":
        sys.stdout.write(f"rayward {importlib.metadata.version('rayward')}\n")
        return DONE
    try:
        return _command(words)
    except ConfigError as error:
        return _tell(words[0], str(error).splitlines(), WRONG, "--json" in words)
    except KeyboardInterrupt:
        return INTERRUPTED


def _command(words: Sequence[str]) -> int:
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        if name.startswith("-"):
            raise ConfigError(
                "the command stands first. Remedy: rayward COMMAND [--run DIR] ..; rayward --help lists them"
            )
        near = nearest(name, COMMANDS)
        remedy = f"Did you mean {near}?" if near else "Remedy: rayward --help lists them"
        raise ConfigError(f"there is no command {name!r}. {remedy}")
    command = COMMANDS[name]
    if command.own:
        return _own(name, command, rest)
    asked = next((place for place, word in enumerate(rest) if word in ("-h", "--help")), None)
    if asked is not None:
        about = next(iter(rest[asked + 1 :]), None) if command.sections else None
        sys.stdout.write(help_text(name, _config_class() if command.sections else None, about))
        return DONE
    call = parse(command, rest)
    config = load(_config_class(), call) if command.sections else None
    if command.inspects or "dry-run" in call.flags:
        return _inspect(name, command, call, config)
    if "json" in call.flags and "json" not in command.flags:
        raise ConfigError("--json goes with --dry-run: a run itself writes RUN/metrics.jsonl and RUN/summary.json")
    return _run(name, command, call, config, words, _checked(config, name, call.run_dir) if config else ())


def _tell(name: str, reasons: Iterable[str], code: int, as_json: bool) -> int:
    """Say on standard error why there is no result, in lines or as a line of JSON; returns the exit code."""
    shown = [redact(reason) for reason in reasons]
    if as_json:
        sys.stderr.write(json.dumps({"error": shown, "exit_code": code}) + "\n")
    else:
        sys.stderr.write("".join(f"rayward {redact(name)}: {line}\n" for line in shown))
    return code


def _own(name: str, command: Command, words: Sequence[str]) -> int:
    try:
        given = own_parser(name).parse_args(words)
    except SystemExit:  # after --help
        return DONE
    try:
        return _entry(command)(given)
    except ConfigError:
        raise
    except _TOLD as error:
        return _tell(name, dict.fromkeys(_reasons(error)), FAILED, getattr(given, "json", False))


def _entry(command: Command) -> Any:
    module, _, function = command.entry.partition(":")
    return getattr(importlib.import_module(module), function)


def _config_class() -> Any:
    return importlib.import_module("cluster.config.schema").Config


def _checked(config: Any, name: str, run_dir: Path) -> Sequence[str]:
    """What is odd about the configuration. Raises ConfigError with a line for everything that is wrong."""
    found = importlib.import_module("cluster.plan.check").check_config(config, name, run_dir)
    if found.problems:
        raise ConfigError("\n".join(found.problems))
    return found.warnings


def _inspect(name: str, command: Command, call: Call, config: Any) -> int:
    """Print what would be done, or how things stand: nothing is started, and nothing written."""
    try:
        if command.inspects:
            good = _entry(command)(config, call.run_dir, name, "json" in call.flags)
        else:
            dry_run = importlib.import_module("cluster.plan.dry_run").dry_run
            good = dry_run(config, call.run_dir, name, call.flags, call.arguments)
    except _TOLD as error:
        return _tell(name, dict.fromkeys(_reasons(error)), FAILED, "json" in call.flags)
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
    told: list[str] = []
    as_json = config is None and "json" in call.flags
    with Console(logs) as console, _sigterm_exits():
        for warning in warnings:
            console.warning(warning)
        code = _outcome(name, command, call, config, words, console, told.append if as_json else console.error)
    return _tell(name, told, code, as_json) if told else code


def _outcome(
    name: str,
    command: Command,
    call: Call,
    config: Any,
    words: Sequence[str],
    console: Console,
    tell: Callable[[str], None],
) -> int:
    variant = f" --{call.variant}" if call.variant else ""
    resume = f" Go on with: rayward {name}{variant} --run {call.run_dir} --resume"
    on = resume if "resume" in command.flags else ""
    try:
        return _work(name, command, call, config, words, console)
    except KeyboardInterrupt:
        tell(f"stopped by Ctrl-C; what is done is in {call.run_dir}.{on}")
        return INTERRUPTED
    except SystemExit as error:
        tell(f"stopped; what is done is in {call.run_dir}.{on}")
        return error.code if isinstance(error.code, int) else FAILED
    except ConfigError as error:
        tell(str(error))
        return WRONG
    except BaseException as error:
        for reason in dict.fromkeys(_reasons(error)):
            tell(reason)
        logs = call.run_dir / "logs"
        file = logs / "error.log"
        with contextlib.suppress(OSError), file.open("a", encoding="utf-8") as lines:
            lines.write(f"{datetime.now().isoformat(timespec='seconds')} rayward {shlex.join(words)}\n")
            lines.write(redact("".join(traceback.format_exception(error))))
        if tell == console.error:
            console.line(f"The traceback is in {file}, and what libraries printed in {logs}")
        return FAILED


def _work(name: str, command: Command, call: Call, config: Any, words: Sequence[str], console: Console) -> int:
    entry = _entry(command)
    if config is None:
        flags = {flag: flag in call.flags for flag in command.flags}
        return entry(call.run_dir, console, *call.arguments, **flags) or DONE
    from cluster.pipeline.job import Job
    from cluster.rundir.environment import write_environment
    from cluster.rundir.history import earlier_run
    from cluster.rundir.stages import ResumeRefused, Start
    from cluster.runtime.health import Monitor
    from cluster.status.snapshot import reporting
    from cluster.tracking.tracker import Tracker

    saved = call.run_dir / "config.toml"
    before = saved.read_text(encoding="utf-8") if saved.is_file() else None
    save_toml(config, saved)
    write_environment(call.run_dir, ["rayward", *words])
    console.line(f"rayward {name}: everything goes to {call.run_dir}")
    settings = config.model_dump(mode="json")
    run_id = earlier_run(call.run_dir, name) if "resume" in call.flags else None
    monitor = Monitor()
    with (
        Tracker(
            call.run_dir,
            config.tracking,
            name,
            settings=settings,
            console=console,
            run_id=run_id,
            monitor=monitor,
        ) as tracker,
        reporting(call.run_dir, name, monitor),
    ):
        start = next(iter(call.flags & {"resume", "restart"}), "new")
        flags = {flag: flag == call.variant for flag in command.variants}
        told = shlex.join(["rayward", *words])
        job = Job(
            config=config,
            run_dir=call.run_dir,
            tracker=tracker,
            monitor=monitor,
            command=told,
            start=cast(Start, start),
        )
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
