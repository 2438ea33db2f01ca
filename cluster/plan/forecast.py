"""A run before it starts: its counts, processes, memory and time on given machines, and what cannot work."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from cluster.config.load import as_toml
from cluster.config.schema import Config
from cluster.pipeline.stage import Stage
from cluster.plan.check import setting, too_long
from cluster.plan.counts import Counts, Lengths, count, divisors, lengths_of, neighbours
from cluster.plan.machines import Machine, Site
from cluster.plan.memory import Bytes, cached_tokens, held, kinds, misfits
from cluster.plan.roofline import Phase, Roofline, together
from cluster.plan.shapes import Models, Shape, models_of
from cluster.runtime.fitting import Placed, place_processes, plan_cluster
from cluster.runtime.resources import Kind, Plan, ResourceError, check, plan_machine, plan_replicas

Stages = Sequence[type[Stage]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One stage of the run."""

    name: str
    """of the stage"""
    batches: Counts | None
    """its arithmetic; None where there is none, or the number of rows is not known"""
    memory: Mapping[str, Mapping[str, Bytes]]
    """what each of its processes holds, by name and item"""
    phases: Sequence[Phase] = ()
    """what takes time in it; of PPO an iteration's, of `select` those of one epoch's model"""
    least_s: float = 0.0
    """seconds of these phases together at the devices' peak"""
    expected_s: float = 0.0
    """seconds of these phases together"""
    times: float = 1.0
    """how often they are gone through"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Everything that a plan says."""

    command: str
    """what is planned"""
    site: Site
    """where"""
    models: Models
    """what"""
    lengths: Lengths
    """tokens that time and batches are counted with"""
    plan: Plan
    """processes with their threads, cores and GPUs"""
    placed: Placed[Machine]
    """where each of them goes"""
    steps: Sequence[Step]
    """what is done"""
    problems: Sequence[str]
    """why it cannot work, each with the nearest thing that does; empty when it can"""
    notes: Sequence[str]
    """what works and is worth a thought"""


def forecast(config: Config, site: Site, command: str, stages: Stages, run_dir: Path) -> Forecast:
    """Plan what a command would do in its stages. What cannot work is in `problems`.

    Raises ValueError (UnknownShape) where the size of a model is not known, so that nothing can be said.
    """
    rounds, models = command == "rounds", models_of(config, run_dir, serves="serve" in stages[0].sections)
    lengths, (plan, placed) = lengths_of(config, run_dir), placing(config, site, stages)
    problems, steps = [*_shape_problems(config, models, stages)], []
    for text in _placement_problems(config, site, stages):
        nearest = nearest_that_fits(
            config, _fewer(config), lambda other: not [*_placement_problems(other, site, stages)]
        )
        problems.append(text + (f". Nearest that fits: {nearest}" if nearest else ""))
    for stage in stages:
        memory = held(config, models, placed, stage)
        for text in misfits(memory, placed):
            works = partial(fits, site=site, models=models, stage=stage)
            nearest = nearest_that_fits(config, _smaller(config, stage), works)
            problems.append(f"{text}. Nearest that fits: {nearest or 'none; use more or larger machines'}")
        try:
            batches = count(config, stage, lengths, run_dir, rounds)
        except ValueError as error:
            problems.append(str(error))
            batches = None
        step = Step(name=stage.name, batches=batches, memory=memory)
        if not placed.unplaced:
            engine = memory.get("generator-0")
            cached = cached_tokens(config, models.policy, engine) if engine else 0
            roofline = Roofline(config=config, models=models, lengths=lengths, at=placed.at, cached=cached)
            phases, times = roofline.phases(stage, batches), float(batches.times) if batches else 1.0
            if rounds:  # comparisons add up: the batches are those of the last round, and the others have fewer
                growing = stage.name == "reward" and config.rounds.comparisons == "all"
                times *= (config.rounds.count + 1) / 2 if growing else config.rounds.count
            least, expected = together(phases, config.ppo.max_staleness)
            step = replace(step, phases=phases, least_s=least, expected_s=expected, times=times)
        steps.append(step)
    told = {
        "problems": [*dict.fromkeys(problems)],
        "notes": [*_notes(config, plan, placed, site, steps)],
        "steps": steps,
    }
    return Forecast(command=command, site=site, models=models, lengths=lengths, plan=plan, placed=placed, **told)


