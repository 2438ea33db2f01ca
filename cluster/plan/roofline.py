"""How long each phase of a stage takes: operations over the peak rate, bytes over the bandwidth, and one efficiency.

N are parameters, b bytes of a weight, T tokens, F operations and W bytes a second of a device. Of the peak a device is
expected to reach `plan.efficiency`, of which nothing has been measured on GPUs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.config.schema import Config
from cluster.pipeline.stage import Stage
from cluster.plan.counts import Counts, Lengths
from cluster.plan.machines import Machine
from cluster.plan.memory import Network, networks, shares_trunk, width
from cluster.plan.shapes import Models
from cluster.runtime.resources import Process


def together(phases: Mapping[str, float], max_staleness: int) -> float:
    """Seconds of these phases: their sum, or where PPO's rollout and learning overlap the longer of both."""
    rollout = sum(seconds for name, seconds in phases.items() if name in ("generate", "score"))
    learning = sum(phases.values()) - rollout
    return max(rollout, learning) if max_staleness and "publish" in phases else rollout + learning


def speed(process: Process, machine: Machine, dtype: str) -> tuple[float, float]:
    """(operations, bytes) a second of a process: its whole GPUs (those that share one take turns), or its threads'
    part of the cores. float32 has half of the rate of bfloat16 (TF32 on GPUs; a CPU with avx512_bf16 measured 0.43).
    """
    part = max(1, math.floor(process.gpus)) if machine.gpus else min(1.0, process.threads / machine.cpus)
    return machine.device.flops * part * 2 / width(dtype), machine.device.bandwidth * part


def _trunk(network: Network) -> float:
    """Those that compute for a token in the layers below all that is trained."""
    return network.shape.body * network.trunk / network.shape.layers


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
    cached: float
    """bytes of keys and values that an engine can hold"""

    def phases(self, stage: type[Stage], counts: Counts | None) -> dict[str, float]:
        """Seconds of each, in order, for what `Counts` has; of a stage that only scores, for one full batch."""
        if counts is None:
            return self._score(self.config.scoring.max_batch_tokens) if "serve" in stage.sections else {}
        tokens, samples = counts.rows * counts.samples * self.lengths.sequence, "generator" in stage.processes
        found = {"generate": self._generate(counts)} if samples else {}
        if "reward" in stage.processes:
            found |= self._score(tokens)
        if "learner" in stage.processes:
            used = networks(self.config, self.models, stage)
            shared = [one.name for one in used[1:] if shares_trunk(self.config, used[0], one)]
            if samples:  # log-probs and values, without gradients: 2 N T / F of all networks, a shared trunk once
                passes = counts.steps // max(1, counts.epochs) * counts.microbatches or 1
                computing = sum(one.computing for one in used) - len(shared) * _trunk(used[0])
                found["evaluate"] = self._learn(used, 2 * tokens * computing, 0, passes)
            for one in used:  # what `evaluate` kept serves the first epoch, what the policy computed its critic
                kept = 1 if one.name in shared else samples / max(1, counts.epochs)
                found |= {} if one.frozen else {f"update {one.name}": self._update(one, counts, kept)}
            if samples and counts.steps:
                found["publish"] = self._publish(used[0])
        return found

    def _generate(self, counts: Counts) -> float:
        """Rounds of prefill, 2 N T / F, and decoding: as many sequences at once as waves, engine and cache allow.

        A step of B sequences with a context of c tokens: max((N b + B c kv) / W, 2 N B / F).
        """
        config, shape, lengths = self.config, self.models.policy, self.lengths
        process, machine = self.at["generator-0"]
        flops, bandwidth = speed(process, machine, config.generator.dtype)
        each = -(-counts.rows * counts.samples // config.cluster.generators)
        wave = config.rollout.prompts_per_wave * counts.samples * config.rollout.waves_in_flight
        parts = min(config.generator.tensor_parallel_size, shape.kv_heads)  # a device holds its part of the heads
        longest = width(config.generator.dtype) * shape.kv_elements * (lengths.prompt + lengths.longest) / parts
        at_once = max(1, min(wave, config.generator.max_num_seqs, each, int(self.cached / longest)))
        # Responses end one by one, so fewer sequences are decoded in a step on average than at first.
        running, context = at_once * lengths.response / lengths.longest, lengths.prompt + lengths.response / 2
        read = width(config.generator.dtype) * (shape.parameters + running * context * shape.kv_elements)
        step = max(read / bandwidth, 2 * shape.parameters * running / flops)
        prefill = 2 * shape.body * at_once * lengths.prompt / flops
        return math.ceil(each / at_once) * (prefill + lengths.longest * step) / config.plan.efficiency

    def _score(self, tokens: int) -> dict[str, float]:
        """2 N T / F of every reward model; nothing where none computes, or on cores of which nobody knows the speed."""
        size = sum(part.kind == "model" for part in self.config.scoring.parts) * self.models.reward.body
        process, machine = self.at["reward-0"]
        if not size or (machine.gpus and not process.gpus):
            return {}
        flops, _ = speed(process, machine, self.config.scoring.dtype)
        replicas = sum(name.startswith("reward-") for name in self.at)
        return {"score": 2 * size * tokens / flops / replicas / self.config.plan.efficiency}

    def _update(self, network: Network, counts: Counts, kept: float) -> float:
        """2 N T forward, 2 N T and 2 N' T backward, N' with a gradient: 6 N T where all is trained (Kaplan et al. 2020,
        section 2.1). Of `kept` of the sequences the trunk's output is there.
        """
        text, size = counts.pretraining_sequences * self.config.ppo.pretraining.sequence_tokens, network.computing
        tokens, pieces = counts.step_tokens, counts.microbatches + counts.pretraining_microbatches
        if network.name == "critic":
            tokens, pieces = tokens - text, counts.microbatches
        reached = size - network.shape.body * (1 - network.layers / network.shape.layers)
        again = reached * network.config.gradient_checkpointing
        operations = 2 * (size + reached + again + min(network.trained, size)) * counts.steps * tokens
        sampled = counts.minibatch * self.lengths.sequence
        operations -= 2 * _trunk(network) * counts.steps * sampled * kept
        return self._learn([network], operations, counts.steps, 2 * counts.steps * pieces)

    def _learn(self, used: Sequence[Network], operations: float, steps: int, passes: int) -> float:
        """Operations of all ranks, a ring all-reduce of the gradients in each step, of which 2 (n - 1) / n cross every
        link (Patarasuk & Yuan 2009), and the weights that ZeRO-3 gathers in each pass.
        """
        ranks, (process, machine) = self.config.cluster.learner_ranks, self.at["learner-0"]
        flops, _ = speed(process, machine, used[0].config.dtype)
        gathered = sum(width(one.config.dtype) * one.parameters for one in used if one.optimizer.zero_stage == 3)
        moved = (passes * gathered + steps * 2 * 4 * sum(one.trained for one in used)) * (1 - 1 / ranks)
        return operations / ranks / flops / self.config.plan.efficiency + moved / self._link("learner-")

    def _publish(self, policy: Network) -> float:
        """N' b over a link, N' of what trains; a broadcast costs its slowest receiver little more than one transfer."""
        return policy.published * width(policy.config.dtype) / self._link("generator-", "learner-0")

    def _link(self, *names: str) -> float:
        """Bytes a second between neighbours of one machine, or over the network where there are several."""
        machines = {machine.name: machine for name, (_, machine) in self.at.items() if name.startswith(names)}
        return next(iter(machines.values())).device.link if len(machines) == 1 else self.config.plan.network_gb_s * 1e9
