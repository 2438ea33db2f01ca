"""The commands of `rayward`: what each is for, what it reads and writes, what it can be told, and what it does.

Each imports what it needs when it runs, so that help and mistakes are told at once.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, Suppress, UseAppendAction, arg

from cluster.cli.parser import Command, bind, completion_script, parse, read
from cluster.config.load import COMMAND_LINE, ConfigError, compose, moved, nearest
from cluster.config.schema import Config
from cluster.pipeline.stage import Stage
from cluster.pipeline.stages import STAGES
from cluster.runtime.exit_codes import DONE, FAILED
from cluster.runtime.signals import Stopped
from cluster.tracking.console import Console, duration
from reward_server.redaction import SECRET_NAME

GROUPS = {
    "prepare": "Before a run",
    "train": "Train, in this order in one run directory, or each alone on your own files and models",
    "look": "Look at a run",
    "operate": "Operate",
    "cluster": "On a Ray cluster",
    "shell": "In your shell",
}
"""What commands are for, as the overview has it."""
DRY_RUN = {
    "dry-run": "say what this command would start, read and write, and what would stop it; exit code 1 then",
    "json": "with --dry-run, the same as JSON",
}
"""Flags of every command that works with settings."""
_RESUME = {
    "resume": "go on where the run directory stands, with its settings: what is complete is left as it is, what trains "
    "goes on from its newest checkpoint, any other step starts over, and a fresh directory is begun",
    "restart": "start over, and replace what the run directory holds of this; with neither flag that is refused",
}
_HERE = {"submits": False}
Run = Positional[Annotated[Path, arg(help="the run directory, also --run DIR", metavar="RUN")]]
Job = Positional[Annotated[str, arg(help="the job's id, as `rayward jobs` shows it", metavar="ID")]]
Address = Annotated[
    str | None,
    arg(help="dashboard of the cluster, http://HOST:8265; RAY_API_SERVER_ADDRESS when not named, else this machine's"),
]
Json = Annotated[bool, arg(help="print JSON, for scripts", help_behavior_hint="")]
_RLHF = Path("runs/rlhf")


def _command(group: str, files: str, example: str, **more: Any) -> Callable[[Callable[..., int | None]], Command]:
    """The command that a function is: its name, and with its docstring its purpose."""
    return lambda work: Command(
        name=work.__name__,
        group=group,
        purpose=(work.__doc__ or "").partition("\n")[0],
        files=files,
        example=example,
        work=work,
        **more,
    )


@_command(
    "prepare",
    "Reads the settings and the models' config.json. Writes nothing, and starts nothing. Exit code 1 when the plan "
    "cannot work; the reason says what to change. COMMAND --dry-run plans one command.",
    "rayward plan --preset one-24gb-gpu --ppo.minibatch_size 16",
    sections=(
        *("models", "data", "cluster", "plan", "sft", "sample", "reward", "ppo", "rollout", "generator", "scoring"),
    ),
    flags={"json": "print the plan as JSON: bytes, seconds and counts"},
)
def plan(config: Config, run: Path, json: bool) -> int:
    """Say what a run would do: batches, processes, memory, time, and what cannot work."""
    from cluster.plan.dry_run import plan

    return DONE if plan(config, run, "plan", json) else FAILED


@_command(
    "prepare",
    "Looks at versions, GPUs, disks, memory, open files, ports, W&B, the model hub, permissions, and with "
    "cluster.address at Ray's. A line for each: ok, warn or fail. Writes nothing. Exit code 1 on a failure.",
    "rayward doctor --cluster.address auto",
    sections=("models", "cluster", "serve", "tracking"),
    flags={"json": "print the findings as JSON"},
)
def doctor(config: Config, run: Path, json: bool) -> int:
    """Check the machine, and the cluster if one is named, and say what to fix."""
    from cluster.doctor.doctor import doctor

    return DONE if doctor(config, run, "doctor", json) else FAILED


@_command(
    "operate",
    "Writes RUN/scale.json, which the run answers; RUN has to be on a disk that both see.",
    "rayward scale runs/mine 4",
)
def scale(
    run: Run,
    n: Positional[Annotated[str, arg(help="how many there should be from the next version on", metavar="N")]],
    json: Json = False,
) -> None:
    """Change the number of generators of a run that is at work in step 3."""
    from cluster.fleet.scale import scale

    scale(_there(run), Console(), n, json=json)


@_command(
    "look",
    "Reads nothing but the run directory; a run that is unfinished or was killed will do. Writes RUN/report.html, "
    "RUN/report.png, RUN/card.md and the README.md of its policies; of several runs one page instead.",
    "rayward report runs/mine",
)
def report(
    run: Run = _RLHF,
    others: Positional[Annotated[tuple[Path, ...], arg(help="runs to compare it with", metavar="RUN")]] = (),
    output: Path | None = None,
    json: Json = False,
) -> None:
    """Write the report and the card of a run, or compare several runs side by side.

    Args:
        output: file for the page that compares; comparison.html in the first run directory when not named.
    """
    runs = [_there(one) for one in (run, *others)]
    if len({one.resolve() for one in runs}) < len(runs):
        raise ConfigError("a run is named twice. Remedy: name each run once")
    if output and not others:
        raise ConfigError("--output is for the page that compares several runs, not for one. Remedy: leave it out")
    if output and not output.parent.is_dir():
        raise ConfigError(f"there is no folder {output.parent} for --output. Remedy: make it, or name another file")
    if others:
        from cluster.report.compare import show_comparison

        show_comparison(runs, output, Console(), json)
        return
    from cluster.report.report import show_report

    show_report(run, Console(), json)


@_command(
    "look",
    "Reads RUN/ledger-*.jsonl and RUN/metrics.jsonl; a run that is unfinished or was killed will do.",
    "rayward audit runs/mine",
)
def audit(run: Run = _RLHF, json: Json = False) -> int:
    """Account for every sample of a run, over all its stops; exit code 1 when one is lost or trained twice."""
    from cluster.cli.audit import run_audit

    with Console() as console:
        return run_audit(_there(run), console, json)


@_command("look", "Reads RUN/lineage.jsonl and the files and models that it names.", "rayward lineage runs/mine")
def lineage(run: Run = _RLHF, json: Json = False) -> None:
    """Say what everything in a run directory was made of, and what has changed since."""
    from cluster.rundir.lineage import lineage_json, lineage_tree

    tree = lineage_tree(_there(run))
    Console().show(Text(lineage_json(run)) if json else tree)


def _there(run: Path) -> Path:
    """A run directory. Raises ConfigError where there is none."""
    if not run.is_dir():
        raise ConfigError(f"there is no run directory {run}. Remedy: name one that a command has written")
    return run


@_command(
    "look",
    "Reads RUN/status.json, which a run keeps up to date. A job's id stands for its run directory, where that is seen.",
    "rayward status runs/mine --json",
)
def status(run: Run = _RLHF, address: Address = None, json: Json = False) -> int:
    """Show what every process of a run takes and does, and who waits for whom."""
    from cluster.status.watch import status

    return status(_run_or_job(run, address), as_json=json)


@_command(
    "look",
    "Reads RUN/status.json, RUN/metrics.jsonl and RUN/alerts.jsonl. A job's id stands for its run directory, as above.",
    "rayward top runs/mine",
    **_HERE,
)
def top(run: Run = _RLHF, address: Address = None, json: Json = False) -> int:
    """Show a run live: its progress, processes, waits, curves and alerts."""
    from cluster.status.watch import top

    return top(_run_or_job(run, address), as_json=json)


def _run_or_job(run: Path, address: str | None) -> Path:
    """The run directory of this name, else of the job of this id. Raises JobError, ConfigError where it is away."""
    if not address and (run.is_absolute() or len(run.parts) > 1 or run.exists()):
        return run
    from cluster.jobs.submit import JobError, connect, job  # Ray's client takes a second to import

    try:
        found = job(connect(address), str(run))
    except JobError as error:
        raise JobError(f"{run} is no run directory here, and as a job: {error}") from error
    if not (found.run and Path(found.run, "status.json").is_file()):
        raise ConfigError(
            f"job {run} is {found.status}, and the status of its run directory {found.run!r} cannot be seen from here. "
            f"Remedy: rayward submit status --run {found.run or 'DIR'}"
        )
    return Path(found.run)


@_command(
    "look",
    "Needs `wandb login`; writes nothing here.",
    "rayward dashboard --entity my-team --project rayward",
    **_HERE,
)
def dashboard(entity: str, project: str = "rayward") -> int:
    """Make a workspace with the plots that matter in a project of Weights & Biases.

    Args:
        entity: user or team of W&B.
        project: project of W&B.
    """
    from cluster.tracking.workspace import dashboard

    return dashboard(entity, project)


@_command(
    "cluster",
    "Sends the code of this installation and the settings along; everything else is read and written on the cluster, "
    "so files and the run directory are absolute paths on storage that its machines share. Then it prints the job's "
    "log until the job ends, whose outcome is the exit code; Ctrl-C leaves the job running. Options of submit stand "
    "before the command.",
    "rayward submit ppo --run /shared/runs/mine --config mine.toml",
    **_HERE,
    wraps=True,
)
def submit(
    address: Address = None,
    include: UseAppendAction[tuple[Path, ...]] = (),
    id: str | None = None,
    cpus: float = 0.0,
    detach: bool = False,
    dry_run: bool = False,
    json: Json = False,
    words: Suppress[tuple[str, ...]] = (),
) -> int:
    """Run a command as a job of a Ray cluster, and follow it.

    Args:
        include: a file or folder to send along; what its .gitignore and .rayignore files name stays behind.
        id: id of the job; the cluster makes one when not named.
        cpus: CPUs to reserve for the command itself, which then runs on any machine with them; without, on the head.
        detach: print the job's id and leave it alone.
        dry_run: print what would be sent, and send nothing.
    """
    if not 0 <= cpus < float("inf"):
        raise ConfigError(f"--cpus is {cpus}. Remedy: give a number from 0 on")
    told, run_dir, settings = _told(include, *words)
    from cluster.jobs import submit

    order = submit.Order(words=told, run_dir=run_dir, settings=settings, include=include, id=id, cpus=cpus)
    files = submit.check(order)
    if dry_run:
        plan = {"entrypoint": order.entrypoint, "metadata": order.metadata, "id": order.id, "cpus": order.cpus}
        size = sum(files.values())
        lines = [f"{name:<12}{value}" for name, value in plan.items()]
        lines += [f"{'include':<12}{path}" for path in include]
        lines.append(f"{'in all':<12}{len(files)} files, {size / 2**20:.1f} MiB; nothing was sent")
        _say(plan | {"bytes": size, "files": files} if json else "\n".join(lines), json)
        return DONE
    client = submit.connect(address)
    name = submit.submit(client, order)
    if detach:
        _say({"id": name} if json else f"{name}\nrayward logs {name} --follow shows what it does", json)
        return DONE
    sys.stderr.write(f"submitted as {name}; Ctrl-C leaves it running\n")
    return _followed(client, name, json)


def _told(include: Iterable[Path], name: str = "", *words: str) -> tuple[tuple[str, ...], Path, Config | None]:
    """A job's words, run directory and settings to send. Raises ConfigError for what it would only say there."""
    possible = [known for known, command in COMMANDS.items() if command.submits]
    if name not in possible:
        variable, is_variable, _ = name.partition("=")
        if is_variable and SECRET_NAME.search(variable.upper()):
            raise ConfigError(
                f"{variable} is a secret, and a job carries none. Remedy: set it in the environment in which the "
                "cluster's machines start Ray"
            )
        near = nearest(name, possible)
        remedy = f"Did you mean {near}?" if near else f"COMMAND is one of {', '.join(possible)}"
        raise ConfigError(f"{name!r} cannot be submitted. {remedy}")
    command = COMMANDS[name]
    if not command.sections:
        return (name, *words), bind(command, words).keywords["run"], None
    call = parse(command, words)
    given = moved(Config, read(Config, call), _sent_along(include))
    config = compose(Config, given)
    told = [name, "--run", str(call.run_dir), *(f"--{flag}" for flag in sorted(call.flags))]
    told += [f"--{call.variant}"] if call.variant else []
    overrides = [one for one in given if one.origin == COMMAND_LINE and not call.fresh]
    told += [word for one in overrides for word in (f"--{one.key}", one.text)]
    if "cluster" in command.sections and not any(key == "cluster.address" for key, _ in call.overrides):
        told += ["--cluster.address", "auto"]
    return tuple(told), call.run_dir, config if call.fresh else None


