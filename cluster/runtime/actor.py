"""Plain class -> Ray actor -> handle: a process of its own whose public methods are awaitables."""

import asyncio
import inspect
import os
import pickle
import secrets
import sysconfig
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.runtime.actor_process import ActorProcess, Failure, recipe
from cluster.runtime.health import ActorDied, Health, Stats
from cluster.runtime.orphans import ACTOR_MARK
from cluster.runtime.resources import Process

_ROOT = Path(__file__).resolve().parents[2]
_THREADS = [f"{library}_NUM_THREADS" for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "RAYON")]
_PROBE_S = 1.0
_CALLS = 100_000  # under way at an actor; Ray lets further ones wait, and a question how it is must not
_TAIL_LINES = 5
_DEATHS = (RayActorError, OutOfMemoryError)
_RESERVED = {"call", "health", "kill", "name", "ready"}
_KILLED = "it was killed by its handle"


class RemoteError(RuntimeError):
    """An exception in an actor that cannot travel as itself, as it does not survive pickling."""


class Handle:
    """The public methods of an actor's object as awaitables: `await handle.method(...)`, or `call` with a deadline.

    It belongs to the process that made it: no pickling.
    """

    def __init__(
        self, cls: type, process: Process, actor: Any, started: Any, log_file: Path | None, deadline_s: float
    ) -> None:
        """`started` is Ray's reference of the answer that the object is made. For the others see `remote`."""
        self.name = process.name
        """Name of the actor, in errors and logs."""
        self.health = Health(process.name, self._stats)
        """Its open calls, what it says of itself, and whether it is gone."""
        self._methods = _public_methods(cls)
        self._class = cls.__name__
        self._process = process
        self._log_file = log_file
        self._deadline_s = deadline_s
        self._actor = actor
        self._started = started
        self._next = 0
        self._killed = False

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"the handle of actor {self.name!r} cannot be pickled: pass data, not handles")

    def __getattr__(self, method: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        if method.startswith("_") or method not in self._methods:
            raise AttributeError(self._unknown(method))

        async def invoke(*args: Any, **kwargs: Any) -> Any:
            return await self._call(method, args, kwargs, self._deadline_s)

        return invoke

    async def ready(self, deadline_s: float) -> int:
        """Wait until the actor runs and the object is made; the actor's process id.

        Raises: what the constructor raises; TimeoutError; ActorDied.
        """
        return await self._answer(self._started, "__init__", deadline_s)

    async def call(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """`method(*args, **kwargs)` with a deadline of its own.

        Raises: what the method raises, with the actor's name and traceback in a note; TimeoutError;
        ActorDied.
        """
        if method not in self._methods:
            raise AttributeError(self._unknown(method))
        return await self._call(method, args, kwargs, deadline_s)

    def kill(self) -> None:
        """End the actor's process at once, without a word to the object. Its children follow in a second.

        Every later call raises ActorDied; left to Ray, one may still be answered while the news is under way.
        """
        self._killed = True
        if ray.is_initialized():
            ray.kill(self._actor)

    async def _stats(self) -> Stats:
        if self._killed:
            raise ActorDied(self.name, _KILLED)
        try:
            return await self._actor.stats.remote()
        except _DEATHS as error:
            raise ActorDied(self.name, self._reason(error)) from None

    async def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], deadline_s: float) -> Any:
        with self.health.call(method):
            if self._killed:
                raise ActorDied(self.name, _KILLED)
            if self._methods[method]:
                reference = self._actor.call_async.remote(method, args, kwargs)
                return await self._answer(reference, method, deadline_s, cancel=True)
            number = self._next
            reference = self._actor.call_sync.remote(number, method, args, kwargs)
            self._next += 1  # after the line that fails when an argument cannot be pickled
            try:
                return await self._answer(reference, method, deadline_s)
            except RemoteError:
                # Where the call never reached the object, the next one waits for its turn.
                self._actor.skip.remote(number)
                raise

    async def _answer(self, reference: Any, method: str, deadline_s: float, cancel: bool = False) -> Any:
        try:
            async with asyncio.timeout(deadline_s):
                outcome = await reference
        except TimeoutError:
            report = f"{method}() did not answer within {deadline_s:g} s{await self._whereabouts()}"
            self._abandon(reference, cancel)
            raise TimeoutError(f"actor {self.name!r}: {report}") from None
        except asyncio.CancelledError:
            self._abandon(reference, cancel)
            raise
        except _DEATHS as error:
            raise ActorDied(self.name, self._reason(error), _tail(self._log_file)) from None
        except RayError as error:
            raise RemoteError(f"actor {self.name!r}: {method}() got no further than Ray: {error}") from None
        if isinstance(outcome, Failure):
            raise self._revived(outcome)
        return outcome

    def _abandon(self, reference: Any, cancel: bool) -> None:
        """Nobody waits for this call any more: let an async method clean up (a sync one runs to its end)."""
        if cancel and ray.is_initialized():
            ray.cancel(reference)

    def _revived(self, failure: Failure) -> BaseException:
        error: BaseException = RemoteError(f"actor {self.name!r}: {failure.summary}")
        if failure.error is not None:
            try:
                error = pickle.loads(failure.error)
            except Exception as reason:  # its class is known in the actor and not here
                error.add_note(f"(the exception itself could not be unpickled here: {reason})")
        error.add_note(f"raised in actor {self.name!r}:\n{failure.traceback}")
        return error

    def _reason(self, error: RayError) -> str:
        return _KILLED if self._killed else _sentence(error) + self.health.memory()

    def _unknown(self, method: str) -> str:
        has = sorted(self._methods)
        return f"actor {self.name!r} ({self._class}) has no public method {method!r}; it has {has}"

    async def _whereabouts(self) -> str:
        """What the actor does at the moment, for the report of a missed deadline."""
        try:
            async with asyncio.timeout(_PROBE_S):
                stacks = await self._actor.stacks.remote()
        except _DEATHS as error:
            return f"; it is dead: {self._reason(error)}"
        except TimeoutError:
            if ray.wait([self._started], timeout=0)[0]:
                return f"; it answers nothing within {_PROBE_S:g} s: it is stopped, or its event loop is blocked"
            demand = f"{self._process.cpus:g} CPUs and {self._process.gpus:g} GPUs"
            return f"; it has not started: it asks for {demand}, and the cluster has {_supply()}"
        return f"; it stands at\n{stacks}" if stacks else "; it is idle now"


