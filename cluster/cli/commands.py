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

GROUPS = {
    "prepare": "Before a run",
    "train": "Train, in this order in one run directory, or each alone on your own files and models",
    "look": "Look at a run",
    "operate": "Operate",
    "cluster": "On a Ray cluster",
    "shell": "In your shell",
}
"""What commands are for, as the overview has it."""
_DRY = "say what this command would start, read and write, and what would stop it; exit code 1 then"
DRY_RUN = {"dry-run": _DRY, "json": "with --dry-run, the same as JSON"}
"""Flags of every command that works with settings."""
_RESUME = {
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


def _command(group: str, files: str, example: str, **more: Any) -> Callable[[Callable[..., int | None]], Command]:
    """The command that a function is: its name, and with its docstring its purpose."""
    return lambda work: Command(
        name=work.__name__, group=group, purpose=work.__doc__ or "", files=files, example=example, work=work, **more
    )


@_command(
    "prepare",
    "Reads the settings and the models' config.json. Writes nothing, and starts nothing. Exit code 1 when the plan "
    "cannot work; the reason names the nearest that does. COMMAND --dry-run plans one command.",
    "rayward plan --preset one-24gb-gpu --ppo.minibatch_size 16",
    sections=(
        *("models", "data", "cluster", "plan", "sft", "sample", "reward", "ppo", "rollout", "generator", "scoring"),
    ),
    flags={"json": "print the plan as JSON: bytes, seconds and counts"},
    prints=True,
)
def plan(config: Config, run: Path, json: bool) -> int:
    """Say what a run would do: batches, processes, memory, time, and what cannot work."""
    from cluster.plan.dry_run import plan

    return DONE if plan(config, run, "plan", json) else FAILED


@_command(
    "prepare",
    "Looks at versions, GPUs, disks, memory, threads, load, ports, W&B, the model hub, permissions, and with "
    "cluster.address at Ray's. A line for each: ok, warn or fail. Writes nothing. Exit code 1 on a failure.",
    "rayward doctor --cluster.address auto",
    sections=("models", "cluster", "serve", "tracking"),
    flags={"json": "print the findings as JSON"},
    prints=True,
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
    dry_run: Dry = False,
    json: Json = False,
    console: Console = None,
) -> None:
    """Change the number of generators of a run that is at work in step 3."""
    from cluster.fleet.scale import number_of, scale

    number_of(n)
    if not dry_run:
        scale(run, console, n, json=json)


@_command(
    "look",
    "Reads nothing but the run directory; a run that is unfinished or was killed will do.",
    "rayward report runs/mine",
)
def report(run: Run = _RLHF, dry_run: Dry = False, json: Json = False, console: Console = None) -> None:
    """Write RUN/report.html from the files of a run directory."""
    if dry_run:
        return
    from cluster.report.report import summary, write_report
    from cluster.rundir.files import read_run

    path = write_report(run)
    if json:
        console.line(jsons.dumps({"report": str(path), "summary": read_run(run).summary}, indent=2))
    else:
        console.show(summary(run))
        console.line(f"The report is in {path}")


@_command(
    "look",
    "Reads RUN/ledger-*.jsonl and RUN/metrics.jsonl; a run that is unfinished or was killed will do.",
    "rayward audit runs/mine",
)
def audit(run: Run = _RLHF, dry_run: Dry = False, json: Json = False, console: Console = None) -> int:
    """Account for every sample of a run, over all its stops; exit code 1 when one is lost or trained twice."""
    from cluster.cli.audit import ledgers, run_audit

    return run_audit(run, console, json) if ledgers(run) and not dry_run else DONE


@_command("look", "Reads RUN/lineage.jsonl and the files and models that it names.", "rayward lineage runs/mine")
def lineage(run: Run = _RLHF, dry_run: Dry = False, json: Json = False, console: Console = None) -> None:
    """Say what everything in a run directory was made of, and what has changed since."""
    from rich.text import Text

    from cluster.rundir.lineage import lineage_json, lineage_tree

    tree = lineage_tree(run)
    if not dry_run:
        console.show(Text(lineage_json(run)) if json else tree)


@_command(
    "look",
    "Reads RUN/status.json, which a run keeps up to date. A job's id stands for its run directory, where that is seen.",
    "rayward status runs/mine --json",
    prints=True,
)
def status(run: Run = _RLHF, address: Address = None, json: Json = False) -> int:
    """Show what every process of a run takes and does, and who waits for whom."""
    from cluster.status.watch import status

    return status(_run_or_job(run, address), as_json=json)


@_command(
    "look",
    "Reads RUN/status.json, RUN/metrics.jsonl and RUN/alerts.jsonl. A job's id stands for its run directory, as above.",
    "rayward top runs/mine",
    prints=True,
    submits=False,
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
    prints=True,
    submits=False,
)
def dashboard(
    entity: Annotated[str, arg(help="user or team of W&B")],
    project: Annotated[str, arg(help="project of W&B")] = "rayward",
) -> int:
    """Make a workspace with the plots that matter in a project of Weights & Biases."""
    from cluster.tracking.workspace import dashboard

    return dashboard(entity, project)


@_command(
    "cluster",
    "Sends the code of this installation and the settings along; everything else is read and written on the cluster, "
    "so files and the run directory are absolute paths on storage that its machines share. Then it prints the job's "
    "log until the job ends, whose outcome is the exit code; Ctrl-C leaves the job running. Options of submit stand "
    "before the command.",
    "rayward submit ppo --run /shared/runs/mine --config mine.toml",
    prints=True,
    submits=False,
    wraps=True,
)
def submit(
    address: Address = None,
    include: UseAppendAction[
        Annotated[
            tuple[Path, ...],
            arg(
                help="a file or folder to send along, such as a module with a reward function. What the .gitignore and "
                ".rayignore files of a folder name stays behind"
            ),
        ]
    ] = (),
    id: Annotated[str | None, arg(help="id of the job; the cluster makes one when not named")] = None,
    cpus: Annotated[
        float,
        arg(
            help="CPUs to reserve for the command itself, beside those of its processes. It then runs on any machine "
            "that has them free; without, on the head"
        ),
    ] = 0.0,
    detach: Annotated[bool, arg(help="print the job's id and leave it alone", help_behavior_hint="")] = False,
    dry_run: Annotated[bool, arg(help="print what would be sent, and send nothing", help_behavior_hint="")] = False,
    json: Json = False,
    words: Suppress[tuple[str, ...]] = (),
) -> int:
    """Run a command as a job of a Ray cluster, and follow it."""
    if not 0 <= cpus < float("inf"):
        raise ConfigError(f"--cpus is {cpus}. Remedy: give a number from 0 on")
    told, run_dir, settings = _told(*words)
    from cluster.jobs import commands
    from cluster.jobs.submit import Order

    order = Order(words=told, run_dir=run_dir, settings=settings, include=include, id=id, cpus=cpus)
    return commands.submit(order, address, detach=detach, dry_run=dry_run, as_json=json)


def _told(name: str = "", *words: str) -> tuple[tuple[str, ...], Path, Config | None]:
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
    config = load(Config, call)
    told = [name, "--run", str(call.run_dir), *(f"--{flag}" for flag in sorted(call.flags))]
    told += [f"--{call.variant}"] if call.variant else []
    told += [] if call.fresh else [word for key, value in call.overrides for word in (f"--{key}", value or "")]
    if "cluster" in command.sections and not any(key == "cluster.address" for key, _ in call.overrides):
        told += ["--cluster.address", "auto"]
    return tuple(told), call.run_dir, config if call.fresh else None


@_command("cluster", "Reads and writes nothing.", "rayward jobs --address http://head:8265", prints=True, submits=False)
def jobs(address: Address = None, json: Json = False) -> int:
    """List the jobs of a Ray cluster."""
    from cluster.jobs import commands

    return commands.jobs(address, as_json=json)


@_command("cluster", "Reads and writes nothing.", "rayward logs raysubmit_abc --follow", prints=True, submits=False)
def logs(
    id: Job,
    address: Address = None,
    follow: Annotated[bool, arg(help="go on until the job ends, as submit does", help_behavior_hint="")] = False,
    json: Json = False,
) -> int:
    """Print what a job has printed."""
    from cluster.jobs import commands

    return commands.show_logs(address, id, follow=follow, as_json=json)


@_command("cluster", "Reads and writes nothing.", "rayward stop raysubmit_abc", prints=True, submits=False)
def stop(id: Job, address: Address = None, json: Json = False) -> int:
    """Stop a job, and wait until it has stopped."""
    from cluster.jobs import commands

    return commands.stop_job(address, id, as_json=json)


@_command(
    "shell",
    "Writes nothing. bash reads it from ~/.local/share/bash-completion/completions/rayward, zsh from a file _rayward "
    "in a folder of $fpath, fish from ~/.config/fish/completions/rayward.fish.",
    "rayward completion bash > ~/.local/share/bash-completion/completions/rayward",
    prints=True,
    submits=False,
)
def completion(shell: Positional[Literal["bash", "zsh", "fish"]]) -> int:
    """Print a script with which a shell completes commands, options, settings and their values."""
    sys.stdout.write(completion_script(COMMANDS, shell))
    return DONE


def _stage(name: str) -> Callable[..., None]:
    def work(job: Any, **variant: bool) -> None:
        from cluster.pipeline import launch

        getattr(launch, name)(job, **variant)

    return work


_TRAINING, _SAMPLING = ("models", "data", "cluster"), ("rollout", "generator")
_STAGES = (
    Command(
        name="quickstart",
        group="train",
        purpose="Run all of it on a small model, and write a report.",
        files="Needs nothing but this installation. Writes models, metrics and report.html into RUN.",
        example="rayward quickstart --tiny",
        work=_stage("quickstart"),
        flags={**DRY_RUN, **_RESUME},
        sections=(
            *(*_TRAINING, "sft", "sample", "labeler", "reward", "ppo", *_SAMPLING),
            *("scoring", "publish", "evaluation", "tracking", "quickstart"),
        ),
        run="runs/quickstart",
        preset="quickstart",
        variants={"tiny": "a model of 2 million parameters, pretrained on the spot; PPO with and without the mix"},
    ),
    Command(
        name="sft",
        group="train",
        purpose="Step 1: fine-tune a language model on demonstrations.",
        files="Reads models.base and data.demonstrations. Writes RUN/sft, a Hugging Face folder.",
        example="rayward sft --run runs/mine --models.base path/to/model --data.demonstrations d.jsonl",
        work=_stage("sft"),
        flags={**DRY_RUN, **_RESUME},
        sections=(*_TRAINING, "sft", "tracking"),
    ),
    Command(
        name="baseline",
        group="train",
        purpose="Step 1 again: the SFT baseline, trained longer and without pretraining text.",
        files="Reads models.base and data.demonstrations. Writes RUN/baseline, and each epoch to RUN/baseline-epochs.",
        example="rayward baseline --run runs/mine --models.base path/to/model --data.demonstrations d.jsonl",
        work=_stage("baseline"),
        sections=(*_TRAINING, "baseline", "tracking"),
        flags=DRY_RUN,
    ),
    Command(
        name="sample",
        group="train",
        purpose="Step 2a: sample completions to be compared.",
        files="Reads RUN/sft (or models.sft) and data.preference_prompts. Writes RUN/data/completions.jsonl.",
        example="rayward sample --run runs/mine --data.preference_prompts prompts.jsonl",
        work=_stage("sample"),
        flags={**DRY_RUN, **_RESUME},
        sections=(*_TRAINING, "sample", *_SAMPLING, "tracking"),
    ),
    Command(
        name="rank",
        group="train",
        purpose="Step 2b: rank the completions with a labeler, by default a simulated one (VADER).",
        files="Reads RUN/data/completions.jsonl (or data.completions). Writes RUN/data/comparisons.jsonl.",
        example="rayward rank --run runs/mine --labeler.name my_module:my_verdicts",
        work=_stage("rank"),
        flags={**DRY_RUN, **_RESUME},
        sections=("data", "labeler", "tracking"),
    ),
    Command(
        name="reward",
        group="train",
        purpose="Step 2c: train a reward model on ranked completions.",
        files="Reads RUN/sft, RUN/data/comparisons.jsonl and data.demonstrations. Writes RUN/reward.",
        example="rayward reward --run runs/mine --data.comparisons comparisons.jsonl",
        work=_stage("reward"),
        flags={**DRY_RUN, **_RESUME},
        sections=(*_TRAINING, "reward", "tracking"),
    ),
    Command(
        name="select",
        group="train",
        purpose="Choose the epoch of an SFT model whose responses the reward model scores highest.",
        files="Reads RUN/baseline-epochs (or RUN/sft-epochs), RUN/reward and data.prompts_valid. Writes RUN/baseline "
        "(or RUN/sft) and RUN/selection-baseline.json.",
        example="rayward select --run runs/mine --data.prompts_valid prompts.jsonl",
        work=_stage("select"),
        sections=(*_TRAINING, "select", *_SAMPLING, "scoring", "tracking"),
        flags=DRY_RUN,
    ),
    Command(
        name="ppo",
        group="train",
        purpose="Step 3: train the SFT model against the reward model by PPO-ptx.",
        files="Reads RUN/sft, RUN/reward, data.prompts, data.pretraining. Writes RUN/policy, RUN/policy_ema.",
        example="rayward ppo --run runs/mine --data.prompts prompts.jsonl --ppo.kl.coef 0.05",
        work=_stage("ppo"),
        flags={**DRY_RUN, **_RESUME},
        sections=(*_TRAINING, "ppo", *_SAMPLING, "scoring", "publish", "evaluation", "labeler", "tracking"),
    ),
    Command(
        name="rounds",
        group="train",
        purpose="Steps 2 and 3 in rounds: the policy's completions are ranked, a reward model and a policy trained.",
        files="Reads RUN/sft, data.preference_prompts and what reward and ppo read. Writes RUN/round-1 and on; stops "
        "for people to rank RUN/round-<k>/sheet.csv, and goes on from RUN/round-<k>/rankings when given again.",
        example="rayward rounds --run runs/mine --rounds.count 3 --rounds.labelers people",
        work=_stage("rounds"),
        sections=(
            *(*_TRAINING, "rounds", "sample", "labeler", "reward", "ppo", *_SAMPLING),
            *("scoring", "publish", "evaluation", "tracking"),
        ),
        flags=DRY_RUN,
    ),
    Command(
        name="evaluate",
        group="train",
        purpose="Answer held-out prompts with a model, and score the answers.",
        files="Reads RUN/policy (or models.policy) and data.prompts_heldout. Writes RUN/evaluations/.",
        example="rayward evaluate --run runs/mine --data.prompts_heldout heldout.jsonl",
        work=_stage("evaluate"),
        sections=(*_TRAINING, "evaluation", *_SAMPLING, "scoring", "labeler", "tracking"),
        flags=DRY_RUN,
    ),
    Command(
        name="serve",
        group="operate",
        purpose="Serve scores over HTTP to others, from a reward model, a function, rules, or a mix of them.",
        files="Reads RUN/reward, or what scoring.parts names. Answers /score, /health, /metrics and /docs.",
        example="rayward serve --run runs/mine --serve.port 8700 --serve.replicas 2",
        work=_stage("serve"),
        sections=("models", "cluster", "scoring", "serve", "tracking"),
        flags=DRY_RUN,
    ),
)
COMMANDS = {
    one.name: one
    for one in (
        *(plan, doctor, *_STAGES, scale, report, audit, lineage),
        *(status, top, dashboard, submit, jobs, logs, stop, completion),
    )
}
"""Every command by its word."""
