"""Who computes when, with how many threads, cores and GPUs; checked before anything heavy starts.

Threads that add up to more than the cores run 5 to 15 times slower, as OpenMP's barriers spin. Processes take
turns, though, so what has to fit is each set of processes that compute at the same time.
"""

import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from cluster.config.schema import Config
from reward_server.config import ServeConfig

GIB = 2**30
OBJECT_STORE = 256 * 2**20
"""Bytes of a local Ray's object store: batches of tokens pass through it, weights do not."""
_GPU_PROCESS_THREADS = 8  # beyond this a process that computes on a GPU has no use for more

Kind = Literal["generator", "learner", "reward"]
"""What the names of processes begin with."""
KINDS: tuple[Kind, ...] = get_args(Kind)


class ResourceError(ValueError):
    """The plan asks for more than the machine or cluster has."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process of a run and what it may use."""

    name: str
    """Also the name of its actor and of its bundle."""
    threads: int = 1
    """Threads that compute in it."""
    cpus: float = 1.0
    """Logical CPUs that Ray reserves for it as long as it lives."""
    gpus: float = 0.0
    """GPUs that Ray reserves for it as long as it lives; a part of one to share it."""
    pin: tuple[int, ...] | None = None
    """Cores it and its children are bound to, counted from 0 among those it may use; None: wherever."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All processes of a run, and which of them compute at the same time."""

    processes: tuple[Process, ...]
    """Each process once."""
    concurrent: Mapping[str, tuple[str, ...]]
    """Every set of processes that can be computing at some moment, by what they do then."""

    @property
    def cpus(self) -> int:
        """Logical CPUs to start a local Ray with. More than the cores where processes take turns on them."""
        return math.ceil(sum(process.cpus for process in self.processes))

    @property
    def gpus(self) -> float:
        """GPUs of all processes together."""
        return sum(process.gpus for process in self.processes)

    @property
    def gpus_apart(self) -> bool:
        """Whether learner and generators have GPUs of their own: NCCL takes no two members of a group on one."""
        return all(process.gpus >= 1 for process in self.processes if not process.name.startswith("reward-"))

    @property
    def scores_beside(self) -> bool:
        """Whether responses are scored while their generator samples others.

        Not where a replica borrows the cores on which several threads of a generator meet at barriers.
        """
        borrows = not any({"generator-0", "reward-0"} <= {*names} for names in self.concurrent.values())
        return not (borrows and len(self.process("generator-0").pin or ()) > 1)

    @property
    def apart(self) -> bool:
        """Whether learner and generators have GPUs, or cores, of their own, and so can compute at the same time."""
        together = any({"generator-0", "learner-0"} <= {*names} for names in self.concurrent.values())
        return self.gpus_apart or (together and not self.shares_gpus)

    @property
    def shares_gpus(self) -> bool:
        """Whether processes share a GPU. vLLM measures what is free of one while it starts: nobody may change it."""
        return any(0 < process.gpus < 1 for process in self.processes)

    def first(self, kinds: Sequence[Kind], generators: int) -> list[Process]:
        """The processes of these kinds with which a run starts, of generators only so many; more may join later."""
        later = {f"generator-{index}" for index in range(generators, len(self.processes))}
        return [p for p in self.processes if p.name.partition("-")[0] in kinds and p.name not in later]

    def of(self, kinds: Sequence[Kind]) -> "Plan":
        """The same plan for processes of these kinds alone, and the sets in which any of them computes."""
        kept = tuple(one for one in self.processes if one.name.partition("-")[0] in kinds)
        names = {one.name for one in kept}
        parts = {phase: tuple(n for n in found if n in names) for phase, found in self.concurrent.items()}
        return Plan(processes=kept, concurrent={phase: found for phase, found in parts.items() if found})

    def process(self, name: str) -> Process:
        """The process called `name`. Raises: KeyError."""
        found = {process.name: process for process in self.processes}
        if name not in found:
            raise KeyError(f"the plan has no process {name!r}; it has {list(found)}")
        return found[name]


def machine_cores() -> int:
    """Cores this process may use: its affinity, or the quota of its control group where that is smaller."""
    cores = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def machine_gpus() -> int:
    """NVIDIA GPUs this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return sum(1 for device in visible.split(",") if device.strip() not in ("", "-1"))
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def machine_memory() -> int:
    """Bytes of memory of this machine, or the limit of its control group where that is smaller."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))


