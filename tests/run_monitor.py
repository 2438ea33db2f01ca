"""Looks at a run from outside while it works, as `rayward status` and Prometheus do."""

import contextlib
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.status.snapshot import read


@contextlib.contextmanager
def monitored(run: Path, port: int) -> Iterator[dict[str, list[Any]]]:
    """Collect, each half second until the block ends, every new "status" of a run and its "page" at a port."""
    seen: dict[str, list[Any]] = {"status": [], "page": []}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.5):
            with contextlib.suppress(OSError, ValueError):  # it has not begun, or has ended
                status = read(run)
                del status["curves"]
                if not seen["status"] or status["time"] > seen["status"][-1]["time"]:
                    seen["status"].append(status)
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                        seen["page"].append(answer.read().decode())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
