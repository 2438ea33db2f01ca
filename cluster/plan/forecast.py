"""A run before it starts: its batches, processes, memory and time on given machines, and what cannot work."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config.schema import Config
from cluster.plan.batches import Batches, batches_of
from cluster.plan.counts import Lengths, PPOPlan, SamplingPlan
from cluster.plan.fitting import misfits
from cluster.plan.hardware import Machine
from cluster.plan.lengths import lengths_of
from cluster.plan.limits import crowded, notes, placement_problems, shape_problems, shared_ranks, shared_with_learner
from cluster.plan.memory import Held, Models, cached_tokens, generator_memory, learner_memory, reward_memory
from cluster.plan.remedies import nearest_that_fits
from cluster.plan.roofline import Clock, Pace, Phase, iteration_seconds
from cluster.runtime.fitting import Placed, place_processes, plan_cluster
from cluster.runtime.resources import Kind, Plan, ResourceError, check, plan_machine, plan_replicas

KINDS: dict[str, tuple[Kind, ...]] = {
    "sft": ("learner",),
    "baseline": ("learner",),
    "sample": ("generator",),
    "reward": ("learner",),
    "select": ("generator", "reward"),
    "ppo": ("generator", "learner", "reward"),
    "evaluate": ("generator", "learner", "reward"),
    "serve": ("reward",),
}
"""The processes of each step."""
RUN = ("sft", "sample", "reward", "ppo")
STEPS = {
    "plan": RUN,
    "quickstart": RUN,
    "rounds": ("sample", "reward", "ppo"),
    **{step: (step,) for step in KINDS},
}
"""The steps of every command that starts processes."""
_NO_REMEDY = "No change of one or a few settings that this plan knows makes it fit: use more or larger machines"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a run would run."""

    title: str
    """in words"""
    machines: tuple[Machine, ...]
    """what there is"""
    local: bool
    """one machine whose processes take turns on its cores"""
    pace: Pace
    """what a process reaches of its device's peak"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of the run."""

    name: str
    """sft, baseline, sample, reward, select, ppo, evaluate or serve"""
    batches: Batches | None
    """its arithmetic; None where there is none, or the number of rows is not known"""
    held: tuple[Held, ...]
    """what each of its processes holds"""
    phases: tuple[Phase, ...] = ()
    """what takes time in it; of PPO an iteration's, of `select` those of one epoch's model"""
    seconds: tuple[float, float] = (0.0, 0.0)
    """(least, expected) of these phases together"""
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
    steps: tuple[Step, ...]
    """what is done"""
    problems: tuple[str, ...]
    """why it cannot work, each with the nearest thing that does; empty when it can"""
    notes: tuple[str, ...]
    """what works and is worth a thought"""


def forecast(config: Config, site: Site, command: str, run_dir: Path) -> Forecast:
    """Plan what a command would do. What cannot work is in `problems`.

    Raises ValueError (UnknownShape) where the size of a model is not known, so that nothing can be said.
    """
    names = STEPS[command]
    serves = command == "serve"
    models = Models.of(config, run_dir, serves=serves)
    lengths = lengths_of(config, run_dir)
    problems = list(shape_problems(config, models, names))
    plan, placed = processes(config, site, names)
    works = None if serves else lambda other: _places(other, site, names)
    problems += placement_problems(plan, placed, site.machines, config, works)
    steps = []
    for name in names:
        holds = held(config, models, plan, placed, name)
        if text := next(misfits(holds, placed), None):
            remedy = nearest_that_fits(config, name, lambda other, at=name: fits(other, site, models, at))
            problems.append(f"{name}: {text}. " + (f"Nearest that fits: {remedy}" if remedy else _NO_REMEDY))
        try:
            batches = None if serves else batches_of(config, name, lengths, run_dir, command == "rounds")
        except ValueError as error:
            problems.append(str(error))
            batches = None
        step = Step(name=name, batches=batches, held=holds)
        steps.append(step if placed.unplaced else _timed(step, config, models, lengths, placed, site.pace, command))
    told = [note for step in steps for note in notes(config, step.batches, step.phases)]
    told += shared_with_learner(placed.devices) if "ppo" in names else []
    told += crowded(plan, sum(machine.cpus for machine in site.machines)) if serves else []
    return Forecast(
        command=command,
        site=site,
        models=models,
        lengths=lengths,
        plan=plan,
        placed=placed,
        steps=tuple(steps),
        problems=tuple(dict.fromkeys(problems)),
        notes=tuple(told),
    )


