"""What each process holds in memory. Held against a real learner rank on a CPU by its test; on GPUs not measured."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cluster.config.schema import Config
from cluster.pipeline.stage import Stage
from cluster.plan.counts import section_of
from cluster.plan.machines import Machine
from cluster.plan.shapes import Models, Shape
from cluster.runtime.fitting import Placed
from cluster.runtime.resources import GIB, Kind
from learner.config import NetworkConfig, OptimizerConfig, RewardModelingConfig, SFTConfig

LIVE_PARAMETERS = 10**9  # that ZeRO-3 gathers at once at most (DeepSpeed's stage3_max_live_parameters)
GPU_CONTEXT = GIB  # of a GPU process before any tensor, with fragments; a guess of common size
ENGINE_OVERHEAD = 2 * GIB  # of vLLM on a GPU beside weights and cached keys; a guess too
HOST_PROCESS = int(1.2 * GIB)  # main memory of any process that imported torch; measured 0.5 to 1.2 GiB on a CPU
OBJECT_STORE = GIB // 4  # of Ray's object store and daemons; a local Ray has exactly this store
_REMEDIES = {
    "learner": "Lower {0}.max_tokens_per_microbatch, set {0}.network.lora_rank, or raise cluster.learner_ranks",
    "generator": "Lower generator.kv_cache_gib (on a GPU generator.gpu_memory_utilization) or cluster.generators",
    "reward": "Lower scoring.max_batch_tokens or the number of replicas",
}


def width(dtype: str) -> int:
    """Bytes of a number."""
    return 4 if dtype == "float32" else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """What one thing takes."""

    device: float = 0.0
    """bytes on the device that computes"""
    host: float = 0.0
    """bytes of main memory, where the device is a GPU; a CPU has all of it there"""


def total(items: Mapping[str, Bytes]) -> Bytes:
    """The sum of what a process holds."""
    return Bytes(device=sum(size.device for size in items.values()), host=sum(size.host for size in items.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """One network on the learner's ranks."""

    name: str
    """policy, reference, critic or reward; the last two have a scalar head, which is always trained"""
    shape: Shape
    """its size"""
    config: NetworkConfig
    """what of it is trained"""
    optimizer: OptimizerConfig
    """how it is laid out over the ranks"""
    frozen: bool = False
    """it is only read"""

    @property
    def scalar(self) -> bool:
        """Whether it has a scalar head instead of the output head."""
        return self.name in ("critic", "reward")

    @property
    def layers(self) -> int:
        """Layers that the backward pass goes through."""
        return min(self.config.last_layers or self.shape.layers, self.shape.layers)

    @property
    def adapters(self) -> int:
        """Parameters of LoRA (Hu et al. 2021): rank * (in + out) for a map of [out, in]."""
        return 0 if self.frozen else self.config.lora_rank * self.shape.adapter_width * self.layers

    @property
    def trunk(self) -> int:
        """First layers in which nothing is trained, whose output is kept for a batch; ZeRO 3 keeps none."""
        return 0 if self.frozen or self.optimizer.zero_stage == 3 else self.shape.layers - self.layers

    @property
    def parameters(self) -> int:
        """All of them, adapters included."""
        return (self.shape.value_parameters if self.scalar else self.shape.parameters) + self.adapters

    @property
    def trained(self) -> int:
        """Those that the optimizer moves."""
        lora, last = self.config.lora_rank, self.config.last_layers
        part = self.adapters + (0 if lora else self.layers * self.shape.layer) + self.scalar * self.shape.hidden
        return 0 if self.frozen else part if lora or last else self.parameters

    @property
    def published(self) -> int:
        """Those that travel to generators that have had all of them: whole layers of which any is trained."""
        part = self.layers * self.shape.layer
        return 0 if self.frozen else part if self.config.lora_rank or self.config.last_layers else self.shape.parameters

    @property
    def computing(self) -> int:
        """Those that compute for a token: embeddings are looked up, and an output head counts once."""
        return self.shape.body + (0 if self.scalar else self.shape.output)


def networks(config: Config, models: Models, stage: type[Stage]) -> list[Network]:
    """The networks on the learner's ranks. Who has generators too compares a policy with its reference."""
    found, ppo = dict[str, Network](), config.ppo
    if "learner" in stage.processes and "generator" in stage.processes:  # laid out as the policy is
        for name in ("policy", "reference"):
            layout = {"config": ppo.network, "optimizer": ppo.policy_optimizer}
            found[name] = Network(name=name, shape=models.policy, frozen=True, **layout)
    for key, (network, optimizer) in stage.trained(config).items():
        name = {"ppo.critic_optimizer": "critic", "reward.optimizer": "reward"}.get(key, "policy")
        shape = models.reward if name == "critic" else models.policy  # a reward model starts as the SFT model
        found[name] = Network(name=name, shape=shape, config=network, optimizer=optimizer)
    return [*found.values()]


