"""A cluster of several machines on this one: real raylets with addresses of their own, which ask for a token."""

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.authentication_test_utils import reset_auth_token_state
from ray.cluster_utils import Cluster

from cluster.runtime.orphans import SPAWNING, kill_marked

_HEALTH = {  # a machine that is gone is noticed in two seconds, not in a quarter of a minute
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "4",
    "RAY_raylet_start_wait_time_s": "90",
}


class Machines:
    """The machines of a cluster: 127.0.0.2, the head, 127.0.0.3 and so on."""

    def __init__(self, temp_dir: str) -> None:
        self._temp_dir = temp_dir
        self._cluster = Cluster(shutdown_at_exit=False)
        self._marks: dict[str, str] = {}

    @property
    def address(self) -> str:
        """Of the head's control service."""
        address = self._cluster.address
        assert address is not None, "no machine was added"
        return address

    def add(self, cpus: int) -> str:
        """Start a machine; its address."""
        own, name, value = f"127.0.0.{len(self._marks) + 2}", "RAYWARD_TEST_MACHINE", secrets.token_hex(8)
        self._marks[own] = f"{name}={value}"
        head = {} if len(self._marks) > 1 else {"include_dashboard": False, "temp_dir": self._temp_dir}
        with SPAWNING, pytest.MonkeyPatch.context() as environment:  # what the machine starts inherits the mark
            environment.setenv(name, value)
            self._cluster.add_node(node_ip_address=own, num_cpus=cpus, object_store_memory=2**27, **head)
        return own

    def remove(self, address: str) -> None:
        """Have a machine fail: all of its processes are gone at once."""
        assert not kill_marked(self._marks[address], within_s=20)

    def close(self) -> None:
        """End what is left."""
        for mark in reversed(self._marks.values()):
            kill_marked(mark, within_s=20)
        shutil.rmtree(self._temp_dir, ignore_errors=True)


@contextlib.contextmanager
def machines(folder: Path) -> Iterator[Machines]:
    """No machines as yet; this process is to join them with the token in `folder`, too."""
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), **_HEALTH}
    Path("/tmp/ray").mkdir(exist_ok=True)  # Cluster notes its address there, wherever its own files are
    with contextlib.ExitStack() as stack:
        stack.callback(reset_auth_token_state)  # last of all, however it ends: Ray keeps the token that it has read
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in settings.items():
            environment.setenv(name, value)
        reset_auth_token_state()  # Ray has read the environment when it was imported
        found = Machines(f"/tmp/r{secrets.token_hex(4)}")
        stack.callback(found.close)
        yield found
