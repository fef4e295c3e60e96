"""Configured upstreams and UDP: which chains carry it, UDP over TCP, associations behind groups."""

from __future__ import annotations

import socket
from typing import Any, Callable

import pytest

from netproxy.admin.diagnosis.explain import udp_text
from netproxy.dialer.direct import TargetResolver
from netproxy.dialer.factory import DialerFactory
from netproxy.interfaces.datagrams import PacketDependencies
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address
from netproxy.net.stream import Stream
from netproxy.protocol import socks5, uot
from tests.dialer.configured import (
    BOUND,
    HELLO,
    TARGET,
    connect,
    default_of,
    granting,
    play,
    send,
    upstreams_of,
)
from tests.dialer.doubles import SECONDS, make_factory
from tests.support.doubles import Counts
from tests.support.flows import tcp_to, udp_to
from tests.support.sockets import address_of, refusing, server, udp

pytest.importorskip("yaml")

NAME = Address("example.com", 443)
ASSOCIATE = socks5.encode_request(socks5.UDP_ASSOCIATE, UNSPECIFIED_ADDRESS)


def no_lookup(*_: Any, **__: Any) -> list[Any]:
    raise AssertionError("a name was looked up here")


class Watch:
    """Stands in for the poller: keeps the control connections, so that a test can close them."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []

    def __call__(self, stream: Stream, call: Callable[[], None]) -> None:
        self.streams.append(stream)

    def close(self) -> None:
        for stream in self.streams:
            stream.close()


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def associating(target_resolver: TargetResolver, watch: Watch) -> DialerFactory:
    """A factory whose dialers may open associations."""
    dependencies = PacketDependencies(watch, lambda task: False, Counts())
    return make_factory(target_resolver, SECONDS, dependencies)


@pytest.mark.parametrize(
    "text, carries",
    [
        ("direct", {"tcp", "udp", "bind"}),
        ("block", set()),
        ("'socks4://h:1'", {"tcp"}),
        ("'socks5://h:1'", {"tcp", "udp"}),
        ("'http://h:1'", {"tcp", "udp"}),
        ("'socks5://h:1?udp=none'", {"tcp"}),
        ("'http://h:1?udp=none'", {"tcp"}),
        ("'socks4://h:1?udp=uot'", {"tcp", "udp"}),
        ("'socks5h://h:1?udp=uot'", {"tcp", "udp"}),
        ("'http://h:1?udp=uot'", {"tcp", "udp"}),
        ("['socks4://h:1', 'socks5://h:2']", {"tcp"}),
        ("['socks4://h:1', 'http://h:2']", {"tcp", "udp"}),
        ("['http://h:1?udp=none', 'socks5://h:2']", {"tcp"}),
        ("['http://h:1', 'socks5://h:2']", {"tcp", "udp"}),
        ("['socks4://h:1', 'socks5://h:2?udp=uot']", {"tcp", "udp"}),
        ("['socks5://h:1', 'socks4://h:2']", {"tcp"}),
        ("{members: ['socks4://h:1', 'socks5://h:2']}", {"tcp", "udp"}),
        ("{members: ['socks4://h:1', direct]}", {"tcp", "udp"}),
        ("{members: ['socks4://h:1', block]}", {"tcp"}),
        ("['socks4://h:1', {members: ['socks5://h:2']}]", {"tcp"}),
        ("['socks4://h:1', {members: ['socks5://h:2', 'http://h:3']}]", {"tcp", "udp"}),
        ("['socks4://h:1', {members: [direct]}]", {"tcp"}),
        ("[{members: ['socks4://h:1']}, 'socks5://h:2']", {"tcp"}),
    ],
)
def test_upstream_carries_udp_as_explain_says(
    factory: DialerFactory, text: str, carries: set[str]
) -> None:
    config = default_of(text)
    assert factory.dialer(config).carries == carries
    assert udp_text(config).startswith("no udp: ") == ("udp" not in carries)


class TestUdpOverTcp:
    SOCKS4 = b"\x04\x01\x01\xbb\x00\x00\x00\x01\x00" + uot.MAGIC.encode() + b"\x00"
    HTTP = f"CONNECT {uot.MAGIC}:443 HTTP/1.1\r\nHost: {uot.MAGIC}:443\r\n\r\n".encode()
    SOCKS5 = (*HELLO, connect(Address(uot.MAGIC, 443)), b"\x05" + BOUND)

    @pytest.mark.parametrize(
        "scheme, steps",
        [
            ("socks4", (SOCKS4, b"\x00\x5a" + bytes(6))),
            ("socks4a", (SOCKS4, b"\x00\x5a" + bytes(6))),
            ("socks5", SOCKS5),
            ("socks5h", SOCKS5),
            ("http", (HTTP, b"HTTP/1.1 200 OK\r\n\r\n")),
        ],
    )
    def test_magic_name_goes_to_the_proxy_unresolved(
        self,
        factory: DialerFactory,
        monkeypatch: pytest.MonkeyPatch,
        scheme: str,
        steps: tuple[bytes, ...],
    ) -> None:
        """Even with a scheme whose other names are looked up here."""
        monkeypatch.setattr(socket, "getaddrinfo", no_lookup)
        request = uot.encode_request(uot.UotRequest(False, TARGET))
        with server(play(*steps, request)) as address:
            dialer = factory.dialer(default_of(f"'{scheme}://{address}?udp=uot'"))
            dialer.dial_packet(udp_to(TARGET)).close()

    @pytest.mark.parametrize(
        "scheme, host", [("socks5", "203.0.113.9"), ("socks5h", "example.com")]
    )
    def test_tcp_names_are_resolved_as_the_scheme_says(
        self, factory: DialerFactory, monkeypatch: pytest.MonkeyPatch, scheme: str, host: str
    ) -> None:
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("203.0.113.9", 443))],
        )
        with server(granting(Address(host, 443))) as address:
            dialer = factory.dialer(default_of(f"'{scheme}://{address}?udp=uot'"))
            dialer.dial(tcp_to(NAME)).close()

    def test_proxy_without_uot_is_named_in_the_error(self, factory: DialerFactory) -> None:
        script = play(*HELLO, connect(Address(uot.MAGIC, 443)), b"\x05\x04" + BOUND[1:])
        with server(script) as address, pytest.raises(DialError) as caught:
            config = upstreams_of(f"a: 'socks5h://{address}?udp=uot'")["a"]
            factory.dialer(config).dial_packet(udp_to(TARGET))
        assert str(caught.value) == (
            f"'a' (socks5h://{address}): UDP over TCP is not supported (host unreachable)"
        )


class TestAssociationBehindGroup:
    """RFC 1928 section 7: a relay takes datagrams only from the control connection's peer."""

    DIRECT_MEMBERS = "a: {url: direct, bind: 127.0.0.2}, b: {url: direct, bind: 127.0.0.3}"

    def test_datagrams_take_the_same_member_as_the_control_connection(
        self, associating: DialerFactory, watch: Watch
    ) -> None:
        controls: list[str] = []
        with udp() as relay:
            granted = socks5.encode_reply(socks5.SUCCEEDED, address_of(relay))

            def script(sock: socket.socket) -> None:
                controls.append(sock.getpeername()[0])
                play(*HELLO, ASSOCIATE, granted)(sock)

            with server(script) as address:
                more = f"upstreams: {{{self.DIRECT_MEMBERS}, pool: {{members: [a, b]}}}}"
                dialer = associating.dialer(default_of(f"[pool, 'socks5h://{address}']", more))
                conn: Any = dialer.dial_packet(udp_to(TARGET))
                send(conn, TARGET)
                _, peer = relay.recvfrom(100)
                conn.close()
                watch.close()
        assert peer[0] == controls[0]

    @pytest.mark.parametrize("dead", [1, 2])
    def test_association_takes_the_next_member_after_a_failure(
        self, associating: DialerFactory, watch: Watch, dead: int
    ) -> None:
        """Within the same dial, as connections do, not with the client's next datagram."""
        with udp() as relay, refusing() as closed_port:
            granted = socks5.encode_reply(socks5.SUCCEEDED, address_of(relay))
            with server(play(*HELLO, ASSOCIATE, granted)) as address:
                members = [f"'socks5h://{closed_port}?timeout={n + 1}s'" for n in range(dead)]
                more = (
                    "upstreams: {b: {url: direct, bind: 127.0.0.3}, "
                    f"pool: {{members: [{', '.join(members)}, b], balance: failover}}}}"
                )
                dialer = associating.dialer(default_of(f"[pool, 'socks5h://{address}']", more))
                conn: Any = dialer.dial_packet(udp_to(TARGET))
                send(conn, TARGET)
                _, peer = relay.recvfrom(100)
                conn.close()
                watch.close()
        assert peer[0] == "127.0.0.3"

    def test_association_fails_if_all_members_fail(self, factory: DialerFactory) -> None:
        with refusing() as closed_port:
            more = (
                "upstreams: {pool: {balance: failover, members: "
                f"['socks5h://{closed_port}', 'socks5h://{closed_port}?timeout=1s']}}}}"
            )
            dialer = factory.dialer(default_of("[pool, 'socks5h://192.0.2.1:1']", more))
            with pytest.raises(DialError) as caught:
                dialer.dial_packet(udp_to(TARGET))
            assert (caught.value.reason, caught.value.upstream) == (Reason.REFUSED, True)

    def test_refused_association_is_requested_once(self, factory: DialerFactory) -> None:
        """Through another member the same proxy would answer the same."""
        requests: list[socket.socket] = []

        def script(sock: socket.socket) -> None:
            requests.append(sock)
            play(*HELLO, ASSOCIATE, b"\x05\x07" + BOUND[1:])(sock)

        with server(script) as address:
            more = f"upstreams: {{{self.DIRECT_MEMBERS}, pool: {{members: [a, b]}}}}"
            dialer = factory.dialer(default_of(f"[pool, 'socks5h://{address}']", more))
            with pytest.raises(DialError):
                dialer.dial_packet(udp_to(TARGET))
        assert len(requests) == 1
