"""A run before it starts: its batches, processes, memory and time on given machines, and what cannot work."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config import Config
from cluster.fitting import Placed, misfits, place_processes, plan_cluster
from cluster.hardware import Machine
from cluster.memory import (
    Held,
    Models,
    cached_tokens,
    generator_memory,
    learner_memory,
    reward_memory,
)
from cluster.plan import Lengths, PPOPlan, StepsPlan, indivisible, plan_ppo, plan_reward, plan_sft
from cluster.remedies import nearest_that_fits
from cluster.resources import Plan, ResourceError, check, plan_machine
from cluster.timing import Phase, iteration_seconds, ppo_phases

STEPS = ("sft", "sample", "reward", "ppo")
"""The steps that need processes; evaluation needs those of PPO."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a run would run."""

    title: str
    """in words"""
    machines: tuple[Machine, ...]
    """what there is"""
    local: bool
    """one machine whose processes take turns on its cores"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of the run."""

    name: str
    """sft, sample, reward or ppo"""
    batches: PPOPlan | StepsPlan | None
    """its arithmetic; None where the number of rows is not known"""
    held: tuple[Held, ...]
    """what each of its processes holds"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Everything that a plan says."""

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
    phases: tuple[Phase, ...]
    """of one PPO iteration; empty without PPO"""
    seconds: tuple[float, float]
    """(least, expected) of an iteration"""
    iterations: int
    """how many there are"""
    problems: tuple[str, ...]
    """why it cannot work, each with the nearest thing that does; empty when it can"""
    notes: tuple[str, ...]
    """what works and is worth a thought"""


def forecast(config: Config, site: Site, steps: Sequence[str], run_dir: Path) -> Forecast:
    """Plan the steps of a run. What cannot work is in `problems`.

    Raises ValueError (UnknownShape) where the size of a model is not known, so that nothing can be said.
    """
    models = Models.of(config, run_dir)
    lengths = Lengths(
        prompt=config.plan.prompt_tokens or config.rollout.max_prompt_tokens,
        response=config.plan.response_tokens or config.rollout.max_new_tokens,
    )
    problems = list(shape_problems(config, models, steps))
    plan, placed = processes(config, site)
    problems += _placement_problems(plan, placed, site)
    batches: dict[str, PPOPlan | StepsPlan | None] = {}
    for step in steps:
        try:
            batches[step] = _batches(config, step, lengths, run_dir)
        except ValueError as error:
            problems.append(str(error))
    memory = {step: held(config, models, plan, placed, step) for step in steps}
    for step in steps:
        for text in misfits(memory[step], placed):
            remedy = nearest_that_fits(config, step, lambda other, at=step: fits(other, site, models, at))
            problems.append(f"{step}: {text}. " + (f"Nearest that fits: {remedy}" if remedy else _NO_REMEDY))
            break
    found = batches.get("ppo")
    phases: list[Phase] = []
    if isinstance(found, PPOPlan) and not placed.unplaced:
        generator = next(one for one in memory["ppo"] if one.process.name == "generator-0")
        cached = cached_tokens(config, models.policy, generator.items)
        phases = ppo_phases(config, models, found, lengths, placed.at, cached)
    return Forecast(
        site=site,
        models=models,
        lengths=lengths,
        plan=plan,
        placed=placed,
        steps=tuple(Step(name=step, batches=batches.get(step), held=memory[step]) for step in steps),
        phases=tuple(phases),
        seconds=iteration_seconds(phases, config.ppo.max_staleness),
        iterations=config.ppo.iterations if phases else 0,
        problems=tuple(dict.fromkeys(problems)),
        notes=tuple(notes(config, found)),
    )


_NO_REMEDY = "No change of one or a few settings that this plan knows makes it fit: use more or larger machines"


def processes(config: Config, site: Site) -> tuple[Plan, Placed[Machine]]:
    """The processes of a run at a site, and where they go."""
    machine = site.machines[0]
    plan = plan_machine(config, machine.cpus, machine.gpus) if site.local else plan_cluster(config, site.machines)
    return plan, place_processes(plan.processes, site.machines, by_cpus=not site.local)


def held(config: Config, models: Models, plan: Plan, placed: Placed[Machine], step: str) -> tuple[Held, ...]:
    """What every process of a step holds; those without a place are left out."""
    found = []
    for process in plan.processes:
        kind = process.name.partition("-")[0]
        if process.name not in placed.at or kind not in _PROCESSES[step]:
            continue
        machine = placed.at[process.name][1]
        gpu = machine.gpus > 0
        if kind == "generator":
            items = generator_memory(config, models.policy, machine)
        elif kind == "learner":
            items = learner_memory(config, models, step, gpu)
        else:
            items = reward_memory(config, models.reward, gpu)
        found.append(Held(process=process, items=items))
    return tuple(found)


_PROCESSES = {
    "sft": ("learner",),
    "sample": ("generator",),
    "reward": ("learner",),
    "ppo": ("generator", "learner", "reward"),
}


def fits(config: Config, site: Site, models: Models, step: str) -> bool:
    """Whether a step's processes all have a place and enough memory."""
    try:
        plan, placed = processes(config, site)
    except ValueError:
        return False
    if placed.unplaced or list(shape_problems(config, models, (step,))):
        return False
    return not any(misfits(held(config, models, plan, placed, step), placed))


