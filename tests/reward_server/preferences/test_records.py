"""Reading JSONL: every fault names file, line, reason and remedy."""

import contextlib
import gzip
import json
import logging
import re
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.prompts import read_demonstrations, read_prompts
from learner.data.corpora import read_texts
from reward_server.preferences import formats
from reward_server.preferences.labeling import Comparison, read_comparisons, write_comparisons
from reward_server.preferences.records import (
    ASIDE,
    NotWritten,
    RecordError,
    read_all,
    read_records,
    read_rows,
    row_id,
    sweep,
    write_whole,
)
from tests.full_disk import FullDisk


def _file(folder: Path, content: bytes) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(content)
    return path


def test_rows_come_with_their_line_numbers_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    path = _file(tmp_path, b'{"a": 1}\n\n  \r\n{"a": "\xc3\xa9"}')
    assert list(read_rows(path)) == [(1, {"a": 1}), (4, {"a": "é"})]


@pytest.mark.parametrize(
    ("second_line", "reason"),
    [
        (b'{"a": 1', "not valid JSON at column"),
        (b"{'a': 1}", "not valid JSON at column 2"),
        (b"[1]", "must be a JSON object {...}, this one is a list"),
        (b"null", "this one is a NoneType"),
        (b'{"a": "\x00"}', "NUL byte"),
        (b'{"a": ["\\u0000"]}', "NUL character"),
        (b'{"a": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"\\ud83d": 1}', "half of a surrogate pair"),
        (b'{"a": "\xff"}', "byte 7 of the line is not UTF-8"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_row_is_reported_with_file_line_and_reason(tmp_path: Path, second_line: bytes, reason: str) -> None:
    path = _file(tmp_path, b'{"a": 1}\n' + second_line + b"\n")
    rows = read_rows(path)
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(RecordError) as caught:
        next(rows)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)


def test_whole_characters_written_as_escapes_are_fine(tmp_path: Path) -> None:
    path = _file(tmp_path, b'{"a": "\\ud83d\\ude00 \\\\u0000"}')
    assert list(read_rows(path)) == [(1, {"a": "\N{GRINNING FACE} \\u0000"})]


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"])
def test_a_byte_order_mark_is_refused(tmp_path: Path, mark: bytes) -> None:
    with pytest.raises(RecordError, match=r":1: the file starts with a byte-order mark; save it as UTF-8"):
        list(read_rows(_file(tmp_path, mark + b'{"a": 1}\n')))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(RecordError, match="the file is empty"):
        list(read_rows(_file(tmp_path, content)))


def test_a_compressed_file_is_read_as_its_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": 2}\n'))
    assert list(read_rows(path)) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize("cut", [5, 30, -4])
def test_a_compressed_file_that_is_broken_off_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n')[:cut])
    with pytest.raises(RecordError, match=r"rows.jsonl.gz: .*no valid gzip"):
        list(read_rows(path))
    path.write_bytes(b'{"a": 1}\n')  # unpacked on the way, and still of this name
    assert list(read_rows(path)) == [(1, {"a": 1})]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="there is no such file"):
        list(read_rows(tmp_path / "none.jsonl"))


def test_a_line_too_long_is_refused_and_does_not_shift_the_line_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 16)
    path = _file(tmp_path, b'{"a": 1}\n{"a": "' + b"x" * 100 + b'"}\n{"a": 2}\n[]\n')
    with pytest.raises(RecordError, match=r"data\.jsonl:2: the line is longer"):
        list(read_rows(path))
    assert read_records(path, lambda row, line: (line, row["a"]), max_bad_rows=2) == [(1, 1), (3, 2)]


def _positive(row: dict[str, int], line: int) -> int:
    if row["a"] < 0:
        raise ValueError(f"{row['a']} is negative; make it positive")
    return row["a"]


def test_bad_rows_are_skipped_up_to_the_budget_and_each_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _file(tmp_path, b'{"a": 1}\n{"a": -2}\nnonsense\n{"a": 4}\n')
    with caplog.at_level(logging.WARNING):
        assert read_records(path, _positive, max_bad_rows=2) == [1, 4]
    told = [record.getMessage() for record in caplog.records]
    assert [f"{path}:{line}: " in text for line, text in zip((2, 3), told, strict=True)] == [True, True]
    with pytest.raises(RecordError) as caught:
        read_records(path, _positive, max_bad_rows=1)
    first, second, last = str(caught.value).splitlines()
    assert first == f"{path}:2: -2 is negative; make it positive"
    assert second.startswith(f"{path}:3: not valid JSON")
    assert last == f"{path}: 2 bad rows; only 1 may be skipped (data.max_bad_rows)"


def test_of_many_bad_rows_the_first_are_told_with_their_ids_and_the_others_by_their_lines(tmp_path: Path) -> None:
    path = _file(tmp_path, b"".join(b'{"a": -1, "id": "r%d"}\n' % i for i in range(1, 31)))
    with pytest.raises(RecordError) as caught:
        read_records(path, _positive)
    told = str(caught.value).splitlines()
    assert told[0] == f"{path}:1: id 'r1': -1 is negative; make it positive"
    assert told[20] == f"{path}: 10 more bad rows: {', '.join(map(str, range(21, 31)))}"
    assert told[21].startswith(f"{path}: 30 bad rows; only 0 may be skipped")


