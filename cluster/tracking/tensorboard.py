"""Event files for TensorBoard: every metric, held-out samples as text, and their distributions."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class EventFiles:
    """Writes event files into a folder."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)

    def samples(
        self, stage: str, step: int, shown: Sequence[Mapping[str, Any]], distributions: Mapping[str, Sequence[float]]
    ) -> None:
        """Held-out samples of a step, as a table in Markdown, and histograms of all of them."""
        columns = list(shown[0]) if shown else []
        lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in shown)]
        self._writer.add_text(f"{stage}/heldout/samples", "\n".join(map(_line, lines)), step)
        for name, values in distributions.items():
            self._writer.add_histogram(f"{stage}/heldout/{name}", np.asarray(values), step)


@contextlib.contextmanager
def event_files(folder: Path) -> Iterator[EventFiles]:
    """Write event files; raises ValueError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"tracking.tensorboard is set, and TensorBoard cannot be imported ({error}). Remedy: install tensorboard"
        ) from error
    writer = SummaryWriter(str(folder), flush_secs=10)
    try:
        yield EventFiles(writer)
    finally:
        writer.close()


def _line(cells: Sequence[Any]) -> str:
    """A row of a table in Markdown, whatever is in the cells."""
    texts = (f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells)
    return "| " + " | ".join(" ".join(text.replace("|", "\\|").split()) for text in texts) + " |"
