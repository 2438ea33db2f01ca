"""Checks of this machine: versions, GPUs, disks, memory, limits, cores."""

import importlib.metadata
import os
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
from cluster.runtime.resources import GIB, machine_cores, machine_gpus, machine_memory

PACKAGES = ("torch", "vllm", "deepspeed", "ray", "transformers", "wandb")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
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


def disks(run_dir: Path) -> Iterator[Finding]:
    """Room on the disk of the run directory (or of what exists above it), Ray's session, and shared memory."""
    for name, path, fewest, enough, why in (
        ("the run directory", run_dir, 1.0, 10.0, "models and checkpoints are written there"),
        ("/tmp", Path(tempfile.gettempdir()), 1.0, 5.0, "Ray stops taking work when this disk is 95 % full"),
        ("/dev/shm", Path("/dev/shm"), 0.25, 1.0, "Ray and PyTorch share memory there (docker run --shm-size=8g)"),
    ):
        if path.exists():
            free = shutil.disk_usage(path).free / GIB
            says, remedy = f"{free:.1f} GiB free in {path}", f"{why}: make room, at least {enough:g} GiB"
            yield judge(f"disk of {name}", says, remedy, fail=free < fewest, warn=free < enough)


def memory() -> Finding:
    """Main memory that a new process can have, within the limit of the control group."""
    total, free, used = machine_memory(), psutil.virtual_memory().available, Path("/sys/fs/cgroup/memory.current")
    free = min(free, total - int(used.read_text())) if used.is_file() else free
    says, remedy = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free", "end what else uses it; see `rayward plan`"
    return judge("memory", says, remedy, fail=free < 2 * GIB, warn=free < total / 2)


def limits() -> Iterator[Finding]:
    """Open files and processes that the shell allows; Ray advises 65,536 files for the head of a cluster."""
    for name, kind, fewest, enough, says, remedy in (
        ("open files", resource.RLIMIT_NOFILE, 4096, 65_536, "this shell allows {:,}", "ulimit -n 65536"),
        ("processes", resource.RLIMIT_NPROC, 0, 8192, "this user may have {:,}, threads included", "ulimit -u 8192"),
    ):
        soft, _ = resource.getrlimit(kind)
        soft = 2**31 if soft == resource.RLIM_INFINITY else soft
        remedy += " (the hard limit is in /etc/security/limits.conf)"
        yield judge(name, says.format(soft), remedy, fail=soft < fewest, warn=soft < enough)


def threads() -> Finding:
    """Variables that would have more threads than cores."""
    cores, values = machine_cores(), {name: os.environ.get(name, "") for name in _THREADS}
    many = [f"{name}={value}" for name, value in values.items() if value.isdigit() and int(value) > cores]
    says = f"{', '.join(many)} on {cores} cores" if many else f"{cores} cores, which a run shares out"
    remedy = "unset them: each process of a run is given its own number, and more threads than cores run slower"
    return judge("threads", says, remedy, warn=bool(many))


def load() -> Finding:
    """What else computes here."""
    found, remedy = os.getloadavg()[0], "something else computes here, and a run's processes will wait for it (see top)"
    says = f"{found:.2f} processes wanted a core in the last minute"
    return judge("load", says, remedy, warn=found > 0.25 * machine_cores())
