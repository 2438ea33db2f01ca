"""What a process takes and what it does, as it says of itself beside its work."""

import contextlib
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import psutil

if TYPE_CHECKING:
    from reward_server.client import RewardClient

OWN: "WeakSet[Any]" = WeakSet()
"""Objects of the controller that say how they stand, such as the buffer of the stage that is at work."""
_KEPT = 6  # vitals that rates are taken over


SCORERS: "WeakSet[RewardClient]" = WeakSet()
"""Clients of the reward service, which know whether the run is paused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """A process at one moment."""

    at: float
    """seconds of its own clock, to take rates over"""
    pid: int
    """its id on its machine"""
    node: str
    """its machine"""
    resident: int
    """bytes of main memory, with its children's; pages that they share count twice"""
    cpu_s: float
    """processor seconds so far, with those of the children that live"""
    gpu: int | None
    """bytes in use, by anybody, on the GPUs that it may use; None without a GPU"""
    doing: str
    """method that its compute thread runs; empty while it runs none"""
    doing_s: float
    """seconds since that began"""
    facts: Mapping[str, float]
    """what its object says of itself: version, waiting, tokens, .."""


def measure(obj: Any, *, family: bool = True, doing: str = "", since: float = 0.0) -> Vitals:
    """The vitals of this process, which holds `obj`, with those of its children where `family`.

    `obj.stats()`, if it has that, names the facts: it must be cheap and may be called from any thread. `doing` is
    what is computed, from the monotonic time `since` on.
    """
    own, now = psutil.Process(), time.monotonic()
    resident, cpu_s = 0, 0.0
    for process in [own, *(own.children(recursive=True) if family else ())]:
        with contextlib.suppress(psutil.Error), process.oneshot():  # a child may just have ended
            times = process.cpu_times()
            resident += process.memory_info().rss
            cpu_s += times.user + times.system
    return Vitals(
        at=now,
        pid=own.pid,
        node=socket.gethostname(),
        resident=resident,
        cpu_s=cpu_s,
        gpu=_gpu_bytes(),
        doing=doing,
        doing_s=now - since if doing else 0.0,
        facts=obj.stats() if hasattr(obj, "stats") else {},
    )


def _gpu_bytes() -> int | None:
    """Asked of the driver, which starts nothing on the GPU. None without torch, a GPU, or NVIDIA's library for it."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    try:
        used = [torch.cuda.device_memory_used(device) for device in range(torch.cuda.device_count())]
    except (AttributeError, ModuleNotFoundError, RuntimeError):  # without attributes while another thread imports it
        return None
    return sum(used) if used else None


class Pulse:
    """The last few vitals of a process, and for how long it has answered nothing."""

    def __init__(self) -> None:
        self.silent_s = 0.0
        """Seconds for which the last question has had no answer, when it was last looked."""
        self._heard: deque[Vitals] = deque(maxlen=_KEPT)

    @property
    def last(self) -> Vitals | None:
        """The newest; None before the first."""
        return self._heard[-1] if self._heard else None

    def heard(self, vitals: Vitals) -> None:
        """Take an answer."""
        self.silent_s = 0.0
        if self._heard and self._heard[-1].pid != vitals.pid:
            self._heard.clear()
        self._heard.append(vitals)

    @property
    def cores(self) -> float | None:
        """Cores that it has kept busy lately; None before the second answer."""
        return self._rate(lambda vitals: vitals.cpu_s)

    @property
    def rates(self) -> dict[str, float]:
        """By how much each fact has grown lately, a second; nothing before the second answer."""
        rates = {
            name: self._rate(lambda v, name=name: v.facts.get(name, 0.0)) for name in (self.last or _NOTHING).facts
        }
        return {name: rate for name, rate in rates.items() if rate is not None}

    def _rate(self, number: Any) -> float | None:
        heard = list(self._heard)
        if len(heard) < 2 or heard[-1].at <= heard[0].at:
            return None
        return max(0.0, (number(heard[-1]) - number(heard[0])) / (heard[-1].at - heard[0].at))


_NOTHING = Vitals(at=0.0, pid=0, node="", resident=0, cpu_s=0.0, gpu=None, doing="", doing_s=0.0, facts={})


class Controller:
    """The run's own process, shown beside those that it holds handles of."""

    def stats(self) -> dict[str, float]:
        """What the objects in OWN say."""
        return {name: value for obj in list(OWN) for name, value in obj.stats().items()}
