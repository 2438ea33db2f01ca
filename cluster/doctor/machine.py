"""Checks of this machine: versions, GPUs, disks, memory, limits, cores."""

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from cluster.doctor.finding import Finding, fail, warn
from cluster.rundir.environment import gpu_lines
from cluster.runtime.resources import machine_cores, machine_gpus, machine_memory

PACKAGES = ("torch", "vllm", "deepspeed", "ray", "transformers", "wandb")
_GIB = 2**30
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_ROOT = Path(__file__).resolve().parents[2]


def python() -> Finding:
    """Python's version."""
    version = platform.python_version()
    if version.startswith("3.11."):
        return Finding("python", version)
    return fail("python", f"{version}, and Rayward is for 3.11", "make setup with PYTHON=/path/to/python3.11")


def packages(root: Path = _ROOT) -> Iterator[Finding]:
    """Versions of the packages, against the lock in `root` that fits the installed torch."""
    here = {one.name: one.version for one in importlib.metadata.distributions()}
    found = {name: here.get(name) or here.get(f"{name}-cpu") for name in PACKAGES}
    lock = root / "requirements" / ("cpu.lock" if "+cpu" in (found["torch"] or "") else "cuda.lock")
    text = lock.read_text(encoding="utf-8") if lock.is_file() else ""
    locked = dict(re.findall(r"^([\w.-]+?)(?:-cpu)?==(\S+)", text, re.MULTILINE))
    missing = [name for name, version in found.items() if version is None]
    wrong = [
        f"{name} {version} (locked: {locked[name]})"
        for name, version in found.items()
        if version and locked.get(name, version) != version
    ]
    if missing:
        yield fail("packages", f"not installed: {', '.join(missing)}", "make setup, in the tree")
    if wrong:
        says = f"not those that were tested together: {', '.join(wrong)}"
        yield warn("packages", says, "make setup installs the lock")
    if not missing and not wrong:
        told = ", ".join(f"{name} {version}" for name, version in found.items())
        yield Finding("packages", told if text else f"{told}; no lock here to compare with")


def gpus() -> Finding:
    """GPUs that are there and that torch can use."""
    lines, devices = gpu_lines(), machine_gpus()
    if not lines and not devices:
        return Finding("GPUs", "none: everything computes on the cores")
    if not lines:
        remedy = "install or restart NVIDIA's driver; in a container, pass the GPUs with --gpus all"
        return fail("GPUs", f"{devices} devices in /dev, and nvidia-smi does not answer", remedy)
    import torch

    if (usable := torch.cuda.device_count()) < len(lines):
        remedy = "install the CUDA lock: make setup LOCK=requirements/cuda.lock; see CUDA_VISIBLE_DEVICES"
        return fail("GPUs", f"{len(lines)} GPUs, of which torch {torch.__version__} can use {usable}", remedy)
    return Finding("GPUs", "; ".join(lines))


def disks(run_dir: Path) -> Iterator[Finding]:
    """Room on the disk of the run directory (or of what exists above it), Ray's session, and shared memory."""
    for name, path, fewest, enough, why in (
        ("the run directory", run_dir, 1.0, 10.0, "models and checkpoints are written there"),
        ("/tmp", Path(tempfile.gettempdir()), 1.0, 5.0, "Ray stops taking work when this disk is 95 % full"),
        ("/dev/shm", Path("/dev/shm"), 0.25, 1.0, "Ray and PyTorch share memory there (docker run --shm-size=8g)"),
    ):
        if path.exists():
            free = shutil.disk_usage(path).free / _GIB
            remedy = f"{why}: make room, at least {enough:g} GiB"
            yield _bounded(f"disk of {name}", free, fewest, enough, f"{free:.1f} GiB free in {path}", remedy)


def memory() -> Finding:
    """Main memory that a new process can have, within the limit of the control group."""
    total, free, used = machine_memory(), psutil.virtual_memory().available, Path("/sys/fs/cgroup/memory.current")
    free = min(free, total - int(used.read_text())) if used.is_file() else free
    says, remedy = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free", "end what else uses it; see `rayward plan`"
    return _bounded("memory", free, 2 * _GIB, total / 2, says, remedy)


def limits() -> Iterator[Finding]:
    """Open files and processes that the shell allows; Ray advises 65,536 files for the head of a cluster."""
    for name, kind, fewest, enough, says, remedy in (
        ("open files", resource.RLIMIT_NOFILE, 4096, 65_536, "this shell allows {:,}", "ulimit -n 65536"),
        ("processes", resource.RLIMIT_NPROC, 0, 8192, "this user may have {:,}, threads included", "ulimit -u 8192"),
    ):
        soft, _ = resource.getrlimit(kind)
        soft = 2**31 if soft == resource.RLIM_INFINITY else soft
        remedy += " (the hard limit is in /etc/security/limits.conf)"
        yield _bounded(name, soft, fewest, enough, says.format(soft), remedy)


def threads() -> Finding:
    """Variables that would have more threads than cores."""
    cores = machine_cores()
    values = {name: os.environ.get(name, "") for name in _THREADS}
    if many := [f"{name}={value}" for name, value in values.items() if value.isdigit() and int(value) > cores]:
        remedy = "unset them: each process of a run is given its own number, and more threads than cores run slower"
        return warn("threads", f"{', '.join(many)} on {cores} cores", remedy)
    return Finding("threads", f"{cores} cores, which a run shares out")


def load() -> Finding:
    """What else computes here."""
    found = os.getloadavg()[0]
    says = f"{found:.2f} processes wanted a core in the last minute"
    if found <= 0.25 * machine_cores():
        return Finding("load", says)
    return warn("load", says, "something else computes here: a run's processes will wait for each other (see top)")


def _bounded(what: str, found: float, fewest: float, enough: float, says: str, remedy: str) -> Finding:
    if found >= enough:
        return Finding(what, says)
    return (fail if found < fewest else warn)(what, says, remedy)
