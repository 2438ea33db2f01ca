"""One network under DeepSpeed: gradients of any number of losses into the same buffers, then one optimizer step."""

import logging
import math
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from learner.config import OptimizerConfig
from learner.networks import Network
from learner.schedules import ema_update


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


class Engine:
    """A trainable network, its optimizer and its moving average, on one rank.

    Losses are sums divided by a count over *all* ranks, so gradients are summed over ranks, not averaged. `backward`
    may be called any number of times before `step`: micro-batches and the two terms of PPO-ptx add up.
    """

    def __init__(self, network: Network, config: OptimizerConfig, ema_decay: float | None = None) -> None:
        import deepspeed

        trained = [p for p in network.parameters() if p.requires_grad]
        half = next(network.parameters()).dtype == torch.bfloat16
        if half and config.zero_stage == 0:
            raise ValueError(
                "zero_stage = 0 with dtype = bfloat16 keeps a second, slow set of gradients: use zero_stage = 1"
            )
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=network,
            model_parameters=trained,  # pyright: ignore[reportArgumentType]  # DeepSpeed's annotation is too narrow
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "managed_gradient_accumulation": False,  # `step` alone ends an accumulation
                "zero_optimization": {"stage": config.zero_stage, "overlap_comm": False},
                "bf16": {"enabled": half},
                "data_types": {"grad_accum_dtype": "fp32"},
                "gradient_clipping": config.clip_grad_norm,
                "zero_allow_untested_optimizer": True,
                "optimizer": {
                    "type": "Adam",
                    "params": {
                        "lr": config.lr,
                        "betas": [config.beta1, config.beta2],
                        "eps": config.eps,
                        "weight_decay": 0.0,
                        "torch_adam": True,  # DeepSpeed's own CPU Adam compiles C++ for minutes at first use
                    },
                },
                "steps_per_print": 10**9,
            },
        )
        self.trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        self.ema_decay = ema_decay
        self.ema = {name: self._master(p).clone() for name, p in self.trained} if ema_decay is not None else {}

    @property
    def network(self) -> Callable[..., Any]:
        """The network to call, under DeepSpeed's hooks."""
        return self._engine

    @property
    def module(self) -> Network:
        """The bare network."""
        return self._engine.module

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self._engine.device

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` (a scalar, already divided by its global count) to the buffers."""
        self._engine.backward(loss * self._engine.dp_world_size)  # DeepSpeed averages over ranks; we sum

    def gradients(self) -> list[Tensor]:
        """Copies of this rank's accumulated gradients, in float32, as they stand before `step`."""
        return [buffer.detach().float().clone() for buffer in self._buffers]

    def norm(self, gradients: list[Tensor]) -> float:
        """Global norm of the gradients summed over ranks. A collective: every rank calls it."""
        total = 0.0
        for gradient in gradients:
            summed = gradient.clone()  # the caller still needs this rank's part
            dist.all_reduce(summed)
            total += float(summed.double().square().sum())
        return math.sqrt(total) / dist.get_world_size()  # `backward` multiplied by the number of ranks

    def step(self, lr: float) -> float:
        """One Adam step with learning rate `lr`, then the moving average's; returns the gradient norm before clipping.

        Raises FloatingPointError on every rank, with the weights untouched, if any rank's gradient is not finite.
        """
        finite = torch.tensor(float(all(b.isfinite().all() for b in self._buffers)), device=self.device)
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite.item():
            self._engine.optimizer.zero_grad()
            raise FloatingPointError("the gradient is not finite: the optimizer step was not taken")
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        norm = (
            None if self._engine.zero_optimization() else self.norm(self.gradients())
        )  # DeepSpeed keeps none without ZeRO
        self._engine.step()
        if self.ema_decay is not None:
            ema_update(self.ema.values(), (self._master(p) for _, p in self.trained), self.ema_decay)
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    @property
    def _buffers(self) -> list[Tensor]:
        """Where this rank's gradients add up: DeepSpeed's float32 copies beside bfloat16 weights, else `.grad`.

        What no loss has reached counts as zeros: a rank without a micro-batch still takes part in every sum over ranks.
        """
        float32 = getattr(self._engine.optimizer, "fp32_groups_gradients_flat", None)
        if float32:
            for reached in self._engine.optimizer.fp32_groups_has_gradients:
                reached[:] = [True] * len(reached)
            return float32
        unreached = [p for _, p in self.trained if p.grad is None]
        if unreached:
            self.backward(torch.stack([p.flatten()[0] for p in unreached]).sum() * 0.0)
        return [p.grad for _, p in self.trained if p.grad is not None]

    def _master(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(parameter)
        return (full if full is not None else parameter).detach().float()
