"""A fleet whose generators die in every state, hang, are slow, come and go, on a real buffer, rollout and publisher."""

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import learner.weights.publish
from actors.config import RolloutConfig
from actors.sampling import PromptFailed, sample
from actors.trajectory import Completion
from actors.waits import together
from cluster.fleet.fleet import FleetError
from cluster.runtime.health import ActorDied
from learner.config import PublishConfig
from learner.data.ledger import audit
from learner.weights.publish import ParityError, Probe, Publisher
from tests.fakes import FakeEncoding, prompts
from tests.fleet_fakes import DEADLINE_S, QUICK, FakeSource, FakeWorker, Run, until


@pytest.fixture(autouse=True)
def _no_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner.weights.publish, "_MARGIN_S", 0.0)


def check(run: Run, iterations: int, staleness: int = 0) -> None:
    """Nothing is lost or doubled, in the order of the stream, and nothing is too old."""
    assert len(run.batches) == iterations
    trained = [t for batch in run.batches for t in batch]
    assert all(times == 1 for times in Counter(t.key for t in trained).values())
    assert [t.key.prompt_id for t in trained] == [run.stream[n][0].id for n in range(len(trained))]
    for version, batch in enumerate(run.batches):
        assert all(0 <= version - t.oldest_version <= staleness for t in batch)
    found = audit(run.ledger)
    assert found.trained == len(trained)
    assert found.outstanding - run.buffer.counts()["buffer/ready"] == 0


def first_life(name: str, **changes: object):
    """Change the first worker of a place."""

    def shape(worker: FakeWorker) -> None:
        if (worker.name, worker.life) == (name, 0):
            for key, value in changes.items():
                setattr(worker, key, value)

    return shape


STATES = ["generate", "join", "begin_update", "receive", "finish_update", "logprobs", "progress"]


@pytest.mark.parametrize("state", STATES)
def test_one_that_dies_in_any_state_is_replaced_and_costs_only_its_waves(state: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    armed = state in ("generate", "progress")

    async def update(version: int) -> None:
        if version == 1 and not armed:
            run.worker("generator-0").fatal = state
            if state == "join":  # the group is formed anew only when somebody comes or goes
                run.fleet.scale(3)
                await until(lambda: len(run.workers) == 3 and run.worker("generator-2").calls != [], "a third one")
        if version >= 4:
            await until(lambda: len(run.fleet.serving) == run.fleet.wanted or version < 6, "a replacement")

    run.shape = first_life("generator-0", fatal=state if armed else "")
    asyncio.run(run.train(8, update))
    check(run, 8)
    assert run.metrics[-1]["fleet/restarts"] == 1
    assert [worker.life for worker in run.workers if worker.name == "generator-0"] == [0, 1]
    assert run.worker("generator-0").version == 8
    dropped = audit(run.ledger).dropped
    assert set(dropped) <= {"generator lost", "stopped"}
    assert dropped.get("generator lost", 0) <= 2, "a wave has two prompts, and each is issued once more"


def test_one_that_misses_a_version_and_lives_is_replaced(tmp_path: Path) -> None:
    run = Run(tmp_path, staleness=1)

    async def update(version: int) -> None:
        if version == 1:
            run.worker("generator-0").refuses = "finish_update"
        if version == 3:
            await until(lambda: len(run.workers) == 3, "a replacement")

    asyncio.run(run.train(6, update))
    check(run, 6, staleness=1)
    assert run.metrics[-1]["fleet/restarts"] == 1
    assert (run.workers[0].version, run.worker("generator-0").version) == (1, 6)
    assert "stale" not in audit(run.ledger).dropped, "it took no more work"


def test_one_that_dies_while_it_has_no_work_costs_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)

    async def update(version: int) -> None:
        if version == 1:
            run.worker("generator-0").kill()
            await until(lambda: len(run.fleet.serving) == 1, "its death")

    asyncio.run(run.train(4, update))
    check(run, 4)
    assert set(audit(run.ledger).dropped) <= {"stopped"}, "those of the end alone"


def test_a_replacement_has_no_work_before_it_has_the_weights_and_their_proof(tmp_path: Path) -> None:
    run = Run(tmp_path, shape=first_life("generator-0", fatal="generate"))

    async def update(version: int) -> None:
        await until(lambda: len(run.workers) == 3, "a replacement")

    asyncio.run(run.train(6, update))
    calls = [call for call in run.worker("generator-0").calls if call != "progress"]
    assert calls[:5] == ["join", "begin_update", "receive", "finish_update", "logprobs"]
    assert "generate" in calls[5:]


