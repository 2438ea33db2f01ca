"""Tasks of lm-evaluation-harness: found, read and checked before anything starts, with figures as our own have them."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.evaluation.task import Metric, Task, ratio, spread
from actors.evaluation.tasks import data_file
from cluster.pipeline.job import Job
from reward_server.preferences.records import read_all

_HERE = Path(__file__).parent
_LOCAL = {"hellaswag": "hellaswag", "truthfulqa_mc1": "truthfulqa", "truthfulqa_mc2": "truthfulqa"}
"""Tasks beside this file, and whose data they read."""
_REFUSED = {
    "squadv2": "its metric is loaded from the hub when all is answered; evaluation.suite has squad",
    "realtoxicityprompts": "it asks the Perspective API, which closes; evaluation.suite has toxicity",
}
_NOTES = {
    "winogender": "an accuracy, not the paper's entropy: evaluation.suite has winogender",
    "crows_pairs": "not the paper's entropy: evaluation.suite has crows_pairs",
}
_TOTALS: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "mean": ratio,
    "perplexity": lambda sums: np.exp(-ratio(sums)),
    "weighted_perplexity": lambda sums: np.exp(-ratio(sums)),
    "bits_per_byte": lambda sums: -ratio(sums) / math.log(2),
}
"""The harness's aggregations that are functions of a sum over items."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessTask:
    """A task, or a group of them whose items are pooled, as far as figures need it."""

    name: str
    """lm_eval/<name there>"""
    claim: str
    """the harness with its version, under which its tables stand"""
    spec: str
    """what the harness is told: its own name of the task, or a file beside this one"""
    path: Path | str
    """its data file; the name of the task where the harness fetches the data"""
    version: str
    """of the tasks, as the harness counts them"""
    metrics: Mapping[str, Metric]
    documents: Mapping[str, Sequence[int]]
    """numbers of the documents that are asked about, by task"""

    @property
    def ids(self) -> list[str]:
        """Its items."""
        return [f"{leaf}/{number}" for leaf, numbers in self.documents.items() for number in numbers]


Measured = Task[Any] | HarnessTask
"""What has figures."""


def told(job: Job) -> dict[str, Any]:
    """What the functions of local_data.py are given."""
    set_here = {own: getattr(job.config.benchmarks, own) for own in dict.fromkeys(_LOCAL.values())}
    benchmarks = {own: str(data_file(data)) for own, data in set_here.items() if data is not None}
    return {"benchmarks": benchmarks, "max_bad_rows": job.max_bad_rows}


def read_harness(job: Job) -> list[HarnessTask]:
    """The tasks of evaluation.lm_eval with their data. Raises ValueError that says all that is wrong."""
    if not (names := dict.fromkeys(job.config.evaluation.lm_eval)):
        return []
    try:
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise ValueError(
            f"evaluation.lm_eval needs lm-evaluation-harness, which is not installed ({error}): "
            "pip install 'rayward[eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    metadata = told(job)
    manager = TaskManager(metadata=metadata)
    found: list[HarnessTask] = read_all(*(partial(_load, job, manager, name, metadata["benchmarks"]) for name in names))
    owner: dict[str, str] = {}
    for task in found:
        for leaf in task.documents:
            if leaf in owner:
                raise ValueError(f"evaluation.lm_eval: {leaf} is part of {owner[leaf]} and of {task.name}; name one")
            owner[leaf] = task.name
    return found


def _load(job: Job, manager: Any, name: str, benchmarks: Mapping[str, str]) -> HarnessTask:
    key, release = f"evaluation.lm_eval has {name}", version("lm_eval")
    data = benchmarks.get(_LOCAL.get(name, ""))
    spec = str(_HERE / f"{name}.yaml") if data else name
    if not data and name not in manager.all_tasks:
        raise ValueError(f"{key}, which lm-eval {release} does not know; `lm-eval ls tasks` lists what it does")
    _refuse(key, [name])
    try:
        leaves = manager.load([spec])["tasks"]
        counts = {leaf: len(task.eval_docs) for leaf, task in leaves.items()}
    except Exception as error:
        if data:
            raise ValueError(f"{key}: {error}") from error
        remedy = f"set benchmarks.{_LOCAL[name]} to a file" if name in _LOCAL else "see that its hub can be reached"
        raise ValueError(f"{key}, which cannot be loaded: {remedy}. {type(error).__name__}: {error}") from error
    _refuse(key, leaves)
    if unsafe := [leaf for leaf, task in leaves.items() if getattr(task, "UNSAFE_CODE", False)]:
        raise ValueError(f"{key}, but {unsafe[0]} executes what a model writes, which is not done here")
    each = max(job.config.evaluation.items // len(leaves), 1)
    versions = ", ".join(sorted({str(task.VERSION) for task in leaves.values()}))
    pooled = f", the items of {len(leaves)} tasks pooled" if len(leaves) > 1 else ""
    notes = [note for begin, note in _NOTES.items() if any(leaf.startswith(begin) for leaf in leaves)]
    note = "; ".join([f"{name}: lm-eval {release}, task version {versions}{pooled}", *notes])
    return HarnessTask(
        name=f"lm_eval/{name}",
        claim=f"lm-evaluation-harness {release}",
        spec=spec,
        path=data or name,
        version=f"lm-eval {release}, task version {versions}",
        metrics={key: metric for task in leaves.values() for key, metric in _metrics(task, note)},
        documents={leaf: spread(range(count), each) for leaf, count in counts.items()},
    )


def _refuse(key: str, names: Any) -> None:
    for name in names:
        if name in _REFUSED:
            raise ValueError(f"{key}, which is not run here: {_REFUSED[name]}")


def _metrics(task: Any, note: str) -> Any:
    """(name, metric) of what can be made of items, for each of the task's filters of answers."""
    better, filters = task.higher_is_better(), [one["name"] for one in task.config.filter_list or ()]
    for name, aggregation in task.aggregation().items():
        if total := _TOTALS.get(aggregation.__name__):
            kind = Metric(better="higher" if better.get(name, True) else "lower", total=total, note=note)
            for one in filters if len(filters) > 1 else [""]:
                yield f"{name}/{one}".rstrip("/"), kind
