"""Rows of local files for the tasks beside this file, in the form that lm-evaluation-harness has them from the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.tasks.hellaswag.utils import process_docs  # pyright: ignore[reportMissingImports]
from lm_eval.tasks.truthfulqa.utils import process_results_mc2 as mc2  # pyright: ignore[reportMissingImports]

from actors.evaluation.multiple_choice import TRUTH_PROMPTS, HellaSwag, TruthfulQA
from reward_server.preferences.forms import row_text, row_texts
from reward_server.preferences.records import read_records

__all__ = ["hellaswag", "mc2", "truthfulqa"]


def hellaswag(*, benchmarks: Mapping[str, str], max_bad_rows: int, **_: Any) -> dict[str, Dataset]:
    """benchmarks["hellaswag"] with the harness's own text. Raises RecordError, also for a file without its columns."""
    path = Path(benchmarks["hellaswag"])
    HellaSwag.read(path, max_bad_rows)

    def parse(row: dict[str, Any], line: int) -> dict[str, Any]:
        texts = {key: row_text(row, key) for key in ("activity_label", "ctx_a")}
        return {
            **texts,
            "ctx_b": row.get("ctx_b", ""),
            "endings": row_texts(row, "endings"),
            "label": str(row["label"]),
        }

    return {"validation": process_docs(Dataset.from_list(read_records(path, parse, max_bad_rows)))}


def truthfulqa(*, benchmarks: Mapping[str, str], max_bad_rows: int, **_: Any) -> dict[str, Dataset]:
    """benchmarks["truthfulqa"] with its targets, true answers first. Raises RecordError."""
    questions = TruthfulQA.read(Path(benchmarks["truthfulqa"]), max_bad_rows)

    def targets(true: tuple[str, ...], false: tuple[str, ...]) -> dict[str, list[Any]]:
        return {"choices": [*true, *false], "labels": [1] * len(true) + [0] * len(false)}

    rows = [
        {
            "query": f"{TRUTH_PROMPTS['qa']}Q: {one.question}\nA:",
            "mc1_targets": targets(one.true[:1], one.false),
            "mc2_targets": targets(one.true, one.false),
        }
        for one in questions
    ]
    return {"validation": Dataset.from_list(rows)}
