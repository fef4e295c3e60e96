"""Upstreams from the text of a configuration, and scripts of the proxies that they lead to."""

from __future__ import annotations

import socket
from typing import Any, Callable

import pytest

from netproxy.config.schema import UpstreamConfig
from netproxy.dialer.group import GroupDialer
from netproxy.dialer.member import Member
from netproxy.errors import DialError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.routing import Dialer
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.protocol import socks5
from tests.config.test_read import read
from tests.support.doubles import Counts, Lines
from tests.support.flows import tcp_to, udp_to
from tests.support.sockets import read_exactly, read_to_end

TARGET = Address("198.51.100.7", 443)
HELLO = (b"\x05\x01\x00", b"\x05\x00")
"""What a SOCKS5 client without a login sends, and the answer."""
BOUND = b"\x00\x00\x01\x0a\x00\x00\x01\x1f\x90"
"""What follows the version in a SOCKS5 reply that grants a request."""


def upstreams_of(text: str) -> dict[str, UpstreamConfig]:
    """Return the upstreams of a configuration by name; `text` is the inside of `upstreams`."""
    return read(f"upstreams: {{{text}}}").upstreams


def default_of(text: str, more: str = "") -> UpstreamConfig:
    """Return the default upstream of a configuration; `more` is the rest of the file."""
    return read(f"default: {text}\n{more}").default


def group_of(dialer: Dialer) -> GroupDialer:
    """Return the group that an upstream ends in."""
    while isinstance(dialer, Member):
        dialer = dialer.dialer
    assert isinstance(dialer, GroupDialer)
    return dialer


def members_of(dialer: Dialer) -> dict[str, Member]:
    """Return the members of the group that an upstream ends in, by name."""
    return {member.name: member for member in group_of(dialer).members}


def failure(dialer: Dialer, target: Address = TARGET) -> DialError:
    """Dial and return the error."""
    with pytest.raises(DialError) as caught:
        dialer.dial(tcp_to(target)).close()
    return caught.value


def send(conn: Any, target: Address) -> None:
    """Send the datagram b"query"."""
    arena = UdpSocketFactory(Counts(), Lines()).arena()
    conn.send(arena, arena.put(b"query"), conn.prepare(udp_to(target)))


def connect(target: Address) -> bytes:
    """Return a SOCKS5 CONNECT request."""
    return socks5.encode_request(socks5.CONNECT, target)


def play(*steps: bytes) -> Callable[[socket.socket], None]:
    """Return a script: in turn, what the client must send and what it gets."""

    def script(sock: socket.socket) -> None:
        for number, data in enumerate(steps):
            if number % 2:
                sock.sendall(data)
            else:
                assert read_exactly(sock, len(data)) == data
        read_to_end(sock)

    return script


def granting(*targets: Address) -> Callable[[socket.socket], None]:
    """Return the script of a chain of SOCKS5 proxies.

    Each grants a connection to the next of `targets`.
    """
    return play(
        *(step for target in targets for step in (*HELLO, connect(target), b"\x05" + BOUND))
    )
