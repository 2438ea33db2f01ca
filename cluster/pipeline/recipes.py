"""What the stages are made of: the settings and the contents that their results depend on."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config.schema import Config
from cluster.rundir.stages import Stage
from learner.config import SFTConfig

if TYPE_CHECKING:
    from cluster.pipeline.job import Job


def tuning_stage(job: "Job", base: str | Path, config: SFTConfig, stage: str = "sft", out: str = "sft") -> Stage:
    """What fine-tuning `base` is made of."""
    files = job.data("demonstrations", "demonstrations_valid", "pretraining", "pretraining_valid")
    settings = {stage: config.model_dump(mode="json"), "models": {"chat_template": job.config.models.chat_template}}
    tokens = {"ppo": {"pretraining": {"sequence_tokens": job.config.ppo.pretraining.sequence_tokens}}}
    return job.stage(stage, settings | tokens, {"models.base": base, **files}, out)


def sample_stage(job: "Job", model: Path) -> Stage:
    """What completions are made of."""
    settings = {"sample": job.config.sample.model_dump(mode="json"), "rollout": sampling_settings(job.config)}
    contents = {"models.sft": model, **job.data("preference_prompts")}
    return job.stage("sample", settings, contents, "data/completions.jsonl")


def sampling_settings(config: Config) -> dict[str, Any]:
    """The settings of rollout that say what is sampled, rather than how it is carried out."""
    names = {"samples_per_prompt", "max_prompt_tokens", "max_new_tokens", "temperature", "missing_eos"}
    return config.rollout.model_dump(mode="json", include=names)


def reward_stage(job: "Job", base: Path) -> Stage:
    """What a reward model is made of."""
    contents = {"models.sft": base, **job.data("comparisons", "demonstrations")}
    return job.stage("reward", {"reward": job.config.reward.model_dump(mode="json")}, contents, "reward")
