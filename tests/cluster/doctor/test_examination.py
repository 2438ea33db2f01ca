"""What is found on a machine that was made up for it."""

import json
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from cluster.config.schema import ClusterConfig, Config, ModelsConfig
from cluster.doctor.examination import PACKAGES, asks_for_token, examine, locked_versions


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "RAYWARD_REWARD_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("cluster.doctor.examination._HUB_S", 0.01)
    return tmp_path


def test_keys_are_found_and_never_shown(home: Path, monkeypatch: pytest.MonkeyPatch):
    assert not examine(Config(), home / "run").wandb_key
    monkeypatch.setenv("WANDB_API_KEY", "canary-key")
    monkeypatch.setenv("RAYWARD_REWARD_TOKEN", "canary-token")
    found = examine(Config(), home / "run")
    assert found.wandb_key
    assert "canary" not in repr(found)
    monkeypatch.delenv("WANDB_API_KEY")
    (home / ".netrc").write_text("machine api.wandb.ai login user password canary-key\n")
    (home / ".netrc").chmod(0o640)
    found = examine(Config(), home / "run")
    assert found.wandb_key
    assert found.secret_files == {home / ".netrc": 0o640}
    assert "canary" not in repr(found)


def test_the_machine_is_as_it_is(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "example.org")
    (home / "model").mkdir()
    (home / "model" / "config.json").write_text(json.dumps({}))
    found = examine(Config(models=ModelsConfig(base=str(home / "model"))), home / "a" / "b")
    assert found.loopback
    assert found.base_here
    assert found.proxy == "http_proxy"
    assert found.threads["OMP_NUM_THREADS"] == "64"
    assert found.disks["the run directory"][0] == home  # the first folder above that exists
    assert 0 < found.memory_free <= found.memory
    assert found.cores >= 1
    assert found.load == pytest.approx(os.getloadavg()[0], abs=1)
    assert found.cluster is None
    monkeypatch.setenv("no_proxy", "localhost, 127.0.0.1")
    assert examine(Config(), home).proxy is None


def test_installed_versions_are_those_of_the_lock(home: Path):
    found = examine(Config(), home)
    assert found.versions.keys() == set(PACKAGES)
    assert found.locked == locked_versions()
    assert {name: found.versions[name] for name in found.locked} == found.locked
    assert locked_versions(home) == {}


def test_a_cluster_that_does_not_answer_is_an_error_in_words(home: Path):
    found = examine(Config(cluster=ClusterConfig(address="127.0.0.1:1")), home).cluster
    assert found is not None
    assert "no Ray cluster answers at 127.0.0.1:1" in (found.error or "")


@pytest.mark.parametrize(("status", "asks"), [(401, True), (403, True), (200, False)])
def test_a_dashboard_without_a_token_is_told_by_its_answer(status: int, asks: bool):
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        Thread(target=server.handle_request, daemon=True).start()
        assert asks_for_token(f"127.0.0.1:{server.server_port}") is asks


def test_without_a_dashboard_the_mode_of_this_process_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert not asks_for_token(None)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert asks_for_token(None)
