"""The inside of an actor process: a plain object, one compute thread, and an event loop that stays free.

Async methods run on the actor's event loop, many at a time. Sync methods run on one thread, one at a time, in
the order in which their caller made them; the constructor ran on that thread too. So a method that computes
for minutes holds up neither an async method nor a question about where it stands, and code that is bound to a
thread (torch.distributed, DeepSpeed) sees one thread only.

Ray 2.60 has no such actor. One with a single async method is async as a whole: its sync methods block the event loop,
and Ray keeps no order of calls. One without has concurrency groups, which do keep the order and answer beside it, but
run the constructor on another thread than the calls; and no async method can be in it.
"""

import asyncio
import ctypes
import dataclasses
import gc
import logging
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray.cloudpickle
import ray.util

from cluster.runtime.health import Stats, measure
from cluster.runtime.orphans import own_folder, temporary, watch
from reward_server.address import ADDRESS_VARIABLE
from reward_server.redaction import LOG_FORMAT, redact, secrets, write_output_to

_PR_SET_PDEATHSIG = 1  # prctl(2)
_Frames = list[tuple[FrameType, int]]
_dumps: Callable[[Any], bytes] = ray.cloudpickle.dumps  # pyright: ignore[reportPrivateImportUsage]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An exception on its way from an actor to its caller."""

    error: bytes | None
    """The pickled exception; None when it does not survive pickling, or holds a secret."""
    summary: str
    """Type and message, for an exception that cannot travel."""
    traceback: str
    """The traceback inside the actor."""

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        try:
            data = _dumps(error)
            # Whoever is told may not know a secret of this process, and so could not leave it out.
            told = any(secret.encode() in data for secret in secrets().values())
            whole = not told and type(pickle.loads(data)) is type(error)
        except Exception:  # whatever a foreign exception's own pickling raises
            data, whole = b"", False
        return cls(
            error=data if whole else None,
            summary=redact(f"{type(error).__name__}: {error}"),
            traceback=redact("".join(traceback.format_exception(error))),
        )


class ActorProcess:
    """Ray actor that owns one plain object. Its methods are all async, so that none waits for another."""

    def __init__(
        self, construction: bytes, *, mark: str, threads: int, pin: Sequence[int] | None, log_file: str | None
    ) -> None:
        """Raises: ValueError for a core to pin to that there is not."""
        if log_file is not None:
            write_output_to(Path(log_file))
            logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=LOG_FORMAT)
        _die_with_parent()
        if pin is not None:
            _pin(pin)
        os.environ[ADDRESS_VARIABLE] = ray.util.get_node_ip_address()
        self._folder = own_folder(Path(tempfile.gettempdir()))
        folder = self._folder.__enter__()  # a watcher removes it, or who comes next: Ray kills this process
        os.environ.update(temporary(folder))
        tempfile.tempdir = str(folder)
        self._watcher = watch(mark, folder)
        self._threads = threads
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        # Not a method's work: Ray might start another method first.
        self._object: Future[Any] = self._compute.submit(_construct, construction)
        self._doing = ("", 0.0)  # what the compute thread runs, since when
        self._open: set[Coroutine[Any, Any, Any]] = set()
        self._next = 0
        self._waiting: dict[int, asyncio.Event] = {}

    async def started(self) -> Failure | int:
        """The process id, once the object is made."""
        try:
            await self._made()
        except Exception as error:
            return Failure.of(error)
        return os.getpid()

    async def call_async(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an async method on this event loop; its result, or the Failure that it raised."""
        try:
            call = getattr(await self._made(), method)(*args, **kwargs)
            self._open.add(call)
            try:
                return await call
            finally:
                self._open.discard(call)
        except Exception as error:
            return Failure.of(error)

    async def call_sync(self, number: int, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the caller's `number`-th sync method on the compute thread; its result, or its Failure."""
        try:
            future = await self._in_turn(number, partial(self._run, method, args, kwargs))
            return await asyncio.wrap_future(future)
        except Exception as error:
            return Failure.of(error)

    async def skip(self, number: int) -> None:
        """Give up the turn of a call if it never got here (Ray could not unpickle its arguments)."""
        if number >= self._next:
            await self._in_turn(number, lambda: None)

    async def stacks(self) -> str:
        """Where the compute thread and each unfinished async call stand, to report a missed deadline."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        chains = [
            _below_entry(list(traceback.walk_stack(frame))[::-1])
            for ident, frame in sys._current_frames().items()
            if names.get(ident, "").startswith("compute")
        ]
        chains += [_awaited(call) for call in self._open]
        return "\n".join("".join(traceback.StackSummary.extract(chain).format()) for chain in chains if chain)

    async def stats(self) -> Stats:
        """What this process takes and does; on a thread of its own, so that it holds up nothing."""
        made = self._object.done() and self._object.exception() is None
        doing, since = self._doing
        return await asyncio.to_thread(measure, self._object.result() if made else None, doing=doing, since=since)

    async def _made(self) -> Any:
        # Shielded: a cancelled call must not cancel the constructor that all calls wait for.
        return await asyncio.shield(asyncio.wrap_future(self._object))

    async def _in_turn(self, number: int, work: Callable[[], Any]) -> Future[Any]:
        # Ray starts the calls of an async actor in any order (a large argument arrives late), but the ranks
        # of a collective have to make the same calls in the same order.
        if number != self._next:
            turn = self._waiting[number] = asyncio.Event()
            await turn.wait()
        future = self._compute.submit(work)
        self._next += 1
        if turn := self._waiting.pop(self._next, None):
            turn.set()
        return future

    def _run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = self._object.result()
        if (torch := sys.modules.get("torch")) is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        self._doing = (method, time.monotonic())
        try:
            return getattr(target, method)(*args, **kwargs)
        finally:
            self._doing = ("", 0.0)


def recipe(cls: type, args: tuple[Any, ...]) -> bytes:
    """What a ActorProcess makes its object from."""
    return _dumps((cls, args))


def _construct(construction: bytes) -> Any:
    gc.disable()  # what is imported here is no garbage, and looking for some takes as long as a quarter of the imports
    try:
        cls, args = pickle.loads(construction)
        return cls(*args)
    finally:
        gc.freeze()
        gc.enable()


def _awaited(coroutine: Any) -> _Frames:
    """The coroutines that an open call waits in, innermost last."""
    frames = []
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        frames.append((frame, frame.f_lineno))
        coroutine = coroutine.cr_await
    return frames


def _below_entry(frames: _Frames) -> _Frames:
    """The frames of the object that the compute thread runs; none where it is idle."""
    names = [frame.f_code.co_name for frame, _ in frames]
    entry = next((name for name in ("_run", "_construct") if name in names), None)
    return [] if entry is None else frames[names.index(entry) + 1 :]


def _die_with_parent() -> None:
    """Have the kernel kill this process when the raylet that started it dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _pin(cores: Sequence[int]) -> None:
    """Bind every thread of this process, and so every thread and child to come.

    `cores` are places in the list of those that the process may use: 0 is the first of them.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if missing := sorted(core for core in cores if not 0 <= core < len(allowed)):
        raise ValueError(f"cannot pin to cores {missing}: this process may use {len(allowed)} cores, from 0 on")
    chosen = {allowed[core] for core in cores}
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), chosen)
        except ProcessLookupError:
            continue  # the thread ended meanwhile
