"""What each process of a run holds in memory, item by item, in each step of the run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config.schema import Config
from cluster.plan.estimates import (
    ENGINE_OVERHEAD,
    GPU_CONTEXT,
    HOST_PROCESS,
    Bytes,
    Training,
    activation_bytes,
    kv_bytes,
    logits_bytes,
    network_memory,
    read_bytes,
    trained_parameters,
)
from cluster.plan.hardware import GIB, Machine
from cluster.plan.shapes import NO_MODEL, SIZES, Shape, UnknownShape, shape_of
from cluster.runtime.resources import Process
from learner.config import NetworkConfig, OptimizerConfig

OBJECT_STORE = 256 * 2**20
"""Bytes of Ray's object store and of its daemons beside the processes; a local Ray has exactly this store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The shapes of a run's models."""

    policy: Shape
    """base, SFT model, policy and reference"""
    reward: Shape
    """reward model and critic"""

    @classmethod
    def of(cls, config: Config, run_dir: Path, serves: bool = False) -> "Models":
        """Of the configured or the run's own folders; where those are not here, of the sizes in plan.

        `serves`: a reward model is all that is needed, and none where no part of the score is one. Raises
        UnknownShape.
        """
        models, plan = config.models, config.plan
        if serves:
            return cls._served(config, run_dir)
        policy = _first_known((models.sft, _own(run_dir, "sft"), models.base, plan.model))
        if policy is None:
            raise UnknownShape(
                "the size of the model is not known: set models.base or models.sft to a folder, or plan.model to a "
                f"size ({', '.join(SIZES)})"
            )
        return cls(
            policy=policy, reward=_first_known((models.reward, _own(run_dir, "reward"), plan.reward_model)) or policy
        )

    @classmethod
    def _served(cls, config: Config, run_dir: Path) -> "Models":
        parts = [part for part in config.scoring.parts if part.kind == "model"]
        plan, own = config.plan, (config.models.reward, _own(run_dir, "reward"))
        sources = [*(part.target for part in parts), *own, plan.reward_model, plan.model]
        shape = _first_known(sources) if parts else NO_MODEL
        if shape is None:
            raise UnknownShape(
                "the size of the reward model is not known: set models.reward to a folder, or plan.reward_model to a "
                f"size ({', '.join(SIZES)})"
            )
        return cls(policy=shape, reward=shape)


def _own(run_dir: Path, name: str) -> Path | None:
    return run_dir / name if (run_dir / name / "config.json").is_file() else None


def _first_known(sources: Iterable[Any]) -> Shape | None:
    """The shape of the first source that has one; None without any source. Raises UnknownShape for none of several."""
    unknown: UnknownShape | None = None
    for source in sources:
        if source is not None:
            try:
                return shape_of(source)
            except UnknownShape as error:
                unknown = unknown or error
    if unknown is not None:
        raise unknown
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one process holds at its fullest."""

    process: Process
    """who"""
    items: Mapping[str, Bytes]
    """what, by name"""

    @property
    def device(self) -> float:
        """Bytes on its device."""
        return sum(item.device for item in self.items.values())

    @property
    def host(self) -> float:
        """Bytes of main memory beside that."""
        return sum(item.host for item in self.items.values())


def learner_memory(config: Config, models: Models, stage: str, gpu: bool) -> dict[str, Bytes]:
    """What a learner rank holds in the step "sft", "baseline", "reward", "ppo" or "evaluate"."""
    found: dict[str, Bytes] = {"process": Bytes(device=GPU_CONTEXT, host=HOST_PROCESS) if gpu else _host(HOST_PROCESS)}
    copies = Bytes()
    for network in networks(config, models, stage):
        for item, size in network_memory(network).items():
            if item != "copies in a step":
                found[f"{network.name}: {item}"] = size
            elif size.device + size.host > copies.device + copies.host:
                copies = size  # one network is stepped at a time
    found["copies in a step"] = copies
    settings, shape = (config.ppo if stage == "evaluate" else getattr(config, stage)).network, models.policy
    tokens = microbatch_tokens(config, stage)
    wide = 4 if settings.dtype == "float32" else 2
    if stage == "evaluate":
        found["activations"] = Bytes(device=read_bytes(shape, tokens, wide))
    else:
        used = [(settings, shape), *([(config.ppo.critic, models.reward)] if stage == "ppo" else [])]
        found["activations"] = Bytes(device=max(_activations(network, one, tokens) for network, one in used))
    if stage != "reward":
        head_trained = stage != "evaluate" and not settings.lora_rank and not settings.last_layers
        chunk = min(settings.logprob_chunk, tokens)
        found["logits"] = Bytes(device=logits_bytes(shape, chunk, wide, head_trained))
    if not gpu:
        return {name: _host(size.device + size.host) for name, size in found.items()}
    return found


def _activations(network: NetworkConfig, shape: Shape, tokens: int) -> float:
    """Of a micro-batch, for the layers that the backward pass goes through."""
    layers = min(network.last_layers or shape.layers, shape.layers)
    wide = 4 if network.dtype == "float32" else 2
    return activation_bytes(shape, tokens, wide, network.gradient_checkpointing, layers)


