"""The batch arithmetic of a stage, as the loops do it, with lengths that are the same for all sequences."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.config.schema import Config
from cluster.pipeline.stage import Stage
from learner.config import PPOConfig, RewardModelingConfig, SFTConfig
from reward_server.preferences.formats import file_rows


def section_of(config: Config, stage: type[Stage]) -> SFTConfig | RewardModelingConfig | PPOConfig | None:
    """The section by which a stage's learner works: of what it trains, else PPO's; None without a learner."""
    trained = next(iter(stage.trained(config)), "ppo" if "learner" in stage.processes else None)
    return getattr(config, trained.partition(".")[0]) if trained else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens that time and batches are counted with. Memory is for the longest that the settings allow."""

    prompt: int
    """of a prompt, on average"""
    response: int
    """of a response, on average"""
    longest: int
    """of the longest response, for which the others of its wave are waited for"""

    @property
    def sequence(self) -> int:
        """Of both together."""
        return self.prompt + self.response


def lengths_of(config: Config) -> Lengths:
    """Those that the section `plan` states, else the longest that sampling allows."""
    plan, rollout = config.plan, config.rollout
    prompt, response = plan.prompt_tokens or rollout.max_prompt_tokens, plan.response_tokens or rollout.max_new_tokens
    return Lengths(prompt=prompt, response=response, longest=rollout.max_new_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """From rows to optimizer steps: of one PPO iteration, one model of `select`, or a whole stage. 0: there is none."""

    rows: int
    """prompts, demonstrations, or prompts with ranked completions"""
    samples: int
    """responses to each"""
    times: int
    """how often all this is done: iterations of PPO, models that are chosen among"""
    waves: int
    """that one generator samples, one after the other"""
    epochs: int
    """passes over the rows"""
    minibatch: int
    """episodes, examples, or prompts with all their completions, of one optimizer step at most"""
    steps: int
    """optimizer steps; of PPO, of policy and critic each"""
    microbatches: int
    """of a rank in one step, all sequences as long as planned"""
    pretraining_sequences: int
    """beside a PPO minibatch"""
    pretraining_microbatches: int
    """of a rank, for these"""
    step_tokens: int
    """that one optimizer step trains on, pretraining text included"""

    @property
    def numbers(self) -> dict[str, int]:
        """All of them by name, with the totals of the whole stage: the paper has 256,000 episodes."""
        steps, episodes = self.times * self.steps, self.rows * self.samples
        sampled = {"prompts": self.rows, "episodes": episodes, "total_episodes": self.times * episodes}
        trained = {"total_steps": steps, "total_tokens": steps * self.step_tokens}
        return asdict(self) | (sampled if self.waves else {}) | (trained if steps else {})


def count(config: Config, stage: type[Stage], lengths: Lengths, run_dir: Path, rounds: bool = False) -> Counts | None:
    """What a stage cuts into what; None where nobody knows how many rows it has.

    `rounds`: as the last round of `rayward rounds` does it. Raises ValueError for what is indivisible.
    """
    from actors.chat import ChatExample
    from learner.data.batch import microbatches
    from learner.sft import sft_batches

    def pieces(lengths: Sequence[int], budget: int) -> int:
        return len(microbatches(lengths, budget, config.cluster.learner_ranks)[0]) if lengths else 0

    section, text = section_of(config, stage) if stage.trained(config) else None, config.ppo.pretraining
    rows, samples, times = _rows(config, stage, run_dir, rounds)
    if not rows:
        return None
    length, size, steps, sequences = lengths.sequence, 0, 0, 0
    if isinstance(section, PPOConfig):
        if problem := indivisible_batch(config):
            raise ValueError(problem)
        size = section.minibatch_size
        steps = rows * samples // size * section.epochs
        sequences = max(1, round(text.sequences_per_episode * size)) if text.coef else 0
    elif isinstance(section, RewardModelingConfig):  # all completions of a prompt stay in one micro-batch
        if (rows := rows - max(1, round(section.valid_share * rows))) < 1:
            raise ValueError("one ranked prompt is too few to hold some out: give at least 2")
        size, length = section.prompts_per_batch, samples * length
        steps = section.epochs * math.ceil(rows / size)
    elif section:
        size, length = section.batch_size, min(length, section.max_tokens)
        one = ChatExample(ids=(0, 0), loss_mask=(False, True))
        steps = sum(map(len, sft_batches([one] * rows, [one], section)))
    budget = section.max_tokens_per_microbatch if section else 0
    per_wave = config.rollout.prompts_per_wave * config.cluster.generators
    return Counts(
        rows=rows,
        samples=samples,
        times=times,
        waves=math.ceil(rows / per_wave) if "generator" in stage.processes else 0,
        epochs=section.epochs if section else 0,
        minibatch=size,
        steps=steps,
        microbatches=pieces([length] * size, budget),
        pretraining_sequences=sequences,
        pretraining_microbatches=pieces([text.sequence_tokens] * sequences, text.max_tokens_per_microbatch or budget),
        step_tokens=size * length + sequences * text.sequence_tokens,
    )


def _rows(config: Config, stage: type[Stage], run_dir: Path, rounds: bool) -> tuple[int | None, int, int]:
    """(rows, responses to each, how often), by the files that a stage reads."""
    read, plan = stage.data(config), config.plan

    def there(name: str) -> int | None:
        return rows_of(config, name, run_dir) if name in read else None

    if "ppo.policy_optimizer" in stage.trained(config):
        return config.ppo.prompts_per_batch, config.rollout.samples_per_prompt, config.ppo.iterations
    if "best_of_n" in stage.sections:
        own = config.best_of_n
        return min(own.prompts, there(own.file) or own.prompts), own.n, 1
    if "comparisons" in read or "preference_prompts" in read:
        growing = "comparisons" in read and config.rounds.comparisons == "all"
        rows = there("comparisons") or rows_of(config, "preference_prompts", run_dir) or plan.ranked_prompts
        last = config.rounds.prompts * (config.rounds.count if growing else 1)
        return last if rounds else rows, config.sample.completions_per_prompt, 1
    if "demonstrations" in read:
        return there("demonstrations") or plan.demonstrations, 1, 1
    if "prompts_valid" in read:
        return there("prompts_valid"), 1, (config.baseline if config.select.model == "baseline" else config.sft).epochs
    most = config.evaluation.prompts
    return min(most, there("prompts_heldout") or most) if "prompts_heldout" in read else None, 1, 1


def rows_of(config: Config, name: str, run_dir: Path) -> int | None:
    """Rows of a data file, configured or the run's own; None where there is none that can be read."""
    with contextlib.suppress(ValueError):
        return sum(1 for _ in file_rows(getattr(config.data, name) or run_dir / "data" / f"{name}.jsonl"))
    return None


def neighbours(possible: Sequence[int], wanted: int) -> str:
    """The numbers next to `wanted`, below and above: `3 or 4`, as it could be typed."""
    below, above = [n for n in possible if n < wanted][-1:], [n for n in possible if n > wanted][:1]
    return " or ".join(map(str, below + above))


def divisors(size: int) -> list[int]:
    """Every divisor, from 1 up."""
    return [n for n in range(1, size + 1) if size % n == 0]


def indivisible_batch(config: Config) -> str | None:
    """What is wrong where a minibatch does not divide a PPO batch, with the nearest that do; None where it does."""
    size, prompts, samples = config.ppo.minibatch_size, config.ppo.prompts_per_batch, config.rollout.samples_per_prompt
    batch, step = prompts * samples, size // math.gcd(size, samples)  # prompts must be a multiple of `step`
    if batch % size == 0:
        return None
    return (
        f"ppo.minibatch_size = {size} does not divide the batch of ppo.prompts_per_batch = {prompts} times "
        f"rollout.samples_per_prompt = {samples}, which is {batch} responses. Nearest that work: ppo.minibatch_size = "
        f"{neighbours(divisors(batch), size)}, or ppo.prompts_per_batch = "
        f"{neighbours(range(step, prompts + step + 1, step), prompts)}"
    )
