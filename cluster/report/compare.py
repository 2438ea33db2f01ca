"""The report of several runs side by side: curves in the same axes, figures, benchmarks, samples and times."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from cluster.report import charts
from cluster.report.card.card import judged
from cluster.report.charts import rounded
from cluster.report.plot import SERIES, Plot
from cluster.report.plots import BY_ARM, arms, curve, labels, over_optimisation, suite, win_rates
from cluster.report.report import Exchange, render, results, subject
from cluster.rundir.files import Run, Sample, read_run
from cluster.rundir.record import flat
from cluster.tracking.console import Console
from reward_server.redaction import visible

FILE = "comparison.html"
_PROMPTS = 12  # that are shown
_BEFORE_PPO = {
    ("sft", "sft/loss"): "SFT loss, nats a token",
    ("sft", "sft/valid_loss"): "SFT loss, held out, nats a token",
    ("reward", "reward_model/loss"): "Loss of the reward model, nats a pair",
}
Arm = tuple[Run, str, str, str]
"""(run, stage of a PPO run, name, colour of the run)"""


def write_comparison(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Write a page on several runs, by default comparison.html in the first, and return it.

    Raises ValueError for a directory that is no run.
    """
    return _write(_read(run_dirs), output or run_dirs[0] / FILE)


def _read(run_dirs: Sequence[Path]) -> dict[str, Run]:
    return dict(zip(_names(run_dirs), map(read_run, run_dirs), strict=True))


def _write(runs: Mapping[str, Run], path: Path) -> Path:
    found = [*_arms(runs)]
    page = render(
        "compare.html",
        title=visible(f"{len(runs)} runs compared"),
        runs=[(name, subject(run), str(run.environment.get("date", ""))[:10]) for name, run in runs.items()],
        labeler=_labeler(runs.values()),
        settings=list(_settings(runs)),
        results=list(_results(runs)),
        curves={part: list(_curves(found, part)) for part in BY_ARM},
        before=list(_before_ppo(runs)),
        frontier=list(over_optimisation(runs)),
        tax=list(_tax(found)),
        suites={
            "Benchmarks": list(suite(_suites(runs), "figures")),
            "Benchmarks: differences": list(suite(_suites(runs), "difference")),
            "Win rates": list(win_rates(_suites(runs))),
        },
        exchanges=_exchanges(runs),
        times=list(_times(runs)),
    )
    path.write_text(page, encoding="utf-8")
    return path


def show_comparison(run_dirs: Sequence[Path], output: Path | None, console: Console, as_json: bool = False) -> None:
    """Write the page, and the figures of the runs into the terminal."""
    runs = _read(run_dirs)
    path = _write(runs, output or run_dirs[0] / FILE)
    if as_json:
        told = {"report": str(path), "summaries": {name: run.summary for name, run in runs.items()}}
        console.line(json.dumps(told, indent=2))
        return
    table = Table("", *runs, box=None)
    for name, *cells in _results(runs):
        table.add_row(name, *(cell.partition(" (")[0] for cell in cells))
    console.show(table)
    console.line(f"The comparison is in {path}")


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell it from the others."""
    paths = [path.resolve().parts for path in run_dirs]
    depths = range(1, max(map(len, paths)) + 1)
    depth = next(depth for depth in depths if len({path[-depth:] for path in paths}) == len(paths))
    return [visible("/".join(path[-depth:])) for path in paths]


def _arms(runs: Mapping[str, Run]) -> Iterator[Arm]:
    """Every PPO run of every run, in the run's colour."""
    for index, (name, run) in enumerate(runs.items()):
        own = arms(run)
        for stage, arm, _ in own:
            yield run, stage, f"{name}: {arm}" if len(own) > 1 else name, SERIES[index % len(SERIES)]


def _labeler(runs: Iterable[Run]) -> str:
    """Whose verdicts gold is; of several, all of them."""
    return " and ".join(dict.fromkeys(run.labeler for run in runs if judged(run)))


