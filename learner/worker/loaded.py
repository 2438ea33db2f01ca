"""The networks that one rank of the learner has loaded, by name: to train, or only to read."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learner.config import NetworkConfig, OptimizerConfig
from learner.data.batch import microbatches
from learner.worker.dropout import add_residual_dropout
from learner.worker.engine import Attempts, Engine, Frozen, whole
from learner.worker.networks import Network, PolicyNetwork, load_network, merged_weights, save_network
from learner.worker.trunk import SharedTrunks
from reward_server.config import UNTRUSTED, LoadingConfig
from reward_server.encoding import ChatEncoding
from reward_server.packing import packs
from reward_server.pretrained import Kind


class LoadedNetworks:
    """Networks, and this rank's share of what they compute."""

    def __init__(self, rank: int, world_size: int, loading: LoadingConfig = UNTRUSTED) -> None:
        self.rank = rank
        self.world_size = world_size
        self.loading = loading
        self._loaded: dict[str, Engine | Frozen] = {}
        self._encodings: dict[str, ChatEncoding] = {}

    def load(
        self,
        name: str,
        kind: Kind,
        path: Path,
        network: NetworkConfig,
        optimizer: OptimizerConfig | None = None,
        ema_decay: float | None = None,
        chat_template: str | None = None,
        residual_dropout: float = 0.0,
        frozen: bool = False,
    ) -> int:
        """Load a network under `name` to train with `optimizer`; returns how many parameters are trained.

        A `frozen` one, or one without `optimizer`, is only read; at ZeRO 3 `optimizer` says that it is sharded too.
        `chat_template` is saved with it in place of its own; `residual_dropout` acts in supervised training only.
        """
        if frozen := frozen or optimizer is None:
            network = network.model_copy(update={"lora_rank": 0})  # adapters that nobody trains add 0
        torch.manual_seed(0)  # LoRA adapters start alike on every rank and in every run
        module = load_network(kind, path, network, self.loading)
        torch.manual_seed(self.rank)  # what is random from here on (dropout) differs between ranks
        if residual_dropout:
            add_residual_dropout(module.model, residual_dropout)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)  # before they are sharded
        if frozen or optimizer is None:
            self._loaded[name], trained = Frozen(module, optimizer), 0
        else:
            self._loaded[name] = Engine(module, optimizer, ema_decay)
        self._encodings[name] = ChatEncoding.load(path, self.loading, chat_template)
        self.__dict__.pop("trunks", None)
        return trained

    def unload(self) -> None:
        """Forget every network."""
        for loaded in self._loaded.values():
            loaded.close()
        self._loaded.clear()
        self._encodings.clear()
        self.__dict__.pop("trunks", None)

    @cached_property
    def trunks(self) -> SharedTrunks:
        """Layers that are computed once for all networks that have them."""
        return SharedTrunks({name: loaded.module.model for name, loaded in self._loaded.items()})

    def save(self, name: str, path: Path, ema: bool = False) -> None:
        """Write the network (or its moving average) as a plain Hugging Face folder, from rank 0. A collective.

        Raises NotSaved, on every rank, when it cannot be written.
        """
        if ema:
            engine = self.engine(name)
            with engine.averaged():
                self._write(name, path, lambda p: engine.master(p) if p.requires_grad else whole(p))
        else:
            self._write(name, path, whole)

    def _write(self, name: str, path: Path, read: Callable[[nn.Parameter], Tensor]) -> None:
        model = self.module(name).model
        weights = merged_weights(model, read)
        attempts = Attempts()
        if self.rank == 0:
            attempts.noted(save_network)(model, self._encodings[name], path, weights)
        for _ in weights:  # the other ranks take part in gathering them
            pass
        attempts.agree(path)

    def save_state(self, folder: Path) -> None:
        """Write the training state of every network under `folder`/<name>; frozen ones have none. Raises NotSaved."""
        for name, engine in self._engines():
            engine.save_state(folder / name)

    def load_state(self, folder: Path) -> None:
        """Go on from `save_state`, after `load` of the same networks. Raises ValueError for another layout."""
        for name, engine in self._engines():
            engine.load_state(folder / name)

    def weights(self, name: str = "policy") -> Iterator[tuple[str, Tensor]]:
        """A network's merged weights under their Hugging Face names. A collective, to be gone through to the end."""
        return merged_weights(self.module(name).model, whole)

    def engine(self, name: str) -> Engine:
        """A network that is trained."""
        engine = self._loaded[name]
        assert isinstance(engine, Engine), f"{name} is only read"
        return engine

    def module(self, name: str) -> Network:
        """A bare network."""
        return self._loaded[name].module

    def __contains__(self, name: str) -> bool:
        return name in self._loaded

    def call(self, name: str, sequences: Sequence[Tensor], *places: Tensor | float, again: bool = False) -> Any:
        """What a network says of sequences, each i64 [S], at places in them (see PolicyNetwork and ValueNetwork).

        `again`: they are read more than once, so what its trunk gives is kept until `trunks.forget`.
        """
        network, device = self._loaded[name].network, self._loaded[name].device
        ids, lengths = torch.cat(list(sequences)).to(device), [len(ids) for ids in sequences]
        with self.trunks.given(name, sequences) if again else contextlib.nullcontext():
            return network(ids, lengths, *(p.to(device) if isinstance(p, Tensor) else p for p in places))

    def microbatches(self, lengths: Sequence[int], max_tokens: int, *names: str) -> Iterator[list[int]]:
        """This rank's micro-batches of sequences, as their numbers; each is to pass through the networks `names`.

        Every rank runs as many forward and backward passes as the others: from ZeRO 2 on they meet in each. Where the
        others have more, this one reads one token for nothing, and learns nothing from it where gradients are on.
        """
        models = [
            loaded.module.model for loaded in self._loaded.values()
        ]  # all: what is read is cut as what is trained
        width = min(model.config.get_text_config().hidden_size for model in models)
        padded = not all(map(packs, models))
        for micro in microbatches(lengths, max_tokens, self.world_size, width, padded)[self.rank]:
            if micro:
                yield micro
                continue
            for name in names:
                self._idle(name)

    def step(self, name: str, lr: float, sums: dict[str, float], suffix: str = "") -> dict[str, float]:
        """Take the optimizer step: `sums` with its gradient norm, or no sums but that and why it was skipped."""
        norm = self.engine(name).step(lr)
        if norm is not None:
            return {f"grad_norm{suffix}": norm / self.world_size} | sums
        told = ("nll", "loss", "grad_norm")
        culprits = [key for key, value in sums.items() if key.startswith(told) and not math.isfinite(value)]
        culprits = culprits or [f"grad_norm{suffix}"]  # no sum of it, as the step had taken it
        times = {key: value for key, value in sums.items() if key.startswith("time/")}
        return {
            f"skipped{suffix}": 1.0 / self.world_size,
            **{f"nonfinite{suffix}/{key}": 1.0 for key in culprits},
        } | times

    def _engines(self) -> list[tuple[str, Engine]]:
        return [(name, loaded) for name, loaded in self._loaded.items() if isinstance(loaded, Engine)]

    def _idle(self, name: str) -> None:
        nowhere = torch.zeros(1, dtype=torch.long)
        if isinstance(self.module(name), PolicyNetwork):
            answer, _ = self.call(name, [nowhere], nowhere, nowhere)
        else:
            answer = self.call(name, [nowhere], nowhere)
        if answer.requires_grad:
            self.engine(name).backward(answer.sum() * 0.0)
