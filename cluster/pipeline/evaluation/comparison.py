"""Comparisons: what judges say of two models' replies to the same prompts, and the strengths of several models."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actors.evaluation.task import Reply, Task
from actors.evaluation.tasks import WinRate as WinRateTask
from cluster.pipeline.evaluation.figures import Figure, table
from cluster.pipeline.evaluation.judges import Judge, Pair, Preference, judged_file, slug
from cluster.pipeline.evaluation.suite import Suite, answers_file
from cluster.pipeline.evaluation.win_rate import WinRate, tally
from cluster.pipeline.job import Job
from cluster.rundir.files import read_rows
from learner.maths.intervals import percentile_interval, resampled_totals, wilson_interval
from reward_server.preferences.records import write_whole

if TYPE_CHECKING:
    from cluster.fleet.pool import ProcessPool

_SHARES = 5
_SHRINKAGE = 0.1  # of strengths to each other, so that a model that won always has a finite one
_RESAMPLES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What a judge said of one model's replies beside another's."""

    win_rate: WinRate
    by_length: Mapping[str, Figure]
    """win rate within fifths of the difference in length, by its range in characters"""
    longer_won: Figure | None
    """share of the longer replies that won, where there was a winner and a longer one"""
    position_bias: Figure | None
    """share of verdicts for the reply that stood first; 0.5 is unbiased. Of judges that are asked in both orders"""
    unparsed: int
    """pairs on which the judge gave no verdict: left out of all figures"""
    votes: int
    """verdicts of people behind it, or else pairs"""


def compared(pairs: Sequence[Pair], said: Sequence[Preference | None]) -> Compared | None:
    """Figures of the second model's replies beside the first's; None where no verdict was given."""
    both = [(pair, one) for pair, one in zip(pairs, said, strict=True) if one is not None]
    lengths = [tuple(len(reply.text) for reply in pair.replies) for pair, _ in both]
    judged = [(b - a, one.won) for (a, b), (_, one) in zip(lengths, both, strict=True) if one.won is not None]
    gaps, won = [gap for gap, _ in judged], [one for _, one in judged]
    if (found := tally(won)) is None:
        return None
    longer = [float((gap > 0) == (one == 1)) for gap, one in judged if gap and one != 0.5]
    stood_first = [float(first) for _, one in both for first in one.for_first]
    return Compared(
        win_rate=found,
        by_length=_by_length(np.array(gaps), np.array(won)),
        longer_won=_share(longer) if longer else None,
        position_bias=_share(stood_first) if stood_first else None,
        unparsed=len(both) - len(judged),
        votes=sum(one.votes for _, one in both),
    )


def _by_length(gaps: NDArray[np.int_], won: NDArray[np.float64]) -> dict[str, Figure]:
    """Win rate within fifths of the difference in length; equal differences stay together, so there may be fewer."""
    edges = np.quantile(gaps, np.linspace(0, 1, _SHARES + 1)[1:-1], method="lower")
    fifths = np.searchsorted(edges, gaps, side="left")
    found = {}
    for fifth in np.unique(fifths):
        low, high = gaps[fifths == fifth].min(), gaps[fifths == fifth].max()
        found[f"{low:+d} to {high:+d}"] = _share(won[fifths == fifth].tolist())
    return found


def _share(outcomes: Sequence[float]) -> Figure:
    """A share with Wilson's interval."""
    count, total = len(outcomes), sum(outcomes)
    return Figure(value=total / count, ci=wilson_interval(total, count), n=count)


