import json
from pathlib import Path

import pytest

from cluster.cli import main as cli
from cluster.config.schema import Config
from cluster.doctor import machine, services
from cluster.doctor.doctor import diagnose
from cluster.doctor.finding import Finding


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_reaches", lambda host: False)
    monkeypatch.setattr(services, "loopback", lambda: [Finding("loopback", "answers")])
    monkeypatch.setattr(services, "secrets", list)


def test_the_exit_code_says_whether_something_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr(machine, "memory", lambda: Finding("memory", "9.0 GiB free", "end what uses it", "warn"))
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True
    assert Finding(**next(one for one in found["findings"] if one["what"] == "memory")).state == "warn"
    monkeypatch.setattr(
        services, "loopback", lambda: [Finding("loopback", "no connection", "ip link set lo up", "fail")]
    )
    assert cli.main(["doctor", "--run", str(tmp_path / "run")]) == 1
    lines = [line.split(None, 2) for line in capsys.readouterr().out.splitlines()]
    where = lines.index(["fail", "loopback", "no connection"])
    assert lines[where + 1] == ["ip", "link", "set lo up"]
    assert not (tmp_path / "run").exists()


def test_the_disk_is_that_of_the_first_folder_that_exists(tmp_path: Path):
    (found,) = (one for one in diagnose(Config(), tmp_path / "a" / "b") if one.what == "disk of the run directory")
    assert found.says.endswith(f"GiB free in {tmp_path}")
