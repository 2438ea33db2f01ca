"""What is said about a long wait, and that nothing is said about a short one."""

import asyncio
import logging

import pytest

import actors.patience
from actors.patience import reported
from learner.buffer import Buffer
from learner.ledger import Ledger


def test_a_long_wait_is_told_again_and_again_in_its_present_words(caplog: pytest.LogCaptureFixture) -> None:
    names = ["a", "b"]

    async def wait() -> None:
        with reported(lambda: f"x waits for {' and '.join(names)}", every_s=0.05):
            await asyncio.sleep(0.07)
            names.remove("a")
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)

    asyncio.run(wait())
    assert [record.getMessage() for record in caplog.records] == [
        "for 0 s x waits for a and b",
        "for 0 s x waits for b",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_short_wait_and_one_that_fails_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        with reported(lambda: "never told", every_s=0.05):
            raise ValueError
        raise AssertionError

    async def wait() -> None:
        with pytest.raises(ValueError):  # noqa: PT011
            await fail()
        await asyncio.sleep(0.1)

    asyncio.run(wait())
    assert not caplog.records


def test_the_learner_says_which_tickets_it_waits_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors.patience, "REPORT_S", 0.05)

    async def wait() -> None:
        buffer = Buffer(2, 1, 0, ledger=Ledger(None))
        await buffer.admit(1)
        with pytest.raises(TimeoutError):
            await buffer.take(0.12)

    asyncio.run(wait())
    text = caplog.records[0].getMessage()
    assert "the learner waits for batch 0: 2 of its 2 prompts are missing: ticket 0 attempt 0, out for" in text
    assert "ticket 1 with no actor" in text
