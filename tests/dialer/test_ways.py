"""Ways out from the configuration: how they are labelled and left, what their options do, and what outlives a reload.

Configurations are read from text; proxies are scripted, on loopback.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from netproxy.config.schema import UpstreamConfig
from netproxy.dialer.direct import TargetResolver
from netproxy.dialer.direct import DirectDialer
from netproxy.dialer.factory import DialerFactory
from netproxy.dialer.group import GroupDialer, Member
from netproxy.dialer.health import HealthChecks
from netproxy.dialer.hop import Services
from netproxy.errors import ConfigError, DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.routing import Dialer
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.net.connect import KEEPALIVE_IDLE
from netproxy.protocol import socks5, uot
from netproxy.admin.explain import udp_text
from tests.config.test_read import read
from tests.dialer.test_group import fault
from tests.support.certificates import certificates
from tests.support.doubles import Counts, Lines, no_services
from tests.support.flows import tcp_to, udp_to
from tests.support.sockets import (
    Task,
    address_of,
    black_hole,
    read_exactly,
    read_to_end,
    refusing,
    server,
    udp,
    wait_until,
)
from tests.support.upstreams import Workers

pytest.importorskip("yaml")

TARGET = Address("198.51.100.7", 443)
NAME = Address("example.com", 443)
SECONDS = 2.0
HELLO = (b"\x05\x01\x00", b"\x05\x00")  # a SOCKS5 client without login, and the answer
BOUND = b"\x00\x00\x01\x0a\x00\x00\x01\x1f\x90"  # behind the version of a reply that grants


def no_lookup(*_: Any, **__: Any) -> list:
    raise AssertionError("a name was looked up here")


@pytest.fixture
def factory(reach: TargetResolver) -> DialerFactory:
    return DialerFactory(reach, UdpSocketFactory(Counts(), Lines()), SECONDS, no_services())


def ways(upstreams: str) -> dict[str, UpstreamConfig]:
    """What stands under `upstreams`, by name."""
    return read(f"upstreams: {{{upstreams}}}").upstreams


def default(text: str, more: str = "") -> UpstreamConfig:
    return read(f"default: {text}\n{more}").default


def group_of(dialer: Dialer) -> GroupDialer:
    """The group that a way out ends in."""
    while isinstance(dialer, Member):
        dialer = dialer.dialer
    assert isinstance(dialer, GroupDialer)
    return dialer


def members(dialer: Dialer) -> dict[str, Member]:
    return {member.name: member for member in group_of(dialer).members}


def failure(dialer: Dialer, target: Address = TARGET) -> DialError:
    with pytest.raises(DialError) as caught:
        dialer.dial(tcp_to(target)).close()
    return caught.value


def send(conn: Any, target: Address) -> None:
    """One datagram."""
    arena = UdpSocketFactory(Counts(), Lines()).arena()
    conn.send(arena, arena.put(b"query"), conn.prepare(udp_to(target)))


def connect(target: Address) -> bytes:
    return socks5.encode_request(socks5.CONNECT, target)


def play(*steps: bytes) -> Callable[[socket.socket], None]:
    """Alternately what the client must send and what it gets."""

    def script(sock: socket.socket) -> None:
        for number, data in enumerate(steps):
            if number % 2:
                sock.sendall(data)
            else:
                assert read_exactly(sock, len(data)) == data
        read_to_end(sock)

    return script


def granting(*targets: Address) -> Callable[[socket.socket], None]:
    """SOCKS5 proxies, one behind the other, each of which grants a connection to the next of `targets`."""
    return play(
        *(step for target in targets for step in (*HELLO, connect(target), b"\x05" + BOUND))
    )


class TestLabels:
    """Of the proxy that is at fault, or that told of it."""

    def test_of_a_way_with_a_name(self, factory: DialerFactory) -> None:
        with refusing() as address:
            error = failure(
                factory.dialer(ways(f"office: 'socks5h://u:secret@{address}'")["office"])
            )
        assert str(error) == f"'office' (socks5h://{address}): connection refused"
        assert (error.reason, error.upstream) == (Reason.REFUSED, True)

    def test_of_a_way_without_a_name(self, factory: DialerFactory) -> None:
        with refusing() as address:
            assert (
                str(failure(factory.dialer(default(f"'http://u:secret@{address}'"))))
                == f"http://{address}: connection refused"
            )

    @pytest.mark.parametrize("named", [True, False])
    def test_of_the_first_hop(self, factory: DialerFactory, named: bool) -> None:
        with refusing() as first:
            text = f"['socks5h://{first}', 'http://192.0.2.1:1']"
            way = ways(f"two-hops: {text}")["two-hops"] if named else default(text)
            whose = " of 'two-hops'" if named else ""
            assert (
                str(failure(factory.dialer(way)))
                == f"hop 1{whose} (socks5h://{first}): connection refused"
            )

    @pytest.mark.parametrize("named", [True, False])
    def test_of_the_second_hop(self, factory: DialerFactory, named: bool) -> None:
        second = Address("192.0.2.1", 3128)
        request = f"CONNECT {TARGET} HTTP/1.1\r\nHost: {TARGET}\r\nProxy-Authorization: Basic dTpzZWNyZXQ=\r\n\r\n".encode()
        script = play(
            *HELLO,
            connect(second),
            b"\x05" + BOUND,
            request,
            b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n",
        )
        with server(script) as first:
            text = f"['socks5h://{first}', 'http://u:secret@{second}']"
            way = ways(f"two-hops: {text}")["two-hops"] if named else default(text)
            error = failure(factory.dialer(way))
        whose = " of 'two-hops'" if named else ""
        assert str(error) == f"hop 2{whose} (http://{second}): 407 proxy authentication required"
        assert (error.reason, error.upstream) == (Reason.AUTHENTICATION, True)

    def test_of_the_hop_that_does_not_reach_the_next(self, factory: DialerFactory) -> None:
        second = Address("192.0.2.1", 3128)
        with server(play(*HELLO, connect(second), b"\x05\x04" + BOUND[1:])) as first:
            error = failure(
                factory.dialer(ways(f"two: ['socks5h://{first}', 'http://{second}']")["two"])
            )
        assert str(error) == f"hop 1 of 'two' (socks5h://{first}): {second}: host unreachable"
        assert (error.reason, error.upstream) == (Reason.HOST_UNREACHABLE, True)

    def test_of_the_last_hop_that_tells_of_the_target(self, factory: DialerFactory) -> None:
        second = Address("192.0.2.1", 1080)
        script = play(
            *HELLO,
            connect(second),
            b"\x05" + BOUND,
            *HELLO,
            connect(TARGET),
            b"\x05\x05" + BOUND[1:],
        )
        with server(script) as first:
            error = failure(
                factory.dialer(ways(f"two: ['socks5h://{first}', 'socks5h://{second}']")["two"])
            )
        assert str(error) == f"hop 2 of 'two' (socks5h://{second}): {TARGET}: connection refused"
        assert (error.reason, error.upstream) == (Reason.REFUSED, False)

    def test_of_a_name_within_a_chain_is_the_chains(self, factory: DialerFactory) -> None:
        with refusing() as first:
            two = ways(f"office: 'socks5h://{first}', two: [office, 'http://192.0.2.1:1']")["two"]
            assert (
                str(failure(factory.dialer(two)))
                == f"hop 1 of 'two' (socks5h://{first}): connection refused"
            )

    def test_of_members_are_their_own(self, factory: DialerFactory) -> None:
        with refusing() as one, refusing() as two:
            pool = ways(
                f"a: 'socks5h://{one}', pool: {{members: [a, 'http://{two}', [a, 'http://{two}']], balance: failover}}"
            )["pool"]
            assert str(failure(factory.dialer(pool))) == (
                f"group 'pool': no member could: a: 'a' (socks5h://{one}): connection refused; "
                f"http://{two}: http://{two}: connection refused; "
                f"socks5h://{one} -> http://{two}: hop 1 (socks5h://{one}): connection refused"
            )

    def test_no_secret_is_in_them(self, factory: DialerFactory) -> None:
        """HAZARDS 111: whatever goes wrong."""
        answers = (b"\x05\xff", b"HTTP/1.1 407 No\r\n\r\n", b"nonsense\r\n\r\n", b"")
        said = []
        for answer in answers:
            with server(lambda sock: (sock.recv(9999), sock.sendall(answer))) as address:
                urls = ", ".join(
                    f"'{scheme}://user:hunter2@{address}'"
                    for scheme in ("socks5", "socks5h", "http")
                )
                error = failure(factory.dialer(default(f"{{members: [{urls}]}}")))
                said += [
                    str(error),
                    repr(error),
                    *(member.error for group in factory.groups() for member in group.members),
                ]
        assert said and not any("hunter2" in one or "aHVudGVyMg" in one for one in said)


class TestNames:
    """For records and rules."""

    @pytest.mark.parametrize(
        "text, name",
        [
            ("direct", "direct"),
            ("block", "block"),
            ("'http://h:1'", "http://h:1"),
            ("'socks5://u:secret@h:1'", "socks5://h:1"),
            ("one", "one"),
            ("{members: [one]}", "default"),
            ("pool", "pool"),
            ("[one, pool]", None),
        ],
    )
    def test_of_a_way(self, factory: DialerFactory, text: str, name: str | None) -> None:
        way = factory.dialer(
            default(text, "upstreams: {one: 'http://h:1', pool: {members: [one]}}")
        )
        if name == "default":
            assert group_of(way).name == name
        elif name:
            assert way.name == name
        assert "secret" not in way.name

    def test_of_members(self, factory: DialerFactory) -> None:
        pool = factory.dialer(
            default(
                "{members: [one, 'http://u:p@h:2', [one, 'http://h:3'], direct]}",
                "upstreams: {one: 'http://h:1'}",
            )
        )
        assert list(members(pool)) == ["one", "http://h:2", "http://h:1 -> http://h:3", "direct"]


class TestOutgoing:
    """What this machine does to reach a first hop."""

    def test_from_an_address(self, factory: DialerFactory) -> None:
        peers: list[str] = []
        with server(lambda sock: peers.append(sock.getpeername()[0])) as address:
            failure(factory.dialer(default(f"'http://{address}?bind=127.0.0.2'")))
            failure(factory.dialer(default(f"'http://{address}'")))
            wait_until(lambda: len(peers) == 2)
        assert peers == ["127.0.0.2", "127.0.0.1"]

    def test_from_an_address_without_a_proxy(self, factory: DialerFactory) -> None:
        way = factory.dialer(default("{url: direct, bind: 127.0.0.2}"))
        assert way.carries == {"tcp", "udp", "bind"}
        with server(read_to_end) as address:
            stream = way.dial(tcp_to(address))
            assert stream.local_address().host == "127.0.0.2"
            stream.close()
        with udp() as target:
            conn: Any = way.dial_packet(udp_to(TARGET))
            send(conn, address_of(target))
            data, peer = target.recvfrom(100)
            conn.close()
        assert (data, peer[0]) == (b"query", "127.0.0.2")

    def test_of_the_other_family(self, factory: DialerFactory) -> None:
        with refusing() as address:
            error = failure(factory.dialer(default(f"'http://{address}?bind=::1'")))
        assert (str(error), error.reason) == (
            f"http://{address}: network unreachable",
            Reason.NETWORK_UNREACHABLE,
        )

    @pytest.mark.parametrize("bind", ["192.0.2.77", "nonexistent0"])
    def test_that_this_machine_does_not_have(self, factory: DialerFactory, bind: str) -> None:
        with refusing() as address:
            error = failure(factory.dialer(default(f"'http://{address}?bind={bind}'")))
        assert str(error).startswith(f"http://{address}: ") and error.upstream

    @pytest.mark.parametrize(
        "key, option, value",
        [
            ("bind: lo", socket.SO_BINDTODEVICE, b"lo\0"),
            ("mark: 0x2a", socket.SO_MARK, (42).to_bytes(4, sys.byteorder)),
        ],
    )
    def test_options_of_the_socket(
        self, factory: DialerFactory, key: str, option: int, value: bytes
    ) -> None:
        with socket.socket() as probe:
            try:
                probe.setsockopt(socket.SOL_SOCKET, option, value)
            except PermissionError:
                pytest.skip("needs CAP_NET_ADMIN or CAP_NET_RAW")
        way = factory.dialer(default(f"{{url: direct, {key}}}"))
        with server(read_to_end) as address:
            stream = way.dial(tcp_to(address))
            assert stream.socket.getsockopt(socket.SOL_SOCKET, option, 16)[: len(value)] == value
            stream.close()
        with opened(lambda: way.dial_packet(udp_to(TARGET))) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, option, 16)[: len(value)] == value

    @pytest.mark.parametrize(
        "query, kept, idle",
        [
            ("", 1, KEEPALIVE_IDLE),
            ("?keepalive=7s", 1, 7),
            ("?keepalive=0", 0, None),
            ("?keepalive=300ms", 1, 1),
        ],
    )
    def test_whether_it_is_there_still(
        self, factory: DialerFactory, query: str, kept: int, idle: int | None
    ) -> None:
        with server(granting(TARGET)) as address:
            stream = factory.dialer(default(f"'socks5h://{address}{query}'")).dial(tcp_to(TARGET))
            sock = stream.socket
            assert bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) == bool(kept)
            assert idle is None or sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == idle
            stream.close()

    def test_of_the_members_of_a_first_group(self, factory: DialerFactory) -> None:
        peers: list[str] = []
        with server(lambda sock: peers.append(sock.getpeername()[0])) as address:
            text = f"upstreams: {{a: 'http://{address}?bind=127.0.0.2', b: 'http://{address}?bind=127.0.0.3'}}"
            failure(
                factory.dialer(
                    default("[{members: [a, b], balance: failover}, 'http://192.0.2.1:1']", text)
                )
            )
            wait_until(lambda: len(peers) == 2)
        assert peers == ["127.0.0.2", "127.0.0.3"]

    def test_other_hops_leave_nothing_here(self, factory: DialerFactory) -> None:
        """One connection, from the address of the first."""
        peers: list[str] = []
        second = Address("127.0.0.1", 9)

        def script(sock: socket.socket) -> None:
            peers.append(sock.getpeername()[0])
            granting(second, TARGET)(sock)

        with server(script) as first:
            factory.dialer(
                default(f"['socks5h://{first}?bind=127.0.0.2', 'socks5h://{second}']")
            ).dial(tcp_to(TARGET)).close()
        assert peers == ["127.0.0.2"]


class TestTimeout:
    """The factory's are 2 s."""

    @pytest.mark.parametrize("scheme", ["socks4a", "socks5h", "http"])
    def test_of_a_handshake(self, factory: DialerFactory, scheme: str) -> None:
        with server(read_to_end) as address:
            way = factory.dialer(default(f"'{scheme}://{address}?timeout=100ms'"))
            started = time.monotonic()
            error = failure(way)
            took = time.monotonic() - started
        assert (str(error), error.reason, error.upstream) == (
            f"{scheme}://{address}: timed out",
            Reason.TIMEOUT,
            True,
        )
        assert 0.1 <= took < 1.5

    def test_of_a_connection_to_the_first_hop(self, factory: DialerFactory) -> None:
        with black_hole() as address:
            way = factory.dialer(default(f"'http://{address}?timeout=100ms'"))
            started = time.monotonic()
            assert str(failure(way)) == f"http://{address}: timed out"
            assert 0.1 <= time.monotonic() - started < 1.5

    def test_of_another_hop(self, factory: DialerFactory) -> None:
        second = Address("192.0.2.1", 3128)
        with server(granting(second)) as first:
            way = factory.dialer(default(f"['socks5h://{first}', 'http://{second}?timeout=100ms']"))
            started = time.monotonic()
            assert str(failure(way)) == f"hop 2 (http://{second}): timed out"
            assert 0.1 <= time.monotonic() - started < 1.5

    def test_may_be_longer_than_that_of_all(self, reach: TargetResolver) -> None:
        """A proxy that answers one once the other has given up."""
        given_up = threading.Event()

        def script(sock: socket.socket) -> None:
            assert given_up.wait(5)
            granting(TARGET)(sock)

        factory = DialerFactory(reach, UdpSocketFactory(Counts(), Lines()), 0.1, no_services())
        with server(script) as patient, server(read_to_end) as silent:
            dial = Task(
                factory.dialer(default(f"'socks5h://{patient}?timeout=5s'")).dial, tcp_to(TARGET)
            )
            assert (
                failure(factory.dialer(default(f"'socks5h://{silent}'"))).reason is Reason.TIMEOUT
            )
            given_up.set()
            dial.result().close()

    def test_is_none_of_the_connection_once_it_is_there(self, factory: DialerFactory) -> None:
        with server(granting(TARGET)) as address:
            stream = factory.dialer(default(f"'socks5h://{address}?timeout=200ms'")).dial(
                tcp_to(TARGET)
            )
            assert stream._deadline is None
            stream.close()