def _settings(runs: Mapping[str, Run]) -> Iterator[tuple[str, ...]]:
    """A head, and each setting that the runs do not have in common."""
    tables = [dict(flat(run.config)) for run in runs.values()]
    yield ("setting", *runs)
    for key in dict.fromkeys(chain(*tables)):
        cells = [json.dumps(table[key]) if key in table else "" for table in tables]
        if len({*cells}) > 1:
            yield (key, *cells)


def _results(runs: Mapping[str, Run]) -> Iterator[tuple[str, ...]]:
    """A row for each figure of a single report, with what it is of."""
    rows = defaultdict[str, dict[str, str]](dict)
    for name, run in runs.items():
        for one in results(run):
            row = rows[f"{one.name}, {one.arm}" if one.arm else one.name]
            row[name] = f"{one.value} ({one.detail})"
    yield from ((figure, *(row.get(name, "") for name in runs)) for figure, row in rows.items())


def _curves(found: Sequence[Arm], part: str) -> Iterator[Plot]:
    """The plots of a part of the page, with a curve for each PPO run of each run."""
    xlabel, labeler = ("iterations done" if part == "held_out" else "iteration"), _labeler(run for run, *_ in found)
    for metric, title in BY_ARM[part].items():
        if curves := [*chain.from_iterable(curve(run, stage, metric, *look) for run, stage, *look in found)]:
            yield charts.lines(title.format(labeler=labeler), f"PPO {xlabel}", curves)


def _before_ppo(runs: Mapping[str, Run]) -> Iterator[Plot]:
    colours = {name: SERIES[index % len(SERIES)] for index, name in enumerate(runs)}
    for (stage, metric), title in _BEFORE_PPO.items():
        found = (curve(run, stage, metric, name, colours[name]) for name, run in runs.items())
        if curves := [*chain.from_iterable(found)]:
            yield charts.lines(title, "step", curves, smooth=True)


def _tax(found: Sequence[Arm]) -> Iterator[Plot]:
    changes = [(name, colour, run.change(stage, "pretraining_loss")) for run, stage, name, colour in found]
    if rows := [(name, colour, change.before, change.after) for name, colour, change in changes if change]:
        yield charts.dumbbells("Alignment tax: loss on pretraining text", rows, "nats a token; grey: before PPO")


def _suites(runs: Mapping[str, Run]) -> dict[str, Mapping[str, Any]]:
    """The tables of the suite of every model of every run."""
    return {
        f"{name}: {model}": table
        for name, run in runs.items()
        for model, table in run.figures("suite").items()
        if isinstance(table, dict)
    }


def _exchanges(runs: Mapping[str, Run]) -> list[Exchange]:
    """The first prompts by id that two runs answered, with the responses of all; the SFT model's of the first run."""
    models: list[tuple[str, dict[Any, Sample]]] = []
    answered = Counter[Any]()
    for index, (name, run) in enumerate(runs.items()):
        own = [
            (f"{name}: {one}", run.evaluations[label]) for label, one, _ in labels(run) if not index or label != "sft"
        ]
        by_prompt = [(label, {(sample.id, sample.prompt): sample for sample in samples}) for label, samples in own]
        answered.update({*chain.from_iterable(samples for _, samples in by_prompt)})
        models += by_prompt
    shared = sorted(key for key, count in answered.items() if count > 1)[:_PROMPTS]
    why = f"The first {len(shared)} prompts by id that two runs answered"
    return [
        Exchange("" if index else why, key[1], tuple((label, samples.get(key)) for label, samples in models))
        for index, key in enumerate(shared)
    ]


def _times(runs: Mapping[str, Run]) -> Iterator[tuple[str, ...]]:
    """A head, and the seconds of each stage and of the parts of an iteration, on average."""
    spent = defaultdict[str, dict[str, float]](dict)
    for name, run in runs.items():
        for stage, _, seconds in run.phases:
            spent[stage][name] = spent[stage].get(name, 0.0) + seconds
    for (name, run), part in product(runs.items(), ("rollout", "evaluate", "update", "publish")):
        for arm in run.arms:
            if series := run.series(arm, f"time/{part}"):
                spent[f"{arm}: an iteration's {part}, on average"][name] = fmean(series.values())
    yield ("seconds", *runs)
    yield from ((what, *(rounded(row[name]) if name in row else "" for name in runs)) for what, row in spent.items())
