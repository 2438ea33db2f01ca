"""The ledger file, and what an audit of it finds."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from actors.prompts import PromptStream
from actors.trajectory import Ticket
from learner.data.ledger import Ledger, audit
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


def audited(path: Path) -> dict[str, Any]:
    return asdict(audit(path))


SCORED: dict[str, Any] = {"samples": 2, "tokens": 9, "oldest": 0, "newest": 0}


def test_the_audit_counts_every_ticket_in_one_place(tmp_path: Path) -> None:
    path = _written(
        tmp_path / "l.jsonl",
        ("issued", ticket(0)),
        ("issued", ticket(1)),
        ("generated", ticket(0)),
        ("scored", ticket(0), SCORED),
        ("dropped", ticket(1), {"reason": "stale"}),
        ("issued", ticket(1, 1)),
        ("issued", ticket(2)),
        ("batched", ticket(0), {"step": 0, "max_staleness": 0}),
    )
    with path.open("a") as file:
        file.write('{"state": "sco')  # its writer was killed
    assert audited(path) == {
        "issued": 4,
        "trained": 1,
        "dropped": {"stale": 1},
        "outstanding": 2,
        "twice": 0,
        "steps": {0: (2, 9)},
        "staleness": 0,
        "committed": 0,
        "resumed": 0,
        "violations": (),
    }


def batch(number: int, step: int, attempt: int = 0, bound: int = 0, **scored: int) -> list[Any]:
    """The life of a ticket that is trained."""
    return [
        ("issued", ticket(number, attempt)),
        ("scored", ticket(number, attempt), {**SCORED, "oldest": step, "newest": step, **scored}),
        ("batched", ticket(number, attempt), {"step": step, "max_staleness": bound}),
    ]


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (
            [*batch(0, 0), ("batched", ticket(0), {"step": 1})],
            "line 4: ticket 0 is trained in step 1 and was in step 0",
        ),
        ([*batch(0, 0), ("issued", ticket(0, 1))], "line 4: ticket (0, 1) is issued while it is live or trained"),
        ([("batched", ticket(0), {"step": 0})], "line 1: ticket (0, 0) is batched but was not outstanding"),
        ([("dropped", ticket(0), {"reason": "stale"})], "line 1: ticket (0, 0) is dropped but was not outstanding"),
        ([*batch(0, 0), *batch(1, 1, oldest=0)], "line 6: ticket 1 is trained with a token 1 versions old, bound 0"),
        ([*batch(0, 0), *batch(1, 1, newest=2)], "line 6: ticket 1 is trained in step 1 with a token of version 2"),
        (batch(0, 0, tokens=0), "line 3: ticket 0 is trained without a token"),
        ([*batch(0, 0), *batch(2, 1)], "step 1 trained 1 tickets from [2] on, not 1 from 1 on"),
        ([*batch(0, 0), *batch(2, 2)], "step 1 trained 0 tickets from [] on, not 1 from 1 on"),
    ],
)
def test_a_broken_promise_is_found_and_placed(tmp_path: Path, events: Any, said: str) -> None:
    found = audit(_written(tmp_path / "l.jsonl", *events))
    assert said in found.violations
    assert found.twice == ("trained in step 1 and was" in said)


def test_staleness_within_the_bound_is_fine(tmp_path: Path) -> None:
    found = audit(_written(tmp_path / "l.jsonl", *batch(0, 0), *batch(1, 1, bound=1, oldest=0)))
    assert (found.violations, found.staleness, found.tokens, found.samples) == ((), 1, 18, 4)


def test_a_line_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"state": "issued"}\n[1]\nnull{\n')
    first, second, third = audit(path).violations
    assert first.startswith("line 1 cannot be read (KeyError")
    assert second.startswith("line 2 cannot be read (TypeError")
    assert third.startswith("line 3 cannot be read (JSONDecodeError")


def test_a_batch_that_was_being_taken_at_a_kill_is_no_violation(tmp_path: Path) -> None:
    path = _written(tmp_path / "l.jsonl", *batch(0, 0), *batch(1, 0), *batch(2, 1))
    assert audit(path).violations == ()


def test_a_resumed_run_forgets_what_its_checkpoint_did_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    ledger = Ledger(path)
    for number in range(4):
        ledger.record("issued", ticket(number))
    for number in range(3):
        ledger.record("scored", ticket(number), **SCORED)
    ledger.record("batched", ticket(0), step=0)
    ledger.committed(1)
    ledger.record("batched", ticket(1), step=1)  # trained after the checkpoint: undone
    ledger.resumed(1, kept=[ticket(2)])
    for number in (1, 3):  # both are sampled again under the same key
        ledger.record("issued", ticket(number))
    found = audit(path)
    assert (found.issued, found.trained, found.dropped, found.outstanding) == (6, 1, {"resumed": 2}, 3)
    assert (found.committed, found.resumed, found.violations) == (1, 1, ())


def test_what_was_ready_at_the_checkpoint_and_trained_after_it_may_be_trained_again(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    ledger = Ledger(path)
    for state, _, details in batch(0, 0)[1:]:
        ledger.record("issued", ticket(0)) if state == "scored" else None
        ledger.record(state, ticket(0), **details)
    ledger.resumed(0, kept=[ticket(0)])
    ledger.record("batched", ticket(0), step=0)
    found = audit(path)
    assert (found.issued, found.trained, found.dropped, found.outstanding) == (1, 1, {}, 0)
    assert (found.twice, found.tokens, found.violations) == (0, 9, ())
