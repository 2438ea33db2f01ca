"""The steps of a run: what each command reads, asks of the processes, and writes into the run directory."""

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from actors.chat import ChatExample
from actors.prompts import Demonstration, Prompt, check_prompts, read_demonstrations, read_prompts
from actors.sampling import Generator, sample
from actors.trajectory import Completion
from cluster.config.schema import Config
from cluster.pipeline.recipes import reward_stage, sample_stage, tuning_stage
from cluster.rundir.inputs import data_file, model_folder
from cluster.rundir.lineage import record
from cluster.rundir.stages import Stage, Start, made_of
from cluster.runtime.health import Monitor
from cluster.tracking.tracker import Tracker
from learner.config import SFTConfig
from learner.data.corpora import demonstration_examples, pack, read_texts, split_held_out, text_examples
from learner.maths.accuracy import RewardAccuracy
from learner.reward_modeling import ranked_groups, reward_modeling, split_groups
from learner.sft import SFTData, best_epoch, sft
from learner.worker.group import LearnerGroup
from reward_server.encoding import ChatEncoding
from reward_server.preferences.labeling import Comparison, label, load_labeler, read_comparisons, write_comparisons
from reward_server.preferences.records import write_whole

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One command at work in its run directory."""

    config: Config
    """what the run was told"""
    run_dir: Path
    """where everything is written"""
    tracker: Tracker
    """metrics, phases and the console"""
    monitor: Monitor = field(default_factory=Monitor)
    """its processes and waits, for who shows them"""
    command: str = "rayward"
    """command line, for the lineage"""
    root: Path | None = None
    """the run that this one is a round of, which keeps the lineage; None for a run of its own"""
    start: Start = "resume"
    """what to do with stages that the run directory holds: refuse, go on with them, or start them over"""

    def model(self, name: str) -> Path:
        """Folder of the model "sft", "reward" or "policy": the configured one, else the run's own.

        "init" is the configured one, else the SFT model. Raises ValueError naming the key when neither exists.
        """
        return model_folder(self.config, self.run_dir, name)

    def file(self, name: str) -> Path:
        """The configured data file, else the run's own. Raises ValueError naming the key when there is neither."""
        return data_file(self.config, self.run_dir, name)

    def found(self, name: str) -> Path | None:
        """The configured data file, else the run's own, else None."""
        own = self.run_dir / "data" / f"{name}.jsonl"
        return getattr(self.config.data, name) or (own if own.is_file() else None)

    def install(self, model: Path, name: str) -> None:
        """Make RUN/<name> a copy of another model's folder, written aside and renamed when it is whole."""
        target, aside = self.run_dir / name, self.run_dir / f".{name}.{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(model, aside)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)

    def reward_to_serve(self) -> Path | None:
        """The run's reward model, where scoring has a part that uses it."""
        return self.model("reward") if self.config.scoring.uses_own_model else None

    def made(self, kind: str, path: Path, *inputs: str | Path) -> None:
        """Record in the lineage, and in W&B, that `path` was made of `inputs`."""
        root = self.root or self.run_dir
        self.tracker.artefact(record(root, kind, path, inputs, self.command, self.config), root)

    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        contents: Mapping[str, str | Path],
        result: str,
        traces: Sequence[Path] = (),
    ) -> Stage:
        """A stage that makes RUN/<result> of settings and of the contents of files and models, by dotted key."""
        limits = {"data": {"max_bad_rows": self.config.data.max_bad_rows}}
        made = made_of({**settings, **limits}, contents)
        return Stage(self.run_dir, name, made, self.start, self.run_dir / result, traces)

    def skips(self, stage: Stage) -> bool:
        """Whether a stage is complete, which is said then."""
        if stage.complete:
            self.tracker.console.line(f"{stage.name}: complete, and left as it is")
        return stage.complete

    def enter(self, stage: Stage) -> bool:
        """Begin a stage, and forget what was logged of it if it starts over; False when it is complete."""
        if self.skips(stage):
            return False
        if stage.standing == "new":
            self.tracker.forget(stage.name)
        stage.begin()
        return True

    def data(self, *names: str) -> dict[str, Path]:
        """Those of some data files that are there, by dotted key."""
        own = self.run_dir / "data"
        paths = {f"data.{name}": getattr(self.config.data, name) or own / f"{name}.jsonl" for name in names}
        return {key: path for key, path in paths.items() if path.is_file()}

    def summarise(self, *keys: str, **figures: Any) -> None:
        """Merge final figures into RUN/summary.json, under a path of keys."""
        path = self.run_dir / "summary.json"
        summary = json.loads(path.read_text()) if path.is_file() else {}
        table = summary
        for key in keys:
            table = table.setdefault(key, {})
        table.update(figures)
        write_whole(path, json.dumps(summary, indent=2) + "\n")