def shape_problems(config: Config, models: Models, steps: Sequence[str]) -> Iterator[str]:
    """What the shape of the model does not allow."""
    shape, generator, rollout = models.policy, config.generator, config.rollout
    size, turn = generator.tensor_parallel_size, rollout.max_prompt_tokens + rollout.max_new_tokens
    if {"sample", "ppo"} & set(steps):
        if shape.heads % size:
            yield indivisible("generator.tensor_parallel_size", size, shape.heads, f"attention heads of {shape.name}")
        if turn > generator.max_model_len:
            yield (
                f"rollout.max_prompt_tokens + rollout.max_new_tokens = {turn:,} is more than generator.max_model_len = "
                f"{generator.max_model_len:,}. Nearest: generator.max_model_len = {turn}"
            )
        if generator.max_model_len > shape.positions:
            yield _too_long("generator.max_model_len", generator.max_model_len, shape.positions, shape.name)
    text = config.ppo.pretraining
    if "ppo" in steps and text.coef and text.sequence_tokens > shape.positions:
        yield _too_long("ppo.pretraining.sequence_tokens", text.sequence_tokens, shape.positions, shape.name)
    if "sft" in steps and config.sft.max_tokens > shape.positions:
        yield _too_long("sft.max_tokens", config.sft.max_tokens, shape.positions, shape.name)
    for step in ("sft", "reward", "ppo"):
        network = getattr(config, step).network
        if step in steps and network.last_layers > shape.layers:
            yield (
                f"{step}.network.last_layers = {network.last_layers}, and {shape.name} has {shape.layers} layers. "
                f"Nearest: {shape.layers}, or 0 for all"
            )


def notes(config: Config, batches: PPOPlan | StepsPlan | None) -> Iterator[str]:
    """What works, but not as somebody may think."""
    if not isinstance(batches, PPOPlan):
        return
    ranks, generators = config.cluster.learner_ranks, config.cluster.generators
    if batches.minibatch < ranks:
        yield f"a minibatch has {batches.minibatch} episodes for {ranks} learner ranks: the others idle"
    share = config.rollout.prompts_per_wave
    if batches.prompts < share * generators:
        fewer = -(-batches.prompts // generators)
        yield (
            f"{generators} generators take waves of {share} prompts, but a batch has {batches.prompts}: some idle. "
            f"rollout.prompts_per_wave = {fewer} gives each its part"
        )
    wanted = config.ppo.pretraining.sequences_per_episode * batches.minibatch
    if batches.pretraining_sequences and abs(wanted - batches.pretraining_sequences) > 1e-9:
        yield (
            f"ppo.pretraining.sequences_per_episode * ppo.minibatch_size = {wanted:g} is rounded to "
            f"{batches.pretraining_sequences} sequences a minibatch"
        )


def _too_long(key: str, value: int, positions: int, name: str) -> str:
    return f"{key} = {value:,} is more than the {positions:,} positions of {name}. Nearest: {key} = {positions}"


def _placement_problems(plan: Plan, placed: Placed[Machine], site: Site) -> Iterator[str]:
    if len(site.machines) == 1:
        machine = site.machines[0]
        try:
            check(plan, cores=machine.cpus, gpus=machine.gpus)
        except ResourceError as error:
            yield str(error)
    yield from placed.unplaced


def _batches(config: Config, step: str, lengths: Lengths, run_dir: Path) -> PPOPlan | StepsPlan | None:
    ranks, sft, reward, ppo = config.cluster.learner_ranks, config.sft, config.reward, config.ppo
    data = config.data
    if step == "ppo":
        text = ppo.pretraining
        return plan_ppo(
            iterations=ppo.iterations,
            prompts=ppo.prompts_per_batch,
            samples=config.rollout.samples_per_prompt,
            minibatch=ppo.minibatch_size,
            epochs=ppo.epochs,
            generators=config.cluster.generators,
            prompts_per_wave=config.rollout.prompts_per_wave,
            ranks=ranks,
            max_tokens=ppo.max_tokens_per_microbatch,
            pretraining_per_episode=text.sequences_per_episode if text.coef else 0.0,
            pretraining_tokens=text.sequence_tokens,
            lengths=lengths,
        )
    if step == "sft":
        rows = rows_of(data.demonstrations, run_dir / "data" / "demonstrations.jsonl") or config.plan.demonstrations
        if rows is None:
            return None
        return plan_sft(
            rows=rows,
            epochs=sft.epochs,
            batch=sft.batch_size,
            pretraining_share=sft.pretraining_share,
            tokens=min(lengths.sequence, sft.max_tokens),
            max_tokens=sft.max_tokens_per_microbatch,
            ranks=ranks,
        )
    if step == "reward":
        own = run_dir / "data"
        rows = (
            rows_of(data.comparisons, own / "comparisons.jsonl")
            or rows_of(data.preference_prompts, own / "preference_prompts.jsonl")
            or config.plan.ranked_prompts
        )
        if rows is None:
            return None
        return plan_reward(
            rows=rows,
            valid_share=reward.valid_share,
            epochs=reward.epochs,
            batch=reward.prompts_per_batch,
            completions=config.sample.completions_per_prompt,
            tokens=lengths.sequence,
            max_tokens=reward.max_tokens_per_microbatch,
            ranks=ranks,
        )
    return None


def rows_of(configured: Path | None, own: Path) -> int | None:
    """Lines of a data file that are not blank; None where there is no such file."""
    path = configured or own
    if not path.is_file():
        return None
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip()) or None
