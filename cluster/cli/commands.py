"""The commands of `rayward`: what each is for, what it reads and writes, what it can be told, and what it does.

Each imports what it needs when it runs, so that help and mistakes are told at once.
"""

import json as jsons
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, Suppress, UseAppendAction, arg

from cluster.cli.parser import Command, bind, completion_script, load, parse
from cluster.config.load import ConfigError, nearest
from cluster.config.redaction import SECRET_NAME
from cluster.config.schema import Config
from cluster.runtime.exit_codes import DONE, FAILED

from cluster.pipeline.stage import SAMPLING, SECTIONS, Stage
from cluster.pipeline.stages import STAGES

GROUPS = {
    "prepare": "Before a run",
    "train": "Train, in this order in one run directory, or each alone on your own files and models",
    "look": "Look at a run",
    "operate": "Operate",
    "cluster": "On a Ray cluster",
    "shell": "In your shell",
}
"""What commands are for, as the overview has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command."""

    group: str
    """Under which of GROUPS the overview lists it."""
    purpose: str
    """What it is for, on one line."""
    files: str
    """What it reads and writes."""
    example: str
    """A complete command line."""
    entry: str
    """`module:function`, imported when the command runs."""
    sections: tuple[str, ...] = ()
    """Fields of Config whose settings it reads; none for a command that takes no configuration."""
    run: str = "runs/rlhf"
    """Run directory when none is named."""
    preset: str | None = None
    """Preset when neither a preset nor a file is named."""
    arguments: dict[str, str] = field(default_factory=dict)
    """Words that have to follow the run directory: name -> meaning."""
    flags: dict[str, str] = field(default_factory=dict)
    """Flags that are either given or not: flag -> meaning."""
    own: bool = False
    """It has a command line of its own, see `command_line.own_parser`: `function(parsed words) -> exit code`."""
    submits: bool = True
    """Whether it can be a job of a cluster."""
    variants: dict[str, str] = field(default_factory=dict)
    """Flags that each stand for another preset, and a run directory of that name: flag -> meaning."""
    inspects: bool = False
    """Whether it looks and prints only, and writes no run directory."""


DRY_RUN = {
    "dry-run": "say what this command would start, read and write, and what would stop it; exit code 1 then",
    "json": "with --dry-run, the same as JSON",
}
"""Flags of every command that does something."""
STAGE_FLAGS = {
    "resume": "go on where the run directory stands, with its settings: what is complete is left as it is, PPO goes on "
    "from its newest checkpoint, any other step starts over, and a fresh directory is begun",
    "restart": "start over, and replace what the run directory holds of this; with neither flag that is refused",
}
Run = Positional[Annotated[Path, arg(help="the run directory, also --run DIR", metavar="RUN")]]
Job = Positional[Annotated[str, arg(help="the job's id, as `rayward jobs` shows it", metavar="ID")]]
Address = Annotated[
    str | None,
    arg(help="dashboard of the cluster, http://HOST:8265; RAY_API_SERVER_ADDRESS when not named, else this machine's"),
]
Json = Annotated[bool, arg(help="print JSON, for scripts", help_behavior_hint="")]
Dry = Annotated[bool, arg(help=_DRY, help_behavior_hint="")]
Console = Suppress[Any]
_RLHF = Path("runs/rlhf")


def _of(stage: type[Stage]) -> Command:
    """A stage as a command."""
    return Command(
        group=stage.group,
        purpose=stage.purpose,
        files=stage.files,
        example=stage.example,
        entry="",
        sections=stage.sections,
        run=stage.default_run,
        preset=stage.preset,
        flags=STAGE_FLAGS if stage.resumes else {},
        variants=dict(stage.variants),
    )


