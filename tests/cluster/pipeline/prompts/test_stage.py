"""The files that `rayward prompts` writes, and its account of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.prompts import read_demonstrations, read_prompts
from cluster.pipeline.prompts.stage import Prompts
from cluster.pipeline.stage import preflight
from cluster.rundir.record import ResumeRefused
from tests.stage_runs import made_of, make_job, rows, run_stage

FILES = ("demonstrations", "demonstration_prompts", "preference_prompts", "prompts", "prompts_valid", "prompts_heldout")
CASES = ("chat", "extract", "rewrite")


def _raw(tmp_path: Path) -> Path:
    """60 users of three prompts each, half of them with a reply; a repeat, a bad row, and one user with too many."""
    many = [
        {"prompt": f"{u} asks {n}", "user": f"u{u}", "use_case": CASES[u % 3]} | ({"reference": "r"} if u % 2 else {})
        for u in range(60)
        for n in range(3)
    ]
    more = [{"prompt": f"one more {n}", "user": "u0"} for n in range(4)]
    return rows(tmp_path / "raw.jsonl", *many, *more, {"prompt": "5  asks 1", "use_case": "chat"}, {"prompt": 3})


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def job(tmp_path: Path):
    shares = {"demonstration_share": 0.3, "preference_share": 0.2, "valid_share": 0.1, "heldout_share": 0.1}
    data = {"prompts_raw": _raw(tmp_path), "max_bad_rows": 1}
    return make_job(tmp_path / "run", data=data, prompts={"per_user": 5, **shares})


def test_the_files_are_those_that_the_other_steps_find_and_the_account_adds_up(job: Any, capsys: Any):
    run_stage(Prompts(job))
    found = {name: _read(job.run_dir / "data" / f"{name}.jsonl") for name in FILES}
    assert all(found.values())
    users = [{row["user"] for row in found[name]} for name in FILES]
    for_sft = users[0] | users[1]
    assert sum(map(len, (for_sft, *users[2:]))) == 60 == len(for_sft.union(*users[2:]))
    for name in FILES[2:]:
        prompts = read_prompts(job.file(name))
        assert [(one.id, one.user, one.use_case) for one in prompts] == [
            (row["id"], row["user"], row.get("use_case")) for row in found[name]
        ]
    assert [one.response for one in read_demonstrations(job.file("demonstrations"))] == ["r"] * len(found[FILES[0]])
    assert not any("reference" in row or "response" in row for row in found["demonstration_prompts"])

    told = json.loads((job.run_dir / "prompts.json").read_text())
    dropped = _read(job.run_dir / "data" / "prompts-dropped.jsonl")
    source = job.config.data.prompts_raw
    assert told["read"] == 186 == told["kept"] + sum(told["dropped"].values())
    assert told["dropped"] == {"equal prompt": 1, "shared prefix": 0, "limit of a user": 2, "bad row": 1}
    assert {name: one["prompts"] for name, one in told["files"].items()} == {n: len(found[n]) for n in FILES}
    assert {name: one["users"] for name, one in told["files"].items()} == dict(zip(FILES, map(len, users), strict=True))
    assert sum(sum(one.values()) for one in told["use_cases"].values()) == 181
    assert {case: sum(row.get("use_case") == case for row in found["prompts"]) for case in CASES} == {
        case: told["use_cases"][case]["prompts"] for case in CASES
    }
    assert dropped[-2:] == [
        {"at": f"{source}:185", "reason": "equal prompt", "detail": "as 'row-17', line 17", "id": "row-185"},
        {"at": f"{source}:186", "reason": "bad row", "detail": dropped[-1]["detail"]},
    ]
    assert '"prompt" must be' in dropped[-1]["detail"]
    assert made_of(job)["data/prompts.jsonl"] == [str(source)]
    shown = capsys.readouterr()
    assert "dropped: limit of a user" in shown.out + shown.err
    assert "use case" in shown.out + shown.err


def test_files_that_were_made_elsewhere_are_not_replaced_unless_told_and_another_seed_is_another_stage(job: Any):
    theirs = rows(job.run_dir / "data" / "prompts_valid.jsonl", {"prompt": "mine"})
    with pytest.raises(ValueError, match=r"prompts_valid\.jsonl is there already.*--restart replaces it"):
        preflight(Prompts(job))
    assert _read(theirs) == [{"prompt": "mine"}]
    prompts = job.config.prompts.model_copy(update={"valid_share": 0.0})
    run_stage(Prompts(replace(job, start="restart", config=job.config.model_copy(update={"prompts": prompts}))))
    assert not theirs.exists(), "no share of the users is for it"
    with pytest.raises(ResumeRefused, match=r"prompts\.valid_share"):
        preflight(Prompts(job))


def test_nothing_is_written_of_a_file_with_more_bad_rows_than_may_be_skipped(tmp_path: Path):
    one = make_job(tmp_path / "run", data={"prompts_raw": _raw(tmp_path)})
    with pytest.raises(ValueError, match=r'raw\.jsonl:186: "prompt" must be'):
        run_stage(Prompts(one))
    assert not (one.run_dir / "data").exists()
