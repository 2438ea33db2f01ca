"""`rayward doctor`: is this machine, and the cluster if there is one, fit for a run? Each line says what to do.

What is looked at is gathered first (`cluster.doctor.examination`), and judged here by pure functions.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cluster.config.schema import Config
from cluster.doctor.examination import Facts, examine
from cluster.doctor.findings import Finding, cluster, listeners

GIB = 2**30
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_ENOUGH_FILES = 65_536  # what Ray advises for the head of a cluster; a local run opens some thousands
_FEWEST_FILES = 4096
_ENOUGH_PROCESSES = 8192


def doctor(config: Config, run_dir: Path, command: str, as_data: bool) -> bool:
    """Print the findings, as lines or as JSON; returns whether none of them is a failure."""
    findings = list(judge(examine(config, run_dir), config))
    good = all(finding.state != "fail" for finding in findings)
    if as_data:
        told = {"healthy": good, "findings": [asdict(finding) for finding in findings]}
        sys.stdout.write(json.dumps(told, indent=2) + "\n")
        return good
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(finding.what) for finding in findings) + 2
    for finding in findings:
        console.print(
            Text.assemble((f"{finding.state:<6}", _STYLES[finding.state]), f"{finding.what:<{width}}{finding.says}")
        )
        if finding.remedy:
            console.print(Text(f"{'':<{width + 6}}{finding.remedy}", style="dim"))
    return good


def judge(facts: Facts, config: Config) -> Iterator[Finding]:
    """A finding for everything that was looked at."""
    yield from versions(facts)
    yield from devices(facts)
    yield from room(facts)
    yield from processors(facts)
    yield from services(facts, config)
    yield from listeners(facts.ports, facts.dashboard_open)
    if facts.cluster is not None:
        yield from cluster(facts.cluster, facts.versions, facts.python, facts.run_disk)


def versions(facts: Facts) -> Iterator[Finding]:
    """Python and the packages, against the lock."""
    if not facts.python.startswith("3.11."):
        yield Finding(
            what="python",
            state="fail",
            says=f"{facts.python}, and Rayward is for 3.11",
            remedy="make setup with PYTHON=/path/to/python3.11",
        )
    else:
        yield Finding(what="python", state="ok", says=facts.python)
    missing = [name for name, version in facts.versions.items() if version is None]
    wrong = [
        f"{name} {version} (locked: {facts.locked[name]})"
        for name, version in facts.versions.items()
        if version is not None and facts.locked.get(name, version) != version
    ]
    if missing:
        yield Finding(
            what="packages", state="fail", says=f"not installed: {', '.join(missing)}", remedy="make setup, in the tree"
        )
    if wrong:
        yield Finding(
            what="packages",
            state="warn",
            says=f"not those that were tested together: {', '.join(wrong)}",
            remedy="make setup installs the lock",
        )
    if not missing and not wrong:
        told = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
        yield Finding(
            what="packages", state="ok", says=told if facts.locked else f"{told}; no lock here to compare with"
        )


def devices(facts: Facts) -> Iterator[Finding]:
    """GPUs that are there and that torch can use."""
    if not facts.gpus and not facts.gpu_files:
        yield Finding(what="GPUs", state="ok", says="none: everything computes on the cores")
    elif not facts.gpus:
        yield Finding(
            what="GPUs",
            state="fail",
            says=f"{facts.gpu_files} devices in /dev, and nvidia-smi does not answer",
            remedy="install or restart NVIDIA's driver; in a container, pass the GPUs with --gpus all",
        )
    elif facts.cuda_devices < len(facts.gpus):
        yield Finding(
            what="GPUs",
            state="fail",
            says=f"{len(facts.gpus)} GPUs, of which torch {facts.versions.get('torch')} can use {facts.cuda_devices}",
            remedy="install the CUDA lock: make setup LOCK=requirements/cuda.lock; see CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Finding(what="GPUs", state="ok", says="; ".join(facts.gpus))


def room(facts: Facts) -> Iterator[Finding]:
    """Disks, memory, open files."""
    for name, (path, free) in facts.disks.items():
        fewest, enough, why = _DISKS[name]
        state = "fail" if free < fewest * GIB else "warn" if free < enough * GIB else "ok"
        yield Finding(
            what=f"disk of {name}",
            state=state,
            says=f"{free / GIB:.1f} GiB free in {path}",
            remedy="" if state == "ok" else f"{why}: make room, at least {enough:g} GiB",
        )
    free, total = facts.memory_free, facts.memory
    state = "fail" if free < 2 * GIB else "warn" if free < total / 2 else "ok"
    yield Finding(
        what="memory",
        state=state,
        says=f"{free / GIB:.1f} of {total / GIB:.1f} GiB free",
        remedy="" if state == "ok" else "end what else uses it; `rayward plan` says what a run needs",
    )
    state = "fail" if facts.open_files < _FEWEST_FILES else "warn" if facts.open_files < _ENOUGH_FILES else "ok"
    yield Finding(
        what="open files",
        state=state,
        says=f"this shell allows {facts.open_files:,}",
        remedy="" if state == "ok" else f"ulimit -n {_ENOUGH_FILES} (the hard limit is in /etc/security/limits.conf)",
    )
    few = facts.processes < _ENOUGH_PROCESSES
    yield Finding(
        what="processes",
        state="warn" if few else "ok",
        says=f"this user may have {facts.processes:,}, threads included",
        remedy=f"ulimit -u {_ENOUGH_PROCESSES}; Ray and vLLM start threads by the hundred" if few else "",
    )


_DISKS = {
    "the run directory": (1.0, 10.0, "models and checkpoints are written there"),
    "/tmp": (1.0, 5.0, "Ray keeps its session there, and stops taking work when the disk is 95 % full"),
    "/dev/shm": (0.25, 1.0, "Ray's object store and PyTorch share memory there (docker run --shm-size=8g)"),
}


def processors(facts: Facts) -> Iterator[Finding]:
    """Cores, threads that would fight for them, and other load."""
    threads = {name: value for name, value in facts.threads.items() if value is not None}
    many = [f"{name}={value}" for name, value in threads.items() if value.isdigit() and int(value) > facts.cores]
    if many:
        yield Finding(
            what="threads",
            state="warn",
            says=f"{', '.join(many)} on {facts.cores} cores",
            remedy="unset them: each process of a run is given its own number, and more threads than cores run slower",
        )
    else:
        yield Finding(what="threads", state="ok", says=f"{facts.cores} cores, which a run shares out")
    busy = facts.load > 0.25 * facts.cores
    yield Finding(
        what="load",
        state="warn" if busy else "ok",
        says=f"{facts.load:.2f} processes wanted a core in the last minute",
        remedy="something else computes here: a run's processes will wait for each other (see top)" if busy else "",
    )


def services(facts: Facts, config: Config) -> Iterator[Finding]:
    """Loopback and ports, W&B, models, secrets in files."""
    yield Finding(
        what="loopback",
        state="ok" if facts.loopback else "fail",
        says="a free port of 127.0.0.1 answers" if facts.loopback else "no connection to a port of 127.0.0.1",
        remedy="" if facts.loopback else "ip link set lo up; processes of a run meet there",
    )
    if facts.proxy:
        yield Finding(
            what="proxy",
            state="warn",
            says=f"{facts.proxy} is set and no_proxy does not name 127.0.0.1",
            remedy="export no_proxy=127.0.0.1,localhost",
        )
    mode = config.tracking.mode
    if mode == "online" and not facts.wandb_key:
        yield Finding(
            what="W&B",
            state="fail",
            says="tracking.mode is online and there is no key",
            remedy="wandb login, or set WANDB_API_KEY; or --tracking.mode offline",
        )
    elif mode == "online" and not facts.wandb_answers:
        yield Finding(
            what="W&B",
            state="warn",
            says="tracking.mode is online and api.wandb.ai does not answer; a run keeps everything in RUN/wandb",
            remedy="see the network and its proxy, or --tracking.mode offline and `wandb sync` later",
        )
    else:
        key = "a key is there" if facts.wandb_key else "no key, and none is needed"
        yield Finding(what="W&B", state="ok", says=f"{mode}, {key}")
    yield _models(facts)
    for path, permissions in facts.secret_files.items():
        open_to_others = permissions & 0o077
        yield Finding(
            what="secrets",
            state="fail" if open_to_others else "ok",
            says=f"{path} has permissions {permissions:04o}",
            remedy=f"chmod 600 {path}: others can read it" if open_to_others else "",
        )


def _models(facts: Facts) -> Finding:
    if facts.base is None:
        where = "reachable" if facts.hub else "not reachable"
        return Finding(what="models", state="ok", says=f"models.base is not set; the Hugging Face hub is {where}")
    if facts.base_here:
        return Finding(what="models", state="ok", says=f"{facts.base} is here")
    return Finding(
        what="models",
        state="warn" if facts.hub else "fail",
        says=f"{facts.base} is not here" + (", and would be downloaded" if facts.hub else ", nor is the hub reachable"),
        remedy=f"huggingface-cli download {facts.base}, or name a folder in models.base",
    )
