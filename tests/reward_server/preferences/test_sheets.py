"""Sheets for people: every text survives a spreadsheet, and every mistake is told with file, row and column."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_server.preferences.labeling import Comparison
from reward_server.preferences.records import RecordError
from reward_server.preferences.sheets import COLUMNS, agreement_credit, merge_rankings, read_rankings, write_sheet
from reward_server.schema import Message

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
NASTY = st.sampled_from(
    (
        "=1+1",
        "+49 1",
        "-",
        "@x",
        "'",
        "''=",
        '"',
        'a "b", c;\n\td',
        "\r",
        "\n=A1",
        "x;=1+1;",
        'x;"=1+1;',
        "a\n-1|@x\t'=|",
        "1,-2",
        "1e5",
        "👩‍🚀 é",
        " ",
        "",
        "\ufeff",
        "\u2028",
    )
)


def comparison(name: str, *responses: str, prompt: str = "hello") -> Comparison:
    return Comparison(
        id=name,
        prompt=(Message(role="user", content=prompt),),
        responses=responses,
        ended=(True,) * len(responses),
        ranks=None,
        labeler=None,
    )


TWO = [comparison("r1-1", "good", "bad", "ugly"), comparison("r1-2", "=1", 'two, "2"\nlines', prompt="and now?")]
RANKS = {"good": "1", "bad": "3", "ugly": "7", "=1": "2", 'two, "2"\nlines': "2"}


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def save(path: Path, rows: list[dict[str, str]], **options) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, **options)
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode())
    return path


def ranked(folder: Path, name: str = "anna.csv", **options) -> Path:
    rows = table(write_sheet(folder, TWO, seed=3)[0])
    return save(folder / name, [row | {"rank": RANKS[plain(row["completion"])]} for row in rows], **options)


def plain(cell: str) -> str:
    """A cell without the apostrophes that guard it."""
    return re.sub(r"(^|(?<=[,;|\t\r\n]))'", "", cell)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(TEXTS | NASTY, min_size=2, max_size=5), min_size=1, max_size=4), TEXTS | NASTY, st.integers(0, 9)
)
def test_any_text_survives_both_kinds_of_sheet(tmp_path_factory, groups, prompt, seed):
    folder = tmp_path_factory.mktemp("sheet")
    sheet = [comparison(f"-{n}", *group, prompt=prompt) for n, group in enumerate(groups)]
    table_path, lines_path = write_sheet(folder, sheet, seed)
    rows, objects = table(table_path), [json.loads(line) for line in lines_path.read_text().split("\n") if line]
    texts = [plain(row["completion"]) for row in rows]
    assert texts == [one["completion"] for one in objects]
    assert sorted(texts) == sorted(text for group in groups for text in group)
    # rank the rows 1, 2, .. in the order in which they stand; each rank must come back at its own response
    filled = save(folder / "filled.csv", [row | {"rank": str(n)} for n, row in enumerate(rows)], quoting=csv.QUOTE_ALL)
    found = read_rankings(filled, sheet, seed)
    for one in sheet:
        own = [text for text, row in zip(texts, rows, strict=True) if row["comparison"] == f"'{one.id}"]
        assert [one.responses[found.ranks[one.id].index(place)] for place in range(len(own))] == own
    (folder / "filled.jsonl").write_text(
        "".join(json.dumps(one | {"rank": n}) + "\n" for n, one in enumerate(objects)), encoding="utf-8"
    )
    assert read_rankings(folder / "filled.jsonl", sheet, seed).ranks == found.ranks


@given(TEXTS | NASTY)
def test_no_cell_is_a_formula_or_a_number(tmp_path_factory, text):
    for row in table(write_sheet(tmp_path_factory.mktemp("sheet"), [comparison("x", text, "b", prompt=text)], 0)[0]):
        for cell in row.values():
            assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
            assert not re.fullmatch(r"[\d.,/: ]+", cell)


@given(TEXTS | NASTY)
def test_no_cell_is_a_formula_for_a_program_that_splits_at_another_mark(tmp_path_factory, text):
    path, _ = write_sheet(tmp_path_factory.mktemp("sheet"), [comparison("x", text, "b", prompt=text)], 0)
    for mark in ",;|\t":
        for row in csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), delimiter=mark):
            assert not any(cell.startswith(("=", "+", "-", "@")) for cell in row), row


def test_the_order_of_completions_is_stable_and_tells_nothing(tmp_path):
    sheet = [comparison(f"r1-{n}", *"abcd") for n in range(200)]
    one, again, other = (table(write_sheet(tmp_path, sheet, seed)[0]) for seed in (3, 3, 4))
    assert one == again
    assert one != other
    first = [row["completion"] for row in one if row["letter"] == "A"]
    assert all(35 < first.count(text) < 65 for text in "abcd")  # 50 each, within 2.5 standard deviations


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_ranks_become_dense_and_ties_stay(tmp_path, delimiter):
    found = read_rankings(ranked(tmp_path, delimiter=delimiter), TWO, seed=3)
    assert found.labeler == "anna"
    assert found.ranks == {"r1-1": (0, 1, 2), "r1-2": (0, 0)}
    assert found.partial == ()
    assert [(c.ranks, c.labeler) for c in merge_rankings(TWO, [found])] == [((0, 1, 2), "anna"), ((0, 0), "anna")]


def test_what_spreadsheets_do_to_texts_is_no_change(tmp_path):
    rows = table(ranked(tmp_path))
    for row in rows:
        row["completion"] = plain(row["completion"]).replace("\n", "\r\n") + " "
        row["prompt"] = row["prompt"].replace(" ", "\u00a0")
    found = read_rankings(save(tmp_path / "anna.csv", rows[::-1]), TWO, seed=3)
    assert found.ranks == {"r1-1": (0, 1, 2), "r1-2": (0, 0)}


def spoil(column: str, value: str, row: int = 1):
    def change(rows):
        rows[row][column] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (spoil("rank", "first"), r"anna\.csv: row 3, column rank: 'first' is not a rank; write 1 for the best"),
        (spoil("rank", "1.5"), r"row 3, column rank: '1\.5' is not a rank"),
        (spoil("rank", "-1"), r"row 3, column rank: '-1' is not a rank"),
        (spoil("comparison", "r9-1"), r"row 3, column comparison: 'r9-1' is not in the sheet; copy it from sheet\.csv"),
        (spoil("letter", "Q"), r"row 3, column letter: 'Q' is not in the sheet"),
        (spoil("completion", "goood"), r"row 3, column completion: the text of completion B of 'r1-1' was changed"),
        (spoil("prompt", ""), r"row 3, column prompt: the text of completion B of 'r1-1' was changed"),
        (lambda rows: rows.append(rows[0]), r"row 7, column letter: completion A of 'r1-1' is in row 2 already"),
    ],
)
def test_a_mistake_is_told_with_file_row_column_and_remedy(tmp_path, change, said):
    rows = table(ranked(tmp_path))
    change(rows)
    with pytest.raises(RecordError, match=said):
        read_rankings(save(tmp_path / "anna.csv", rows), TWO, seed=3)


def test_every_mistake_is_told_at_once(tmp_path):
    rows = table(ranked(tmp_path))
    spoil("rank", "x", 0)(rows)
    spoil("completion", "x", 3)(rows)
    with pytest.raises(RecordError) as error:
        read_rankings(save(tmp_path / "anna.csv", rows), TWO, seed=3)
    assert [line.split(":")[1] for line in str(error.value).splitlines()] == [
        " row 2, column rank",
        " row 5, column completion",
    ]


def test_missing_ranks_are_told_and_an_unranked_comparison_is_none(tmp_path):
    rows = table(ranked(tmp_path))
    spoil("rank", " ", 1)(rows)
    spoil("rank", "", 3)(rows)
    spoil("rank", "", 4)(rows)
    found = read_rankings(save(tmp_path / "anna.csv", rows), TWO, seed=3)
    assert found.ranks == {}
    (told,) = found.partial
    assert "anna.csv: row 3, column rank: is missing; comparison 'r1-1' has 2 of 3 ranks" in told
    del rows[1]
    (told,) = read_rankings(save(tmp_path / "anna.csv", rows), TWO, seed=3).partial
    assert "anna.csv: a row: is missing" in told


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a,b\n1,2\n", r"row 1 must have the columns comparison, letter, .*it has 'a,b'"),
        (b"", "row 1 must have the columns"),
        (b"\xff\xfec\x00", "is not UTF-8; save the sheet as CSV in UTF-8"),
        (b'comparison,letter,prompt,completion,rank\n"a"b,A,,,1\n', "line 2: .*save the sheet as CSV once more"),
    ],
)
def test_a_file_that_is_no_sheet_is_told(tmp_path, content, said):
    path = tmp_path / "anna.csv"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=said):
        read_rankings(path, TWO, seed=3)


def test_a_json_row_without_a_column_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"comparison": "r1-1", "letter": "A", "prompt": "x", "completion": "y"}\n')
    with pytest.raises(RecordError, match=r"a\.jsonl: row 1, column rank: is missing"):
        read_rankings(tmp_path / "a.jsonl", TWO, seed=3)


def test_a_prompt_with_more_completions_than_letters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'x' has 27 completions; a sheet has 26 letters"):
        write_sheet(tmp_path, [comparison("x", *map(str, range(27)))], 0)


def rankings(tmp_path, name: str, **changes: str):
    rows = table(ranked(tmp_path))
    for row in rows:
        row["rank"] = changes.get(row["completion"], row["rank"])
    return read_rankings(save(tmp_path / f"{name}.csv", rows), TWO, seed=3)


def test_labelers_are_merged_by_mean_rank_and_their_agreement_is_counted(tmp_path):
    anna = rankings(tmp_path, "anna")  # good < bad < ugly
    ben = rankings(tmp_path, "ben", good="2", bad="2", ugly="1")  # ugly < good = bad
    # good-bad: order against tie, 1/2; good-ugly and bad-ugly: opposite, 0; the second comparison: both tie, 1
    assert agreement_credit([anna, ben]) == [(0.5, 3), (1.0, 1)]
    merged = merge_rankings(TWO, [anna, ben])
    # means: good (0 + 1) / 2, bad (1 + 1) / 2, ugly (2 + 0) / 2
    assert merged[0].ranks == (0, 1, 1)
    assert {one.labeler for one in merged} == {"anna+ben"}
    assert agreement_credit([anna]) == []