def shares_trunk(config: Config, policy: Network, other: Network) -> bool:
    """Whether the policy's trunk is that of its reference, or of a critic: a copy of a reward model in which, by the
    settings, only later layers of the SFT model were trained.
    """
    alike, last = policy.trunk > 0 and other.shape == policy.shape, config.reward.network.last_layers
    return alike and (other.frozen or (other.trunk == policy.trunk and 0 < last <= policy.layers))


def kinds(stage: type[Stage]) -> tuple[Kind, ...]:
    """Kinds of processes that compute in a stage; `serve` makes its own replicas."""
    return ("reward",) if "serve" in stage.sections else stage.processes


def network_memory(
    parameters: int, trained: int, weight: int, optimizer: OptimizerConfig, ranks: int, ema: bool = False
) -> dict[str, Bytes]:
    """Weights, gradients, optimizer and moving average (`ema`) of one network on one rank; `weight`: bytes of one.

    ZeRO (Rajbhandari et al. 2020, section 5): stage 1 divides Adam's 12 bytes a parameter (master weight, two means) by
    the ranks, stage 2 the gradients too, stage 3 the weights too, of which some are gathered for use. Gradients add up
    in float32; with bfloat16 weights at stage 1, DeepSpeed keeps those of the last pass beside them.
    """
    zero, low = optimizer.zero_stage, weight < 4
    share = {stage: ranks if zero >= stage else 1 for stage in (1, 2, 3)}
    weights = weight * parameters / share[3]
    found = {"weights": Bytes(host=weights) if optimizer.offload_param else Bytes(device=weights)}
    if share[3] > 1 or optimizer.offload_param:
        found["gathered weights"] = Bytes(device=weight * min(parameters, LIVE_PARAMETERS))
    each = {
        "gradients": 4 / share[2] + (weight if zero == 1 and low else 0),
        "optimizer": (12 if low or zero else 8) / share[1],  # float32 without ZeRO is its own master copy
        "moving average": 4 / share[1] if ema else 0,
    }
    return found | {name: _kept(optimizer, size * trained) for name, size in each.items() if size * trained}


def _kept(optimizer: OptimizerConfig, size: float) -> Bytes:
    return Bytes(host=size) if optimizer.offload_optimizer else Bytes(device=size)


def activation_bytes(shape: Shape, tokens: int, weight: int, checkpointing: bool, layers: int) -> float:
    """What the forward pass of `tokens` keeps for the backward pass of the last `layers` layers.

    Counted as Korthikanti et al. 2022 (section 4) do: attention that keeps no T x T matrix, no dropout, norms in
    float32. Checkpointing keeps a layer's input alone, and the whole of one layer.
    """
    norm = (4 + weight) * shape.hidden
    attention = 4 * weight * shape.heads * shape.head_dim  # queries, keys and values of all heads, and the result
    layer = 2 * (norm + weight * shape.hidden) + attention + 4 * weight * shape.inner
    kept = layers * weight * shape.hidden + layer if checkpointing else layers * layer
    return float(tokens * (kept + norm))


def microbatch_tokens(config: Config, stage: type[Stage]) -> int:
    """Tokens of the largest micro-batch: the budget, or what is not cut (a sequence, a prompt's completions)."""
    section, text = section_of(config, stage), config.ppo.pretraining
    assert section is not None, stage.name
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    if isinstance(section, SFTConfig):
        longest = section.max_tokens
    elif isinstance(section, RewardModelingConfig):
        longest *= config.sample.completions_per_prompt
    elif text.coef:
        longest = max(longest, text.sequence_tokens)
    return max(section.max_tokens_per_microbatch, longest)


def batch_tokens(config: Config) -> int:
    """Tokens of the largest batch that policy and reference read: of PPO, or of held-out prompts beside it."""
    held_out = config.evaluation.prompts if config.evaluation.every else 0
    rows = max(config.ppo.prompts_per_batch * config.rollout.samples_per_prompt, held_out)
    return rows * (config.rollout.max_prompt_tokens + config.rollout.max_new_tokens)


