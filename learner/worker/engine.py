"""One network under DeepSpeed: gradients of any number of losses into the same buffers, then one optimizer step."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from learner.config import OptimizerConfig
from learner.maths.schedules import ema_update, tf1_eps
from learner.weights.checkpoint import NotSaved
from learner.worker.networks import Network, PolicyNetwork
from learner.worker.partitions import clear_leftovers, gradients, master_weights

_SAMPLE = 2**22  # numbers of a gradient that its norm is taken of; copies of all would be the size of the weights
_WHOLE_BELOW = 10_000  # numbers; ZeRO 3 leaves smaller parameters, such as norms, whole on every rank


def init_distributed(rank: int, world_size: int, address: str, port: int, deadline_s: float) -> None:
    """Join this process to the learner's ranks (gloo on the CPU, NCCL on GPUs), within `deadline_s` seconds."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",  # Ray shows each rank its own devices only
        WORLD_SIZE=str(world_size),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not cuda:
        deepspeed.ops.__dict__[
            "__compatible_ops__"
        ] = {}  # else its shared-memory reduce compiles C++ for half a minute
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo", timeout=timedelta(seconds=deadline_s), verbose=False
    )


def deepspeed_config(config: OptimizerConfig, half: bool, cuda: bool) -> dict[str, Any]:
    """What DeepSpeed is told. `half`: bfloat16 weights beside float32 master weights; `cuda`: on GPUs."""
    own = config.offload_optimizer is not None and cuda  # DeepSpeed's CPU Adam, much faster, but minutes of C++
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # `step` alone ends an accumulation
        "zero_optimization": _zero(config) | {"offload_optimizer": {"device": config.offload_optimizer or "none"}},
        "bf16": {"enabled": half},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # else a sum over ranks would depend on how many there are
        "gradient_clipping": config.clip_grad_norm,
        "zero_allow_untested_optimizer": True,
        "optimizer": {
            "type": "Adam",
            "params": {
                "lr": config.lr,
                "betas": [config.beta1, config.beta2],
                "eps": config.eps,
                "weight_decay": 0.0,
                **({"torch_adam": False} if own else {"torch_adam": True, "fused": True}),
            },
        },
        "steps_per_print": 10**9,
    }


def _zero(config: OptimizerConfig) -> dict[str, Any]:
    return {
        "stage": config.zero_stage,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": _WHOLE_BELOW,
        "offload_param": {"device": config.offload_param or "none"},
    }


def whole(parameter: nn.Parameter) -> Tensor:
    """All of a parameter, detached. Where ZeRO 3 shards it this is a collective, and the result a copy."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameter):
        return parameter.detach().clone()


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of all of a parameter, wherever it is."""
    return getattr(parameter, "ds_shape", parameter.shape)


class Attempts:
    """What a rank tries alone between two collectives: an error is noted, so that it still meets the others."""

    def __init__(self) -> None:
        self._error: Exception | None = None

    def noted(self, call: Callable[..., Any]) -> Callable[..., None]:
        """The same call; an error is kept, the first one, and not raised."""

        def attempt(*args: Any, **settings: Any) -> None:
            try:
                call(*args, **settings)
            except Exception as error:
                self._error = self._error or error

        return attempt

    def agree(self, path: Path) -> None:
        """Raise NotSaved, on every rank, when one of them had an error while it wrote `path`. A collective."""
        error, self._error = self._error, None
        told: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, error and f"{type(error).__name__}: {error}")
        if wrong := [f"rank {rank} of the learner: {text}" for rank, text in enumerate(told) if text]:
            raise NotSaved(f"{path} was not written: {'; '.join(wrong)}") from error