class TestUdp:
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
    def test_who_carries_it(self, factory: DialerFactory, text: str, carries: set) -> None:
        """And what is shown of it to people says the same."""
        way = default(text)
        assert factory.dialer(way).carries == carries
        assert udp_text(way).startswith("no udp: ") == ("udp" not in carries)

    @pytest.mark.parametrize(
        "scheme, request_",
        [
            ("socks4", b"\x04\x01\x01\xbb\x00\x00\x00\x01\x00" + uot.MAGIC.encode() + b"\x00"),
            ("socks4a", b"\x04\x01\x01\xbb\x00\x00\x00\x01\x00" + uot.MAGIC.encode() + b"\x00"),
            ("socks5", HELLO[0]),
            ("socks5h", HELLO[0]),
            ("http", f"CONNECT {uot.MAGIC}:443 HTTP/1.1\r\nHost: {uot.MAGIC}:443\r\n\r\n".encode()),
        ],
    )
    def test_over_tcp_leaves_its_name_to_the_proxy(
        self, factory: DialerFactory, monkeypatch: pytest.MonkeyPatch, scheme: str, request_: bytes
    ) -> None:
        """Also where other names are resolved here."""
        monkeypatch.setattr(socket, "getaddrinfo", no_lookup)
        granted = {
            "socks4": b"\x00\x5a" + bytes(6),
            "socks4a": b"\x00\x5a" + bytes(6),
            "http": b"HTTP/1.1 200 OK\r\n\r\n",
        }
        steps = (
            (request_, granted[scheme])
            if scheme in granted
            else (*HELLO, connect(Address(uot.MAGIC, 443)), b"\x05" + BOUND)
        )
        with server(play(*steps, uot.encode_request(uot.Request(False, TARGET)))) as address:
            factory.dialer(default(f"'{scheme}://{address}?udp=uot'")).dial_packet(
                udp_to(TARGET)
            ).close()

    @pytest.mark.parametrize(
        "scheme, host", [("socks5", "203.0.113.9"), ("socks5h", "example.com")]
    )
    def test_over_tcp_changes_nothing_for_tcp(
        self, factory: DialerFactory, monkeypatch: pytest.MonkeyPatch, scheme: str, host: str
    ) -> None:
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("203.0.113.9", 443))],
        )
        with server(granting(Address(host, 443))) as address:
            factory.dialer(default(f"'{scheme}://{address}?udp=uot'")).dial(tcp_to(NAME)).close()

    def test_over_tcp_that_a_proxy_does_not_know(self, factory: DialerFactory) -> None:
        with server(
            play(*HELLO, connect(Address(uot.MAGIC, 443)), b"\x05\x04" + BOUND[1:])
        ) as address:
            with pytest.raises(DialError) as caught:
                factory.dialer(ways(f"a: 'socks5h://{address}?udp=uot'")["a"]).dial_packet(
                    udp_to(TARGET)
                )
        assert str(caught.value) == f"'a' (socks5h://{address}): no UoT there (host unreachable)"

    def test_by_associations_behind_a_group_goes_where_its_control_goes(
        self, reach: TargetResolver
    ) -> None:
        """A relay takes datagrams only from where the control connection comes from (RFC 1928 section 7)."""
        controls: list[str] = []
        services = Services(lambda stream, said: None, lambda work: False, Counts())
        factory = DialerFactory(reach, UdpSocketFactory(Counts(), Lines()), SECONDS, services)
        with udp() as relay:

            def script(sock: socket.socket) -> None:
                controls.append(sock.getpeername()[0])
                play(
                    *HELLO,
                    socks5.encode_request(socks5.UDP_ASSOCIATE, Address("0.0.0.0", 0)),
                    socks5.encode_reply(socks5.SUCCEEDED, address_of(relay)),
                )(sock)

            with server(script) as address:
                text = "a: {url: direct, bind: 127.0.0.2}, b: {url: direct, bind: 127.0.0.3}, pool: {members: [a, b]}"
                conn: Any = factory.dialer(
                    default(f"[pool, 'socks5h://{address}']", f"upstreams: {{{text}}}")
                ).dial_packet(udp_to(TARGET))
                send(conn, TARGET)
                _, peer = relay.recvfrom(100)
                conn.close()
                conn._control.close()
        assert peer[0] == controls[0]

    @pytest.mark.parametrize("dead", [1, 2])
    def test_by_associations_behind_a_group_goes_by_the_next_member_at_once(
        self, reach: TargetResolver, dead: int
    ) -> None:
        """Where the first of a failover are dead: as connections do, and not with the client's next datagram."""
        services = Services(lambda stream, said: None, lambda work: False, Counts())
        factory = DialerFactory(reach, UdpSocketFactory(Counts(), Lines()), SECONDS, services)
        with udp() as relay, refusing() as nobody:
            script = play(
                *HELLO,
                socks5.encode_request(socks5.UDP_ASSOCIATE, Address("0.0.0.0", 0)),
                socks5.encode_reply(socks5.SUCCEEDED, address_of(relay)),
            )
            with server(script) as address:
                gone = ", ".join(
                    f"'socks5h://{nobody}?timeout={number + 1}s'" for number in range(dead)
                )
                text = f"b: {{url: direct, bind: 127.0.0.3}}, pool: {{members: [{gone}, b], balance: failover}}"
                way = factory.dialer(
                    default(f"[pool, 'socks5h://{address}']", f"upstreams: {{{text}}}")
                )
                started = time.monotonic()
                conn: Any = way.dial_packet(udp_to(TARGET))
                send(conn, TARGET)
                _, peer = relay.recvfrom(100)
                assert time.monotonic() - started < 1.0
                conn.close()
                conn._control.close()
        assert peer[0] == "127.0.0.3"

    def test_by_associations_behind_a_group_of_the_dead_fails(self, reach: TargetResolver) -> None:
        factory = DialerFactory(reach, UdpSocketFactory(Counts(), Lines()), SECONDS, no_services())
        with refusing() as nobody:
            pool = f"pool: {{members: ['socks5h://{nobody}', 'socks5h://{nobody}?timeout=1s'], balance: failover}}"
            way = factory.dialer(
                default("[pool, 'socks5h://192.0.2.1:1']", f"upstreams: {{{pool}}}")
            )
            with pytest.raises(DialError) as caught:
                way.dial_packet(udp_to(TARGET))
            assert (caught.value.reason, caught.value.upstream) == (Reason.REFUSED, True)

    def test_an_association_that_the_proxy_refuses_is_asked_for_once(
        self, reach: TargetResolver
    ) -> None:
        """Another way to the same proxy would hear the same."""
        factory = DialerFactory(reach, UdpSocketFactory(Counts(), Lines()), SECONDS, no_services())
        asked: list[socket.socket] = []

        def script(sock: socket.socket) -> None:
            asked.append(sock)
            play(
                *HELLO,
                socks5.encode_request(socks5.UDP_ASSOCIATE, Address("0.0.0.0", 0)),
                b"\x05\x07" + BOUND[1:],
            )(sock)

        with server(script) as address:
            text = "a: {url: direct, bind: 127.0.0.2}, b: {url: direct, bind: 127.0.0.3}, pool: {members: [a, b]}"
            way = factory.dialer(
                default(f"[pool, 'socks5h://{address}']", f"upstreams: {{{text}}}")
            )
            with pytest.raises(DialError):
                way.dial_packet(udp_to(TARGET))
        assert len(asked) == 1


