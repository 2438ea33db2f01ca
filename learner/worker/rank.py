"""What every rank of the learner has: networks by name, its share of a batch, and the way of weights out of it."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actors.transfer import Manifest, Rendezvous
from learner.config import NetworkConfig, OptimizerConfig, PublishConfig
from learner.data.batch import microbatches
from learner.weights.sender import NcclWeightSender, WeightSender
from learner.worker.dropout import add_residual_dropout
from learner.worker.engine import Engine, Frozen, init_distributed, whole, whole_shape
from learner.worker.networks import PolicyNetwork, load_network, merged_weights, save_network, weight_shapes
from reward_server.address import free_port, own_address
from reward_server.encoding import ChatEncoding


class Rank:
    """One process of the learner, with networks that it trains and networks that it only reads."""

    def __init__(self, rank: int, world_size: int, threads: int, direct: bool = False) -> None:
        """`direct`: weights go to the generators' GPUs over NCCL; otherwise through main memory over gloo."""
        self.rank = rank
        self.world_size = world_size
        self.threads = threads
        self.direct = direct
        self.version = 0
        """PPO updates that the policy has had."""
        self._engines: dict[str, Engine] = {}
        self._frozen: dict[str, Frozen] = {}
        self._tokenizers: dict[str, ChatEncoding] = {}
        self._host = "127.0.0.1"
        self._sender: WeightSender

    def meeting_point(self, loopback: bool) -> tuple[str, int]:
        """An address and a free port of this machine, where the ranks can meet."""
        self._host = own_address(loopback)
        return self._host, free_port(self._host)

    def start(self, address: str, port: int, deadline_s: float) -> None:
        """Join the other ranks at `address:port` within `deadline_s` seconds."""
        torch.set_num_threads(self.threads)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        init_distributed(self.rank, self.world_size, address, port, deadline_s)

    def load(
        self,
        name: str,
        kind: Literal["policy", "value", "new_value"],
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
        torch.manual_seed(0)  # LoRA adapters start alike on every rank and in every run
        module = load_network(kind, path, network)
        torch.manual_seed(self.rank)  # what is random from here on (dropout) differs between ranks
        if residual_dropout:
            add_residual_dropout(module.model, residual_dropout)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)  # before they are sharded
        if optimizer is None or frozen:
            self._frozen[name], trained = Frozen(module, optimizer), 0
        else:
            self._engines[name] = Engine(module, optimizer, ema_decay)
        self._tokenizers[name] = ChatEncoding.load(path, chat_template)
        return trained

    def unload(self) -> None:
        """Forget every network."""
        for held in (*self._engines.values(), *self._frozen.values()):
            held.close()
        for store in (self._engines, self._frozen, self._tokenizers):
            store.clear()
        self.version = 0

    def save(self, name: str, path: Path, ema: bool = False) -> None:
        """Write the network (or its moving average) as a plain Hugging Face folder, from rank 0. A collective."""
        if ema:
            engine = self._engines[name]
            with engine.averaged():
                self._write(name, path, lambda p: engine.master(p) if p.requires_grad else whole(p))
        else:
            self._write(name, path, whole)

    def _write(self, name: str, path: Path, read: Callable[[nn.Parameter], Tensor]) -> None:
        model = self._held(name).module.model
        weights = merged_weights(model, read)
        if self.rank == 0:
            save_network(model, self._tokenizers[name], path, weights)
        _drain(weights)

    def save_state(self, folder: Path) -> None:
        """Write the training state of every network under `folder`/<name>; frozen ones have none."""
        for name, engine in self._engines.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            engine.save_state(folder / name)

    def load_state(self, folder: Path, version: int) -> None:
        """Go on from `save_state` of that version, after `load` of the same networks.

        Raises ValueError for another layout.
        """
        self.version = version
        for name, engine in self._engines.items():
            engine.load_state(folder / name)

    def open_sender(self, config: PublishConfig) -> None:
        """Prepare to send weights from this rank."""
        sender = NcclWeightSender if self.direct else WeightSender
        self._sender = sender(config.bucket_mb, config.deadline_s, self._host)

    def listen_transfer(self, world_size: int, epoch: int) -> Rendezvous:
        """Open the meeting point of a transfer group (see WeightSender)."""
        return self._sender.listen(world_size, epoch)

    def connect_transfer(self) -> None:
        """Meet the generators."""
        self._sender.connect()

    def transfer_manifest(self) -> Manifest:
        """What will be sent."""
        return self._sender.manifest(weight_shapes(self._held("policy").module.model, whole_shape))

    def send_weights(self) -> dict[str, int]:
        """Send the policy's merged weights to every generator; returns each tensor's checksum, on rank 0.

        A collective: where weights are sharded, the other ranks take part in gathering them, to the end even if
        sending fails.
        """
        weights = self.weights()
        try:
            return self._sender.send(self.transfer_manifest(), weights) if self.rank == 0 else {}
        finally:
            _drain(weights)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's merged weights under their Hugging Face names. A collective."""
        return merged_weights(self._held("policy").module.model, whole)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return next(held.device for held in (*self._engines.values(), *self._frozen.values()))

    def _held(self, name: str) -> Engine | Frozen:
        return self._engines[name] if name in self._engines else self._frozen[name]

    def _call(self, name: str, ids: Tensor, *places: Tensor | float) -> Any:
        held = self._held(name)
        return held.network(*(p.to(held.device) if isinstance(p, Tensor) else p for p in (ids, *places)))

    def _idle(self, name: str) -> None:
        """Read one token for nothing, and learn nothing from it where gradients are on.

        Every rank runs as many forward and backward passes as the others: from ZeRO 2 on they meet in each.
        """
        nowhere = torch.zeros(1, dtype=torch.long)
        if isinstance(self._held(name).module, PolicyNetwork):
            answer, _ = self._call(name, nowhere[None], nowhere, nowhere, nowhere)
        else:
            answer = self._call(name, nowhere[None], nowhere, nowhere)
        if answer.requires_grad:
            self._engines[name].backward(answer.sum() * 0.0)

    def _share(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        return microbatches(lengths, max_tokens, self.world_size)[self.rank]


def _drain(weights: Iterator[tuple[str, Tensor]]) -> None:
    for _ in weights:
        pass