def strengths(models: Sequence[str], pairs: Sequence[Pair], said: Sequence[Preference | None]) -> dict[str, Figure]:
    """Strengths (Bradley and Terry 1952), the first model's being 0, with bootstrap intervals over prompts.

    A model with strength s wins against one with t in sigmoid(s - t) of all prompts; a tie is half a win of each.
    """
    from choix import ilsr_pairwise_dense

    place, count = {label: index for index, label in enumerate(models)}, len(models)
    wins: dict[str, NDArray[np.float64]] = {}
    for pair, one in zip(pairs, said, strict=True):
        if one is not None and one.won is not None:
            first, second = (place[label] for label in pair.models)
            of_prompt = wins.setdefault(pair.prompt.id, np.zeros((count, count)))
            of_prompt[second, first] += one.won
            of_prompt[first, second] += 1 - one.won

    def fit(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """[R, k * k] -> [R, k]"""
        found = [ilsr_pairwise_dense(one.reshape(count, count), alpha=_SHRINKAGE) for one in sums]
        return np.array([one - one[0] for one in found])

    if not wins:
        return {}
    vectors = np.array([one.ravel() for one in wins.values()])
    (values,), samples = fit(vectors.sum(0, keepdims=True)), resampled_totals(vectors, fit, _RESAMPLES)
    return {
        label: Figure(value=float(values[n]), ci=percentile_interval(samples[:, n]), n=len(wins))
        for label, n in place.items()
    }


async def compare(job: Job, processes: "ProcessPool", suite: Suite) -> None:
    """Have the judges compare all models' replies, and tell what each says.

    Verdicts are lines of RUN/evaluations/win_rate/<judge>.jsonl. Raises JudgeUnavailable, and what a reward service
    fails with.
    """
    task = next((task for task in suite.tasks if isinstance(task, WinRateTask)), None)
    if task is None:
        return
    replies = {label: _replies(job, label, task) for label in suite.models}
    pairs = [
        Pair(prompt=prompt, models=models, replies=(replies[models[0]][prompt.id], replies[models[1]][prompt.id]))
        for models in combinations(suite.models, 2)
        for prompt in task.items
    ]
    for judge in suite.judges:
        with job.tracker.phase(f"{len(pairs)} pairs judged by {judge.name}", "evaluate"):
            said = await judge.prefer(job, processes, pairs)
        _record(job, judge, pairs, said)
        path = judged_file(job, judge)
        job.made("evaluation", path, *(answers_file(job, label, task) for label in suite.models))
        _tell(job, judge, list(suite.models), pairs, said)


def _replies(job: Job, label: str, task: Task[Any]) -> dict[str, Reply]:
    return {row["id"]: Reply(**row["answers"][0]) for row in read_rows(answers_file(job, label, task))}


def _record(job: Job, judge: Judge, pairs: Sequence[Pair], said: Sequence[Preference | None]) -> None:
    rows = [
        {"id": pair.prompt.id, "first": pair.models[0], "second": pair.models[1], **asdict(one)}
        for pair, one in zip(pairs, said, strict=True)
        if one is not None
    ]
    path = judged_file(job, judge)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    job.monitor.disk.written(lambda: write_whole(path, text))


def _tell(
    job: Job, judge: Judge, models: Sequence[str], pairs: Sequence[Pair], said: Sequence[Preference | None]
) -> None:
    """In RUN/summary.json, W&B and on the console: always by whom."""
    console, by, found = job.tracker.console, f"judged by {judge.name}", dict[tuple[str, str], Compared]()
    for one, other in combinations(models, 2):
        mine = [n for n, pair in enumerate(pairs) if pair.models == (one, other)]
        figures = compared([pairs[n] for n in mine], [said[n] for n in mine])
        if figures is None:
            unparsed = sum(said[n] is not None for n in mine)
            console.line(
                f"{by}: no verdict on {other} and {one}, so there is no win rate ({unparsed} pairs were asked)"
            )
            job.summarise("suite", other, "win_rate", judge.name, **{one: {"win_rate": None, "unparsed": unparsed}})
            continue
        found[one, other] = figures
        job.summarise("suite", other, "win_rate", judge.name, **{one: asdict(figures)})
        if one == models[0]:
            metrics = {f"suite/win_rate.{slug(judge)}": figures.win_rate.rate}
            job.tracker.log(f"suite-{other.replace('/', '-')}", 0, metrics)
    if found:
        rows = {f"{other} over {one}": _row(figures) for (one, other), figures in found.items()}
        console.show(table(f"win rate, {by}", rows))
        for (one, other), figures in found.items():
            title = f"win rate of {other} over {one} by how much longer its reply is, in characters, {by}"
            console.show(table(title, {other: figures.by_length}))
    if len(models) > 2 and (strong := strengths(models, pairs, said)):
        for label, figure in strong.items():
            job.summarise("suite", label, "strength", **{judge.name: asdict(figure)})
        console.show(table(f"strength (Bradley-Terry), {by}", {label: {"": one} for label, one in strong.items()}))


def _row(figures: Compared) -> dict[str, Figure | int]:
    one = figures.win_rate
    row: dict[str, Figure | int | None] = {
        "win rate": Figure(value=one.rate, ci=one.ci, n=one.wins + one.ties + one.losses),
        "wins": one.wins,
        "ties": one.ties,
        "losses": one.losses,
        "unparsed": figures.unparsed,
        "longer reply won": figures.longer_won,
        "first reply won": figures.position_bias,
    }
    return {name: value for name, value in row.items() if value is not None}
