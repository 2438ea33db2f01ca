"""How the tests are spread over processes (`pytest -n 2`, as in .ci/checks): files that take long go first.

Every process has cores of its own, and so has whatever its tests start: threads that add up to more than the cores
would spin at each other's barriers. A file is never split, and files that share an engine or a Ray cluster are one.
"""

import gc
import os
from itertools import groupby

import pytest
from xdist.scheduler import LoadScopeScheduling

TOGETHER = {
    "tests/actors/test_generator.py": "one engine",
    "tests/actors/test_weights.py": "one engine",
    "tests/cluster/jobs/test_submit.py": "clusters that `auto` would find",
    "tests/cluster/runtime/test_placement.py": "clusters that `auto` would find",
}


class ByFile(LoadScopeScheduling):
    """Gives a whole file to the next process that is free, in the order of collection."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return TOGETHER.get(path, path)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    config.option.loadscopereorder = False
    return ByFile(config, log)  # pyright: ignore[reportArgumentType]


def pytest_configure(config: pytest.Config) -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker:
        cores = sorted(os.sched_getaffinity(0))
        own = cores[int(worker) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
        os.sched_setaffinity(0, own or cores)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    files = [(path, list(group)) for path, group in groupby(items, lambda item: item.nodeid.partition("::")[0])]

    def rank(file: tuple[str, list[pytest.Item]]) -> tuple[bool, bool]:
        path, group = file
        slow = any(item.get_closest_marker("slow") for item in group)
        return not path.startswith("tests/end_to_end"), not slow

    items[:] = [item for _, group in sorted(files, key=rank) for item in group]


def pytest_collection_finish() -> None:
    gc.freeze()  # DeepSpeed collects garbage four times an engine, and what was imported is none: a second each


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else nanobind reports at the end what was never freed
