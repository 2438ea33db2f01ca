import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet
import pytest
from hypothesis import given, settings

from reward_server.preferences.exchange import FORMATS, read, write
from reward_server.preferences.labeling import Comparison, read_comparisons
from reward_server.preferences.records import RecordError
from reward_server.preferences.sheets import response_letters
from reward_server.schema import Message
from tests.comparisons import ranked_comparisons

ITEM = Comparison(
    id="7",
    prompt=(Message(role="system", content="Be brief."), Message(role="user", content="Tell me a story.")),
    responses=("one", "two", "three", "four"),
    ended=(True, True, False, True),
    ranks=None,
    labeler=None,
    use_case="generation",
)
LETTERS = response_letters(ITEM, 0)
# The letters of the four completions, whichever they are.
ONE, TWO, THREE, FOUR = sorted(LETTERS, key=LETTERS.__getitem__)
PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me a story."}]


def name(letter: str) -> str:
    return f"response-{letter.lower()}"


def ranking(*best_first: str, user: str = "3d4f1c9e-5a0b-4f43-9f0e-2f2a54a7a1f5") -> dict[str, Any]:
    return {"value": [name(letter) for letter in best_first], "user_id": user}


def argilla(*answers: dict[str, Any]) -> dict[str, Any]:
    """A record as Argilla 2's `dataset.records.to_json` writes it."""
    texts = {ONE: "one", TWO: "two", THREE: "three", FOUR: "four"}
    return {
        "id": "7",
        "fields": {"prompt": PROMPT, **{name(letter): text for letter, text in texts.items()}},
        "metadata": {},
        "suggestions": {},
        "responses": {"ranking": list(answers), "comment": [{"value": "hm", "user_id": "somebody"}]},
        "vectors": {},
        "_server_id": "0b0c6b4e-0f0e-4b7c-a6c5-6f7b1a1f3d11",
    }


