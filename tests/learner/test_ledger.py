"""The ledger file, and what an audit of it finds."""

import json
from pathlib import Path

import pytest

from actors.prompts import PromptStream
from actors.trajectory import Ticket
from learner.ledger import Audit, Ledger, audit
from tests.fakes import prompts


def ticket(number: int, attempt: int = 0) -> Ticket:
    return Ticket(number=number, attempt=attempt)


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_names_state_ticket_prompt_and_details(tmp_path: Path) -> None:
    path = tmp_path / "run" / "ledger.jsonl"
    stream = PromptStream(prompts(2), seed=0)
    ledger = Ledger(path, stream)
    ledger.record("issued", ticket(3), version=1)
    ledger.committed(1)
    ledger.close()
    issued, committed = _lines(path)
    assert issued | {"time": 0} == {
        "time": 0,
        "state": "issued",
        "ticket": 3,
        "attempt": 0,
        "version": 1,
        "prompt_id": stream[3][0].id,
        "epoch": 1,
    }
    assert committed | {"time": 0} == {"time": 0, "state": "committed", "version": 1}


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Ledger(None).record("issued", ticket(0))
    assert list(tmp_path.iterdir()) == []


def test_errors_name_the_prompt_where_it_is_known() -> None:
    stream = PromptStream(prompts(1), seed=0)
    assert Ledger(None, stream).name(1) == "ticket 1 (prompt 'p0', epoch 1)"
    assert Ledger(None).name(1) == "ticket 1"


def test_each_line_is_on_disk_at_once_and_a_torn_one_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).record("issued", ticket(0))
    with path.open("a") as file:
        file.write('{"state": "iss')
    again = Ledger(path)
    again.record("issued", ticket(1))
    assert [line["ticket"] for line in _lines(path)] == [0, 1]


def _written(path: Path, *events: tuple[str, Ticket] | tuple[str, Ticket, dict[str, object]]) -> Path:
    ledger = Ledger(path)
    for state, name, *details in events:
        ledger.record(state, name, **(details[0] if details else {}))
    ledger.close()
    return path


def test_the_audit_counts_every_ticket_in_one_place(tmp_path: Path) -> None:
    path = _written(
        tmp_path / "l.jsonl",
        ("issued", ticket(0)),
        ("issued", ticket(1)),
        ("generated", ticket(0)),
        ("scored", ticket(0)),
        ("dropped", ticket(1), {"reason": "stale"}),
        ("issued", ticket(1, 1)),
        ("issued", ticket(2)),
        ("batched", ticket(0), {"step": 0}),
    )
    assert audit(path) == Audit(issued=4, trained=1, dropped={"stale": 1}, outstanding=2)


def test_training_a_ticket_twice_is_found(tmp_path: Path) -> None:
    events = [("issued", ticket(0)), ("scored", ticket(0)), ("batched", ticket(0), {"step": 0})]
    path = _written(tmp_path / "a.jsonl", *events, ("batched", ticket(0), {"step": 1}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a\.jsonl:4: ticket \(0, 0\) is batched but was not outstanding"):
        audit(path)
    path = _written(tmp_path / "b.jsonl", *events, ("issued", ticket(0, 1)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"b\.jsonl:4: ticket \(0, 1\) is issued while"):
        audit(path)


def test_a_resumed_run_forgets_what_its_checkpoint_did_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    ledger = Ledger(path)
    for number in range(4):
        ledger.record("issued", ticket(number))
    for number in range(3):
        ledger.record("scored", ticket(number))
    ledger.record("batched", ticket(0), step=0)
    ledger.committed(1)
    ledger.record("batched", ticket(1), step=1)  # trained after the checkpoint: undone
    ledger.resumed(1, kept=[ticket(2)])
    for number in (1, 3):  # both are sampled again under the same key
        ledger.record("issued", ticket(number))
    assert audit(path) == Audit(issued=6, trained=1, dropped={"resumed": 2}, outstanding=3)


def test_what_was_ready_at_the_checkpoint_and_trained_after_it_may_be_trained_again(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    ledger = Ledger(path)
    ledger.record("issued", ticket(0))
    ledger.record("scored", ticket(0))
    ledger.record("batched", ticket(0), step=0)
    ledger.resumed(0, kept=[ticket(0)])
    ledger.record("batched", ticket(0), step=0)
    assert audit(path) == Audit(issued=1, trained=1, dropped={"resumed": 0}, outstanding=0)
