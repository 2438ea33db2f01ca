"""Seconds by hand: operations over the peak, bytes over the bandwidth."""

from typing import Any

import pytest

from cluster.pipeline.stages import STAGES
from cluster.plan.counts import Counts, Lengths
from cluster.plan.machines import GIB, GPUS, Device, Machine
from cluster.plan.roofline import Roofline, speed, together
from cluster.plan.shapes import Models, shape_of
from cluster.runtime.resources import Process
from tests.settings import settings

CORES = Device(name="8 cores", flops=8e11, bandwidth=4e10, memory=GIB, link=1e10, source="given")
CPU = Machine(name="a", cpus=8, memory=GIB, gpus=0, device=CORES)
H100 = Machine(name="b", cpus=8, memory=GIB, gpus=8, device=GPUS["H100"])


def test_a_process_has_its_threads_part_of_the_cores_or_whole_gpus():
    two = Process(name="p", threads=2, cpus=2)
    assert speed(two, CPU, "bfloat16") == (2e11, 1e10)
    assert speed(two, CPU, "float32") == (1e11, 1e10)
    assert speed(Process(name="p", threads=8, cpus=8, gpus=4), H100, "bfloat16")[1] == 4 * GPUS["H100"].bandwidth
    # those that share it take turns
    assert speed(Process(name="p", threads=8, cpus=8, gpus=0.25), H100, "bfloat16")[0] == GPUS["H100"].flops


def test_an_iteration_is_the_sum_or_where_phases_overlap_the_longer_side():
    phases = {"generate": 5.0, "score": 1.0, "update policy": 2.0, "publish": 1.0}
    assert together(phases, max_staleness=0) == 9.0
    assert together(phases, max_staleness=1) == 6.0
    del phases["publish"]
    assert together(phases, max_staleness=1) == 8.0  # only PPO overlaps
    assert together({}, max_staleness=0) == 0.0


def phases(stage: str, machine: Machine, counts: dict[str, int], **values: Any) -> dict[str, float]:
    """Seconds at the peak."""
    shape, gpus = shape_of("llama-3.1-8b"), 1 if machine.gpus else 0
    kinds = ("learner-0", "generator-0", "reward-0")
    at = {name: (Process(name=name, threads=8, cpus=8, gpus=gpus), machine) for name in kinds}
    lengths = Lengths(prompt=1, response=999, longest=999)
    config = settings({"plan.efficiency": 1.0} | {key.replace("__", "."): value for key, value in values.items()})
    models = Models(policy=shape, reward=shape)
    roofline = Roofline(config=config, models=models, lengths=lengths, at=at, cached=1e15)
    none = dict.fromkeys(Counts.__dataclass_fields__, 0)
    return roofline.phases(STAGES[stage], Counts(**none | counts))


def test_decoding_reads_the_weights_until_it_computes_longer():
    def step(sequences: int) -> float:
        values = {"rollout__prompts_per_wave": sequences, "generator__max_num_seqs": sequences}
        return phases("sample", H100, {"rows": sequences, "samples": 1}, **values)["generate"] / 999

    shape, context = shape_of("llama-3.1-8b"), 500.5
    cached = 2 * shape.kv_elements * context
    assert step(1) == pytest.approx((2 * shape.parameters + cached) / 3.35e12, rel=1e-3)
    assert step(100) == pytest.approx((2 * shape.parameters + 100 * cached) / 3.35e12, rel=1e-2)
    assert step(4000) > 2 * shape.parameters * 4000 / 989e12


def test_after_the_first_time_only_what_trains_is_published():
    counts, shape = {"rows": 8, "samples": 1, "steps": 1, "step_tokens": 1000}, shape_of("llama-3.1-8b")

    def published(**values: int) -> float:
        given = {f"ppo__network__{key}": value for key, value in values.items()}
        return phases("ppo", CPU, counts, **given)["publish"] * CPU.device.link / 2

    assert published() == pytest.approx(shape.parameters)
    assert published(lora_rank=4) == pytest.approx(shape.layers * shape.layer)
    assert published(last_layers=12) == published(lora_rank=4, last_layers=12) == pytest.approx(12 * shape.layer)


def test_an_update_is_six_operations_a_parameter_and_token_and_lora_four():
    counts = {"rows": 1, "samples": 1, "steps": 10, "step_tokens": 1000, "microbatches": 1}
    shape = shape_of("llama-3.1-8b")
    size = shape.body + shape.output
    whole = phases("sft", CPU, counts)["update policy"]
    assert whole == pytest.approx(6 * size * 1e4 / 8e11)
    assert phases("sft", CPU, counts, plan__efficiency=0.2)["update policy"] == pytest.approx(5 * whole)
    lora = phases("sft", CPU, counts, sft__network__lora_rank=1)["update policy"]
    assert lora == pytest.approx(4 * size * 1e4 / 8e11, rel=0.01)
    again = {"sft__network__lora_rank": 1, "sft__network__gradient_checkpointing": True}
    assert phases("sft", CPU, counts, **again)["update policy"] == pytest.approx(1.5 * lora, rel=0.02)


def test_frozen_first_layers_are_computed_once_for_all_networks_that_have_them():
    counts = {"rows": 10, "samples": 1, "epochs": 2, "minibatch": 10, "steps": 2, "step_tokens": 10_000}
    counts["microbatches"] = 1
    lora = {"lora_rank": 1, "last_layers": 8}
    shape, tokens = shape_of("llama-3.1-8b"), 2 * 1e4 / 8e11
    trunk, body, head = shape.body * 24 / 32, shape.body, shape.output

    def seconds(**more: Any) -> dict[str, float]:
        return phases("ppo", CPU, counts, ppo__network=lora, ppo__pretraining__coef=0.0, **more)

    alike, other = seconds(reward__network=lora), seconds()
    assert alike["evaluate"] == pytest.approx(tokens * (3 * body + 2 * head - 2 * trunk))
    assert other["evaluate"] == pytest.approx(tokens * (3 * body + 2 * head - trunk))
    # Two epochs, forward and back through the upper layers; the adapters' own gradient is small beside both.
    upper = body - trunk
    assert alike["update policy"] == pytest.approx(tokens * 2 * (body + head + upper + head - trunk / 2), rel=0.01)
    assert other["update critic"] == pytest.approx(tokens * 2 * (body + upper - trunk / 2), rel=0.01)
    assert alike["update critic"] == pytest.approx(tokens * 2 * (2 * upper), rel=0.01)
    sharded = {"lr": 1e-6, "zero_stage": 3}
    whole = seconds(ppo__policy_optimizer=sharded, ppo__critic_optimizer=sharded)
    assert whole["evaluate"] > tokens * (3 * body + 2 * head)  # sharded ones share nothing