class TestTls:
    @staticmethod
    def proxy(mutual: bool = False) -> Callable[[socket.socket], None]:
        """An HTTP proxy within TLS that grants whatever is asked for."""
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(
            certificates().path("server.pem"), certificates().path("server.key")
        )
        if mutual:
            context.load_verify_locations(certificates().path("ca.pem"))
            context.verify_mode = ssl.CERT_REQUIRED

        def script(sock: socket.socket) -> None:
            try:
                with context.wrap_socket(sock, server_side=True) as secured:
                    assert (
                        read_head(secured)
                        == f"CONNECT {TARGET} HTTP/1.1\r\nHost: {TARGET}\r\n\r\n".encode()
                    )
                    secured.sendall(b"HTTP/1.1 200 OK\r\n\r\nhello")
                    secured.recv(1)
            except (ssl.SSLError, EOFError):
                pass  # whoever connected did not like us

        return script

    def test_to_a_proxy_that_shows_who_it_is(self, factory: DialerFactory) -> None:
        with server(self.proxy()) as address:
            text = f"{{url: 'https://{address}', tls: {{ca: '{certificates().path('ca.pem')}'}}}}"
            stream = factory.dialer(default(text)).dial(tcp_to(TARGET))
            assert (stream.read_exactly(5), stream.plain) == (b"hello", False)
            stream.close()

    @pytest.mark.parametrize(
        "tls, said",
        [
            ("", "TLS: "),
            ("tls.ca={stranger.pem}", "TLS: "),
            ("tls.ca={ca.pem}&tls.server_name=proxy.example", "TLS: Hostname mismatch"),
        ],
    )
    def test_to_one_that_is_not_believed(self, factory: DialerFactory, tls: str, said: str) -> None:
        for name in ("stranger.pem", "ca.pem"):
            tls = tls.replace("{" + name + "}", certificates().path(name))
        with server(self.proxy()) as address:
            error = failure(factory.dialer(ways(f"office: 'https://{address}?{tls}'")["office"]))
        assert str(error).startswith(f"'office' (https://{address}): {said}")
        assert (error.reason, error.upstream) == (Reason.PROTOCOL, True)

    @pytest.mark.parametrize(
        "tls", ["tls.insecure=true", "tls.ca={ca.pem}&tls.server_name=localhost"]
    )
    def test_to_one_that_is_told_to_be(self, factory: DialerFactory, tls: str) -> None:
        query = tls.replace("{ca.pem}", certificates().path("ca.pem"))
        with server(self.proxy()) as address:
            factory.dialer(default(f"'https://{address}?{query}'")).dial(tcp_to(TARGET)).close()

    def test_to_one_that_wants_to_know_us(self, factory: DialerFactory) -> None:
        ca, shown, key = (
            certificates().path(name) for name in ("ca.pem", "client.pem", "client.key")
        )
        with server(self.proxy(mutual=True)) as address:
            way = f"'https://{address}?tls.ca={ca}&tls.certificate={shown}&tls.key={key}'"
            factory.dialer(default(way)).dial(tcp_to(TARGET)).close()

    def test_a_name_that_no_handshake_can_ask_for_is_an_error_of_dialling(
        self, factory: DialerFactory
    ) -> None:
        """And no exception that nobody expects."""
        with server(read_to_end) as address:
            with pytest.raises((DialError, ConfigError)):
                factory.dialer(default(f"'https://{address}?tls.server_name=.proxy.example'")).dial(
                    tcp_to(TARGET)
                )

    def test_a_proxy_that_is_silent_has_the_hops_time(self, factory: DialerFactory) -> None:
        with server(read_to_end) as address:
            started = time.monotonic()
            error = failure(
                factory.dialer(default(f"'https://{address}?timeout=100ms&tls.insecure=true'"))
            )
            assert str(error) == f"https://{address}: timed out"
            assert time.monotonic() - started < 1.5

    @pytest.mark.parametrize("scheme", ["https", "socks5+tls", "socks5h+tls"])
    @pytest.mark.parametrize(
        "text, label",
        [
            ("a: '{url}'", "'a' ({bare})"),
            ("a: ['http://h:1', '{url}']", "hop 2 of 'a' ({bare})"),
            ("a: {{members: ['{url}']}}", "{bare}"),
            ("b: '{url}', a: {{members: [b, 'http://h:1']}}", "'b' ({bare})"),
        ],
    )
    def test_a_file_that_cannot_be_used_is_an_error_of_the_configuration(
        self, factory: DialerFactory, scheme: str, text: str, label: str
    ) -> None:
        bare = f"{scheme}://h:2"
        for file, why in (
            ("/nonexistent/ca.pem", "No such file or directory"),
            (certificates().path("broken.pem"), None),
        ):
            way = ways(text.format(url=f"{scheme}://u:secret@h:2?tls.ca={file}"))["a"]
            with pytest.raises(ConfigError) as caught:
                factory.dialer(way)
            assert str(caught.value).startswith(
                f"{label.format(bare=bare)}: tls: cannot use {file}: "
            )
            assert why is None or str(caught.value).endswith(f": {why}")
            assert "secret" not in str(caught.value)

    def test_a_key_that_cannot_be_used_is_one_too(self, factory: DialerFactory) -> None:
        shown, key = certificates().path("client.pem"), certificates().path("encrypted.key")
        with pytest.raises(
            ConfigError, match=f"^https://h:1: tls: cannot use {shown} with {key}: "
        ):
            factory.dialer(default(f"'https://h:1?tls.certificate={shown}&tls.key={key}'"))