def test_all_files_are_read_before_what_is_wrong_with_them_is_told(tmp_path: Path) -> None:
    bad, none = _file(tmp_path, b'{"a": -1}\n'), tmp_path / "none.jsonl"
    with pytest.raises(RecordError, match=r"data\.jsonl:1: -1 is negative.*\n.*none\.jsonl: there is no such file"):
        read_all(lambda: read_records(bad, _positive), lambda: [1], lambda: read_prompts(none))
    assert read_all(lambda: 1, lambda: [2]) == [1, [2]]


def test_null_is_absent(tmp_path: Path) -> None:
    path = _file(tmp_path, b'{"a": {"b": null, "c": [{"d": null, "e": 1}]}, "id": null}\n')
    assert read_records(path, lambda row, line: (row, row_id(row, line))) == [({"a": {"c": [{"e": 1}]}}, "row-1")]


def test_a_file_without_a_good_row_is_refused_whatever_the_budget(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"none of its 2 rows can be used; the first: .*:1: "):
        read_records(_file(tmp_path, b"x\ny\n"), _positive, max_bad_rows=10)


def test_a_row_without_an_id_is_named_after_its_line() -> None:
    assert row_id({}, 7) == "row-7"
    assert row_id({"id": 3}, 7) == "3"


@pytest.mark.parametrize("value", ["", "  ", "x" * 101, True, 1.5, None, ["a"]])
def test_a_bad_id_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match='"id" must'):
        row_id({"id": value}, 1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
# Rows that are almost right: the keys that loaders know, with any value, so that more than the first check is met.
ROWS = st.dictionaries(
    st.sampled_from(["id", "prompt", "response", "text", "completions", "ranks", "chosen", "rejected", "labeler"]),
    JSON | st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text()})),
    max_size=5,
)
LINES = st.one_of(ROWS.map(json.dumps), JSON.map(json.dumps), st.text(alphabet=st.characters(exclude_characters="\n")))
LOADERS = {
    "prompts": read_prompts,
    "demonstrations": read_demonstrations,
    "comparisons": read_comparisons,
    "texts": read_texts,
}


@pytest.mark.parametrize("name", LOADERS)
@settings(max_examples=120, deadline=None)
@given(lines=st.lists(LINES | st.binary(max_size=40).map(lambda b: b.decode("latin-1")), min_size=1, max_size=4))
def test_any_file_is_read_or_refused_with_file_and_line(name: str, lines: list[str]) -> None:
    load: Callable[..., list[object]] = LOADERS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = _file(Path(folder), "\n".join(lines).encode("utf-8", "surrogatepass"))
        refused: str | None = None
        try:
            assert load(path)
        except RecordError as error:
            refused = str(error)
        assert refused is None or re.fullmatch(re.escape(str(path)) + r"(:\d+)?: [\s\S]*\S[\s\S]*", refused)
        with contextlib.suppress(RecordError):  # within the budget, the rows that are right are kept
            assert load(path, max_bad_rows=len(lines) + 10)


TEXT = st.text(min_size=1).filter(lambda text: text.strip() and "\x00" not in text)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_what_is_written_as_json_is_read_back_to_the_letter(pairs: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [json.dumps({"id": f"r{i}", "prompt": p, "response": r}) for i, (p, r) in enumerate(pairs)]
        path = _file(Path(folder), "\n".join(rows).encode())
        found = read_demonstrations(path)
        assert [(d.prompt[0].content, d.response) for d in found] == pairs
        comparisons = [
            Comparison(
                id=f"r{i}", prompt=found[i].prompt, responses=pair, ended=(True, False), ranks=(1, 0), labeler="me"
            )
            for i, pair in enumerate(pairs)
        ]
        write_comparisons(path, comparisons)
        assert read_comparisons(path) == comparisons


def test_a_line_of_100_mb_is_refused_by_its_number_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": 1}\n{"a": "')
        file.truncate(100 * 2**20)  # a hole: NULs that take no room on the disk
        file.seek(0, 2)
        file.write(b'"}\n{"a": 3}\n')
    tracemalloc.start()
    assert read_records(path, lambda row, line: (line, row["a"]), max_bad_rows=1) == [(1, 1), (3, 3)]
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()
    with pytest.raises(
        RecordError, match=r"data\.jsonl:2: the line is longer than 16 MiB; split it, one object a line"
    ):
        list(read_rows(path))


def test_a_file_that_cannot_be_written_is_as_it_was_and_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, file = FullDisk(monkeypatch), tmp_path / "a.json"
    write_whole(file, "first")
    disk.full = True
    with pytest.raises(NotWritten) as refused:
        write_whole(file, "second")
    assert str(refused.value) == f"{file} cannot be written (No space left on device). Remedy: make room on its disk"
    with pytest.raises(NotWritten, match=r"b/a\.json cannot be written \(No such file or directory\)\. Remedy: see to"):
        write_whole(tmp_path / "b" / "a.json", "third")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "first")]


def test_what_a_killed_writer_left_is_swept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data" / f"{ASIDE}policy" / "deep").mkdir(parents=True)
    (tmp_path / "data" / f"{ASIDE}a.json-7").write_text("{")
    (tmp_path / "data" / ".mine").write_text("")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", ".mine"]
    assert caplog.text.count("which was not complete") == 2