def placing(config: Config, site: Site, stages: Stages) -> tuple[Plan, Placed[Machine]]:
    """The processes of some stages at a site, and where they go."""
    machine = site.machines[0]
    wanted: list[Kind] = [kind for stage in stages for kind in kinds(stage)]
    if set(wanted) == {"reward"}:
        plan = plan_replicas(config.serve, machine.gpus)
    else:
        whole = plan_machine(config, machine.cpus, machine.gpus) if site.local else plan_cluster(config, site.machines)
        plan = whole.of(wanted)
    return plan, place_processes(plan.processes, site.machines, by_cpus=not site.local)


def _placement_problems(config: Config, site: Site, stages: Stages) -> Iterator[str]:
    """Threads, GPUs and bundles that are too many; copies of `rayward serve` only get slower with more threads."""
    plan, placed = placing(config, site, stages)
    if placed.unplaced:
        more = len(placed.unplaced) - 1
        yield placed.unplaced[0] + (f". So it is with {more} more bundles" if more else "")
    elif len(site.machines) == 1 and "serve" not in stages[0].sections:
        try:
            check(plan, cores=site.machines[0].cpus, gpus=site.machines[0].gpus)
        except ResourceError as error:
            yield str(error)
    ranks = {name: at for name, at in placed.devices.items() if name.startswith("learner-")}
    shared = [gpu for gpu, number in Counter(gpu for at in ranks.values() for gpu in at).items() if number > 1]
    if shared:
        names = ", ".join(name for name, at in ranks.items() if shared[0] in at)
        yield f"{names} would share {shared[0]}, and NCCL lets every rank of a group have a GPU of its own only"


def fits(config: Config, site: Site, models: Models, stage: type[Stage]) -> bool:
    """Whether a stage's processes all have a place and enough memory."""
    if [*_placement_problems(config, site, (stage,)), *_shape_problems(config, models, (stage,))]:
        return False
    _, placed = placing(config, site, (stage,))
    return not [*misfits(held(config, models, placed, stage), placed)]


def _shape_problems(config: Config, models: Models, stages: Stages) -> Iterator[str]:
    """What the shapes of the models do not allow."""
    policy, reward, size = models.policy, models.reward, config.generator.tensor_parallel_size
    limits = {"base": policy, "policy": policy, "reward": reward, "critic": reward}
    for stage in stages:
        named = {key: (shape.name, shape.positions) for key, shape in limits.items()}
        yield from too_long(config, stage.sections, named)
        for key, (network, _) in stage.trained(config).items():
            if network.last_layers > policy.layers:
                section = key.partition(".")[0]
                yield (
                    f"{section}.network.last_layers = {network.last_layers}, and {policy.name} has {policy.layers} "
                    f"layers. Nearest: {section}.network.last_layers = {policy.layers}, or 0 for all"
                )
        if "generator" in stage.processes and not _parallel(policy, size):
            near = neighbours([n for n in divisors(policy.heads) if _parallel(policy, n)], size)
            yield (
                f"generator.tensor_parallel_size = {size} cannot share the {policy.heads} attention heads and "
                f"{policy.kv_heads} heads of keys and values of {policy.name}. Nearest: "
                f"generator.tensor_parallel_size = {near}"
            )


def _parallel(shape: Shape, size: int) -> bool:
    """Whether vLLM can share the heads of a model over so many devices."""
    return shape.heads % size == 0 and (shape.kv_heads % size == 0 or size % shape.kv_heads == 0)


def nearest_that_fits(config: Config, changes: Sequence[tuple[str, Any]], fits: Callable[[Config], bool]) -> str | None:
    """The first of `changes`, the mildest first, that make `fits` true, without what is not needed; None for none."""
    taken: dict[str, Any] = {}
    for key, value in changes:
        taken[key] = value
        if fits(changed(config, taken)):
            for name in list(taken)[:-1]:
                rest = {other: value for other, value in taken.items() if other != name}
                taken = rest if fits(changed(config, rest)) else taken
            return ", ".join(f"{name} = {as_toml(value)}" for name, value in taken.items())
    return None