@pytest.mark.parametrize("hangs_in", ["generate", "all"])
def test_one_that_stands_still_is_noticed_by_its_tokens_or_its_silence(hangs_in: str, tmp_path: Path) -> None:
    run = Run(tmp_path, silence_s=0.15, shape=first_life("generator-1", hangs_in=hangs_in))
    asyncio.run(run.train(3))
    check(run, 3)
    assert run.metrics[-1]["fleet/restarts"] == 1
    assert audit(run.ledger).dropped["generator lost"] == 2


def test_a_slow_one_is_left_alone(tmp_path: Path) -> None:
    run = Run(tmp_path, silence_s=0.15, shape=first_life("generator-1", seconds=0.4), staleness=1)
    asyncio.run(run.train(3))
    check(run, 3, staleness=1)
    assert run.metrics[-1]["fleet/restarts"] == 0


def test_one_that_hangs_while_publishing_costs_its_deadline_and_is_replaced(tmp_path: Path) -> None:
    run = Run(tmp_path)

    async def update(version: int) -> None:
        if version == 0:
            run.worker("generator-0").hangs_in = "receive"
            run.worker("generator-0").fatal = "abort_update"

    asyncio.run(run.train(4, update))
    check(run, 4)
    assert run.metrics[-1]["fleet/restarts"] == 1


def test_when_all_die_the_buffered_batch_is_trained_and_newcomers_go_on(tmp_path: Path) -> None:
    run = Run(tmp_path, staleness=1)

    async def update(version: int) -> None:
        if version == 1:
            await until(lambda: run.buffer.counts()["buffer/ready"] == 8, "the next batch")
            for worker in run.workers:
                worker.kill()
            await until(lambda: not run.fleet.serving, "the deaths")

    asyncio.run(run.train(5, update))
    check(run, 5, staleness=1)
    assert run.metrics[2]["fleet/size"] == 0, "version 2 had nobody to go to"
    assert run.metrics[-1] == {**run.metrics[-1], "fleet/size": 2.0, "fleet/wanted": 2.0, "fleet/restarts": 2.0}
    assert {worker.version for worker in run.workers[2:]} == {5}


def test_an_end_from_outside_starts_no_replacement(tmp_path: Path) -> None:
    run = Run(tmp_path)

    async def update(version: int) -> None:
        if version == 1:  # as a signal does
            asyncio.get_running_loop().call_soon(sys.exit, 130)

    with pytest.raises(SystemExit):
        asyncio.run(run.train(5, update))
    assert len(run.workers) == 2


def test_when_nobody_comes_back_the_run_ends_with_the_causes(tmp_path: Path) -> None:
    run = Run(tmp_path, staleness=1, config=QUICK.model_copy(update={"max_restarts": 9, "backoff_s": 5.0}))

    async def update(version: int) -> None:
        if version == 0:
            await until(lambda: run.buffer.counts()["buffer/ready"] == 8, "the next batch")
            for worker in run.workers:
                worker.kill()

    with pytest.raises(
        FleetError, match=r"has come back for 0.3 s: generator-0: .*killed in .*; generator-1: .*killed"
    ):
        asyncio.run(run.train(5, update))
    assert len(run.batches) == 2, "what was in the buffer was trained"


def test_one_that_cannot_be_replaced_leaves_its_place_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def shape(worker: FakeWorker) -> None:
        if worker.name == "generator-0":
            if worker.life:
                raise OSError("no memory")
            worker.fatal = "generate"

    run = Run(tmp_path, shape=shape, config=QUICK.model_copy(update={"max_restarts": 2}))

    async def update(version: int) -> None:
        await until(lambda: version < 2 or "generator-0" not in run.fleet._seats, "giving up")

    asyncio.run(run.train(5, update))
    check(run, 5)
    assert (run.metrics[-1]["fleet/size"], run.metrics[-1]["fleet/wanted"]) == (1, 2)
    (error,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert error == (
        "generator-0 was replaced 2 times in a row and is lost again: it did not start: no memory. Its place stays "
        "empty, and the run goes on with 1"
    )


def test_below_the_least_number_the_run_ends_with_the_name(tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"max_restarts": 1, "min_generators": 2})
    run = Run(tmp_path, config=config)
    run.shape = lambda worker: setattr(worker, "fatal", "generate" if worker.name == "generator-1" else "")
    with pytest.raises(FleetError, match=r"generator-1 was replaced 1 times .*killed in generate.* 2 are needed"):
        asyncio.run(run.train(50))


