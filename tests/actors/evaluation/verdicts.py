"""What the tests of the tasks share: files of rows, log-probs, and what a task makes of given answers."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.evaluation.task import Answer, Logprob, Task

# Beside the checkout, or somewhere above it, on machines that have them.
REAL = next((up / "shared" / "data" for up in Path(__file__).parents if (up / "shared" / "data").is_dir()), Path("no"))


def file(folder: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def likely(*totals: float, tokens: int = 1) -> list[Answer]:
    return [Logprob(total=total, tokens=tokens) for total in totals]


def verdict(task: Task[Any], *answers: Answer, item: int = 0) -> dict[str, tuple[float, ...]]:
    """Of one item, whose metrics must be among those that the task says it has."""
    found = dict(asyncio.run(task.judge(task.items[item], answers)))
    assert found.keys() <= task.metrics.keys()
    return found


def figures(task: Task[Any], *answers: Sequence[Answer]) -> dict[str, float]:
    """Of all items, whose verdicts are added up as a report does."""
    sums: dict[str, list[tuple[float, ...]]] = {}
    for index, some in enumerate(answers):
        for name, parts in verdict(task, *some, item=index).items():
            sums.setdefault(name, []).append(parts)
    return {name: float(task.metrics[name].total(np.array(parts).sum(0))) for name, parts in sums.items()}