class TestRenewal:
    """A reload reads the files of TLS again, for the same dialers, so that a new certificate needs no restart."""

    @staticmethod
    def put(file: Path, name: str) -> None:
        file.write_bytes(Path(certificates().path(name)).read_bytes())

    @staticmethod
    def greets(dialer: Dialer) -> bool:
        """Whether the proxy is believed; else it is said so."""
        try:
            stream = dialer.dial(tcp_to(TARGET))
        except DialError as error:
            assert (error.reason, error.upstream) == (Reason.PROTOCOL, True) and ": TLS: " in str(
                error
            )
            return False
        stream.close()
        return True

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return tmp_path / "ca.pem"

    def test_the_same_dialer_believes_whom_the_file_names_now(
        self, factory: DialerFactory, file: Path
    ) -> None:
        self.put(file, "stranger.pem")
        with server(TestTls.proxy()) as address:
            way = default(f"'https://{address}?tls.ca={file}'")
            dialer = factory.dialer(way)
            assert not self.greets(dialer)
            self.put(file, "ca.pem")
            assert not self.greets(dialer)
            factory.prepare_renewal(list(factory._made)).commit()
            assert factory.dialer(way) is dialer and self.greets(dialer)
            self.put(file, "stranger.pem")
            factory.prepare_renewal(list(factory._made)).commit()
            assert not self.greets(dialer)

    def test_of_members_of_groups_as_well(self, factory: DialerFactory, file: Path) -> None:
        self.put(file, "stranger.pem")
        with server(TestTls.proxy()) as address:
            dialer = factory.dialer(
                ways(f"p: {{members: ['https://{address}?tls.ca={file}']}}")["p"]
            )
            (member,) = members(dialer).values()
            self.put(file, "ca.pem")
            factory.prepare_renewal(list(factory._made)).commit()
            assert self.greets(member.dialer)

    @pytest.mark.parametrize("broken", [True, False], ids=["broken", "gone"])
    def test_a_file_that_cannot_be_used_leaves_all_as_it_was(
        self, factory: DialerFactory, file: Path, broken: bool
    ) -> None:
        """That of another way, too, though its own file can be."""
        other = file.with_name("other.pem")
        self.put(file, "ca.pem")
        self.put(other, "stranger.pem")
        with server(TestTls.proxy()) as address:
            dialer = factory.dialer(ways(f"office: 'https://{address}?tls.ca={file}'")["office"])
            unbelieving = factory.dialer(default(f"'https://{address}?tls.ca={other}'"))
            self.put(other, "ca.pem")
            self.put(file, "broken.pem") if broken else file.unlink()
            with pytest.raises(
                ConfigError, match=f"^'office' \\(https://{address}\\): tls: cannot use {file}: "
            ):
                factory.prepare_renewal(list(factory._made)).commit()
            assert self.greets(dialer) and not self.greets(unbelieving)

    def test_files_of_ways_that_are_forgotten_are_read_no_more(
        self, factory: DialerFactory, file: Path
    ) -> None:
        """An upstream and its files may be removed: later reloads must not miss them."""
        self.put(file, "ca.pem")
        factory.dialer(default(f"'https://192.0.2.1:1?tls.ca={file}'"))
        factory.retain([])
        file.unlink()
        factory.prepare_renewal(list(factory._made)).commit()

    def test_files_that_were_refused_are_read_no_more(
        self, factory: DialerFactory, file: Path
    ) -> None:
        """A typing error in one reload must not spoil the next."""
        with pytest.raises(ConfigError):
            factory.dialer(default(f"'https://192.0.2.1:1?tls.ca={file}'"))
        factory.prepare_renewal(list(factory._made)).commit()


