"""What `rayward doctor` says of ports and of a cluster."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.doctor.examination import Cluster
from cluster.doctor.ports import DASHBOARD, Port
from cluster.doctor.survey import Surveyed

_CLOCK_S = 5.0
_LOCAL_DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line."""

    what: str
    """what was looked at"""
    state: Literal["ok", "warn", "fail"]
    """fail: a run would not work; warn: it would be slow, or break later"""
    says: str
    """what was found"""
    remedy: str = ""
    """what to do; empty where all is well"""


def listeners(ports: Sequence[Port], open_dashboard: bool) -> Iterator[Finding]:
    """Ports that a run needs and does not get, and those of Ray."""
    for port in ports:
        what, taken = f"port {port.number}", f"{port.use}: {port.holder} listens there"
        if port.holder is None:
            yield Finding(what=what, state="ok", says=f"{port.use}: free")
        elif port.ours:
            yield Finding(
                what=what, state="warn", says=taken, remedy=f"--{port.use} with another number, or end that process"
            )
        elif port.number == DASHBOARD and open_dashboard and port.everywhere:
            yield Finding(
                what=what,
                state="fail",
                says=f"{taken} for other machines too, and asks for no token: whoever reaches it can run anything",
                remedy="RAY_AUTH_MODE=token wherever Ray starts, and ray start --dashboard-host 127.0.0.1",
            )
        else:
            reach = "for other machines too" if port.everywhere else "for this machine alone"
            yield Finding(what=what, state="ok", says=f"{taken}, {reach}")


def cluster(found: Cluster, own: Mapping[str, str | None], python: str, run_disk: str) -> Iterator[Finding]:
    """A running Ray cluster; `own`, `python` and `run_disk` are this machine's versions and file system."""
    if found.error is not None:
        yield Finding(what="cluster", state="fail", says=found.error, remedy="start it, or correct cluster.address")
        return
    yield Finding(what="cluster", state="ok", says=f"{found.address}: {found.machines}")
    same = found.ray_version == own.get("ray")
    yield Finding(
        what="Ray there",
        state="ok" if same else "fail",
        says=f"{found.ray_version}, and {own.get('ray')} here" if not same else str(found.ray_version),
        remedy="" if same else "install the same environment on every machine",
    )
    yield Finding(
        what="token authentication",
        state="ok" if found.token else "fail",
        says="on" if found.token else "off: whoever reaches the cluster can run anything on it",
        remedy="" if found.token else "ray get-auth-token --generate; RAY_AUTH_MODE=token wherever Ray starts",
    )
    if found.dashboard is not None:
        inside = found.dashboard.rpartition(":")[0] in ("127.0.0.1", "localhost", "::1", "[::1]")
        yield Finding(
            what="dashboard",
            state="ok" if inside else "warn",
            says=f"at {found.dashboard}" + ("" if inside else ", which other machines can reach"),
            remedy=""
            if inside
            else "ray start --dashboard-host 127.0.0.1, and ssh -L 8265:127.0.0.1:8265 from elsewhere",
        )
    for machine in found.surveyed:
        yield from _machine(machine, own, python, alone=len(found.surveyed) == 1)
    if len(found.surveyed) > 1 and run_disk in _LOCAL_DISKS:
        yield Finding(
            what="run directory",
            state="warn",
            says=f"on a disk of this machine ({run_disk}), and the cluster has {len(found.surveyed)}",
            remedy="--run DIR on storage that all of them see, else checkpoints of several machines are not whole",
        )


def _machine(found: Surveyed, own: Mapping[str, str | None], python: str, alone: bool) -> Iterator[Finding]:
    """One of its machines; all that is wrong there."""
    what = f"at {found.name}"
    if found.error is not None:
        yield Finding(what=what, state="fail", says=found.error, remedy="see its raylet's logs: `ray logs` on the head")
        return
    theirs = dict(found.versions)
    other = [
        f"{name} {theirs.get(name, 'missing')} ({version} here)"
        for name, version in own.items()
        if version != theirs.get(name)
    ]
    if found.python.rpartition(".")[0] != python.rpartition(".")[0]:
        other.insert(0, f"python {found.python} ({python} here)")
    wrong = []
    if other:
        wrong.append(
            ("fail", ", ".join(other), "install the same environment on every machine: make setup, or the image")
        )
    if not found.code:
        wrong.append(
            ("fail", "Rayward's code is not there", "have the checkout at the same path, or use rayward submit")
        )
    if not found.run_dir:
        wrong.append(("warn", "the run directory is not there", "--run DIR on storage that every machine sees"))
    if found.loopback_name and not alone:
        wrong.append(
            (
                "warn",
                "its host name is the loopback's, where gloo would listen",
                "export GLOO_SOCKET_IFNAME=eth0, or its name there, before `ray start`",
            )
        )
    if abs(found.clock_s) > _CLOCK_S:
        wrong.append(
            (
                "warn",
                f"its clock is {found.clock_s:+.0f} s from this one's",
                "chronyc makestep, or another time service",
            )
        )
    for state, says, remedy in wrong:
        yield Finding(what=what, state=state, says=says, remedy=remedy)
    if not wrong:
        yield Finding(what=what, state="ok", says=f"python {found.python}, the same packages, and the code")
