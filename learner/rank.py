"""What every rank of the learner has: networks by name, its share of a batch, and the way of weights out of it."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from actors.transfer import Manifest, Rendezvous
from learner.batch import microbatches
from learner.config import NetworkConfig, OptimizerConfig, PublishConfig
from learner.dropout import add_residual_dropout
from learner.engine import Engine, init_distributed
from learner.networks import Network, load_network, merged_weights, save_network
from learner.sender import NcclWeightSender, WeightSender
from reward_server.address import free_port, own_address
from reward_server.encoding import ChatEncoding


class Rank:
    """One process of the learner, with networks that it trains and networks that it only reads."""

    def __init__(self, rank: int, world_size: int, threads: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.threads = threads
        self._engines: dict[str, Engine] = {}
        self._frozen: dict[str, Network] = {}
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
    ) -> int:
        """Load a network under `name`, to train with `optimizer` or frozen without; returns its trained parameters.

        `chat_template` is saved with it in place of its own; `residual_dropout` acts in supervised training only.
        """
        torch.manual_seed(0)  # LoRA adapters start alike on every rank and in every run
        module = load_network(kind, path, network)
        torch.manual_seed(self.rank)  # what is random from here on (dropout) differs between ranks
        if residual_dropout:
            add_residual_dropout(module.model, residual_dropout)
        if optimizer is None:
            module.requires_grad_(False)
            self._frozen[name] = module.to("cuda" if torch.cuda.is_available() else "cpu")
        else:
            self._engines[name] = Engine(module, optimizer, ema_decay)
        self._tokenizers[name] = ChatEncoding.load(path, chat_template)
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    def unload(self) -> None:
        """Forget every network."""
        for store in (self._engines, self._frozen, self._tokenizers):
            store.clear()

    def save(self, name: str, path: Path, ema: bool = False) -> None:
        """Write the network (or its moving average) as a plain Hugging Face folder, from rank 0."""
        network = self._network(name)
        averages = self._engines[name].ema if ema else {}
        if self.rank == 0:
            replace = {key.removeprefix("model."): value for key, value in averages.items()}
            save_network(network.model, self._tokenizers[name].tokenizer, path, replace)

    def save_state(self, folder: Path) -> None:
        """Write the training state of every network under `folder`/<name>; frozen ones have none."""
        for name, engine in self._engines.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            engine.save_state(folder / name)

    def load_state(self, folder: Path) -> None:
        """Go on from `save_state`, after `load` of the same networks. Raises ValueError for another layout."""
        for name, engine in self._engines.items():
            engine.load_state(folder / name)

    def open_sender(self, config: PublishConfig) -> None:
        """Prepare rank 0 to send weights."""
        sender = NcclWeightSender if torch.cuda.is_available() else WeightSender
        self._sender = sender(config.bucket_mb, config.deadline_s, self._host)

    def listen_transfer(self, world_size: int, epoch: int) -> Rendezvous:
        """Open the meeting point of a transfer group (see WeightSender)."""
        return self._sender.listen(world_size, epoch)

    def connect_transfer(self) -> None:
        """Meet the generators."""
        self._sender.connect()

    def transfer_manifest(self) -> Manifest:
        """What will be sent."""
        return self._sender.manifest(self.weights())

    def send_weights(self) -> dict[str, int]:
        """Send the policy's merged weights to every generator; returns each tensor's checksum."""
        return self._sender.send(self.weights())

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """The policy's merged weights under their Hugging Face names."""
        return merged_weights(self._network("policy").model)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return next(iter(self._engines.values())).device

    def _network(self, name: str) -> Network:
        return self._engines[name].module if name in self._engines else self._frozen[name]

    def _call(self, name: str, ids: Tensor, *places: Tensor | float) -> Tensor:
        network = self._engines[name].network if name in self._engines else self._frozen[name]
        device = next(self._network(name).parameters()).device
        return network(ids.to(device), *(p.to(device) if isinstance(p, Tensor) else p for p in places))

    def _share(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        return microbatches(lengths, max_tokens, self.world_size)[self.rank]
