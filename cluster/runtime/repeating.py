"""Something done again and again beside the work of a run."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def repeating(call: Callable[[], None], every_s: float, name: str) -> Iterator[None]:
    """Call something every `every_s` seconds until the block ends, on a thread called `name`."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(every_s):
            call()

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
