"""Stages: which begin, which go on, and which are refused with what is different."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.rundir.record import ResumeRefused, StageRecord, Start, clear, made_of


def stage(run: Path, start: Start, **changes: Any) -> StageRecord:
    data = run / "prompts.jsonl"
    if not data.exists():
        data.write_text("one\n")
    settings = {"ppo": {"clip": 0.2, "kl": {"coef": 0.02, "target": None} | changes}}
    return StageRecord(
        run_dir=run,
        name="ppo",
        start=start,
        made_of=lambda: made_of(settings, {"data.prompts": data, "models.base": "hub/id"}),
        results=(run / "policy",),
        traces=(run / "ledger-ppo.jsonl",),
        reach={"iterations": 4},
    )


def test_what_a_stage_is_made_of_has_dotted_keys_and_contents(tmp_path: Path):
    made = stage(tmp_path, "new").made_of()
    assert made["ppo.kl.coef"] == 0.02
    assert made["models.base"] == "hub/id"
    assert made["data.prompts"].startswith("sha256:")
    (tmp_path / "prompts.jsonl").write_text("two\n")
    assert stage(tmp_path, "new").made_of()["data.prompts"] != made["data.prompts"]


def test_a_stage_is_new_then_begun_then_complete(tmp_path: Path):
    assert stage(tmp_path, "resume").progress == "new"
    stage(tmp_path, "new").begin()
    assert stage(tmp_path, "resume").progress == "begun"
    assert stage(tmp_path, "restart").progress == "new"
    (tmp_path / "policy").mkdir()
    stage(tmp_path, "resume").finish({"iterations": 3})
    assert stage(tmp_path, "resume").progress == "begun"  # it has to become longer
    stage(tmp_path, "resume").finish({"iterations": 4})
    assert stage(tmp_path, "resume").progress == "complete"
    (tmp_path / "policy").rmdir()
    assert stage(tmp_path, "resume").progress == "begun"  # what it made is gone


def test_only_a_stage_that_can_become_longer_keeps_its_traces(tmp_path: Path):
    for reach, kept in (({"iterations": 4}, True), ({}, False)):
        record = replace(stage(tmp_path, "resume"), reach=reach)
        record.begin()
        (trace,) = record.traces
        trace.write_text("")
        record.finish({"iterations": 4})
        assert trace.exists() == kept


def test_how_often_a_stage_is_saved_and_the_budget_of_a_pass_may_change(tmp_path: Path):
    free = {"checkpoint_every": 5, "checkpoints_kept": 1, "max_tokens_per_microbatch": 64}
    stage(tmp_path, "new", **dict.fromkeys(free, 9)).begin()
    assert stage(tmp_path, "resume", **free).progress == "begun"
    assert stage(tmp_path, "resume").progress == "begun"


@pytest.mark.parametrize(("complete", "said"), [(False, "goes on with it"), (True, "leaves it as it is")])
def test_without_a_flag_what_is_there_is_refused_with_the_ways_out(tmp_path: Path, complete: bool, said: str):
    (tmp_path / "policy").mkdir()
    first = stage(tmp_path, "new")
    first.begin()
    if complete:
        first.finish({})
    with pytest.raises(ResumeRefused, match=rf"'ppo' that is \w+\. Remedy: --resume {said}, --restart .* --run DIR"):
        _ = stage(tmp_path, "new").progress


def test_a_stage_of_other_settings_and_data_is_refused_with_what_is_different(tmp_path: Path):
    stage(tmp_path, "new").begin()
    (tmp_path / "prompts.jsonl").write_text("two\n")
    with pytest.raises(ResumeRefused) as refused:
        _ = stage(tmp_path, "resume", coef=0.1, target=5).progress
    said = str(refused.value)
    assert "ppo.kl.coef was 0.02, is 0.1; ppo.kl.target was null, is 5; data.prompts has other content now" in said
    assert "ppo.clip" not in said
    assert stage(tmp_path, "restart", coef=0.1).progress == "new"


def test_a_ledger_without_a_record_is_not_touched(tmp_path: Path):
    (tmp_path / "ledger-ppo.jsonl").write_text("")
    for start in ("new", "resume"):
        with pytest.raises(ResumeRefused, match=r"--restart starts it over"):
            _ = stage(tmp_path, start).progress
    assert stage(tmp_path, "restart").progress == "new"


def test_a_command_of_all_stages_is_refused_where_there_are_any(tmp_path: Path):
    clear(tmp_path, "new")
    stage(tmp_path, "new").begin()
    (tmp_path / "ledger-ppo.jsonl").write_text("")
    with pytest.raises(ResumeRefused, match=r"holds a run already \(ppo\)"):
        clear(tmp_path, "new")
    clear(tmp_path, "resume")
    assert stage(tmp_path, "resume").progress == "begun"
    clear(tmp_path, "restart")
    assert stage(tmp_path, "new").progress == "new"


def test_a_path_that_was_kept_as_it_was_given_is_the_same_where_it_is_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    parts = [{"name": "mine", "target": "./rm"}]
    (tmp_path / "here" / "rm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    stage(tmp_path, "new", parts=parts).begin()
    now = [{"name": "mine", "target": str(tmp_path / "here" / "rm")}]
    assert stage(tmp_path, "resume", parts=now).progress == "begun"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ResumeRefused, match=r"ppo\.kl\.parts was"):
        _ = stage(tmp_path, "resume", parts=now).progress


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[]", b'{"made_of": 1, "complete": true}', b'{"complete": true}']
)
def test_a_damaged_record_is_named(tmp_path: Path, content: bytes):
    stage(tmp_path, "new").begin()
    (tmp_path / "stages" / "ppo.json").write_bytes(content)
    with pytest.raises(
        ResumeRefused, match=r"stages/ppo\.json is damaged \(.*Remedy: put an intact copy there, or --restart"
    ):
        _ = stage(tmp_path, "resume").progress
    assert stage(tmp_path, "restart").begin()
