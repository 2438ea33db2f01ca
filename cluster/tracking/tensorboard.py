"""Event files for TensorBoard: every metric, held-out samples as text, and their distributions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def event_files(folder: Path) -> Any:
    """A SummaryWriter, to be entered; raises ValueError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"tracking.tensorboard is set, and TensorBoard cannot be imported ({error}). Remedy: install tensorboard"
        ) from error
    return SummaryWriter(str(folder), flush_secs=10)


def write_step(writer: Any, stage: str, step: int, metrics: Mapping[str, float]) -> None:
    """Metrics of a step."""
    for name, value in metrics.items():
        writer.add_scalar(f"{stage}/{name}", value, step)


def write_samples(
    writer: Any, stage: str, step: int, shown: Sequence[Mapping[str, Any]], distributions: Mapping[str, Sequence[float]]
) -> None:
    """Held-out samples of a step, as a table in Markdown, and histograms of all of them."""
    columns = list(shown[0]) if shown else []
    rows = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in shown)]
    writer.add_text(f"{stage}/heldout/samples", "\n".join(map(_line, rows)), step)
    for name, values in distributions.items():
        writer.add_histogram(f"{stage}/heldout/{name}", np.asarray(values), step)


def _line(cells: Sequence[Any]) -> str:
    texts = (f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells)
    return "| " + " | ".join(" ".join(text.replace("|", "\\|").split()) for text in texts) + " |"
