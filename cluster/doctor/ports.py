"""Who listens on the ports of a run and of Ray, for `rayward doctor`."""

import contextlib
from dataclasses import dataclass
from typing import Any

import psutil

from cluster.config.schema import Config

DASHBOARD = 8265
RAY_PORTS = {6379: "Ray's control service", DASHBOARD: "Ray's dashboard and jobs", 10001: "Ray Client"}
_LOOPBACK = ("127.", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A port that somebody may need."""

    number: int
    """from 1 on"""
    use: str
    """the setting that names it, or what Ray has there"""
    ours: bool
    """whether a run would listen there"""
    holder: str | None = None
    """which process listens there; None where nobody does"""
    everywhere: bool = False
    """whether other machines can reach it"""


def ports(config: Config) -> tuple[Port, ...]:
    """The ports of the settings, and Ray's own where somebody listens."""
    wanted = {config.serve.port: "serve.port", config.tracking.prometheus_port: "tracking.prometheus_port"}
    wanted.pop(0, None)
    try:
        found = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    except psutil.AccessDenied:
        found = []
    listening = {number: [one for one in found if _address(one)[1] == number] for number in (*wanted, *RAY_PORTS)}
    return tuple(
        Port(
            number=number,
            use=wanted.get(number) or RAY_PORTS[number],
            ours=number in wanted,
            holder=_name(there[0].pid) if there else None,
            everywhere=any(not _address(one)[0].startswith(_LOOPBACK) for one in there),
        )
        for number, there in listening.items()
        if there or number in wanted
    )


def _address(connection: Any) -> tuple[str, int]:
    """Where it listens; who listens has an address."""
    return connection.laddr


def _name(pid: int | None) -> str:
    """A process in words; whose it is may not be known."""
    with contextlib.suppress(psutil.Error):
        if pid is not None:
            return f"{psutil.Process(pid).name()} (pid {pid})"
    return "a process of somebody else"
