"""What each machine of a running cluster has: a short task on every one of them, for `rayward doctor`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.runtime.actor import python_path
from cluster.runtime.placement import cluster_nodes

_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surveyed:
    """One machine, as a task there found it."""

    name: str
    """its address"""
    error: str | None = None
    """why nothing is known of it"""
    python: str = ""
    """version"""
    versions: tuple[tuple[str, str], ...] = ()
    """(package, version) of those that are installed"""
    code: bool = True
    """whether a process there can import Rayward's code"""
    run_dir: bool = True
    """whether the run directory, or the first folder above it that exists here, is there"""
    loopback_name: bool = False
    """whether its host name resolves to the loopback and GLOO_SOCKET_IFNAME is not set"""
    clock_s: float = 0.0
    """seconds that its clock is ahead of this one's, as far as the call's duration does not explain them"""


def survey(packages: Sequence[str], folder: Path) -> tuple[Surveyed, ...]:
    """Look at every machine of the connected cluster. Takes at most half a minute; who does not answer is said."""

    def look() -> dict[str, Any]:  # pickled by value, as the code may not be there
        import importlib.metadata
        import importlib.util
        import os
        import platform
        import socket
        import time

        found = {}
        for package in packages:
            for name in (package, f"{package}-cpu"):
                try:
                    found.setdefault(package, importlib.metadata.version(name))
                except importlib.metadata.PackageNotFoundError:
                    continue
        try:
            resolved = socket.gethostbyname(socket.gethostname())
        except OSError:
            resolved = "127.0.0.1"
        return {
            "python": platform.python_version(),
            "versions": tuple(found.items()),
            "code": importlib.util.find_spec("cluster.runtime.host") is not None,
            "run_dir": os.path.exists(folder),
            "loopback_name": resolved.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ,
            "clock": time.time(),
        }

    task: Any = ray.remote(look)
    nodes, begun = sorted(cluster_nodes(), key=lambda node: node.name), time.time()
    asked = {
        node.name: task.options(
            num_cpus=0,
            max_retries=0,
            runtime_env={"env_vars": {"PYTHONPATH": python_path()}},
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        ).remote()
        for node in nodes
    }
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=_DEADLINE_S)
    return tuple(_surveyed(name, reference, begun) for name, reference in asked.items())


def _surveyed(name: str, reference: Any, begun: float) -> Surveyed:
    try:
        found: dict[str, Any] = ray.get(reference, timeout=0)
    except Exception as error:  # Ray's, or the task's own
        ray.cancel(reference, force=True)
        late = isinstance(error, GetTimeoutError)
        reason = f"no answer within {_DEADLINE_S:g} s" if late else str(error).strip().splitlines()[-1]
        return Surveyed(name=name, error=reason)
    clock = found.pop("clock")
    return Surveyed(name=name, **found, clock_s=min(clock - begun, 0.0) or max(clock - time.time(), 0.0))