def studio(*answers: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    """A task as Label Studio 1 exports it as JSON; answers are (completed_by, value of the ranker)."""
    texts = {ONE: "one", TWO: "two", THREE: "three", FOUR: "four"}
    items = [{"id": letter, "title": letter, "body": texts[letter]} for letter in LETTERS]
    return {
        "id": 41,
        "annotations": [
            {
                "id": 100 + number,
                "completed_by": user,
                "result": [
                    {
                        "value": {"ranker": value},
                        "id": "Dx_aB91ISN",
                        "from_name": "rank",
                        "to_name": "responses",
                        "type": "ranker",
                        "origin": "manual",
                    }
                ],
                "was_cancelled": False,
                "ground_truth": False,
                "created_at": "2026-03-09T22:16:08.728353Z",
                "updated_at": "2026-03-09T22:16:08.746926Z",
                "lead_time": 12.5,
                "prediction": {},
                "result_count": 1,
                "task": 41,
                **more,
            }
            for number, (user, value) in enumerate(answers)
        ],
        "file_upload": "tasks.json",
        "drafts": [],
        "predictions": [],
        "data": {"comparison": "7", "prompt": PROMPT, "items": items},
        "meta": {},
        "created_at": "2026-03-09T21:52:49.513742Z",
        "updated_at": "2026-03-09T22:16:08.746926Z",
        "project": 83,
    }


def potato(order: str, user: str = "anna@example.org") -> dict[str, Any]:
    """A row of the annotations.jsonl of Potato 2."""
    return {
        "instance_id": "7",
        "user_id": user,
        "labels": {"ranking": {"rank_order": order}, "comment": {"text_box": "hm"}},
        "spans": {},
        "links": {},
    }


def saved(folder: Path, rows: list[dict[str, Any]], name: str = "export.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_argilla_records_are_read(tmp_path: Path) -> None:
    path = saved(tmp_path, [argilla(ranking(TWO, ONE, FOUR, THREE), ranking(ONE, TWO, THREE, FOUR, user="bob"))])
    first, second = read("argilla", path, [ITEM])
    assert first == replace(ITEM, id="7:p1", labeler="p1", ranks=(1, 0, 3, 2))
    assert second == replace(ITEM, id="7:p2", labeler="p2", ranks=(0, 1, 2, 3))


def test_ranks_of_argillas_server_may_be_ties_and_drafts_do_not_count(tmp_path: Path) -> None:
    values = [{"value": name(letter), "rank": rank} for letter, rank in ((FOUR, 1), (ONE, 2), (TWO, 2), (THREE, 3))]
    submitted = {"value": values, "user_id": "bob", "status": "submitted"}
    draft = ranking(ONE, user="eve") | {"status": "draft"}
    (one,) = read("argilla", saved(tmp_path, [argilla(draft, submitted)], "export.jsonl"), [ITEM])
    assert (one.ranks, one.labeler) == ((1, 1, 2, 0), "p1")


def test_label_studio_exports_are_read(tmp_path: Path) -> None:
    buckets = {"1": [FOUR], "2": [TWO, ONE], "3": [], "10": [THREE], "_": []}
    answers = [(5, [THREE, TWO, ONE, FOUR]), ({"id": 6, "email": "bob@example.org"}, buckets)]
    first, second = read("label-studio", saved(tmp_path, [studio(*answers)]), [ITEM], taken=["p4"])
    assert first == replace(ITEM, id="7:p5", labeler="p5", ranks=(2, 1, 0, 3), seconds=12.5)
    assert second == replace(ITEM, id="7:p6", labeler="p6", ranks=(1, 1, 2, 0), seconds=12.5)
    skipped = studio((5, [THREE, TWO, ONE, FOUR]), was_cancelled=True)
    with pytest.raises(RecordError, match="nobody ranked anything in it"):
        read("label-studio", saved(tmp_path, [skipped]), [ITEM])


def test_potatos_rows_are_read_of_one_file_and_of_a_folder_of_users(tmp_path: Path) -> None:
    (one,) = read("potato", saved(tmp_path, [potato(f"{TWO},{FOUR}={ONE},{THREE}")], "annotations.jsonl"), [ITEM])
    assert one == replace(ITEM, id="7:p1", labeler="p1", ranks=(1, 0, 2, 1))
    for user, order in (("anna", f"{ONE},{TWO},{THREE},{FOUR}"), ("bob", f"{FOUR}, {THREE}, {TWO}, {ONE}")):
        (tmp_path / user).mkdir()
        row = {
            "id": "7",
            "displayed_text": "system: Be brief.<br/>",
            "label_annotations": {"ranking": {"rank_order": order}},
            "span_annotations": {},
            "behavioral_data": {"time_string": "Time spent: 0d 0h 0m 41s "},
        }
        saved(tmp_path / user, [row], "annotated_instances.jsonl")
    assert [(one.labeler, one.ranks) for one in read("potato", tmp_path, [ITEM])] == [
        ("p1", (0, 1, 2, 3)),
        ("p2", (3, 2, 1, 0)),
    ]


@settings(deadline=None, max_examples=40)
@given(ranked_comparisons())
def test_what_is_written_is_read_back(before: list[Comparison]) -> None:
    for form in FORMATS:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "export"
            write(form, path, before)
            # A tool knows ranks and who gave them; only Label Studio has the time.
            told = {} if form == "parquet" else dict.fromkeys(("qualities", "flags", "guidelines", "page", "seconds"))
            timed = form == "label-studio"
            expected = [replace(one, **(told | {"seconds": one.seconds} if timed else told)) for one in before]
            assert read(form, path, before) == expected
            assert read(form, path, [replace(one, ranks=None) for one in before]) == expected
            assert [file.name for file in Path(folder).iterdir()] == ["export"]


@pytest.mark.parametrize("form", FORMATS)
def test_names_become_ids_in_all_that_is_written(tmp_path: Path, form: str) -> None:
    by = [
        replace(ITEM, id="7:Anna Doe", labeler="Anna Doe", ranks=(0, 1, 2, 3)),
        replace(ITEM, id="7:p3", labeler="p3", ranks=(0, 0, 0, 1)),
        replace(ITEM, id="7:Bob", labeler="Bob", ranks=(3, 2, 1, 0)),
    ]
    write(form, tmp_path / "export", by)
    content = (tmp_path / "export").read_bytes()
    assert b"Anna" not in content
    assert b"Bob" not in content
    found = {one.labeler: one.ranks for one in read(form, tmp_path / "export", [ITEM])}
    assert found == {"p4": (0, 1, 2, 3), "p3": (0, 0, 0, 1), "p5": (3, 2, 1, 0)}


def test_programs_are_no_people(tmp_path: Path) -> None:
    ranked = replace(ITEM, labeler="simulated:vader", ranks=(0, 1, 2, 3))
    write("potato", tmp_path / "export", [ranked])
    (one,) = read("potato", tmp_path / "export", [ranked])
    assert (one.id, one.labeler) == ("7:simulated:vader", "simulated:vader")


def test_what_nobody_ranked_is_written_to_be_labeled(tmp_path: Path) -> None:
    for form in ("argilla", "label-studio", "potato"):
        write(form, tmp_path / form, [ITEM])
        with pytest.raises(RecordError, match=f"{form}: nobody ranked anything in it"):
            read(form, tmp_path / form, [ITEM])
    (record,) = json.loads((tmp_path / "argilla").read_text())
    assert (record["id"], record["fields"]["prompt"], record["responses"]) == ("7", PROMPT, {})
    assert record["fields"][name(TWO)] == "two"
    (task,) = json.loads((tmp_path / "label-studio").read_text())
    assert task.keys() == {"data"}
    assert {item["id"]: item["body"] for item in task["data"]["items"]}[THREE] == "three"
    row = json.loads((tmp_path / "potato").read_text())
    assert (row["id"], f"{FOUR}: four" in row["text"], "user: Tell me a story." in row["text"]) == ("7", True, True)


def test_parquet_has_a_row_a_comparison_that_data_comparisons_reads(tmp_path: Path) -> None:
    ranked = replace(ITEM, id="7:p1", labeler="p1", ranks=(0, 1, 1, 2), qualities=(7, None, 3, 1), control=True)
    path = tmp_path / "comparisons.parquet"
    write("parquet", path, [ranked])
    assert read_comparisons(path) == [ranked]
    (row,) = pyarrow.parquet.read_table(path).to_pylist()
    assert row["completions"][2] == {"text": "three", "ended": False}
    assert (row["ranks"], row["qualities"], row["guidelines"]) == ([0, 1, 1, 2], [7, None, 3, 1], None)


ALL = (ONE, TWO, THREE, FOUR)


@pytest.mark.parametrize(
    ("form", "rows", "said"),
    [
        ("argilla", [argilla(ranking(*ALL)) | {"id": "8"}], ":1: item '8' is none of the 1 comparisons"),
        ("argilla", [argilla(), argilla(ranking(ONE, TWO))], ":2: item '7' has 2 of 4 completions ranked: rank all"),
        ("argilla", [argilla(ranking(*ALL, "Z"))], ":1: 'Z' is ranked in item '7', whose completions are A, B, C, D"),
        ("argilla", [argilla(ranking(ONE, ONE, TWO, THREE))], f":1: '{ONE}' is ranked in item '7'"),
        ("argilla", [argilla(ranking(*ALL), ranking(*ALL))], ":1: the same labeler ranked item '7' in "),
        ("argilla", [argilla(ranking(*ALL)) | {"fields": {"prompt": PROMPT}}], "is missing or was changed"),
        ("argilla", [{"id": "7", "prompt": "p"}], ':1: "fields" must be an object, not None'),
        ("argilla", [argilla({"value": [*map(name, ALL)]})], ":1: an answer is by None, which is no user"),
        ("argilla", [argilla({"value": [{"value": name(ONE), "rank": None}], "user_id": "u"})], "ranks that are no"),
        ("label-studio", [studio((5, [ONE, TWO, THREE]))], ":1: item '7' has 3 of 4 completions ranked"),
        ("label-studio", [studio((5, {"1": [*ALL[:3]], "_": [FOUR]}))], ":1: item '7' has 3 of 4 completions ranked"),
        ("label-studio", [studio((5, {"best": [*ALL]}))], ":1: the bucket 'best' is no rank; name the buckets"),
        ("label-studio", [studio((5, 3))], ':1: "ranker" must be a list or buckets, not 3'),
        ("label-studio", [studio((5, [*ALL])), studio((5, [*ALL]))], ":2: the same labeler ranked item '7' in "),
        ("label-studio", [studio((None, [*ALL]))], ":1: an answer is by None, which is no user"),
        ("potato", [potato(",".join(ALL)) | {"instance_id": "9"}], ":1: item '9' is none of the 1 comparisons"),
        ("potato", [potato("A,B=Q")], ":1: 'Q' is ranked in item '7'"),
        ("potato", [potato(f"{ONE},{TWO}")], ":1: item '7' has 2 of 4 completions ranked"),
    ],
)
def test_a_bad_row_is_told_with_file_and_row(tmp_path: Path, form: str, rows: list[Any], said: str) -> None:
    path = saved(tmp_path, rows, "export.jsonl" if form == "potato" else "export.json")
    with pytest.raises(RecordError) as caught:
        read(form, path, [ITEM])
    assert str(caught.value).startswith(f"{path}:")
    assert said in str(caught.value)


def test_a_changed_text_is_refused(tmp_path: Path) -> None:
    ranked = replace(ITEM, id="7:p1", labeler="p1", ranks=(0, 1, 2, 3))
    for form in ("argilla", "label-studio", "parquet"):
        write(form, tmp_path / form, [replace(ranked, responses=("one", "2", "three", "four"))])
        with pytest.raises(RecordError, match=rf"{form}:1: .*(was changed|has other texts)"):
            read(form, tmp_path / form, [ITEM])


def test_all_bad_rows_are_told_and_twenty_are_shown(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r":20: .*\nand 5 more$"):
        read("potato", saved(tmp_path, [potato("A")] * 25, "annotations.jsonl"), [ITEM])


def test_what_cannot_be_written_is_refused_before_there_is_a_file(tmp_path: Path) -> None:
    ranked = replace(ITEM, labeler="p1", ranks=(0, 1, 2, 3))
    with pytest.raises(ValueError, match="'brat' is no format; there are argilla, label-studio, potato, parquet"):
        write("brat", tmp_path / "out", [ranked])
    with pytest.raises(ValueError, match="p1 ranked comparison '7' twice"):
        write("parquet", tmp_path / "out", [ranked, replace(ranked, id="7:p1")])
    with pytest.raises(ValueError, match="comparison '7' has other texts than in another row"):
        write("argilla", tmp_path / "out", [ranked, replace(ITEM, responses=("1", "2", "3", "4"))])
    assert not list(tmp_path.iterdir())
