"""Addresses under which others can reach this machine."""

import ipaddress
import socket

import pytest

from reward_server.address import free_port, own_address


def test_a_run_on_one_machine_stays_on_the_loopback():
    assert own_address(loopback=True) == "127.0.0.1"


def test_a_run_on_many_machines_uses_an_address_of_this_one():
    try:
        address = own_address(loopback=False)
    except OSError:
        pytest.skip("this machine has no network")
    assert ipaddress.ip_address(address).version == 4
    with socket.socket() as listener:  # only an address of one's own can be bound
        listener.bind((address, 0))


def test_a_free_port_can_be_bound_and_a_taken_one_is_not_given():
    port = free_port("127.0.0.1")
    assert 0 < port < 65536
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        assert port not in {free_port("127.0.0.1") for _ in range(20)}


def test_a_port_is_looked_for_at_the_address_that_is_given():
    with pytest.raises(OSError, match="assign requested address"):
        free_port("192.0.2.1")  # reserved for documentation: nobody's own
