"""`rayward audit` over the ledgers of a run directory."""

import io
import json
from pathlib import Path

import pytest

from actors.trajectory import Ticket
from cluster.cli.audit import run_audit
from cluster.tracking.console import Console
from learner.data.ledger import Ledger
from tests.synthetic_run import write_rows


def ledger(run: Path, stage: str = "ppo", twice: bool = False, logged: float = 4.5) -> None:
    """One iteration of one prompt with two samples of 9 tokens together, stopped and resumed after it."""
    book, ticket = Ledger(run / f"ledger-{stage}.jsonl"), Ticket(number=0, attempt=0)
    book.record("issued", ticket)
    book.record("scored", ticket, samples=2, tokens=9, oldest=0, newest=0)
    for _ in range(1 + twice):
        book.record("batched", ticket, step=0, max_staleness=0)
    book.committed(1)
    book.record("issued", Ticket(number=1, attempt=0))
    book.resumed(1, kept=())
    book.close()
    write_rows(run / "metrics.jsonl", [{"stage": stage, "step": 1, "response/length": logged}])


def audited(run: Path, as_json: bool = False) -> tuple[int, str]:
    shown = io.StringIO()
    return run_audit(run, Console(stream=shown), as_json), shown.getvalue()


def test_a_run_in_order_is_accounted_for(tmp_path: Path):
    ledger(tmp_path)
    code, shown = audited(tmp_path)
    assert code == 0
    assert "ppo: 2 issued = 1 trained + 1 dropped (resumed 1) + 0 outstanding" in shown
    assert "1 iterations, 2 samples, 9 tokens; staleness at most 0" in shown
    assert "0 trained twice; newest checkpoint 1; resumed 1 times" in shown
    code, shown = audited(tmp_path, as_json=True)
    found = json.loads(shown)
    assert (code, found["ok"]) == (0, True)
    assert found["stages"]["ppo"]["dropped"] == {"resumed": 1}
    assert found["stages"]["ppo"]["violations"] == []


def test_a_sample_trained_twice_is_exit_code_one(tmp_path: Path):
    ledger(tmp_path, "ppo-noptx", twice=True)
    code, shown = audited(tmp_path)
    assert code == 1
    assert "error: ledger-ppo-noptx.jsonl: line 4: ticket 0 is trained in step 0 and was in step 0" in shown
    code, shown = audited(tmp_path, as_json=True)
    assert (code, json.loads(shown)["ok"]) == (1, False)
    assert json.loads(shown)["stages"]["ppo-noptx"]["twice"] == 1


def test_tokens_that_the_learner_did_not_see_are_found(tmp_path: Path):
    ledger(tmp_path, logged=4.0)
    code, shown = audited(tmp_path)
    assert code == 1
    assert "step 0 has 9 tokens, and metrics.jsonl says 8" in shown


def test_a_directory_without_a_ledger_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no ledger-\*\.jsonl: `rayward ppo` writes one"):
        audited(tmp_path)
