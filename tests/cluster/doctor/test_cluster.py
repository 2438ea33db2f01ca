"""What is found of a cluster; tests/cluster/runtime/test_placement.py looks at one of several machines."""

from pathlib import Path
from typing import Any

import pytest

from cluster.doctor import cluster as module
from cluster.doctor.cluster import cluster, differences
from cluster.doctor.machine import PACKAGES

HERE: dict[str, Any] = {
    "python": "3.11.9",
    "versions": dict.fromkeys(PACKAGES, "1.0"),
    "code": True,
    "run_dir": True,
    "loopback": False,
}


def test_a_cluster_that_does_not_answer_is_an_error_in_words(tmp_path: Path):
    (found,) = cluster("127.0.0.1:1", tmp_path)
    assert (found.what, found.state) == ("cluster", "fail")
    assert "no Ray cluster answers at 127.0.0.1:1" in found.says


@pytest.mark.parametrize(
    ("token", "dashboard", "states"),
    [
        (True, "127.0.0.1:8265", {"token authentication": "ok", "dashboard": "ok"}),
        (False, "0.0.0.0:8265", {"token authentication": "fail", "dashboard": "warn"}),
        (True, None, {"token authentication": "ok"}),
    ],
)
def test_a_cluster_should_ask_for_a_token_and_hide_its_dashboard(
    monkeypatch: pytest.MonkeyPatch, token: bool, dashboard: str | None, states: dict[str, str]
):
    monkeypatch.setattr(module, "cluster_nodes", list)
    monkeypatch.setattr(module, "asks_for_token", lambda _: token)
    found = {one.what: one for one in module._head("10.0.0.1:6379", dashboard)}
    assert {what: one.state for what, one in found.items()} == {"cluster": "ok", **states}
    assert all(one.remedy for one in found.values() if one.state != "ok")


def test_a_machine_alone_may_be_called_loopback_and_another_patch_release_of_python_will_do():
    assert not [*differences("at a", HERE, HERE | {"python": "3.11.4", "loopback": True}, alone=True)]
    cpu = {f"{name}-cpu" if name == "vllm" else name: "1.0" for name in PACKAGES}
    assert not [*differences("at a", HERE, HERE | {"versions": cpu}, alone=False)]


@pytest.mark.parametrize(
    ("changes", "state", "said"),
    [
        ({"python": "3.12.1"}, "fail", "python 3.12.1 (3.11.9 here)"),
        ({"versions": dict.fromkeys(PACKAGES[:-1], "1.0")}, "fail", "wandb missing (1.0 here)"),
        ({"code": False}, "fail", "code is not there"),
        ({"run_dir": False}, "warn", "run directory is not there"),
        ({"loopback": True}, "warn", "loopback"),
    ],
)
def test_each_difference_is_found_alone_and_has_a_remedy(changes: dict[str, Any], state: str, said: str):
    (found,) = differences("at a", HERE, HERE | changes, alone=False)
    assert (found.what, found.state) == ("at a", state)
    assert said in found.says
    assert found.remedy
