"""The learner's sections of the configuration. Nothing heavy is imported here: the help reads it."""

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from reward_server.config import Section


class NetworkConfig(Section):
    """Which weights of a network are trained, and in which precision it computes."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of weights and activations; the optimizer keeps float32 master weights either way."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of the LoRA adapters (peft) that are trained instead of the weights; 0 trains the weights themselves."""
    lora_alpha: int = Field(default=32, ge=1)
    """LoRA scale: the adapters' product is multiplied by lora_alpha / lora_rank."""
    last_layers: int = Field(default=0, ge=0)
    """Train only this many of the last transformer layers (0: every weight); the rest is frozen and cheap: PPO computes
    it once a batch for all networks that have it in common."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    logprob_chunk: int = Field(default=1024, ge=1)
    """How many tokens' logits exist at once when log-probs are taken."""
    compile: bool = False
    """Fuse the element-wise work of norms and MLPs with torch.compile; needs a C++ compiler, and a minute at first."""
    liger: bool = False
    """Compute norms and MLPs with Liger's kernels, on GPUs; needs the package liger-kernel."""

    @model_validator(mode="after")
    def _fused_once(self) -> Self:
        if self.compile and self.liger:
            raise ValueError("compile and liger both fuse norms and MLPs: set one of them to false")
        return self


class OptimizerConfig(Section):
    """Adam (Kingma & Ba 2015) as InstructGPT uses it, and how DeepSpeed shards it."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradient's running mean (paper: 0.9)."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the squared gradient's running mean (paper: 0.95)."""
    eps: float = Field(default=1e-5, gt=0)
    """Added to the denominator (lm-human-preferences: 1e-5; the paper is silent)."""
    adam_style: Literal["torch", "tf1"] = "torch"
    """torch adds eps to the corrected second moment; tf1, OpenAI's, before the correction: early steps are smaller."""
    clip_grad_norm: float = Field(default=0.0, ge=0)
    """Scale gradients down to this global norm; 0 leaves them alone (the paper is silent)."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: 1 shards optimizer states over ranks, 2 gradients too, 3 weights too; 0 nothing, float32 only."""
    offload_optimizer: Literal["cpu"] | None = None
    """Keep optimizer states and master weights in main memory and step there; needs ZeRO (DeepSpeed's key)."""
    offload_param: Literal["cpu"] | None = None
    """Keep the sharded weights in main memory between their uses; needs zero_stage = 3 (DeepSpeed's key)."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs ZeRO: set zero_stage to 1, 2 or 3, or offload_optimizer to none")
        if self.offload_param and self.zero_stage < 3:
            raise ValueError(f"offload_param needs zero_stage = 3 (it is {self.zero_stage}), or set it to none")
        return self


class LoopConfig(Section):
    """What all three loops are told."""

    max_tokens_per_microbatch: int = Field(default=4096, ge=1)
    """Tokens in one forward pass at most; all completions of a ranked prompt stay together."""
    checkpoint_every: int = Field(default=100, ge=0)
    """Optimizer steps between checkpoints, from which `--resume` goes on; 0 writes none, so that it starts over."""
    checkpoints_kept: int = Field(default=2, ge=1)
    """How many of the newest checkpoints remain on disk; with one alone, damage to it costs the whole stage."""
    max_skipped_steps: int = Field(default=3, ge=1)
    """Optimizer steps in a row, of one network, with a loss or gradient that is not finite, that end the run."""


class SFTConfig(LoopConfig):
    """Supervised fine-tuning, and language-model pretraining of a small model from scratch."""

    epochs: int = Field(default=2, ge=1)
    """Passes over the demonstrations (paper: 16 for the baseline, 2 for the policy that PPO starts from)."""
    batch_size: int = Field(default=32, ge=1)
    """Examples an optimizer step (paper: 32, and 8 for the 175B model)."""
    pretraining_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of pretraining text among the examples (paper: 10 % for the policy that PPO starts from)."""
    residual_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of what attention and MLP add to the residual stream, in training only (paper: 0.2)."""
    select: Literal["last", "loss", "reward"] = "last"
    """Which epoch's weights are kept. last: the last one's; loss: those of the lowest held-out loss; reward: all of
    them in RUN/NAME-epochs, the last one's until `rayward select` finds the highest score of the reward model.
    """
    valid_share: float = Field(default=0.05, gt=0, lt=1)
    """Share of the demonstrations held out when data.demonstrations_valid is not set; whole instructions at a time."""
    mask_prompt: bool = True
    """Learn the responses only; false learns the prompts too."""
    max_tokens: int = Field(default=1024, ge=2)
    """Longest example; a longer response is cut off and then has no EOS to learn."""
    seed: int = 0
    """Order of the examples, and which are held out."""
    network: NetworkConfig = NetworkConfig()
    """What is trained."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-6)
    """Adam (paper: 5e-6, and 9.65e-6 for the baseline, of 1.3B); the learning rate falls to a tenth along a cosine."""

    @model_validator(mode="after")
    def _has_room_for_demonstrations(self) -> Self:
        if self.batch_size * (1 - self.pretraining_share) < 1 - 1e-9:
            raise ValueError(
                f"pretraining_share = {self.pretraining_share:g} leaves no room for a demonstration in a batch of "
                f"{self.batch_size}: lower it, or raise batch_size"
            )
        return self


