"""The help of `rayward`: what there is, one command, one section of its settings."""

import shutil
import textwrap
from argparse import Action
from collections.abc import Iterator, Sequence

from pydantic import BaseModel

from cluster.cli.commands import COMMANDS, GROUPS, Command, dry_flags
from cluster.config.load import ConfigError, Setting, nearest, presets, settings
from cluster.runtime.exit_codes import EXIT_CODES

EVERYTHING = "all"
"""After --help: every setting."""
OFTEN = (
    *("models.base", "data.demonstrations", "data.comparisons", "data.prompts"),
    *("cluster.address", "cluster.generators", "cluster.learner_ranks"),
    *("sft.epochs", "sft.optimizer.lr", "baseline.epochs", "reward.epochs", "sample.completions_per_prompt"),
    *("ppo.iterations", "ppo.prompts_per_batch", "ppo.kl.coef", "ppo.max_staleness", "rollout.max_new_tokens"),
    *("labeler.name", "rounds.count", "rounds.labelers", "scoring.parts", "serve.host", "serve.port"),
    *("evaluation.prompts", "tracking.mode", "plan.nodes"),
)
"""Settings that people give most, which the help of a command shows first."""


def overview() -> str:
    """The help of `rayward` itself."""
    lines = [
        "rayward: reinforcement learning from human feedback as InstructGPT did it.",
        "",
        "  rayward COMMAND [--run DIR] [--preset NAME] [--config FILE] [--KEY VALUE ...]",
        "",
        "  rayward quickstart --tiny                      all of it, on a small model, in five minutes",
        "  rayward ppo --run runs/mine --ppo.kl.coef 0.1  one step, with a setting",
        "  rayward ppo --help                             what a step reads, writes and can be told",
        "  rayward ppo --help ppo.kl                      a setting, or all that begin so; --help all: every one",
    ]
    for group, title in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:<12}{one.purpose}" for name, one in COMMANDS.items() if one.group == group]
    lines += [
        "",
        *_wrapped(
            "Settings come from a preset, over it a TOML file, over it the command line. A run directory remembers "
            "them, so later commands need --run alone. Keys and tokens come from the environment or a file of mode "
            "0600, never from a setting.",
            "",
        ),
        "",
        *_wrapped(
            "With --json, where a command has it, standard output is one JSON document, and an error is one line of "
            'JSON on standard error: {"error": ["..."], "exit_code": 2}.',
            "",
        ),
        "",
        *_exit_codes(),
    ]
    return "\n".join(lines) + "\n"


def help_text(name: str, config: type[BaseModel] | None, about: str | None = None) -> str:
    """The help of one command; `about` is a section, a setting or the beginning of several, or "all".

    Raises ConfigError for an `about` that is no setting of the command.
    """
    command = COMMANDS[name]
    shown = list(_settings(command, config)) if config else []
    if about is not None:
        return "\n".join(_described(_about(name, shown, about))).strip("\n") + "\n"
    lines = _heading(name)
    if config is None:
        options = {"RUN, --run DIR": f"the run directory; {command.run} when not named", **command.arguments}
        flags = {**dry_flags(command), **command.flags}
        lines += _table({**options, **{f"--{flag}": what for flag, what in flags.items()}})
    else:
        lines += _table(_options(command))
        often = [setting for setting in shown if setting.key in OFTEN]
        lines += ["", "Often given:", *_described(often)]
        lines += ["", f"All settings, by section (rayward {name} --help SECTION shows them, --help all every one):"]
        lines += _table(_counted(shown))
    return "\n".join([*lines, "", *_exit_codes()]) + "\n"


def own_help_text(name: str, arguments: Sequence[Action]) -> str:
    """The help of a command with a command line of its own, which takes these arguments."""
    told = {
        ", ".join(one.option_strings) + ("" if one.nargs == 0 else f" {one.metavar or one.dest.upper()}")
        if one.option_strings
        else str(one.metavar or one.dest).upper(): one.help
        for one in arguments
        if one.help
    }
    return "\n".join([*_heading(name), *_table(told), "", *_exit_codes()]) + "\n"


def _heading(name: str) -> list[str]:
    command = COMMANDS[name]
    return [f"rayward {name}: {command.purpose}", "", *_wrapped(command.files, ""), "", f"  {command.example}", ""]


def _settings(command: Command, config: type[BaseModel]) -> Iterator[Setting]:
    return (setting for setting in settings(config) if setting.key.split(".")[0] in command.sections)


def _about(name: str, shown: Sequence[Setting], about: str) -> list[Setting]:
    key = about.removeprefix("--").replace("-", "_")
    found = [one for one in shown if key == EVERYTHING or one.key == key or one.key.startswith(f"{key}.")]
    if not found:
        near = nearest(key, [setting.key for setting in shown])
        remedy = f"Did you mean {near}?" if near else f"Remedy: rayward {name} --help lists the sections"
        raise ConfigError(f"{name} has no setting or section {about!r}. {remedy}")
    return found


def _options(command: Command) -> dict[str, str]:
    return {
        "--run DIR": f"the run directory, {command.run} when not named; the settings that an earlier command "
        "saved there hold unless a preset or a file is named",
        "--config FILE": "settings from a TOML file",
        "--preset NAME": f"settings that come with rayward ({', '.join(presets())}), under those of a file",
        **{f"--{flag}": what for flag, what in command.variants.items()},
        **{f"--{flag}": what for flag, what in {**dry_flags(command), **command.flags}.items()},
        "--KEY VALUE": "a setting, e.g. --tracking.mode disabled; in TOML: [tracking] mode = "
        '"disabled". A list: --tracking.tags \'["a", "b"]\'. Nothing at all: none',
    }


def _counted(shown: Sequence[Setting]) -> dict[str, str]:
    """What each section is for, and how many settings it has with those of the sections in it."""
    counts = {
        top.key: sum(one.section is None and one.key.startswith(f"{top.key}.") for one in shown)
        for top in shown
        if "." not in top.key
    }
    docs = {setting.key: setting.doc for setting in shown}
    return {key: f"{count:>3}  {docs[key]}" for key, count in counts.items()}


def _described(shown: Sequence[Setting]) -> Iterator[str]:
    for setting in shown:
        if setting.section:
            yield from ("", *_wrapped(f"[{setting.key}] {setting.doc}", ""))
        else:
            yield f"  --{setting.key}  {setting.type}, {setting.default_text}"
            yield from _wrapped(setting.doc, " " * 6)


def _exit_codes() -> list[str]:
    return ["Exit codes:", *_table({str(code): what for code, what in EXIT_CODES.items()})]


def _table(rows: dict[str, str]) -> list[str]:
    lines, width = [], max(len(name) for name in rows) + 2
    for name, what in rows.items():
        first, *rest = _wrapped(what, " " * (width + 2)) or [""]
        lines += [f"  {name:<{width}}{first[width + 2 :]}", *rest]
    return lines


def _wrapped(text: str, indent: str) -> list[str]:
    width = min(100, shutil.get_terminal_size().columns)
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
