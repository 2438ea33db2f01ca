"""What people are shown: the run's completions, training and gold items, prompts that want a demonstration."""

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from actors.prompts import read_prompts
from cluster.pipeline.job import Job
from reward_server.labeling.items import Item
from reward_server.preferences.forms import row_text
from reward_server.preferences.labeling import Comparison, read_comparisons
from reward_server.preferences.records import read_all, read_rows, row_id, without_nulls


def read_items(job: Job) -> list[Item]:
    """The completions, where they are to be ranked, and `other_items`. Raises RecordError likewise."""
    bad, ranks = job.max_bad_rows, "rank" in job.config.label.tasks
    completions, others = read_all(
        lambda: read_comparisons(job.file("completions"), bad, _item) if ranks else [], lambda: other_items(job)
    )
    return [*completions, *others]


def other_items(job: Job) -> list[Item]:
    """Items of label.training, label.gold and label.demonstrations, whose ids begin so, as "gold:".

    Raises RecordError with every row that cannot be used.
    """
    config, bad = job.config.label, job.max_bad_rows
    read = read_all(
        lambda: _known(config.training, "training", bad),
        lambda: _known(config.gold, "gold", bad),
        lambda: _demonstrations(config.demonstrations, bad),
    )
    return [item for items in read for item in items]


def _known(path: Path | None, use: Literal["training", "gold"], max_bad_rows: int) -> list[Item]:
    """Items with the right answer, and "explanation" where a row has one."""
    if path is None:
        return []
    told = dict[str, str]()
    for number, row in read_rows(path):
        if "explanation" in (row := without_nulls(row)):
            told[row_id(row, number)] = row_text(row, "explanation")

    def item(one: Comparison) -> Item:
        return _item(one, use=use, id=f"{use}:{one.id}", explanation=told.get(one.id))

    return read_comparisons(path, max_bad_rows, item)


def _demonstrations(path: Path | None, max_bad_rows: int) -> list[Item]:
    if path is None:
        return []
    return read_prompts(
        path,
        max_bad_rows,
        lambda one: Item(
            id=f"demonstration:{one.id}", task="demonstration", prompt=one.messages, use_case=one.use_case
        ),
    )


def _item(one: Comparison, **more: Any) -> Item:
    """The item of a comparison. Raises ValueError, in a line, for one that the page cannot show."""
    try:
        return Item.of(one, **more)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise ValueError(first["msg"].removeprefix("Value error, ")) from None
