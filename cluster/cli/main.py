"""The command `rayward`: read the command line and the configuration, run a command, answer with an exit code."""

import contextlib
import errno
import importlib.metadata
import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from cluster.cli.commands import COMMANDS, GROUPS
from cluster.cli.parser import Call, Command, bind, help_text, load, parse
from cluster.config.load import ConfigError, nearest, save_toml
from cluster.config.schema import Config
from cluster.runtime.exit_codes import DONE, EXIT_CODES, FAILED, WRONG
from cluster.runtime.signals import Stopped, ended_by_signals
from cluster.tracking.console import Console
from reward_server.redaction import redact, shown

# Their text alone says what happened; of any other error the type belongs to it.
_TOLD = (ValueError, OSError, RuntimeError)
_OVERVIEW = """rayward: reinforcement learning from human feedback as InstructGPT did it.

  rayward COMMAND [--run DIR] [--preset NAME] [--config FILE] [--KEY VALUE ...]

  rayward quickstart --tiny                      all of it, on a small model, in five minutes
  rayward ppo --run runs/mine --ppo.kl.coef 0.1  one step, with a setting
  rayward ppo --help                             what a step reads, writes and can be told
  rayward ppo --help ppo.kl                      a setting, or all that begin so; --help all: every one
{commands}
Settings come from a preset, over it a TOML file, over it the command line. A run directory remembers them, so later
commands need --run alone. Keys and tokens come from the environment or a file of mode 0600, never from a setting.

With --json, where a command has it, standard output is one JSON document, and an error is one line of JSON on
standard error: {{"error": ["..."], "exit_code": 2}}.

Exit codes:
{codes}
"""


@ended_by_signals()
def main(words: Sequence[str] | None = None) -> int:
    """Run the command line, by default this process's; returns the exit code."""
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help", *words[2:]]
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(overview())
        return DONE if words else WRONG
    if words[0] == "--version":
        sys.stdout.write(f"rayward {importlib.metadata.version('rayward')}\n")
        return DONE
    try:
        for word in (*words, os.getcwd()):
            if word != word.encode(errors="ignore").decode():
                raise ConfigError(f"{word!r} is not UTF-8, and settings are kept as text. Remedy: rename it")
        if (command := COMMANDS.get(words[0])) is None:
            near = nearest(words[0], COMMANDS)
            what = "the command stands first" if words[0].startswith("-") else f"there is no command {words[0]!r}"
            raise ConfigError(f"{what}. {f'Did you mean {near}?' if near else 'Remedy: rayward --help lists them'}")
        asked = next((at for at, word in enumerate(words) if word in ("-h", "--help")), None)
        if asked is not None:
            sys.stdout.write(help_text(command, next(iter(words[asked + 1 :] if command.sections else ()), None)))
            return DONE
        if command.sections:
            call = parse(command, words[1:])
            config, flags, run_dir = load(Config, call), call.flags, call.run_dir
            if "dry-run" not in command.flags:  # it looks and prints only
                return command.work(config, run_dir, "json" in flags) or DONE
            if "dry-run" not in flags:
                return _run_stage(command, call, config, words)
            from cluster.plan.dry_run import dry_run

            return DONE if dry_run(config, run_dir, command.name, flags) else FAILED
        return bind(command, words[1:])() or DONE
    except ConfigError as error:
        return _tell(words[0], str(error).splitlines(), WRONG, "--json" in words)
    except Stopped as error:
        return int(str(error.code))
    except _TOLD as error:
        return _tell(words[0], dict.fromkeys(_reasons(error)), FAILED, "--json" in words)


def overview() -> str:
    """The help of `rayward` itself."""
    lines = []
    for group, title in GROUPS.items():
        lines += [
            "",
            f"{title}:",
            *(f"  {one.name:<12}{one.purpose}" for one in COMMANDS.values() if one.group == group),
        ]
    codes = "\n".join(f"  {code:<5}{meaning}" for code, meaning in EXIT_CODES.items())
    return _OVERVIEW.format(commands="\n".join([*lines, ""]), codes=codes)


def _tell(name: str, reasons: Iterable[str], code: int, as_json: bool) -> int:
    """Say on standard error why there is no result, in lines or as a line of JSON; returns the exit code."""
    told = [shown(reason) for reason in reasons]
    if as_json:
        sys.stderr.write(json.dumps({"error": told, "exit_code": code}) + "\n")
    else:
        sys.stderr.write("".join(f"rayward {shown(name)}: {line}\n" for line in told))
    return code


