"""How long each phase of a step takes at least, and about how long to expect."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.config.schema import Config
from cluster.plan.batches import Batches
from cluster.plan.counts import Lengths, PPOPlan, StepsPlan
from cluster.plan.estimates import (
    ADAM_TRAFFIC,
    PUBLISH_CPU,
    Rates,
    Training,
    decode_seconds,
    forward_seconds,
    ring_seconds,
    training_seconds,
    transfer_seconds,
)
from cluster.plan.hardware import Machine
from cluster.plan.memory import Models, networks
from cluster.plan.shapes import Shape
from cluster.runtime.resources import Process
from learner.config import NetworkConfig

Pace = Callable[[Shape, Process, Machine, bool], Rates]
"""(shape, process, machine, wide) -> what the process reaches of its peak with such a model; wide: in float32"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of a step."""

    name: str
    """what happens"""
    least: float
    """seconds at the device's peak"""
    expected: float
    """seconds at the share of the peak that a run is expected to reach"""
    formula: str
    """what it was computed from, in the words of cluster.estimates"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What one process computes with."""

    flops: float
    """operations a second"""
    bandwidth: float
    """bytes a second from memory"""


def speed(process: Process, machine: Machine, wide: bool) -> Speed:
    """A process' whole GPUs (those that share one take turns), or its threads' part of the cores.

    `wide`: float32, at half of the rate of bfloat16 (TF32 on GPUs; a CPU with avx512_bf16 measured 0.43).
    """
    device = machine.device
    part = max(1, math.floor(process.gpus)) if machine.gpus else min(1.0, process.threads / machine.cpus)
    return Speed(flops=device.flops * part / (2 if wide else 1), bandwidth=device.bandwidth * part)


def iteration_seconds(phases: Sequence[Phase], max_staleness: int) -> tuple[float, float]:
    """(least, expected) seconds of an iteration: the sum, or where rollout and learning overlap the longer of both."""

    def total(which: str) -> float:
        rollout = sum(getattr(phase, which) for phase in phases if phase.name in ("generate", "score"))
        rest = sum(getattr(phase, which) for phase in phases) - rollout
        return max(rollout, rest) if max_staleness else rollout + rest

    return total("least"), total("expected")


