"""Checks of this machine: versions, GPUs, disks, memory, open files."""

import importlib.metadata
import platform
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from cluster.doctor.finding import Finding, judge
from cluster.rundir.environment import gpu_lines
from cluster.runtime.resources import GIB, machine_gpus, machine_memory, ray_obstacles, session_parent
from reward_server.fusion import cpp_compiler

PACKAGES = ("torch", "vllm", "deepspeed", "ray", "transformers", "wandb")
_ROOT = Path(__file__).resolve().parents[2]


def python() -> Finding:
    """Python's version."""
    if (version := platform.python_version()).startswith("3.11."):
        return Finding("python", version)
    says, remedy = f"{version}, and Rayward is for 3.11", "make setup with PYTHON=/path/to/python3.11"
    return Finding("python", says, remedy, "fail")


def versions(installed: Mapping[str, str]) -> dict[str, str]:
    """Those of our packages among all that are installed, or "missing"."""
    return {name: installed.get(name) or installed.get(f"{name}-cpu", "missing") for name in PACKAGES}


def packages(root: Path = _ROOT) -> Iterator[Finding]:
    """Versions of the packages, against the lock in `root` that fits the installed torch."""
    found = versions({one.name: one.version for one in importlib.metadata.distributions()})
    lock = root / "requirements" / ("cpu.lock" if "+cpu" in found["torch"] else "cuda.lock")
    text = lock.read_text(encoding="utf-8") if lock.is_file() else ""
    locked = dict(re.findall(r"^([\w.-]+?)(?:-cpu)?==(\S+)", text, re.MULTILINE))
    missing = [name for name, version in found.items() if version == "missing"]
    others = {name: version for name, version in found.items() if name not in missing}
    wrong = [f"{name} {one} (locked: {locked[name]})" for name, one in others.items() if locked.get(name, one) != one]
    if missing:
        yield Finding("packages", f"not installed: {', '.join(missing)}", "make setup, in the tree", "fail")
    if wrong:
        says = f"not those that were tested together: {', '.join(wrong)}"
        yield Finding("packages", says, "make setup installs the lock", "warn")
    if not missing and not wrong:
        told = ", ".join(f"{name} {version}" for name, version in found.items())
        yield Finding("packages", told if text else f"{told}; no lock here to compare with")


def gpus() -> Finding:
    """GPUs that are there and that torch can use."""
    lines, devices = gpu_lines(), machine_gpus()
    if not lines:
        if not devices:
            return Finding("GPUs", "none: everything computes on the cores")
        remedy = "install or restart NVIDIA's driver; in a container, pass the GPUs with --gpus all"
        return Finding("GPUs", f"{devices} devices in /dev, and nvidia-smi does not answer", remedy, "fail")
    import torch

    if (usable := torch.cuda.device_count()) < len(lines):
        remedy = "install the CUDA lock: make setup LOCK=requirements/cuda.lock; see CUDA_VISIBLE_DEVICES"
        says = f"{len(lines)} GPUs, of which torch {torch.__version__} can use {usable}"
        return Finding("GPUs", says, remedy, "fail")
    return Finding("GPUs", "; ".join(lines))


def compiler() -> Finding:
    """The compiler that torch.compile needs."""
    if found := cpp_compiler():
        return Finding("C++ compiler", found)
    says, remedy = "none: network.compile and scoring.compile change nothing", "install g++, or export CXX=COMPILER"
    return Finding("C++ compiler", says, remedy, "warn")


def disks(run_dir: Path) -> Iterator[Finding]:
    """Room on the disk of the run directory (or of what exists above it), and of Ray's session."""
    for name, path, fewest, enough, why in (
        ("the run directory", run_dir, 1.0, 10.0, "models and checkpoints are written there"),
        ("/tmp", Path(tempfile.gettempdir()), 1.0, 5.0, "Ray stops taking work when this disk is 95 % full"),
    ):
        if path.exists():
            free = shutil.disk_usage(path).free / GIB
            says, remedy = f"{free:.1f} GiB free in {path}", f"{why}: make room, at least {enough:g} GiB"
            yield judge(f"disk of {name}", says, remedy, fail=free < fewest, warn=free < enough)


def session() -> list[Finding]:
    """What keeps a local Ray from starting."""
    found = [Finding("Ray's session", what, remedy, "fail") for what, remedy in ray_obstacles()]
    return found or [
        Finding("Ray's session", f"can have its folder in {session_parent()}, its token and shared memory")
    ]


def memory() -> Finding:
    """Main memory that a new process can have, within the limit of the control group."""
    total, free, used = machine_memory(), psutil.virtual_memory().available, Path("/sys/fs/cgroup/memory.current")
    free = min(free, total - int(used.read_text())) if used.is_file() else free
    says, remedy = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free", "end what else uses it; see `rayward plan`"
    return judge("memory", says, remedy, fail=free < 2 * GIB, warn=free < total / 2)


def files() -> Finding:
    """Open files that the shell allows; Ray advises 65,536 for the head of a cluster."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = 2**31 if soft == resource.RLIM_INFINITY else soft
    remedy = "ulimit -n 65536 (the hard limit is in /etc/security/limits.conf)"
    return judge("open files", f"this shell allows {soft:,}", remedy, fail=soft < 4096, warn=soft < 65_536)
