"""The one rank that a process can be: torch.distributed starts once."""

import pytest

from learner.worker.worker import LearnerWorker


@pytest.fixture(scope="session")
def worker() -> LearnerWorker:
    """A learner of one rank in this process."""
    found = LearnerWorker(rank=0, world_size=1, threads=1)
    found.start(*found.meeting_point(loopback=True), deadline_s=60)
    return found
