"""Step 3 of InstructGPT: PPO against the reward model, with a KL penalty and pretraining gradients (PPO-ptx)."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from actors.chat import ChatExample
from actors.trajectory import Trajectory
from learner.config import PPOConfig
from learner.data.batch import Batch, collate, minibatches
from learner.data.buffer import Buffer
from learner.maths.advantages import gae, penalised_rewards, whiten
from learner.maths.kl import adapted_coefficient
from learner.maths.losses import importance_weights
from learner.maths.schedules import warmup
from learner.metrics import Laps, iteration_metrics
from learner.progress import Log, due
from learner.worker.ppo_steps import Evaluation, PPOStep, Targets
from learner.worker.skipped_steps import SkippedSteps


class Learner(Protocol):
    """What the loop asks of a `learner.worker.group.LearnerGroup`."""

    async def evaluate(
        self, batch: Batch, minibatches: Sequence[list[int]], max_tokens: int, temperature: float
    ) -> Evaluation: ...
    async def update(
        self,
        batch: Batch,
        targets: Targets,
        minibatches: Sequence[list[int]],
        pretraining: Sequence[Sequence[ChatExample]],
        step: PPOStep,
    ) -> list[dict[str, float]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Whom a PPO run works with, and where it starts."""

    buffer: Buffer
    """gives the batches; the run starts from its version"""
    learner: Learner
    """policy, reference and critic"""
    publish: Callable[[int], Awaitable[dict[str, float]]]
    """gives the actors the weights as this version"""
    pretraining: Callable[[int, int], Sequence[Sequence[ChatExample]]]
    """(iteration, n): its text for n minibatches; asked for only where that has a coefficient"""
    observe: Callable[[Sequence[Trajectory]], dict[str, float]]
    """looks at the samples, for the log only"""
    measure: Callable[[int], Awaitable[dict[str, float]]]
    """tries this version on held-out prompts when that is due, before any more is sampled for it"""
    save: Callable[[int, float], Awaitable[None]]
    """(version, beta): keeps a checkpoint, called whenever one is due"""
    beta: float
    """the KL coefficient to start with"""
    temperature: float
    """that of the sampling"""


async def ppo(parts: Parts, config: PPOConfig, log: Log) -> None:
    """Train until `config.iterations` batches are done. The whole algorithm of the paper's section 3.5 is here.

    Time is in seconds, KL in nats a response.
    """
    buffer, learner, beta = parts.buffer, parts.learner, parts.beta
    skipped_steps = SkippedSteps("ppo", config.max_skipped_steps)
    while (i := buffer.version) < config.iterations:
        lap = Laps()
        trajectories = await buffer.take(config.rollout_deadline_s)
        lap("rollout")
        batch = collate(trajectories, pad_id=0)
        epochs = _epochs(config, i, len(batch))
        old = await learner.evaluate(batch, epochs[0], config.max_tokens_per_microbatch, parts.temperature)
        lap("evaluate")
        rewards = penalised_rewards(old.logprobs, old.ref_logprobs, batch.mask, batch.score, beta)
        if config.whiten_rewards:
            rewards = whiten(rewards, batch.mask, shift_mean=False)
        advantages, returns = gae(rewards, old.values, batch.mask, config.discount, config.gae_lambda)
        advantages = whiten(advantages, batch.mask)
        bounds = config.importance.bounds
        weights, drift = importance_weights(old.logprobs, batch.behaviour_logprobs, batch.mask, *bounds)
        stale = weights if config.max_staleness else None
        targets = Targets(evaluation=old, advantages=advantages, returns=returns, weights=stale)
        minibatches = list(chain(*epochs))
        text = parts.pretraining(i, len(minibatches)) if config.pretraining.coef else [[] for _ in minibatches]
        sums = await learner.update(batch, targets, minibatches, text, _step(config, i, parts.temperature))
        skipped = skipped_steps.count(i + 1, sums)  # ends the run before bad weights could be published
        lap("update")
        published = await parts.publish(i + 1)
        lap("publish")
        heldout = await parts.measure(i + 1)
        buffer.advance()
        metrics = iteration_metrics(batch, i, targets, beta, sums) | drift | skipped | published | heldout
        log("ppo", i + 1, metrics | parts.observe(trajectories) | buffer.counts() | lap.times())
        if config.kl.target:
            beta = adapted_coefficient(beta, metrics["kl/mean"], config.kl.target, config.kl.horizon, len(batch))
        if due(config.checkpoint_every, buffer.version, config.iterations):
            await parts.save(buffer.version, beta)


def _epochs(config: PPOConfig, iteration: int, size: int) -> list[list[list[int]]]:
    """The minibatches of each pass over a batch, as rows of it: every pass shuffles anew."""
    first = config.seed + iteration * config.epochs
    return [minibatches(size, config.minibatch_size, seed=first + epoch) for epoch in range(config.epochs)]


def _step(config: PPOConfig, iteration: int, temperature: float) -> PPOStep:
    """The constants of one iteration's update."""
    return PPOStep(
        clip=config.clip,
        value_clip=config.value_clip,
        pretraining_coef=config.pretraining.coef,
        temperature=temperature,
        max_tokens=config.max_tokens_per_microbatch,
        pretraining_max_tokens=config.pretraining.max_tokens_per_microbatch or config.max_tokens_per_microbatch,
        pretraining_normaliser=config.pretraining.normaliser,
        policy_lr=warmup(config.policy_optimizer.lr, iteration, config.warmup_iterations),
        critic_lr=config.critic_optimizer.lr,
    )
