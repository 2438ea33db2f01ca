"""A forecast as tables for people and as JSON for scripts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.plan.batches import Batches
from cluster.plan.counts import PPOPlan, SamplingPlan, StepsPlan
from cluster.plan.estimates import TIME_FACTOR
from cluster.plan.forecast import Forecast, Step
from cluster.plan.hardware import GIB
from cluster.plan.memory import Held

TITLES = {
    "sft": "Step 1, SFT",
    "baseline": "Step 1, baseline",
    "sample": "Step 2, sampling",
    "reward": "Step 2, reward model",
    "select": "Choice of an epoch",
    "ppo": "Step 3, PPO",
    "evaluate": "Evaluation",
    "serve": "Reward service",
}
_LEGEND = "N parameters, b bytes of each, T tokens, F operations and W bytes a second: cluster/plan/estimates.py"


def tables(found: Forecast, files: str | None = None) -> RenderableType:
    """Everything but notes and problems, as it is printed; `files`: what the command reads and writes."""
    parts: list[RenderableType] = [_heading(found)]
    parts += [files] if files else []
    parts += [_batches(step.name, step.batches) for step in found.steps if step.batches is not None]
    parts.append(_processes(found))
    parts += [_memory(found, step) for step in found.steps if step.held]
    if any(step.phases for step in found.steps):
        parts.append(_times(found))
    return Group(*(part for one in parts for part in (one, "")))


def _heading(found: Forecast) -> RenderableType:
    models, device, lengths = found.models, found.site.machines[0].device, found.lengths
    shapes = [f"{models.policy.name}: {models.policy.parameters:,} parameters"]
    if models.reward != models.policy:
        shapes.append(f"reward model and critic {models.reward.name}: {models.reward.value_parameters:,}")
    rows = {
        "plan of": f"rayward {found.command}",
        "for": found.site.title,
        "device": f"{device.name}: {device.flops / 1e12:.3g} Tflop/s in bfloat16, {device.bandwidth / 1e9:,.0f} GB/s, "
        f"{device.memory / GIB:.1f} GiB ({device.source})",
        "model": "; ".join(shapes) if models.policy.parameters else "none: nothing of the score is a reward model",
        "tokens": f"{lengths.prompt:,} of a prompt, {lengths.response:,} of a response on average, "
        f"{lengths.longest:,} at most ({lengths.source})",
    }
    if found.command == "serve":
        del rows["tokens"]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _table(*columns: str) -> Table:
    table = Table(header_style="dim", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _batches(name: str, batches: Batches) -> RenderableType:
    table = _table("", "", "")
    table.show_header = False
    table.columns[2].justify, table.columns[2].no_wrap = "left", False
    rows = {PPOPlan: _ppo_rows, StepsPlan: _step_rows, SamplingPlan: _sampling_rows}[type(batches)]
    for row, number, how in rows(batches):  # pyright: ignore[reportArgumentType]  # the one of its type
        table.add_row(row, f"{number:,}", how)
    return _under(f"{TITLES[name]}: batches", table)


def _ppo_rows(plan: PPOPlan) -> Iterator[tuple[str, int, str]]:
    yield "episodes a batch", plan.episodes, f"{plan.prompts:,} prompts x {plan.samples} samples, each a trajectory"
    yield "waves of a generator", plan.waves, "one after the other, for a batch"
    yield "minibatches", plan.minibatches, f"of {plan.minibatch:,} episodes, x {plan.epochs} epochs"
    yield "micro-batches", plan.microbatches, "of a rank in a minibatch"
    if plan.pretraining_sequences:
        yield "pretraining sequences", plan.pretraining_sequences, "beside each minibatch"
        yield "their micro-batches", plan.pretraining_microbatches, "of a rank in a minibatch"
    yield "optimizer steps", plan.steps, "an iteration, of policy and critic each"
    yield "tokens of episodes", plan.episode_tokens, f"a batch, {plan.response_tokens:,} of them sampled"
    yield "tokens of pretraining", plan.pretraining_tokens, "an iteration"
    yield "iterations", plan.iterations, "batches in all"
    yield "optimizer steps in all", plan.total_steps, f"{plan.total_episodes:,} episodes"
    yield "tokens trained in all", plan.total_tokens, "episodes x epochs + pretraining"


def _step_rows(plan: StepsPlan) -> Iterator[tuple[str, int, str]]:
    yield "rows", plan.rows, f"x {plan.epochs} epochs"
    mixed = f", {plan.pretraining:.0%} of them pretraining text" if plan.pretraining else ""
    yield "optimizer steps", plan.steps, f"of {plan.batch} each{mixed}"
    yield "micro-batches", plan.microbatches, "of a rank in a step"
    yield "tokens in all", plan.total_tokens, f"{plan.step_tokens:,} a step"


def _sampling_rows(plan: SamplingPlan) -> Iterator[tuple[str, int, str]]:
    yield "responses", plan.episodes, f"{plan.prompts:,} prompts x {plan.samples} samples"
    yield "waves of a generator", plan.waves, "one after the other"
    if plan.times > 1:
        yield "models", plan.times, "one after the other"
    yield "tokens sampled in all", plan.total_tokens, ""


def _processes(found: Forecast) -> RenderableType:
    pinned = found.site.local and any(process.pin for process in found.plan.processes)
    table = _table("process", "on", "GPUs", "CPUs", "threads", *["cores"] * pinned)
    rows = []
    for process in found.plan.processes:
        at = found.placed.at.get(process.name)
        pin = [",".join(map(str, process.pin or ()))] * pinned
        where = at[1].name if at else "no place"
        rows.append((process.name, where, f"{process.gpus:g}", f"{process.cpus:g}", str(process.threads), *pin))
    for name, rest in grouped(rows, lambda row: row[0], lambda row: row[1:]):
        table.add_row(name, *rest)
    table.add_row("the command itself", found.site.machines[0].name, "0", "0", "1", *[""] * pinned)
    return _under("Who runs where", table)


def grouped(
    rows: Sequence[Any], name: Callable[[Any], str], rest: Callable[[Any], tuple[str, ...]]
) -> list[tuple[str, tuple[str, ...]]]:
    """Neighbours that differ in their number alone, as one row: `learner-0 .. 5`."""
    found: list[tuple[str, str, tuple[str, ...]]] = []
    for row in rows:
        kind = name(row).partition("-")[0]
        if found and found[-1][0].partition("-")[0] == kind and found[-1][2] == rest(row):
            found[-1] = (found[-1][0], name(row), rest(row))
        else:
            found.append((name(row), name(row), rest(row)))
    return [(first if first == last else f"{first} .. {last.partition('-')[2]}", more) for first, last, more in found]


def _memory(found: Forecast, step: Step) -> RenderableType:
    """A column a kind of process, a row an item: a rank's networks are many, its twins are alike."""
    kinds: dict[str, Held] = {}
    for one in step.held:
        kinds.setdefault(one.process.name.partition("-")[0], one)
    machines = [found.placed.at[one.process.name][1] for one in kinds.values()]
    table = _table("", *kinds)
    on_gpu = [one.process.gpus > 0 for one in kinds.values()]
    for item in dict.fromkeys(name for one in kinds.values() for name in one.items):
        sizes = [one.items.get(item) for one in kinds.values()]
        if any(size and size.device for size in sizes):
            table.add_row(item, *(_gib(size.device if size else 0) for size in sizes))
        if any(size and size.host for size in sizes):
            where = " (main memory)" if any(on_gpu) else ""
            table.add_row(f"{item}{where}", *(_gib(size.host if size else 0) for size in sizes))
    if any(on_gpu):
        table.add_row("together, on a GPU", *(_gib(one.device) for one in kinds.values()), style="bold")
        has = (machine.device.memory if gpu else 0 for machine, gpu in zip(machines, on_gpu, strict=True))
        table.add_row("a GPU has", *map(_gib, has), style="dim")
    table.add_row("together, in main memory", *(_gib(one.host) for one in kinds.values()), style="bold")
    table.add_row("the machine has", *(_gib(machine.memory) for machine in machines), style="dim")
    return _under(f"{TITLES[step.name]}: memory of each process in GiB (an estimate)", table)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size else ""


