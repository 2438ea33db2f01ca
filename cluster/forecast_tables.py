"""A forecast as tables for people and as JSON for scripts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from cluster.forecast import Forecast, Step
from cluster.hardware import GIB
from cluster.memory import Held
from cluster.plan import PPOPlan, StepsPlan

TITLES = {"sft": "Step 1, SFT", "sample": "Step 2, sampling", "reward": "Step 2, reward model", "ppo": "Step 3, PPO"}


def tables(found: Forecast) -> RenderableType:
    """Everything, as it is printed."""
    parts: list[RenderableType] = [_heading(found)]
    parts += [_batches(step) for step in found.steps if step.batches is not None]
    parts.append(_processes(found))
    parts += [_memory(found, step) for step in found.steps]
    if found.phases:
        parts.append(_phases(found))
    return Group(*(part for one in parts for part in (one, "")), _verdict(found))


def _heading(found: Forecast) -> RenderableType:
    models, device = found.models, found.site.machines[0].device
    shapes = [f"{models.policy.name}: {models.policy.parameters:,} parameters"]
    if models.reward != models.policy:
        shapes.append(f"reward model and critic {models.reward.name}: {models.reward.value_parameters:,}")
    return "\n".join(
        [
            f"Planned for {found.site.title}",
            f"Device: {device.name}, {device.flops / 1e12:.3g} Tflop/s in bfloat16, {device.bandwidth / 1e9:.3g} GB/s, "
            f"{device.memory / GIB:.1f} GiB ({device.source})",
            f"Model: {'; '.join(shapes)}",
            f"Counted with prompts of {found.lengths.prompt:,} and responses of {found.lengths.response:,} tokens",
        ]
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    return table


def _batches(step: Step) -> RenderableType:
    table = _table(f"{TITLES[step.name]}: batches")
    table.show_header = False
    table.add_column()
    table.add_column()
    rows = _ppo_rows(step.batches) if isinstance(step.batches, PPOPlan) else _step_rows(step.batches)
    for name, number, how in rows:
        table.add_row(name, f"{number:,}", how)
    table.columns[1].justify = "right"
    table.columns[2].justify = "left"
    return table


def _ppo_rows(plan: PPOPlan) -> Iterator[tuple[str, int, str]]:
    yield "episodes a batch", plan.episodes, f"{plan.prompts:,} prompts x {plan.samples} samples, each a trajectory"
    yield "waves of a generator", plan.waves, "that it samples one after the other for a batch"
    yield "minibatches", plan.minibatches, f"of {plan.minibatch:,} episodes, x {plan.epochs} epochs"
    yield "micro-batches", plan.microbatches, "of a rank in a minibatch"
    if plan.pretraining_sequences:
        yield "pretraining sequences", plan.pretraining_sequences, "beside each minibatch"
        yield "their micro-batches", plan.pretraining_microbatches, "of a rank in a minibatch"
    yield "optimizer steps", plan.steps, "an iteration, of the policy and of the critic"
    yield "tokens of episodes", plan.episode_tokens, f"a batch, of which {plan.response_tokens:,} are sampled"
    yield "tokens of pretraining", plan.pretraining_tokens, "an iteration"
    yield "iterations", plan.iterations, "batches in all"
    yield "optimizer steps in all", plan.total_steps, f"{plan.total_episodes:,} episodes"
    yield "tokens trained in all", plan.total_tokens, "episodes x epochs + pretraining"


def _step_rows(plan: StepsPlan | None) -> Iterator[tuple[str, int, str]]:
    assert plan is not None
    yield "rows", plan.rows, f"x {plan.epochs} epochs"
    mixed = f", {plan.pretraining:.0%} of them pretraining text" if plan.pretraining else ""
    yield "optimizer steps", plan.steps, f"of {plan.batch} each{mixed}"
    yield "micro-batches", plan.microbatches, "of a rank in a step"
    yield "tokens in all", plan.total_tokens, f"{plan.step_tokens:,} a step"


def _processes(found: Forecast) -> RenderableType:
    table = _table("Who runs where", "process", "on", "GPUs", "CPUs", "threads", "pinned to")
    rows = []
    for process in found.plan.processes:
        at = found.placed.at.get(process.name)
        pin = ",".join(map(str, process.pin)) if process.pin and found.site.local else ""
        where = at[1].name if at else "no place"
        rows.append((process.name, where, f"{process.gpus:g}", f"{process.cpus:g}", str(process.threads), pin))
    for row in grouped(rows, lambda row: row[0], lambda row: row[1:]):
        table.add_row(row[0], *row[1])
    table.add_row("controller", found.site.machines[0].name, "0", "", "1", "")
    return table


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
    gpu = any(found.placed.at[one.process.name][1].gpus for one in kinds.values())
    heads = [f"{kind}\n{place}" for kind in kinds for place in (("GPU", "main") if gpu else ("main",))]
    table = _table(f"{TITLES[step.name]}: memory of each process, GiB (an estimate)", "", *heads)
    for column in table.columns:
        column.no_wrap = True
    items = dict.fromkeys(name for one in kinds.values() for name in one.items)
    for item in items:
        sizes = [one.items.get(item) for one in kinds.values()]
        table.add_row(item, *_cells([(size.device, size.host) if size else (0.0, 0.0) for size in sizes], gpu))
    table.add_row("together", *_cells([(one.device, one.host) for one in kinds.values()], gpu), style="bold")
    machines = [found.placed.at[one.process.name][1] for one in kinds.values()]
    limits = [(float(machine.device.memory), float(machine.memory)) for machine in machines]
    table.add_row("there is", *_cells(limits, gpu), style="dim")
    return table


def _cells(sizes: Sequence[tuple[float, float]], gpu: bool) -> list[str]:
    return [
        f"{size / GIB:.2f}" if size else "" for device, host in sizes for size in ((device, host) if gpu else (host,))
    ]


def _phases(found: Forecast) -> RenderableType:
    table = _table("Time of one PPO iteration, seconds (an estimate)", "phase", "at least", "expect", "from")
    table.columns[-1].justify = "left"
    for phase in found.phases:
        table.add_row(phase.name, f"{phase.least:.3g}", f"{phase.expected:.3g}", phase.formula)
    least, expected = found.seconds
    table.add_row("an iteration", f"{least:.3g}", f"{expected:.3g}", "", style="bold")
    hours = f"{found.iterations:,} iterations: at least {_span(least * found.iterations)}"
    table.add_row("all", "", "", f"{hours}, expect {_span(expected * found.iterations)}")
    return table


def _span(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _verdict(found: Forecast) -> RenderableType:
    lines = [f"note: {note}" for note in found.notes]
    lines += [f"cannot work: {problem}" for problem in found.problems]
    return "\n".join([*lines, "This plan cannot work as it stands." if found.problems else "This plan fits."])


def as_json(found: Forecast) -> dict[str, Any]:
    """The same as data: bytes, seconds, counts."""
    return {
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
            }
            for step in found.steps
        },
        "iteration": {
            "phases": [asdict(phase) for phase in found.phases],
            "least_s": found.seconds[0],
            "expected_s": found.seconds[1],
        },
    }


def _counts(plan: PPOPlan | StepsPlan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    derived = {"total_tokens": plan.total_tokens}
    if isinstance(plan, PPOPlan):
        derived |= {"steps": plan.steps, "total_steps": plan.total_steps, "total_episodes": plan.total_episodes}
    return asdict(plan) | derived
