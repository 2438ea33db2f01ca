"""Every condition injected, one at a time, into the facts of a machine in order."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import cli, doctor
from cluster.config import Config, TrackingConfig
from cluster.doctor import GIB, Finding, judge
from cluster.examination import Cluster, Facts

VERSIONS: dict[str, str | None] = {"torch": "2.13.0", "vllm": "0.32.0", "ray": "2.60.0"}
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
    cluster=Cluster(
        address="10.0.0.1:6379",
        machines="10.0.0.1 8 CPUs, 0 GPUs",
        ray_version="2.60.0",
        token=True,
        dashboard="127.0.0.1:8265",
    ),
)
BARE = replace(FINE, gpus=(), gpu_files=0, cuda_devices=0)
FOUND = FINE.cluster
assert FOUND is not None


def test_a_machine_in_order_has_nothing_to_fix():
    findings = list(judge(FINE, Config()))
    assert {finding.state for finding in findings} == {"ok"}
    assert not any(finding.remedy for finding in findings)
    assert {finding.state for finding in judge(BARE, Config())} == {"ok"}


@pytest.mark.parametrize(
    ("facts", "what", "state", "said"),
    [
        ({"python": "3.12.1"}, "python", "fail", "3.12.1, and Rayward is for 3.11"),
        ({"versions": VERSIONS | {"vllm": None}}, "packages", "fail", "not installed: vllm"),
        ({"versions": VERSIONS | {"torch": "2.12.0"}}, "packages", "warn", "torch 2.12.0 (locked: 2.13.0)"),
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


def test_the_exit_code_says_whether_something_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr(doctor, "examine", lambda config, run_dir: replace(FINE, loopback=False))
    assert cli.main(["doctor", "--run", str(tmp_path / "run")]) == 1
    text = capsys.readouterr().out
    assert "fail loopback: no connection to a port of 127.0.0.1\n     ip link set lo up" in text
    monkeypatch.setattr(doctor, "examine", lambda config, run_dir: replace(FINE, load=3.0))
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True
    assert Finding(**next(one for one in found["findings"] if one["what"] == "load")).state == "warn"
    assert not (tmp_path / "run").exists()