class Frozen:
    """A network that is only read: whole on every rank, or sharded over them as ZeRO 3 does."""

    def __init__(self, network: Network, sharding: OptimizerConfig | None) -> None:
        """`sharding`: how the network is laid out that this one stands beside (the policy); None for no sharding."""
        self.module = network.requires_grad_(False)
        self.network: Callable[..., Any] = network
        if sharding is None or sharding.zero_stage < 3:
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            network.to(self.device)
            return
        half = next(network.parameters()).dtype == torch.bfloat16
        engine = _initialize(
            network,
            {"train_micro_batch_size_per_gpu": 1, "zero_optimization": _zero(sharding), "bf16": {"enabled": half}},
        )
        self.network, self.device = engine, engine.device

    def close(self) -> None:
        """Let go of what DeepSpeed holds."""
        if self.network is not self.module:
            self.network.destroy()  # pyright: ignore[reportFunctionMemberAccess]


def _initialize(network: Network, config: dict[str, Any], trained: list[nn.Parameter] | None = None) -> Any:
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=network,
        model_parameters=trained,  # pyright: ignore[reportArgumentType]  # DeepSpeed's annotation is too narrow
        config=config,
    )
    if config["zero_optimization"]["stage"] == 3 and isinstance(network, PolicyNetwork):
        for parameter in network.head.borrowed():
            deepspeed.zero.register_external_parameter(network.head, parameter)
    return engine


