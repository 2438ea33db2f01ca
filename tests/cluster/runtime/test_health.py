import asyncio
import gc
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from cluster.runtime.health import ActorDied, Health, Monitor, measure, repeating


class Sampler:
    def stats(self) -> dict[str, float]:
        return {"version": 3.0, "tokens": 640.0}


def test_a_process_says_what_it_takes_with_and_without_its_children():
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; x = b'x' * 2**26; print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()  # it has what it takes
        alone, together = measure(Sampler(), family=False), measure(Sampler())
    finally:
        child.communicate()
    assert alone.pid == os.getpid()
    assert alone.resident > 2**20
    assert together.resident - alone.resident > 2**26
    assert alone.facts == {"version": 3.0, "tokens": 640.0}
    assert (alone.doing, alone.doing_s, alone.gpu) == ("", 0.0, None)


def test_what_an_object_does_not_say_is_not_known():
    assert measure(None).facts == {}


def test_rates_are_of_the_last_answers_of_one_process():
    first = measure(None, family=False)
    answers = []

    async def say():
        return answers.pop(0)

    health = Health("generator-0", say)

    def rates(**change):
        answers.append(replace(first, **change))
        asyncio.run(health.attend(5.0))
        return health.cores, health.rates

    assert (health.last, health.cores, health.rates) == (None, None, {})
    assert rates(at=10.0, cpu_s=4.0, facts={"tokens": 100.0}) == (None, {})
    assert rates(at=12.0, cpu_s=7.0, facts={"tokens": 700.0}) == (1.5, {"tokens": 300.0})
    later = [rates(at=float(second), cpu_s=7.0, facts={"tokens": 700.0}) for second in range(13, 30)]
    assert later[-1] == (0.0, {"tokens": 0.0}), "what was long ago does not count"
    another = rates(pid=first.pid + 1, at=1.0, cpu_s=0.5, facts={"tokens": 3.0})
    assert another == (None, {}), "another process has begun"


def test_a_death_after_the_last_look_is_no_error(caplog):
    async def scenario():
        killed = asyncio.Event()

        async def answer():
            await killed.wait()
            raise ActorDied("generator-0", "it was killed by its handle")

        await Health("generator-0", answer).attend(0.01)
        killed.set()
        await asyncio.sleep(0.01)
        gc.collect()

    asyncio.run(scenario())
    assert not caplog.records


def test_the_controller_says_what_its_own_objects_say():
    monitor, sampler = Monitor(), Sampler()
    monitor.sources.add(sampler)
    assert measure(monitor).facts == sampler.stats()


def test_what_repeats_is_called_until_the_block_ends_and_never_after():
    calls, third = [], threading.Event()

    def call() -> None:
        calls.append(threading.current_thread().name)
        if len(calls) == 3:
            third.set()

    def work() -> None:
        with repeating(call, 0.01, "mine"):
            assert third.wait(10)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    count = len(calls)
    assert set(calls) == {"mine"}
    assert not [thread for thread in threading.enumerate() if thread.name == "mine"]
    assert len(calls) == count
