"""One rank of the learner, as the process that it is: networks, the steps that the loops ask of them, and a sender."""

import logging
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch

from actors.chat import ChatExample
from actors.transfer import Manifest, Rendezvous
from learner.config import PublishConfig
from learner.data.batch import Batch
from learner.maths.losses import add_sums
from learner.weights.sender import NcclWeightSender, WeightSender
from learner.worker import ppo_steps, supervised
from learner.worker.engine import init_distributed, whole_shape
from learner.worker.loaded import LoadedNetworks
from learner.worker.networks import changing_weights, weight_shapes
from learner.worker.ppo_steps import PPOStep, Targets
from reward_server.address import free_port, own_address
from reward_server.config import UNTRUSTED, LoadingConfig

P = ParamSpec("P")
T = TypeVar("T")


def _with_networks(step: Callable[Concatenate[LoadedNetworks, P], T]) -> Callable[Concatenate["LearnerWorker", P], T]:
    """A step as a method of the worker that has the networks."""

    @wraps(step)
    def method(self: "LearnerWorker", *args: P.args, **settings: P.kwargs) -> T:
        return step(self.networks, *args, **settings)

    return method


class LearnerWorker:
    """One rank's part of every step. Its methods are called in the same order on every rank."""

    def __init__(
        self, rank: int, world_size: int, threads: int, direct: bool = False, loading: LoadingConfig = UNTRUSTED
    ) -> None:
        """`direct`: weights go to the generators' GPUs over NCCL; otherwise through main memory over gloo."""
        self.networks = LoadedNetworks(rank, world_size, loading)
        self.threads = threads
        self.direct = direct
        self.version = 0
        """PPO updates that the policy has had."""
        self._host = "127.0.0.1"
        self._sender: WeightSender

    load = _with_networks(LoadedNetworks.load)
    save = _with_networks(LoadedNetworks.save)
    save_state = _with_networks(LoadedNetworks.save_state)
    weights = _with_networks(LoadedNetworks.weights)
    language_model_loss = _with_networks(supervised.language_model_loss)
    language_model_step = _with_networks(supervised.language_model_step)
    ranking_step = _with_networks(supervised.ranking_step)
    last_values = _with_networks(supervised.last_values)
    normalise = _with_networks(supervised.normalise)
    evaluate = _with_networks(ppo_steps.evaluate)
    response_logprobs = _with_networks(ppo_steps.response_logprobs)
    probe_logprobs = _with_networks(ppo_steps.probe_logprobs)

    def meeting_point(self, loopback: bool) -> tuple[str, int]:
        """An address and a free port of this machine, where the ranks can meet."""
        self._host = own_address(loopback)
        return self._host, free_port(self._host)

    def start(self, address: str, port: int, deadline_s: float) -> None:
        """Join the other ranks at `address:port` within `deadline_s` seconds."""
        torch.set_num_threads(self.threads)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        init_distributed(self.networks.rank, self.networks.world_size, address, port, deadline_s)

    def update(
        self,
        batch: Batch,
        targets: Targets,
        minibatches: Sequence[list[int]],
        pretraining: Sequence[Sequence[ChatExample]],
        step: PPOStep,
    ) -> list[dict[str, float]]:
        """The optimizer steps of one PPO iteration, a policy and a critic step a minibatch; sums of each minibatch."""
        results = []
        for rows, text in zip(minibatches, pretraining, strict=True):
            policy = ppo_steps.policy_step(self.networks, batch, targets, rows, text, step)
            results.append(add_sums([policy, ppo_steps.critic_step(self.networks, batch, targets, rows, step)]))
        self.version += 1
        return results

    def unload(self) -> None:
        """Forget every network, to make room for the next step's."""
        self.networks.unload()
        self.version = 0

    def load_state(self, folder: Path, version: int) -> None:
        """Go on from `save_state` of that version, after `load` of the same networks.

        Raises ValueError for another layout.
        """
        self.version = version
        self.networks.load_state(folder)

    def stats(self) -> dict[str, float]:
        """What a run's status shows, from any thread: the version, where PPO's networks are loaded."""
        return {"version": float(self.version)} if "critic" in self.networks else {}

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
        """What will be sent: all to a new group, later what training changes."""
        model = self.networks.module("policy").model
        return self._sender.manifest(weight_shapes(model, whole_shape), changing_weights(model))

    def send_weights(self) -> dict[str, int]:
        """Send what the manifest has of the policy's merged weights to every generator.

        Returns the checksum of all of them, on rank 0. A collective: where weights are sharded, the other ranks take
        part in gathering them, to the end even if sending fails.
        """
        weights = self.networks.weights()
        try:
            return self._sender.send(self.transfer_manifest(), weights) if self.networks.rank == 0 else {}
        finally:
            for _ in weights:
                pass
