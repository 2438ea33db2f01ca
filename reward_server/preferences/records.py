"""Rows of a data file, or an error that names the file, the lines, the reasons and the remedy.

Everything people hand to a run (prompts, demonstrations, comparisons, pretraining text) is read through here,
before any model is loaded: a bad row found in the third hour of a run costs three hours.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from reward_server.preferences.formats import Found, file_rows

MAX_ID_LENGTH = 100
ASIDE = ".aside-"
"""Begins the names of files and folders that are not complete, or no longer."""
_SHOWN = 20  # bad rows of a file that are told with their reasons; of the others the lines are

Row = TypeVar("Row")
log = logging.getLogger(__name__)


class RecordError(ValueError):
    """Rows, or a whole file, that cannot be read. The text carries file:line, the reason and the remedy."""


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(number from 1, object)` for each row of a data file of any format, see formats.py.

    Raises RecordError for a file that is missing, empty or not read, and for the first bad row: malformed JSON or CSV,
    a byte-order mark, a NUL, bytes that are not UTF-8, a line over 16 MiB, NaN or Infinity, half of a surrogate pair.
    """
    for number, row in _rows(Path(path)):
        if isinstance(row, ValueError):
            raise RecordError(f"{path}:{number}: {row}") from row
        yield number, row


def read_records(
    path: str | Path,
    parse: Callable[[dict[str, Any], int], Row],
    max_bad_rows: int = 0,
    *,
    skipped: Callable[[int, str], object] = lambda number, reason: None,
    source: Callable[[Path], Found] = file_rows,
) -> list[Row]:
    """Read a data file through `parse(row, line number)`, which raises ValueError with the reason to refuse a row.

    `source` yields what `file_rows` does, of a file whose rows are nested in one another.

    Keys whose value is null are left out before, in nested objects too: null means absent. Up to `max_bad_rows` bad
    rows are left out, each with a warning, and `skipped` is told its number and FILE:LINE with the reason; with more,
    RecordError tells all of them. A file without one good row is refused whatever the budget.
    """
    rows: list[Row] = []
    lines: list[int] = []
    told: list[str] = []
    for number, row in _rows(Path(path), source):
        try:
            if isinstance(row, ValueError):
                raise row
            rows.append(parse(without_nulls(row), number))
        except (ValueError, RecursionError) as error:
            lines.append(number)
            if len(told) < max(_SHOWN, max_bad_rows):
                told.append(f"{path}:{number}: {_named(row, error)}")
    if len(lines) > max_bad_rows:
        if rest := lines[len(told) :]:
            numbers = ", ".join(map(str, rest[:100])) + (", .." if len(rest) > 100 else "")
            told.append(f"{path}: {len(rest)} more bad rows: {numbers}")
        if len(lines) > 1:
            told.append(f"{path}: {len(lines)} bad rows; only {max_bad_rows} may be skipped (data.max_bad_rows)")
        raise RecordError("\n".join(told))
    if not rows:
        raise RecordError(f"{path}: none of its {len(lines)} rows can be used; the first: {told[0]}")
    for count, (number, text) in enumerate(zip(lines, told, strict=True), start=1):
        log.warning("skipped bad row %d of at most %d: %s", count, max_bad_rows, text)
        skipped(number, text)
    return rows


def read_all(*reads: Callable[[], Any]) -> list[Any]:
    """What each of several readers returns. Raises RecordError with what all of them say that refuse their file."""
    found, told = [], []
    for read in reads:
        try:
            found.append(read())
        except ValueError as error:
            told.append(str(error))
    if told:
        raise RecordError("\n".join(told))
    return found


def row_names() -> Callable[[dict[str, Any], int], str]:
    """A function of (row, line) that names the rows of one file, and raises ValueError for an id that was used."""
    lines: dict[str, int] = {}

    def name(row: dict[str, Any], line: int) -> str:
        found = row_id(row, line)
        if found in lines:
            raise ValueError(f"id {found!r} was used in line {lines[found]}; give each row its own")
        lines[found] = line
        return found

    return name


def row_id(row: dict[str, Any], line_number: int) -> str:
    """Read the optional "id" of a row, or of a tree; without one, the row is named after its line ("row-7").

    Raises ValueError for an id that is not a string or an integer, is blank, or is longer than 100 characters.
    """
    value = row.get("message_tree_id", row.get("id", f"row-{line_number}"))
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f'"id" must be a string, not {value!r}')
    name = str(value)
    if not name.strip() or len(name) > MAX_ID_LENGTH:
        raise ValueError(f'"id" must have 1 to {MAX_ID_LENGTH} characters, this one has {len(name.strip())}')
    return name


def without_nulls(value: Any) -> Any:
    """The same without the keys whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


class NotWritten(OSError):
    """A file could not be written. The text names it, with the reason and the remedy."""

    def __str__(self) -> str:
        return str(self.strerror)


def no_room(error: BaseException) -> bool:
    """Whether an error says that a disk is full, or a quota or limit of files; of a library's, only the words do."""
    return re.search("No space left on device|[Qq]uota exceeded|File too large", str(error)) is not None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise NotWritten for an error of the operating system in the block, or a library's about a full disk."""
    try:
        yield
    except Exception as error:
        if not (full := no_room(error)) and not isinstance(error, OSError):
            raise
        reason = getattr(error, "strerror", None) or error
        remedy = "make room on its disk" if full else "see to the folder, and who may write there"
        text = f"{path} cannot be written ({reason}). Remedy: {remedy}"
        raise NotWritten(getattr(error, "errno", errno.ENOSPC), text) from error


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as the text of a .jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_whole(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write a file that is there with all of its content or, after an error or a crash, as it was before.

    `mode` is who may read and write it, less what the umask takes. Raises NotWritten.
    """
    aside = path.with_name(f"{ASIDE}{path.name}-{os.getpid()}")
    try:
        with writing(path):
            with open(aside, "wb", opener=partial(os.open, mode=mode)) as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what was not complete when its writer was killed, in a folder in which nobody is writing."""
    for left in list(folder.rglob(f"{ASIDE}*")):
        log.warning("removed %s, which was not complete", left)
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _named(row: dict[str, Any] | ValueError, error: Exception) -> str:
    """The reason, with the row's own id where it does not say it."""
    name = None if isinstance(row, ValueError) else row.get("message_tree_id", row.get("id"))
    own = isinstance(name, str | int) and str(name).strip() and repr(name) not in str(error)
    return f"id {name!r:.100}: {error}" if own and repr(str(name)) not in str(error) else str(error)


def _rows(path: Path, source: Callable[[Path], Found] = file_rows) -> Found:
    try:
        yield from source(path)
    except ValueError as error:
        raise RecordError(f"{path}: {error}") from error
