"""Checks of what a run talks to: the loopback, ports, W&B, the model hub; and of files that hold secrets."""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster.config.schema import Config
from cluster.doctor.finding import Finding, judge
from cluster.rundir.inputs import check_base
from reward_server.redaction import secret_files

_DASHBOARD = 8265
_HUB_S = 3.0


def loopback() -> Iterator[Finding]:
    """Whether processes can meet at 127.0.0.1, and no proxy is in between."""
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            socket.create_connection(server.getsockname(), timeout=2).close()
        yield Finding("loopback", "a free port of 127.0.0.1 answers")
    except OSError:
        remedy = "ip link set lo up; processes of a run meet there"
        yield Finding("loopback", "no connection to a port of 127.0.0.1", remedy, "fail")
    exempt = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    proxies = [name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if os.environ.get(name)]
    if proxies and not any(host.strip() in ("*", "127.0.0.1") for host in exempt.split(",")):
        says = f"{proxies[0]} is set and no_proxy does not name 127.0.0.1"
        yield Finding("proxy", says, "export no_proxy=127.0.0.1,localhost", "warn")


def wandb(mode: str) -> Finding:
    """Whether W&B has a key, and answers, where something is sent to it."""
    netrc = Path.home() / ".netrc"
    stored = netrc.is_file() and "api.wandb.ai" in netrc.read_text(encoding="utf-8", errors="replace")
    key = bool(stored or os.environ.get("WANDB_API_KEY"))
    if mode == "online" and not key:
        remedy = "wandb login, or set WANDB_API_KEY; or --tracking.mode offline"
        return Finding("W&B", "tracking.mode is online and there is no key", remedy, "fail")
    if mode == "online" and not _reaches("api.wandb.ai"):
        says = "tracking.mode is online and api.wandb.ai does not answer; a run keeps everything in RUN/wandb"
        remedy = "see the network and its proxy, or --tracking.mode offline and `wandb sync` later"
        return Finding("W&B", says, remedy, "warn")
    return Finding("W&B", f"{mode}, {'a key is there' if key else 'no key, and none is needed'}")


def models(base: str | None) -> Finding:
    """Whether models.base is a folder, or in the local cache, or can be downloaded."""
    if base is None:
        return Finding("models", "models.base is not set")
    try:
        check_base(base)
    except ValueError as error:
        says, _, remedy = str(error).partition(". ")
        return Finding("models", says, remedy, "fail")
    return Finding("models", f"{base} is here, or can be downloaded")


def _reaches(host: str) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((host, 443), timeout=_HUB_S).close()
        return True
    return False


def secrets() -> Iterator[Finding]:
    """Permissions of the files in which tokens and keys are kept, where they are there; never what is in them."""
    for path in filter(Path.is_file, (*secret_files(), Path.home() / ".netrc")):
        mode = stat.S_IMODE(path.stat().st_mode)
        says, remedy = f"{path} has permissions {mode:04o}", f"chmod 600 {path}: others can read it"
        yield judge("secrets", says, remedy, fail=bool(mode & 0o077))


def ports(config: Config) -> Iterator[Finding]:
    """Who listens on the ports of the settings, and whether Ray's dashboard is open to other machines."""
    listening: dict[int, list[Any]] = {}
    with contextlib.suppress(psutil.AccessDenied):
        connections: Any = psutil.net_connections("tcp")
        for one in connections:
            if one.status == psutil.CONN_LISTEN:
                listening.setdefault(one.laddr.port, []).append(one)
    wanted = {config.serve.port: "serve.port", config.tracking.prometheus_port: "tracking.prometheus_port"}
    for number, use in wanted.items():
        if number:
            taken = listening.get(number)
            says = f"{use}: {_process(taken[0].pid)} listens there" if taken else f"{use}: free"
            yield judge(f"port {number}", says, f"--{use} with another number, or end that process", warn=bool(taken))
    for one in listening.get(_DASHBOARD, []):
        if not one.laddr.ip.startswith(("127.", "::1")):
            says = f"Ray's dashboard: {_process(one.pid)} listens there for other machines too"
            remedy = "whoever reaches it can run anything: RAY_AUTH_MODE=token wherever Ray starts, and ray start "
            remedy += "--dashboard-host 127.0.0.1"
            yield judge(f"port {_DASHBOARD}", says, remedy, fail=not asks_for_token(f"127.0.0.1:{_DASHBOARD}"))


def _process(pid: int | None) -> str:
    """A process in words; whose it is may not be known."""
    with contextlib.suppress(psutil.Error):
        if pid is not None:
            return f"{psutil.Process(pid).name()} (pid {pid})"
    return "a process of somebody else"


def asks_for_token(dashboard: str | None) -> bool:
    """Whether the dashboard, which the whole cluster's setting holds for, refuses a call without a token.

    Without a dashboard: whether this process had to show a token, as a cluster refuses one that has another mode.
    """
    if not dashboard:
        return os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"
    with contextlib.suppress(httpx.HTTPError):
        answer = httpx.get(f"http://{dashboard}/api/jobs/", timeout=5.0, trust_env=False)
        return answer.status_code in (401, 403)
    return False
