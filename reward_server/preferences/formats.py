"""The rows of a data file, whose first bytes tell what it is: JSON lines, a JSON list, CSV, Parquet or Arrow.

Text may be compressed by gzip, bzip2, xz or zstd, and a folder may be a data set that Hugging Face's datasets saved.
"""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 16 * 2**20
Found = Iterator[tuple[int, dict[str, Any] | ValueError]]
"""(number, row or what is wrong with it)"""
_HEAD = 512
_BATCH = 1000  # rows of a table that are turned into objects at once
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
_PANDAS = "python -c \"import pandas; pandas.{}('{{file}}').to_json('rows.jsonl', orient='records', lines=True)\""
_HTML = ("a web page", "download the file itself (on the Hugging Face hub, /resolve/ instead of /blob/)")
# offset, first bytes -> what it is, and how its rows are got out of it
_NOT_READ = {
    (0, b"version https://git-lfs"): ("the pointer of a file that Git LFS keeps", "git lfs pull --include '{file}'"),
    (0, b"<!doctype html"): _HTML,
    (0, b"<html"): _HTML,
    (0, b"<?xml"): ("XML", _PANDAS.format("read_xml")),
    (0, b"PK\x03\x04"): ("a zip archive or a spreadsheet", "unzip '{file}', or save the spreadsheet as CSV"),
    (257, b"ustar"): ("a tar archive", "tar -xf '{file}'"),
    (0, b"7z\xbc\xaf"): ("a 7-Zip archive", "7z x '{file}'"),
    (0, b"Rar!\x1a"): ("a RAR archive", "unrar x '{file}'"),
    (0, b"\x04\x22\x4d\x18"): ("compressed by lz4", "lz4 -d '{file}' rows.jsonl"),
    (0, b"SQLite format 3\x00"): ("a SQLite database", "sqlite3 -json '{file}' 'select * from TABLE' > rows.json"),
    (0, b"Obj\x01"): ("an Avro file", "fastavro '{file}' > rows.jsonl"),
    (0, b"FEA1"): ("a Feather table of version 1", _PANDAS.format("read_feather")),
    (0, b"\x89HDF"): ("an HDF5 file", _PANDAS.format("read_hdf")),
    (0, b"\x80\x04"): ("a pickle, which runs code when it is read", f"{_PANDAS.format('read_pickle')} if you trust it"),
    (0, b"\x80\x05"): ("a pickle, which runs code when it is read", f"{_PANDAS.format('read_pickle')} if you trust it"),
    (0, b"\x93NUMPY"): ("a NumPy array", "numpy.load('{file}'), and write one JSON object a line"),
    (0, b"%PDF"): ("a PDF", "pdftotext '{file}', and write one JSON object a line"),
}
_PLAIN = ("plain text", "jq -cR '{{text: .}}' '{file}' > rows.jsonl makes each line a document")
_OBJECT = ("one JSON object over several lines", "jq -c '.data[]' '{file}' > rows.jsonl, with the name of its list")


def file_rows(path: Path) -> Found:
    """Yield `(number from 1, row or ValueError)`: the line in JSON lines and CSV, else the place among the rows.

    Raises ValueError for what cannot be read as a whole: missing, empty, damaged, or of a kind that is not read, which
    is named with its conversion.
    """
    number = 0
    if path.is_dir():
        for file in _saved_dataset(path):
            for _, row in _one_file(file):
                number += 1
                yield number, row
    elif path.is_file():
        for number, row in _one_file(path):
            yield number, row
    else:
        raise ValueError("there is no such file; give the path of a file of rows")
    if not number:
        raise ValueError("the file is empty; it must hold rows, such as one JSON object a line")


def object_rows(path: Path) -> Found:
    """What `file_rows` yields, but for a `.json` file that is one JSON object, over however many lines: its one row."""
    if path.suffix == ".json" and path.is_file():
        with contextlib.suppress(UnicodeDecodeError, json.JSONDecodeError, RecursionError):
            found = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
            if isinstance(found, dict):
                yield 1, _complete(found)
                return
    yield from file_rows(path)


def _one_file(path: Path) -> Found:
    number, kind = 0, "file"
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        _refuse(path, head)
        if table := next((one for one in _TABLES if head.startswith(one)), None):
            kind, read = _TABLES[table]
            for number, row in enumerate(_batches(read, path), start=1):
                yield number, _complete(row)
            return
        packed = next((one for one in _COMPRESSED if head.startswith(one)), None)
        kind, unpack = _COMPRESSED[packed] if packed else (kind, lambda path: path.open("rb"))
        with unpack(path) as stream:
            for number, row in _text_rows(path, stream):
                yield number, row
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno:
            raise ValueError(f"it cannot be read ({error.strerror})") from error
        told = f"after {number} rows it is no valid {kind} ({error}); fetch or compress it again"
        raise ValueError(told) from error


