"""The way out through a SOCKS4 proxy, with names resolved here (socks4) and there (socks4a), against scripted servers."""

from __future__ import annotations

import socket
from typing import Any, Callable

import pytest

from netproxy.config.schema import HopConfig, UpstreamConfig
from netproxy.dialer.direct import TargetResolver
from netproxy.dialer.factory import DialerFactory
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.routing import Dialer
from netproxy.net.udp_sockets import UdpSocketFactory
from tests.support.doubles import Counts, Lines, no_services
from tests.support.flows import tcp_to, udp_to
from tests.support.sockets import read_exactly, read_to_end, refusing, server

TARGET = Address("198.51.100.7", 443)
NAME = Address("example.com", 80)
REQUEST = b"\x04\x01\x01\xbb\xc6\x33\x64\x07\x00"
GRANTED = b"\x00\x5a\x1f\x90\x0a\x00\x00\x01"
BOTH = ["2001:db8::1", "198.51.100.7", "198.51.100.8"]  # of one name, as the system orders them


def dialer(reach: TargetResolver, scheme: str, address: Address, user: str = "") -> Dialer:
    factory = DialerFactory(reach, UdpSocketFactory(Counts(), Lines()), 2.0, no_services())
    return factory.dialer(UpstreamConfig((HopConfig(scheme, address, user),)))


def failure(dialer: Dialer, target: Address = TARGET) -> DialError:
    with pytest.raises(DialError) as caught:
        dialer.dial(tcp_to(target))
    return caught.value


def answer(wanted: bytes, reply: bytes = GRANTED) -> Callable[[socket.socket], None]:
    """The request, to the byte and nothing behind it before the reply; then what comes is sent back."""

    def script(sock: socket.socket) -> None:
        assert read_exactly(sock, len(wanted)) == wanted
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)
        sock.settimeout(5.0)
        sock.sendall(reply)
        sock.sendall(read_to_end(sock))

    return script