def _times(found: Forecast) -> RenderableType:
    table = _table("phase", "at least", "expect", "from")
    table.columns[3].justify, table.columns[3].no_wrap = "left", False
    for step in found.steps:
        for phase in step.phases:
            seconds = (_seconds(phase.least), _seconds(phase.expected))
            table.add_row(f"{step.name}: {phase.name}", *seconds, phase.formula)
        least, expected = step.seconds
        if len(step.phases) > 1 and step.name == "ppo":
            table.add_row("ppo: an iteration", _seconds(least), _seconds(expected), "", style="bold")
        if step.times != 1:
            name = f"{step.name}: {step.times:g} times"
            table.add_row(name, _span(step.times * least), _span(step.times * expected), "")
    least, expected = (sum(step.times * step.seconds[which] for step in found.steps) for which in (0, 1))
    table.add_row("all of it", _span(least), _span(expected), "", style="bold")
    return Group(
        _under("Time in seconds (an estimate; without starting processes, saving and held-out measurements)", table),
        Text(f"{_LEGEND}. {_tolerance(found)}", style="dim"),
    )


def _tolerance(found: Forecast) -> str:
    if any(machine.gpus for machine in found.site.machines):
        return "On GPUs none of this has been measured."
    held = f"Held within a factor of {TIME_FACTOR:g} on a small model"
    return f"{held}; larger ones train up to 3 times as long: docs/cluster.md."


def _under(title: str, table: Table) -> RenderableType:
    return Group(Text(title, style="bold"), table)


def _seconds(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _span(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def as_json(found: Forecast) -> dict[str, Any]:
    """The same as data: bytes, seconds, counts."""
    return {
        "command": found.command,
        "works": not found.problems,
        "problems": list(found.problems),
        "notes": list(found.notes),
        "site": {"title": found.site.title, "machines": [asdict(machine) for machine in found.site.machines]},
        "models": asdict(found.models),
        "lengths": asdict(found.lengths),
        "processes": [
            {**asdict(process), "machine": at[1].name if at else None}
            for process in found.plan.processes
            for at in (found.placed.at.get(process.name),)
        ],
        "steps": {
            step.name: {
                "batches": _counts(step.batches),
                "memory": {
                    one.process.name: {name: asdict(size) for name, size in one.items.items()} for one in step.held
                },
                "phases": [asdict(phase) for phase in step.phases],
                "least_s": step.seconds[0],
                "expected_s": step.seconds[1],
                "times": step.times,
            }
            for step in found.steps
        },
    }


def _counts(plan: Batches | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    derived = {"total_tokens": plan.total_tokens}
    if isinstance(plan, PPOPlan):
        derived |= {"steps": plan.steps, "total_steps": plan.total_steps, "total_episodes": plan.total_episodes}
    return asdict(plan) | derived
