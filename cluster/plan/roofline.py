"""How long each phase of a stage takes: operations over the peak rate, bytes over the bandwidth, and one efficiency.

N are parameters, b bytes of a weight, T tokens, F operations and W bytes a second of a device. Of the peak a GPU is
expected to reach `plan.efficiency`, of which nothing has been measured, and cores reach CPU_EFFICIENCY.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.config.schema import Config
from cluster.pipeline.stage import Stage
from cluster.plan.counts import Counts, Lengths, section_of
from cluster.plan.machines import Machine
from cluster.plan.memory import Network, networks, width
from cluster.plan.shapes import Models
from cluster.runtime.resources import Process

CPU_EFFICIENCY = 0.2
"""Of a matrix product's rate, for whole phases: set so that those of a quickstart on two cores of an AMD EPYC take 0.5
to 1.8 times as long as expected (docs/cluster.md). Training reaches less of it, sampling more."""
CPU_PUBLISH = 1e8
"""Bytes of published weights a second that CPUs handle: checksums on both sides, loading and packing, the parity
probe. From 2.9 s for 269 MB to two engines on two cores (docs/quickstart.md)."""
ADAM_TRAFFIC = 28
"""Bytes of memory traffic a parameter in an Adam step: gradient, master weight and two means read, three written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of a stage."""

    name: str
    """what happens"""
    least: float
    """seconds at the device's peak"""
    expected: float
    """seconds at the share of the peak that a run is expected to reach"""


def together(phases: Sequence[Phase], max_staleness: int) -> tuple[float, float]:
    """(least, expected) seconds: the sum, or where PPO's rollout and learning overlap the longer of both."""
    found = []
    for which in ("least", "expected"):
        seconds = {phase.name: getattr(phase, which) for phase in phases}
        rollout = seconds.get("generate", 0.0) + seconds.get("score", 0.0)
        rest = sum(seconds.values()) - rollout
        found.append(max(rollout, rest) if max_staleness and "publish" in seconds else rollout + rest)
    return found[0], found[1]


