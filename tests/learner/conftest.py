"""Tiny models, and the one rank that a process can be: torch.distributed starts once."""

import gc
from pathlib import Path

import pytest
from hypothesis import settings

from learner.worker.group import LearnerGroup
from learner.worker.worker import LearnerWorker
from tests.ranks import InProcess, OpenWorker
from tests.tiny_models import tiny_causal_lm, tiny_reward_model

settings.register_profile("unhurried", deadline=None)  # a busy machine fails no proof
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a "policy" and a "reward" model."""
    root = tmp_path_factory.mktemp("models")
    tiny_causal_lm(root / "policy")
    tiny_reward_model(root / "reward")
    return root


@pytest.fixture(scope="session")
def rank() -> LearnerWorker:
    """The only rank of this process."""
    worker = OpenWorker(rank=0, world_size=1, threads=1)
    worker.start(*worker.meeting_point(loopback=True), deadline_s=60)
    import deepspeed  # noqa: F401  # the first network would do so

    gc.freeze()  # see tests/conftest.py
    return worker


@pytest.fixture
def worker(rank):
    """The rank, without networks."""
    yield rank
    rank.unload()


@pytest.fixture
def learner(worker) -> LearnerGroup:
    """The rank as a group of one."""
    return LearnerGroup([InProcess(worker)])
