"""The pictures of one run. Each function yields those for which the run has the figures, maybe none."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, cycle, islice, product

from cluster.report import plots
from cluster.report.canvas import BEFORE, SERIES, Picture
from cluster.report.plots import Curve
from cluster.rundir.files import Run, Series, number

_SCATTER_POINTS = 400  # a model; more would hide one another
_BARS = 16


def overview(run: Run) -> list[Picture]:
    """The four pictures that tell the most; fewer when the run has fewer."""
    kl = _by_arm(run, (("kl/mean", "KL to the SFT model, nats a response"),))
    parts = (
        gold(run),
        tax(run),
        gold_histogram(run),
        kl,
        reward_model(run),
        supervised(run),
        time_spent(run),
    )
    return list(islice(chain.from_iterable(parts), 4))


def arm_names(run: Run) -> dict[str, str]:
    """How PPO runs are called; PPO-ptx is the one with a pretraining mix."""
    names = {arm: kind(run, arm) for arm in run.arms}
    repeated = len(set(names.values())) < len(names)
    return {arm: f"{name} ({arm})" if repeated else name for arm, name in names.items()}


def kind(run: Run, arm: str) -> str:
    """PPO-ptx for a PPO run with a pretraining mix, else PPO."""
    return "PPO-ptx" if run.series(arm, "loss/pretraining") else "PPO"


def colours(run: Run) -> dict[str, str]:
    """A colour for each label of the evaluations and each arm; what was before PPO is grey."""
    found = {arm: SERIES[index % len(SERIES)] for index, arm in enumerate(run.arms)}
    return dict.fromkeys(run.evaluations, BEFORE) | found


def labels(run: Run) -> list[tuple[str, str, str]]:
    """(label, name, colour) of each evaluation, those from before PPO first.

    What a further PPO run measured before it began ("<arm>-start") is of the SFT model once more: left out.
    """
    names, shades = {"sft": "SFT"} | arm_names(run), colours(run)
    shown = [label for label in run.evaluations if label.removesuffix("-start") not in {*run.arms} - {label}]
    order = sorted(shown, key=lambda label: (label in run.arms, label != "sft", label))
    return [(label, names.get(label, label), shades[label]) for label in order]


def _curve(name: str, colour: str, series: Series, spread: Series | None = None) -> Curve:
    band = tuple(spread.get(step, 0.0) for step in series) if spread else ()
    return Curve(name=name, colour=colour, x=tuple(series), y=tuple(series.values()), spread=band)


def _by_arm(run: Run, metrics: Iterable[tuple[str, str]]) -> Iterator[Picture]:
    """A picture for each (metric, title), with a curve for each arm and a band where there is a deviation."""
    names, shades = arm_names(run), colours(run)
    for metric, title in metrics:
        deviation = metric.replace("/mean", "/std")
        curves = [
            _curve(names[arm], shades[arm], series, run.series(arm, deviation) if deviation != metric else None)
            for arm in run.arms
            if (series := run.series(arm, metric))
        ]
        if curves:
            yield plots.lines(title, "PPO iteration", curves)


def gold(run: Run) -> Iterator[Picture]:
    """The labeler's verdict over iterations."""
    yield from _by_arm(run, (("gold/mean", f"Gold score, {run.labeler}"),))


def held_out(run: Run) -> Iterator[Picture]:
    """What was measured on held-out prompts and text before PPO, on its way, and after it."""
    names, shades = arm_names(run), colours(run)
    for metric, title in (
        ("gold", f"Gold on held-out prompts, {run.labeler}; 95% CI"),
        ("score", "Score on held-out prompts"),
        ("kl", "KL on held-out prompts, nats a response"),
        ("pretraining_loss", "Loss on held-out pretraining text, nats a token"),
    ):
        curves = []
        for arm in run.arms:
            series = run.series(arm, f"heldout/{metric}")
            low, high = (run.series(arm, f"heldout/{metric}_{end}") for end in ("low", "high"))
            if len(series) > 2:  # before and after are told elsewhere
                half = {step: (high[step] - low[step]) / 2 for step in series if step in low and step in high}
                curves.append(_curve(names[arm], shades[arm], series, half))
        if curves:
            yield plots.lines(title, "PPO iterations done", curves)