def remote(
    cls: type,
    *args: Any,
    process: Process,
    log_file: Path | None = None,
    placement: PlacementGroupSchedulingStrategy | None = None,
    deadline_s: float = 60.0,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Handle:
    """Start an actor process that makes `cls(*args)`; does not wait for it (`await handle.ready(...)`).

    `log_file` takes its output and that of its children; None leaves it in Ray's session folder. `placement`: the
    bundle it runs in. `deadline_s`: seconds that a call may take when it is not told otherwise. Threads are set for
    OpenMP, MKL, OpenBLAS, tokenizers and torch; `variables` are set in its environment.

    Raises: RuntimeError without a Ray session; ValueError for a class or threads that cannot be.
    """
    if not ray.is_initialized():
        raise RuntimeError(f"actor {process.name!r} needs a Ray session: enter cluster.runtime.session.start_ray first")
    if clash := sorted(_public_methods(cls).keys() & _RESERVED):
        raise ValueError(f"{cls.__name__} has methods named {clash}, which a handle needs for itself: rename them")
    if process.threads < 1:
        raise ValueError(f"actor {process.name!r}: threads is {process.threads}, give at least 1")
    mark = secrets.token_hex(8)
    # Ray shows these variables to the whole cluster: no secrets.
    env = {"PYTHONPATH": python_path(), ACTOR_MARK: mark, **dict.fromkeys(_THREADS, str(process.threads))}
    env |= variables
    create: Any = ray.remote(ActorProcess).options(
        num_cpus=process.cpus,
        num_gpus=process.gpus,
        max_restarts=0,
        max_concurrency=_CALLS,
        runtime_env={"env_vars": env},
        scheduling_strategy=placement,
    )
    actor = create.remote(
        recipe(cls, args),
        mark=f"{ACTOR_MARK}={mark}",
        threads=process.threads,
        pin=process.pin,
        log_file=None if log_file is None else str(log_file.resolve()),
    )
    return Handle(cls, process, actor, actor.started.remote(), log_file, deadline_s)


def python_path() -> str:
    """The checkout, then what is set. Not site-packages: it must not come before the standard library."""
    paths = [] if str(_ROOT) == sysconfig.get_path("purelib") else [str(_ROOT)]
    return os.pathsep.join(paths + [path for path in [os.environ.get("PYTHONPATH")] if path])


def _public_methods(cls: type) -> dict[str, bool]:
    """Name of every public method -> whether it is async."""
    found = inspect.getmembers(cls, inspect.isroutine)
    return {name: inspect.iscoroutinefunction(method) for name, method in found if not name.startswith("_")}


def _sentence(error: RayError) -> str:
    """The sentence of Ray's report that says why; the rest of it guesses."""
    if isinstance(error, OutOfMemoryError):
        used = str(error).partition("Memory on the node ")[2].partition("\n")[0]
        return f"Ray killed it for want of memory on its machine {used}".strip()
    lines = [line.strip() for line in str(error).splitlines() if line and not line.startswith("\t")]
    text = " ".join(lines).removeprefix("The actor died unexpectedly before finishing this task. ")
    return text.split(" Some common causes")[0]


def _tail(path: Path | None) -> str:
    if path is None or not path.is_file():
        return "" if path is None else f"(its log is {path}, on the machine it ran on)"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
    return f"the end of {path}:\n" + "\n".join(lines)


def _supply() -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    return ", ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s free" for kind in ("CPU", "GPU"))
