"""Who may connect, in whole daemons: every entrance agrees, and each record names what decides."""

from __future__ import annotations

import socket
from typing import Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol.proxy_protocol import encode_v2
from tests.support.handlers import LOCALHOST, SECONDS, eventually
from tests.support.relays import Running, UdpClient, UdpPort, running

KEYS = "clients: [127.0.0.0/8, '!127.0.9.0/24'], clients_deny: [127.0.0.66]"
GREETING = b"\5\1\0"
REFUSED = "client not allowed"
# The source of a client, and the key that refuses it.
SOURCES = {"127.0.0.1": "", "127.0.9.1": "clients", "127.0.0.66": "clients_deny"}


def decided(relay: Running) -> list[tuple[str, str]]:
    """Return the client and what has decided, of each recorded refusal."""
    lines = [line for line in relay.log.lines if line.startswith("msg=refused")]
    fields = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
    return [(field["client"], field["decided"]) for field in fields]


def greets(port: int, source: str, before: bytes = b"") -> bool:
    """Return whether a SOCKS5 greeting from an address is answered."""
    with socket.create_connection((LOCALHOST, port), SECONDS, (source, 0)) as client:
        try:
            client.sendall(before + GREETING)
            return bool(client.recv(1))
        except ConnectionError:
            return False


@pytest.fixture
def target() -> Iterator[UdpPort]:
    with UdpPort() as port:
        yield port


def test_connections_are_refused_by_the_key_that_decides() -> None:
    with running(f"listeners: [{{listen: '127.0.0.1:0', {KEYS}}}]") as relay:
        for source, key in SOURCES.items():
            assert greets(relay.port, source) == (not key)
        eventually(lambda: relay.count("connections_refused", REFUSED) == 2)
        assert decided(relay) == [(source, key) for source, key in SOURCES.items() if key]


def test_datagrams_to_a_fixed_target_are_refused_by_the_key_that_decides(target: UdpPort) -> None:
    text = f"protocol: udp, listen: '127.0.0.1:0', target: '{target.address}', {KEYS}"
    with running(f"listeners: [{{{text}}}]") as relay:
        (entrance,) = [listener.address for listener in relay.daemon._manager.listeners]
        for source, key in SOURCES.items():
            with UdpPort(source) as client:
                client.send(source.encode(), entrance)
                if not key:
                    target.expect(source.encode())
        relay.wait_for_count("drops", REFUSED, 2)
        assert target.silent()
        assert decided(relay) == [(source, key) for source, key in SOURCES.items() if key]


@pytest.mark.parametrize(
    "source, key", [("10.1.2.3", ""), ("10.1.9.1", "clients"), ("10.1.2.66", "clients_deny")]
)
def test_client_of_a_header_is_refused_by_the_key_that_decides(source: str, key: str) -> None:
    """The proxy itself may connect, whatever the keys say of it."""
    keys = "clients: [10.1.0.0/16, '!10.1.9.0/24'], clients_deny: [10.1.2.66, 127.0.0.0/8]"
    text = f"listen: '127.0.0.1:0', proxy_protocol: [127.0.0.1], {keys}"
    header = encode_v2(Address(source, 1), Address("10.9.9.9", 2))
    with running(f"listeners: [{{{text}}}]") as relay:
        assert greets(relay.port, LOCALHOST, header) == (not key)
        eventually(lambda: relay.count("connections_refused", REFUSED) == bool(key))
        assert decided(relay) == ([(source, key)] if key else [])


def test_reload_that_denies_a_client_forbids_its_new_targets(target: UdpPort) -> None:
    text = "listeners: [{listen: '127.0.0.1:0'%s}]\ndestinations: {deny: []}"
    with running(text % "") as relay, UdpClient(relay.port) as client, UdpPort() as new:
        seen = client.check_echo(target)
        relay.reload(text % ", clients_deny: [127.0.0.1]")
        client.to(new.address, b"forbidden")
        relay.wait_for_count("drops", REFUSED, 1)
        assert new.silent() and client.check_echo(target) == seen
        assert decided(relay) == [("127.0.0.1", "clients_deny")]
        assert not greets(relay.port, LOCALHOST) and greets(relay.port, "127.0.0.2")