def networks(config: Config, models: Models, stage: str) -> list[Training]:
    """The networks on the learner's ranks in a step, as `cluster.pipeline.job` and `cluster.pipeline.ppo` load them."""
    ranks, ppo = config.cluster.learner_ranks, config.ppo

    def one(
        name: str,
        value: bool,
        network: NetworkConfig,
        optimizer: OptimizerConfig,
        ema: bool = False,
        read: bool = False,
    ) -> Training:
        shape = models.reward if value and name != "reward" else models.policy
        total, trained = trained_parameters(shape, value, network.lora_rank, network.last_layers)
        return Training(
            name=name,
            parameters=total,
            trained=0 if read else trained,
            weight_bytes=4 if network.dtype == "float32" else 2,
            stage=optimizer.zero_stage,
            ranks=ranks,
            ema=ema,
            norms=ema and ppo.pretraining.coef > 0,
            offload_optimizer=optimizer.offload_optimizer is not None,
            offload_weights=optimizer.offload_param is not None,
        )

    if stage in ("sft", "baseline"):
        section = config.sft if stage == "sft" else config.baseline
        return [one("policy", False, section.network, section.optimizer)]
    if stage == "reward":
        return [one("reward", True, config.reward.network, config.reward.optimizer)]
    if stage == "evaluate":
        both = ("policy", "reference")
        return [one(name, False, ppo.network, ppo.policy_optimizer, read=True) for name in both]
    return [
        one("policy", False, ppo.network, ppo.policy_optimizer, ema=True),
        one("reference", False, ppo.network, ppo.policy_optimizer, read=True),  # laid out as the policy is
        one("critic", True, ppo.critic, ppo.critic_optimizer),
    ]


def longest_sequence(config: Config, stage: str) -> int:
    """Tokens of the longest sequence that a step's forward pass may meet."""
    turn = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    if stage in ("sft", "baseline"):
        return getattr(config, stage).max_tokens
    if stage == "reward":
        return turn
    text = config.ppo.pretraining
    return max(turn, text.sequence_tokens if text.coef else 0)


def microbatch_tokens(config: Config, stage: str) -> int:
    """Tokens of the largest micro-batch: the budget, or what cannot be cut where that is more.

    Sequences are not cut, nor are a prompt's completions parted; a rank's whole share may be less than the budget.
    """
    longest, ranks = longest_sequence(config, stage), config.cluster.learner_ranks
    if stage in ("sft", "baseline"):
        section = config.sft if stage == "sft" else config.baseline
        unit, count, budget = longest, section.batch_size, section.max_tokens_per_microbatch
    elif stage == "reward":
        unit, count = longest * config.sample.completions_per_prompt, config.reward.prompts_per_batch
        budget = config.reward.max_tokens_per_microbatch
    else:
        text, minibatch = config.ppo.pretraining, config.ppo.minibatch_size
        unit, budget = longest, config.ppo.max_tokens_per_microbatch
        count = max(minibatch, round(text.sequences_per_episode * minibatch) if text.coef else 0)
    return min(max(1, budget // unit), -(-count // ranks)) * unit


def generator_memory(config: Config, shape: Shape, machine: Machine) -> dict[str, Bytes]:
    """What a vLLM engine takes: on a GPU its share of the memory whatever it needs, on a CPU what it is told."""
    width = 4 if config.generator.dtype == "float32" else 2
    weights = width * shape.parameters / config.generator.tensor_parallel_size
    if not machine.gpus:
        values = {"weights": weights, "keys and values": config.generator.kv_cache_gib * GIB}
        # The front and the engine are two processes, and each imports torch and vLLM.
        return {"process": _host(2 * HOST_PROCESS)} | {name: _host(size) for name, size in values.items()}
    cached = machine.device.memory * config.generator.gpu_memory_utilization - weights - ENGINE_OVERHEAD
    return {
        "process": Bytes(device=ENGINE_OVERHEAD, host=3 * HOST_PROCESS),
        "weights": Bytes(device=weights),
        "keys and values": Bytes(device=cached),
    }


def cached_tokens(config: Config, shape: Shape, held: Mapping[str, Bytes]) -> int:
    """Tokens whose keys and values an engine can hold; with tensor parallelism each device has a part of the heads."""
    size = held["keys and values"]
    each = kv_bytes(shape, 4 if config.generator.dtype == "float32" else 2)
    parts = min(config.generator.tensor_parallel_size, shape.kv_heads)  # beyond, heads are repeated
    return int(max(size.device + size.host, 0) * parts / each)


def reward_memory(config: Config, shape: Shape, gpu: bool) -> dict[str, Bytes]:
    """What the reward service holds: a reward model for each part that is one, and a batch's hidden states."""
    width = 4 if config.scoring.dtype == "float32" else 2
    models = sum(part.kind == "model" for part in config.scoring.parts)
    tokens = config.scoring.max_batch_tokens
    states = read_bytes(shape, tokens, width) if models else 0
    items = {"weights": width * shape.value_parameters * models, "activations": states}
    if gpu:
        base = {"process": Bytes(device=GPU_CONTEXT if models else 0, host=HOST_PROCESS)}
        return base | {name: Bytes(device=size) for name, size in items.items()}
    return {"process": _host(HOST_PROCESS)} | {name: _host(size) for name, size in items.items()}


def _host(size: float) -> Bytes:
    """On a CPU the device is the machine itself: everything is main memory."""
    return Bytes(host=size)