def sft_data(job: Job, base: str | Path, config: SFTConfig) -> SFTData:
    """Read and encode the files of step 1, before anything heavy starts."""
    bad = job.config.data.max_bad_rows
    encoding = ChatEncoding.load(base, job.config.models.chat_template)
    rows, valid = read_demonstrations(job.file("demonstrations"), bad), job.found("demonstrations_valid")
    if valid is None:
        rows, held_out = split_held_out(rows, instruction, config.valid_share, config.seed)
    else:
        held_out = read_demonstrations(valid, bad)
        if both := len({instruction(row) for row in held_out} & {instruction(row) for row in rows}):
            log.warning(
                "%d instructions of %s are also in data.demonstrations: its loss will look too good", both, valid
            )
    text = bool(config.pretraining_share)
    measured = text and job.found("pretraining_valid") is not None
    tokens = sequence_tokens(job, config)
    return SFTData(
        demonstrations=demonstration_examples(rows, encoding, config.max_tokens, config.mask_prompt),
        valid=demonstration_examples(held_out, encoding, config.max_tokens, config.mask_prompt),
        pretraining=packed_text(job, "pretraining", encoding, tokens) if text else (),
        pretraining_valid=packed_text(job, "pretraining_valid", encoding, tokens) if measured else (),
    )


def instruction(row: Demonstration) -> str:
    """What a demonstration must not be parted from in a split: its group, else the text of its prompt."""
    return row.group or json.dumps([(message.role, message.content) for message in row.prompt])


def packed_text(job: Job, name: str, encoding: ChatEncoding, tokens: int) -> list[ChatExample]:
    """A file of texts as packed sequences in which every token but the first is a target."""
    return text_examples(pack(read_texts(job.file(name), job.config.data.max_bad_rows), encoding, tokens))


def sequence_tokens(job: Job, config: SFTConfig) -> int:
    """Length of packed pretraining sequences: what PPO uses, within what SFT allows."""
    return min(job.config.ppo.pretraining.sequence_tokens, config.max_tokens)


async def run_sft(
    job: Job,
    learner: LearnerGroup,
    base: Path,
    data: SFTData,
    config: SFTConfig,
    stage: str = "sft",
    out: str = "sft",
) -> None:
    """Step 1: fine-tune `base` on demonstrations and write the epoch that `config.select` names to RUN/<out>."""
    entered = tuning_stage(job, base, config, stage, out)
    if not job.enter(entered):
        return
    target, kept = job.run_dir / out, job.run_dir / f"{out}-epochs"
    shutil.rmtree(kept, ignore_errors=True)  # of an earlier run in this directory, perhaps of more epochs
    template, dropout = job.config.models.chat_template, config.residual_dropout
    trained = await learner.load(
        "policy", "policy", base, config.network, config.optimizer, chat_template=template, residual_dropout=dropout
    )

    async def keep(epoch: int) -> None:
        if config.select != "last":
            await learner.save("policy", kept / str(epoch))

    with job.tracker.phase(f"{stage}: {len(data.demonstrations)} examples, {trained / 1e6:.1f} M parameters", stage):
        losses = await sft(learner, data, config, job.tracker.log, keep, stage)
    epoch = best_epoch(losses) if config.select == "loss" else config.epochs
    if config.select == "last":
        await learner.save("policy", target)
    else:
        job.install(kept / str(epoch), out)
    await learner.unload()
    learnt = ["pretraining" if stage == "pretraining" else "demonstrations", *["pretraining"] * bool(data.pretraining)]
    job.made(out, target, base, *map(job.file, learnt))
    before, after = losses[0], losses[epoch]
    text = {} if after.pretraining is None else {"pretraining_valid_after": after.pretraining}
    job.summarise(stage, valid_before=before.demonstrations, valid_after=after.demonstrations, epoch=epoch, **text)
    entered.finish()


async def run_sample(job: Job, generators: Sequence[Generator], model: Path) -> None:
    """Sample K completions a prompt from the SFT policy, to be ranked; writes RUN/data/completions.jsonl."""
    stage = sample_stage(job, model)
    if not job.enter(stage):
        return
    config = job.config.sample
    prompts, groups = await sampled(job, generators, model, config.completions_per_prompt, config.seed)
    write_completions(job, prompts, groups, model)
    stage.finish()


