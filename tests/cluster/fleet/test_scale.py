"""Asking a run for another number of generators, from another thread as from another process."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any, cast

import pytest

import cluster.fleet.scale
from cluster.cli import main as cli
from cluster.fleet.scale import obeying


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.fleet.scale, "LOOK_S", 0.02)
    monkeypatch.setattr(cluster.fleet.scale, "ANSWER_S", 0.5)


class Fleet:
    wanted = 2

    def scale(self, wanted: int) -> None:
        if wanted > 4:
            raise ValueError(f"{wanted} generators do not fit: the cluster has 4 GPUs")
        self.wanted = wanted


class Run:
    """A run at work in a directory, in a thread of its own."""

    def __init__(self, run_dir: Path) -> None:
        self.fleet, self.run_dir = Fleet(), run_dir
        self._ended, self._began = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work()))

    async def _work(self) -> None:
        async with obeying(cast(Any, self.fleet), self.run_dir):
            self._began.set()
            while not self._ended.is_set():
                await asyncio.sleep(0.01)

    def __enter__(self) -> "Run":
        self._thread.start()
        assert self._began.wait(5)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def test_a_run_takes_the_number_and_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Run(tmp_path) as run:
        assert cli.main(["scale", str(tmp_path), "3"]) == 0
        assert run.fleet.wanted == 3
        assert cli.main(["scale", str(tmp_path), "1"]) == 0
        assert run.fleet.wanted == 1
    said = [line for line in capfd.readouterr().out.splitlines() if not line.startswith("warning")]  # the run's
    assert said == [
        "from 2 to 3 generators; newcomers take part from the next version on",
        "from 3 to 1 generators; who leaves finishes its work",
    ]
    assert list(tmp_path.glob("*scale*")) == []


def test_a_refusal_comes_back_with_its_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Run(tmp_path) as run:
        assert cli.main(["scale", str(tmp_path), "5"]) == 1
        assert run.fleet.wanted == 2
    assert f"the run in {tmp_path} refuses: 5 generators do not fit: the cluster has 4 GPUs" in capfd.readouterr().err


def test_where_no_run_works_the_request_is_withdrawn(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scale", str(tmp_path), "3"]) == 1
    assert "nobody answered within 0.5 s: no run is at work in step 3" in capfd.readouterr().err
    assert not (tmp_path / "scale.json").exists()


def test_a_request_from_before_the_run_and_a_broken_file_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "scale.json"
    file.write_text(json.dumps({"id": "old", "generators": 4}))
    with Run(tmp_path) as run:
        for text in ("{", "[]", '{"id": "x", "generators": "4"}'):
            file.write_text(text)
            threading.Event().wait(0.1)
        assert run.fleet.wanted == 2


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["scale", "RUN"], 2, "Missing from rayward scale: N"),
        (["scale", "RUN", "3", "4"], 2, "Unrecognized options: 4"),
        (["scale", "RUN", "0"], 1, "'0' generators cannot be asked for: give a number from 1 on"),
        (["scale", "RUN", "-1"], 1, "'-1' generators cannot be asked for"),
        (["scale", "RUN", "many"], 1, "'many' generators cannot be asked for"),
    ],
)
def test_wrong_words(words: list[str], code: int, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(tmp_path) if word == "RUN" else word for word in words]) == code
    assert said in capfd.readouterr().err
