"""How the processes of a command are: what each takes and does, as it says itself beside its work, and who waits."""

import asyncio
import contextlib
import logging
import re
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from actors.waits import Waits
from learner.data.journal import Disk
from reward_server.schema import Pause

if TYPE_CHECKING:
    from reward_server.client import RewardClient

INTERVAL_S = 2.0
"""Seconds between two questions to a process."""
SILENT_S = 5 * INTERVAL_S
"""Seconds after which a process, or a run, counts as gone or stuck."""
_KEPT = 6  # answers that rates are taken over
_KINDS = ("controller", "learner", "generator", "reward")
log = logging.getLogger(__name__)


class ActorDied(RuntimeError):
    """The process of an actor ended, so the call has no answer and no later one will have."""

    def __init__(self, name: str, reason: str, log: str = "") -> None:
        super().__init__(name, reason, log)
        self.name = name
        self.reason = reason
        self.log = log

    def __str__(self) -> str:
        return f"actor {self.name!r} died: {self.reason}" + (f"\n{self.log}" if self.log else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
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


def measure(obj: Any, *, family: bool = True, doing: str = "", since: float = 0.0) -> Stats:
    """The stats of this process, which holds `obj`, with those of its children where `family`.

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
    return Stats(
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


def _kills() -> int:
    """Processes that this machine's kernel has killed for want of memory, in any container; Linux says so."""
    try:
        counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except OSError:
        return 0
    return int(counts.get("oom_kill", 0))


class Health:
    """A process as its controller sees it: its open calls, what it has said of itself lately, whether it is gone.

    `attend` and `call` belong to an event loop; what they find can be read from any thread.
    """

    def __init__(self, name: str, ask: Callable[[], Awaitable[Stats]]) -> None:
        """`ask` has the process say how it is, beside whatever else it does; raises ActorDied."""
        self.name = name
        self.died = ""
        """Why the process is gone, once that has been found out."""
        self.silent_s = 0.0
        """Seconds for which it has not said how it is; 0 when it has."""
        self.answered = 0
        """Calls answered, or failed, since it started."""
        self._ask = ask
        self._kills = _kills()
        self._question: asyncio.Future[Stats] | None = None
        self._asked = 0.0
        self._heard: deque[Stats] = deque(maxlen=_KEPT)
        self._calls: dict[int, tuple[str, float]] = {}
        self._numbers = count()

    @contextlib.contextmanager
    def call(self, method: str) -> Iterator[None]:
        """While the block lasts a call has no answer yet; notes the death that ends it."""
        number = next(self._numbers)
        self._calls[number] = (method, time.monotonic())
        try:
            yield
        except ActorDied as error:
            self.died = error.reason
            raise
        finally:
            del self._calls[number]
            self.answered += 1

    async def attend(self, deadline_s: float) -> None:
        """Ask the process how it is; no error, and at most `deadline_s` seconds.

        One that does not answer is not asked again before it has. Its silence is counted while somebody looks, so that
        a caller that was busy itself takes nobody for silent.
        """
        if self._question is None:
            self._question, self._asked = asyncio.ensure_future(self._ask()), time.monotonic()
            # Its death may be all that it answers, after the last look: nobody has to hear of that.
            self._question.add_done_callback(lambda answer: answer.cancelled() or answer.exception())
        question = self._question
        done, _ = await asyncio.wait({question}, timeout=deadline_s)
        if not done:
            self.silent_s = time.monotonic() - self._asked
        if not done or question is not self._question:  # somebody else has taken the answer
            return
        self._question = None
        try:
            stats = question.result()
        except ActorDied as error:
            self.died = error.reason
            return
        if self._heard and self._heard[-1].pid != stats.pid:
            self._heard.clear()
        self._heard.append(stats)
        self.silent_s = 0.0

    @property
    def waiting(self) -> list[tuple[str, float]]:
        """(method, seconds) of each call without an answer yet, the oldest first."""
        now = time.monotonic()
        return [(method, now - since) for method, since in list(self._calls.values())]

    @property
    def last(self) -> Stats | None:
        """What it takes and does, as it said last; None before the first time."""
        return self._heard[-1] if self._heard else None

    def memory(self) -> str:
        """For the report of its death: what it took last, and whether the kernel has killed here for want of memory."""
        if self.last is None:
            return ""
        here = self.last.node == socket.gethostname() and _kills() > self._kills
        killed = ", and the kernel has killed on this machine for want of memory since it started" if here else ""
        return f"; it last took {self.last.resident / 2**30:.2f} GiB of memory{killed}"

    @property
    def cores(self) -> float | None:
        """Cores that it has kept busy lately; None before the second answer."""
        return self._rate(lambda one: one.cpu_s)

    @property
    def rates(self) -> dict[str, float]:
        """By how much each of its facts has grown lately, a second; none before the second answer."""
        facts = self.last.facts if self.last else {}
        rates = {name: self._rate(lambda one, name=name: one.facts.get(name, 0.0)) for name in facts}
        return {name: rate for name, rate in rates.items() if rate is not None}

    @property
    def state(self) -> str:
        """starting, idle, working, paused (it stands still while weights arrive), silent or dead."""
        last, facts = self.last, self.last.facts if self.last else {}
        if self.died:
            return "dead"
        if last is None and self.silent_s:
            return "starting"
        if self.silent_s > SILENT_S:
            return "silent"
        if facts.get("paused"):
            return "paused"
        busy = self._calls or (last and last.doing) or facts.get("waiting") or facts.get("running")
        return "working" if busy else "idle"

    def _rate(self, number: Callable[[Stats], float]) -> float | None:
        heard = list(self._heard)
        if len(heard) < 2 or heard[-1].at <= heard[0].at:
            return None
        return max(0.0, (number(heard[-1]) - number(heard[0])) / (heard[-1].at - heard[0].at))


class Monitor:
    """What there is to see of one command: its processes, waits and phases, and whether it is paused.

    Made by the command, and given to whoever starts processes or waits, who keeps it true, and to whoever shows it.
    """

    def __init__(self, pause_s: float = 3600.0) -> None:
        """`pause_s`: seconds that it may be paused for a full disk."""
        self.waits = Waits()
        self.disk = Disk(pause_s)
        """Whether there is room for what it writes."""
        self.health: set[Health] = set()
        """Of each process that has been started and not been ended."""
        self.sources: set[Any] = set()
        """Objects of this process that say how they stand, such as the buffer of the stage that is at work."""
        self.reward_clients: set[RewardClient] = set()
        """Clients of the reward service, which know whether the run is paused."""
        self.phases: list[tuple[str, str]] = []
        """(name, stage) of those that are under way, the outermost first."""

    @contextlib.contextmanager
    def phase(self, name: str, stage: str) -> Iterator[None]:
        """A phase of a stage is under way until the block ends."""
        self.phases.append((name, stage))
        try:
            yield
        finally:
            self.phases.remove((name, stage))

    @contextlib.asynccontextmanager
    async def attending(self, every_s: float = INTERVAL_S) -> AsyncIterator[None]:
        """Until the block ends, ask every process, this one too, how it is, and every wait for its words."""
        controller = Health("controller", lambda: asyncio.to_thread(measure, self, family=False))
        self.health.add(controller)
        task = asyncio.create_task(self._attend(every_s), name="attending")
        try:
            yield
        finally:
            self.health.discard(controller)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _attend(self, every_s: float) -> None:
        while True:
            try:
                await asyncio.gather(*(health.attend(every_s / 2) for health in list(self.health)))
            except Exception:  # what is shown of a run must not stop it
                log.exception("the state of a process could not be asked for")
            await asyncio.sleep(every_s)

    def processes(self) -> list[Health]:
        """Every process: the controller, learner ranks, generators, reward replicas; from any thread."""
        return sorted(self.health, key=lambda one: _order(one.name))

    @property
    def paused(self) -> Pause | None:
        """Since when and why the run waits for room on a disk, or for scores; None while it does not."""
        return self.disk.paused or next((one.paused for one in list(self.reward_clients) if one.paused), None)

    def stats(self) -> dict[str, float]:
        """What the objects of this process say of themselves."""
        return {name: value for obj in list(self.sources) for name, value in obj.stats().items()}


@contextlib.contextmanager
def repeating(call: Callable[[], None], every_s: float, name: str) -> Iterator[None]:
    """Call something every `every_s` seconds until the block ends, on a thread called `name`."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(every_s):
            call()

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _order(name: str) -> tuple[int, list[int], str]:
    kind = name.partition("-")[0]
    return _KINDS.index(kind) if kind in _KINDS else len(_KINDS), [int(n) for n in re.findall(r"\d+", name)], name
