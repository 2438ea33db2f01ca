"""A command as far as its reading goes: what would stop it before anything starts. Nothing is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from actors.prompts import check_prompts, read_prompts
from cluster.config.schema import Config
from cluster.pipeline.evaluate import HeldOut
from cluster.pipeline.job import Job, sft_data
from cluster.pipeline.ppo import Alignment
from cluster.pipeline.recipes import reward_stage, sample_stage, tuning_stage
from cluster.pipeline.rounds import Rounds
from cluster.pipeline.selection import read_contest
from cluster.plan.check import check_config
from cluster.rundir.stages import Start, clear
from cluster.tracking.tracker import Tracker
from learner.config import SFTConfig
from learner.reward_modeling import ranked_groups, split_groups
from reward_server.encoding import ChatEncoding
from reward_server.preferences.labeling import load_labeler, read_comparisons


def rehearse(config: Config, command: str, run_dir: Path, start: Start) -> tuple[str, ...]:
    """What would stop a command, in words: its settings, files and models, or what the run directory holds already."""
    if problems := check_config(config, command, run_dir).problems:
        return problems
    job = Job(config=config, run_dir=run_dir, tracker=cast(Tracker, None), start=start)  # who only reads tracks nothing
    try:
        _READS.get(command, _nothing)(job)
    except (ValueError, OSError) as error:
        return tuple(str(error).splitlines())
    return ()


def _nothing(job: Job) -> None:
    """Of a command that reads nothing beside what was checked."""


def _begun(job: Job, stage: str) -> bool:
    """Whether the run directory knows a stage; of one that is new, the contents need not be hashed to say so."""
    return (job.run_dir / "stages" / f"{stage}.json").is_file()


def _tune(job: Job, config: SFTConfig, name: str) -> None:
    base = job.config.models.base
    assert base is not None, "the checks before this one ask for it"
    if _begun(job, name):
        _ = tuning_stage(job, base, config, name, name).standing
    sft_data(job, base, config)


def _sample(job: Job) -> None:
    model = job.model("sft")
    if _begun(job, "sample"):
        _ = sample_stage(job, model).standing
    prompts = read_prompts(job.file("preference_prompts"), job.config.data.max_bad_rows)
    check_prompts(prompts, ChatEncoding.load(model), job.config.rollout.max_prompt_tokens)


def _rank(job: Job) -> None:
    if _begun(job, "rank"):
        settings = {"labeler": job.config.labeler.model_dump(mode="json")}
        _ = job.stage("rank", settings, job.data("completions"), "data/comparisons.jsonl").standing
    load_labeler(job.config.labeler)
    read_comparisons(job.file("completions"), job.config.data.max_bad_rows)


def _reward(job: Job) -> None:
    base = job.model("sft")
    if _begun(job, "reward"):
        _ = reward_stage(job, base).standing
    comparisons = read_comparisons(job.file("comparisons"), job.config.data.max_bad_rows)
    split_groups(ranked_groups(comparisons, ChatEncoding.load(base)), job.config.reward)


def _align(job: Job) -> None:
    alignment = Alignment(job)
    if _begun(job, "ppo") or any((job.run_dir / trace).exists() for trace in ("ledger-ppo.jsonl", "checkpoints/ppo")):
        _ = alignment.stage(job.config.ppo, "ppo").standing


def _serve(job: Job) -> None:
    from cluster.pipeline.serve import check_token  # Ray Serve takes a second to import

    check_token(job.config.serve)
    job.reward_to_serve()


_READS: dict[str, Callable[[Job], Any]] = {
    "quickstart": lambda job: job.start == "new" and clear(job.run_dir, "new"),
    "sft": lambda job: _tune(job, job.config.sft, "sft"),
    "baseline": lambda job: _tune(job, job.config.baseline, "baseline"),
    "sample": _sample,
    "rank": _rank,
    "reward": _reward,
    "select": read_contest,
    "ppo": _align,
    "rounds": Rounds,
    "evaluate": HeldOut,
    "serve": _serve,
}