@contextlib.contextmanager
def opened(dial: Callable[[], Any]) -> Iterator[socket.socket]:
    """The one UDP socket that `dial` opens; what it gives is closed at the end."""
    before = datagram_sockets()
    conn = dial()
    (number,) = datagram_sockets() - before
    with socket.socket(fileno=os.dup(number)) as sock:
        yield sock
    conn.close()


def datagram_sockets() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as sock:
                    if sock.type == socket.SOCK_DGRAM:
                        found.add(int(name))
        except OSError:
            pass  # the directory's own descriptor
    return found


def read_head(sock: Any) -> bytes:
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        piece = sock.recv(4096)
        if not piece:
            raise EOFError
        data += piece
    return data


POOL = "a: 'http://h:1', b: 'http://h:2', c: 'socks5://h:3'"


class TestReload:
    def test_the_same_configuration_has_the_same_dialer(self, factory: DialerFactory) -> None:
        texts = [
            f"{POOL}, p: {{members: [a, b], balance: failover}}, q: [p, c], r: {{members: [p, c], health_check: }}"
        ] * 2
        first, second = (ways(text) for text in texts)
        assert first == second
        assert all(factory.dialer(first[name]) is factory.dialer(second[name]) for name in first)

    @pytest.mark.parametrize(
        "change",
        [
            "http://h:2",
            "http://u:p@h:1",
            "https://h:1",
            "http://h:1?udp=none",
            "http://h:1?timeout=1s",
            "http://h:1?bind=eth0",
            "http://h:1?mark=1",
            "http://h:1?keepalive=0",
        ],
    )
    def test_another_configuration_has_another(self, factory: DialerFactory, change: str) -> None:
        assert factory.dialer(default("'http://h:1'")) is not factory.dialer(default(f"'{change}'"))

    @pytest.mark.parametrize(
        "before, after",
        [
            (
                "members: [{via: a}, {via: b}], balance: weighted",
                "members: [{via: a}, {via: b, weight: 5}], balance: weighted",
            ),
            ("members: [a, b]", "members: [c, a, b]"),
            ("members: [a, b]", "members: [b, a]"),
            ("members: [a, b]", "members: [a]"),
            ("members: [a, b]", "members: [a, b], balance: failover"),
            ("members: [a, b]", "members: [a, b], health_check: {interval: 1s}"),
            ("members: [a, b]", "members: [a, 'http://h:9']"),
        ],
    )
    def test_members_keep_their_figures_while_their_group_changes(
        self, factory: DialerFactory, before: str, after: str
    ) -> None:
        old = ways(f"{POOL}, p: {{{before}}}")
        member = members(factory.dialer(old["p"]))["a"]
        member.note_failure(fault(said="gone")())
        new = ways(f"{POOL}, p: {{{after}}}")
        group = factory.dialer(new["p"])
        assert group is not factory.dialer(old["p"])
        factory.retain(new.values())
        kept = members(group)["a"]
        assert kept is member
        assert (kept.dialled, kept.failed, kept.error, kept.rests(time.monotonic())) == (
            1,
            1,
            "gone",
            True,
        )

    def test_and_behind_another_hop(self, factory: DialerFactory) -> None:
        """The hop before them is the same as it was."""
        old = ways(f"{POOL}, p: {{members: [a, b]}}, chain: [c, p]")
        member = members(factory.dialer(old["chain"]))["a"]
        new = ways(f"{POOL}, p: {{members: [a, b], balance: failover}}, chain: [c, p]")
        assert members(factory.dialer(new["chain"]))["a"] is member

    def test_of_groups_within_groups_as_well(self, factory: DialerFactory) -> None:
        old = ways(f"{POOL}, p: {{members: [a, b]}}, out: {{members: [p, c]}}")
        inner = members(group_of(members(factory.dialer(old["out"]))["p"].dialer))["a"]
        new = ways(f"{POOL}, p: {{members: [a, b], balance: failover}}, out: {{members: [p, c]}}")
        made = members(factory.dialer(new["out"]))
        assert members(made["p"].dialer)["a"] is inner

    def test_one_that_changes_itself_begins_anew(self, factory: DialerFactory) -> None:
        old = members(factory.dialer(ways("a: 'http://h:1', p: {members: [a]}")["p"]))["a"]
        assert (
            members(factory.dialer(ways("a: 'http://h:1?timeout=1s', p: {members: [a]}")["p"]))["a"]
            is not old
        )

    def test_members_of_different_groups_are_different(self, factory: DialerFactory) -> None:
        """What one group's checks found is nothing for another, which may have none."""
        both = ways(f"{POOL}, p: {{members: [a]}}, q: {{members: [a]}}")
        assert (
            members(factory.dialer(both["p"]))["a"] is not members(factory.dialer(both["q"]))["a"]
        )

    def test_what_lives_on_a_member_leaves_it_after_the_reload(
        self, factory: DialerFactory
    ) -> None:
        with server(granting(TARGET)) as address:
            old = ways(f"s: 'socks5h://{address}', p: {{members: [s]}}")
            dialer = factory.dialer(old["p"])
            stream = dialer.dial(tcp_to(TARGET))
            new = ways(f"s: 'socks5h://{address}', p: {{members: [s], balance: failover}}")
            kept = members(factory.dialer(new["p"]))["s"]
            factory.retain(new.values())
            assert kept.live == 1
            stream.close()
            assert kept.live == 0

    def test_a_member_that_was_down_is_not_for_ever_once_nobody_checks_it(
        self, factory: DialerFactory
    ) -> None:
        old = ways("a: 'http://h:1', p: {members: [a], health_check: }")
        members(factory.dialer(old["p"]))["a"].note_check("refused")
        new = ways("a: 'http://h:1', p: {members: [a]}")
        group = factory.dialer(new["p"])
        factory.retain(new.values())
        assert not group_of(group).checks
        assert members(group)["a"].up


