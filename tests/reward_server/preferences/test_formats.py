"""What a data file is, told by its first bytes, and its rows."""

import bz2
import gzip
import json
import lzma
import pickle
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from actors.prompts import read_demonstrations
from reward_server.preferences.records import RecordError, read_records, read_rows

ROWS = [{"id": "a", "prompt": 'p, "1"\nand', "response": "r"}, {"id": None, "prompt": "ü", "response": "s"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = '\ufeffid,prompt,response\r\na,"p, ""1""\nand",r\r\n,ü,s\r\n'
TABLE: Any = pa.table({name: [row[name] for row in ROWS] for name in ROWS[0]})


def arrow(path: Path, new: Any) -> None:
    with new(str(path), TABLE.schema) as file:
        file.write_table(TABLE)


def zstd(path: Path, text: str) -> None:
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as file:
        file.write(text.encode())


WRITE: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_text(LINES),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "one-line.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.csv": lambda path: path.write_text(CSV, newline=""),
    "semicolons.csv": lambda path: path.write_text('id;prompt;response\na;"p, ""1""\nand";r\n;ü;s\n'),
    "rows.tsv": lambda path: path.write_text('id\tprompt\tresponse\na\t"p, ""1""\nand"\tr\n\tü\ts\n'),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "rows.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINES.encode())),
    "rows.json.xz": lambda path: path.write_bytes(lzma.compress(json.dumps(ROWS).encode())),
    "rows.csv.zst": lambda path: zstd(path, CSV),
    "no-suffix": lambda path: zstd(path, LINES),
    "rows.parquet": lambda path: parquet.write_table(TABLE, path),
    "rows.arrow": lambda path: arrow(path, pa.ipc.new_file),
    "stream.arrow": lambda path: arrow(path, pa.ipc.new_stream),
}


@pytest.mark.parametrize("name", WRITE)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITE[name](tmp_path / name)
    found = read_demonstrations(tmp_path / name)
    assert [(one.prompt[0].content, one.response) for one in found] == [(r["prompt"], r["response"]) for r in ROWS]
    assert found[0].id == "a"
    assert found[1].id in ("row-2", "row-4")  # CSV counts lines


def test_a_folder_that_datasets_saved_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(ROWS * 2)
    saved.save_to_disk(str(tmp_path / "set"), num_shards=2)
    assert [(number, row["prompt"]) for number, row in read_rows(tmp_path / "set")] == [
        (number, row["prompt"]) for number, row in enumerate(ROWS * 2, start=1)
    ]
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(RecordError, match=r"splits train, test; give one, such as .*splits/train"):
        list(read_rows(tmp_path / "splits"))
    with pytest.raises(RecordError, match="save_to_disk"):
        list(read_rows(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.csv", b"a,b\n1,2,3\n1,2\n", ":2: the row has more cells than the 2 columns"),
        ("rows.csv", b"a,b\n1,2\n\xff,2\n", "not valid CSV in UTF-8"),
        ("rows.json", b"[[1]]", ":1: a row must be a JSON object {...}, this one is a list"),
        ("rows.json", b'[{"a": 1},\n {"a": }]', ": not a valid JSON list at line 2, column 8"),
        ("rows.json", b'[{"a": NaN}]', "NaN is not a JSON number"),
        ("rows.json", b'[{"a": "\\u0000"}]', ":1: a text holds a NUL character"),
        ("rows.json", b"[]", ": the file is empty"),
        ("rows.json", b'{\n "data": []\n}', ": it is one JSON object over several lines"),
        ("rows.txt", b"Once upon a time.\n", ": it is plain text"),
        ("rows.parquet", b"PAR1 and then nothing", "no valid Parquet file"),
        ("rows.arrow", b"ARROW1\0\0 and then nothing", "no valid Arrow file"),
        ("rows.jsonl.bz2", bz2.compress(LINES.encode())[:-8], "no valid bzip2"),
        ("rows.jsonl.xz", lzma.compress(LINES.encode())[:-8], "no valid xz"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError) as caught:
        read_records(tmp_path / name, lambda row, line: row)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert said in str(caught.value)


def database(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("create table rows (prompt text)")


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.jsonl", LINES)


@pytest.mark.parametrize(
    ("write", "what", "conversion"),
    [
        (zipped, "a zip archive or a spreadsheet", "unzip "),
        (database, "a SQLite database", "sqlite3 -json "),
        (lambda path: path.write_bytes(pickle.dumps(ROWS, protocol=5)), "a pickle", "read_pickle"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "Git LFS", "git lfs pull"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html>\n<html>"), "a web page", "/resolve/"),
        (lambda path: path.write_bytes(b"Obj\x01avro"), "an Avro file", "fastavro "),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "an HDF5 file", "read_hdf"),
        (lambda path: path.write_bytes(b"\x00" * 257 + b"ustar"), "a tar archive", "tar -xf"),
        (lambda path: path.write_bytes(gzip.compress(b"\x00" * 257 + b"ustar")), "a tar archive", "tar -xf"),
    ],
)
def test_what_is_not_read_is_named_with_its_conversion(
    write: Callable[[Path], object], what: str, conversion: str, tmp_path: Path
) -> None:
    write(tmp_path / "rows.jsonl")
    with pytest.raises(RecordError) as caught:
        list(read_rows(tmp_path / "rows.jsonl"))
    told = str(caught.value)
    assert told.startswith(f"{tmp_path / 'rows.jsonl'}: it is ")
    assert f"{what}" in told
    assert conversion in told.partition("Remedy: ")[2]
