"""The batch arithmetic of each step of a configuration, with the rows of its files where they are there."""

import gzip
from pathlib import Path

from cluster.config.schema import Config
from cluster.plan.counts import (
    Lengths,
    PPOPlan,
    SamplingPlan,
    StepsPlan,
    plan_ppo,
    plan_reward,
    plan_sampling,
    plan_sft,
)

Batches = PPOPlan | SamplingPlan | StepsPlan


def batches_of(config: Config, step: str, lengths: Lengths, run_dir: Path, in_rounds: bool = False) -> Batches | None:
    """What a step cuts into what; None where nobody knows how many rows it has.

    `in_rounds`: as the last round of `rayward rounds` does it. Raises ValueError for what is indivisible.
    """
    if step == "ppo":
        return _ppo(config, lengths)
    if step in ("sft", "baseline"):
        return _tuning(config, step, lengths, run_dir)
    if step == "reward":
        return _reward(config, lengths, run_dir, in_rounds)
    return _sampling(config, step, lengths, run_dir, in_rounds)


def _ppo(config: Config, lengths: Lengths) -> PPOPlan:
    ppo, text = config.ppo, config.ppo.pretraining
    return plan_ppo(
        iterations=ppo.iterations,
        prompts=ppo.prompts_per_batch,
        samples=config.rollout.samples_per_prompt,
        minibatch=ppo.minibatch_size,
        epochs=ppo.epochs,
        generators=config.cluster.generators,
        prompts_per_wave=config.rollout.prompts_per_wave,
        ranks=config.cluster.learner_ranks,
        max_tokens=ppo.max_tokens_per_microbatch,
        pretraining_per_episode=text.sequences_per_episode if text.coef else 0.0,
        pretraining_tokens=text.sequence_tokens,
        lengths=lengths,
    )


def _tuning(config: Config, step: str, lengths: Lengths, run_dir: Path) -> StepsPlan | None:
    section = config.sft if step == "sft" else config.baseline
    rows = rows_of(config, "demonstrations", run_dir) or config.plan.demonstrations
    if rows is None:
        return None
    return plan_sft(
        rows=rows,
        epochs=section.epochs,
        batch=section.batch_size,
        pretraining_share=section.pretraining_share,
        tokens=min(lengths.sequence, section.max_tokens),
        max_tokens=section.max_tokens_per_microbatch,
        ranks=config.cluster.learner_ranks,
    )


def _reward(config: Config, lengths: Lengths, run_dir: Path, in_rounds: bool) -> StepsPlan | None:
    reward, rounds = config.reward, config.rounds
    rows = (
        rows_of(config, "comparisons", run_dir)
        or rows_of(config, "preference_prompts", run_dir)
        or config.plan.ranked_prompts
    )
    if in_rounds:
        rows = rounds.prompts * (rounds.count if rounds.comparisons == "all" else 1)
    if rows is None:
        return None
    return plan_reward(
        rows=rows,
        valid_share=reward.valid_share,
        epochs=reward.epochs,
        batch=reward.prompts_per_batch,
        completions=config.sample.completions_per_prompt,
        tokens=lengths.sequence,
        max_tokens=reward.max_tokens_per_microbatch,
        ranks=config.cluster.learner_ranks,
    )


def _sampling(config: Config, step: str, lengths: Lengths, run_dir: Path, in_rounds: bool) -> SamplingPlan | None:
    samples, times = 1, 1
    if step == "sample":
        rows = rows_of(config, "preference_prompts", run_dir) or config.plan.ranked_prompts
        rows = config.rounds.prompts if in_rounds else rows
        samples = config.sample.completions_per_prompt
    elif step == "select":
        rows = rows_of(config, "prompts_valid", run_dir)
        times = (config.baseline if config.select.model == "baseline" else config.sft).epochs
    else:
        most = config.evaluation.prompts
        rows = min(most, rows_of(config, "prompts_heldout", run_dir) or most)
    if rows is None:
        return None
    return plan_sampling(
        prompts=rows,
        samples=samples,
        generators=config.cluster.generators,
        prompts_per_wave=config.rollout.prompts_per_wave,
        lengths=lengths,
        times=times,
    )


def rows_of(config: Config, name: str, run_dir: Path) -> int | None:
    """Lines of a data file, configured or the run's own, that are not blank; None where there is no such file."""
    path = getattr(config.data, name) or run_dir / "data" / f"{name}.jsonl"
    if not path.is_file():
        return None
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        return sum(1 for line in lines if line.strip()) or None