def _text_rows(path: Path, stream: Any) -> Found:
    head = stream.peek(_HEAD)[:_HEAD]
    _refuse(path, head)
    suffix = Path(path.stem).suffix if path.suffix in (".gz", ".bz2", ".xz", ".zst") else path.suffix
    if suffix in (".csv", ".tsv"):
        return _csv(stream, head)
    if head.lstrip()[:1] == b"[":
        return _list(stream)
    if suffix == ".txt" and head.lstrip()[:1] != b"{":
        raise _not_read(path, *_PLAIN)
    if head.lstrip().partition(b"\n")[0].strip() == b"{":
        raise _not_read(path, *_OBJECT)
    return _lines(stream)


def _refuse(path: Path, head: bytes) -> None:
    for (offset, magic), (what, conversion) in _NOT_READ.items():
        first = head[offset : offset + len(magic)]
        if first == magic or (magic[:1] == b"<" and first.lower() == magic):
            raise _not_read(path, what, conversion)


def _not_read(path: Path, what: str, conversion: str) -> ValueError:
    return ValueError(f"it is {what}, which is not read here. Remedy: {conversion.format(file=path)}")


def _saved_dataset(folder: Path) -> list[Path]:
    """The files of a data set that `save_to_disk` wrote, in their order."""
    if (state := folder / "state.json").is_file():
        return [folder / file["filename"] for file in json.loads(state.read_text())["_data_files"]]
    if (splits := folder / "dataset_dict.json").is_file():
        names = json.loads(splits.read_text())["splits"]
        raise ValueError(f"it is a data set of the splits {', '.join(names)}; give one, such as {folder / names[0]}")
    raise ValueError("it is a folder, and not a data set that save_to_disk wrote; give one of its files")


def _batches(read: Callable[[Any, Path], Iterator[Any]], path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow

    try:
        for batch in read(pyarrow, path):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise EOFError(str(error)) from error


def _parquet(pyarrow: Any, path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    return parquet.ParquetFile(path).iter_batches(batch_size=_BATCH)


def _arrow_file(pyarrow: Any, path: Path) -> Iterator[Any]:
    file = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
    return (file.get_batch(index) for index in range(file.num_record_batches))


def _arrow_stream(pyarrow: Any, path: Path) -> Iterator[Any]:
    return iter(pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))))


def _zstd(path: Path) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


_TABLES = {
    b"PAR1": ("Parquet file", _parquet),
    b"ARROW1": ("Arrow file", _arrow_file),
    b"\xff\xff\xff\xff": ("Arrow stream", _arrow_stream),
}
_COMPRESSED: dict[bytes, tuple[str, Callable[[Path], Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"BZh": ("bzip2", bz2.open),
    b"\xfd7zXZ\x00": ("xz", lzma.open),
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
}


def _csv(stream: Any, head: bytes) -> Found:
    """Cells by the names of the first row; an empty cell is absent."""
    first = head.partition(b"\n")[0]
    delimiter = max(",\t;", key=lambda mark: first.count(mark.encode()))
    csv.field_size_limit(MAX_LINE_BYTES)
    cells = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    line = 2
    try:
        for row in cells:
            more = f"the row has more cells than the {len(cells.fieldnames or ())} columns of the first row"
            yield (
                line,
                ValueError(more) if None in row else _complete({name: cell for name, cell in row.items() if cell}),
            )
            line = cells.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        yield line, ValueError(f"not valid CSV in UTF-8 ({error}), and what follows is not read; write it anew")


def _list(stream: Any) -> Found:
    try:
        found = json.loads(stream.read().decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"not a valid JSON list at {where} ({error.msg}); write one object a line") from error
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply; flatten it") from error
    for number, row in enumerate(found, start=1):
        yield number, _complete(row)


def _lines(stream: Any) -> Found:
    for number, line in enumerate(_bounded(stream), start=1):
        if line is None or line.strip():
            try:
                yield number, _row(line, first=number == 1)
            except ValueError as error:
                yield number, error


def _bounded(stream: Any) -> Iterator[bytes | None]:
    """Yield the lines of a file; None stands for one that is too long, whose rest is read and forgotten."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE_BYTES)
        yield None


def _row(line: bytes | None, first: bool) -> dict[str, Any] | ValueError:
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
    return _complete(row) if "\\u" in text else _object(row)


def _complete(row: Any) -> dict[str, Any] | ValueError:
    """A row, if it is one and its characters are good."""
    try:
        _check_characters(row)
        return _object(row)
    except ValueError as error:
        return error
    except RecursionError:
        return ValueError("the JSON is nested too deeply; flatten it")


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object {{...}}, this one is a {type(row).__name__}")
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
