"""The plots of one run. Each function yields those for which the run has the figures, maybe none."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice, product
from typing import Any

from cluster.report import charts
from cluster.report.charts import Curve
from cluster.report.plot import BEFORE, SERIES, Plot
from cluster.rundir.files import Run, Series, number, visible

_SCATTER_POINTS = 400  # a model; more would hide one another
_BARS = 16
_KL = ("kl/mean", "KL to the SFT model, nats a response")


def plots(run: Run) -> dict[str, list[Plot]]:
    """Every plot of a run, by what it is about: the names of the functions below."""
    kinds = (rounds, gold, tax, learning, gold_by_kl, held_out, responses, reward_model)
    return {kind.__name__: list(kind(run)) for kind in (*kinds, supervised, selection, inside_ppo, time_spent)}


def overview(run: Run) -> list[Plot]:
    """The four plots that tell the most; fewer when the run has fewer."""
    parts = (gold(run), tax(run), gold_histogram(run), _by_arm(run, (_KL,)))
    return list(islice(chain(*parts, reward_model(run), supervised(run), time_spent(run)), 4))


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
    curves = [
        *_by_round(table, "win_rate_sft", "against the SFT model", SERIES[0]),
        *_by_round(table, "win_rate_previous", "against the round before", SERIES[1]),
    ]
    if curves:
        yield charts.lines(f"Win rate, {run.labeler}", xlabel, curves, level=(0.5, "even"))
    before = next((value for row in table.values() if (value := number(row.get("gold_sft"))) is not None), None)
    if curves := _by_round(table, "gold", "policy", SERIES[0]):
        level = None if before is None else (before, "SFT")
        yield charts.lines(f"Gold score, {run.labeler}", xlabel, curves, level=level)
    who = ", ".join(dict.fromkeys(visible(str(row["rankings"])) for row in table.values() if "rankings" in row))
    agreement = _by_round(table, "labelers_agree", "two labelers", SERIES[1])
    if curves := _by_round(table, "accuracy", "reward model", SERIES[0]):
        yield charts.lines(f"Reward-model accuracy, {who}", xlabel, [*curves, *agreement], level=(0.5, "chance"))


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


def _curve(run: Run, stage: str, metric: str, name: str, colour: str) -> list[Curve]:
    """A curve, with a band where the run has logged its ends or a standard deviation; none without the metric."""
    series, band = run.series(stage, metric), dict[str, Series]()
    if low := run.series(stage, f"{metric}_low"):
        band = {"low": low, "high": run.series(stage, f"{metric}_high")}
    elif metric.endswith("/mean") and (spread := run.series(stage, metric.replace("/mean", "/std"))):
        ends = {"low": -1, "high": 1}
        band = {
            end: {at: series[at] + sign * spread[at] for at in series if at in spread} for end, sign in ends.items()
        }
    ends = {end: tuple(values.get(step, math.nan) for step in series) for end, values in band.items()}
    return [Curve(name=name, colour=colour, x=tuple(series), y=tuple(series.values()), **ends)] if series else []


def _by_arm(
    run: Run, metrics: Iterable[tuple[str, str]], xlabel: str = "PPO iteration", fewest: int = 1
) -> Iterator[Plot]:
    """A plot for each (metric, title), with a curve of at least so many points for each PPO run."""
    for metric, title in metrics:
        found = chain.from_iterable(_curve(run, arm, metric, name, colour) for arm, name, colour in arms(run))
        if curves := [curve for curve in found if len(curve.x) >= fewest]:
            yield charts.lines(title, xlabel, curves)


def gold(run: Run) -> Iterator[Plot]:
    """The labeler's verdict over iterations."""
    yield from _by_arm(run, (("gold/mean", f"Gold score, {run.labeler}"),))


def held_out(run: Run) -> Iterator[Plot]:
    """What was measured on held-out prompts and text before PPO, on its way, and after it."""
    metrics = (
        ("heldout/gold", f"Gold on held-out prompts, {run.labeler}; 95% CI"),
        ("heldout/score", "Score on held-out prompts"),
        ("heldout/kl", "KL on held-out prompts, nats a response"),
        ("heldout/pretraining_loss", "Loss on held-out pretraining text, nats a token"),
    )
    yield from _by_arm(run, metrics, "PPO iterations done", fewest=3)  # before and after are told elsewhere


def learning(run: Run) -> Iterator[Plot]:
    """What PPO is told, and how far it went for it."""
    reward = ("reward/mean", "Reward: score minus the KL penalty")
    yield from _by_arm(run, (("score/mean", "Score of the reward model"), _KL, reward))


def tax(run: Run) -> Iterator[Plot]:
    """The loss on pretraining text before and after each PPO run."""
    rows = [
        (name, colour, change.before, change.after)
        for arm, name, colour in arms(run)
        if (change := run.change(arm, "pretraining_loss"))
    ]
    if rows:
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
        yield charts.path(f"Gold bought with KL, {run.labeler}", curves)


def gold_histogram(run: Run) -> Iterator[Plot]:
    """The verdicts on held-out responses, before and after."""
    groups = [
        (name, colour, gold)
        for label, name, colour in labels(run)
        if (gold := [sample.gold for sample in run.evaluations[label] if sample.gold is not None])
    ]
    if groups:
        yield charts.histogram(f"Gold score of responses, {run.labeler}", groups)


def responses(run: Run) -> Iterator[Plot]:
    """Verdicts on held-out responses, and whether the score still agrees with them (over-optimisation)."""
    yield from gold_histogram(run)
    groups = []
    for label, name, colour in labels(run):
        pairs = [(one.score, one.gold) for one in run.evaluations[label]]
        if points := [(score, gold) for score, gold in pairs if score is not None and gold is not None]:
            groups.append((name, colour, *zip(*points[:_SCATTER_POINTS], strict=True)))
    if groups:
        axes = ("score of the reward model", f"gold, {run.labeler}")
        yield charts.scatter("Does the score still mean gold?", groups, axes)


