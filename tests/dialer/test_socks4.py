"""TCP through a SOCKS4 proxy, against scripted servers on loopback.

Names are looked up here with socks4 and at the proxy with socks4a.
"""

from __future__ import annotations

import socket
from typing import Any, Callable

import pytest

from netproxy.config.schema import HopConfig, UpstreamConfig
from netproxy.dialer.direct import TargetResolver
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.routing import Dialer
from netproxy.net.stream import complete
from tests.dialer.doubles import make_factory
from tests.support.flows import tcp_to, udp_to
from tests.support.sockets import SECONDS, read_exactly, read_to_end, refusing, server

TARGET = Address("198.51.100.7", 443)
NAME = Address("example.com", 80)
REQUEST = b"\x04\x01\x01\xbb\xc6\x33\x64\x07\x00"
GRANTED = b"\x00\x5a\x1f\x90\x0a\x00\x00\x01"
BOTH = ["2001:db8::1", "198.51.100.7", "198.51.100.8"]
"""Addresses of one name, in the system's order."""


def dialer(
    target_resolver: TargetResolver, scheme: str, address: Address, user: str = ""
) -> Dialer:
    config = UpstreamConfig((HopConfig(scheme, address, user),))
    return make_factory(target_resolver).dialer(config)


def failure(dialer: Dialer, target: Address = TARGET) -> DialError:
    """Dial and return the error."""
    with pytest.raises(DialError) as caught:
        dialer.dial(tcp_to(target))
    return caught.value


def answer(wanted: bytes, reply: bytes = GRANTED) -> Callable[[socket.socket], None]:
    """Return a script: the request byte for byte, nothing behind it, the reply, then an echo."""

    def script(sock: socket.socket) -> None:
        assert read_exactly(sock, len(wanted)) == wanted
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)
        sock.settimeout(SECONDS)
        sock.sendall(reply)
        sock.sendall(read_to_end(sock))

    return script