COMMANDS = {
    **{name: _of(stage) for name, stage in STAGES.items()},
    "plan": Command(
        group="prepare",
        purpose="Say what a run would do: batches, processes, memory, time, and what cannot work.",
        files="Reads the settings and the models' config.json. Writes nothing, and starts nothing. Exit code 1 when "
        "the plan cannot work; the reason names the nearest that does. COMMAND --dry-run plans one command.",
        example="rayward plan --preset one-24gb-gpu --ppo.minibatch_size 16",
        entry="cluster.plan.dry_run:plan",
        sections=(*SECTIONS, "plan", "sft", "sample", "reward", "ppo", *SAMPLING, "scoring"),
        flags={"json": "print the plan as JSON: bytes, seconds and counts"},
        inspects=True,
    ),
    "doctor": Command(
        group="prepare",
        purpose="Check the machine, and the cluster if one is named, and say what to fix.",
        files="Looks at versions, GPUs, disks, memory, threads, load, ports, W&B, the model hub, permissions, and with "
        "cluster.address at Ray's. A line for each: ok, warn or fail. Writes nothing. Exit code 1 on a failure.",
        example="rayward doctor --cluster.address auto",
        entry="cluster.doctor.doctor:doctor",
        sections=("models", "cluster", "serve", "tracking"),
        flags={"json": "print the findings as JSON"},
        inspects=True,
    ),
    "scale": Command(
        group="operate",
        purpose="Change the number of generators of a run that is at work in step 3.",
        files="Writes RUN/scale.json, which the run answers; RUN has to be on a disk that both see.",
        example="rayward scale runs/mine 4",
        entry="cluster.fleet.scale:scale",
        arguments={"N": "how many there should be from the next version on"},
        flags={"json": "the run's answer as JSON"},
    ),
    "report": Command(
        group="look",
        purpose="Write RUN/report.html from the files of a run directory.",
        files="Reads nothing but the run directory; a run that is unfinished or was killed will do.",
        example="rayward report runs/mine",
        flags={"json": "print RUN/summary.json and the report's path as JSON"},
        entry="cluster.report.report:show_report",
    ),
    "audit": Command(
        group="look",
        purpose="Account for every sample of a run, over all its stops; exit code 1 when one is lost or trained twice.",
        files="Reads RUN/ledger-*.jsonl and RUN/metrics.jsonl; a run that is unfinished or was killed will do.",
        example="rayward audit runs/mine",
        entry="cluster.cli.audit:run_audit",
        flags={"json": "the same as JSON"},
    ),
    "lineage": Command(
        group="look",
        purpose="Say what everything in a run directory was made of, and what has changed since.",
        files="Reads RUN/lineage.jsonl and the files and models that it names.",
        example="rayward lineage runs/mine",
        entry="cluster.cli.audit:show_lineage",
        flags={"json": "as JSON: the last record of each file and model, with its state"},
    ),
    "status": Command(
        group="look",
        purpose="Show what every process of a run takes and does, and who waits for whom.",
        files="Reads RUN/status.json, which a run keeps up to date.",
        example="rayward status runs/mine --json",
        entry="cluster.status.watch:status",
        own=True,
    ),
    "top": Command(
        group="look",
        purpose="Show a run live: its progress, processes, waits, curves and alerts.",
        files="Reads RUN/status.json, RUN/metrics.jsonl and RUN/alerts.jsonl.",
        example="rayward top runs/mine",
        entry="cluster.status.watch:top",
        own=True,
        submits=False,
    ),
    "dashboard": Command(
        group="look",
        purpose="Make a workspace with the plots that matter in a project of Weights & Biases.",
        files="Needs `wandb login`; writes nothing here.",
        example="rayward dashboard --entity my-team --project rayward",
        entry="cluster.tracking.workspace:dashboard",
        own=True,
        submits=False,
    ),
    "submit": Command(
        group="cluster",
        purpose="Run a command as a job of a Ray cluster, and follow it.",
        files="Sends the code of this installation and the settings along; everything else is read and written on the "
        "cluster, so files and the run directory are absolute paths on storage that its machines share. Then it prints "
        "the job's log until the job ends, whose outcome is the exit code; Ctrl-C leaves the job running. Options of "
        "submit stand before the command.",
        example="rayward submit ppo --run /shared/runs/mine --config mine.toml",
        entry="cluster.jobs.commands:submit",
        own=True,
        submits=False,
    ),
    "jobs": Command(
        group="cluster",
        purpose="List the jobs of a Ray cluster.",
        files="Reads and writes nothing.",
        example="rayward jobs --address http://head:8265",
        entry="cluster.jobs.commands:jobs",
        own=True,
        submits=False,
    ),
    "logs": Command(
        group="cluster",
        purpose="Print what a job has printed.",
        files="Reads and writes nothing.",
        example="rayward logs raysubmit_abc --follow",
        entry="cluster.jobs.commands:show_logs",
        own=True,
        submits=False,
    ),
    "stop": Command(
        group="cluster",
        purpose="Stop a job, and wait until it has stopped.",
        files="Reads and writes nothing.",
        example="rayward stop raysubmit_abc",
        entry="cluster.jobs.commands:stop_job",
        own=True,
        submits=False,
    ),
    "completion": Command(
        group="shell",
        purpose="Print a script with which a shell completes commands, options, settings and their values.",
        files="Writes nothing. bash reads it from ~/.local/share/bash-completion/completions/rayward, zsh from a file "
        "_rayward in a folder of $fpath, fish from ~/.config/fish/completions/rayward.fish.",
        example="rayward completion bash > ~/.local/share/bash-completion/completions/rayward",
        entry="cluster.cli.completion:completion",
        own=True,
        submits=False,
    ),
}
"""Every command by its word."""
