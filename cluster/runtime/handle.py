"""The handle of an object: its public methods as awaitables with a deadline, wherever the object lives.

LocalHandle serves an object of this process, cluster.runtime.actor one in a process of its own. Whoever holds a
handle cannot tell them apart.
"""

import asyncio
import inspect
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Any
from weakref import WeakSet

from cluster.runtime.health import Pulse, Vitals, measure

LIVE: "WeakSet[Handle]" = WeakSet()
"""Every handle of this process that has not been killed, for whoever shows what a run is doing."""

_RESERVED = frozenset({"answered", "attend", "call", "died", "kill", "name", "pulse", "ready", "waiting"})


class ActorDied(RuntimeError):
    """The process of an actor ended, so the call has no answer and no later one will have."""

    def __init__(self, name: str, reason: str, log: str = "") -> None:
        super().__init__(name, reason, log)
        self.name = name
        self.reason = reason
        self.log = log

    def __str__(self) -> str:
        return f"actor {self.name!r} died: {self.reason}" + (f"\n{self.log}" if self.log else "")


class Handle(ABC):
    """The methods of an object as awaitables: `await handle.method(...)`, or `call` with a deadline."""

    def __init__(self, cls: type, name: str, deadline_s: float) -> None:
        self._methods = _public_methods(cls)
        self._class = cls.__name__
        self._name = name
        self._deadline_s = deadline_s
        self._calls: dict[int, tuple[str, float]] = {}
        self._numbers = count()
        self._answered = 0
        self._died = ""
        self._question: asyncio.Future[Vitals] | None = None
        self._asked = 0.0
        self.pulse = Pulse()
        """What the process has said of itself to `attend`."""
        LIVE.add(self)
        if clash := sorted(_RESERVED & self._methods.keys()):
            raise ValueError(f"{cls.__name__} has methods named {clash}, which a handle needs for itself: rename them")

    def __getattr__(self, method: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        if method.startswith("_") or method not in self._methods:
            raise AttributeError(self._unknown(method))

        async def invoke(*args: Any, **kwargs: Any) -> Any:
            return await self._tracked(method, args, kwargs, self._deadline_s)

        return invoke

    @property
    def name(self) -> str:
        """Name of the actor, in errors and logs."""
        return self._name

    async def call(self, method: str, /, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """`method(*args, **kwargs)` with a deadline of its own.

        Raises: what the method raises, with the actor's name and traceback in a note; TimeoutError;
        ActorDied.
        """
        if method not in self._methods:
            raise AttributeError(self._unknown(method))
        return await self._tracked(method, args, kwargs, deadline_s)

    @property
    def waiting(self) -> list[tuple[str, float]]:
        """(method, seconds) of each call without an answer yet, the oldest first."""
        now = time.monotonic()
        return [(method, now - since) for method, since in list(self._calls.values())]

    @property
    def died(self) -> str:
        """Why its process is gone, once a call has found that out; else empty."""
        return self._died

    @property
    def answered(self) -> int:
        """How many calls have had an answer, or an error."""
        return self._answered

    async def attend(self, deadline_s: float) -> None:
        """Ask the process for its vitals, which go to `pulse`; no error, and at most `deadline_s` seconds.

        One that does not answer is not asked again before it has. Its silence is counted while somebody looks, so that
        a caller that was busy itself takes nobody for silent.
        """
        if self._question is None:
            self._question, self._asked = asyncio.ensure_future(self._vitals()), time.monotonic()
        question = self._question
        done, _ = await asyncio.wait({question}, timeout=deadline_s)
        if not done:
            self.pulse.silent_s = time.monotonic() - self._asked
        if not done or question is not self._question:  # somebody else has taken the answer
            return
        self._question = None
        try:
            self.pulse.heard(question.result())
        except ActorDied as error:
            self._died = error.reason

    async def _tracked(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], deadline_s: float) -> Any:
        number = next(self._numbers)
        self._calls[number] = (method, time.monotonic())
        try:
            return await self._call(method, args, kwargs, deadline_s)
        except ActorDied as error:
            self._died = error.reason
            raise
        finally:
            del self._calls[number]
            self._answered += 1

    @abstractmethod
    async def _vitals(self) -> Vitals:
        """Ask the process, beside whatever else it does. Raises ActorDied."""

    @abstractmethod
    async def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], deadline_s: float) -> Any:
        """Reach the object; `method` is known to exist."""

    def _unknown(self, method: str) -> str:
        has = sorted(self._methods)
        return f"actor {self._name!r} ({self._class}) has no public method {method!r}; it has {has}"

    def _missed(self, method: str, deadline_s: float) -> str:
        return f"actor {self._name!r}: {method}() did not answer within {deadline_s:g} s"


class LocalHandle(Handle):
    """Handle of an object in this process: async methods on the caller's event loop, sync on one thread."""

    def __init__(self, obj: Any, name: str, deadline_s: float) -> None:
        super().__init__(type(obj), name, deadline_s)
        self._object = obj
        self._alive = True
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def ready(self, deadline_s: float) -> int:
        """This process's id: the object is there already."""
        return os.getpid()

    def kill(self) -> None:
        """Answer every later call with ActorDied and drop what is queued; what runs now runs to its end."""
        self._alive = False
        LIVE.discard(self)
        self._compute.shutdown(wait=False, cancel_futures=True)

    async def _vitals(self) -> Vitals:
        return await asyncio.to_thread(measure, self._object, family=False)

    async def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], deadline_s: float) -> Any:
        if not self._alive:
            raise ActorDied(self._name, "it was killed by its handle")
        bound = partial(getattr(self._object, method), *args, **kwargs)
        answer = bound() if self._methods[method] else asyncio.wrap_future(self._compute.submit(bound))
        # Not asyncio.timeout: a TimeoutError of the method's own must pass as it is.
        task = asyncio.ensure_future(answer)
        try:
            done, _ = await asyncio.wait({task}, timeout=deadline_s)
        finally:
            if not task.done():
                task.cancel()
        if not done:
            raise TimeoutError(self._missed(method, deadline_s))
        if task.cancelled():
            raise ActorDied(self._name, f"it was killed by its handle before {method}() began")
        return task.result()


def local(obj: Any, name: str | None = None, deadline_s: float = 60.0) -> LocalHandle:
    """The handle of an object that stays in this process, named after its class unless told otherwise."""
    return LocalHandle(obj, name or type(obj).__name__, deadline_s)


def _public_methods(cls: type) -> dict[str, bool]:
    """Name of every public method -> whether it is async."""
    found = inspect.getmembers(cls, inspect.isroutine)
    return {name: inspect.iscoroutinefunction(method) for name, method in found if not name.startswith("_")}
