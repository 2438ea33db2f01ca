"""What each process of a run holds in memory, item by item, in each of its stages: formulas, and where they are from.

A learner rank's is held against a real one on a CPU in tests/cluster/plan/test_memory.py; on a GPU nothing of this
has been measured.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cluster.config.schema import Config
from cluster.pipeline.stage import Stage
from cluster.plan.counts import section_of
from cluster.plan.machines import GIB, Machine
from cluster.plan.shapes import Models, Shape
from cluster.runtime.fitting import Placed
from cluster.runtime.resources import Kind
from learner.config import NetworkConfig, OptimizerConfig, PPOConfig, RewardModelingConfig

NORM_PART = 2**22
"""Numbers of a gradient whose squares are added up at once, in float64, for a norm."""
LIVE_PARAMETERS = 10**9
"""Parameters that ZeRO-3 gathers at once at most (DeepSpeed's stage3_max_live_parameters)."""
GPU_CONTEXT = GIB
"""Of a GPU process before any tensor: CUDA context, cuBLAS and NCCL buffers, fragments. A guess of common size."""
ENGINE_OVERHEAD = 2 * GIB
"""Of a vLLM engine on a GPU beside weights and cached keys: activations of a step, CUDA context. A guess too."""
HOST_PROCESS = int(1.2 * GIB)
"""Main memory of any process, the command's own included, once torch, DeepSpeed or vLLM are imported; measured 0.5 to
1.2 GiB on a CPU. An engine has a front and a worker, on a GPU two."""
OBJECT_STORE = GIB // 4
"""Bytes of Ray's object store and of its daemons beside the processes; a local Ray has exactly this store."""


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
    """policy, reference, critic or reward"""
    shape: Shape
    """its size; a critic or reward model has a scalar head instead of the output head"""
    config: NetworkConfig
    """what of it is trained"""
    optimizer: OptimizerConfig
    """how it is laid out over the ranks"""
    frozen: bool = False
    """it is only read"""

    @property
    def scalar(self) -> bool:
        """Whether it has a scalar head, which is always trained."""
        return self.name in ("critic", "reward")

    @property
    def parameters(self) -> int:
        """All of them, adapters included."""
        return (self.shape.value_parameters if self.scalar else self.shape.parameters) + self._adapters

    @property
    def trained(self) -> int:
        """Those that the optimizer moves. LoRA (Hu et al. 2021): rank * (in + out) for a map of [out, in]."""
        if self.frozen:
            return 0
        if self.config.lora_rank or self.config.last_layers:
            layers = 0 if self.config.lora_rank else self.layers * self.shape.layer
            return self._adapters + layers + (self.shape.hidden if self.scalar else 0)
        return self.parameters

    @property
    def layers(self) -> int:
        """Layers that the backward pass goes through."""
        return min(self.config.last_layers or self.shape.layers, self.shape.layers)

    @property
    def _adapters(self) -> int:
        return self.config.lora_rank * self.shape.adapter_width * self.layers


def networks(config: Config, models: Models, stage: type[Stage]) -> list[Network]:
    """The networks on the learner's ranks. Who has generators too compares a policy with its reference."""
    found, ppo = [], config.ppo
    for key, (network, optimizer) in stage.trained(config).items():
        section, _, name = key.partition(".")
        name = section if section == "reward" else name.removesuffix("optimizer").rstrip("_") or "policy"
        shape = models.reward if name == "critic" else models.policy  # a reward model starts as the SFT model
        found.append(Network(name=name, shape=shape, config=network, optimizer=optimizer))
    if "learner" in stage.processes and "generator" in stage.processes:  # laid out as the policy is
        read = [
            Network(name=name, shape=models.policy, config=ppo.network, optimizer=ppo.policy_optimizer, frozen=True)
            for name in ("policy", "reference")
        ]
        found = [*(found[:1] or read[:1]), read[1], *found[1:]]
    return found


def kinds(stage: type[Stage]) -> tuple[Kind, ...]:
    """Kinds of processes that compute in a stage; `serve` makes its own replicas."""
    return ("reward",) if "serve" in stage.sections else stage.processes


def network_memory(
    parameters: int, trained: int, weight: int, optimizer: OptimizerConfig, ranks: int, *, ema: bool, norms: bool
) -> dict[str, Bytes]:
    """Weights, gradients, optimizer and moving average (`ema`) of one network on one rank; `weight`: bytes of one.

    ZeRO (Rajbhandari et al. 2020, section 5): stage 1 divides Adam's 12 bytes a parameter (master weight and two means
    in float32) by the ranks, stage 2 the gradients too, stage 3 the weights too, of which some are gathered for use.
    Gradients add up in float32; with bfloat16 weights at stage 1, DeepSpeed keeps those of the last pass in bfloat16
    beside them. Copies exist for moments: of Adam's square root, and of gradients while two losses are told apart
    (`norms`).
    """
    share = {stage: ranks if optimizer.zero_stage >= stage else 1 for stage in (1, 2, 3)}
    kept = "host" if optimizer.offload_optimizer else "device"  # gradients too, from ZeRO-1 on
    weights = weight * parameters / share[3]
    found = {"weights": Bytes(host=weights) if optimizer.offload_param else Bytes(device=weights)}
    if share[3] > 1 or optimizer.offload_param:
        found["gathered weights"] = Bytes(device=weight * min(parameters, LIVE_PARAMETERS))
    if trained:
        found["gradients"] = Bytes(**{kept: 4 * trained / share[2]})
        if optimizer.zero_stage == 1 and weight < 4:
            found["gradients of a pass"] = Bytes(device=weight * trained)
        # In float32 without ZeRO the weights are their own master copy.
        states = 12 if weight < 4 or optimizer.zero_stage else 8
        found["optimizer"] = Bytes(**{kept: states * trained / share[1]})
        copies = 8 * trained / share[2 if norms else 1] + (4 + 2 * 8) * min(trained, NORM_PART)
        found["copies in a step"] = Bytes(**{kept: copies})
        if ema:
            found["moving average"] = Bytes(**{kept: 4 * trained / share[1]})
    return found


def activation_bytes(shape: Shape, tokens: int, weight: int, checkpointing: bool, layers: int) -> float:
    """What the forward pass of `tokens` keeps for the backward pass of the last `layers` layers.

    Counted as Korthikanti et al. 2022 (section 4) do, for the layers that transformers builds: attention that keeps
    no T x T matrix, no dropout. Llama's kind (a gated block) has norms in float32; GPT-2's has its GELU in five parts.
    Checkpointing keeps a layer's input alone, and the whole of one layer.
    """
    norm = ((4 if shape.gated else 0) + weight) * shape.hidden  # what a norm keeps; who takes its result keeps that
    attention = 4 * weight * shape.heads * shape.head_dim  # queries, keys and values of all heads, and the result
    layer = 2 * (norm + weight * shape.hidden) + attention + (4 if shape.gated else 5) * weight * shape.inner
    kept = layers * weight * shape.hidden + layer if checkpointing else layers * layer
    return float(tokens * (kept + norm))


def read_bytes(shape: Shape, tokens: int, weight: int) -> float:
    """What a layer holds while it reads `tokens` without gradients: residual, norms and the feed-forward block."""
    return float(tokens * (weight * (6 * shape.hidden + 3 * shape.inner) + 8 * shape.hidden))


def logits_bytes(shape: Shape, chunk: int, weight: int, head_trained: bool) -> float:
    """A chunk's logits, probabilities and their gradient in logprobs.py, and the head's gradient in float32."""
    return float(chunk * shape.vocabulary * (8 + weight) + (shape.output * (4 + weight) if head_trained else 0))


def microbatch_tokens(config: Config, stage: type[Stage]) -> int:
    """Tokens of the largest micro-batch: the budget, or what cannot be cut where that is more.

    Sequences are not cut, nor are a prompt's completions parted; a rank's whole share may be less than the budget.
    """
    section, text = section_of(config, stage), config.ppo.pretraining
    assert section is not None, stage.name
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    if isinstance(section, PPOConfig):
        longest = max(longest, text.sequence_tokens if text.coef else 0)
        count = round(max(1, text.sequences_per_episode if text.coef else 0) * section.minibatch_size)
    elif isinstance(section, RewardModelingConfig):
        longest, count = longest * config.sample.completions_per_prompt, section.prompts_per_batch
    else:
        longest, count = section.max_tokens, section.batch_size
    share = -(-count // config.cluster.learner_ranks)
    return min(max(1, section.max_tokens_per_microbatch // longest), share) * longest


def learner_memory(config: Config, models: Models, stage: type[Stage]) -> dict[str, Bytes]:
    """What a learner rank holds in a stage; networks are stepped and passed one at a time."""
    used, tokens = networks(config, models, stage), microbatch_tokens(config, stage)
    found, copies, activations = {"process": Bytes(device=GPU_CONTEXT, host=HOST_PROCESS)}, Bytes(), 0.0
    for one in used:
        weight, ema = width(one.config.dtype), one.name == "policy" and len(used) > 1
        norms, ranks = ema and config.ppo.pretraining.coef > 0, config.cluster.learner_ranks
        items = network_memory(one.parameters, one.trained, weight, one.optimizer, ranks, ema=ema, norms=norms)
        copies = max(copies, items.pop("copies in a step", copies), key=lambda size: size.device + size.host)
        found |= {f"{one.name}: {item}": size for item, size in items.items()}
        kept = activation_bytes(one.shape, tokens, weight, one.config.gradient_checkpointing, one.layers)
        activations = max(activations, read_bytes(one.shape, tokens, weight) if one.frozen else kept)
    found |= {"copies in a step": copies, "activations": Bytes(device=activations)}
    first = used[0]
    if not first.scalar:
        whole = not (first.frozen or first.config.lora_rank or first.config.last_layers)
        chunk = min(first.config.logprob_chunk, tokens)
        found["logits"] = Bytes(device=logits_bytes(first.shape, chunk, width(first.config.dtype), whole))
    return found


def generator_memory(config: Config, parameters: int, machine: Machine | None = None) -> dict[str, Bytes]:
    """What a vLLM engine takes: on a GPU of `machine` its share of the memory, on a CPU what it is told."""
    weights = width(config.generator.dtype) * parameters / config.generator.tensor_parallel_size
    cached = config.generator.kv_cache_gib * GIB
    if machine and machine.gpus:
        cached = machine.device.memory * config.generator.gpu_memory_utilization - weights - ENGINE_OVERHEAD
    process = Bytes(device=ENGINE_OVERHEAD, host=(3 if machine and machine.gpus else 2) * HOST_PROCESS)
    return {"process": process, "weights": Bytes(device=weights), "keys and values": Bytes(device=cached)}


def cached_tokens(config: Config, shape: Shape, held: Mapping[str, Bytes]) -> int:
    """Tokens whose keys and values an engine can hold; with tensor parallelism each device has a part of the heads."""
    size = held["keys and values"]
    parts = min(config.generator.tensor_parallel_size, shape.kv_heads)  # beyond, heads are repeated
    return int(max(size.device + size.host, 0) * parts / (shape.kv_elements * width(config.generator.dtype)))


def reward_memory(config: Config, shape: Shape) -> dict[str, Bytes]:
    """What the reward service holds: a reward model for each part that is one, and a batch's hidden states."""
    weight, models = width(config.scoring.dtype), sum(part.kind == "model" for part in config.scoring.parts)
    return {
        "process": Bytes(device=GPU_CONTEXT if models else 0, host=HOST_PROCESS),
        "weights": Bytes(device=weight * shape.value_parameters * models),
        "activations": Bytes(device=read_bytes(shape, config.scoring.max_batch_tokens, weight) if models else 0),
    }


def held(config: Config, models: Models, placed: Placed[Machine], stage: type[Stage]) -> dict[str, dict[str, Bytes]]:
    """What every process of a stage holds at its fullest, by its name; those without a place are left out."""
    found = {}
    for name, (process, machine) in placed.at.items():
        kind = name.partition("-")[0]
        if kind not in kinds(stage):
            continue
        if kind == "generator":
            items = generator_memory(config, models.policy.parameters, machine)
        else:
            items = learner_memory(config, models, stage) if kind == "learner" else reward_memory(config, models.reward)
        found[name] = items if process.gpus else on_cpu(items)
    return found


def on_cpu(items: Mapping[str, Bytes]) -> dict[str, Bytes]:
    """The device is the machine itself; a process takes no memory of it beside its own."""
    return {name: Bytes(host=size.host + (size.device if name != "process" else 0)) for name, size in items.items()}


def misfits(held: Mapping[str, Mapping[str, Bytes]], placed: Placed[Machine]) -> Iterator[str]:
    """Every device and machine whose processes need more memory than it has, in words."""
    users: dict[str, list[str]] = {}
    for name, items in held.items():
        for place in (*placed.devices[name], placed.at[name][1].name):
            users.setdefault(place, []).append(name)
        if (cached := items.get("keys and values", Bytes()).device) < 0:
            yield f"{name}'s weights leave nothing of its share to keys and values: {-cached / GIB:.1f} GiB are missing"
    for place, names in users.items():
        machine, gpu = placed.at[names[0]][1], place in placed.devices[names[0]]
        what, limit = (f"{place} ({machine.device.name})", machine.device.memory) if gpu else ("", machine.memory)
        sizes = {
            f"{name}'s {item}": size.device if gpu else size.host for name in names for item, size in held[name].items()
        }
        if not gpu:
            sizes["the command and Ray"] = HOST_PROCESS + OBJECT_STORE
        if (needed := sum(sizes.values())) > limit:
            most = ", ".join(f"{item} {sizes[item] / GIB:.1f}" for item in sorted(sizes, key=lambda i: -sizes[i])[:4])
            yield (
                f"{what or f'the main memory of {place}'} has {limit / GIB:.1f} GiB and needs {needed / GIB:.1f}, the "
                f"most of it for {most}"
            )