def learning(run: Run) -> Iterator[Picture]:
    """What PPO is told, and how far it went for it."""
    metrics = (
        ("score/mean", "Score of the reward model"),
        ("kl/mean", "KL to the SFT model, nats a response"),
        ("reward/mean", "Reward: score minus the KL penalty"),
    )
    yield from _by_arm(run, metrics)


def tax(run: Run) -> Iterator[Picture]:
    """The loss on pretraining text before and after each PPO run."""
    names, shades = arm_names(run), colours(run)
    rows = [
        (names[arm], shades[arm], change.before, change.after)
        for arm in run.arms
        if (change := run.change(arm, "pretraining_loss"))
    ]
    if rows:
        yield plots.dumbbells("Alignment tax: loss on pretraining text", rows, "nats a token; grey: before PPO")


def gold_by_kl(run: Run) -> Iterator[Picture]:
    """How much of the labeler's liking a nat of KL bought (Gao et al. 2023 plot it so)."""
    names, shades = arm_names(run), colours(run)
    curves = []
    for arm in run.arms:
        gold, kl = run.series(arm, "gold/mean"), run.series(arm, "kl/mean")
        steps = [step for step in gold if step in kl]
        if steps:
            x, y = tuple(kl[step] for step in steps), tuple(gold[step] for step in steps)
            curves.append(Curve(name=names[arm], colour=shades[arm], x=x, y=y))
    if curves:
        yield plots.path(f"Gold bought with KL, {run.labeler}", curves)


def gold_histogram(run: Run) -> Iterator[Picture]:
    """The verdicts on held-out responses, before and after."""
    groups = [
        (name, colour, gold)
        for label, name, colour in labels(run)
        if (gold := [sample.gold for sample in run.evaluations[label] if sample.gold is not None])
    ]
    if groups:
        yield plots.histogram(f"Gold score of responses, {run.labeler}", groups)


def responses(run: Run) -> Iterator[Picture]:
    """Verdicts on held-out responses, and whether the score still agrees with them (over-optimisation)."""
    yield from gold_histogram(run)
    groups = []
    for label, name, colour in labels(run):
        points = [
            (sample.score, sample.gold)
            for sample in run.evaluations[label]
            if sample.score is not None and sample.gold is not None
        ]
        if points:
            scores, golds = zip(*points[:_SCATTER_POINTS], strict=True)
            groups.append((name, colour, scores, golds))
    if groups:
        axes = ("score of the reward model", f"gold, {run.labeler}")
        yield plots.scatter("Does the score still mean gold?", groups, axes)


def reward_model(run: Run) -> Iterator[Picture]:
    """Accuracy beside the baseline and by rank gap, calibration, training."""
    table = run.figures("reward") | run.calibration
    rows = []
    if (share := number(table.get("accuracy"))) is not None:
        rows.append(("reward model", SERIES[0], share, interval(table.get("accuracy_ci"))))
    if (share := number(table.get("prompt_accuracy"))) is not None:
        rows.append(("the same, mean of prompts", SERIES[0], share, interval(table.get("prompt_accuracy_ci"))))
    if (share := number(table.get("longer_wins"))) is not None:
        rows.append(('rule "the longer wins"', BEFORE, share, None))
    if rows:
        yield plots.accuracy("Accuracy on held-out pairs", rows)
    gaps = [
        (f"{int(gap)} apart, {int(number(row.get('count')) or 0)} pairs", SERIES[0], share, None)
        for row in _rows(table.get("by_rank_gap"))
        if (gap := number(row.get("gap"))) is not None and (share := number(row.get("accuracy"))) is not None
    ]
    if len(gaps) > 1:
        yield plots.accuracy("Accuracy by how many ranks apart", gaps)
    bins = [
        (predicted, observed, int(number(row.get("count")) or 0))
        for row in _bins(table)
        if (predicted := number(row.get("predicted"))) is not None
        and (observed := number(row.get("observed"))) is not None
    ]
    if any(count for *_, count in bins):
        yield plots.calibration("How often the higher score wins", bins)
    if loss := run.series("reward", "reward_model/loss"):
        curve = _curve("training", SERIES[0], loss)
        yield plots.lines("Loss, nats a pair", "step", [curve], smooth=True)