def _fewer(config: Config) -> list[tuple[str, int]]:
    """Fewer processes, or GPUs of one."""
    keys = ("cluster.generators", "cluster.max_generators", "generator.tensor_parallel_size", "cluster.learner_ranks")
    return [(key, value) for key in keys for value in range((setting(config, key) or 0) - 1, 0, -1)]


def _smaller(config: Config, stage: type[Stage]) -> list[tuple[str, Any]]:
    """Settings that save memory in a stage, the cheapest first."""
    trained, generator, found = stage.trained(config), config.generator, list[tuple[str, Any]]()
    if "generator" in stage.processes:
        found += [("generator.gpu_memory_utilization", generator.gpu_memory_utilization * part) for part in (0.7, 0.4)]
        found += [("generator.kv_cache_gib", generator.kv_cache_gib / 2**power) for power in range(1, 8)]
    sections = dict.fromkeys(key.partition(".")[0] for key in trained)
    for section in sections:
        tokens = getattr(config, section).max_tokens_per_microbatch
        found += [(f"{section}.max_tokens_per_microbatch", tokens // part) for part in (2, 4, 8, 16) if tokens // part]
        found.append((f"{section}.network.gradient_checkpointing", True))
    sharded = (2, 3) if config.cluster.learner_ranks > 1 else ()
    found += [(f"{key}.zero_stage", n) for n in sharded for key, (_, one) in trained.items() if one.zero_stage < n]
    found += [(f"{key}.offload_optimizer", "cpu") for key in trained]
    found += [(f"{section}.network.lora_rank", 16) for section in sections]
    if "serve" in stage.sections:
        found += [("scoring.max_batch_tokens", config.scoring.max_batch_tokens // part) for part in (2, 4, 8)]
        found += [("serve.replicas", count) for count in range(config.serve.replicas - 1, 0, -1)]
    if "generator" in stage.processes:
        found += [("generator.tensor_parallel_size", generator.tensor_parallel_size * part) for part in (2, 4, 8)]
        found += [("cluster.generators", count) for count in range(config.cluster.generators - 1, 0, -1)]
    return found


def changed(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with other values at dotted keys."""
    for key, value in values.items():
        *path, last = key.split(".")
        sections = [*accumulate(path, getattr, initial=config)]
        for name, section in zip((last, *reversed(path)), reversed(sections), strict=True):
            value = section.model_copy(update={name: value})
        config = value
    return config


def _notes(config: Config, plan: Plan, placed: Placed[Machine], site: Site, steps: Sequence[Step]) -> Iterator[str]:
    """What works, but not as somebody may think."""
    threads, cores = sum(one.threads for one in plan.processes), sum(machine.cpus for machine in site.machines)
    if steps[0].name == "serve" and threads > cores:
        yield f"the copies have {threads} threads on {cores} cores: beyond the cores all of them run slower"
    sender = set(placed.devices.get("learner-0", ()))
    beside = [name for name, at in placed.devices.items() if name.startswith("generator-") and sender & set(at)]
    if beside:
        yield (
            f"learner-0 and {', '.join(beside)} share {min(sender)}: weights are published through main memory "
            "(gloo), as NCCL takes no two members of a group on one GPU"
        )
    for step in steps:
        seconds = {phase.name: phase.expected for phase in step.phases}
        if not step.batches or "publish" not in seconds:
            continue
        waits = {
            "rollout.wave_deadline_s": seconds["generate"] / step.batches.waves,
            "ppo.rollout_deadline_s": seconds["generate"] + seconds.get("score", 0.0),
            "cluster.step_deadline_s": max(seconds["update policy"], seconds["update critic"]),
            "publish.deadline_s": seconds["publish"],
        }
        for key, expected in waits.items():
            if expected > (limit := setting(config, key)) / 2:
                yield f"{key} = {limit:g} ends a wait that is expected to take {expected:.0f} s: raise it"