class Engine:
    """A trainable network, its optimizer and its moving average, on one rank.

    Losses are sums divided by a count over *all* ranks, so gradients are summed over ranks, not averaged. `backward`
    is called one or more times before `step`, and equally often on every rank: micro-batches and the two terms of
    PPO-ptx add up.
    """

    def __init__(self, network: Network, config: OptimizerConfig, ema_decay: float | None = None) -> None:
        self.trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        self._layout = {
            "ranks": dist.get_world_size(),
            "zero_stage": config.zero_stage,
            "trained_parameters": sum(p.numel() for _, p in self.trained),
            "moving_average": ema_decay is not None,
        }
        half = next(network.parameters()).dtype == torch.bfloat16
        if half and config.zero_stage == 0:
            raise ValueError(
                "zero_stage = 0 with dtype = bfloat16 would add gradients up in bfloat16, without float32 master "
                "weights: use zero_stage = 1, which on one rank is the same otherwise"
            )
        self._parameters = [p for _, p in self.trained]
        settings = deepspeed_config(config, half, torch.cuda.is_available())
        self._engine = _initialize(network, settings, list(self._parameters))
        self.network: Callable[..., Any] = self._engine  # under DeepSpeed's hooks
        self.module: Network = self._engine.module
        self.device: torch.device = self._engine.device
        self._reduced = config.zero_stage >= 2  # gradients are summed over ranks in `backward` already
        self.ema_decay = ema_decay
        self._ema = [partition.clone() for partition in self._masters] if ema_decay is not None else []
        self._finite_losses = True
        self._config = config
        self._attempts, writer = Attempts(), self._engine.checkpoint_engine
        for owner, name in ((writer, "makedirs"), (writer, "save"), (self._engine, "_copy_recovery_script")):
            setattr(owner, name, self._attempts.noted(getattr(owner, name)))  # between DeepSpeed's own collectives

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` (a scalar, already divided by its global count) to the buffers."""
        self._finite_losses = self._finite_losses and bool(loss.isfinite())
        self._engine.backward(loss * self._engine.dp_world_size)  # DeepSpeed averages over ranks; we sum

    def gradients(self) -> list[Tensor]:
        """Copies of this rank's share of the gradients in float32, as they stand before `step` (for `norm`).

        Of a large one every k-th number: at 7 billion weights copies of all would be 28 GB.
        """
        return [buffer.detach().flatten()[:: _stride(buffer.numel())].float().clone() for buffer in self._gradients]

    def norm(self, gradients: list[Tensor]) -> float:
        """Global norm of the gradients that the ranks' shares make up, an estimate where they are samples of them.

        A collective: every rank calls it.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part, buffer in zip(gradients, self._gradients, strict=True):
            if not self._reduced:
                part = part.clone()  # the caller still needs this rank's own
                dist.all_reduce(part)
            total += part.double().square().sum().to(self.device) * (buffer.numel() / max(1, len(part)))
        if self._reduced:
            dist.all_reduce(total)
            return math.sqrt(float(total))
        return math.sqrt(float(total)) / dist.get_world_size()  # `backward` multiplied by the number of ranks

    def step(self, lr: float) -> float | None:
        """One Adam step with learning rate `lr`, then the moving average's; returns the gradient norm before clipping.

        None if a loss or a gradient of any rank was not finite: every rank then leaves the step out, and weights,
        optimizer and average stay bitwise as they were.
        """
        # A sum is finite where every number is, and takes no copy of a gradient as `isfinite` does.
        good = self._finite_losses and all(bool(b.sum().isfinite()) for b in self._gradients)
        finite = torch.tensor(float(good), device=self.device)
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        self._finite_losses = True
        if not finite.item():
            for buffer in self._gradients:
                buffer.zero_()
            return None
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
            if self._config.adam_style == "tf1":
                group["eps"] = tf1_eps(self._config.eps, self._config.beta2, self._engine.global_steps + 1)
        without_zero = not self._engine.zero_optimization()  # then DeepSpeed keeps no norm
        norm = self.norm(self.gradients()) if without_zero else None
        self._engine.step()
        clear_leftovers(self._engine.optimizer)
        if self.ema_decay is not None:
            ema_update(self._ema, self._masters, self.ema_decay)
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def master(self, parameter: nn.Parameter) -> Tensor:
        """All of a trained parameter in float32, as Adam updates it. A collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(parameter)
        return (full if full is not None else parameter).detach().float()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it `master` gives the moving average; the weights that the network computes with do not matter."""
        assert self.ema_decay is not None, "this network has no moving average"
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def save_state(self, folder: Path) -> None:
        """Write everything that the next step depends on: weights, optimizer, moving average, random numbers.

        DeepSpeed's own checkpoint without the frozen weights, and beside it a file a rank. A collective: when one rank
        cannot write, all raise NotSaved.
        """
        self._attempts.noted(folder.mkdir)(parents=True, exist_ok=True)
        self._engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True)
        own: dict[str, Any] = {"ema": self._ema, "rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        self._attempts.noted(torch.save)(own, folder / f"rank-{dist.get_rank()}.pt")
        if dist.get_rank() == 0:
            self._attempts.noted((folder / "layout.json").write_text)(json.dumps(self._layout, indent=2) + "\n")
        self._attempts.agree(folder)

    def load_state(self, folder: Path) -> None:
        """Go on from `save_state`, in an engine that was just made of the same network and configuration.

        Raises ValueError when there is no state or it was saved with other ranks, ZeRO stage or parameters.
        """
        layout = folder / "layout.json"
        if not layout.is_file():
            raise ValueError(f"{folder} holds no training state: {layout.name} is missing")
        saved = json.loads(layout.read_text())
        for key, value in self._layout.items():
            if saved.get(key) != value:
                raise ValueError(
                    f"the training state in {folder} was saved with {key} = {saved.get(key)}, this run has {value}: "
                    "resume with the configuration of the run that saved it"
                )
        self._engine.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=False)
        own = torch.load(folder / f"rank-{dist.get_rank()}.pt", map_location="cpu", weights_only=True)
        for average, kept in zip(self._ema, own["ema"], strict=True):
            average.copy_(kept)
        torch.set_rng_state(own["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"], self.device)

    def close(self) -> None:
        """Let go of what DeepSpeed holds."""
        self._engine.destroy()

    @property
    def _gradients(self) -> list[Tensor]:
        return gradients(self._engine.optimizer, self._parameters)

    @property
    def _masters(self) -> list[Tensor]:
        return master_weights(self._engine.optimizer, self._parameters)

    def _exchange(self) -> None:
        for master, average in zip(self._masters, self._ema, strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)


def _stride(numbers: int) -> int:
    """Every which of so many numbers is sampled; no usual factor of a layer, so that no column is left out."""
    stride = -(-numbers // _SAMPLE) or 1
    while math.gcd(stride, 2 * 3 * 5 * 7) > 1:
        stride += 1
    return stride