class TestForgetting:
    def test_ways_that_nobody_names_are_gone(self, factory: DialerFactory) -> None:
        kept, gone = default("'http://h:1'"), default("'http://h:2'")
        before = factory.dialer(kept), factory.dialer(gone)
        factory.retain([kept])
        assert factory.dialer(kept) is before[0]
        assert factory.dialer(gone) is not before[1]

    def test_their_members_are_gone_as_well(self, factory: DialerFactory) -> None:
        text = f"{POOL}, p: {{members: [a, b]}}"
        before = members(factory.dialer(ways(text)["p"]))["a"]
        factory.retain([])
        assert factory.groups() == []
        assert members(factory.dialer(ways(text)["p"]))["a"] is not before

    def test_a_member_that_a_group_gave_up_is_gone(self, factory: DialerFactory) -> None:
        old, new = ways(f"{POOL}, p: {{members: [a, b]}}"), ways(f"{POOL}, p: {{members: [a]}}")
        before = members(factory.dialer(old["p"]))
        factory.dialer(new["p"])
        factory.retain(new.values())
        again = members(factory.dialer(old["p"]))
        assert again["a"] is before["a"] and again["b"] is not before["b"]

    def test_members_of_inner_groups_are_kept(self, factory: DialerFactory) -> None:
        text = ways(f"{POOL}, p: {{members: [a, b]}}, out: {{members: [p, c]}}")
        inner = members(group_of(members(factory.dialer(text["out"]))["p"].dialer))["a"]
        factory.retain([text["out"]])
        assert members(factory.dialer(text["p"]))["a"] is inner

    def test_nothing_piles_up_over_reloads(self, factory: DialerFactory) -> None:
        for number in range(50):
            text = ways(f"a: 'http://h:{number + 1}', p: {{members: [a, direct]}}, q: [p, a]")
            for way in text.values():
                factory.dialer(way)
            factory.retain(text.values())
        assert len(factory._made) == 3
        assert (
            len({member.name for member in factory._members.values()}) == 2
            and len(factory._members) == 2
        )


