"""Inviting, revoking, handing rankings to other tools and back: beside whoever works in the run directory."""

import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.main import main
from cluster.cli.parser import load, parse
from cluster.config.load import to_toml
from cluster.config.schema import Config
from cluster.rundir.lock import owned
from reward_server.labeling.people import People
from reward_server.preferences.labeling import read_comparisons
from tests.stage_runs import rows


@pytest.fixture
def run(tmp_path) -> Path:
    completions = [{"text": text} for text in ("one", "two", "three")]
    row: dict[str, Any] = {"prompt": "count", "completions": completions}
    rows(tmp_path / "run" / "data" / "completions.jsonl", row | {"id": "c1"}, row | {"id": "c2"})
    return tmp_path / "run"


def label(run: Path, *words: str) -> int:
    return main(["label", "--run", str(run), *words])


def test_an_invitation_prints_a_link_once_also_while_another_command_works_there(run, capfd):
    with owned(run, "rounds"):
        assert label(run, "--invite", "Anna Ek") == 0
    told = capfd.readouterr().out
    found = re.search(r"^http://127\.0\.0\.1:8701/#(\S{43})$", told, re.MULTILINE)
    assert found
    assert "Anna Ek is labeler p1." in told
    file = run / "labeling" / "people.json"
    assert People(file).who(found[1]) == People(file).labelers[0]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert all(found[1] not in path.read_text() for path in run.rglob("*") if path.is_file())
    assert not (run / "config.toml").exists()
    assert not (run / "environment.json").exists()


def test_an_admin_is_sent_to_the_page_of_admins_and_links_begin_with_the_address_that_people_use(run, capfd):
    assert label(run, "--invite", "Boss", "--invite_admin", "--label.url", "https://label.example.org/") == 0
    assert re.search(r"^https://label\.example\.org/admin#\S{43}$", capfd.readouterr().out, re.MULTILINE)
    assert People(run / "labeling" / "people.json").labelers == []


def test_a_link_leads_to_this_machine_where_the_page_listens_on_all_addresses(run, capfd, monkeypatch):
    monkeypatch.setenv("RAYWARD_ADDRESS", "192.0.2.7")
    assert label(run, "--invite", "Anna", "--label.host", "0.0.0.0", "--label.port", "9000") == 0
    assert "\nhttp://192.0.2.7:9000/#" in capfd.readouterr().out


def test_who_is_revoked_cannot_sign_in(run, capfd):
    label(run, "--invite", "Anna")
    token = capfd.readouterr().out.strip().rpartition("#")[2]
    assert label(run, "--revoke", "p1") == 0
    assert "Anna (p1) can no longer sign in" in capfd.readouterr().out
    assert People(run / "labeling" / "people.json").who(token) is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--invite", "Anna", "--revoke", "Ben"), "--invite and --revoke are two commands"),
        (("--invite_admin",), "--invite_admin says what --invite NAME makes of NAME"),
        (("--invite", "p1"), "'p1' is no name"),
        (("--revoke", "Ben"), "'Ben' is not invited: there are none"),
        (("--invite", "Anna", "--port", "0"), "label.port = 0 takes a port that no link can name"),
        (("--export_to", "excel:sheet.xls"), "label.export_to = 'excel:sheet.xls' is not FORMAT:PATH"),
        (("--import_from", "potato:"), "label.import_from = 'potato:' is not FORMAT:PATH"),
    ],
)
def test_what_cannot_be_done_is_told_and_nothing_is_written(run, capfd, words, told):
    assert label(run, *words) == 2
    seen = capfd.readouterr()
    assert told in seen.out + seen.err
    assert not (run / "labeling" / "people.json").exists()


def test_a_run_directory_that_is_not_there_is_not_made(tmp_path, capfd):
    assert label(tmp_path / "typo", "--invite", "Anna") == 2
    assert "typo does not exist" in capfd.readouterr().err
    assert not (tmp_path / "typo").exists()


def test_commands_are_never_saved_and_no_other_command_carries_them_out(run, capfd):
    given = parse_label(["--run", "r", "--invite", "Anna", "--label.export_to", "potato:x", "--overlap", "2"])
    assert given.label.invite == "Anna"
    assert given.label.overlap == 2
    saved = to_toml(given)
    assert "Anna" not in saved
    assert "potato" not in saved
    assert main(["rounds", "--run", str(run), "--label.invite", "Anna"]) == 2
    assert "label.invite is for `rayward label`" in capfd.readouterr().err


def parse_label(words: list[str]) -> Config:
    from cluster.cli.commands import COMMANDS

    return load(Config, parse(COMMANDS["label"], words))


def test_completions_go_out_and_rankings_of_another_tool_come_back(run, tmp_path, capfd):
    out, back = tmp_path / "out.parquet", tmp_path / "back.parquet"
    assert label(run, "--export_to", f"parquet:{out}") == 0
    assert f"0 rankings and 2 comparisons without one are in {out}" in capfd.readouterr().out
    import pyarrow.parquet as parquet

    table = parquet.read_table(out).to_pylist()
    ranks = {"c1": [0, 1, 1], "c2": [2, 0, 1]}
    ranked = [row | {"ranks": ranks[row["id"]], "labeler": "p1"} for row in table]
    parquet.write_table(parquet.ParquetFile(out).read().from_pylist(ranked), back)
    assert label(run, "--import_from", f"parquet:{back}", "--tracking.mode", "disabled") == 0
    found = read_comparisons(run / "data" / "comparisons.jsonl")
    assert {one.id.removesuffix(":p1"): one.ranks for one in found} == {"c1": (0, 1, 1), "c2": (2, 0, 1)}
    assert json.loads((run / "summary.json").read_text())["rankings"] == "people (p1)"
    made = json.loads((run / "lineage.jsonl").read_text().splitlines()[-1])
    assert made["path"] == "data/comparisons.jsonl"
    assert [one["path"] for one in made["inputs"]] == ["data/completions.jsonl", str(back)]
    assert "import_from" not in (run / "config.toml").read_text()
