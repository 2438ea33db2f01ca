"""The commands of `rayward`: what each is for, what it reads and writes, and what it can be told."""

from dataclasses import dataclass, field

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
_TRAINING = ("models", "data", "cluster")
_SAMPLING = ("rollout", "generator")
STAGE_FLAGS = {
    "resume": "go on where the run directory stands, with its settings: what is complete is left as it is, PPO goes on "
    "from its newest checkpoint, any other step starts over, and a fresh directory is begun",
    "restart": "start over, and replace what the run directory holds of this; with neither flag that is refused",
}

COMMANDS = {
    "plan": Command(
        group="prepare",
        purpose="Say what a run would do: batches, processes, memory, time, and what cannot work.",
        files="Reads the settings and the models' config.json. Writes nothing, and starts nothing. Exit code 1 when "
        "the plan cannot work; the reason names the nearest that does. COMMAND --dry-run plans one command.",
        example="rayward plan --preset one-24gb-gpu --ppo.minibatch_size 16",
        entry="cluster.plan.dry_run:plan",
        sections=(*_TRAINING, "plan", "sft", "sample", "reward", "ppo", *_SAMPLING, "scoring"),
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
    "quickstart": Command(
        group="train",
        purpose="Run all of it on a small model, and write a report.",
        files="Needs nothing but this installation. Writes models, metrics and report.html into RUN.",
        example="rayward quickstart --tiny",
        entry="cluster.pipeline.launch:quickstart",
        flags=STAGE_FLAGS,
        sections=(
            *(*_TRAINING, "sft", "sample", "labeler", "reward", "ppo", *_SAMPLING),
            *("scoring", "publish", "evaluation", "tracking", "quickstart"),
        ),
        run="runs/quickstart",
        preset="quickstart",
        variants={"tiny": "a model of 2 million parameters, pretrained on the spot; PPO with and without the mix"},
    ),
    "sft": Command(
        group="train",
        purpose="Step 1: fine-tune a language model on demonstrations.",
        files="Reads models.base and data.demonstrations. Writes RUN/sft, a Hugging Face folder.",
        example="rayward sft --run runs/mine --models.base path/to/model --data.demonstrations d.jsonl",
        entry="cluster.pipeline.launch:sft",
        flags=STAGE_FLAGS,
        sections=(*_TRAINING, "sft", "tracking"),
    ),
    "baseline": Command(
        group="train",
        purpose="Step 1 again: the SFT baseline, trained longer and without pretraining text.",
        files="Reads models.base and data.demonstrations. Writes RUN/baseline, and each epoch to RUN/baseline-epochs.",
        example="rayward baseline --run runs/mine --models.base path/to/model --data.demonstrations d.jsonl",
        entry="cluster.pipeline.launch:baseline",
        sections=(*_TRAINING, "baseline", "tracking"),
    ),
    "sample": Command(
        group="train",
        purpose="Step 2a: sample completions to be compared.",
        files="Reads RUN/sft (or models.sft) and data.preference_prompts. Writes RUN/data/completions.jsonl.",
        example="rayward sample --run runs/mine --data.preference_prompts prompts.jsonl",
        entry="cluster.pipeline.launch:sample",
        flags=STAGE_FLAGS,
        sections=(*_TRAINING, "sample", *_SAMPLING, "tracking"),
    ),
    "rank": Command(
        group="train",
        purpose="Step 2b: rank the completions with a labeler, by default a simulated one (VADER).",
        files="Reads RUN/data/completions.jsonl (or data.completions). Writes RUN/data/comparisons.jsonl.",
        example="rayward rank --run runs/mine --labeler.name my_module:my_verdicts",
        entry="cluster.pipeline.launch:rank",
        flags=STAGE_FLAGS,
        sections=("data", "labeler", "tracking"),
    ),
    "reward": Command(
        group="train",
        purpose="Step 2c: train a reward model on ranked completions.",
        files="Reads RUN/sft, RUN/data/comparisons.jsonl and data.demonstrations. Writes RUN/reward.",
        example="rayward reward --run runs/mine --data.comparisons comparisons.jsonl",
        entry="cluster.pipeline.launch:reward",
        flags=STAGE_FLAGS,
        sections=(*_TRAINING, "reward", "tracking"),
    ),
    "select": Command(
        group="train",
        purpose="Choose the epoch of an SFT model whose responses the reward model scores highest.",
        files="Reads RUN/baseline-epochs (or RUN/sft-epochs), RUN/reward and data.prompts_valid. Writes RUN/baseline "
        "(or RUN/sft) and RUN/selection-baseline.json.",
        example="rayward select --run runs/mine --data.prompts_valid prompts.jsonl",
        entry="cluster.pipeline.launch:select",
        sections=(*_TRAINING, "select", *_SAMPLING, "scoring", "tracking"),
    ),
    "ppo": Command(
        group="train",
        purpose="Step 3: train the SFT model against the reward model by PPO-ptx.",
        files="Reads RUN/sft, RUN/reward, data.prompts, data.pretraining. Writes RUN/policy, RUN/policy_ema.",
        example="rayward ppo --run runs/mine --data.prompts prompts.jsonl --ppo.kl.coef 0.05",
        entry="cluster.pipeline.launch:ppo",
        flags=STAGE_FLAGS,
        sections=(*_TRAINING, "ppo", *_SAMPLING, "scoring", "publish", "evaluation", "labeler", "tracking"),
    ),
    "rounds": Command(
        group="train",
        purpose="Steps 2 and 3 in rounds: the policy's completions are ranked, a reward model and a policy trained.",
        files="Reads RUN/sft, data.preference_prompts and what reward and ppo read. Writes RUN/round-1 and on; stops "
        "for people to rank RUN/round-<k>/sheet.csv, and goes on from RUN/round-<k>/rankings when given again.",
        example="rayward rounds --run runs/mine --rounds.count 3 --rounds.labelers people",
        entry="cluster.pipeline.launch:rounds",
        sections=(
            *(*_TRAINING, "rounds", "sample", "labeler", "reward", "ppo", *_SAMPLING),
            *("scoring", "publish", "evaluation", "tracking"),
        ),
    ),
    "evaluate": Command(
        group="train",
        purpose="Answer held-out prompts with a model, and score the answers.",
        files="Reads RUN/policy (or models.policy) and data.prompts_heldout. Writes RUN/evaluations/.",
        example="rayward evaluate --run runs/mine --data.prompts_heldout heldout.jsonl",
        entry="cluster.pipeline.launch:evaluate",
        sections=(*_TRAINING, "evaluation", *_SAMPLING, "scoring", "labeler", "tracking"),
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
    "serve": Command(
        group="operate",
        purpose="Serve scores over HTTP to others, from a reward model, a function, rules, or a mix of them.",
        files="Reads RUN/reward, or what scoring.parts names. Answers /score, /health, /metrics and /docs.",
        example="rayward serve --run runs/mine --serve.port 8700 --serve.replicas 2",
        entry="cluster.pipeline.launch:serve",
        sections=("models", "cluster", "scoring", "serve", "tracking"),
    ),
    "report": Command(
        group="look",
        purpose="Write RUN/report.html from the files of a run directory.",
        files="Reads nothing but the run directory; a run that is unfinished or was killed will do.",
        example="rayward report runs/mine",
        flags={"json": "print RUN/summary.json and the report's path as JSON"},
        entry="cluster.pipeline.launch:report",
    ),
    "audit": Command(
        group="look",
        purpose="Account for every sample of a run, over all its stops; exit code 1 when one is lost or trained twice.",
        files="Reads RUN/ledger-*.jsonl and RUN/metrics.jsonl; a run that is unfinished or was killed will do.",
        example="rayward audit runs/mine",
        entry="cluster.pipeline.launch:audit",
        flags={"json": "the same as JSON"},
    ),
    "lineage": Command(
        group="look",
        purpose="Say what everything in a run directory was made of, and what has changed since.",
        files="Reads RUN/lineage.jsonl and the files and models that it names.",
        example="rayward lineage runs/mine",
        entry="cluster.pipeline.launch:lineage",
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


def dry_flags(command: Command) -> dict[str, str]:
    """The flags for a dry run, of a command that does not only look."""
    return {} if command.inspects or command.own else DRY_RUN
