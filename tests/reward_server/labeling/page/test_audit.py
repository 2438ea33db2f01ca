import json
from pathlib import Path

import pytest

from reward_server.labeling.page.audit import Audit


def test_lines_are_added_without_secrets_and_control_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_TOKEN", "a-secret-value")
    for number in range(2):
        Audit(tmp_path / "deep" / "audit.jsonl").note(
            "refused", "127.0.0.1", by=None, why=f"{number} a-secret-value\r\n{'x' * 999}"
        )
    lines = [json.loads(line) for line in (tmp_path / "deep" / "audit.jsonl").read_text().splitlines()]
    assert [line["why"][:22] for line in lines] == ["0 [SOME_TOKEN]\\r\nxxxxx", "1 [SOME_TOKEN]\\r\nxxxxx"]
    assert [(line["event"], line["by"], len(line["why"])) for line in lines] == [("refused", None, 300)] * 2


def test_a_disk_that_takes_no_line_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").touch()
    Audit(tmp_path / "file" / "audit.jsonl").note("signed in", "127.0.0.1", by="p1")
    assert "a line of the audit log was not written" in caplog.text
