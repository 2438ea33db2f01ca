"""Checks of a running Ray cluster and of each of its machines, where a short task looks."""

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.doctor.finding import Finding, judge
from cluster.doctor.machine import PACKAGES, versions
from cluster.doctor.services import asks_for_token
from cluster.runtime.actor import python_path
from cluster.runtime.placement import cluster_nodes
from cluster.runtime.session import start_ray

_DEADLINE_S = 30.0
_LOCAL_DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs")


def cluster(address: str, folder: Path) -> list[Finding]:
    """Connect, look and leave; `folder` is the run directory, or the first above it that exists here."""
    try:
        with tempfile.TemporaryDirectory() as logs, start_ray(address, cpus=0, log_dir=Path(logs), deadline_s=10):
            worker: Any = importlib.import_module("ray._private.worker")
            return [*_head(address, worker.get_dashboard_url() or None), *machines(folder)]
    except (RuntimeError, ConnectionError) as error:  # Ray refuses to connect with another version, too
        return [Finding("cluster", str(error), "start it, or correct cluster.address", "fail")]


def _head(address: str, dashboard: str | None) -> Iterator[Finding]:
    nodes = "; ".join(f"{node.name} {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in cluster_nodes())
    yield Finding("cluster", f"{address}: {nodes}")
    asks = asks_for_token(dashboard)
    remedy = "ray get-auth-token --generate; RAY_AUTH_MODE=token wherever Ray starts"
    says = "on" if asks else "off: whoever reaches the cluster can run anything on it"
    yield judge("token authentication", says, remedy, fail=not asks)
    if dashboard:
        here = dashboard.rpartition(":")[0] in ("127.0.0.1", "localhost", "::1", "[::1]")
        says = f"at {dashboard}" if here else f"at {dashboard}, which other machines can reach"
        remedy = "ray start --dashboard-host 127.0.0.1, and ssh -L 8265:127.0.0.1:8265 from elsewhere"
        yield judge("dashboard", says, remedy, warn=not here)


def machines(folder: Path) -> Iterator[Finding]:
    """Look at every machine of the connected cluster. Takes at most half a minute; who does not answer is said."""

    def look() -> dict[str, Any]:  # pickled by value: the code may not be there
        import contextlib
        import importlib.metadata
        import importlib.util
        import os
        import platform
        import socket

        resolved = "127.0.0.1"
        with contextlib.suppress(OSError):
            resolved = socket.gethostbyname(socket.gethostname())
        return {
            "python": platform.python_version(),
            "versions": {one.name: one.version for one in importlib.metadata.distributions()},
            "code": importlib.util.find_spec("cluster.runtime") is not None,
            "run_dir": os.path.exists(folder),
            "loopback": resolved.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ,
        }

    task: Any = ray.remote(num_cpus=0, max_retries=0, runtime_env={"env_vars": {"PYTHONPATH": python_path()}})(look)
    nodes, here = sorted(cluster_nodes(), key=lambda node: node.name), look()
    asked = {
        node.name: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote()
        for node in nodes
    }
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=_DEADLINE_S)
    for name, reference in asked.items():
        try:
            there: dict[str, Any] = ray.get(reference, timeout=0)
        except Exception as error:  # Ray's, or the task's own
            ray.cancel(reference, force=True)
            late = isinstance(error, GetTimeoutError)
            says = f"no answer within {_DEADLINE_S:g} s" if late else str(error).strip().splitlines()[-1]
            yield Finding(f"at {name}", says, "see its raylet's logs: `ray logs` on the head", "fail")
        else:
            wrong = list(differences(f"at {name}", here, there, alone=len(asked) == 1))
            yield from wrong or [Finding(f"at {name}", f"python {there['python']}, the same packages, and the code")]
    mounted = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    kind = next((mounted[place] for place in (folder, *folder.parents) if place in mounted), "unknown")
    if len(asked) > 1 and kind in _LOCAL_DISKS:
        says = f"on a disk of this machine ({kind}), and the cluster has {len(asked)}"
        remedy = "--run DIR on storage that all of them see, else checkpoints of several machines are not whole"
        yield Finding("run directory", says, remedy, "warn")


def differences(what: str, here: dict[str, Any], there: dict[str, Any], alone: bool) -> Iterator[Finding]:
    """What is wrong with another machine by what was looked up here and there; `alone`: it is the only one."""
    mine, other = versions(here["versions"]), versions(there["versions"])
    wrong = [f"{name} {other[name]} ({mine[name]} here)" for name in PACKAGES if other[name] != mine[name]]
    if there["python"].rpartition(".")[0] != here["python"].rpartition(".")[0]:
        wrong.insert(0, f"python {there['python']} ({here['python']} here)")
    if wrong:
        remedy = "install the same environment on every machine: make setup, or the image"
        yield Finding(what, ", ".join(wrong), remedy, "fail")
    if not there["code"]:
        remedy = "have the checkout at the same path, or use rayward submit"
        yield Finding(what, "Rayward's code is not there", remedy, "fail")
    if not there["run_dir"]:
        remedy = "--run DIR on storage that every machine sees"
        yield Finding(what, "the run directory is not there", remedy, "warn")
    if there["loopback"] and not alone:
        remedy = "export GLOO_SOCKET_IFNAME=eth0, or its name there, before `ray start`"
        yield Finding(what, "its host name is the loopback's, where gloo would listen", remedy, "warn")