def test_one_that_works_between_its_deaths_is_replaced_again_and_again(tmp_path: Path) -> None:
    run = Run(tmp_path, config=QUICK.model_copy(update={"max_restarts": 1}))

    async def update(version: int) -> None:
        if version % 3 == 0:
            await until(lambda: run.fleet._seats["generator-1"].worker is not None, "a replacement")
        if version % 3 == 2:
            assert "generate" in run.worker("generator-1").calls
            run.worker("generator-1").kill()
            await until(lambda: len(run.fleet.serving) == 1, "its death")

    asyncio.run(run.train(9, update))
    check(run, 9)
    assert run.metrics[-1]["fleet/restarts"] >= 3


def test_more_and_fewer_generators_while_the_run_works(tmp_path: Path) -> None:
    run = Run(tmp_path, wanted=1)

    async def update(version: int) -> None:
        if version == 1:
            run.fleet.scale(3)
            await until(lambda: len(run.workers) == 3, "newcomers")
            await asyncio.sleep(0.05)
        if version == 4:
            run.fleet.scale(1)
        if version == 6:
            await until(lambda: len(run.fleet._seats) == 1, "their leave")
            run.fleet.scale(2)
        if version == 8:
            await until(lambda: len(run.fleet._seats) == 2, "another")
            await asyncio.sleep(0.05)

    asyncio.run(run.train(11, update))
    check(run, 11)
    sizes = [metrics["fleet/size"] for metrics in run.metrics]
    assert sizes[:3] == [1, 1, 3]
    assert sizes[5] == 1
    assert sizes[-1] == 2
    assert run.metrics[-1]["fleet/restarts"] == 0
    assert [worker.stopped for worker in run.workers] == [True] * 4, "each engine was ended in good order"
    assert set(audit(run.ledger).dropped) <= {"stopped"}, "who leaves finishes its waves"


def test_scaling_down_lets_the_idle_go_and_keeps_those_that_work(tmp_path: Path) -> None:
    def shape(worker: FakeWorker) -> None:
        if worker.name == "generator-0" and worker.life:
            raise OSError("no memory")

    run = Run(tmp_path, shape=shape, config=QUICK.model_copy(update={"max_restarts": 9, "backoff_s": 2.0}))

    async def update(version: int) -> None:
        if version == 1:
            run.worker("generator-0").kill()
            await until(lambda: len(run.fleet.serving) == 1, "the death")
            run.fleet.scale(1)

    asyncio.run(run.train(4, update))
    check(run, 4)
    assert run.worker("generator-1").version == 4


def test_a_number_that_cannot_be_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)

    async def update(version: int) -> None:
        for wanted, text in ((5, "5 do not fit"), (0, "at least 1")):
            with pytest.raises(ValueError, match=text):
                run.fleet.scale(wanted)

    asyncio.run(run.train(2, update))
    assert [metrics["fleet/wanted"] for metrics in run.metrics] == [2, 2, 2]
    assert len(run.workers) == 2


def test_a_newcomer_that_cannot_be_placed_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    def shape(worker: FakeWorker) -> None:
        if worker.name == "generator-2":
            raise TimeoutError("it has not started: it asks for 8 CPUs")

    run = Run(tmp_path, shape=shape, config=QUICK.model_copy(update={"max_restarts": 1}))

    async def update(version: int) -> None:
        if version == 0:
            run.fleet.scale(3)
            await until(lambda: "generator-2" not in run.fleet._seats, "giving up")

    asyncio.run(run.train(3, update))
    check(run, 3)
    assert (run.metrics[-1]["fleet/size"], run.metrics[-1]["fleet/wanted"]) == (2, 3)


def test_a_newcomer_that_computes_otherwise_stops_the_run(tmp_path: Path) -> None:
    def shape(worker: FakeWorker) -> None:
        if worker.name == "generator-0":
            worker.fatal = "" if worker.life else "generate"
            worker.answer = [[-1.0, -2.0 - worker.life]]

    with pytest.raises(ParityError, match="generator-0 and the learner disagree"):
        asyncio.run(Run(tmp_path, wanted=1, shape=shape).train(3))


def test_a_start_that_fails_at_first_is_raised_as_it_is(tmp_path: Path) -> None:
    def shape(worker: FakeWorker) -> None:
        if worker.name == "generator-1":
            raise OSError("no such model")

    run = Run(tmp_path, shape=shape)
    with pytest.raises(OSError, match="no such model"):
        asyncio.run(run.train(1))


