import os
import socket

from cluster.config.schema import Config, ServeConfig, TrackingConfig
from cluster.doctor.ports import Port, ports


def test_who_listens_on_a_port_of_the_settings_is_told():
    with socket.socket() as server, socket.socket() as other:
        server.bind(("127.0.0.1", 0))
        server.listen()
        other.bind(("0.0.0.0", 0))
        other.listen()
        here, everywhere = server.getsockname()[1], other.getsockname()[1]
        config = Config(serve=ServeConfig(port=here), tracking=TrackingConfig(prometheus_port=everywhere))
        first, second = (one for one in ports(config) if one.ours)
    assert (first.number, first.use, first.everywhere) == (here, "serve.port", False)
    assert first.holder is not None
    assert first.holder.endswith(f"(pid {os.getpid()})")
    assert (second.number, second.use, second.everywhere) == (everywhere, "tracking.prometheus_port", True)


def test_a_free_port_has_no_holder_and_port_0_is_none():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        free = server.getsockname()[1]
    found = [one for one in ports(Config(serve=ServeConfig(port=free))) if one.ours]
    assert found == [Port(number=free, use="serve.port", ours=True)]
