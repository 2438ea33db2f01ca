"""What people are shown is read, with all that cannot be used told at once."""

from pathlib import Path
from typing import Any

import pytest

from cluster.pipeline.labeling.items import other_items, read_items
from tests.stage_runs import make_job, rows


def row(name: str, *texts: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "prompt": f"say {name}", "completions": [{"text": text} for text in texts], **more}


def job_of(folder: Path, *completions: Any, **label: Any) -> Any:
    job = make_job(folder / "run", label=label)
    rows(job.run_dir / "data" / "completions.jsonl", *completions)
    return job


def test_completions_training_gold_and_demonstrations_are_items(tmp_path):
    training = rows(tmp_path / "training.jsonl", row("c1", "x", "y", ranks=[4, 2], explanation="y is kind"))
    gold = rows(tmp_path / "gold.jsonl", row("c1", "x", "y", ranks=[0, 0]), {"chosen": "a", "rejected": "b"} | ASKED)
    asks = rows(tmp_path / "asks.jsonl", {"id": "d", "prompt": "tell", "use_case": "chat"})
    job = job_of(
        tmp_path,
        row("c1", "a", "b", "c", use_case="rewrite", group="tree"),
        row("c2", "a", "b"),
        tasks="rank,demonstration",
        training=training,
        gold=gold,
        demonstrations=asks,
    )
    items = read_items(job)
    assert [(one.id, one.task, one.use, one.ranks) for one in items] == [
        ("c1", "rank", "work", None),
        ("c2", "rank", "work", None),
        ("training:c1", "rank", "training", (1, 0)),
        ("gold:c1", "rank", "gold", (0, 0)),
        ("gold:row-2", "rank", "gold", (0, 1)),
        ("demonstration:d", "demonstration", "work", None),
    ]
    assert (items[0].use_case, items[0].group, items[0].responses) == ("rewrite", "tree", ("a", "b", "c"))
    assert [one.explanation for one in items[2:4]] == ["y is kind", None]
    assert items[5].use_case == "chat"
    assert other_items(job) == items[2:]


ASKED = {"prompt": "which?"}


def test_all_rows_that_cannot_be_used_are_told_with_file_and_line(tmp_path):
    gold = rows(tmp_path / "gold.jsonl", row("g1", "x", "y", ranks=[0, 1]), row("g2", "x", "y"))
    job = job_of(tmp_path, row("c1", "a", "b"), row("c2", *"abcdefghij"), gold=gold)
    with pytest.raises(ValueError, match="can be ranked on the page") as error:
        read_items(job)
    told = str(error.value).splitlines()
    assert "completions.jsonl:2: item 'c2' has 10 completions; 2 to 9 can be ranked on the page" in told[0]
    assert "gold.jsonl:2: id 'g2': item 'gold:g2' is for gold, and has no ranks: rank it" in told[1]
    assert len(told) == 2


def test_without_the_task_no_completions_are_wanted(tmp_path):
    asks = rows(tmp_path / "asks.jsonl", {"id": "d", "prompt": "tell"})
    job = make_job(tmp_path / "run", label={"tasks": "demonstration", "demonstrations": asks})
    assert [one.id for one in read_items(job)] == ["demonstration:d"]
