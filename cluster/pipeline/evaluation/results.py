"""What came of a suite: recorded in the run directory and W&B, and shown."""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from cluster.pipeline.evaluation.figures import TAX, Figure, differences, figures, saved, table, tables, taxes
from cluster.pipeline.evaluation.suite import Results, Suite, answers_file
from cluster.pipeline.job import Job

_ByTask = Mapping[str, Mapping[str, Figure]]
"""figures by task and metric"""
_Share = tuple[str, str, Mapping[str, Figure]]
"""(model with a pretraining mix, model without, the share of the tax that the mix saved by task)"""


def tell(job: Job, suite: Suite, results: Results) -> None:
    """The figures of all models: in RUN/summary.json, W&B and the lineage, and on the console."""
    base, *others = suite.models
    rows = {
        label: {task.name: figures(task, found[task.name]) for task in suite.measured}
        for label, found in results.items()
    }
    gaps = {
        label: {
            task.name: differences(task, results[label][task.name], results[base][task.name]) for task in suite.measured
        }
        for label in others
    }
    shares = list(_shares(suite, results))
    for label, path in suite.models.items():
        _record(job, label, rows[label])
        job.summarise("suite", label, judged_by={task.name: task.judged_by for task in suite.tasks if task.judged_by})
        if suite.harness:
            job.summarise("suite", label, versions={task.name: task.version for task in suite.harness})
        if label in gaps:
            job.summarise("suite", label, to=base, difference=_plain(gaps[label]))
        for task in suite.measured:
            job.made("evaluation", answers_file(job, label, task), path, task.path)
    for mixed, without, row in shares:
        job.summarise("suite", mixed, saved={name: asdict(one) for name, one in row.items()}, saved_of=without)
    _show(job, suite, rows, gaps, shares)


def _record(job: Job, label: str, row: _ByTask) -> None:
    job.summarise("suite", label, figures=_plain(row))
    job.tracker.log(f"suite-{label.replace('/', '-')}", 0, curves(row))


def curves(row: _ByTask) -> dict[str, float]:
    """The figures as metrics, suite/<task>.<metric>."""
    return {
        f"suite/{name}.{key.replace('/', '.')}": one.value for name, found in row.items() for key, one in found.items()
    }


def _plain(row: _ByTask) -> dict[str, dict[str, Any]]:
    return {name: {key: asdict(one) for key, one in found.items()} for name, found in row.items()}


def _show(
    job: Job, suite: Suite, rows: Mapping[str, _ByTask], gaps: Mapping[str, _ByTask], shares: list[_Share]
) -> None:
    console, base = job.tracker.console, next(iter(suite.models))
    for claim in dict.fromkeys(task.claim for task in suite.measured):
        tasks = [task for task in suite.measured if task.claim == claim]
        if claim == TAX:
            lost = {label: {one.name: taxes(one, row[one.name]) for one in tasks} for label, row in gaps.items()}
            beside = f"{claim}, lost of {base}", lost
        else:
            beside = f"{claim}, more than {base}", gaps
        for title, found in ((claim, rows), beside):
            for one in tables(title, tasks, found):
                console.show(one)
    for mixed, without, row in shares:
        console.show(table(f"share of the tax of {without} that the pretraining mix saved", {mixed: row}))


def _shares(suite: Suite, results: Results) -> Iterator[_Share]:
    """Of every PPO model with a pretraining mix beside every one without."""
    base, mixes = next(iter(suite.models)), {label: _mix(path) for label, path in suite.models.items()}
    for mixed, without in product(mixes, mixes):
        if mixes[mixed] and mixes[without] is False:
            found = {}
            for task in suite.tasks:
                if task.claim == TAX:
                    found[task.name] = saved(task, *(results[label][task.name] for label in (base, without, mixed)))
            if row := {name: share for name, share in found.items() if share is not None}:
                yield mixed, without, row


def _mix(model: Path) -> bool | None:
    """Whether PPO made this model with a pretraining mix; None where no run's configuration says."""
    if model.name.startswith("policy-noptx"):
        return False
    try:
        config = tomllib.loads((model.parent / "config.toml").read_text("utf-8"))
        return bool(config["ppo"]["pretraining"]["coef"]) if model.name.startswith("policy") else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
