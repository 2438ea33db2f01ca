"""How the tests are spread over processes (`pytest -n 2`, as in .ci/checks): files that take long go first.

What a slow test starts has cores of its own, since threads that add up to more than the cores spin at each other's
barriers; a test marked `whole_machine` has all of them, while the other process waits. A file is never split, and those
that share an engine or find each other's Ray are one.
"""

import fcntl
import gc
import os
from collections.abc import Generator
from itertools import groupby
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

gc.disable()  # until everything is imported: a quarter of the time of that

TOGETHER = {
    "tests/actors/test_generator.py": "one engine",
    "tests/actors/test_weights.py": "one engine",
    "tests/cluster/jobs/test_submit.py": "clusters that `auto` finds",
    "tests/cluster/runtime/test_placement.py": "clusters that `auto` finds",
}
CORES = sorted(os.sched_getaffinity(0))
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
OWN = CORES
if WORKER:
    OWN = CORES[int(WORKER) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])] or CORES
    os.environ["OMP_NUM_THREADS"] = str(len(OWN))


class ByFile(LoadScopeScheduling):
    """Gives a whole file to the next process that is free, in the order of collection."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return TOGETHER.get(path, path)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    config.option.loadscopereorder = False
    return ByFile(config, log)  # pyright: ignore[reportArgumentType]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first, then what else is slow."""

    def rank(file: list[pytest.Item]) -> tuple[bool, bool, bool]:
        alone, slow = (any(item.get_closest_marker(mark) for item in file) for mark in ("whole_machine", "slow"))
        return not alone, not file[0].nodeid.startswith("tests/end_to_end"), not slow

    files = [list(file) for _, file in groupby(items, lambda item: item.nodeid.partition("::")[0])]
    items[:] = [item for file in sorted(files, key=rank) for item in file]


def pytest_collection_finish() -> None:
    gc.freeze()  # DeepSpeed collects garbage four times an engine, and what was imported is none: a second each
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else nanobind reports at the end what was never freed


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Outside of the test's timeout: have the machine, or share it."""
    alone, slow = (item.get_closest_marker(mark) is not None for mark in ("whole_machine", "slow"))
    with Path(__file__).open() as machine:
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        os.sched_setaffinity(0, OWN if slow and not alone else CORES)
        return (yield)
