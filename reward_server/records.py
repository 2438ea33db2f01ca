"""Rows of a JSONL file, or an error that names the file, the line, the reason and the remedy.

Everything people hand to a run (prompts, demonstrations, comparisons, pretraining text) is read through here, before
any model is loaded: a bad row found in the third hour of a run costs three hours.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

MAX_LINE_BYTES = 16 * 2**20

Row = TypeVar("Row")


class RecordError(ValueError):
    """A row, or a whole file, that cannot be read. The text carries file:line, the reason and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Records(Generic[Row]):
    """What `read_records` found in one file."""

    rows: list[Row]
    """parsed rows, in the order of the file"""
    skipped: list[RecordError]
    """rows left out, at most `max_bad_rows` of them; the caller shows them"""


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(line number from 1, object)` for each row of a JSONL file; blank lines are passed over.

    Raises RecordError for a missing or empty file, a byte-order mark, a NUL, bytes that are not UTF-8, a line over
    16 MiB, malformed JSON, NaN or Infinity, half of a surrogate pair, and a row that is not an object.
    """
    for line_number, row in _rows(Path(path)):
        if isinstance(row, RecordError):
            raise row
        yield line_number, row


def read_records(
    path: str | Path, parse: Callable[[dict[str, Any], int], Row], max_bad_rows: int = 0
) -> Records[Row]:
    """Read a JSONL file through `parse(row, line number)`, which raises ValueError with the reason to refuse a row.

    Up to `max_bad_rows` bad rows are left out and reported; one more raises RecordError. A file without one good row
    is refused whatever the budget.
    """
    rows: list[Row] = []
    skipped: list[RecordError] = []
    for line_number, row in _rows(Path(path)):
        try:
            if isinstance(row, RecordError):
                raise row
            rows.append(parse(row, line_number))
        except ValueError as error:
            bad = error if isinstance(error, RecordError) else RecordError(f"{path}:{line_number}: {error}")
            skipped.append(bad)
            if len(skipped) > max_bad_rows:
                raise _over_budget(bad, max_bad_rows) from error
    if not rows:
        raise RecordError(f"{path}: none of its {len(skipped)} rows can be used; the first: {skipped[0]}")
    return Records(rows=rows, skipped=skipped)


def _over_budget(bad: RecordError, max_bad_rows: int) -> RecordError:
    if max_bad_rows == 0:
        return bad
    return RecordError(f"{bad} (bad row number {max_bad_rows + 1}; only {max_bad_rows} may be skipped)")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | RecordError]]:
    if not path.is_file():
        raise RecordError(f"{path}: there is no such file; give the path of a JSONL file")
    found = 0
    with path.open("rb") as file:
        for line_number, line in enumerate(_lines(file), start=1):
            if isinstance(line, bytes) and not line.strip():
                continue
            found += 1
            try:
                yield line_number, _row(line, first=line_number == 1)
            except ValueError as error:
                yield line_number, RecordError(f"{path}:{line_number}: {error}")
    if not found:
        raise RecordError(f"{path}: the file is empty; it must hold one JSON object a line")


def _lines(file: Any) -> Iterator[bytes | None]:
    """Lines of a binary file; None stands for one that is too long, whose rest is read and forgotten."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
        yield None


def _row(line: bytes | None, first: bool) -> dict[str, Any]:
    if line is None:
        raise ValueError(
            f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB; split it, one object a line"
        )
    if first and line.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("the file starts with a byte-order mark; save it as UTF-8 without one")
    if b"\x00" in line or b"\\u0000" in line:
        raise ValueError(
            "the line holds a NUL character; remove it (is the file UTF-16, or was a write cut off?)"
        )
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} of the line is not UTF-8; convert the file to UTF-8") from error
    try:
        row = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not valid JSON at column {error.colno} ({error.msg}); one object a line, in double quotes"
        ) from error
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply; flatten it") from error
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object {{...}}, this one is a {type(row).__name__}")
    if "\\ud" in text.lower():  # only an escape can smuggle half of a surrogate pair past the decoder
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                "the line holds half of a surrogate pair (\\ud8xx); write the whole character"
            ) from error
    return row


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number; write a finite number")
