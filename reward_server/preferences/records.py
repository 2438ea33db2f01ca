"""Rows of a JSONL file, or an error that names the file, the line, the reason and the remedy.

Everything people hand to a run (prompts, demonstrations, comparisons, pretraining text) is read through here,
before any model is loaded: a bad row found in the third hour of a run costs three hours.
"""

import gzip
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import ValidationError

from reward_server.schema import Message

MAX_LINE_BYTES = 16 * 2**20
MAX_ID_LENGTH = 100

Row = TypeVar("Row")
log = logging.getLogger(__name__)


class RecordError(ValueError):
    """A row, or a whole file, that cannot be read. The text carries file:line, the reason and the remedy."""


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(line number from 1, object)` for each row of a JSONL file; blank lines are passed over.

    Raises RecordError for a missing or empty file, a byte-order mark, a NUL, bytes that are not UTF-8, a line
    over 16 MiB, malformed JSON, NaN or Infinity, half of a surrogate pair, and a row that is not an object.
    """
    for line_number, row in _rows(Path(path)):
        if isinstance(row, RecordError):
            raise row
        yield line_number, row


def read_records(path: str | Path, parse: Callable[[dict[str, Any], int], Row], max_bad_rows: int = 0) -> list[Row]:
    """Read a JSONL file through `parse(row, line number)`, which raises ValueError with the reason to refuse a row.

    Up to `max_bad_rows` bad rows are left out, each with a warning; one more raises RecordError. A file
    without one good row is refused whatever the budget.
    """
    rows: list[Row] = []
    bad: list[RecordError] = []
    for line_number, row in _rows(Path(path)):
        try:
            if isinstance(row, RecordError):
                raise row
            rows.append(parse(row, line_number))
        except ValueError as error:
            bad.append(error if isinstance(error, RecordError) else RecordError(f"{path}:{line_number}: {error}"))
            if len(bad) > max_bad_rows:
                raise _over_budget(bad[-1], max_bad_rows) from error
            log.warning("skipped bad row %d of at most %d: %s", len(bad), max_bad_rows, bad[-1])
    if not rows:
        raise RecordError(f"{path}: none of its {len(bad)} rows can be used; the first: {bad[0]}")
    return rows


def kind_of(row: dict[str, Any]) -> str | None:
    """What kind of file a row seems to be from, by its keys; None where that cannot be told."""
    if "completions" in row or {"chosen", "rejected"} <= row.keys():
        return "comparisons"
    if isinstance(row.get("prompt"), str | list):
        return "demonstrations" if "response" in row else "prompts"
    return "pretraining text" if "text" in row else None


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there with all of its text or, after a crash, as it was before."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def row_id(row: dict[str, Any], line_number: int) -> str:
    """Read the optional "id" of a row; without one, the row is named after its line ("row-7").

    Raises ValueError for an id that is not a string or an integer, is blank, or is longer than 100 characters.
    """
    value = row.get("id", f"row-{line_number}")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f'"id" must be a string, not {value!r}')
    name = str(value)
    if not name.strip() or len(name) > MAX_ID_LENGTH:
        raise ValueError(f'"id" must have 1 to {MAX_ID_LENGTH} characters, this one has {len(name.strip())}')
    return name


def row_text(row: dict[str, Any], key: str) -> str:
    """Read a text that must be there and not be blank. Raises ValueError."""
    value = row.get(key)
    if key not in row:
        kind = kind_of(row)
        like = f", as in a file of {kind}: is it the right file?" if kind else "; add it"
        raise ValueError(f'"{key}" is missing; the row has {sorted(row)}{like}')
    if not isinstance(value, str):
        raise ValueError(f'"{key}" must be a string, not {value!r:.60}; write it in quotes')
    if not value.strip():
        raise ValueError(f'"{key}" is blank; give it a text or remove the row')
    return value


def row_conversation(row: dict[str, Any], key: str = "prompt") -> tuple[Message, ...]:
    """Read a conversation that a reply is wanted to: a string (one user message), or a list of messages.

    Raises ValueError unless it ends with a user message, every role is known, and no message is blank.
    """
    value = row.get(key)
    if not isinstance(value, list):
        return (Message(role="user", content=row_text(row, key)),)
    messages = []
    for number, message in enumerate(value):
        try:
            messages.append(Message.model_validate(message))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (key, number, *first["loc"])))
            raise ValueError(f'{where}: {first["msg"]}; a message is {{"role", "content"}}') from error
        if not messages[-1].content.strip():
            raise ValueError(f"{key}.{number}.content is blank; give it a text or remove the message")
    if not messages or messages[-1].role != "user":
        last = messages[-1].role if messages else "nothing"
        raise ValueError(f'"{key}" must end with a user message, it ends with {last}; remove what follows the user')
    return tuple(messages)


def _over_budget(bad: RecordError, max_bad_rows: int) -> RecordError:
    if max_bad_rows == 0:
        return bad
    return RecordError(f"{bad} (bad row number {max_bad_rows + 1}; only {max_bad_rows} may be skipped)")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | RecordError]]:
    if not path.is_file():
        raise RecordError(f"{path}: there is no such file; give the path of a JSONL file")
    found = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line_number, line in enumerate(_lines(file), start=1):
                if line is not None and not line.strip():
                    continue
                found += 1
                try:
                    yield line_number, _row(line, first=line_number == 1)
                except ValueError as error:
                    yield line_number, RecordError(f"{path}:{line_number}: {error}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RecordError(
            f"{path}: after {found} rows it is no valid gzip ({error}); fetch or compress it again"
        ) from error
    if not found:
        raise RecordError(f"{path}: the file is empty; it must hold one JSON object a line")


def _lines(file: BinaryIO | gzip.GzipFile) -> Iterator[bytes | None]:
    """Yield the lines of a file; None stands for one that is too long, whose rest is read and forgotten."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
        yield None


def _row(line: bytes | None, first: bool) -> dict[str, Any]:
    if line is None:
        raise ValueError(f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB; split it, one object a line")
    if first and line.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("the file starts with a byte-order mark; save it as UTF-8 without one")
    if b"\x00" in line:
        raise ValueError("the line holds a NUL byte; remove it (is the file UTF-16, or was a write cut off?)")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} of the line is not UTF-8; convert the file to UTF-8") from error
    try:
        row = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at column {error.colno} ({error.msg}); write one object a line") from error
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply; flatten it") from error
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object {{...}}, this one is a {type(row).__name__}")
    if "\\u" in text:  # only an escape can carry these past the checks of the bytes above
        _check_characters(row)
    return row


def _check_characters(value: object) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_characters(key)
            _check_characters(item)
    elif isinstance(value, list):
        for item in value:
            _check_characters(item)
    elif isinstance(value, str):
        if "\x00" in value:
            raise ValueError("a text holds a NUL character (\\u0000); remove it")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("a text holds half of a surrogate pair (\\ud8..); write the whole character")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number; write a finite number")
