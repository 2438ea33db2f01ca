"""What is found of services on a machine that was made up for it."""

import os
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from cluster.config.schema import Config, ServeConfig, TrackingConfig
from cluster.doctor import services
from cluster.doctor.services import asks_for_token
from tests.model_folders import model_folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("WANDB_API_KEY", "RAYWARD_REWARD_TOKEN", "RAY_AUTH_TOKEN_PATH", "HF_TOKEN_PATH", "no_proxy", "NO_PROXY")
    for name in (*names, "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "RAYWARD_REWARD_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(services, "_reaches", lambda host: True)
    return tmp_path


def test_a_proxy_before_the_loopback_is_told(monkeypatch: pytest.MonkeyPatch):
    assert [one.state for one in services.loopback()] == ["ok"]
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "example.org")
    _, found = services.loopback()
    assert (found.what, found.state, "http_proxy is set" in found.says) == ("proxy", "warn", True)
    monkeypatch.setenv("no_proxy", "localhost, 127.0.0.1")
    assert [one.state for one in services.loopback()] == ["ok"]


def test_no_loopback_is_a_failure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    (found,) = services.loopback()
    assert found.state == "fail"
    assert found.remedy.startswith("ip link")


def test_a_key_matters_online_alone_and_is_never_shown(home: Path, monkeypatch: pytest.MonkeyPatch):
    assert services.wandb("offline").state == "ok"
    assert services.wandb("online").state == "fail"
    (home / ".netrc").write_text("machine api.wandb.ai login user password canary-key\n")
    (home / ".netrc").chmod(0o640)
    assert services.wandb("online").state == "ok"
    (found,) = services.secrets()
    assert (found.state, found.says) == ("fail", f"{home}/.netrc has permissions 0640")
    assert "canary" not in repr(services.wandb("online")) + repr(found)
    (home / ".netrc").chmod(0o600)
    assert [one.state for one in services.secrets()] == ["ok"]
    monkeypatch.setattr(services, "_reaches", lambda host: False)
    assert services.wandb("online").state == "warn"
    assert services.wandb("offline").state == "ok"


def test_a_model_is_here_or_cannot_be_had(home: Path, monkeypatch: pytest.MonkeyPatch):
    assert services.models(None).state == "ok"
    assert services.models(str(model_folder(home / "model"))).state == "ok"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = services.models("some/model")
    assert (found.state, found.remedy[:16]) == ("fail", "Give models.base")
    assert found.says == "models.base = some/model is not in the local cache, and HF_HUB_OFFLINE is set"


def test_who_listens_on_a_port_of_the_settings_is_told():
    with socket.socket() as server, socket.socket() as other:
        server.bind(("127.0.0.1", 0))
        server.listen()
        free, taken = other, server.getsockname()[1]
        free.bind(("127.0.0.1", 0))
        config = Config(serve=ServeConfig(port=taken), tracking=TrackingConfig(prometheus_port=free.getsockname()[1]))
        first, second, *_ = services.ports(config)
    assert (first.what, first.state) == (f"port {taken}", "warn")
    assert first.says.startswith("serve.port: ")
    assert f"(pid {os.getpid()}) listens there" in first.says
    assert (second.state, second.says) == ("ok", "tracking.prometheus_port: free")


@pytest.mark.parametrize(
    ("host", "token", "states"),
    [("0.0.0.0", False, ["fail"]), ("0.0.0.0", True, ["ok"]), ("127.0.0.1", False, [])],
)
def test_a_dashboard_open_to_all_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, host: str, token: bool, states: list[str]
):
    with socket.socket() as server:
        server.bind((host, 0))
        server.listen()
        port = server.getsockname()[1]
        monkeypatch.setattr(services, "_DASHBOARD", port)
        monkeypatch.setattr(services, "asks_for_token", lambda dashboard: token)
        found = [one for one in services.ports(Config()) if one.what == f"port {port}"]
    assert [one.state for one in found] == states
    assert all("for other machines too" in one.says for one in found)


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