def reward_model(run: Run) -> Iterator[Plot]:
    """Accuracy beside the baseline and by rank gap, calibration, training."""
    table = run.figures("reward") | run.calibration
    kinds = (
        ("accuracy", "reward model", SERIES[0]),
        ("prompt_accuracy", "the same, mean of prompts", SERIES[0]),
        ("longer_wins", 'rule "the longer wins"', BEFORE),
    )
    rows = [
        (name, colour, share, interval(table.get(f"{key}_ci")))
        for key, name, colour in kinds
        if (share := number(table.get(key))) is not None
    ]
    if rows:
        yield charts.accuracy("Accuracy on held-out pairs", rows)
    gaps = [
        (f"{int(gap)} apart, {int(count or 0)} pairs", SERIES[0], share, None)
        for gap, share, count in _numbers(table.get("by_rank_gap"), "gap", "accuracy")
    ]
    if len(gaps) > 1:
        yield charts.accuracy("Accuracy by how many ranks apart", gaps)
    bins = table.get("bins", table.get("calibration"))
    bins = _numbers(bins.get("bins") if isinstance(bins, dict) else bins, "predicted", "observed")
    if any(count for *_, count in bins):
        bins = [(predicted, observed, int(count or 0)) for predicted, observed, count in bins]
        yield charts.calibration("How often the higher score wins", bins)
    if curves := _curve(run, "reward", "reward_model/loss", "training", SERIES[0]):
        yield charts.lines("Loss, nats a pair", "step", curves, smooth=True)


def _numbers(rows: object, first: str, second: str) -> list[tuple[float, float, float | None]]:
    """Two figures and the count of each row of a table in a JSON file; rows that lack one are left out."""
    tables = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    found = [(number(row.get(first)), number(row.get(second)), number(row.get("count"))) for row in tables]
    return [(one, other, count) for one, other, count in found if one is not None and other is not None]


def supervised(run: Run) -> Iterator[Plot]:
    """Losses of each supervised stage: those that log "<stage>/loss"."""
    kinds = (("training", "loss"), ("held out", "valid_loss"), ("held-out pretraining text", "pretraining_valid_loss"))
    for stage in run.metrics:
        named = zip(kinds, SERIES, strict=False)
        found = (_curve(run, stage, f"{stage}/{metric}", name, colour) for (name, metric), colour in named)
        if curves := list(chain.from_iterable(found)):
            title = "SFT" if stage == "sft" else stage.capitalize()
            yield charts.lines(f"{title} loss, nats a token", "step", curves, smooth=True)


def selection(run: Run) -> Iterator[Plot]:
    """The score of each epoch of an SFT model that was to be chosen among."""
    for stage in run.metrics:
        if curves := _curve(run, stage, "select/score", "mean score, 95% CI", SERIES[0]):
            yield charts.lines(f"Score of each epoch: {stage.removeprefix('select-')}", "epoch", curves)


def inside_ppo(run: Run) -> Iterator[Plot]:
    """What tells a healthy PPO run from a sick one."""
    metrics = (
        ("loss/policy", "Policy loss"),
        ("loss/value", "Value loss"),
        ("loss/pretraining", "Pretraining loss of the mix"),
        ("value/explained_variance", "Variance explained by the critic"),
        ("response/length", "Response length, tokens"),
        ("response/eos_rate", "Responses that end by themselves"),
        ("policy/entropy", "Entropy, nats a token"),
        ("policy/clip_fraction", "Share of clipped tokens"),
    )
    yield from _by_arm(run, metrics)
    if len(run.arms) > 1:
        found = [_curve(run, arm, "parity/max_gap", name, colour) for arm, name, colour in arms(run)]
    else:
        kinds = product(run.arms, zip(("max", "mean"), SERIES, strict=False))
        found = [_curve(run, arm, f"parity/{kind}_gap", kind, colour) for arm, (kind, colour) in kinds]
    if gaps := list(chain.from_iterable(found)):
        positive = all(value > 0 for curve in gaps for value in curve.y)
        yield charts.lines("Parity gap, nats", "PPO iteration", gaps, log=positive)


def time_spent(run: Run) -> Iterator[Plot]:
    """Seconds of each phase, a colour for each stage, and of the parts of an iteration."""
    spent: dict[tuple[str, str], float] = {}
    for phase in run.phases:
        spent[phase.stage, phase.name] = spent.get((phase.stage, phase.name), 0.0) + phase.seconds
    stages = list(dict.fromkeys(stage for stage, _ in spent))
    often = Counter(name for _, name in spent)
    rows = [
        (name if often[name] == 1 else f"{stage}: {name}", SERIES[stages.index(stage) % len(SERIES)], seconds)
        for (stage, name), seconds in spent.items()
    ]
    shown = sorted(rows, key=lambda row: -row[2])[: _BARS - 1]
    if rest := [seconds for *row, seconds in rows if (*row, seconds) not in shown]:
        rows = [*(row for row in rows if row in shown), (f"{len(rest)} more", BEFORE, sum(rest))]
    if rows:
        yield charts.bars("Time of each phase", rows, "seconds")
    means = [
        (f"{name}: {part}" if len(run.arms) > 1 else part, colour, sum(series.values()) / len(series))
        for (arm, name, colour), part in product(arms(run), ("rollout", "evaluate", "update", "publish"))
        if (series := run.series(arm, f"time/{part}"))
    ]
    if means:
        yield charts.bars("Mean time of a PPO iteration", means, "seconds", shares=len(run.arms) == 1)
