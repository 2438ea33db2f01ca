"""How long each phase of a PPO iteration takes at least, and about how long to expect."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.config import Config
from cluster.estimates import (
    Training,
    decode_seconds,
    forward_seconds,
    ring_seconds,
    training_seconds,
    transfer_seconds,
)
from cluster.hardware import Machine
from cluster.memory import Models, networks
from cluster.plan import Lengths, PPOPlan
from cluster.resources import Process

_ADAM_TRAFFIC = 28
"""Bytes of memory traffic a parameter in an Adam step: gradient, master weight and two means read, three written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of an iteration."""

    name: str
    """what happens"""
    least: float
    """seconds at the device's peak"""
    expected: float
    """seconds at the share of the peak that plan.efficiency states"""
    formula: str
    """what it was computed from"""


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


def ppo_phases(
    config: Config,
    models: Models,
    batches: PPOPlan,
    lengths: Lengths,
    at: Mapping[str, tuple[Process, Machine]],
    cached: int,
) -> list[Phase]:
    """The phases of one iteration, in order; `at`: where each process is, `cached`: tokens an engine can hold.

    Formulas: decoding and passes as in cluster.estimates; sums over networks, divided by the ranks.
    """
    generator, learner = (_speed(config, at, name) for name in ("generator-0", "learner-0"))
    ranks = config.cluster.learner_ranks
    link = _learner_link(config, at)
    policy, reference, critic = networks(config, models, "ppo")
    found = [_generate(config, models, batches, lengths, generator, cached)]
    if scorers := sum(part.kind == "model" for part in config.scoring.parts):
        process, machine = at["reward"]
        scoring = speed(process, machine, config.scoring.dtype == "float32")
        size = scorers * models.reward.value_parameters
        seconds = forward_seconds(size, batches.episode_tokens, scoring.flops)
        found.append(_computed("score", seconds, config, "2 N T / F of the reward model"))
    evaluated = policy.parameters + reference.parameters + critic.parameters
    seconds = forward_seconds(evaluated, batches.episode_tokens / ranks, learner.flops)
    seconds_link = sum(
        _gathering(n, batches.minibatches * batches.microbatches, link) for n in (policy, reference, critic)
    )
    found.append(_computed("evaluate", seconds, config, "2 N T / F of policy, reference, critic", seconds_link))
    tokens = batches.episode_tokens * batches.epochs
    text = batches.pretraining_microbatches if batches.pretraining_sequences else 0
    for network, shape, trains, extra, passes in (
        (policy, models.policy, config.ppo.network, batches.pretraining_tokens, batches.microbatches + text),
        (critic, models.reward, config.ppo.critic, 0, batches.microbatches),
    ):
        reached = network.parameters * (trains.last_layers or shape.layers) / shape.layers
        seconds = training_seconds(
            network.parameters, network.trained, reached, (tokens + extra) / ranks, learner.flops
        )
        if trains.gradient_checkpointing:
            seconds += forward_seconds(reached, (tokens + extra) / ranks, learner.flops)
        share = ranks if network.stage else 1
        seconds += batches.steps * _ADAM_TRAFFIC * network.trained / share / learner.bandwidth
        moved = batches.steps * ring_seconds(4 * network.trained, ranks, link)
        moved += _gathering(network, 2 * batches.steps * passes, link)
        what = "with pretraining, " if extra else ""
        found.append(_computed(f"update {network.name}", seconds, config, f"6 N T / F {what}and Adam's memory", moved))
    size = models.policy.parameters * (4 if config.ppo.network.dtype == "float32" else 2)
    found.append(_moved("publish", transfer_seconds(size, _publish_link(config, at)), "N b / link"))
    return found


def iteration_seconds(phases: list[Phase], max_staleness: int) -> tuple[float, float]:
    """(least, expected) seconds of an iteration: the sum, or where rollout and learning overlap the longer of both."""

    def total(which: str) -> float:
        rollout = sum(getattr(phase, which) for phase in phases if phase.name in ("generate", "score"))
        rest = sum(getattr(phase, which) for phase in phases) - rollout
        return max(rollout, rest) if max_staleness else rollout + rest

    return total("least"), total("expected")


def _generate(
    config: Config, models: Models, batches: PPOPlan, lengths: Lengths, generator: Speed, cached: int
) -> Phase:
    """Rounds of prefill and decoding: as many sequences at once as waves, engine and its cache allow."""
    rollout, shape = config.rollout, models.policy
    each = -(-batches.episodes // config.cluster.generators)
    wave = rollout.prompts_per_wave * rollout.samples_per_prompt * rollout.waves_in_flight
    at_once = max(1, min(wave, config.generator.max_num_seqs, each, cached // max(1, lengths.sequence)))
    rounds = math.ceil(each / at_once)
    width = 4 if config.generator.dtype == "float32" else 2
    context = lengths.prompt + lengths.response / 2
    step = decode_seconds(shape, width, at_once, context, generator.flops, generator.bandwidth)
    prefill = forward_seconds(shape.parameters, at_once * lengths.prompt, generator.flops)
    seconds = rounds * (prefill + lengths.response * step)
    formula = f"{rounds} x (2 N P B / F + R max((N b + B c kv) / W, 2 N B / F)), B = {at_once}"
    return _computed("generate", seconds, config, formula)


def _gathering(network: Training, passes: int, link: float) -> float:
    """ZeRO-3 gathers the weights in every pass: all but a rank's own part cross its link."""
    if network.stage < 3 or network.ranks == 1:
        return 0.0
    return passes * transfer_seconds(network.weight_bytes * network.parameters * (1 - 1 / network.ranks), link)


def _speed(config: Config, at: Mapping[str, tuple[Process, Machine]], name: str) -> Speed:
    process, machine = at[name]
    dtype = config.ppo.network.dtype if name.startswith("learner") else config.generator.dtype
    return speed(process, machine, dtype == "float32")


def _learner_link(config: Config, at: Mapping[str, tuple[Process, Machine]]) -> float:
    machines = [machine for name, (_, machine) in at.items() if name.startswith("learner-")]
    alone = len({machine.name for machine in machines}) == 1
    return machines[0].device.link if alone else config.plan.network_gb_s * 1e9


def _publish_link(config: Config, at: Mapping[str, tuple[Process, Machine]]) -> float:
    sender = at["learner-0"][1]
    receivers = [machine for name, (_, machine) in at.items() if name.startswith("generator-")]
    alone = all(machine.name == sender.name for machine in receivers)
    return sender.device.link if alone else config.plan.network_gb_s * 1e9


def _computed(name: str, seconds: float, config: Config, formula: str, moved: float = 0.0) -> Phase:
    """`moved`: seconds on a link, which no efficiency of the device changes."""
    expected = seconds / config.plan.efficiency + moved
    return Phase(name=name, least=seconds + moved, expected=expected, formula=formula)


def _moved(name: str, seconds: float, formula: str) -> Phase:
    return Phase(name=name, least=seconds, expected=seconds, formula=formula)
