"""Learner ranks that tests can hold in a `LearnerGroup`: one in this process, or each in a process of its own."""

import asyncio
import errno
import gc
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from learner.worker.engine import whole
from learner.worker.group import LearnerGroup
from learner.worker.worker import LearnerWorker

DEADLINE_S = 200.0
_save, _write_text = torch.save, Path.write_text


class OpenWorker(LearnerWorker):
    """A rank that shows what it holds."""

    def state_of(self, name: str) -> dict[str, torch.Tensor]:
        """Copies of a network's weights, optimizer states and average and of the random numbers' state on this rank."""
        engine = self.networks.engine(name)
        optimizer = engine._engine.optimizer
        state = getattr(optimizer, "optimizer", optimizer).state
        found = {f"weight/{key}": whole(parameter) for key, parameter in engine.module.named_parameters()}
        found |= {f"ema/{number}": average for number, average in enumerate(engine._ema)}
        for number, moments in enumerate(state.values()):
            found |= {f"optimizer/{number}/{key}": torch.as_tensor(value) for key, value in moments.items()}
        return {key: value.detach().clone() for key, value in (found | {"rng": torch.get_rng_state()}).items()}

    def share_trunks(self, shared: bool) -> None:
        """Have the networks that are loaded share layers, or each compute its own."""
        self.networks.__dict__.pop("trunks", None)
        if not shared:
            self.networks.trunks.trunks.clear()

    def fill_disk(self, pattern: str) -> None:
        """Have writes of files whose path ends so fail, as on a full disk, until it is called with ""."""

        def refuse(file: Any) -> None:
            if pattern and Path(str(file)).match(pattern):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

        def save(obj: Any, file: Any, **settings: Any) -> None:
            refuse(file)
            _save(obj, file, **settings)

        def write_text(file: Path, text: str) -> int:
            refuse(file)
            return _write_text(file, text)

        torch.save, Path.write_text = save, write_text  # pyright: ignore[reportAttributeAccessIssue]


class InProcess:
    """A worker of this process whose methods are awaitable, as a handle's are."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker

    def __getattr__(self, method: str) -> Any:
        async def call(*args: Any, **settings: Any) -> Any:
            return getattr(self.worker, method)(*args, **settings)

        return call


class RankProcess:
    """A worker of another process; every call has a deadline, and an error there is raised here."""

    def __init__(self, rank: int, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, rank, world_size), daemon=True)
        self._process.start()
        theirs.close()

    def __getattr__(self, method: str) -> Any:
        async def call(*args: Any, **settings: Any) -> Any:
            return await asyncio.to_thread(self._call, method, args, settings)

        return call

    def _call(self, method: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        self._pipe.send_bytes(pickle.dumps((method, args, settings)))
        if not self._pipe.poll(DEADLINE_S):
            raise TimeoutError(f"a rank has not answered {method} in {DEADLINE_S:g} s")
        answer = pickle.loads(self._pipe.recv_bytes())
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def processes(count: int) -> tuple[LearnerGroup, list[RankProcess]]:
    """A started group of ranks that met each other over gloo, and the processes to be closed."""
    ranks = [RankProcess(rank, count) for rank in range(count)]
    group = LearnerGroup(ranks)
    asyncio.run(group.start(loopback=True, deadline_s=DEADLINE_S))
    return group, ranks


def _serve(pipe: Connection, rank: int, world_size: int) -> None:
    import deepspeed  # noqa: F401  # a rank does so later

    gc.freeze()  # see tests/conftest.py
    worker = OpenWorker(rank, world_size, threads=1)
    while True:
        try:
            method, args, settings = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer: Any = getattr(worker, method)(*args, **settings)
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = error
        pipe.send_bytes(pickle.dumps(list(answer) if isinstance(answer, Iterator) else answer))
