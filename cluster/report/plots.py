"""The plots and tables of one run. Each function yields those for which the run has the figures, maybe none."""

import math
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice, product
from pathlib import Path
from statistics import fmean
from typing import Any

from cluster.report import charts
from cluster.report.charts import Curve
from cluster.report.plot import BEFORE, SERIES, Plot
from cluster.rundir.files import Run, number
from reward_server.redaction import visible

BY_ARM: dict[str, dict[str, str]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
"""Title of each plot with a curve for each PPO run, by part of the page and metric."""


def plots(run: Run) -> dict[str, list[Plot]]:
    """Every plot of a run, by what it is about: the names of the functions below, and of the parts of plots.toml."""
    found = {part: list(_by_arm(run, part)) for part in BY_ARM}
    kinds = (rounds, tax, gold_by_kl, gold_histogram, reward_model, supervised, selection)
    found |= {kind.__name__: list(kind(run)) for kind in kinds}
    return found | {"over_optimisation": list(over_optimisation({"": run}))}


def overview(run: Run) -> list[Plot]:
    """The four plots that tell the most; fewer when the run has fewer."""
    kl = (plot for plot in _by_arm(run, "learning") if plot.title.startswith("KL"))
    parts = (_by_arm(run, "gold"), tax(run), gold_histogram(run), kl, reward_model(run), supervised(run))
    return list(islice(chain(*parts), 4))


def arms(run: Run) -> list[tuple[str, str, str]]:
    """(stage, name, colour) of each PPO run; PPO-ptx is one with a pretraining mix."""
    names = ["PPO-ptx" if run.series(arm, "loss/pretraining") else "PPO" for arm in run.arms]
    repeated = len(set(names)) < len(names)
    return [
        (arm, f"{name} ({arm})" if repeated else name, SERIES[index % len(SERIES)])
        for index, (arm, name) in enumerate(zip(run.arms, names, strict=True))
    ]


def labels(run: Run) -> list[tuple[str, str, str]]:
    """(label, name, colour) of each evaluation, those from before PPO first, in grey.

    What a further PPO run measured before it began ("<arm>-start") is of the SFT model once more: left out.
    """
    known = {"sft": ("SFT", BEFORE)} | {arm: (name, colour) for arm, name, colour in arms(run)}
    shown = [label for label in run.evaluations if label.removesuffix("-start") not in {*run.arms} - {label}]
    order = sorted(shown, key=lambda label: (label in run.arms, label != "sft", label))
    return [(label, *known.get(label, (label, BEFORE))) for label in order]


def rounds(run: Run) -> Iterator[Plot]:
    """Win rates, gold and the reward model's accuracy by round, with 95 % intervals."""
    table, xlabel = round_table(run), "round; bar: 95% CI"
    curves = _by_round(table, "win_rate_sft", "against the SFT model", SERIES[0])
    curves += _by_round(table, "win_rate_previous", "against the round before", SERIES[1])
    if curves:
        yield charts.lines(f"Win rate, {run.labeler}", xlabel, curves, level=(0.5, "even"))
    before = [value for row in table.values() if (value := number(row.get("gold_sft"))) is not None]
    if curves := _by_round(table, "gold", "policy", SERIES[0]):
        level = (before[0], "SFT") if before else None
        yield charts.lines(f"Gold score, {run.labeler}", xlabel, curves, level=level)
    who = ", ".join(dict.fromkeys(visible(str(row["rankings"])) for row in table.values() if "rankings" in row))
    if curves := _by_round(table, "accuracy", "reward model", SERIES[0]):
        curves += _by_round(table, "labelers_agree", "two labelers", SERIES[1])
        yield charts.lines(f"Reward-model accuracy, {who}", xlabel, curves, level=(0.5, "chance"))


def round_table(run: Run) -> dict[int, Mapping[str, Any]]:
    """The summary's table of rounds, by their number."""
    rows = run.figures("rounds").items()
    return dict(sorted((int(key), row) for key, row in rows if key.isdecimal() and isinstance(row, dict)))


def _by_round(table: Mapping[int, Mapping[str, Any]], key: str, name: str, colour: str) -> list[Curve]:
    """A curve of a figure with its interval, which may be a table of its own; none where no round has it."""
    found: list[tuple[float, ...]] = []
    for index, row in table.items():
        part = row.get(key)
        value, ci = (part.get("rate"), part.get("ci")) if isinstance(part, dict) else (part, row.get(f"{key}_ci"))
        if (point := number(value)) is not None:
            found.append((index, point, *(interval(ci) or (math.nan, math.nan))))
    if not found:
        return []
    x, y, low, high = zip(*found, strict=True)
    return [Curve(name=name, colour=colour, x=x, y=y, low=low, high=high)]


def interval(value: object) -> tuple[float, float] | None:
    """A confidence interval as it stands in a JSON file, or None."""
    if isinstance(value, list) and len(value) == 2:
        low, high = number(value[0]), number(value[1])
        if low is not None and high is not None:
            return low, high
    return None


def curve(run: Run, stage: str, metric: str, name: str, colour: str) -> list[Curve]:
    """A curve, with a band where the run has logged its ends or a standard deviation; none without the metric."""
    series = run.series(stage, metric)
    ends = [run.series(stage, f"{metric}_{end}") for end in ("low", "high")]
    if metric.endswith("/mean") and not any(ends):
        spread = run.series(stage, metric.replace("/mean", "/std"))
        ends = [{at: series[at] + sign * spread[at] for at in series if at in spread} for sign in (-1, 1)]
    low, high = (tuple(end.get(at, math.nan) for at in series) if end else () for end in ends)
    drawn = Curve(name=name, colour=colour, x=tuple(series), y=tuple(series.values()), low=low, high=high)
    return [drawn] if series else []


def _by_arm(run: Run, part: str) -> Iterator[Plot]:
    """A plot for each metric of a part of the page, with a curve for each PPO run."""
    # what was measured before and after is told elsewhere
    xlabel, fewest = ("PPO iterations done", 3) if part == "held_out" else ("PPO iteration", 1)
    for metric, title in BY_ARM[part].items():
        found = chain.from_iterable(curve(run, arm, metric, name, colour) for arm, name, colour in arms(run))
        if curves := [one for one in found if len(one.x) >= fewest]:
            yield charts.lines(title.format(labeler=run.labeler), xlabel, curves)


def tax(run: Run) -> Iterator[Plot]:
    """The loss on pretraining text before and after each PPO run."""
    changes = [(name, colour, run.change(arm, "pretraining_loss")) for arm, name, colour in arms(run)]
    if rows := [(name, colour, change.before, change.after) for name, colour, change in changes if change]:
        yield charts.dumbbells("Alignment tax: loss on pretraining text", rows, "nats a token; grey: before PPO")


def gold_by_kl(run: Run) -> Iterator[Plot]:
    """How much of the labeler's liking a nat of KL bought (Gao et al. 2023 plot it so)."""
    curves = []
    for arm, name, colour in arms(run):
        gold, kl = run.series(arm, "gold/mean"), run.series(arm, "kl/mean")
        if steps := [step for step in gold if step in kl]:
            x, y = tuple(kl[step] for step in steps), tuple(gold[step] for step in steps)
            curves.append(Curve(name=name, colour=colour, x=x, y=y))
    if curves:
        title, xlabel = f"Gold bought with KL, {run.labeler}", "KL to the SFT model (nats a response)"
        yield charts.lines(title, xlabel, curves, path=True)


def over_optimisation(runs: Mapping[str, Run]) -> Iterator[Plot]:
    """Gold and score against how far policies went, runs in the same axes: where gold falls, and the score does not.

    A point is a held-out measurement of PPO, or the best of k of the SFT model's responses to the same prompts. How far
    is the square root of the KL, in which gold has a simple form (Gao et al. 2023). None without a curve of 3 points.
    Several runs have names, and each a colour.
    """
    xlabel = "square root of the KL to the SFT model (nats a response)"
    judges = ", ".join(dict.fromkeys(run.labeler for run in runs.values()))
    for figure, title in (("gold", f"Gold by distance, {judges}; 95% CI"), ("score", "Score by distance")):
        curves: list[Curve] = []
        for index, (label, run) in enumerate(runs.items()):
            named = f"{label}: " if len(runs) > 1 else ""
            sources = [(arm, "heldout", name) for arm, name, _ in arms(run)]
            if run.figures("best_of_n").items() >= {"model": "sft", "file": "prompts_heldout"}.items():
                sources.append(("best-of-n", "best_of_n", "best of n"))
            for stage, area, name in sources:
                kl, colour = run.series(stage, f"{area}/kl"), SERIES[(index if named else len(curves)) % len(SERIES)]
                for one in curve(run, stage, f"{area}/{figure}", named + name, colour):
                    if kl.keys() >= {*one.x}:
                        curves.append(replace(one, x=tuple(math.sqrt(max(0.0, kl[int(step)])) for step in one.x)))
        if any(len(one.x) > 2 for one in curves):
            yield charts.lines(title, xlabel, curves, path=True)


def gold_histogram(run: Run) -> Iterator[Plot]:
    """The verdicts on held-out responses, before and after."""
    groups = [
        (name, colour, gold)
        for label, name, colour in labels(run)
        if (gold := [sample.gold for sample in run.evaluations[label] if sample.gold is not None])
    ]
    if groups:
        yield charts.histogram(f"Gold score of responses, {run.labeler}", groups)


def reward_model(run: Run) -> Iterator[Plot]:
    """Its training."""
    if curves := curve(run, "reward", "reward_model/loss", "training", SERIES[0]):
        yield charts.lines("Loss of the reward model, nats a pair", "step", curves, smooth=True)


def accuracy(run: Run) -> Iterator[tuple[str, str, str]]:
    """(of what, share of held-out pairs, what to know of it): the reward model beside a baseline, and by rank gap."""
    table = run.figures("reward") | run.calibration
    kinds = {
        "accuracy": "reward model",
        "prompt_accuracy": "the same, mean of prompts",
        "longer_wins": 'rule "the longer wins"',
    }
    for key, name in kinds.items():
        if (share := number(table.get(key))) is not None:
            ends = interval(table.get(f"{key}_ci"))
            yield name, f"{share:.3f}", f"95% CI {ends[0]:.2f} to {ends[1]:.2f}" if ends else ""
    gaps = table.get("by_rank_gap")
    for row in (one for one in gaps if isinstance(one, dict)) if isinstance(gaps, list) else ():
        gap, share, count = (number(row.get(key)) for key in ("gap", "accuracy", "count"))
        if gap is not None and share is not None:
            yield f"reward model, {gap:.0f} apart in rank", f"{share:.3f}", f"{count or 0:.0f} pairs"
    by = table.get("by_labeler")
    parts = {f"rankings of {visible(name)}": part for name, part in by.items()} if isinstance(by, dict) else {}
    for name, part in {"control, drawn at random": table.get("control"), **parts}.items():
        if isinstance(part, dict) and (share := number(part.get("accuracy"))) is not None:
            ends, pairs = interval(part.get("accuracy_ci")), number(part.get("pairs")) or 0
            bounds = f"95% CI {ends[0]:.2f} to {ends[1]:.2f}, " if ends else ""
            yield f"reward model, {name}", f"{share:.3f}", f"{bounds}{pairs:.0f} pairs"


def use_cases(run: Run) -> Iterator[tuple[str, ...]]:
    """A head, and for each use case its held-out prompts, and every model's mean gold and score on them."""
    models = [(name, run.evaluations[label]) for label, name, _ in labels(run)]
    cases = sorted({sample.use_case for _, samples in models for sample in samples if sample.use_case})
    if cases:
        yield ("use case", "prompts", *(f"{what}, {name}" for what in ("gold", "score") for name, _ in models))
    for case in cases:
        own = [[sample for sample in samples if sample.use_case == case] for _, samples in models]
        figures = [[value for one in samples if (value := one.gold) is not None] for samples in own]
        figures += [[value for one in samples if (value := one.score) is not None] for samples in own]
        count = len({sample.id for samples in own for sample in samples})
        yield (case, str(count), *(f"{fmean(values):+.2f}" if values else "" for values in figures))


def supervised(run: Run) -> Iterator[Plot]:
    """Losses of each supervised stage: those that log "<stage>/loss"."""
    kinds = (("training", "loss"), ("held out", "valid_loss"), ("held-out pretraining text", "pretraining_valid_loss"))
    for stage in run.metrics:
        named = zip(kinds, SERIES, strict=False)
        found = (curve(run, stage, f"{stage}/{metric}", name, colour) for (name, metric), colour in named)
        if curves := list(chain.from_iterable(found)):
            title = "SFT" if stage == "sft" else stage.capitalize()
            yield charts.lines(f"{title} loss, nats a token", "step", curves, smooth=True)


def selection(run: Run) -> Iterator[Plot]:
    """The score of each epoch of an SFT model that was to be chosen among."""
    for stage in run.metrics:
        if curves := curve(run, stage, "select/score", "mean score, 95% CI", SERIES[0]):
            yield charts.lines(f"Score of each epoch: {stage.removeprefix('select-')}", "epoch", curves)


def time_spent(run: Run) -> Iterator[tuple[str, str, str]]:
    """(stage, phase, seconds) of each phase, and the mean seconds of the parts of a PPO iteration."""
    spent = defaultdict[tuple[str, str], float](float)
    for stage, name, seconds in run.phases:
        spent[stage, name] += seconds
    for arm, part in product(run.arms, ("rollout", "evaluate", "update", "publish")):
        if series := run.series(arm, f"time/{part}"):
            spent[arm, f"an iteration's {part}, on average"] = fmean(series.values())
    yield from ((stage, name, charts.rounded(seconds)) for (stage, name), seconds in spent.items())


def suite(tables: Mapping[str, Mapping[str, Any]], kind: str) -> Iterator[tuple[str, ...]]:
    """A head and a row for each figure of the suite, models side by side: those of `kind` of some models' tables.

    kind: "figures", "difference" or "saved", as in summary.json. Of types, such as one of bias, no row is made.
    """
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    judges: dict[str, set[str]] = defaultdict(set)
    for model, table in tables.items():
        for name, figure in _named(table.get(kind)):
            found.setdefault(name, {})[model] = figure
            judges[name] |= {judge for task, judge in _pairs(table.get("judged_by")) if task == name.split(".")[0]}
    models = [model for model in tables if any(model in row for row in found.values())]
    yield ("figure", *map(visible, models), "n", "judged by")
    for name, row in found.items():
        cells = (_with_interval(row[model]) if model in row else "" for model in models)
        counts = dict.fromkeys(f"{n:.0f}" for one in row.values() if (n := number(one.get("n"))) is not None)
        yield (name, *cells, ", ".join(counts), ", ".join(sorted(judges[name])))


def _named(figures: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Figures by task and metric, "<task>.<metric>"; some have one a task."""
    for task, found in figures.items() if isinstance(figures, dict) else ():
        metrics = found if isinstance(found, dict) else {}
        if number(metrics.get("value")) is not None:
            yield visible(task), metrics
        for metric, figure in metrics.items():
            if metric.count("/") < 2 and isinstance(figure, dict) and number(figure.get("value")) is not None:
                yield visible(f"{task}.{metric}"), figure


def _pairs(table: object) -> Iterator[tuple[str, str]]:
    yield from (
        ((name, visible(str(value))) for name, value in table.items() if value) if isinstance(table, dict) else ()
    )


def _with_interval(figure: Mapping[str, Any]) -> str:
    value, ends = number(figure.get("value")), interval(figure.get("ci"))
    return "" if value is None else f"{value:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")


def win_rates(tables: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """A head and a row for each model, the one that it was compared with, and judge, of some models' suite tables."""
    shares = {"longer reply won": "longer_won", "first reply won": "position_bias"}
    yield ("model", "over", "win rate", "wins, ties, losses", "no verdict", *shares, "judged by")
    for model, table in tables.items():
        for judge, others in _tables(table.get("win_rate")):
            for other, found in _tables(others):
                rate = found.get("win_rate")
                rate = rate if isinstance(rate, dict) else {}
                counts = [f"{number(rate.get(key)) or 0:.0f}" for key in ("wins", "ties", "losses")]
                told = [found.get(key) for key in shares.values()]
                yield (
                    *(visible(model), visible(other), _with_interval({**rate, "value": rate.get("rate")})),
                    *(", ".join(counts), f"{number(found.get('unparsed')) or 0:.0f}"),
                    *(_with_interval(one) if isinstance(one, dict) else "" for one in told),
                    visible(judge),
                )


def _tables(table: object) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from ((name, one) for name, one in table.items() if isinstance(one, dict)) if isinstance(table, dict) else ()