BASELINE = SFTConfig(
    epochs=16,
    pretraining_share=0.0,
    residual_dropout=0.2,
    select="reward",
    optimizer=OptimizerConfig(lr=9.65e-6),
)
"""The SFT baseline of the paper (C.1). The defaults are those of the policy that PPO starts from (C.3)."""


class RewardModelingConfig(LoopConfig):
    """Training of the reward model."""

    normalise: Path | None = None
    """Folder of a trained reward model from elsewhere, to be used as it is: nothing is trained, and RUN/reward is a
    copy of it whose scores are 0 on average over the demonstrations."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the comparisons (paper: 1; more overfits)."""
    prompts_per_batch: int = Field(default=64, ge=1)
    """Prompts an optimizer step, each with all its completions (paper: 64)."""
    normaliser: Literal["pairs", "all"] = "pairs"
    """A prompt's loss is divided by its ordered pairs, or by all K(K-1)/2 with ties counted too (paper eq. 1)."""
    valid_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of the prompts held out to measure accuracy; a prompt that occurs twice is on one side only."""
    labeler_weights: str = ""
    """How much the rankings of labelers count in the loss, such as p1=0.5,p2=0; 0 leaves them out, who is not named has
    1. Rankings of the same completions share the weight of one."""
    unit_variance: bool = False
    """Scale scores to standard deviation 1 over the demonstrations (lm-human-preferences); the paper shifts only."""
    seed: int = 0
    """Order of the prompts and which are held out."""
    network: NetworkConfig = NetworkConfig()
    """What is trained, beside the scalar head."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=9e-6)
    """Adam (paper: 9e-6); the learning rate falls to a tenth along a cosine."""

    @property
    def weights(self) -> dict[str, float]:
        """`labeler_weights` by labeler."""
        pairs = [one.rpartition("=") for one in self.labeler_weights.split(",") if one.strip()]
        return {name.strip(): float(weight) for name, _, weight in pairs}

    @model_validator(mode="after")
    def _weights_are_numbers(self) -> Self:
        try:
            fits = all(name and 0 <= weight < math.inf for name, weight in self.weights.items())
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"labeler_weights = {self.labeler_weights!r} must be names with weights of 0 or more, such as "
                "p1=0.5,p2=0"
            )
        return self


class KLConfig(Section):
    """The penalty for leaving the SFT model."""

    coef: float = Field(default=0.02, ge=0)
    """beta: nats of KL to the SFT model cost this much score (paper: 0.02)."""
    target: float | None = Field(default=None, gt=0)
    """Adapt beta so that the KL approaches this many nats a response (Ziegler et al. 2019); unset keeps it fixed."""
    horizon: int = Field(default=10_000, ge=1)
    """Episodes over which the adaptive beta moves; larger is slower."""