HELDOUT = prompts(12)
SAMPLING = RolloutConfig(prompts_per_wave=2, max_new_tokens=6)


async def answers(run: Run) -> list[list[Completion]]:
    return await sample(run.fleet, HELDOUT, FakeEncoding(), SAMPLING, 1, 5)


async def twice(run: Run, between: Callable[[], Awaitable[None]]) -> None:
    """The same prompts get the same answers after what happens `between`."""
    async with asyncio.timeout(DEADLINE_S), run.fleet:
        whole = await answers(run)
        await between()
        assert await answers(run) == whole


def test_an_evaluation_survives_the_death_of_a_generator(tmp_path: Path) -> None:
    run = Run(tmp_path)

    async def arm() -> None:
        run.worker("generator-0").fatal = "generate"

    asyncio.run(twice(run, arm))


@pytest.mark.parametrize("publishing", [False, True])
def test_the_replacement_of_a_generator_answers_too(publishing: bool, tmp_path: Path) -> None:
    """With the learner's weights where there is one, as soon as it does not compute."""
    run = Run(tmp_path, shape=lambda worker: setattr(worker, "seconds", 0.02))

    async def evaluate() -> None:
        async with asyncio.timeout(DEADLINE_S), run.fleet:
            if publishing:
                run.fleet.publisher = Publisher(FakeSource(), PublishConfig(deadline_s=0.5), [Probe(ids=[1, 2, 3])])
                await run.publish(0)
            run.worker("generator-0").fatal = run.worker("generator-1").fatal = "generate"
            found, _ = await together(answers(run), compute())
            assert len(found) == len(HELDOUT)

    async def compute() -> None:
        async with run.fleet.occupied():
            seats: Any = run.fleet._seats.values()
            await until(lambda: all(seat.worker and seat.worker.handle.life for seat in seats), "newcomers")
            await asyncio.sleep(0.02)
            assert not run.fleet.serving

    asyncio.run(evaluate())
    assert {(w.name, w.life): "generate" in w.calls for w in run.workers} == {
        (f"generator-{place}", life): True for place in (0, 1) for life in (0, 1)
    }
    assert {worker.version for worker in run.workers} == {0 if publishing else -1}


def test_an_evaluation_waits_for_somebody_to_answer(tmp_path: Path) -> None:
    run = Run(tmp_path, wanted=1)

    async def kill() -> None:
        run.worker("generator-0").kill()
        await until(lambda: not run.fleet.serving, "its death")

    asyncio.run(twice(run, kill))


def test_an_evaluation_that_nobody_answers_ends_with_the_causes(tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"max_restarts": 0})
    run = Run(tmp_path, wanted=1, config=config)

    async def kill() -> None:
        run.worker("generator-0").kill()
        await until(lambda: not run.fleet._seats, "its death")

    with pytest.raises(FleetError, match=r"0 generators are left, 1 are needed: generator-0: .*killed in progress"):
        asyncio.run(twice(run, kill))


def test_a_held_out_prompt_that_kills_engines_is_named_after_as_many_deaths_as_it_has_attempts(tmp_path: Path) -> None:
    bad = FakeEncoding().prompt(HELDOUT[5].messages)

    def shape(worker: FakeWorker) -> None:
        def fault(queries: list[list[int]]) -> Exception | None:
            if bad not in queries:
                return None
            worker.kill()
            return ActorDied(worker.name, "illegal instruction")

        worker._inner.fault = fault

    run = Run(tmp_path, shape=shape)
    with pytest.raises(PromptFailed, match=r"'p5' could not be sampled in 3 attempts; .*illegal instruction.* Remove"):
        asyncio.run(twice(run, lambda: asyncio.sleep(0)))
    assert len(run.workers) <= 2 + 3


def test_one_that_is_to_leave_finishes_what_it_samples_for_all(tmp_path: Path) -> None:
    """It works for the buffer and for an evaluation, and is lost to neither."""
    run = Run(tmp_path, shape=lambda worker: setattr(worker, "seconds", 0.05))

    async def update(version: int) -> None:
        if version == 1:
            evaluation = asyncio.create_task(answers(run))
            await until(lambda: all(w._calls for w in run.fleet.serving), "an evaluation")
            run.fleet.scale(1)
            assert len(await evaluation) == len(HELDOUT)

    asyncio.run(run.train(4, update))
    check(run, 4)
    assert [worker.stopped for worker in run.workers] == [True, True]
    assert set(audit(run.ledger).dropped) <= {"stopped"}