class TestGroups:
    @pytest.mark.parametrize(
        "text, names",
        [
            ("a: 'http://h:1'", []),
            ("p: {members: [direct]}", ["p"]),
            ("p: ['http://h:1', {members: [direct]}, {members: [direct]}]", ["p[1]", "p[2]"]),
            (
                "p: {members: [{members: [{members: [direct]}]}]}",
                ["p", "p.members[0]", "p.members[0].members[0]"],
            ),
            ("p: {members: [['http://h:1', {members: [direct]}]]}", ["p", "p.members[0][1]"]),
        ],
    )
    def test_are_found_within_chains_and_groups(
        self, factory: DialerFactory, text: str, names: list[str]
    ) -> None:
        factory.dialer(next(iter(ways(text).values())))
        assert sorted(group.name for group in factory.groups()) == names

    def test_within_groups_grow_no_bomb(self, factory: DialerFactory) -> None:
        """HAZARDS 113: a few names, each of which leads to the one before it twice."""
        names = ["g0: 'http://h:1'", "b0: g0"]
        for at in range(1, 21):
            names += [f"g{at}: {{members: [g{at - 1}, b{at - 1}]}}", f"b{at}: g{at}"]
        with pytest.raises(
            ConfigError, match="more than 1024 ways out, those of groups within counted"
        ):
            ways(", ".join(names))

    def test_each_is_found_once(self, factory: DialerFactory) -> None:
        text = ways("p: {members: ['http://h:1']}, q: {members: [p, direct]}")
        for way in text.values():
            factory.dialer(way)
        found = factory.groups()
        assert len(found) == len({id(group) for group in found})