def resolve_to(monkeypatch: pytest.MonkeyPatch, hosts: list[str]) -> list[bytes]:
    """Let the system resolve every name to `hosts`; return the list of names looked up."""
    looked_up: list[bytes] = []

    def getaddrinfo(host: bytes, port: int, **_: Any) -> list[Any]:
        looked_up.append(host)
        families = [socket.AF_INET6 if ":" in host else socket.AF_INET for host in hosts]
        return [
            (family, socket.SOCK_STREAM, 6, "", (host, port))
            for family, host in zip(families, hosts, strict=True)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return looked_up


class TestRequest:
    @pytest.mark.parametrize("scheme", ["socks4", "socks4a"])
    @pytest.mark.parametrize("user", ["", "fred", "Fr\u00e9d\u00e9ric", "x" * 255])
    def test_request_for_an_address(
        self, target_resolver: TargetResolver, scheme: str, user: str
    ) -> None:
        with server(answer(REQUEST[:-1] + user.encode() + b"\x00")) as address:
            stream = dialer(target_resolver, scheme, address, user).dial(tcp_to(TARGET))
            stream.write(b"through")
            stream.shutdown_write()
            assert complete(stream.read_exactly(7)) == b"through"
            assert complete(stream.read_some(1)) == b""
            stream.close()

    @pytest.mark.parametrize("user", ["", "fred"])
    def test_socks4a_request_has_the_name(
        self, target_resolver: TargetResolver, user: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looked_up = resolve_to(monkeypatch, BOTH)
        wanted = b"\x04\x01\x00\x50\x00\x00\x00\x01" + user.encode() + b"\x00example.com\x00"
        with server(answer(wanted)) as address:
            dialer(target_resolver, "socks4a", address, user).dial(tcp_to(NAME)).close()
        assert not looked_up

    def test_socks4a_request_with_the_longest_name(self, target_resolver: TargetResolver) -> None:
        name = ".".join(["x" * 63] * 3 + ["y" * 61])
        with server(
            answer(b"\x04\x01\xff\xff\x00\x00\x00\x01fred\x00" + name.encode() + b"\x00")
        ) as address:
            dialer(target_resolver, "socks4a", address, "fred").dial(
                tcp_to(Address(name, 65535))
            ).close()

    @pytest.mark.parametrize(
        "hosts", [BOTH, BOTH[1:], ["2001:db8::1", "2001:db8::2", "198.51.100.7"]]
    )
    def test_socks4_request_has_the_ipv4_address_of_a_name(
        self, target_resolver: TargetResolver, hosts: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The request has the first IPv4 address, wherever it is in the list."""
        looked_up = resolve_to(monkeypatch, hosts)
        with server(answer(b"\x04\x01\x00\x50\xc6\x33\x64\x07fred\x00")) as address:
            dialer(target_resolver, "socks4", address, "fred").dial(tcp_to(NAME)).close()
        assert looked_up == [b"example.com"]


class TestUnreachableTargets:
    def failure_without_connection(
        self, target_resolver: TargetResolver, scheme: str, target: Address
    ) -> DialError:
        """Dial, check that no connection reached the proxy, and return the error."""
        connected: list[Any] = []
        with server(connected.append) as address:
            error = failure(dialer(target_resolver, scheme, address), target)
            assert str(error).startswith(f"{scheme}://{address}") or error.reason is Reason.NAME
        assert not connected
        return error

    @pytest.mark.parametrize("scheme", ["socks4", "socks4a"])
    @pytest.mark.parametrize("host", ["2001:db8::1", "::1", "fe80::1%2"])
    def test_ipv6_target_is_unsupported(
        self, target_resolver: TargetResolver, scheme: str, host: str
    ) -> None:
        error = self.failure_without_connection(target_resolver, scheme, Address(host, 443))
        assert (error.reason, error.upstream) == (Reason.UNSUPPORTED, False)
        assert str(error).endswith(f": [{host}]:443: SOCKS4 reaches IPv4 addresses only")

    def test_name_with_ipv6_addresses_only_is_unsupported(
        self, target_resolver: TargetResolver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        resolve_to(monkeypatch, ["2001:db8::1", "2001:db8::2"])
        error = self.failure_without_connection(target_resolver, "socks4", NAME)
        assert error.reason is Reason.UNSUPPORTED
        assert str(error).endswith(": example.com:80: SOCKS4 reaches IPv4 addresses only")

    def test_unknown_name_reaches_no_proxy(
        self, target_resolver: TargetResolver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 14."""
        resolve_to(monkeypatch, [])
        error = self.failure_without_connection(target_resolver, "socks4", NAME)
        assert (error.reason, error.upstream) == (Reason.NAME, False)

    @pytest.mark.parametrize("scheme", ["socks4", "socks4a"])
    def test_socks4_upstream_carries_no_udp(
        self, target_resolver: TargetResolver, scheme: str
    ) -> None:
        socks4 = dialer(target_resolver, scheme, Address("192.0.2.1", 1080))
        assert socks4.carries == {"tcp"}
        with pytest.raises(DialError) as caught:
            socks4.dial_packet(udp_to(TARGET))
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
    def test_refusing_reply_has_its_reason(
        self,
        target_resolver: TargetResolver,
        scheme: str,
        code: int,
        reason: Reason,
        upstream: bool,
    ) -> None:
        """Hazard 14."""
        with server(answer(REQUEST, b"\x00" + bytes((code,)) + bytes(6))) as address:
            error = failure(dialer(target_resolver, scheme, address))
        assert (error.reason, error.upstream, error.hop) == (
            reason,
            upstream,
            f"{scheme}://{address}",
        )
        assert str(error) == f"{scheme}://{address}: {TARGET}: {reason.value}"

    @pytest.mark.parametrize("bound", [b"\x1f\x90\x0a\x00\x00\x01", bytes(6), b"\xff" * 6])
    def test_granting_reply_may_have_any_address(
        self, target_resolver: TargetResolver, bound: bytes
    ) -> None:
        with server(answer(REQUEST, b"\x00\x5a" + bound)) as address:
            dialer(target_resolver, "socks4", address).dial(tcp_to(TARGET)).close()

    @pytest.mark.parametrize("size", [1, 7, 8, 9, 30_000])
    def test_bytes_behind_the_reply_are_the_targets(
        self, target_resolver: TargetResolver, size: int
    ) -> None:
        """Hazard 62."""
        data = bytes(number % 251 for number in range(size))
        with server(answer(REQUEST, GRANTED + data)) as address:
            stream = dialer(target_resolver, "socks4a", address).dial(tcp_to(TARGET))
            assert complete(stream.read_exactly(size)) == data
            stream.shutdown_write()
            assert complete(stream.read_some(1)) == b""
            stream.close()

    @pytest.mark.parametrize("version", [1, 4, 5, 0x48, 0xFF])
    def test_reply_of_another_protocol_is_a_protocol_error(
        self, target_resolver: TargetResolver, version: int
    ) -> None:
        with server(answer(REQUEST, bytes((version,)) + GRANTED[1:])) as address:
            error = failure(dialer(target_resolver, "socks4", address))
        assert (error.reason, error.upstream, str(error)) == (
            Reason.PROTOCOL,
            True,
            f"socks4://{address}: not a SOCKS4 reply",
        )


@pytest.mark.parametrize("scheme", ["socks4", "socks4a"])
def test_refused_connection_to_the_proxy_is_its_fault(
    target_resolver: TargetResolver, scheme: str
) -> None:
    with refusing() as address:
        error = failure(dialer(target_resolver, scheme, address))
    assert (error.reason, error.upstream, str(error)) == (
        Reason.REFUSED,
        True,
        f"{scheme}://{address}: connection refused",
    )


def test_socks4_errors_do_not_contain_the_user(target_resolver: TargetResolver) -> None:
    """Hazard 111.  The user id is the only credential of SOCKS4."""
    with server(answer(REQUEST[:-1] + b"hunter2\x00", b"\x00\x5d" + bytes(6))) as address:
        socks4 = dialer(target_resolver, "socks4", address, "hunter2")
        error = failure(socks4)
    assert "hunter2" not in f"{error} {error!r} {error.__cause__!r} {socks4.name} {socks4!r}"
