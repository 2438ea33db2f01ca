import threading

import pytest

from cluster.runtime.repeating import repeating


def test_it_is_called_until_the_block_ends_and_never_after():
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
