"""The batch arithmetic of a run, as the loops do it: what is cut into what, and how many optimizer steps that makes.

Pure functions of numbers. Tokens are counted with the lengths given; a run's own differ from prompt to prompt.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens that time and batches are counted with. Memory is for the longest that the settings allow."""

    prompt: int
    """of a prompt, on average"""
    response: int
    """of a response, on average"""
    longest: int
    """of the longest response, for which the others of its wave are waited for"""
    source: str = "given"
    """where they are from, in words"""

    @property
    def sequence(self) -> int:
        """Of both together."""
        return self.prompt + self.response


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOPlan:
    """PPO-ptx from prompts to optimizer steps."""

    iterations: int
    """batches"""
    prompts: int
    """in a batch, and tickets that are issued for it"""
    samples: int
    """of each prompt"""
    episodes: int
    """trajectories in a batch: prompts * samples"""
    minibatch: int
    """episodes of one optimizer step"""
    minibatches: int
    """in one pass over a batch"""
    epochs: int
    """passes over each batch"""
    microbatches: int
    """of a rank in one minibatch, all sequences as long as planned"""
    waves: int
    """that one generator samples for a batch"""
    pretraining_sequences: int
    """in one minibatch"""
    pretraining_microbatches: int
    """of a rank in one minibatch"""
    episode_tokens: int
    """prompt and response tokens of a batch"""
    response_tokens: int
    """that are sampled for a batch"""
    pretraining_tokens: int
    """of all minibatches of a batch"""

    @property
    def steps(self) -> int:
        """Optimizer steps of the policy, and as many of the critic, in an iteration."""
        return self.minibatches * self.epochs

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the policy in the whole run."""
        return self.iterations * self.steps

    @property
    def total_episodes(self) -> int:
        """Episodes of the whole run (the paper counts these: 256,000)."""
        return self.iterations * self.episodes

    @property
    def total_tokens(self) -> int:
        """Tokens that the policy is trained on in the whole run, every epoch counted, pretraining included."""
        return self.iterations * (self.episode_tokens * self.epochs + self.pretraining_tokens)


def plan_ppo(
    *,
    iterations: int,
    prompts: int,
    samples: int,
    minibatch: int,
    epochs: int,
    generators: int,
    prompts_per_wave: int,
    ranks: int,
    max_tokens: int,
    pretraining_per_episode: float,
    pretraining_tokens: int,
    lengths: Lengths,
) -> PPOPlan:
    """The arithmetic of `learner.ppo`; `pretraining_per_episode` 0 is plain PPO.

    Raises ValueError where `minibatch` does not divide the episodes: see nearest_divisors.
    """
    episodes = prompts * samples
    if problem := indivisible_batch(prompts, samples, minibatch):
        raise ValueError(problem)
    sequences = max(1, round(pretraining_per_episode * minibatch)) if pretraining_per_episode else 0
    minibatches = episodes // minibatch
    return PPOPlan(
        iterations=iterations,
        prompts=prompts,
        samples=samples,
        episodes=episodes,
        minibatch=minibatch,
        minibatches=minibatches,
        epochs=epochs,
        microbatches=rank_microbatches([lengths.sequence] * minibatch, max_tokens, ranks),
        waves=math.ceil(prompts / (prompts_per_wave * generators)),
        pretraining_sequences=sequences,
        pretraining_microbatches=rank_microbatches([pretraining_tokens] * sequences, max_tokens, ranks),
        episode_tokens=episodes * lengths.sequence,
        response_tokens=episodes * lengths.response,
        pretraining_tokens=sequences * pretraining_tokens * minibatches * epochs,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    """Prompts that are answered, and not trained on."""

    prompts: int
    """different ones"""
    samples: int
    """responses to each"""
    waves: int
    """that one generator samples, one after the other"""
    response_tokens: int
    """that are sampled"""
    sequence_tokens: int
    """of prompts and responses, a prompt counted with each of its responses"""
    times: int = 1
    """how often, each time by another model"""

    @property
    def episodes(self) -> int:
        """Responses."""
        return self.prompts * self.samples

    @property
    def total_tokens(self) -> int:
        """Sampled by all models."""
        return self.times * self.response_tokens


def plan_sampling(
    *, prompts: int, samples: int, generators: int, prompts_per_wave: int, lengths: Lengths, times: int = 1
) -> SamplingPlan:
    """The arithmetic of `actors.sampling`."""
    return SamplingPlan(
        prompts=prompts,
        samples=samples,
        waves=math.ceil(prompts / (prompts_per_wave * generators)),
        response_tokens=prompts * samples * lengths.response,
        sequence_tokens=prompts * samples * lengths.sequence,
        times=times,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsPlan:
    """Supervised training or reward modelling, from rows to optimizer steps."""

    rows: int
    """demonstrations, or prompts with ranked completions, that are trained on"""
    epochs: int
    """passes over them"""
    batch: int
    """examples of one optimizer step, at most; of reward modelling, prompts with all their completions"""
    pretraining: float
    """share of them that is pretraining text"""
    steps: int
    """optimizer steps of the whole run; the last of an epoch may be smaller"""
    microbatches: int
    """of a rank in one step"""
    step_tokens: int
    """tokens of a whole step"""

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.step_tokens


def plan_sft(
    *, rows: int, epochs: int, batch: int, pretraining_share: float, tokens: int, max_tokens: int, ranks: int
) -> StepsPlan:
    """The arithmetic of `learner.sft.sft_batches`; `tokens` of every example, pretraining text included."""
    return StepsPlan(
        rows=rows,
        epochs=epochs,
        batch=batch,
        pretraining=pretraining_share,
        steps=sft_steps(rows, epochs, batch, pretraining_share),
        microbatches=rank_microbatches([tokens] * batch, max_tokens, ranks),
        step_tokens=batch * tokens,
    )


def sft_steps(rows: int, epochs: int, batch: int, share: float) -> int:
    """Batches of all epochs, text counted in; what a batch has too little or too much of it is carried over."""
    owed, steps = 0.0, 0
    for _ in range(epochs):
        left = rows
        while left:
            wanted = min(owed + share * batch, (owed + share * left) / (1.0 - share))
            text = min(int(wanted + 0.5), batch - 1)
            own = min(left, batch - text)
            left, steps, owed = left - own, steps + 1, owed + share * (own + text) - text
    return steps


def plan_reward(
    *,
    rows: int,
    valid_share: float,
    epochs: int,
    batch: int,
    completions: int,
    tokens: int,
    max_tokens: int,
    ranks: int,
) -> StepsPlan:
    """The arithmetic of `learner.reward_modeling`: all `completions` of a prompt stay in one micro-batch."""
    train = rows - max(1, round(valid_share * rows))
    if train < 1:
        raise ValueError(f"{rows} ranked prompts are too few to hold some out: give at least 2")
    return StepsPlan(
        rows=train,
        epochs=epochs,
        batch=batch,
        pretraining=0.0,
        steps=epochs * math.ceil(train / batch),
        microbatches=rank_microbatches([completions * tokens] * batch, max_tokens, ranks),
        step_tokens=batch * completions * tokens,
    )


def rank_microbatches(lengths: list[int], max_tokens: int, ranks: int) -> int:
    """Micro-batches of each rank for sequences of these lengths; 0 for none."""
    from learner.data.batch import microbatches  # imports torch, which the checks of every command need not

    return len(microbatches(lengths, max_tokens, ranks)[0]) if lengths else 0


def nearest_divisors(size: int, wanted: int) -> list[int]:
    """The divisors of `size` next to `wanted`, below and above."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    below = [n for n in divisors if n < wanted][-1:]
    above = [n for n in divisors if n > wanted][:1]
    return below + above


