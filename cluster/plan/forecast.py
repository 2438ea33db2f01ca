"""A run before it starts: its counts, processes, memory and time on given machines, and what cannot work."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config.schema import Config
from cluster.pipeline.stage import Stage
from cluster.plan.check import too_long
from cluster.plan.counts import Counts, Lengths, count, divisors, lengths_of, neighbours
from cluster.plan.machines import Machine, Site
from cluster.plan.memory import Bytes, held, kinds, misfits
from cluster.plan.roofline import Roofline, together
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
    phases: Mapping[str, float]
    """seconds of what takes time in it; of PPO an iteration's, of `select` those of one epoch's model"""
    seconds: float
    """of these phases together"""
    times: float
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
    """why it cannot work, each with a remedy; empty when it can"""
    notes: Sequence[str]
    """what works and is worth a thought"""


def forecast(config: Config, site: Site, command: str, stages: Stages, run_dir: Path) -> Forecast:
    """Plan what a command would do in its stages. What cannot work is in `problems`.

    Raises ValueError where the size of a model is not known, so that nothing can be said.
    """
    rounds, models = command == "rounds", models_of(config, run_dir, serves="serve" in stages[0].sections)
    lengths, plan = lengths_of(config), _processes(config, site, stages)
    placed = place_processes(plan.processes, site.machines, by_cpus=not site.local)
    problems, steps = [*_shape_problems(config, models, stages), *_placement_problems(plan, placed, site, stages)], []
    for stage in stages:
        memory = held(config, models, placed, stage)
        problems += misfits(memory, placed, next(iter(stage.trained(config)), "ppo").partition(".")[0])
        try:
            batches = count(config, stage, lengths, run_dir, rounds)
        except ValueError as error:
            problems.append(str(error))
            batches = None
        cache = memory.get("generator-0", {}).get("keys and values", Bytes())
        cached = cache.device + cache.host
        roofline = Roofline(config=config, models=models, lengths=lengths, at=placed.at, cached=cached)
        phases, times = (
            {} if placed.unplaced else roofline.phases(stage, batches),
            float(batches.times if batches else 1),
        )
        if rounds:  # comparisons add up: the batches are those of the last round, and the others have fewer
            growing = stage.name == "reward" and config.rounds.comparisons == "all"
            times *= (config.rounds.count + 1) / 2 if growing else config.rounds.count
        seconds = together(phases, config.ppo.max_staleness)
        step = {"phases": phases, "seconds": seconds, "times": times}
        steps.append(Step(name=stage.name, batches=batches, memory=memory, **step))
    found = {"problems": [*dict.fromkeys(problems)], "notes": [*_notes(placed)], "steps": steps}
    return Forecast(command=command, site=site, models=models, lengths=lengths, plan=plan, placed=placed, **found)


def _processes(config: Config, site: Site, stages: Stages) -> Plan:
    """The processes of some stages at a site."""
    machine = site.machines[0]
    wanted: list[Kind] = [kind for stage in stages for kind in kinds(stage)]
    if set(wanted) == {"reward"}:
        return plan_replicas(config.serve, int(machine.gpus))
    whole = (
        plan_machine(config, int(machine.cpus), int(machine.gpus))
        if site.local
        else plan_cluster(config, site.machines)
    )
    return whole.of(wanted)


def _placement_problems(plan: Plan, placed: Placed[Machine], site: Site, stages: Stages) -> Iterator[str]:
    """Threads, GPUs and bundles that are too many; copies of `rayward serve` only get slower with more threads."""
    if placed.unplaced:
        yield placed.unplaced[0]
    elif len(site.machines) == 1 and "serve" not in stages[0].sections:
        try:
            check(plan, cores=int(site.machines[0].cpus), gpus=site.machines[0].gpus)
        except ResourceError as error:
            yield str(error)
    used = Counter(gpu for name, at in placed.devices.items() if name.startswith("learner-") for gpu in at)
    if shared := [gpu for gpu, ranks in used.items() if ranks > 1]:
        yield (
            f"{used[shared[0]]} learner ranks would share {shared[0]}, and NCCL wants a GPU for each rank of a group. "
            "Lower cluster.learner_ranks, or use more GPUs"
        )


def _shape_problems(config: Config, models: Models, stages: Stages) -> Iterator[str]:
    """What the shapes of the models do not allow."""
    policy, reward, size = models.policy, models.reward, config.generator.tensor_parallel_size
    limits = {"base": policy, "policy": policy, "reward": reward, "critic": reward}
    for stage in stages:
        yield from too_long(config, stage.sections, {key: (one.name, one.positions) for key, one in limits.items()})
        for key, (network, _) in stage.trained(config).items():
            if network.last_layers > policy.layers:
                setting = f"{key.partition('.')[0]}.network.last_layers"
                yield f"{setting} = {network.last_layers}, and {policy.name} has {policy.layers} layers: lower it"
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


def _notes(placed: Placed[Machine]) -> Iterator[str]:
    """What works, but not as somebody may think."""
    sender = set(placed.devices.get("learner-0", ()))
    beside = [name for name, at in placed.devices.items() if name.startswith("generator-") and sender & set(at)]
    if beside:
        yield (
            f"learner-0 and {', '.join(beside)} share {min(sender)}: weights are published through main memory "
            "(gloo), as NCCL takes no two members of a group on one GPU"
        )