def learner_memory(config: Config, models: Models, stage: type[Stage]) -> dict[str, Bytes]:
    """What a learner rank holds in a stage; networks are stepped and passed one at a time."""
    used, tokens, ranks = (
        networks(config, models, stage),
        microbatch_tokens(config, stage),
        config.cluster.learner_ranks,
    )
    found, activations = {"process": Bytes(device=GPU_CONTEXT, host=HOST_PROCESS)}, 0.0
    for one in used:
        weight, ema = width(one.config.dtype), one.name == "policy" and len(used) > 1
        items = network_memory(one.parameters, one.trained, weight, one.optimizer, ranks, ema)
        found |= {f"{one.name}: {item}": size for item, size in items.items()}
        checkpointing, layers = (False, 1) if one.frozen else (one.config.gradient_checkpointing, one.layers)
        activations = max(activations, activation_bytes(one.shape, tokens, weight, checkpointing, layers))
    first, most = used[0], max(used, key=lambda one: one.trained)
    if len(used) > 1:
        kept = [one for one in used if one.trunk and (one is first or not shares_trunk(config, first, one))]
        each = sum(width(one.config.dtype) * one.shape.hidden for one in kept)
        found |= {"trunk output": Bytes(host=each * batch_tokens(config) / ranks)} if kept else {}
    # Of each moving number Adam's square root, and as much again that was freed and not given back.
    copies = 8 * most.trained / (ranks if most.optimizer.zero_stage >= 2 else 1)
    found |= {"copies in a step": _kept(most.optimizer, copies), "activations": Bytes(device=activations)}
    if not first.scalar:  # logits of a chunk, their probabilities and gradient; the head's gradient
        chunk, weight = min(first.config.logprob_chunk, tokens), width(first.config.dtype)
        head = first.shape.output * (4 + weight) if first.trained == first.parameters else 0
        found["logits"] = Bytes(device=chunk * first.shape.vocabulary * (8 + weight) + head)
    return found


def generator_memory(config: Config, parameters: int, machine: Machine | None = None) -> dict[str, Bytes]:
    """What a vLLM engine takes: on a GPU of `machine` its share of the memory, on a CPU what it is told."""
    weights = width(config.generator.dtype) * parameters / config.generator.tensor_parallel_size
    cached, processes = config.generator.kv_cache_gib * GIB, 2  # a front and a worker, on a GPU two
    if machine and machine.gpus:
        cached = machine.device.memory * config.generator.gpu_memory_utilization - weights - ENGINE_OVERHEAD
        processes = 3
    process = Bytes(device=ENGINE_OVERHEAD, host=processes * HOST_PROCESS)
    return {"process": process, "weights": Bytes(device=weights), "keys and values": Bytes(device=cached)}


def reward_memory(config: Config, shape: Shape) -> dict[str, Bytes]:
    """What the reward service holds: a reward model for each part that is one, and what a layer makes of a batch."""
    weight, models = width(config.scoring.dtype), sum(part.kind == "model" for part in config.scoring.parts)
    read = activation_bytes(shape, config.scoring.max_batch_tokens, weight, checkpointing=False, layers=1)
    return {
        "process": Bytes(device=GPU_CONTEXT if models else 0, host=HOST_PROCESS),
        "weights": Bytes(device=weight * shape.value_parameters * models),
        "activations": Bytes(device=read if models else 0),
    }


def held(config: Config, models: Models, placed: Placed[Machine], stage: type[Stage]) -> dict[str, dict[str, Bytes]]:
    """What every process of a stage holds at its fullest, by its name; those without a place are left out."""
    found = {}
    for name, (process, machine) in placed.at.items():
        if (kind := name.partition("-")[0]) in kinds(stage):
            if kind == "generator":
                items = generator_memory(config, models.policy.parameters, machine)
            else:
                items = (
                    learner_memory(config, models, stage) if kind == "learner" else reward_memory(config, models.reward)
                )
            found[name] = items if process.gpus else on_cpu(items)
    return found


def on_cpu(items: Mapping[str, Bytes]) -> dict[str, Bytes]:
    """The device is the machine itself; a process takes no memory of it beside its own."""
    return {name: Bytes(host=size.host + (size.device if name != "process" else 0)) for name, size in items.items()}


def misfits(held: Mapping[str, Mapping[str, Bytes]], placed: Placed[Machine], section: str) -> Iterator[str]:
    """Every device and machine whose processes need more memory than it has, in words; `section`: the learner's."""
    places = {place: name for name in held for place in (*placed.devices[name], placed.at[name][1].name)}
    for name, items in held.items():
        if (cached := items.get("keys and values", Bytes()).device) < 0:
            yield (
                f"{name}'s weights leave nothing of its share to keys and values: {-cached / GIB:.1f} GiB are missing. "
                "Raise generator.gpu_memory_utilization or generator.tensor_parallel_size"
            )
    for place, user in places.items():
        machine, gpu = placed.at[user][1], place in placed.devices[user]
        what, limit = (place, machine.device.memory) if gpu else (f"the main memory of {place}", machine.memory)
        names = [name for name in held if place in (*placed.devices[name], placed.at[name][1].name)]
        sizes = {(name, item): size.device if gpu else size.host for name in names for item, size in held[name].items()}
        if (needed := sum(sizes.values()) + (0 if gpu else HOST_PROCESS + OBJECT_STORE)) > limit:
            name, item = max(sizes, key=lambda one: sizes[one])
            yield (
                f"{what} has {limit / GIB:.1f} GiB and needs {needed / GIB:.1f}, {sizes[name, item] / GIB:.1f} of it "
                f"for {name}'s {item}. {_REMEDIES[name.partition('-')[0]].format(section)}, or use larger machines"
            )
