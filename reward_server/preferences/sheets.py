"""Comparison sheets: completions for people to rank in a spreadsheet or a labeling tool, and their rankings back.

A sheet has a row for each completion, the completions of a prompt in an order that tells nothing of who wrote
them. People fill in the column `rank` and nothing else: 1 is best, equal numbers are a tie. The texts are there
to be read; what is trained on are the texts that the sheet was made of.
"""

import csv
import io
import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from reward_server.preferences.labeling import Comparison
from reward_server.preferences.records import RecordError, json_lines, read_rows, write_whole

COLUMNS: tuple[str, ...] = ("comparison", "letter", "prompt", "completion", "rank")
_DELIMITERS = ",;\t"  # spreadsheets of some countries save semicolons
# Where a spreadsheet may begin a cell, as it may split at other marks than ours, and take it for a formula.
_FORMULA = re.compile(r"^(?=[\t\r\n])|(?:^|(?<=[,;|\t\r\n]))(?=\"*[=+\-@'\uff1d\uff0b\uff0d\uff20])")
_GUARD = re.compile(r"(?:^|(?<=[,;|\t\r\n]))'")
_RANK = re.compile(r"[0-9]{1,4}")
_SHOWN = 20  # problems of a file that are listed


@dataclass(frozen=True, slots=True, kw_only=True)
class Rankings:
    """What one labeler made of a sheet."""

    labeler: str
    """who ranked: the name of the file without its ending"""
    ranks: Mapping[str, tuple[int, ...]]
    """by comparison id: ranks in the order of its responses, 0 is best, without gaps"""
    partial: tuple[str, ...]
    """where ranks are missing in comparisons that have some: file, row, column and remedy"""


def write_sheet(folder: Path, comparisons: Sequence[Comparison], seed: int) -> tuple[Path, Path]:
    """Write folder/sheet.csv, for spreadsheets, and folder/sheet.jsonl, for tools; each appears whole or not at all.

    The same comparisons and seed give the same bytes. Raises ValueError for more than 26 completions of a prompt.
    """
    rows = list(_sheet(comparisons, seed))
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows({name: "" if value is None else _guarded(value) for name, value in row.items()} for row in rows)
    lines = json_lines(rows)
    # The mark at the start tells spreadsheets that it is UTF-8.
    return _write(folder / "sheet.csv", f"\ufeff{table.getvalue()}"), _write(folder / "sheet.jsonl", lines)


def read_rankings(path: Path, comparisons: Sequence[Comparison], seed: int) -> Rankings:
    """Read a filled sheet, .csv or .jsonl, of `write_sheet(.., comparisons, seed)`. Rows may be in any order.

    A comparison of which every rank is empty was not ranked; one with some ranks is reported in `partial`. Raises
    RecordError that lists, with file, row, column and remedy: unknown comparisons and letters, changed texts, ranks
    that are no integers, rows that are there twice, and files of another kind.
    """
    sheet = {(str(row["comparison"]), str(row["letter"])): row for row in _sheet(comparisons, seed)}
    seen: dict[tuple[str, str], tuple[int, int | None]] = {}
    wrong: list[str] = []
    for number, row in _table(path):
        key = str(row["comparison"] or "").strip(), str(row["letter"] or "").strip()
        if not any(str(value or "").strip() for value in row.values()):
            continue
        try:
            _check_row(row, key, sheet, seen)
            seen[key] = number, _rank(row["rank"])
        except ValueError as error:
            wrong.append(f"{path}: row {number}, {error}")
    if wrong:
        more = f"\nand {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise RecordError("\n".join(wrong[:_SHOWN]) + more)
    return _rankings(path, comparisons, seed, seen)


def merge_rankings(comparisons: Sequence[Comparison], rankings: Sequence[Rankings]) -> list[Comparison]:
    """The comparisons that somebody ranked whole; where several did, by the mean of their ranks.

    Merged rather than kept apart, so that the same completions are never trained on and held out at once.
    """
    merged = []
    for comparison in comparisons:
        by = [one for one in rankings if comparison.id in one.ranks]
        if by:
            means = [fmean(column) for column in zip(*(one.ranks[comparison.id] for one in by), strict=True)]
            labeler = "+".join(one.labeler for one in by)
            merged.append(replace(comparison, ranks=dense(means), labeler=labeler))
    return merged


def agreement_credit(rankings: Sequence[Rankings]) -> list[tuple[float, int]]:
    """(agreements, pairs) of each comparison that at least two labelers ranked, over all pairs of them.

    The paper reports the share of pairs on which two labelers agree (section 3.4: 72.6 %).
    """
    credit = []
    for name in dict.fromkeys(name for one in rankings for name in one.ranks):
        by = [one.ranks[name] for one in rankings if name in one.ranks]
        found = [pair_credit(a, b) for k, a in enumerate(by) for b in by[:k]]
        if pairs := sum(count for _, count in found):
            credit.append((sum(agreed for agreed, _ in found), pairs))
    return credit


def pair_credit(ranks: Sequence[int], others: Sequence[int]) -> tuple[float, int]:
    """(agreements, pairs) of two rankings of the same completions.

    A pair of completions that both put in the same order, or both tie, counts 1, a tie against an order 1/2, opposite
    orders 0.
    """
    pairs = [(i, j) for i in range(len(ranks)) for j in range(i)]
    apart = sum(abs(_sign(ranks[j] - ranks[i]) - _sign(others[j] - others[i])) for i, j in pairs)
    return len(pairs) - apart / 2, len(pairs)


