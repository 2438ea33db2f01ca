"""Step 3 of InstructGPT: PPO against the reward model, with a KL penalty and pretraining gradients (PPO-ptx)."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field

from actors.chat import ChatExample
from actors.trajectory import Trajectory
from learner.advantages import gae, penalised_rewards, whiten
from learner.batch import Batch, collate, minibatches
from learner.buffer import Buffer
from learner.engine import OptimizerConfig
from learner.kl import adapted_coefficient, kl_per_response
from learner.losses import importance_weights
from learner.networks import NetworkConfig
from learner.observables import Laps, iteration_metrics
from learner.schedules import warmup
from learner.sft import Log
from learner.worker import Evaluation, PPOStep, Targets


class KLConfig(BaseModel):
    """The penalty for leaving the SFT model."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    coef: float = Field(default=0.02, ge=0)
    """beta: nats of KL to the SFT model cost this much score (paper: 0.02)."""
    target: float | None = Field(default=None, gt=0)
    """Adapt beta so that the KL approaches this many nats a response (Ziegler et al. 2019); unset keeps it fixed."""
    horizon: int = Field(default=10_000, ge=1)
    """Episodes over which the adaptive beta moves; larger is slower."""


class PretrainingConfig(BaseModel):
    """The pretraining mix of PPO-ptx, which keeps what the model knew (the "alignment tax")."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    coef: float = Field(default=27.8, ge=0)
    """gamma: weight of the language-model loss beside the PPO loss (paper: 27.8); 0 is plain PPO."""
    sequences_per_episode: float = Field(default=8.0, gt=0)
    """Pretraining sequences for each episode of a minibatch (paper: 8)."""
    sequence_tokens: int = Field(default=2048, ge=2)
    """Tokens of a packed pretraining sequence (paper: 2048)."""


class PPOConfig(BaseModel):
    """PPO; the defaults are the paper's where it gives them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    iterations: int = Field(default=500, ge=1)
    """Batches of episodes (paper: 256,000 episodes)."""
    prompts_per_batch: int = Field(default=512, ge=1)
    """Prompts a batch; with rollout.samples_per_prompt = 1 these are the episodes (paper: 512)."""
    minibatch_size: int = Field(default=64, ge=1)
    """Episodes of one optimizer step; divides the batch (paper: 64)."""
    epochs: int = Field(default=1, ge=1)
    """Passes over each batch (paper: 1)."""
    max_staleness: int = Field(default=0, ge=0)
    """How many versions older than the learner the weights that sampled a token may be; 0 is synchronous."""
    importance_cap: float = Field(default=2.0, gt=0)
    """Upper bound of the importance weights that correct for stale tokens; only used when max_staleness > 0."""
    clip: float = Field(default=0.2, gt=0)
    """Of the probability ratio (paper: 0.2)."""
    value_clip: float = Field(default=0.2, gt=0)
    """Of the value's change (lm-human-preferences: 0.2)."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """Of later rewards (paper: none)."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Of generalised advantage estimation (Stiennon et al. 2020: 0.95)."""
    whiten_rewards: bool = False
    """Scale rewards to standard deviation 1 before the advantages (lm-human-preferences does)."""
    warmup_iterations: int = Field(default=10, ge=0)
    """The policy's learning rate rises from a tenth over these (paper: 10)."""
    ema_decay: float = Field(default=0.992, ge=0, lt=1)
    """Of the policy's moving average, a step a minibatch (paper: 0.992)."""
    max_tokens_per_microbatch: int = Field(default=4096, ge=1)
    """Padded tokens in one forward pass at most."""
    rollout_deadline_s: float = Field(default=1800.0, gt=0)
    """How long to wait for a batch before the run stops with what is missing."""
    seed: int = 0
    """Order of prompts, samples and minibatches."""
    kl: KLConfig = KLConfig()
    """The penalty for leaving the SFT model."""
    pretraining: PretrainingConfig = PretrainingConfig()
    """The pretraining mix."""
    network: NetworkConfig = NetworkConfig()
    """What of the policy and the critic is trained."""
    policy_optimizer: OptimizerConfig = OptimizerConfig(lr=9.65e-6)
    """Adam for the policy (the paper swept 2.55e-6 to 2.55e-5)."""
    critic_optimizer: OptimizerConfig = OptimizerConfig(lr=9e-6)
    """Adam for the critic, without warm-up (paper: 9e-6)."""

    def step(self, iteration: int, temperature: float) -> PPOStep:
        """The constants of one iteration's update."""
        return PPOStep(
            clip=self.clip,
            value_clip=self.value_clip,
            pretraining_coef=self.pretraining.coef,
            temperature=temperature,
            max_tokens=self.max_tokens_per_microbatch,
            policy_lr=warmup(self.policy_optimizer.lr, iteration, self.warmup_iterations),
            critic_lr=self.critic_optimizer.lr,
        )


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
) -> None:
    """Train until `config.iterations` batches are done. The whole algorithm of the paper's section 3.5 is here.

    `publish(version)` gives the actors the weights, `pretraining(i, n)` the text of iteration i for n minibatches, and
    `observe` looks at the samples for the log only. Time is in seconds, KL in nats a response.
    """
    beta = config.kl.coef
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
        weights, drift = importance_weights(old.logprobs, batch.behaviour_logprobs, batch.mask, config.importance_cap)
        targets = Targets(
            evaluation=old,
            advantages=whiten(advantages, batch.mask),
            returns=returns,
            weights=weights if config.max_staleness else None,
        )
        text = pretraining(i, len(parts)) if config.pretraining.coef else [[] for _ in parts]
        sums = await learner.update(batch, targets, parts, text, config.step(i, temperature))
        lap("update")
        published = await publish(i + 1)
        lap("publish")
        buffer.advance()
        metrics = iteration_metrics(batch, i, targets, rewards, beta, sums)
        log("ppo", i + 1, metrics | drift | published | observe(trajectories) | buffer.counts() | lap.times())
        if config.kl.target:
            kl = kl_per_response(old.logprobs, old.ref_logprobs, batch.mask).mean().item()
            beta = adapted_coefficient(beta, kl, config.kl.target, config.kl.horizon, len(batch))