def interval(value: object) -> tuple[float, float] | None:
    """A confidence interval as it stands in a JSON file, or None."""
    if isinstance(value, list) and len(value) == 2:
        low, high = number(value[0]), number(value[1])
        if low is not None and high is not None:
            return low, high
    return None


def _bins(table: dict[str, object]) -> list[dict[str, object]]:
    bins = table.get("bins", table.get("calibration"))
    return _rows(bins.get("bins") if isinstance(bins, dict) else bins)


def _rows(value: object) -> list[dict[str, object]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def supervised(run: Run) -> Iterator[Picture]:
    """Losses of each supervised stage: those that log "<stage>/loss"."""
    kinds = (("training", "loss"), ("held out", "valid_loss"), ("held-out pretraining text", "pretraining_valid_loss"))
    for stage in run.metrics:
        curves = [
            _curve(name, colour, series)
            for (name, metric), colour in zip(kinds, SERIES, strict=False)
            if (series := run.series(stage, f"{stage}/{metric}"))
        ]
        if curves:
            name = "SFT" if stage == "sft" else stage.capitalize()
            yield plots.lines(f"{name} loss, nats a token", "step", curves, smooth=True)


def selection(run: Run) -> Iterator[Picture]:
    """The score of each epoch of an SFT model that was to be chosen among."""
    for stage in run.metrics:
        score = run.series(stage, "select/score")
        low, high = run.series(stage, "select/score_low"), run.series(stage, "select/score_high")
        if score:
            half = {step: (high.get(step, value) - low.get(step, value)) / 2 for step, value in score.items()}
            curve = _curve("mean score, 95% CI", SERIES[0], score, half)
            yield plots.lines(f"Score of each epoch: {stage.removeprefix('select-')}", "epoch", [curve])


def inside_ppo(run: Run) -> Iterator[Picture]:
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
    names = arm_names(run)
    kinds = ("max",) if len(run.arms) > 1 else ("max", "mean")
    gaps = [
        _curve(names[arm] if len(run.arms) > 1 else kind, colour, series)
        for (arm, kind), colour in zip(product(run.arms, kinds), cycle(SERIES), strict=False)
        if (series := run.series(arm, f"parity/{kind}_gap"))
    ]
    if gaps:
        positive = all(value > 0 for curve in gaps for value in curve.y)
        yield plots.lines("Parity gap, nats", "PPO iteration", gaps, log=positive)


def time_spent(run: Run) -> Iterator[Picture]:
    """Seconds of each phase, a colour for each stage, and of the parts of an iteration."""
    spent: dict[tuple[str, str], float] = {}
    for phase in run.phases:
        key = phase.stage, phase.name
        spent[key] = spent.get(key, 0.0) + phase.seconds
    stages = list(dict.fromkeys(stage for stage, _ in spent))
    often = Counter(name for _, name in spent)
    rows = [
        (name if often[name] == 1 else f"{stage}: {name}", SERIES[stages.index(stage) % len(SERIES)], seconds)
        for (stage, name), seconds in spent.items()
    ]
    shown = sorted(rows, key=lambda row: -row[2])[: _BARS - 1]
    rest = sum(seconds for row in rows if row not in shown for seconds in row[2:])
    if rows:
        others = [(f"{len(rows) - len(shown)} more", BEFORE, rest)] if len(rows) > len(shown) else []
        yield plots.bars("Time of each phase", [row for row in rows if row in shown] + others, "seconds")
    names, shades = arm_names(run), colours(run)
    means = [
        (
            f"{names[arm]}: {part}" if len(run.arms) > 1 else part,
            shades[arm],
            sum(series.values()) / len(series),
        )
        for arm, part in product(run.arms, ("rollout", "evaluate", "update", "publish"))
        if (series := run.series(arm, f"time/{part}"))
    ]
    if means:
        yield plots.bars("Mean time of a PPO iteration", means, "seconds", shares=len(run.arms) == 1)