def _sheet(comparisons: Sequence[Comparison], seed: int) -> Iterator[dict[str, Any]]:
    for comparison in comparisons:
        prompt = "\n\n".join(f"{message.role}: {message.content}" for message in comparison.prompt)
        for letter, index in response_letters(comparison, seed).items():
            row = (comparison.id, letter, prompt, comparison.responses[index], None)
            yield dict(zip(COLUMNS, row, strict=True))


def response_letters(comparison: Comparison, seed: int) -> dict[str, int]:
    """Which response each letter stands for; a pure function of seed and id."""
    count, letters = len(comparison.responses), string.ascii_uppercase
    if count > len(letters):
        raise ValueError(f"comparison {comparison.id!r} has {count} completions; a sheet has {len(letters)} letters")
    order = random.Random(f"sheet {seed} {comparison.id}").sample(range(count), count)
    return dict(zip(letters, order, strict=False))


def _guarded(text: str) -> str:
    """A cell that no spreadsheet takes for a formula, nor for a number or date: an apostrophe before what could be."""
    number = text and not any(character.isalpha() for character in text)
    guarded = _FORMULA.sub("'", text)
    return f"'{guarded}" if number and not guarded.startswith("'") else guarded


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return path


def _table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row as a spreadsheet numbers them, or line, cells by column)."""
    if path.suffix == ".jsonl":
        for number, row in read_rows(path):
            if missing := [name for name in COLUMNS if name not in row]:
                raise RecordError(f"{path}: row {number}, column {missing[0]}: is missing; give each row all of them")
            yield number, {name: row[name] for name in COLUMNS}
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: byte {error.start} is not UTF-8; save the sheet as CSV in UTF-8") from error
    first = text.partition("\n")[0].replace('"', "").strip()
    delimiter = next((mark for mark in _DELIMITERS if set(COLUMNS) <= set(first.split(mark))), None)
    if delimiter is None:
        raise RecordError(
            f"{path}: row 1 must have the columns {', '.join(COLUMNS)}, it has {first[:80]!r}; "
            "copy the first row of sheet.csv"
        )
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for number, row in enumerate(rows, start=2):
            cells = {name: row[name] or "" for name in COLUMNS}
            yield number, cells | {name: _GUARD.sub("", cells[name]) for name in COLUMNS[:-1]}
    except csv.Error as error:
        raise RecordError(f"{path}: line {rows.line_num + 1}: {error}; save the sheet as CSV once more") from error


def _check_row(
    row: Mapping[str, Any],
    key: tuple[str, str],
    sheet: Mapping[tuple[str, str], Mapping[str, Any]],
    seen: Mapping[tuple[str, str], tuple[int, int | None]],
) -> None:
    name, letter = key
    if key not in sheet:
        known = any(name == other for other, _ in sheet)
        column, value = ("letter", letter) if known else ("comparison", name)
        raise ValueError(f"column {column}: {value!r:.60} is not in the sheet; copy it from sheet.csv")
    if key in seen:
        raise ValueError(
            f"column letter: completion {letter} of {name!r} is in row {seen[key][0]} already; remove one of the two"
        )
    for column in ("prompt", "completion"):
        if not isinstance(row[column], str) or _words(row[column]) != _words(sheet[key][column]):
            raise ValueError(
                f"column {column}: the text of completion {letter} of {name!r} was changed; fill in ranks only, and "
                "copy the text from sheet.csv"
            )


def _words(text: str) -> list[str]:
    """What must not change; programs change spaces, and leave out control characters and our apostrophes."""
    text = re.sub(r"(?:^|(?<=[,;|\s]))'+", "", text)
    return "".join(c if c.isprintable() else " " if c.isspace() else "" for c in text).split()


def _rank(value: object) -> int | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if type(value) is int and 0 <= value <= 9999:
        return value
    if isinstance(value, str) and _RANK.fullmatch(value.strip()):
        return int(value)
    raise ValueError(f"column rank: {value!r:.60} is not a rank; write 1 for the best, 2, ..; equal ones are a tie")


def _rankings(
    path: Path, comparisons: Sequence[Comparison], seed: int, seen: Mapping[tuple[str, str], tuple[int, int | None]]
) -> Rankings:
    ranks: dict[str, tuple[int, ...]] = {}
    partial: list[str] = []
    for comparison in comparisons:
        letters = response_letters(comparison, seed)
        found = [seen.get((comparison.id, letter)) for letter in sorted(letters, key=letters.__getitem__)]
        given = [rank for _, rank in filter(None, found) if rank is not None]
        if len(given) == len(letters):
            ranks[comparison.id] = dense(given)
        elif given:
            at = next((one[0] for one in found if one and one[1] is None), None)
            where = f"row {at}, column rank" if at else "a row"
            partial.append(
                f"{path}: {where}: is missing; comparison {comparison.id!r} has {len(given)} of {len(letters)} ranks: "
                "rank all of its completions, or none"
            )
    return Rankings(labeler=path.stem, ranks=ranks, partial=tuple(partial))


def dense(values: Sequence[float]) -> tuple[int, ...]:
    """Ranks 0, 1, .. without gaps, the lowest value first."""
    places = {value: rank for rank, value in enumerate(sorted(set(values)))}
    return tuple(places[value] for value in values)


def _sign(difference: int) -> int:
    return (difference > 0) - (difference < 0)