def speed(process: Process, machine: Machine, dtype: str) -> tuple[float, float]:
    """(operations, bytes) a second of a process: its whole GPUs (those that share one take turns), or its threads'
    part of the cores. float32 has half of the rate of bfloat16 (TF32 on GPUs; a CPU with avx512_bf16 measured 0.43).
    """
    part = max(1, math.floor(process.gpus)) if machine.gpus else min(1.0, process.threads / machine.cpus)
    return machine.device.flops * part * 2 / width(dtype), machine.device.bandwidth * part


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """What the seconds of a stage's phases depend on."""

    config: Config
    """the run's settings"""
    models: Models
    """its models"""
    lengths: Lengths
    """of prompts and responses"""
    at: Mapping[str, tuple[Process, Machine]]
    """where each process is"""
    cached: int
    """tokens whose keys and values an engine can hold"""

    def phases(self, stage: type[Stage], counts: Counts | None) -> list[Phase]:
        """In order, those of `Counts`; of a stage that only scores, one full batch. None where nothing is counted."""
        if counts is None:
            return self._score(self.config.scoring.max_batch_tokens) if "serve" in stage.sections else []
        found = self._generate(counts) if "generator" in stage.processes else []
        if "reward" in stage.processes:
            found += self._score(counts.tokens)
        if "learner" in stage.processes:
            used = networks(self.config, self.models, stage)
            if "generator" in stage.processes:
                found.append(self._read(used, counts))
            found += [self._update(one, stage, counts) for one in used if not one.frozen]
            if "generator" in stage.processes and counts.steps:
                found.append(self._publish(used[0]))
        return found

    def _phase(self, name: str, machine: Machine, computing: float, moving: float = 0.0) -> Phase:
        """Of seconds at the peak, and seconds on links."""
        share = self.config.plan.efficiency if machine.gpus else CPU_EFFICIENCY
        return Phase(name=name, least=computing + moving, expected=computing / share + moving)

    def _generate(self, counts: Counts) -> list[Phase]:
        """Rounds of prefill, 2 N T / F, and decoding: as many sequences at once as waves, engine and cache allow.

        A step of B sequences with a context of c tokens: max((N b + B c kv) / W, 2 N B / F).
        """
        config, shape, lengths = self.config, self.models.policy, self.lengths
        process, machine = self.at["generator-0"]
        flops, bandwidth = speed(process, machine, config.generator.dtype)
        each = -(-counts.rows * counts.samples // config.cluster.generators)
        wave = config.rollout.prompts_per_wave * counts.samples * config.rollout.waves_in_flight
        room = self.cached // max(1, lengths.prompt + lengths.longest)
        at_once = max(1, min(wave, config.generator.max_num_seqs, each, room))
        # Responses end one by one, so fewer sequences are decoded in a step on average than at first.
        running, context = at_once * lengths.response / lengths.longest, lengths.prompt + lengths.response / 2
        read = width(config.generator.dtype) * (shape.parameters + running * context * shape.kv_elements)
        step = max(read / bandwidth, 2 * shape.parameters * running / flops)
        prefill = 2 * shape.body * at_once * lengths.prompt / flops
        return [self._phase("generate", machine, math.ceil(each / at_once) * (prefill + lengths.longest * step))]

    def _score(self, tokens: int) -> list[Phase]:
        """2 N T / F of every reward model; nothing where none computes, or on cores of which nobody knows the speed."""
        size = sum(part.kind == "model" for part in self.config.scoring.parts) * self.models.reward.body
        process, machine = self.at["reward-0"]
        if not size or (machine.gpus and not process.gpus):
            return []
        # Each replica scores a wave of its own.
        replicas, generators = (sum(name.startswith(kind) for name in self.at) for kind in ("reward-", "generator-"))
        busy = min(replicas, generators * self.config.rollout.waves_in_flight) or 1
        flops, _ = speed(process, machine, self.config.scoring.dtype)
        return [self._phase("score", machine, 2 * size * tokens / flops / busy)]

    def _read(self, used: Sequence[Network], counts: Counts) -> Phase:
        """Log-probs and values, without gradients: 2 N T / F of all networks on the learner."""
        process, machine = self.at["learner-0"]
        flops, _ = speed(process, machine, self.config.ppo.network.dtype)
        passes = counts.steps // max(1, counts.epochs) * counts.microbatches or 1
        size = sum(self._computing(one, self._asked) for one in used)
        seconds = 2 * size * counts.tokens / self.config.cluster.learner_ranks / flops
        return self._phase("evaluate", machine, seconds, sum(self._gathering(one, passes) for one in used))

    def _update(self, network: Network, stage: type[Stage], counts: Counts) -> Phase:
        """2 N T / F forward, 2 N T / F and 2 N' T / F backward, N' with a gradient: 6 N T where all is trained.

        (Kaplan et al. 2020, section 2.1.) Then Adam's memory, a ring all-reduce of the gradients, whose 2 (n - 1) / n
        cross every link (Patarasuk & Yuan 2009), and what ZeRO-3 gathers.
        """
        ranks, (process, machine) = self.config.cluster.learner_ranks, self.at["learner-0"]
        flops, bandwidth = speed(process, machine, network.config.dtype)
        text = counts.pretraining_sequences * self.config.ppo.pretraining.sequence_tokens
        passes, tokens = counts.steps * counts.microbatches, counts.step_tokens
        asked = self._asked + (1 - self._asked) * getattr(section_of(self.config, stage), "pretraining_share", 0.0)
        if network.name == "critic":
            tokens -= text
        elif text:  # all of a text is learnt, of a response's sequence the response
            passes += counts.steps * counts.pretraining_microbatches
            asked = (asked * (tokens - text) + text) / tokens
        size = self._computing(network, asked)
        reached = size - network.shape.body * (1 - network.layers / network.shape.layers)
        trained, again = min(network.trained, size), reached * network.config.gradient_checkpointing
        computing = 2 * (size + reached + again + trained) * counts.steps * tokens / ranks / flops
        sharing = ranks if network.optimizer.zero_stage else 1
        adam = counts.steps * ADAM_TRAFFIC * network.trained / sharing / bandwidth
        reduced = counts.steps * 2 * (ranks - 1) / ranks * 4 * network.trained / self._link("learner-")
        moving = reduced + self._gathering(network, 2 * passes)
        return self._phase(f"update {network.name}", machine, computing + adam, moving)

    def _publish(self, policy: Network) -> Phase:
        """N b over a link; a broadcast costs its slowest receiver little more than one transfer."""
        size, (_, machine) = policy.shape.parameters * width(policy.config.dtype), self.at["learner-0"]
        moving = size / self._link("generator-", "learner-0")
        handling = 0.0 if machine.gpus else size / CPU_PUBLISH
        return Phase(name="publish", least=moving, expected=moving + handling)

    @property
    def _asked(self) -> float:
        """Share of the tokens of a prompt with its response whose log-probs are asked for."""
        return self.lengths.response / self.lengths.sequence

    def _computing(self, network: Network, asked: float) -> float:
        """Parameters that compute for a token, the output head counted where it is asked for."""
        return network.shape.body + (0 if network.scalar else asked * network.shape.output)

    def _gathering(self, network: Network, passes: int) -> float:
        """ZeRO-3 gathers the weights in every pass: all but a rank's own part cross its link."""
        ranks, size = self.config.cluster.learner_ranks, width(network.config.dtype) * network.parameters
        return passes * size * (1 - 1 / ranks) / self._link("learner-") if network.optimizer.zero_stage == 3 else 0.0

    def _link(self, *names: str) -> float:
        """Bytes a second between neighbours of one machine, or over the network where there are several."""
        machines = {machine.name: machine for name, (_, machine) in self.at.items() if name.startswith(names)}
        return next(iter(machines.values())).device.link if len(machines) == 1 else self.config.plan.network_gb_s * 1e9
