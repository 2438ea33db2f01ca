"""Step 3 of InstructGPT: PPO against the reward model, with a KL penalty and pretraining gradients (PPO-ptx)."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from actors.chat import ChatExample
from actors.trajectory import Trajectory
from learner.config import PPOConfig
from learner.data.batch import Batch, collate, minibatches
from learner.data.buffer import Buffer
from learner.maths.advantages import gae, penalised_rewards, whiten
from learner.maths.kl import adapted_coefficient, kl_per_response
from learner.maths.losses import importance_weights
from learner.maths.schedules import warmup
from learner.metrics import Laps, iteration_metrics
from learner.sft import Log
from learner.worker.skipped_steps import Skips
from learner.worker.worker import Evaluation, PPOStep, Targets


class Learner(Protocol):
    """What the loop asks of the learner's ranks."""

    async def evaluate(
        self, batch: Batch, minibatches: Sequence[list[int]], max_tokens: int, temperature: float
    ) -> Evaluation:
        """Log-probs of policy and reference, values and entropies."""
        ...

    async def update(
        self,
        batch: Batch,
        targets: Targets,
        minibatches: Sequence[list[int]],
        pretraining: Sequence[Sequence[ChatExample]],
        step: PPOStep,
    ) -> list[dict[str, float]]:
        """A policy and a critic step for each minibatch; its sums."""
        ...


async def ppo(
    config: PPOConfig,
    temperature: float,
    buffer: Buffer,
    learner: Learner,
    publish: Callable[[int], Awaitable[dict[str, float]]],
    pretraining: Callable[[int, int], Sequence[Sequence[ChatExample]]],
    observe: Callable[[Sequence[Trajectory]], dict[str, float]],
    log: Log,
    save: Callable[[int, float], Awaitable[None]],
    beta: float,
    measure: Callable[[int], Awaitable[dict[str, float]]],
) -> None:
    """Train until `config.iterations` batches are done. The whole algorithm of the paper's section 3.5 is here.

    `publish(version)` gives the actors the weights, `pretraining(i, n)` the text of iteration i for n minibatches, and
    `observe` looks at the samples for the log only. Time is in seconds, KL in nats a response. It starts from the
    buffer's version and the KL coefficient `beta`, which `save(version, beta)` keeps whenever a checkpoint is due.
    `measure(version)` tries the new weights on held-out prompts when that is due, before any more is sampled for them.
    """
    skips = Skips("ppo", config.max_skipped_steps)
    while (i := buffer.version) < config.iterations:
        lap = Laps()
        trajectories = await buffer.take(config.rollout_deadline_s)
        lap("rollout")
        batch = collate(trajectories, pad_id=0)
        parts = [
            part
            for epoch in range(config.epochs)
            for part in minibatches(len(batch), config.minibatch_size, seed=config.seed + i * config.epochs + epoch)
        ]
        first_epoch = parts[: len(parts) // config.epochs]
        old = await learner.evaluate(batch, first_epoch, config.max_tokens_per_microbatch, temperature)
        lap("evaluate")
        rewards = penalised_rewards(old.logprobs, old.ref_logprobs, batch.mask, batch.score, beta)
        if config.whiten_rewards:
            rewards = whiten(rewards, batch.mask, shift_mean=False)
        advantages, returns = gae(rewards, old.values, batch.mask, config.discount, config.gae_lambda)
        floor = config.importance.floor if config.importance.method == "mask" else None
        weights, drift = importance_weights(
            old.logprobs, batch.behaviour_logprobs, batch.mask, config.importance.cap, floor
        )
        targets = Targets(
            evaluation=old,
            advantages=whiten(advantages, batch.mask),
            returns=returns,
            weights=weights if config.max_staleness else None,
        )
        text = pretraining(i, len(parts)) if config.pretraining.coef else [[] for _ in parts]
        sums = await learner.update(batch, targets, parts, text, _step(config, i, temperature))
        skipped = skips.count(i + 1, sums)  # ends the run before bad weights could be published
        lap("update")
        published = await publish(i + 1)
        lap("publish")
        heldout = await measure(i + 1)
        buffer.advance()
        metrics = iteration_metrics(batch, i, targets, beta, sums) | drift | skipped | published | heldout
        log("ppo", i + 1, metrics | observe(trajectories) | buffer.counts() | lap.times())
        if config.kl.target:
            kl = kl_per_response(old.logprobs, old.ref_logprobs, batch.mask).mean().item()
            beta = adapted_coefficient(beta, kl, config.kl.target, config.kl.horizon, len(batch))
        if _due(config, buffer.version):
            await save(buffer.version, beta)


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


def _due(config: PPOConfig, version: int) -> bool:
    """Whether a checkpoint follows an iteration: every so often, and before what comes after the last one."""
    every = config.checkpoint_every
    return every > 0 and (version % every == 0 or version == config.iterations)