class TestChecks:
    """What the configuration makes of `health_check`."""

    def checks(self, factory: DialerFactory, text: str, name: str = "p") -> list[Any]:
        factory.dialer(ways(text)[name])
        return [check for group in factory.groups() for check in group.checks]

    def test_none_where_none_is_said(self, factory: DialerFactory) -> None:
        assert self.checks(factory, "p: {members: ['http://h:1']}") == []

    def test_of_a_members_own_server(self, factory: DialerFactory) -> None:
        (one,) = self.checks(
            factory, "p: {members: ['http://h:1'], health_check: {interval: 7s, timeout: 3s}}"
        )
        assert (one.group, one.member.name, one.target, one.path, one.interval, one.timeout) == (
            "p",
            "http://h:1",
            Address("h", 1),
            b"",
            7.0,
            3.0,
        )
        assert type(one.dialer) is DirectDialer and one.dialer._seconds == 3.0

    def test_of_a_members_own_server_goes_as_its_dials_go(self, factory: DialerFactory) -> None:
        (one,) = self.checks(
            factory,
            "p: {members: ['http://h:1?bind=127.0.0.2&mark=7&keepalive=0'], health_check: }",
        )
        assert tuple(one.dialer._outgoing) == ("127.0.0.2", "", 7, 0.0)

    def test_of_a_chain_is_of_its_first_hop(self, factory: DialerFactory) -> None:
        (one,) = self.checks(
            factory, "p: {members: [['http://h:1', 'http://h:2']], health_check: }"
        )
        assert (one.target, type(one.dialer)) == (Address("h", 1), DirectDialer)

    def test_behind_another_hop_goes_through_it(self, factory: DialerFactory) -> None:
        (one,) = self.checks(
            factory, "p: ['socks5://h:1', {members: ['http://h:2'], health_check: }]"
        )
        assert (one.target, one.dialer.name) == (Address("h", 2), "socks5://h:1")

    def test_of_a_target_goes_through_the_member(self, factory: DialerFactory) -> None:
        (one,) = self.checks(
            factory,
            "p: {members: ['http://h:1'], health_check: {target: 'www.example:80', path: /up}}",
        )
        assert (one.target, one.dialer.name, one.path) == (
            Address("www.example", 80),
            "http://h:1",
            b"/up",
        )

    def test_of_a_group_in_a_group_are_its_own(self, factory: DialerFactory) -> None:
        text = "in: {members: ['http://h:1'], health_check: }, p: {members: [in, 'http://h:2'], health_check: }"
        assert sorted((check.group, check.target.port) for check in self.checks(factory, text)) == [
            ("in", 1),
            ("p", 2),
        ]

    def test_of_a_group_in_a_group_by_a_target_go_through_it(self, factory: DialerFactory) -> None:
        text = "in: {members: ['http://h:1']}, p: {members: [in], health_check: {target: '192.0.2.1:80'}}"
        (one,) = self.checks(factory, text)
        assert (one.dialer.name, one.target) == ("in", Address("192.0.2.1", 80))

    def test_a_member_without_a_server_is_well(self, factory: DialerFactory) -> None:
        """`direct` as the last resort of a failover has nothing that could be asked: it must not be down for that."""
        health = HealthChecks(Workers().submit, Lines())
        with refusing() as address:
            health.checks = self.checks(
                factory,
                f"p: {{members: ['http://{address}', direct], balance: failover, health_check: }}",
            )
            for begin in health.expire(5000.0):
                begin()
        (group,) = factory.groups()
        assert {member.name: member.up for member in group.members} == {
            f"http://{address}": False,
            "direct": True,
        }

    def test_a_target_that_is_not_reached_in_time_is_the_end_of_the_check(
        self, factory: DialerFactory
    ) -> None:
        """The check's own timeout, though that of dials is longer."""
        health = HealthChecks(Workers().submit, Lines())
        with server(read_to_end) as address:
            health.checks = self.checks(
                factory,
                f"p: {{members: ['socks5h://{address}'], health_check: {{target: '192.0.2.1:80', timeout: 100ms}}}}",
            )
            started = time.monotonic()
            for begin in health.expire(5000.0):
                begin()
            took = time.monotonic() - started
        (group,) = factory.groups()
        assert not group.members[0].up
        assert took < 1.5, f"{took:.1f} s"

    def test_a_group_of_two_names_is_checked_once(self, factory: DialerFactory) -> None:
        pool, health = Workers(eager=False), HealthChecks(lambda task: pool.submit(task), Lines())
        text = ways(
            "p: {members: ['http://192.0.2.1:1'], health_check: }, alias: p, chain: [p, 'http://h:2']"
        )
        for way in text.values():
            factory.dialer(way)
        health.checks = [check for group in factory.groups() for check in group.checks]
        for begin in health.expire(5000.0):
            begin()
        assert len(pool.tasks) == 1


def test_many_threads_share_a_configured_pool(factory: DialerFactory) -> None:
    """End to end, with sockets: what is left at the end is nothing."""
    with server(granting(TARGET)) as one, server(granting(TARGET)) as two, refusing() as three:
        text = ways(
            f"p: {{members: ['socks5h://{one}', 'socks5h://{two}', 'socks5h://{three}'], balance: least-connections}}"
        )
        way = factory.dialer(text["p"])

        def work() -> None:
            for _ in range(25):
                way.dial(tcp_to(TARGET)).close()

        for task in [Task(work) for _ in range(4)]:
            task.result(20.0)
    figures = members(way)
    assert [member.live for member in figures.values()] == [0, 0, 0]
    assert sum(member.dialled - member.failed for member in figures.values()) == 100
    assert figures[f"socks5h://{three}"].failed == figures[f"socks5h://{three}"].dialled >= 1
