"""Every condition injected, one at a time, into the facts of a machine in order."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main as cli
from cluster.config.schema import Config, TrackingConfig
from cluster.doctor.doctor import GIB, Finding, doctor, judge
from cluster.doctor.examination import Cluster, Facts
from cluster.doctor.ports import Port
from cluster.doctor.survey import Surveyed

VERSIONS: dict[str, str | None] = {"torch": "2.13.0", "vllm": "0.32.0", "ray": "2.60.0"}
SURVEYED = Surveyed(
    name="10.0.0.1", python="3.11.4", versions=(("torch", "2.13.0"), ("vllm", "0.32.0"), ("ray", "2.60.0"))
)
FOUND = Cluster(
    address="10.0.0.1:6379",
    machines="10.0.0.1 8 CPUs, 0 GPUs",
    ray_version="2.60.0",
    token=True,
    dashboard="127.0.0.1:8265",
    surveyed=(SURVEYED,),
)
FINE = Facts(
    python="3.11.9",
    versions=VERSIONS,
    locked={"torch": "2.13.0", "vllm": "0.32.0", "ray": "2.60.0"},
    gpus=("NVIDIA H100, 81559 MiB, 570.1",),
    gpu_files=1,
    cuda_devices=1,
    disks={name: (Path("/somewhere"), 50 * GIB) for name in ("the run directory", "/tmp", "/dev/shm")},
    memory=24 * GIB,
    memory_free=20 * GIB,
    open_files=65_536,
    cores=4,
    threads={"OMP_NUM_THREADS": None},
    load=0.1,
    loopback=True,
    proxy=None,
    wandb_key=True,
    base=None,
    base_here=False,
    hub=True,
    secret_files={Path("/home/me/.ray/auth_token"): 0o600},
    processes=100_000,
    run_disk="ext4",
    wandb_answers=True,
    ports=(
        Port(number=8700, use="serve.port", ours=True),
        Port(number=8265, use="Ray's dashboard", ours=False, holder="python (pid 7)"),
    ),
    dashboard_open=False,
    cluster=FOUND,
)
BARE = replace(FINE, gpus=(), gpu_files=0, cuda_devices=0)


BUSY = Port(number=8700, use="serve.port", ours=True, holder="node (pid 3)")
OPEN = Port(number=8265, use="Ray's dashboard", ours=False, holder="python (pid 7)", everywhere=True)


def machines(second: bool = False, **changes: Any) -> dict[str, Any]:
    """A cluster of a machine with these changes, and of one more that is in order; shared storage for two."""
    found = (SURVEYED, replace(SURVEYED, **changes)) if second else (replace(SURVEYED, **changes),)
    return {"cluster": replace(FOUND, surveyed=found), "run_disk": "nfs4"}


def test_a_machine_in_order_has_nothing_to_fix():
    findings = list(judge(FINE, Config()))
    assert {finding.state for finding in findings} == {"ok"}
    assert not any(finding.remedy for finding in findings)
    assert {finding.state for finding in judge(BARE, Config())} == {"ok"}


@pytest.mark.parametrize(
    ("facts", "what", "state", "said"),
    [
        ({"python": "3.12.1", "cluster": None}, "python", "fail", "3.12.1, and Rayward is for 3.11"),
        ({"versions": VERSIONS | {"vllm": None}, "cluster": None}, "packages", "fail", "not installed: vllm"),
        (
            {"versions": VERSIONS | {"torch": "2.12.0"}, "cluster": None},
            "packages",
            "warn",
            "torch 2.12.0 (locked: 2.13.0)",
        ),
        ({"gpus": ()}, "GPUs", "fail", "nvidia-smi does not answer"),
        ({"cuda_devices": 0}, "GPUs", "fail", "of which torch 2.13.0 can use 0"),
        ({"disks": {"/dev/shm": (Path("/dev/shm"), 2**26)}}, "disk of /dev/shm", "fail", "0.1 GiB free"),
        ({"disks": {"/tmp": (Path("/tmp"), 2 * GIB)}}, "disk of /tmp", "warn", "2.0 GiB free in /tmp"),
        ({"memory_free": GIB}, "memory", "fail", "1.0 of 24.0 GiB"),
        ({"memory_free": 9 * GIB}, "memory", "warn", "9.0 of 24.0 GiB"),
        ({"open_files": 1024}, "open files", "fail", "1,024"),
        ({"open_files": 20_000}, "open files", "warn", "20,000"),
        ({"threads": {"OMP_NUM_THREADS": "64"}}, "threads", "warn", "OMP_NUM_THREADS=64 on 4 cores"),
        ({"load": 3.0}, "load", "warn", "3.00 processes"),
        ({"loopback": False}, "loopback", "fail", "no connection"),
        ({"proxy": "http_proxy"}, "proxy", "warn", "http_proxy is set"),
        ({"base": "some/model", "hub": False}, "models", "fail", "nor is the hub reachable"),
        ({"base": "some/model"}, "models", "warn", "would be downloaded"),
        ({"secret_files": {Path("/k"): 0o644}}, "secrets", "fail", "/k has permissions 0644"),
        ({"cluster": Cluster(address="x:1", error="no Ray cluster answers at x:1")}, "cluster", "fail", "no Ray"),
        ({"cluster": replace(FOUND, ray_version="2.59.0")}, "Ray there", "fail", "2.59.0, and 2.60.0 here"),
        ({"cluster": replace(FOUND, token=False)}, "token authentication", "fail", "can run anything"),
        ({"cluster": replace(FOUND, dashboard="0.0.0.0:8265")}, "dashboard", "warn", "other machines can reach"),
        ({"processes": 1024}, "processes", "warn", "1,024, threads included"),
        ({"ports": (BUSY,)}, "port 8700", "warn", "serve.port: node (pid 3) listens there"),
        ({"ports": (OPEN,), "dashboard_open": True}, "port 8265", "fail", "asks for no token"),
        (machines(error="no answer within 30 s"), "at 10.0.0.1", "fail", "no answer"),
        (machines(python="3.12.1"), "at 10.0.0.1", "fail", "python 3.12.1 (3.11.9 here)"),
        (machines(versions=SURVEYED.versions[:2]), "at 10.0.0.1", "fail", "ray missing (2.60.0 here)"),
        (machines(code=False), "at 10.0.0.1", "fail", "code is not there"),
        (machines(run_dir=False), "at 10.0.0.1", "warn", "run directory is not there"),
        (machines(clock_s=-61.0), "at 10.0.0.1", "warn", "-61 s"),
        (machines(name="10.0.0.2", loopback_name=True, second=True), "at 10.0.0.2", "warn", "loopback"),
        (machines(second=True) | {"run_disk": "ext4"}, "run directory", "warn", "on a disk of this machine (ext4)"),
    ],
)
def test_each_condition_is_found_alone_and_has_a_remedy(facts: dict[str, Any], what: str, state: str, said: str):
    (finding,) = (one for one in judge(replace(FINE, **facts), Config()) if one.state != "ok")
    assert (finding.what, finding.state) == (what, state)
    assert said in finding.says
    assert finding.remedy


def test_a_missing_key_matters_online_alone():
    without = replace(FINE, wandb_key=False)
    assert {finding.state for finding in judge(without, Config())} == {"ok"}
    online = Config(tracking=TrackingConfig(mode="online"))
    (finding,) = (one for one in judge(without, online) if one.state != "ok")
    assert (finding.what, finding.state) == ("W&B", "fail")
    (finding,) = (one for one in judge(replace(FINE, wandb_answers=False), online) if one.state != "ok")
    assert (finding.what, finding.state) == ("W&B", "warn")


def test_the_exit_code_says_whether_something_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr(doctor, "examine", lambda config, run_dir: replace(FINE, loopback=False))
    assert cli.main(["doctor", "--run", str(tmp_path / "run")]) == 1
    text = capsys.readouterr().out
    lines = [line.split(None, 2) for line in text.splitlines()]
    assert ["fail", "loopback", "no connection to a port of 127.0.0.1"] in lines
    assert text.splitlines()[lines.index(["fail", "loopback", "no connection to a port of 127.0.0.1"]) + 1].strip() == (
        "ip link set lo up; processes of a run meet there"
    )
    monkeypatch.setattr(doctor, "examine", lambda config, run_dir: replace(FINE, load=3.0))
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True
    assert Finding(**next(one for one in found["findings"] if one["what"] == "load")).state == "warn"
    assert not (tmp_path / "run").exists()