class PretrainingConfig(Section):
    """The pretraining mix of PPO-ptx, which keeps what the model knew (the "alignment tax")."""

    coef: float = Field(default=27.8, ge=0)
    """gamma: weight of the language-model loss beside the PPO loss (paper: 27.8); 0 is plain PPO."""
    sequences_per_episode: float = Field(default=8.0, gt=0)
    """Pretraining sequences for each episode of a minibatch (paper: 8)."""
    sequence_tokens: int = Field(default=2048, ge=2)
    """Tokens of a packed pretraining sequence (paper: 2048)."""
    max_tokens_per_microbatch: int | None = Field(default=None, ge=1)
    """Tokens of text in one forward pass at most; that of the PPO loss when not set."""
    normaliser: Literal["tokens", "sequences"] = "tokens"
    """The loss is a mean over tokens, or over sequences of the sum of their tokens (the paper gives neither)."""


class ImportanceConfig(Section):
    """The correction for tokens that older weights sampled; it is applied when max_staleness > 0."""

    method: Literal["truncate", "mask"] = "truncate"
    """truncate: a weight above the cap becomes the cap (TIS); mask: one outside floor and cap becomes 0 (IcePop)."""
    cap: float = Field(default=2.0, ge=1)
    """Largest importance weight of a token; 5 is usual for mask."""
    floor: float = Field(default=0.5, ge=0, le=1)
    """Smallest one, of mask alone."""

    @property
    def bounds(self) -> tuple[float, float | None]:
        """The cap, and the floor where there is one."""
        return self.cap, self.floor if self.method == "mask" else None


class PPOConfig(LoopConfig):
    """PPO; the defaults are the paper's where it gives them."""

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
    clip: float = Field(default=0.2, gt=0)
    """Of the probability ratio (paper: 0.2)."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """Of the value's change (lm-human-preferences: 0.2); none does not clip it."""
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
    checkpoint_every: int = Field(default=10, ge=0)
    """Iterations between checkpoints, from which `--resume` goes on; 0 writes none, so that PPO starts over."""
    rollout_deadline_s: float = Field(default=1800.0, gt=0)
    """How long to wait for a batch before the run stops with what is missing."""
    seed: int = 0
    """Order of prompts, samples and minibatches."""
    importance: ImportanceConfig = ImportanceConfig()
    """The correction for stale tokens."""
    kl: KLConfig = KLConfig()
    """The penalty for leaving the SFT model."""
    pretraining: PretrainingConfig = PretrainingConfig()
    """The pretraining mix."""
    network: NetworkConfig = NetworkConfig()
    """What of the policy is trained; the reference computes in the same precision."""
    critic_network: NetworkConfig | None = None
    """What of the critic is trained; as the policy when not set."""
    policy_optimizer: OptimizerConfig = OptimizerConfig(lr=8.05e-6)
    """Adam for the policy (the paper swept 2.55e-6 to 2.55e-5; above 8.05e-6 it diverged without the mix)."""
    critic_optimizer: OptimizerConfig = OptimizerConfig(lr=9e-6)
    """Adam for the critic, without warm-up (paper: 9e-6, and 5e-6 for the 175B model)."""

    @property
    def critic(self) -> NetworkConfig:
        """What of the critic is trained."""
        return self.critic_network or self.network


class ParityConfig(Section):
    """How far a generator's log-probabilities may be from the learner's, on the same tokens and weights."""

    mean_bound: float = Field(default=0.15, gt=0)
    """Largest mean absolute gap over the probe's tokens, in nats; 0.05 is healthy for a model of 135 M in bfloat16."""
    max_bound: float = Field(default=1.5, gt=0)
    """Largest absolute gap of a single token, in nats."""


class PublishConfig(Section):
    """How weights travel from the learner to the generators."""

    deadline_s: float = Field(default=60.0, gt=0)
    """Seconds that each phase may take."""
    bucket_mb: int = Field(default=64, ge=1)
    """Size of one message, in MB (2**20 bytes)."""
    kv_cache: Literal["keep", "recompute"] = "keep"
    """Of responses under way: keep the keys and values that older weights made, or make them anew with the new ones."""
    parity: ParityConfig = ParityConfig()
    """Bounds of the probe after each publication."""