def _sent_along(include: Iterable[Path]) -> Callable[[str, bool], str]:
    """Where a job finds a path: what is sent along, in its own folder."""
    folders = [(folder.absolute(), folder.name) for folder in include]

    def there(path: str, named: bool) -> str:
        inside = (Path(name, Path(path).relative_to(at)) for at, name in folders if Path(path).is_relative_to(at))
        return str(next(inside, path))

    return there


@_command("cluster", "Reads and writes nothing.", "rayward jobs --address http://head:8265", **_HERE)
def jobs(address: Address = None, json: Json = False) -> int:
    """List the jobs of a Ray cluster."""
    from cluster.jobs.submit import connect, jobs

    found = jobs(connect(address))
    table = Table("job", "status", "started (UTC)", "for", "command", "run", box=None, pad_edge=False)
    for one in found:
        table.add_row(one.id, one.status, one.started, duration(one.seconds), one.command, one.run)
    _say([asdict(one) for one in found] if json else table, json)
    return DONE


@_command("cluster", "Reads and writes nothing.", "rayward logs raysubmit_abc --follow", **_HERE)
def logs(id: Job, address: Address = None, follow: bool = False, json: Json = False) -> int:
    """Print what a job has printed.

    Args:
        follow: go on until the job ends, as submit does.
    """
    from cluster.jobs.submit import connect, job, logs

    client = connect(address)
    if follow:
        return _followed(client, id, json)
    text = logs(client, id)
    if json:
        _say(asdict(job(client, id)) | {"log": text}, json)
    else:
        sys.stdout.write(text)
    return DONE


