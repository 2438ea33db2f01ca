"""The handle of an object in this process, which behaves as that of an actor does."""

import asyncio
import os
import threading
import time

import pytest

from cluster.runtime.handle import ActorDied, LocalHandle, local


class Clerk:
    """Counts, blocks and waits."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.threads: set[int] = set()
        self.open = 0
        self.cancelled = False

    def note(self, number: int) -> int:
        self.numbers.append(number)
        self.threads.add(threading.get_ident())
        return sum(self.numbers)

    def block(self, seconds: float) -> str:
        time.sleep(seconds)
        return "done"

    def refuse(self) -> None:
        raise LookupError("nothing here")

    async def wait(self, seconds: float) -> int:
        self.open += 1
        try:
            await asyncio.sleep(seconds)
            return self.open
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    async def out_of_time(self, deadline_s: float) -> None:
        raise TimeoutError(f"the method's own {deadline_s}")


class Clashing:
    def kill(self) -> None: ...


@pytest.fixture
def clerk() -> Clerk:
    return Clerk()


@pytest.fixture
def handle(clerk: Clerk) -> LocalHandle:
    return local(clerk, name="near", deadline_s=5)


def test_sync_methods_run_in_order_on_one_thread_that_is_not_the_callers(clerk: Clerk, handle: LocalHandle) -> None:
    async def scenario() -> None:
        assert await handle.ready(deadline_s=1) == os.getpid()
        assert await handle.note(5) == 5
        assert await handle.call("note", number=1, deadline_s=1) == 6
        await asyncio.gather(*(handle.note(i) for i in range(20)))

    asyncio.run(scenario())
    assert clerk.numbers == [5, 1, *range(20)]
    assert len(clerk.threads) == 1
    assert threading.get_ident() not in clerk.threads


def test_async_methods_overlap_while_a_sync_one_computes(handle: LocalHandle) -> None:
    async def scenario() -> None:
        busy = asyncio.ensure_future(handle.block(0.4))
        assert await asyncio.gather(*(handle.wait(0.05) for _ in range(5))) == [5] * 5
        assert not busy.done()
        assert await busy == "done"

    asyncio.run(scenario())


def test_exceptions_pass_as_they_are(handle: LocalHandle) -> None:
    with pytest.raises(LookupError, match="nothing here"):
        asyncio.run(handle.refuse())
    with pytest.raises(TimeoutError, match="the method's own 3"):
        asyncio.run(handle.out_of_time(deadline_s=3))


def test_a_missed_deadline_names_actor_method_and_seconds_and_cancels(clerk: Clerk, handle: LocalHandle) -> None:
    with pytest.raises(TimeoutError, match=r"'near': wait\(\) did not answer within 0.05 s"):
        asyncio.run(handle.call("wait", 5, deadline_s=0.05))
    assert clerk.cancelled


def test_a_killed_handle_drops_what_is_queued_and_answers_nothing_more(clerk: Clerk, handle: LocalHandle) -> None:
    async def scenario() -> None:
        running = asyncio.ensure_future(handle.block(0.2))
        queued = asyncio.ensure_future(handle.note(1))
        await asyncio.sleep(0.05)
        handle.kill()
        assert await running == "done"
        with pytest.raises(ActorDied, match=r"'near' died: .*before note"):
            await queued
        with pytest.raises(ActorDied, match="'near' died") as caught:
            await handle.wait(0)
        assert caught.value.name == "near"

    asyncio.run(scenario())
    assert clerk.numbers == []


def test_only_public_methods_are_there(handle: LocalHandle) -> None:
    with pytest.raises(AttributeError, match=r"'near' \(Clerk\) has no public method 'vanish'.*'note'"):
        handle.vanish  # noqa: B018
    with pytest.raises(ValueError, match=r"Clashing has methods named \['kill'\]"):
        local(Clashing())
    with pytest.raises(AttributeError, match="actor 'Clerk'"):
        local(Clerk()).nothing  # noqa: B018
