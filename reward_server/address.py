"""Under which address a process can be reached by the others of its run."""

import ipaddress
import os
import socket

ADDRESS_VARIABLE = "RAYWARD_ADDRESS"
"""Environment variable with the address at which the other machines of the cluster reach this one."""


def own_address(loopback: bool) -> str:
    """127.0.0.1 when the whole run is on one machine, else as the environment says, else on the default route."""
    if loopback:
        return "127.0.0.1"
    if address := os.environ.get(ADDRESS_VARIABLE):
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 1))  # sends nothing, only picks a route
        return probe.getsockname()[0]


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def free_port(host: str) -> int:
    """A TCP port of `host` that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