def known(monkeypatch: pytest.MonkeyPatch, hosts: list[str]) -> list[bytes]:
    """What the system's reach says of every name; the names that it is asked for."""
    asked: list[bytes] = []

    def getaddrinfo(host: bytes, port: int, **_: Any) -> list:
        asked.append(host)
        return [
            (
                socket.AF_INET6 if ":" in one else socket.AF_INET,
                socket.SOCK_STREAM,
                6,
                "",
                (one, port),
            )
            for one in hosts
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


class TestRequest:
    @pytest.mark.parametrize("scheme", ["socks4", "socks4a"])
    @pytest.mark.parametrize("user", ["", "fred", "Fr\u00e9d\u00e9ric", "x" * 255])
    def test_for_an_address(self, reach: TargetResolver, scheme: str, user: str) -> None:
        with server(answer(REQUEST[:-1] + user.encode() + b"\x00")) as address:
            stream = dialer(reach, scheme, address, user).dial(tcp_to(TARGET))
            stream.write(b"through")
            stream.shutdown_write()
            assert stream.read_exactly(7) == b"through"
            assert stream.read_some(1) == b""
            stream.close()

    @pytest.mark.parametrize("user", ["", "fred"])
    def test_for_a_name_leaves_it_to_the_proxy(
        self, reach: TargetResolver, user: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = known(monkeypatch, BOTH)
        wanted = b"\x04\x01\x00\x50\x00\x00\x00\x01" + user.encode() + b"\x00example.com\x00"
        with server(answer(wanted)) as address:
            dialer(reach, "socks4a", address, user).dial(tcp_to(NAME)).close()
        assert not asked

    def test_for_the_longest_name(self, reach: TargetResolver) -> None:
        name = ".".join(["x" * 63] * 3 + ["y" * 61])
        with server(
            answer(b"\x04\x01\xff\xff\x00\x00\x00\x01fred\x00" + name.encode() + b"\x00")
        ) as address:
            dialer(reach, "socks4a", address, "fred").dial(tcp_to(Address(name, 65535))).close()

    @pytest.mark.parametrize(
        "hosts", [BOTH, BOTH[1:], ["2001:db8::1", "2001:db8::2", "198.51.100.7"]]
    )
    def test_for_a_name_that_is_resolved_here(
        self, reach: TargetResolver, hosts: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first address of IPv4, wherever it stands."""
        asked = known(monkeypatch, hosts)
        with server(answer(b"\x04\x01\x00\x50\xc6\x33\x64\x07fred\x00")) as address:
            dialer(reach, "socks4", address, "fred").dial(tcp_to(NAME)).close()
        assert asked == [b"example.com"]


class TestNothingIsSent:
    def untouched(self, reach: TargetResolver, scheme: str, target: Address) -> DialError:
        connected: list[Any] = []
        with server(connected.append) as address:
            error = failure(dialer(reach, scheme, address), target)
            assert str(error).startswith(f"{scheme}://{address}") or error.reason is Reason.NAME
        assert not connected
        return error

    @pytest.mark.parametrize("scheme", ["socks4", "socks4a"])
    @pytest.mark.parametrize("host", ["2001:db8::1", "::1", "fe80::1%2"])
    def test_for_an_ipv6_target(self, reach: TargetResolver, scheme: str, host: str) -> None:
        error = self.untouched(reach, scheme, Address(host, 443))
        assert (error.reason, error.upstream) == (Reason.UNSUPPORTED, False)
        assert str(error).endswith(f": [{host}]:443: SOCKS4 knows IPv4 alone")

    def test_for_a_name_of_ipv6_alone(
        self, reach: TargetResolver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        known(monkeypatch, ["2001:db8::1", "2001:db8::2"])
        error = self.untouched(reach, "socks4", NAME)
        assert error.reason is Reason.UNSUPPORTED and str(error).endswith(
            ": example.com:80: SOCKS4 knows IPv4 alone"
        )

    def test_for_a_name_that_is_not_found_here(
        self, reach: TargetResolver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """HAZARDS 14."""
        known(monkeypatch, [])
        error = self.untouched(reach, "socks4", NAME)
        assert (error.reason, error.upstream) == (Reason.NAME, False)

    @pytest.mark.parametrize("scheme", ["socks4", "socks4a"])
    def test_for_datagrams(self, reach: TargetResolver, scheme: str) -> None:
        one = dialer(reach, scheme, Address("192.0.2.1", 1080))
        assert one.carries == {"tcp"}
        with pytest.raises(DialError) as caught:
            one.dial_packet(udp_to(TARGET))
        assert caught.value.reason is Reason.UNSUPPORTED
        assert str(caught.value) == f"{scheme}://192.0.2.1:1080 carries no UDP"


class TestReply:
    @pytest.mark.parametrize(
        "code, reason, upstream",
        [
            (0x5B, Reason.GENERAL, False),
            (0x5C, Reason.AUTHENTICATION, True),
            (0x5D, Reason.AUTHENTICATION, True),
            (0x00, Reason.GENERAL, False),
            (0x59, Reason.GENERAL, False),
            (0x5E, Reason.GENERAL, False),
            (0xFF, Reason.GENERAL, False),
        ],
    )
    @pytest.mark.parametrize("scheme", ["socks4", "socks4a"])
    def test_that_refuses_has_its_reason(
        self, reach: TargetResolver, scheme: str, code: int, reason: Reason, upstream: bool
    ) -> None:
        """HAZARDS 14."""
        with server(answer(REQUEST, b"\x00" + bytes((code,)) + bytes(6))) as address:
            error = failure(dialer(reach, scheme, address))
        assert (error.reason, error.upstream, error.hop) == (
            reason,
            upstream,
            f"{scheme}://{address}",
        )
        assert str(error) == f"{scheme}://{address}: {TARGET}: {reason.value}"

    @pytest.mark.parametrize("bound", [b"\x1f\x90\x0a\x00\x00\x01", bytes(6), b"\xff" * 6])
    def test_that_grants_may_name_any_address(self, reach: TargetResolver, bound: bytes) -> None:
        with server(answer(REQUEST, b"\x00\x5a" + bound)) as address:
            dialer(reach, "socks4", address).dial(tcp_to(TARGET)).close()

    @pytest.mark.parametrize("size", [1, 7, 8, 9, 30_000])
    def test_what_comes_behind_it_is_the_targets(self, reach: TargetResolver, size: int) -> None:
        """HAZARDS 62."""
        data = bytes(number % 251 for number in range(size))
        with server(answer(REQUEST, GRANTED + data)) as address:
            stream = dialer(reach, "socks4a", address).dial(tcp_to(TARGET))
            assert stream.read_exactly(size) == data
            stream.shutdown_write()
            assert stream.read_some(1) == b""
            stream.close()

    @pytest.mark.parametrize("version", [1, 4, 5, 0x48, 0xFF])
    def test_of_another_protocol(self, reach: TargetResolver, version: int) -> None:
        with server(answer(REQUEST, bytes((version,)) + GRANTED[1:])) as address:
            error = failure(dialer(reach, "socks4", address))
        assert (error.reason, error.upstream, str(error)) == (
            Reason.PROTOCOL,
            True,
            f"socks4://{address}: not a SOCKS4 reply",
        )


@pytest.mark.parametrize("scheme", ["socks4", "socks4a"])
def test_a_proxy_that_is_not_there(reach: TargetResolver, scheme: str) -> None:
    with refusing() as address:
        error = failure(dialer(reach, scheme, address))
    assert (error.reason, error.upstream, str(error)) == (
        Reason.REFUSED,
        True,
        f"{scheme}://{address}: connection refused",
    )


def test_the_user_is_in_no_message(reach: TargetResolver) -> None:
    """HAZARDS 111: a user id is all that a SOCKS4 proxy asks for."""
    with server(answer(REQUEST[:-1] + b"hunter2\x00", b"\x00\x5d" + bytes(6))) as address:
        one = dialer(reach, "socks4", address, "hunter2")
        error = failure(one)
    assert "hunter2" not in f"{error} {error!r} {error.__cause__!r} {one.name} {one!r}"