def session_parent() -> Path:
    """Where a local Ray's folder goes: the paths of its sockets must not be longer than 107 bytes."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return Path(folder if len(os.fsencode(folder)) <= 20 else "/tmp")


def ray_obstacles() -> Iterator[tuple[str, str]]:
    """(what, remedy) of all that would keep a local Ray from starting here, in other words or without any."""
    parent, home, shared = session_parent(), Path(os.path.expanduser("~")), Path("/dev/shm")
    if not os.access(parent, os.W_OK | os.X_OK) or parent.stat().st_uid not in (0, os.getuid()):
        yield (
            f"{parent}, where a local Ray keeps its session, cannot be written, or is another user's",
            ("export RAY_TMPDIR=DIR, a folder of yours with a name of at most 20 characters"),
        )
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    kept = home / ".ray" if (home / ".ray").exists() else home
    if not given and not (home / ".ray/auth_token").exists() and not os.access(kept, os.W_OK | os.X_OK):
        yield f"{kept}, where Ray keeps its token, cannot be written", "export HOME=DIR that you can write"
    if shared.exists() and (free := shutil.disk_usage(shared).free) < OBJECT_STORE:
        yield (
            f"{shared} has {free / 2**20:.0f} MiB free, and a local Ray shares {OBJECT_STORE / 2**20:.0f} there",
            ("make room there; in a container docker run --shm-size=8g"),
        )


def plan_run(config: Config) -> Plan:
    """Threads and cores of every process on this machine; raises ResourceError when they do not fit."""
    cores, gpus = machine_cores(), machine_gpus()
    plan = plan_machine(config, cores, gpus)
    check(plan, cores=cores, gpus=gpus)
    return plan


def plan_replicas(serve: ServeConfig, gpus: int) -> Plan:
    """The copies of `rayward serve`: as many as Ray Serve may start, or the one that the command itself is."""
    own = serve.gpus if serve.on_ray else min(1, gpus)
    names = [f"reward-{index}" for index in range(max(serve.replicas, serve.max_replicas or 1))]
    cpus = serve.threads if serve.on_ray else 0
    found = [Process(name=name, threads=serve.threads, cpus=cpus, gpus=own) for name in names]
    return Plan(processes=tuple(found), concurrent={"score": tuple(names)})


def plan_machine(config: Config, cores: int, gpus: int) -> Plan:
    """The plan of a run on one machine: processes "learner-0", .., "generator-0", .. with those that may join later, ..

    A generator has `generator.tensor_parallel_size` GPUs, in one bundle, since vLLM's workers for them are children of
    one process.

    Synchronous (`ppo.max_staleness` 0): the generators share the cores, then the learner has all of them. Asynchronous:
    learner and generators compute at the same time and get half of the cores each. With one wave in flight a reward
    replica borrows the threads of the generator whose wave it scores (see `scores_beside`), and no more replicas
    compute at once than there are generators; with more, each counts as one more generator. On CPU each generator is
    pinned to cores of its own. With GPUs each process has its own where there are enough; else, unless a generator
    needs more than one, some share one.

    The plan may not fit: see check. Raises ValueError for a machine without cores.
    """
    if cores < 1:
        raise ValueError(f"cores is {cores}: give at least 1")
    cluster, width = config.cluster, config.generator.tensor_parallel_size
    generators = max(cluster.generators, cluster.max_generators or 0)
    ranks, replicas = cluster.learner_ranks, cluster.reward_replicas
    together, borrowing = config.ppo.max_staleness > 0, config.rollout.waves_in_flight == 1
    learner_cores = max(ranks, cores // 2) if together else cores
    rollout_cores = cores - learner_cores if together else cores
    learner_threads = max(1, learner_cores // ranks)
    threads = max(1, rollout_cores // (generators if borrowing else generators + replicas))
    count = generators + ranks + replicas
    whole = gpus >= count or width > 1
    share = 0.0 if not gpus else 1.0 if whole else math.floor(1e4 / math.ceil(count / gpus)) / 1e4
    if gpus:
        threads, learner_threads = (min(_GPU_PROCESS_THREADS, n) for n in (threads, learner_threads))

    def processes(kind: Kind, count: int, threads: int, gpus: float, pinned: bool = False) -> list[Process]:
        pins = [tuple(range(i * threads, (i + 1) * threads)) for i in range(count)]
        fits = [pin if pinned and pin[-1] < cores else None for pin in pins]
        return [
            Process(name=f"{kind}-{i}", threads=threads, cpus=threads, gpus=gpus, pin=pin) for i, pin in enumerate(fits)
        ]

    learner = processes("learner", ranks, learner_threads, share)
    rollout = processes("generator", generators, threads, share * width, pinned=not gpus)
    reward = processes("reward", replicas, threads, share)
    concurrent = _concurrent(rollout, learner, reward, together, borrowing)
    return Plan(processes=(*learner, *rollout, *reward), concurrent=concurrent)


def _concurrent(
    rollout: Sequence[Process], learner: Sequence[Process], reward: Sequence[Process], together: bool, borrowing: bool
) -> dict[str, tuple[str, ...]]:
    generators, ranks, replicas = (tuple(process.name for process in kind) for kind in (rollout, learner, reward))
    if borrowing:
        busy = min(len(replicas), len(generators))
        found = {"generate": generators, "score": (*generators[busy:], *replicas[:busy])}
    else:
        found = {"generate and score": (*generators, *replicas)}
    if together:
        return {f"{name} and update": (*names, *ranks) for name, names in found.items()}
    return found | {"update": ranks}


def check(plan: Plan, *, cores: int, gpus: float) -> None:
    """Refuse a plan that does not fit `cores` and `gpus`.

    Raises: ResourceError naming the phase, each process with its share, their sum, the limit and the remedy.
    """
    for phase, names in plan.concurrent.items():
        processes = [plan.process(name) for name in names]
        if (total := sum(process.threads for process in processes)) > cores:
            each = ", ".join(f"{process.name}: {process.threads}" for process in processes)
            raise ResourceError(
                f"{total} threads would compute at the same time on {cores} cores in the phase "
                f"{phase!r} ({each}). Beyond the cores they run 5 to 15 times slower: use fewer "
                f"generators, learner ranks or reward replicas, fewer threads for each, or a machine with {total} cores"
            )
    if plan.gpus > gpus:
        each = ", ".join(f"{process.name}: {process.gpus:g}" for process in plan.processes if process.gpus)
        raise ResourceError(
            f"the processes need {plan.gpus:g} GPUs and there are {gpus:g} ({each}). Use fewer generators, "
            "learner ranks or reward replicas, let processes share a GPU, or add GPUs"
        )
