from pathlib import Path

import pytest

from actors.evaluation.tasks import TASKS, data_file
from reward_server.preferences.records import RecordError


def test_the_tasks_are_in_the_order_of_the_paper() -> None:
    assert list(TASKS) == [
        *("hellaswag", "squad", "drop", "translation", "bits_per_byte"),
        *("truthfulqa", "truthfulqa_generation", "hallucination"),
        *("toxicity", "winogender", "crows_pairs"),
    ]
    assert {task.claim for task in TASKS.values()} == {
        *("alignment tax", "truthfulness", "hallucination", "toxicity", "bias")
    }


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_no_file_and_a_file_of_something_else_are_told(task: type, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="there is no such file"):
        task.read(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RecordError, match="the file is empty"):
        task.read(tmp_path / "empty.jsonl")
    (tmp_path / "other.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(RecordError, match=r"other.jsonl:1: .*(missing|must)"):
        task.read(tmp_path / "other.jsonl")


def test_files_of_the_hub_are_fetched_by_their_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fetched: list[object] = []

    def download(repo: str, file: str, **settings: object) -> str:
        fetched.append((repo, file, settings))
        if file == "none.csv":
            raise OSError("offline")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert data_file("data/drop.json") == Path("data/drop.json")
    assert data_file("hf://datasets/Rowan/hellaswag@refs%2Fconvert%2Fparquet/default/0000.parquet") == (
        tmp_path / "default/0000.parquet"
    )
    assert fetched == [
        ("Rowan/hellaswag", "default/0000.parquet", {"repo_type": "dataset", "revision": "refs/convert/parquet"})
    ]
    with pytest.raises(RecordError, match=r"cannot be had \(offline\); fetch the file elsewhere"):
        data_file("hf://datasets/o/n/none.csv")
    with pytest.raises(RecordError, match="names no file of the hub"):
        data_file("hf://datasets/hellaswag")
