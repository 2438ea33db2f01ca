"""What the processes of a run are started with."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors.generator import Generator
from cluster.config.schema import ClusterConfig
from cluster.fleet import processes
from cluster.runtime.resources import Plan, Process
from learner.worker.worker import LearnerWorker


def test_ranks_and_scorers_share_the_runs_cache_of_compiled_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, dict[str, str]] = {}

    def remote(*_: Any, process: Process, variables: dict[str, str], **__: Any) -> None:
        given[process.name] = variables
        raise ProcessLookupError

    async def start(run: processes.Processes) -> None:
        for name in names:
            with pytest.raises(ProcessLookupError):
                await run._process(Generator if name.startswith("g") else LearnerWorker, name).__aenter__()

    names = ("learner-0", "learner-1", "reward-0", "generator-0")
    plan = Plan(processes=tuple(Process(name=name) for name in names), concurrent={})
    run = processes.Processes(ClusterConfig(), plan, tmp_path / "run" / "logs")
    monkeypatch.setattr(processes, "remote", remote)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")  # importing torch sets it
    asyncio.run(start(run))
    found = {name: variables.get("TORCHINDUCTOR_CACHE_DIR") for name, variables in given.items()}
    assert found == dict.fromkeys(names, str(tmp_path / "run" / "cache")) | {"generator-0": None}