def processes(config: Config, site: Site, steps: Sequence[str]) -> tuple[Plan, Placed[Machine]]:
    """The processes of some steps at a site, and where they go."""
    machine = site.machines[0]
    if "serve" in steps:
        plan = plan_replicas(config.serve, machine.gpus)
    else:
        whole = plan_machine(config, machine.cpus, machine.gpus) if site.local else plan_cluster(config, site.machines)
        plan = whole.of([kind for step in steps for kind in KINDS[step]])
    return plan, place_processes(plan.processes, site.machines, by_cpus=not site.local)


def held(config: Config, models: Models, plan: Plan, placed: Placed[Machine], step: str) -> tuple[Held, ...]:
    """What every process of a step holds; those without a place are left out."""
    found = []
    for process in plan.processes:
        kind = process.name.partition("-")[0]
        if process.name not in placed.at or kind not in KINDS[step]:
            continue
        machine, gpu = placed.at[process.name][1], process.gpus > 0
        if kind == "generator":
            items = generator_memory(config, models.policy, machine)
        elif kind == "learner":
            items = learner_memory(config, models, step, gpu)
        else:
            items = reward_memory(config, models.reward, gpu)
        found.append(Held(process=process, items=items))
    return tuple(found)


def fits(config: Config, site: Site, models: Models, step: str) -> bool:
    """Whether a step's processes all have a place and enough memory."""
    if not _places(config, site, (step,)) or list(shape_problems(config, models, (step,))):
        return False
    plan, placed = processes(config, site, (step,))
    return not any(misfits(held(config, models, plan, placed, step), placed))


def _places(config: Config, site: Site, steps: Sequence[str]) -> bool:
    """Whether the processes of some steps all have a place and the threads, and no two ranks a GPU."""
    try:
        plan, placed = processes(config, site, steps)
        if len(site.machines) == 1:
            check(plan, cores=site.machines[0].cpus, gpus=site.machines[0].gpus)
    except ResourceError:
        return False
    return not placed.unplaced and not shared_ranks(placed.devices)


def _timed(
    step: Step, config: Config, models: Models, lengths: Lengths, placed: Placed[Machine], pace: Pace, command: str
) -> Step:
    """The same step with the seconds of its phases."""
    engine = next((one for one in step.held if one.process.name == "generator-0"), None)
    cached = cached_tokens(config, models.policy, engine.items) if engine else 0
    clock = Clock(config, models, lengths, placed.at, cached, pace)
    if step.name == "serve":
        phases = clock.batch_of_scores()
    else:
        phases = clock.phases(step.name, step.batches) if step.batches else []
    overlap = config.ppo.max_staleness if isinstance(step.batches, PPOPlan) else 0
    times = float(step.batches.times) if isinstance(step.batches, SamplingPlan) else 1.0
    if isinstance(step.batches, PPOPlan):
        times = float(step.batches.iterations)
    if command == "rounds":
        count, everything = config.rounds.count, config.rounds.comparisons == "all"
        # Comparisons add up: the batches are those of the last round, and the others have fewer.
        times *= (count + 1) / 2 if step.name == "reward" and everything else count
    return Step(
        name=step.name,
        batches=step.batches,
        held=step.held,
        phases=tuple(phases),
        seconds=iteration_seconds(phases, overlap),
        times=times,
    )
