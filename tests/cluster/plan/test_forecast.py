"""Forecasts of small configurations on described machines; the presets that come with the package."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.config.load import PRESETS, compose, presets, read_overrides, read_toml
from cluster.config.schema import Config
from cluster.pipeline.stages import STAGES
from cluster.plan.dry_run import foresee
from cluster.plan.forecast import Forecast, forecast
from cluster.plan.machines import GPUS, Machine, Site, cores
from cluster.runtime.resources import GIB


def laptop(memory: float = 24) -> Site:
    here = Machine(name="here", cpus=2, memory=int(memory * GIB), gpus=0, device=cores(2, int(memory * GIB)))
    return Site(title="a laptop", machines=(here,), local=True)


def gpus(count: int, kind: str = "A100", machines: int = 1) -> Site:
    a = [Machine(name=f"node-{i}", cpus=64, memory=512 * GIB, gpus=count, device=GPUS[kind]) for i in range(machines)]
    return Site(title="described", machines=tuple(a), local=False)


def config(preset: str | None = None, **values: Any) -> Config:
    given = read_toml(Config, PRESETS / f"{preset}.toml") if preset else []
    pairs = [(key.replace("__", "."), str(value)) for key, value in values.items()]
    return compose(Config, [*given, *read_overrides(Config, pairs)])


def found(
    site: Site | None = None, preset: str | None = "quickstart", command: str = "quickstart", **values: Any
) -> Forecast:
    stages = [STAGES[name] for name in STAGES[command].parts or (command,)]
    return forecast(config(preset, **values), site or laptop(), command, stages, Path("no/such/run"))


def phases(plan: Forecast) -> Mapping[str, float]:
    """Seconds of each phase of PPO."""
    (step,) = [step for step in plan.steps if step.name == "ppo"]
    return step.phases


def test_the_quickstart_fits_a_laptop():
    plan = found()
    assert plan.problems == []
    assert [step.name for step in plan.steps] == ["sft", "sample", "reward", "ppo"]
    ppo = plan.steps[-1]
    assert ppo.batches
    assert (ppo.batches.rows, ppo.batches.steps, ppo.batches.pretraining_sequences) == (64, 2, 8)
    assert ppo.memory.keys() == {"generator-0", "generator-1", "learner-0", "reward-0", "reward-1"}
    assert list(phases(plan)) == ["generate", "score", "evaluate", "update policy", "update critic", "publish"]
    assert ppo.seconds == pytest.approx(sum(phases(plan).values()))
    assert ppo.times == 12


def test_overlapping_phases_count_once():
    plan = found(ppo__max_staleness=1, cluster__generators=1)
    seconds = phases(plan)
    rollout = seconds["generate"] + seconds["score"]
    assert plan.steps[-1].seconds == pytest.approx(max(rollout, sum(seconds.values()) - rollout))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ppo__minibatch_size": 30}, "ppo.minibatch_size = 30 does not divide .*Nearest.* = 16 or 32"),
        ({"generator__tensor_parallel_size": 2}, "= 2 cannot share the 9 attention heads .*Nearest: .* = 1 or 3"),
        ({"generator__max_model_len": 120}, "generator.max_model_len is 120. Nearest: .* = 124"),
        ({"generator__max_model_len": 9000}, "max_model_len = 9000 is more than the 8192 positions .*= 8192"),
        ({"ppo__pretraining__sequence_tokens": 9000}, "sequence_tokens = 9000 is more than the 8192"),
        ({"sft__max_tokens": 9000}, "sft.max_tokens = 9000 is more than"),
        ({"ppo__network__last_layers": 31, "ppo__network__lora_rank": 0}, "last_layers = 31, .* has 30 layers"),
        ({"cluster__generators": 3}, "3 threads .* on 2 cores .*use fewer generators"),
    ],
)
def test_the_impossible_is_refused_with_the_nearest_that_works(values: dict[str, Any], said: str):
    problems = found(**values).problems
    assert any(re.search(said, problem) for problem in problems), problems


def test_more_processes_than_gpus_name_the_bundle():
    values: dict[str, Any] = {"cluster__generators": 2, "generator__tensor_parallel_size": 3}
    plan = found(gpus(4), command="ppo", **values)
    assert any("the bundle of 'generator-1' needs 3 GPUs" in problem for problem in plan.problems)
    assert all(not step.phases for step in plan.steps)


def test_ranks_shard_and_machines_slow_the_gradients_down():
    values = {"plan__model": "llama-3.1-8b", "cluster__learner_ranks": 6, "command": "ppo"}
    together = found(gpus(8), preset=None, **values)
    apart = found(gpus(4, machines=2), preset=None, **values)
    one, two = phases(together), phases(apart)
    assert two["update policy"] > one["update policy"]
    assert two["generate"] == one["generate"]


def test_unknown_rows_leave_their_arithmetic_out():
    plan = found(preset=None, plan__model="smollm2-135m")
    assert [step.batches is None for step in plan.steps] == [True, True, True, False]


def test_ranks_that_share_a_gpu_are_refused():
    values = {"plan__model": "smollm2-135m", "cluster__learner_ranks": 7, "generator__gpu_memory_utilization": 0.3}
    (problem,) = [one for one in found(gpus(4), preset=None, command="ppo", **values).problems if "NCCL" in one]
    assert "3 learner ranks would share node-0/gpu-0" in problem
    assert "Lower cluster.learner_ranks" in problem


def test_a_generator_on_the_gpu_of_the_sender_is_told_of():
    plan = found(gpus(1), preset=None, command="ppo", plan__model="smollm2-135m")
    assert any("learner-0 and generator-0 share node-0/gpu-0" in note for note in plan.notes)
    assert not any("share" in note for note in found(gpus(4), preset=None, plan__model="smollm2-135m").notes)


def test_heads_of_keys_have_to_be_shared_evenly():
    plan = found(gpus(8), preset=None, plan__model="qwen2.5-0.5b", generator__tensor_parallel_size=7, command="sample")
    assert any("7 cannot share" in one and "= 2 or 14" in one for one in plan.problems)


@pytest.mark.parametrize("preset", presets())
def test_a_preset_fits_the_machine_it_is_for(preset: str):
    settings = config(preset)
    if settings.plan.nodes:
        plan = foresee(settings, Path("no/such/run"))
    elif preset == "instructgpt":  # of no size and for no machine in particular
        sizes = {"plan__model": "gpt3-1.3b", "plan__demonstrations": 13_000, "plan__ranked_prompts": 33_000}
        plan = found(
            gpus(8, "H100"), preset, cluster__learner_ranks=6, ppo__network__gradient_checkpointing=True, **sizes
        )
    else:
        plan = found(preset=preset)
    assert plan.problems == []
    assert all(step.batches is not None for step in plan.steps)
