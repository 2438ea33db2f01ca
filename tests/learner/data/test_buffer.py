"""The buffer: admission, order, failures, deadlines, resume; and that no schedule loses or doubles a
sample."""

import asyncio
import json
import tempfile
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors.prompts import PromptStream
from actors.trajectory import BufferClosed, SampleKey, StaleTrajectories, Ticket, Trajectory
from actors.waits import Waits
from learner.data.buffer import Buffer
from learner.data.journal import Disk
from learner.data.ledger import Ledger, audit
from reward_server.preferences.records import NotWritten
from tests.fakes import FakeClock, completion, prompts
from tests.full_disk import FullDisk


def samples(ticket: Ticket, count: int = 1, version: int = 0) -> list[Trajectory]:
    return [
        Trajectory(
            key=SampleKey(prompt_id=f"p{ticket.number}", epoch=0, k=k, attempt=ticket.attempt),
            prompt=(),
            completion=completion(version=version),
            score=1.0,
            parts={},
        )
        for k in range(count)
    ]


def new_buffer(
    batch: int = 2, count: int = 1, staleness: int = 0, version: int = 0, path: Path | None = None
) -> Buffer:
    return Buffer(batch, count, staleness, version, ledger=Ledger(path), clock=FakeClock())


LOOP = asyncio.Runner()


@pytest.fixture(scope="module", autouse=True)
def _close_the_loop() -> Iterator[None]:
    with LOOP:
        yield