def nearest_multiples(factor: int, wanted: int) -> list[int]:
    """The multiples of `factor` next to `wanted`, below (if positive) and above."""
    below = wanted // factor * factor
    return [n for n in (below, below + factor) if n > 0 and n != wanted]


def either(numbers: Iterable[int]) -> str:
    """`3 or 4`, as it could be typed."""
    return " or ".join(map(str, numbers))


def indivisible(key: str, value: int, size: int, what: str) -> str:
    """What is wrong where `value` does not divide `size`, and the nearest that does."""
    return (
        f"{key} = {value} does not divide the {size:,} {what}. Nearest: {key} = {either(nearest_divisors(size, value))}"
    )


def indivisible_batch(prompts: int, samples: int, minibatch: int) -> str | None:
    """What is wrong where a minibatch does not divide a batch of `prompts` times `samples`; None where it does."""
    batch = prompts * samples
    if batch % minibatch == 0:
        return None
    step = minibatch // math.gcd(minibatch, samples)  # prompts must be a multiple of it
    return (
        f"ppo.minibatch_size = {minibatch} does not divide the batch of ppo.prompts_per_batch = {prompts} times "
        f"rollout.samples_per_prompt = {samples}, which is {batch} responses. Nearest that work: ppo.minibatch_size = "
        f"{either(nearest_divisors(batch, minibatch))}, or ppo.prompts_per_batch = "
        f"{either(nearest_multiples(step, prompts))}"
    )