def _run_stage(command: Command, call: Call, config: Config, words: Sequence[str]) -> int:
    """Run a command with settings, which works in a run directory."""
    from cluster.pipeline.job import Job
    from cluster.pipeline.stage import execute
    from cluster.pipeline.stages import STAGES
    from cluster.plan.check import check_config
    from cluster.rundir.environment import write_environment
    from cluster.rundir.history import earlier_run
    from cluster.rundir.lock import owned
    from cluster.rundir.record import Start
    from cluster.runtime.health import Monitor
    from cluster.status.snapshot import reporting
    from cluster.tracking.tracker import Tracker
    from reward_server.preferences.records import sweep

    run_dir, name = call.run_dir, command.name
    if "json" in call.flags:
        raise ConfigError("--json goes with --dry-run: a run itself writes RUN/metrics.jsonl and RUN/summary.json")
    if STAGES[name].aside(config, run_dir):
        return DONE
    found = check_config(config, STAGES[name], run_dir)
    if found.problems:
        raise ConfigError("\n".join(found.problems))
    variant = f" --{call.variant}" if call.variant else ""
    resume = f" Go on with: rayward {name}{variant} --run {run_dir} --resume" if "resume" in command.flags else ""
    owner = owned(run_dir, name)
    with _recorded(run_dir, words, owner) as (console, end), contextlib.ExitStack() as recording:
        for warning in found.warnings:
            console.warning(warning)
        console.line(f"rayward {name}: everything goes to {run_dir}")
        sweep(run_dir)
        run_id, monitor = (
            earlier_run(run_dir, name) if "resume" in call.flags else None,
            Monitor(config.scoring.pause_s),
        )
        told = {"settings": config.model_dump(mode="json"), "console": console, "run_id": run_id, "monitor": monitor}
        end.remedy = resume if "resume" in call.flags else ""
        tracker = Tracker(run_dir, config.tracking, name, **told)
        job = Job(
            config=config,
            run_dir=run_dir,
            tracker=tracker,
            monitor=monitor,
            command=redact(shlex.join(["rayward", *words])),
            variant=call.variant,
            start=cast(Start, next(iter(call.flags & {"resume", "restart"}), "new")),
        )

        def begin() -> None:
            """Nothing is recorded, not even the settings, before all that is read is right."""
            end.remedy = resume
            save_toml(config, call.run_dir / "config.toml")
            write_environment(run_dir, ["rayward", *words])
            recording.enter_context(tracker)
            recording.enter_context(reporting(run_dir, name, monitor))

        execute(command.work(job), begin)
    return end.code


@contextlib.contextmanager
def _recorded(run_dir: Path, words: Sequence[str], owner: AbstractContextManager[None]) -> Iterator[Any]:
    """A console and an end for what runs in a run directory: what goes wrong is said in a line, and the exit code set.

    Its traceback is kept in a file; `end.remedy` is said when it is stopped. Raises ConfigError where the directory
    cannot be written, and what entering `owner` raises.
    """
    logs, end = run_dir / "logs", SimpleNamespace(code=DONE, remedy="")
    try:
        logs.mkdir(parents=True, exist_ok=True)
        if not all(os.access(folder, os.W_OK) for folder in (run_dir, logs)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(f"{logs} cannot be written ({error.strerror}). Remedy: name another --run DIR") from error
    with owner, Console(logs) as console:
        try:
            yield console, end
        except Stopped as error:
            console.error(f"stopped by {error.by}; what is done is in {run_dir}.{end.remedy}")
            end.code = int(str(error.code))
        except ConfigError as error:
            console.error(str(error))
            end.code = WRONG
        except BaseException as error:
            for reason in dict.fromkeys(_reasons(error)):
                console.error(reason)
            file, end.code = logs / "error.log", FAILED
            with contextlib.suppress(OSError), file.open("a", encoding="utf-8") as lines:
                lines.write(f"{datetime.now().isoformat(timespec='seconds')} rayward {redact(shlex.join(words))}\n")
                lines.write(shown("".join(traceback.format_exception(error))))
            console.line(f"The traceback is in {file}, and what libraries printed in {logs}")


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