def at_once(waiting: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that must not wait; None when it does."""

    async def run() -> Any:
        task = asyncio.ensure_future(waiting)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if task.done():
            return task.result()
        task.cancel()
        return None

    return LOOP.run(run())


def numbers(tickets: list[Ticket] | None) -> list[int]:
    return [ticket.number for ticket in tickets or []]


def train_to(buffer: Buffer, version: int) -> None:
    while buffer.version < version:
        while tickets := at_once(buffer.admit(1000)):
            for ticket in tickets:
                buffer.put(ticket, samples(ticket, buffer.samples_per_prompt, buffer.version))
        assert at_once(buffer.take(1.0)) is not None
        buffer.advance()


def test_admission_is_the_inequality_of_areal() -> None:
    """Golden G20: with staleness 4 at version 10, the 7680th rollout of batches of 512 is admitted, not the
    7681st.
    """
    buffer = new_buffer(batch=512, staleness=4, version=10)
    admitted = numbers(at_once(buffer.admit(10_000)))
    assert admitted == list(range(5120, 7680))
    assert at_once(buffer.admit(1)) is None


def test_staleness_zero_is_synchronous() -> None:
    buffer = new_buffer(batch=2, staleness=0)
    tickets = at_once(buffer.admit(5))
    assert numbers(tickets) == [0, 1]
    for ticket in tickets:
        buffer.put(ticket, samples(ticket))
    assert at_once(buffer.admit(1)) is None, "a full buffer does not open the gate"
    at_once(buffer.take(1.0))
    assert at_once(buffer.admit(1)) is None, "neither does taking the batch, but only the learner's next version"
    buffer.advance()
    assert numbers(at_once(buffer.admit(5))) == [2, 3]


def test_staleness_one_overlaps_one_batch() -> None:
    buffer = new_buffer(batch=2, staleness=1)
    assert numbers(at_once(buffer.admit(3))) == [0, 1, 2]
    assert numbers(at_once(buffer.admit(3))) == [3]
    assert at_once(buffer.admit(1)) is None


@pytest.mark.parametrize("staleness", [0, 1, 5])
def test_nothing_is_sampled_for_a_batch_that_will_not_be_taken(staleness: int) -> None:
    buffer = Buffer(2, 1, staleness, ledger=Ledger(None), batches=3)
    train_to(buffer, 3)
    assert at_once(buffer.admit(1)) is None
    assert buffer.counts()["buffer/issued"] == buffer.counts()["buffer/trained"] == 6


def test_a_waiting_admission_continues_when_the_learner_advances() -> None:
    async def run() -> list[Ticket]:
        buffer = new_buffer(batch=1)
        (ticket,) = await buffer.admit(1)
        waiting = asyncio.create_task(buffer.admit(1))
        await asyncio.sleep(0)
        buffer.put(ticket, samples(ticket))
        await buffer.take(1.0)
        assert not waiting.done()
        buffer.advance()
        return await asyncio.wait_for(waiting, 1.0)

    assert numbers(asyncio.run(run())) == [1]


def test_a_batch_comes_in_the_order_of_tickets_not_of_completion() -> None:
    buffer = new_buffer(batch=3, count=2, staleness=1)
    for ticket in reversed(at_once(buffer.admit(6))):
        buffer.put(ticket, samples(ticket, 2))
    first = at_once(buffer.take(1.0))
    assert [(t.key.prompt_id, t.key.k) for t in first] == [(f"p{i}", k) for i in range(3) for k in range(2)]
    buffer.advance()
    assert [t.key.prompt_id for t in at_once(buffer.take(1.0))] == ["p3", "p3", "p4", "p4", "p5", "p5"]


def test_a_forfeited_ticket_is_issued_again_first_with_the_next_attempt() -> None:
    buffer = new_buffer(batch=2, staleness=1)
    first, second = at_once(buffer.admit(2))
    buffer.forfeit(second, "generation failed")
    buffer.forfeit(first, "generation failed")
    buffer.forfeit(first, "generation failed")  # once more changes nothing
    assert at_once(buffer.admit(3)) == [
        Ticket(number=0, attempt=1),
        Ticket(number=1, attempt=1),
        Ticket(number=2, attempt=0),
    ]
    assert buffer.counts()["buffer/dropped/generation failed"] == 2


def test_a_forfeit_opens_a_closed_gate() -> None:
    buffer = new_buffer(batch=1)
    (ticket,) = at_once(buffer.admit(1))
    assert at_once(buffer.admit(1)) is None
    buffer.forfeit(ticket, "stopped")
    assert at_once(buffer.admit(1)) == [Ticket(number=0, attempt=1)]


def test_the_first_answer_to_a_ticket_stands() -> None:
    buffer = new_buffer(batch=1)
    (ticket,) = at_once(buffer.admit(1))
    buffer.forfeit(ticket, "generation failed")
    buffer.put(ticket, samples(ticket))  # too late
    (again,) = at_once(buffer.admit(1))
    buffer.put(again, samples(again))
    buffer.put(again, samples(again))  # twice
    buffer.forfeit(again, "generation failed")  # after the answer
    assert [t.key.attempt for t in at_once(buffer.take(1.0))] == [1]
    counts = buffer.counts()
    assert counts["buffer/late"] == 2
    assert (counts["buffer/issued"], counts["buffer/trained"]) == (2, 1)


@pytest.mark.parametrize(("version", "legal"), [(2, False), (3, True), (4, True), (5, False)])
def test_only_weights_within_the_bound_may_have_sampled(version: int, legal: bool) -> None:
    buffer = new_buffer(batch=1, staleness=1, version=4)
    (ticket,) = at_once(buffer.admit(1))
    if legal:
        buffer.put(ticket, samples(ticket, version=version))
        assert len(at_once(buffer.take(1.0))) == 1
        return
    with pytest.raises(StaleTrajectories, match=rf"versions {version} to {version}; .* versions 3 to 4 only"):
        buffer.put(ticket, samples(ticket, version=version))
    assert buffer.counts()["buffer/dropped/stale"] == 1
    assert at_once(buffer.admit(1)) == [Ticket(number=4, attempt=1)]


def test_staleness_counts_at_the_time_of_training_and_by_the_oldest_token() -> None:
    buffer = new_buffer(batch=1, staleness=1, version=4)
    _, later = at_once(buffer.admit(2))  # ticket 5 trains at version 5, for which version 3 is too old
    old = samples(later, version=4)[0].to_json()
    old["completion"]["versions"] = [4, 3, 4]
    with pytest.raises(StaleTrajectories):
        buffer.put(later, [Trajectory.from_json(old)])


def test_actors_may_be_one_version_ahead_while_the_learner_publishes() -> None:
    buffer = new_buffer(batch=1, staleness=1)
    first, second = at_once(buffer.admit(2))
    buffer.put(first, samples(first))
    at_once(buffer.take(1.0))
    buffer.put(second, samples(second, version=1))
    buffer.advance()
    assert at_once(buffer.take(1.0))[0].oldest_version == 1


def test_taking_twice_or_advancing_without_a_batch_is_a_bug() -> None:
    buffer = new_buffer(batch=1, staleness=1)
    with pytest.raises(AssertionError, match="take"):
        buffer.advance()
    for ticket in at_once(buffer.admit(2)):
        buffer.put(ticket, samples(ticket))
    at_once(buffer.take(1.0))
    with pytest.raises(AssertionError, match="advance"):
        at_once(buffer.take(1.0))


def test_a_missed_deadline_names_what_is_missing_and_for_how_long() -> None:
    clock = FakeClock()
    buffer = Buffer(3, 1, 0, ledger=Ledger(None, PromptStream(prompts(1), seed=0)), clock=clock)
    done, lost, _ = at_once(buffer.admit(3))
    buffer.put(done, samples(done))
    buffer.forfeit(lost, "generation failed")
    clock.now += 12.5
    with pytest.raises(TimeoutError) as caught:
        asyncio.run(buffer.take(0.01))
    assert str(caught.value).startswith("waited 0.01 s for batch 0: 2 of its 3 prompts are missing: ")
    assert "ticket 1 (prompt 'p0', epoch 1) with no actor" in str(caught.value)
    assert "ticket 2 (prompt 'p0', epoch 2) attempt 0, out for 12.5 s" in str(caught.value)
    assert "ticket 0 " not in str(caught.value)


def test_the_deadline_of_a_batch_does_not_count_pauses() -> None:
    """Paused from 0.1 s to 0.6 s: a batch that comes at 0.7 s is within 0.3 s, and one that never comes is not."""
    started = time.monotonic()

    def paused_s() -> float:
        return min(max(time.monotonic() - started - 0.1, 0.0), 0.5)

    async def wait(comes: bool) -> list[Trajectory]:
        nonlocal started
        buffer = Buffer(1, 1, 0, ledger=Ledger(None, PromptStream(prompts(1), seed=0)), paused_s=paused_s)
        (ticket,) = await buffer.admit(1)
        started = time.monotonic()
        if comes:
            asyncio.get_running_loop().call_later(0.7, buffer.put, ticket, samples(ticket))
        return await buffer.take(0.3)

    assert len(asyncio.run(wait(comes=True))) == 1
    with pytest.raises(TimeoutError, match=r"waited 0\.3 s for batch 0"):
        asyncio.run(asyncio.wait_for(wait(comes=False), 5))


def test_nothing_is_handed_out_or_taken_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, waits, room = FullDisk(monkeypatch), Waits(), Disk(pause_s=0.3, retry_s=0.02)
    path = tmp_path / "ledger.jsonl"

    async def run() -> None:
        buffer = Buffer(1, 1, 1, ledger=Ledger(path, disk=room), waits=waits)
        (ticket,) = await buffer.admit(1)
        disk.full = True
        buffer.put(ticket, samples(ticket))
        waiting = [asyncio.create_task(buffer.admit(1)), asyncio.create_task(buffer.take(60.0))]
        assert await asyncio.wait(waiting, timeout=0.15) == (set(), set(waiting))
        assert [(wait.who, wait.text) for wait in waits.open] == [("the learner", "room on the disk, which is full")]
        disk.full = False
        await asyncio.gather(*waiting)
        assert [json.loads(line)["state"] for line in path.read_text().splitlines()][1] == "scored"
        disk.full = True
        buffer.generated(waiting[0].result()[0])
        with pytest.raises(NotWritten, match="--resume goes on"):
            await buffer.admit(1)

    asyncio.run(run())


def test_a_long_list_of_missing_prompts_is_cut() -> None:
    with pytest.raises(TimeoutError, match=r"20 of its 20 prompts are missing: .*; and 12 more"):
        asyncio.run(new_buffer(batch=20).take(0.0))


@pytest.mark.parametrize("error", [ValueError("no reward"), TimeoutError("no reward")])
def test_a_failure_wakes_all_who_wait_and_all_who_come_later(error: Exception) -> None:
    async def run() -> list[object]:
        buffer = new_buffer(batch=1)
        await buffer.admit(1)
        waiting = [asyncio.create_task(buffer.admit(1)), asyncio.create_task(buffer.take(60.0))]
        await asyncio.sleep(0)
        buffer.fail(error)
        buffer.fail(RuntimeError("a later error"))
        outcomes: list[object] = list(await asyncio.gather(*waiting, return_exceptions=True))
        for call in (buffer.admit(1), buffer.take(60.0)):
            outcomes += await asyncio.gather(call, return_exceptions=True)
        return outcomes

    assert asyncio.run(run()) == [error] * 4


def test_a_complete_batch_is_still_handed_out_after_a_failure() -> None:
    buffer = new_buffer(batch=1, staleness=1)
    first, _ = at_once(buffer.admit(2))
    buffer.put(first, samples(first))
    buffer.fail(RuntimeError("all generators are dead"))
    assert len(at_once(buffer.take(1.0))) == 1
    buffer.advance()
    with pytest.raises(RuntimeError, match="all generators are dead"):
        at_once(buffer.take(1.0))


def test_a_closed_buffer_says_so() -> None:
    buffer = new_buffer()
    buffer.close()
    with pytest.raises(BufferClosed):
        at_once(buffer.admit(1))


def test_a_cancelled_admission_takes_no_ticket() -> None:
    async def run() -> Buffer:
        buffer = new_buffer(batch=1)
        (ticket,) = await buffer.admit(1)
        waiting = asyncio.create_task(buffer.admit(1))
        await asyncio.sleep(0)
        buffer.forfeit(ticket, "stopped")  # would wake it
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert waiting.cancelled()
        return buffer

    counts = asyncio.run(run()).counts()
    assert (counts["buffer/issued"], counts["buffer/in_flight"]) == (1, 0)


def test_a_restored_buffer_goes_on_where_the_snapshot_was_taken(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    buffer = new_buffer(batch=2, count=2, staleness=1, path=path)
    train_to(buffer, 1)  # tickets 2, 3 are ready, from the first iteration; 4, 5 may be admitted
    four, five = at_once(buffer.admit(2))
    buffer.forfeit(five, "generation failed")
    snapshot = json.loads(json.dumps(buffer.snapshot()))
    buffer.put(four, samples(four, 2, version=1))  # the run goes on, and is then killed
    expected = at_once(buffer.take(1.0))

    resumed = new_buffer(batch=2, count=2, staleness=1, version=1, path=path)
    resumed.restore(snapshot)
    assert at_once(resumed.take(1.0)) == expected
    assert at_once(resumed.admit(5)) == [Ticket(number=4, attempt=0), Ticket(number=5, attempt=1)]
    counts = audit(path)
    assert (counts.trained, counts.outstanding) == (4, 2)


@pytest.mark.parametrize("other", [{"batch": 3}, {"count": 2}, {"version": 1}, {"staleness": 1}])
def test_a_snapshot_of_another_arithmetic_is_refused(other: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"the checkpoint's buffer has \w+ = \d, this run has \d; resume with"):
        new_buffer(**other).restore(new_buffer().snapshot())  # type: ignore[arg-type]


def test_a_resumed_run_without_a_snapshot_counts_from_its_version() -> None:
    buffer = new_buffer(batch=4, staleness=1, version=3)
    assert numbers(at_once(buffer.admit(100))) == list(range(12, 20))


class AnySchedule(RuleBasedStateMachine):
    """Actors and learner in any order, with failures, late answers, stale weights and resumes."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.ledger = Ledger(Path(self.folder.name) / "ledger.jsonl")
        self.buffer = self.new(version=0)
        self.held: list[Ticket] = []
        self.gone: list[Ticket] = []
        self.order: list[str] = []
        self.training = False
        self.saved = json.dumps([0, self.buffer.snapshot(), []])

    def new(self, version: int) -> Buffer:
        return Buffer(3, 2, 2, version, ledger=self.ledger)

    def teardown(self) -> None:
        """The ledger of the whole, over every kill, says the same as the buffer."""
        self.ledger.record("issued", Ticket(number=10**9, attempt=0))  # so that there is a file
        self.ledger.close()
        found = audit(Path(self.folder.name) / "ledger.jsonl")
        assert found.violations == ()
        assert (found.trained, found.twice) == (len(self.order), 0)
        assert found.samples == 2 * found.trained
        self.folder.cleanup()

    @rule(n=st.integers(1, 7))
    def admit(self, n: int) -> None:
        tickets = at_once(self.buffer.admit(n)) or []
        assert len(tickets) <= n
        assert all(ticket.number < (self.buffer.version + 3) * 3 for ticket in tickets)
        self.held += tickets

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        ticket = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        version = data.draw(st.integers(max(self.buffer.version - 3, 0), self.buffer.version))
        try:
            self.buffer.put(ticket, samples(ticket, 2, version))
        except StaleTrajectories:
            assert version < ticket.number // 3 - 2
        else:
            assert version >= ticket.number // 3 - 2
        self.gone.append(ticket)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forfeit(self, data: st.DataObject) -> None:
        ticket = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.buffer.forfeit(ticket, "generation failed")
        self.gone.append(ticket)

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def answer_late(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.gone))
        self.buffer.put(ticket, samples(ticket, 2, self.buffer.version))

    @precondition(lambda self: not self.training)
    @rule()
    def take(self) -> None:
        batch = at_once(self.buffer.take(60.0))
        if batch is None:
            return
        assert all(self.buffer.version - t.oldest_version <= 2 for t in batch)
        self.order += [t.key.prompt_id for t in batch if t.key.k == 0]
        self.training = True

    @precondition(lambda self: self.training)
    @rule()
    def advance(self) -> None:
        self.buffer.advance()
        self.training = False

    @precondition(lambda self: not self.training)
    @rule()
    def checkpoint(self) -> None:
        self.saved = json.dumps([self.buffer.version, self.buffer.snapshot(), self.order])
        self.ledger.committed(self.buffer.version)

    @rule()
    def kill_and_resume(self) -> None:
        version, snapshot, self.order = json.loads(self.saved)
        self.buffer = self.new(version)
        self.buffer.restore(snapshot)
        self.held, self.gone, self.training = [], [], False

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        counts = self.buffer.counts()
        dropped = sum(value for name, value in counts.items() if name.startswith("buffer/dropped/"))
        outstanding = counts["buffer/in_flight"] + counts["buffer/ready"]
        assert counts["buffer/issued"] == counts["buffer/trained"] + dropped + outstanding
        assert counts["buffer/in_flight"] == 2 * len(self.held)
        assert self.order == [f"p{i}" for i in range(len(self.order))]


AnySchedule.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnySchedule = AnySchedule.TestCase
