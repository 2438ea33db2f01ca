"""What is said about a long wait, and that nothing is said about a short one."""

import asyncio
import logging

import pytest

import actors.waits
from actors.waits import Waits
from learner.data.buffer import Buffer
from learner.data.ledger import Ledger


def test_a_long_wait_is_told_again_and_again_in_its_present_words(caplog: pytest.LogCaptureFixture) -> None:
    names = ["a", "b"]

    async def wait() -> None:
        with Waits().reported("x", lambda: " and ".join(names), every_s=0.05):
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
        with Waits().reported("x", lambda: "never told", every_s=0.05):
            raise ValueError
        raise AssertionError

    async def wait() -> None:
        with pytest.raises(ValueError):  # noqa: PT011
            await fail()
        await asyncio.sleep(0.1)

    asyncio.run(wait())
    assert not caplog.records


def test_the_learner_says_at_whom_the_tickets_are_that_it_waits_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors.waits, "REPORT_S", 0.05)

    async def wait() -> None:
        waits = Waits()
        buffer = Buffer(2, 1, 0, ledger=Ledger(None), waits=waits)
        await buffer.admit(1, "generator-1")
        taking = asyncio.create_task(buffer.take(0.12))
        await asyncio.sleep(0)
        (wait,) = waits.open
        assert (wait.who, wait.text[:8]) == ("the learner", "batch 0:")
        await buffer.admit(1, "generator-0")
        wait.look()
        assert "2 of its 2 prompts: 1 at generator-0 for 0 s, 1 at generator-1 for 0 s" in wait.text
        with pytest.raises(TimeoutError, match=r"ticket 0 attempt 0, out for 0.1 s at generator-1; ticket 1"):
            await taking
        assert waits.open == []

    asyncio.run(wait())
    text = caplog.records[0].getMessage()
    assert "for 0 s the learner waits for batch 0: 2 of its 2 prompts: 1 at" in text


def test_what_happens_in_the_moment_after_a_wait_began_is_in_its_words() -> None:
    at = ["nobody"]

    async def wait() -> None:
        waits = Waits()
        with waits.reported("x", lambda: at[0]):
            at[0] = "generator-0"
            await asyncio.sleep(0.15)
            assert [one.text for one in waits.open] == ["generator-0"]

    asyncio.run(wait())