async def sampled(
    job: Job, generators: Sequence[Generator], model: Path, count: int, seed: int
) -> tuple[list[Prompt], list[list[Completion]]]:
    """The preference prompts, and `count` completions of each by the generators, which have the weights of `model`."""
    encoding = ChatEncoding.load(model)
    prompts = read_prompts(job.file("preference_prompts"), job.config.data.max_bad_rows)
    check_prompts(prompts, encoding, job.config.rollout.max_prompt_tokens)
    title = f"sample {count} completions of {len(prompts)} prompts"
    with job.tracker.phase(title, "sample"), job.tracker.console.progress("sample", len(prompts)) as advance:
        groups = await sample(generators, prompts, encoding, job.config.rollout, count, seed, advance)
    return prompts, groups


def write_completions(
    job: Job, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]], *models: Path
) -> None:
    """Write RUN/data/completions.jsonl, to be ranked."""
    path = job.run_dir / "data" / "completions.jsonl"
    found = [
        Comparison(
            id=prompt.id,
            prompt=prompt.messages,
            responses=tuple(c.text.replace("\0", "\N{REPLACEMENT CHARACTER}") for c in group),  # no file takes a NUL
            ended=tuple(c.ended for c in group),
            ranks=None,
            labeler=None,
        )
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    write_comparisons(path, found)
    job.made("completions", path, *models, job.file("preference_prompts"))


def run_rank(job: Job) -> None:
    """Have the configured labeler rank the completions; writes RUN/data/comparisons.jsonl."""
    settings = {"labeler": job.config.labeler.model_dump(mode="json")}
    stage = job.stage("rank", settings, job.data("completions"), "data/comparisons.jsonl")
    if not job.enter(stage):
        return
    labeler = load_labeler(job.config.labeler)
    completions = read_comparisons(job.file("completions"), job.config.data.max_bad_rows)
    path = job.run_dir / "data" / "comparisons.jsonl"
    with job.tracker.phase(f"rank {len(completions)} prompts' completions by the {labeler.caption}", "rank"):
        write_comparisons(path, label(completions, labeler))
    job.summarise(labeler=labeler.caption)
    job.made("comparisons", path, job.file("completions"))
    stage.finish()


async def run_reward(job: Job, learner: LearnerGroup, base: Path) -> None:
    """Step 2: train a reward model on the ranked completions and write it to RUN/reward."""
    stage = reward_stage(job, base)
    if not job.enter(stage):
        return
    config, encoding, bad = job.config.reward, ChatEncoding.load(base), job.config.data.max_bad_rows
    groups = ranked_groups(read_comparisons(job.file("comparisons"), bad), encoding)
    demonstrations = [
        (*encoding.prompt(row.prompt), *encoding.response(row.response, ended=True))
        for row in read_demonstrations(job.file("demonstrations"), bad)
    ]
    train, _ = split_groups(groups, config)
    trained = await learner.load("reward", "new_value", base, config.network, config.optimizer)
    completions = sum(len(group.sequences) for group in train)
    with job.tracker.phase(f"reward: {completions} completions, {trained / 1e6:.1f} M parameters", "reward"):
        found = await reward_modeling(learner, groups, demonstrations, config, job.tracker.log)
    await learner.save("reward", job.run_dir / "reward")
    await learner.unload()
    _write_calibration(job.run_dir / "reward" / "calibration.json", found)
    job.summarise(
        "reward",
        accuracy=found.accuracy,
        accuracy_ci=found.accuracy_ci,
        prompt_accuracy=found.prompt_accuracy,
        prompt_accuracy_ci=found.prompt_accuracy_ci,
        score_std=found.score_std,
        longer_wins=found.longer_wins,
        pairs=found.pairs,
        log_loss=found.log_loss,
    )
    job.made("reward", job.run_dir / "reward", base, job.file("comparisons"), job.file("demonstrations"))
    stage.finish()


def _write_calibration(path: Path, found: RewardAccuracy) -> None:
    write_whole(path, json.dumps({**asdict(found), "calibration_error": found.calibration_error}, indent=2) + "\n")


def heldout_prompts(job: Job, encoding: ChatEncoding) -> list[Prompt]:
    """The first prompts of the held-out file, as many as are evaluated."""
    prompts = read_prompts(job.file("prompts_heldout"), job.config.data.max_bad_rows)
    prompts = prompts[: job.config.evaluation.prompts]
    check_prompts(prompts, encoding, job.config.rollout.max_prompt_tokens)
    return prompts
