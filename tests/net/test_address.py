"""Addresses and networks: conversions, and questions about a literal address."""

from __future__ import annotations

import errno
import os

import socket
from typing import Any

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.networks import IpNetwork
from netproxy.net.address import (
    from_sockaddr,
    is_ipv6,
    is_unspecified,
    listen_error,
    pack_address,
    to_sockaddr,
    unpack_address,
)


@pytest.mark.parametrize(
    "sockaddr, address",
    [
        (("127.0.0.1", 80), Address("127.0.0.1", 80)),
        (("::1", 80, 0, 0), Address("::1", 80)),
        (("::ffff:127.0.0.1", 80, 0, 0), Address("127.0.0.1", 80)),
        (("::ffff:7f00:1", 80, 0, 0), Address("127.0.0.1", 80)),
        (("fe80::1", 80, 0, 3), Address("fe80::1%3", 80)),
        (("fe80::1%3", 80, 0, 3), Address("fe80::1%3", 80)),
        (("2001:db8::1", 0, 0, 0), Address("2001:db8::1", 0)),
    ],
)
def test_sockaddr_is_converted_to_an_address(sockaddr: tuple[Any, ...], address: Address) -> None:
    assert from_sockaddr(sockaddr) == address


@pytest.mark.parametrize(
    "address, family, sockaddr",
    [
        (Address("127.0.0.1", 80), socket.AF_INET, ("127.0.0.1", 80)),
        (Address("127.0.0.1", 80), socket.AF_INET6, ("::ffff:127.0.0.1", 80, 0, 0)),
        (Address("::1", 80), socket.AF_INET6, ("::1", 80, 0, 0)),
        (Address("fe80::1%3", 80), socket.AF_INET6, ("fe80::1", 80, 0, 3)),
        (Address("fe80::1%\u00b2", 80), socket.AF_INET6, ("fe80::1", 80, 0, 0)),
    ],
)
def test_address_is_converted_to_a_sockaddr_of_the_family(
    address: Address, family: int, sockaddr: tuple[Any, ...]
) -> None:
    assert to_sockaddr(address, family) == sockaddr


@pytest.mark.parametrize("host", ["::1", "example.com", "", "127.1"])
def test_host_without_an_ipv4_address_has_no_ipv4_sockaddr(host: str) -> None:
    with pytest.raises(ValueError, match="is not an IPv4 address"):
        to_sockaddr(Address(host, 80), socket.AF_INET)


@pytest.mark.parametrize(
    "address, family, size",
    [
        (Address("127.0.0.1", 80), socket.AF_INET, 16),
        (Address("127.0.0.1", 80), socket.AF_INET6, 28),
        (Address("2001:db8::1", 65535), socket.AF_INET6, 28),
        (Address("fe80::1%3", 80), socket.AF_INET6, 28),
    ],
)
def test_packed_address_is_read_as_it_was(address: Address, family: int, size: int) -> None:
    """That of an IPv4 client at an IPv6 listener is an IPv4 address again."""
    packed = pack_address(address, family)
    assert len(packed) == size and unpack_address(packed) == address


@pytest.mark.parametrize("host", ["::1", "example.com", "", "127.1"])
def test_host_without_an_ipv4_address_is_not_packed_as_one(host: str) -> None:
    with pytest.raises(ValueError, match="is not an IPv4 address"):
        pack_address(Address(host, 80), socket.AF_INET)


def test_name_of_a_unix_socket_is_no_address() -> None:
    with pytest.raises(OSError, match="not an IP socket"):
        unpack_address(b"\1\0" + b"/run/a-path\0")


def test_address_survives_conversion_to_a_sockaddr_and_back() -> None:
    for address in (Address("10.1.2.3", 5), Address("2001:db8::5", 6), Address("fe80::1%7", 8)):
        assert from_sockaddr(to_sockaddr(address, socket.AF_INET6)) == address


@pytest.mark.parametrize(
    "host, unspecified, ipv6",
    [
        ("", True, False),
        ("0.0.0.0", True, False),
        ("::", True, True),
        ("::1", False, True),
        ("127.0.0.1", False, False),
        ("0.example", False, False),
    ],
)
def test_unspecified_and_ipv6_hosts_are_recognized(
    host: str, unspecified: bool, ipv6: bool
) -> None:
    assert (is_unspecified(host), is_ipv6(host)) == (unspecified, ipv6)


def test_text_of_an_ipv6_address_has_brackets() -> None:
    assert str(Address("::1", 80)) == "[::1]:80"
    assert str(Address("127.0.0.1", 80)) == "127.0.0.1:80"
    assert str(Address("example.com", 80)) == "example.com:80"


class TestNetwork:
    @pytest.mark.parametrize(
        "text, host, held",
        [
            ("10.0.0.0/8", "10.255.255.255", True),
            ("10.0.0.0/8", "11.0.0.0", False),
            ("10.0.0.0/8", "::a00:1", False),
            ("0.0.0.0/0", "1.2.3.4", True),
            ("0.0.0.0/0", "::1", False),
            ("::/0", "::1", True),
            ("192.168.1.1", "192.168.1.1", True),
            ("192.168.1.1", "192.168.1.2", False),
            ("192.168.1.128/25", "192.168.1.127", False),
            ("fe80::/10", "fe80::1%2", True),
            ("fd00::/8", "fc00::1", False),
            ("10.0.0.0/8", "ten.example", False),
        ],
    )
    def test_network_holds_its_addresses_alone(self, text: str, host: str, held: bool) -> None:
        assert IpNetwork.parse(text).holds(host) is held

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "/8",
            "10.0.0.0/",
            "10.0.0.0/33",
            "10.0.0.0/-1",
            "10.0.0.0/8/8",
            "10.0.0.1/8",
            "10.0.0.0/+8",
            "10.0.0.0/\u0668",
            "::1/127",
            "::/129",
            "10/8",
            "example.com",
            "10.0.0.0/0008",
            "10.0.0.0 /8",
        ],
    )
    def test_malformed_network_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="is not a valid network"):
            IpNetwork.parse(text)


@pytest.mark.parametrize(
    "port, number, message",
    [
        (
            80,
            errno.EACCES,
            "cannot listen on tcp 127.0.0.1:80: Permission denied "
            "(ports below 1024 need CAP_NET_BIND_SERVICE)",
        ),
        (1080, errno.EACCES, "cannot listen on tcp 127.0.0.1:1080: Permission denied"),
        (
            80,
            errno.EADDRINUSE,
            "cannot listen on tcp 127.0.0.1:80: Address already in use "
            "(ss -lnptu 'sport = :80' tells by which program)",
        ),
    ],
)
def test_error_of_a_port_says_what_to_do(port: int, number: int, message: str) -> None:
    error = OSError(number, os.strerror(number))
    assert str(listen_error("tcp", Address("127.0.0.1", port), error)) == message
