from pathlib import Path

import pytest

from actors.evaluation.task import Generation, Reply
from actors.evaluation.tasks import TASKS, WinRate, data_file
from reward_server.preferences.records import RecordError
from reward_server.schema import Message
from tests.actors.evaluation.verdicts import figures, file


def test_the_tasks_are_in_the_order_of_the_paper() -> None:
    assert list(TASKS) == [
        *("win_rate", "hellaswag", "squad", "drop", "translation", "bits_per_byte"),
        *("truthfulqa", "truthfulqa_generation", "hallucination"),
        *("toxicity", "winogender", "crows_pairs"),
    ]
    assert {task.claim for task in TASKS.values()} == {
        *("preference", "alignment tax", "truthfulness", "hallucination", "toxicity", "bias")
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


def test_held_out_prompts_are_asked_as_conversations_and_sampled(tmp_path: Path) -> None:
    path = file(tmp_path, *({"id": f"p{n}", "prompt": f"hello {n}"} for n in range(6)))
    task = WinRate.load(path, 2, max_tokens=8, temperature=0.7)
    assert [item.id for item in task.items] == ["p0", "p3"]
    asked = (Message(role="user", content="hello 3"),)
    (request,) = task.requests(task.items[1])
    assert request == Generation(prompt=asked, max_tokens=8, stop=None, temperature=0.7)
    replies = [[Reply(text="four", ended=True)], [Reply(text="", ended=False)]]
    assert figures(task, *replies) == {"characters": 2.0, "ended": 0.5}