class Clock:
    """What the seconds of a run's phases depend on."""

    def __init__(
        self,
        config: Config,
        models: Models,
        lengths: Lengths,
        at: Mapping[str, tuple[Process, Machine]],
        cached: int,
        pace: Pace,
    ) -> None:
        """`at`: where each process is; `cached`: tokens whose keys and values an engine can hold."""
        self.config = config
        self.models = models
        self.lengths = lengths
        self.at = at
        self.cached = cached
        self.pace = pace

    def phases(self, step: str, batches: Batches) -> list[Phase]:
        """The phases of a step, in order: of one PPO iteration, of one model's turn in `select`, else of all of it."""
        if isinstance(batches, PPOPlan):
            return self._iteration(batches)
        if isinstance(batches, StepsPlan):
            return [self._tuning(step, batches)]
        scored = self._score(batches.sequence_tokens) if step != "sample" else []
        found = [self._generate(batches.episodes, batches.samples), *scored]
        if step == "evaluate":
            found.append(self._read("log-probs", "evaluate", batches.sequence_tokens, 1))
        return found

    def batch_of_scores(self) -> list[Phase]:
        """A full batch of the reward service; nothing where no model computes."""
        return self._score(self.config.scoring.max_batch_tokens)

    def _iteration(self, batches: PPOPlan) -> list[Phase]:
        policy, _, critic = networks(self.config, self.models, "ppo")
        ppo = self.config.ppo
        text = batches.pretraining_microbatches if batches.pretraining_sequences else 0
        tokens = batches.episode_tokens * batches.epochs
        return [
            self._generate(batches.episodes, batches.samples),
            *self._score(batches.episode_tokens),
            self._read("evaluate", "ppo", batches.episode_tokens, batches.minibatches * batches.microbatches),
            self._update(
                policy,
                self.models.policy,
                ppo.network,
                tokens + batches.pretraining_tokens,
                (self._asked * tokens + batches.pretraining_tokens) / (tokens + batches.pretraining_tokens),
                batches.steps,
                batches.steps * (batches.microbatches + text),
            ),
            self._update(
                critic, self.models.reward, ppo.critic, tokens, 0, batches.steps, batches.steps * batches.microbatches
            ),
            self._publish(),
        ]

    def _tuning(self, step: str, batches: StepsPlan) -> Phase:
        section = getattr(self.config, step)
        (network,) = networks(self.config, self.models, step)
        shape = self.models.reward if step == "reward" else self.models.policy
        passes = batches.steps * batches.microbatches
        asked = self._asked + (1 - self._asked) * batches.pretraining  # all of a text is learnt, of a reply the reply
        return self._update(network, shape, section.network, batches.total_tokens, asked, batches.steps, passes)

    def _generate(self, episodes: int, samples: int) -> Phase:
        """Rounds of prefill and decoding: as many sequences at once as waves, engine and its cache allow."""
        config, shape, lengths = self.config, self.models.policy, self.lengths
        process, machine = self.at["generator-0"]
        wide = config.generator.dtype == "float32"
        device, rates = speed(process, machine, wide), self.pace(shape, process, machine, wide)
        each = -(-episodes // config.cluster.generators)
        wave = config.rollout.prompts_per_wave * samples * config.rollout.waves_in_flight
        room = self.cached // max(1, lengths.prompt + lengths.longest)
        at_once = max(1, min(wave, config.generator.max_num_seqs, each, room))
        rounds = math.ceil(each / at_once)
        context, width = lengths.prompt + lengths.response / 2, 4 if wide else 2
        # Responses end one by one, so fewer sequences are decoded in a step on average than at first.
        running = at_once * lengths.response / lengths.longest
        prefill = forward_seconds(shape.body, at_once * lengths.prompt, device.flops)

        def seconds(flops: float, bandwidth: float) -> float:
            return lengths.longest * decode_seconds(shape, width, running, context, flops, bandwidth)

        least = rounds * (prefill + seconds(device.flops, device.bandwidth))
        decode = seconds(device.flops * rates.decode, device.bandwidth * rates.read)
        beside = lengths.longest * rates.step_s(running)
        return Phase(
            name="generate",
            least=least,
            expected=rounds * (prefill / rates.forward + decode + beside),
            formula=f"{rounds} x ({at_once} prompts, {lengths.longest} steps)",
        )

    def _score(self, tokens: int) -> list[Phase]:
        scoring, shape = self.config.scoring, self.models.reward
        size = sum(part.kind == "model" for part in scoring.parts) * shape.body
        process, machine = self.at["reward-0"]
        if not size or (machine.gpus and not process.gpus):  # how fast the cores of such a machine are, nobody knows
            return []
        wide = scoring.dtype == "float32"
        seconds = forward_seconds(size, tokens, speed(process, machine, wide).flops) / self._replicas()
        share = self.pace(shape, process, machine, wide).forward
        return [Phase(name="score", least=seconds, expected=seconds / share, formula="2 N T / F: reward model")]

    def _replicas(self) -> int:
        """Reward replicas that compute at once: each scores a wave of its own; 1 without generators."""
        replicas, generators = (sum(name.startswith(kind) for name in self.at) for kind in ("reward-", "generator-"))
        return min(replicas, generators * self.config.rollout.waves_in_flight) or 1

    def _read(self, name: str, step: str, tokens: int, passes: int) -> Phase:
        """A forward pass of all networks on the learner, without gradients."""
        found = networks(self.config, self.models, step)
        ranks, link = self.config.cluster.learner_ranks, self._learner_link()
        process, machine = self.at["learner-0"]
        wide = self.config.ppo.network.dtype == "float32"
        flops = speed(process, machine, wide).flops
        sizes = [self._computing(one.name, self._asked) for one in found]
        seconds = forward_seconds(sum(sizes), tokens / ranks, flops)
        moved = sum(_gathering(one, passes, link) for one in found)
        share = self.pace(self.models.policy, process, machine, wide).forward
        formula = f"2 N T / F: {', '.join(one.name for one in found)}"
        return Phase(name=name, least=seconds + moved, expected=seconds / share + moved, formula=formula)

    def _update(
        self,
        network: Training,
        shape: Shape,
        trains: NetworkConfig,
        tokens: float,
        asked: float,
        steps: int,
        passes: int,
    ) -> Phase:
        """`asked`: share of the tokens for which the output head computes."""
        ranks, link = self.config.cluster.learner_ranks, self._learner_link()
        process, machine = self.at["learner-0"]
        wide = trains.dtype == "float32"
        device, rates = speed(process, machine, wide), self.pace(shape, process, machine, wide)
        size = self._computing(network.name, asked)
        reached = size - shape.body * (1 - (trains.last_layers or shape.layers) / shape.layers)
        trained, share = min(network.trained, size), tokens / ranks
        below = forward_seconds(size - reached, share, device.flops)  # layers that are only read
        seconds = training_seconds(reached, trained, share, device.flops)
        if trains.gradient_checkpointing:
            seconds += forward_seconds(reached, share, device.flops)
        expected = below / rates.forward + seconds / rates.training * (1 + rates.sharding * trained / size)
        adam = steps * ADAM_TRAFFIC * network.trained / (ranks if network.stage else 1) / device.bandwidth
        moved = steps * ring_seconds(4 * network.trained, ranks, link) + _gathering(network, 2 * passes, link)
        return Phase(
            name=f"update {network.name}",
            least=below + seconds + adam + moved,
            expected=expected + adam / rates.read + moved,
            formula="up to 6 N T / F, and Adam's memory",
        )

    @property
    def _asked(self) -> float:
        """Share of the tokens of a prompt with its response whose log-probs are asked for."""
        return self.lengths.response / self.lengths.sequence

    def _computing(self, name: str, asked: float) -> float:
        """Parameters of a network that compute for a token, its output head counted where it is asked for."""
        if name in ("critic", "reward"):
            return self.models.reward.body
        return self.models.policy.body + asked * self.models.policy.output

    def _publish(self) -> Phase:
        size = self.models.policy.parameters * (4 if self.config.ppo.network.dtype == "float32" else 2)
        least = transfer_seconds(size, self._publish_link())
        _, machine = self.at["learner-0"]
        handled = 0.0 if machine.gpus else PUBLISH_CPU * size
        formula = "N b / link" + (", and a CPU's work on it" if handled else "")
        return Phase(name="publish", least=least, expected=least + handled, formula=formula)

    def _learner_link(self) -> float:
        return self._link([machine for name, (_, machine) in self.at.items() if name.startswith("learner-")])

    def _publish_link(self) -> float:
        names = ("generator-", "learner-0")
        return self._link([machine for name, (_, machine) in self.at.items() if name.startswith(names)])

    def _link(self, machines: Sequence[Machine]) -> float:
        """Bytes a second between neighbours of one machine, or over the network where there are several."""
        alone = len({machine.name for machine in machines}) == 1
        return machines[0].device.link if alone else self.config.plan.network_gb_s * 1e9


def _gathering(network: Training, passes: int, link: float) -> float:
    """ZeRO-3 gathers the weights in every pass: all but a rank's own part cross its link."""
    if network.stage < 3 or network.ranks == 1:
        return 0.0
    return passes * transfer_seconds(network.weight_bytes * network.parameters * (1 - 1 / network.ranks), link)
