"""One network under DeepSpeed: gradients of any number of losses into the same buffers, then one optimizer step."""

import json
import logging
import math
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
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
        self._layout = {
            "ranks": dist.get_world_size(),
            "zero_stage": config.zero_stage,
            "trained_parameters": sum(p.numel() for _, p in self.trained),
            "moving_average": ema_decay is not None,
        }
        self._finite_losses = True

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
        self._finite_losses = self._finite_losses and bool(loss.isfinite())
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

    def step(self, lr: float) -> float | None:
        """One Adam step with learning rate `lr`, then the moving average's; returns the gradient norm before clipping.

        None if a loss or a gradient of any rank was not finite: every rank then leaves the step out, and weights,
        optimizer and average stay bitwise as they were.
        """
        good = self._finite_losses and all(b.isfinite().all() for b in self._buffers)
        finite = torch.tensor(float(good), device=self.device)
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        self._finite_losses = True
        if not finite.item():
            for buffer in self._buffers:
                buffer.zero_()
            return None
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        norm = (
            None if self._engine.zero_optimization() else self.norm(self.gradients())
        )  # DeepSpeed keeps none without ZeRO
        self._engine.step()
        if self.ema_decay is not None:
            ema_update(self.ema.values(), (self._master(p) for _, p in self.trained), self.ema_decay)
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def save_state(self, folder: Path) -> None:
        """Write everything that the next step depends on: weights, optimizer, moving average, random numbers.

        DeepSpeed's own checkpoint without the frozen weights, and beside it a file a rank. A collective.
        """
        self._engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True)
        own: dict[str, Any] = {"ema": self.ema, "rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        torch.save(own, folder / f"rank-{dist.get_rank()}.pt")
        if dist.get_rank() == 0:
            (folder / "layout.json").write_text(json.dumps(self._layout, indent=2) + "\n")
        dist.barrier()

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
        for name, average in self.ema.items():
            average.copy_(own["ema"][name])
        torch.set_rng_state(own["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"], self.device)

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
