"""What stands beside a data file, or in a model's folder, about its licence."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load

UNKNOWN = "unknown"
_TABLES = ("SOURCES.md", "SOURCES")


def licence_of(path: Path) -> str:
    """By the front matter of the README.md beside a file or in a folder, or the row with its name in SOURCES.md there.

    The table has a column "licence" and names files in its first one. "unknown" where neither says it.
    """
    folder = path if path.is_dir() else path.parent
    said = metadata_of(folder).get("license")
    if isinstance(said, str):
        return said
    return next((found for table in _TABLES if (found := _listed(folder / table, path.name))), UNKNOWN)


def metadata_of(folder: Path) -> Mapping[str, Any]:
    """The front matter of a folder's README.md, as the Hugging Face hub has it; empty without one that can be read."""
    try:
        return metadata_load(folder / "README.md") or {}
    except Exception:  # a stranger's file, or none: YAML's errors have no common class with the others
        return {}


def _listed(table: Path, name: str) -> str | None:
    column = None
    for line in table.read_text("utf-8", errors="replace").splitlines() if table.is_file() else ():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        heads = [index for index, cell in enumerate(cells) if re.fullmatch("licen[cs]es?", cell, re.IGNORECASE)]
        if heads:
            column = heads[0]
        elif column is not None and column < len(cells) and name in re.split(r"[,\s`]+", cells[0]):
            return cells[column]
    return None
