"""Estimates of memory (bytes) and time (seconds) as pure functions: formulas, and where they come from.

N are parameters, b bytes of a weight, T tokens, F operations a second and W bytes a second of a device. They are held
against measured runs on a CPU in tests/cluster/plan/test_estimates.py; on a GPU nothing of this has been measured.
"""

from dataclasses import dataclass

from cluster.plan.shapes import Shape

MASTER = 12
"""Bytes that Adam keeps of a trained parameter in float32: the weight itself and two running means."""
COPIES = 8
"""Bytes a parameter that exist for moments: of Adam's square root, and of gradients while two losses are measured."""
NORM_PART = 2**22
"""Numbers of a gradient whose squares are added up at once, in float64, for a norm."""
LIVE_PARAMETERS = 10**9
"""Parameters that ZeRO-3 gathers at once at most (DeepSpeed's stage3_max_live_parameters)."""
ADAM_TRAFFIC = 28
"""Bytes of memory traffic a parameter in an Adam step: gradient, master weight and two means read, three written."""
MEMORY_TOLERANCE = 0.25
"""How far a learner rank's memory on a CPU may be from its estimate, as a part of it (see test_memory.py)."""
TIME_FACTOR = 2.0
"""How far a phase on a CPU may be from what is expected of it, either way (there and in test_pace.py)."""
PUBLISH_CPU = 1e-8
"""Seconds that CPUs take for a byte of published weights beside sending it: merging adapters, checksums on both sides,
loading and packing, the parity probe. From 2.9 s for 269 MB to two engines on two cores (docs/quickstart.md)."""
GPU_CONTEXT = 2**30
"""Of a GPU process before any tensor: CUDA context, cuBLAS and NCCL buffers, fragments. A guess of common size."""
ENGINE_OVERHEAD = 2 * 2**30
"""Of a vLLM engine on a GPU beside weights and cached keys: activations of a step, CUDA context. A guess too."""
HOST_PROCESS = int(1.2 * 2**30)
"""Main memory of any process once torch, DeepSpeed or vLLM are imported; measured 0.5 to 1.2 GiB on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a process reaches of its device's peak, and what an engine's step costs beside that."""

    forward: float
    """share of the peak rate in passes without gradients"""
    training: float
    """in forward and backward passes"""
    sharding: float
    """what DeepSpeed adds to these passes where every weight is trained, as a part of them"""
    decode: float
    """in the products of few rows of a decoding step"""
    read: float
    """share of the memory's bandwidth"""
    step: float
    """seconds of a decoding step beside its computing"""
    sequence: float
    """and of every sequence in it: sampling, log-probs, and telling what was sampled"""
    source: str
    """where these are from"""

    def step_s(self, sequences: float) -> float:
        """Seconds of a step of so many sequences beside its computing."""
        return self.step + sequences * self.sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One network on the learner's ranks, trained or only read."""

    name: str
    """policy, reference, critic or reward"""
    parameters: int
    """all of them"""
    trained: int
    """of which the optimizer moves these; 0 for a network that is only read"""
    weight_bytes: int
    """of a weight: 2 or 4"""
    stage: int
    """ZeRO stage, 0 to 3"""
    ranks: int
    """that share it"""
    ema: bool
    """keeps a moving average of what is trained, in float32"""
    norms: bool
    """the gradients of two losses are told apart, which copies them"""
    offload_optimizer: bool
    """the optimizer's states live in main memory"""
    offload_weights: bool
    """the sharded weights live in main memory (ZeRO-3)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """What one thing takes."""

    device: float = 0.0
    """bytes on the device that computes"""
    host: float = 0.0
    """bytes of main memory, where the device is a GPU; a CPU has all of it there"""


def network_memory(network: Training) -> dict[str, Bytes]:
    """Weights, gradients, optimizer and moving average of one network on one rank.

    ZeRO (Rajbhandari et al. 2020, section 5): stage 1 divides the optimizer's 12 bytes a parameter by the ranks, stage
    2 the gradients too, stage 3 the weights too, of which some are gathered for use. Gradients add up in float32; with
    bfloat16 weights at stage 1, DeepSpeed keeps those of the last pass in bfloat16 beside them.
    """
    n, t, ranks = network.parameters, network.trained, network.ranks
    share = {stage: ranks if network.stage >= stage else 1 for stage in (1, 2, 3)}
    kept = "host" if network.offload_optimizer else "device"
    weights = network.weight_bytes * n / share[3]
    found = {"weights": Bytes(host=weights) if network.offload_weights else Bytes(device=weights)}
    if share[3] > 1 or network.offload_weights:
        found["gathered weights"] = Bytes(device=network.weight_bytes * min(n, LIVE_PARAMETERS))
    if t:
        # Offloaded gradients are in main memory from ZeRO-1 on, as Adam is.
        found["gradients"] = Bytes(**{kept: 4 * t / share[2]})
        if network.stage == 1 and network.weight_bytes < 4:
            found["gradients of a pass"] = Bytes(device=network.weight_bytes * t)
        # In float32 without ZeRO the weights are their own master copy.
        states = (MASTER if network.weight_bytes < 4 or network.stage else MASTER - 4) * t / share[1]
        found["optimizer"] = Bytes(**{kept: states})
        copies = COPIES * t / share[2 if network.norms else 1] + (4 + 2 * 8) * min(t, NORM_PART)
        found["copies in a step"] = Bytes(**{kept: copies})
        if network.ema:
            found["moving average"] = Bytes(**{kept: 4 * t / share[1]})
    return found


def activation_bytes(shape: Shape, tokens: int, weight_bytes: int, checkpointing: bool, layers: int) -> float:
    """What the forward pass of `tokens` keeps for the backward pass of the last `layers` layers.

    Counted as Korthikanti et al. 2022 (section 4) do, for the layers that transformers builds: attention that keeps
    no T x T matrix, no dropout. Llama's kind (a gated block) has norms in float32; GPT-2's has its GELU in five parts.
    Checkpointing keeps a layer's input alone, and the whole of one layer.
    """
    b, queries = weight_bytes, shape.heads * shape.head_dim
    norm = ((4 if shape.gated else 0) + b) * shape.hidden  # what a norm keeps; its result feeds a map that keeps it
    attention = 4 * b * queries  # queries, keys and values of all heads, and what attention gives
    layer = 2 * (norm + b * shape.hidden) + attention + (4 if shape.gated else 5) * b * shape.inner
    kept = layers * b * shape.hidden + layer if checkpointing else layers * layer
    return float(tokens * (kept + norm))


def read_bytes(shape: Shape, tokens: int, weight_bytes: int) -> float:
    """What a layer holds while it reads `tokens` without gradients: residual, norms and the feed-forward block."""
    return float(tokens * (weight_bytes * (6 * shape.hidden + 3 * shape.inner) + 8 * shape.hidden))


def logits_bytes(shape: Shape, chunk: int, weight_bytes: int, head_trained: bool) -> float:
    """A chunk's logits, probabilities and their gradient in logprobs.py, and the head's gradient in float32."""
    chunk_bytes = chunk * shape.vocabulary * (4 + 4 + weight_bytes)
    return float(chunk_bytes + (shape.vocabulary * shape.hidden * (4 + weight_bytes) if head_trained else 0))


def trained_parameters(
    shape: Shape, value: bool, lora_rank: int, last_layers: int, new_head: bool = False
) -> tuple[int, int]:
    """(all, trained) parameters of a network as `learner.worker.networks` makes it; LoRA's adapters count in both.

    LoRA (Hu et al. 2021): a map of [out, in] gets rank * (in + out) parameters. A scalar head is always trained.
    """
    total = shape.value_parameters if value else shape.parameters
    head = shape.hidden if value else 0
    layers = last_layers or shape.layers
    if lora_rank:
        adapters = lora_rank * shape.adapter_width * layers
        return total + adapters, adapters + head
    return total, layers * shape.layer + head if last_layers else total


def kv_bytes(shape: Shape, value_bytes: int) -> int:
    """Cached keys and values of a token: 2 * layers * kv_heads * head_dim * bytes."""
    return shape.kv_elements * value_bytes


def decode_seconds(
    shape: Shape, weight_bytes: int, sequences: float, context: float, flops: float, bandwidth: float
) -> float:
    """One step of `sequences` together, `context` tokens behind each: max((N b + B c kv) / W, 2 N B / F)."""
    read = shape.parameters * weight_bytes + sequences * context * kv_bytes(shape, weight_bytes)
    return max(read / bandwidth, 2 * shape.parameters * sequences / flops)


def forward_seconds(parameters: float, tokens: float, flops: float) -> float:
    """A forward pass without gradients: 2 N T / F (Kaplan et al. 2020, section 2.1)."""
    return 2 * parameters * tokens / flops


def training_seconds(reached: float, trained: float, tokens: float, flops: float) -> float:
    """Forward 2 N T, gradients of activations 2 N T and of weights 2 N' T, over F: 6 N T where all is trained.

    `reached` (N) are the parameters that the backward pass goes through, `trained` (N') those with a gradient.
    """
    return 2 * (2 * reached + trained) * tokens / flops


def transfer_seconds(size: float, link: float) -> float:
    """Bytes over a link; a broadcast in a ring or tree costs its slowest receiver little more than one transfer."""
    return size / link


def ring_seconds(size: float, ranks: int, link: float) -> float:
    """A ring all-reduce of `size` bytes: 2 (n - 1) / n of it crosses every link (Patarasuk & Yuan 2009)."""
    return 2 * (ranks - 1) / ranks * size / link