@_command("cluster", "Reads and writes nothing.", "rayward stop raysubmit_abc", **_HERE)
def stop(id: Job, address: Address = None, json: Json = False) -> int:
    """Stop a job, and wait until it has stopped."""
    from cluster.jobs.submit import connect, stop

    last = stop(connect(address), id)
    _say(asdict(last) if json else f"{last.id} is {last.status}", json)
    return DONE


def _followed(client: Any, name: str, as_json: bool) -> int:
    """Print a job's log until it ends; the job's outcome is the exit code."""
    from cluster.jobs.submit import follow

    try:
        last = follow(client, name, sys.stderr if as_json else sys.stdout)
    except Stopped:
        sys.stderr.write(f"{name} goes on: rayward logs {name} --follow shows it, rayward stop {name} ends it\n")
        raise
    _say(asdict(last) if as_json else f"{last.id} {last.status} after {duration(last.seconds)}", as_json)
    return DONE if last.status == "SUCCEEDED" else FAILED


def _say(what: Any, as_json: bool) -> None:
    Console().show(Text(dumps(what, indent=2)) if as_json else what)


@_command(
    "shell",
    "Writes nothing. bash reads it from ~/.local/share/bash-completion/completions/rayward, zsh from a file _rayward "
    "in a folder of $fpath, fish from ~/.config/fish/completions/rayward.fish.",
    "rayward completion bash > ~/.local/share/bash-completion/completions/rayward",
    **_HERE,
)
def completion(shell: Positional[Literal["bash", "zsh", "fish"]]) -> int:
    """Print a script with which a shell completes commands, options, settings and their values."""
    sys.stdout.write(completion_script(COMMANDS, shell))
    return DONE


def _of(stage: type[Stage]) -> Command:
    """The command that a stage is."""
    return Command(
        name=stage.name,
        group=stage.group,
        purpose=stage.purpose,
        files=stage.files,
        example=stage.example,
        work=stage,
        sections=stage.sections,
        run=stage.default_run,
        preset=stage.preset,
        flags={**DRY_RUN, **_RESUME} if stage.resumes else DRY_RUN,
        variants=stage.variants,
    )


COMMANDS = {
    one.name: one
    for one in (
        *(plan, doctor, *map(_of, STAGES.values()), scale, report, audit, lineage),
        *(status, top, dashboard, submit, jobs, logs, stop, completion),
    )
}
"""Every command by its word."""
