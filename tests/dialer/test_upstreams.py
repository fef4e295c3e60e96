"""Configured upstreams: labels of hops in errors, names, socket options and time limits.

Configurations are read from text; proxies are scripted, on loopback.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from typing import Any, Callable, Iterator

import pytest

from netproxy.dialer.direct import TargetResolver
from netproxy.dialer.factory import DialerFactory
from netproxy.errors import Reason
from netproxy.interfaces.addresses import Address
from netproxy.net.socket_options import KEEPALIVE_IDLE
from tests.dialer.configured import (
    BOUND,
    HELLO,
    TARGET,
    connect,
    default_of,
    failure,
    granting,
    group_of,
    members_of,
    play,
    send,
    upstreams_of,
)
from tests.dialer.doubles import make_factory
from tests.support.flows import tcp_to, udp_to
from tests.support.sockets import (
    SECONDS,
    Task,
    address_of,
    black_hole,
    read_to_end,
    refusing,
    server,
    udp,
    wait_until,
)

pytest.importorskip("yaml")


class TestLabels:
    """An error begins with the label of the hop that failed or that reported the failure."""

    def test_label_of_a_named_upstream_has_name_and_url(self, factory: DialerFactory) -> None:
        with refusing() as address:
            office = upstreams_of(f"office: 'socks5h://u:secret@{address}'")["office"]
            error = failure(factory.dialer(office))
        assert str(error) == f"'office' (socks5h://{address}): connection refused"
        assert (error.reason, error.upstream) == (Reason.REFUSED, True)

    def test_label_of_an_unnamed_upstream_is_its_url(self, factory: DialerFactory) -> None:
        with refusing() as address:
            error = failure(factory.dialer(default_of(f"'http://u:secret@{address}'")))
        assert str(error) == f"http://{address}: connection refused"

    @pytest.mark.parametrize("named", [True, False])
    def test_unreachable_first_hop_is_named(self, factory: DialerFactory, named: bool) -> None:
        with refusing() as first:
            text = f"['socks5h://{first}', 'http://192.0.2.1:1']"
            config = upstreams_of(f"two-hops: {text}")["two-hops"] if named else default_of(text)
            error = failure(factory.dialer(config))
        name = " of 'two-hops'" if named else ""
        assert str(error) == f"hop 1{name} (socks5h://{first}): connection refused"

    @pytest.mark.parametrize("named", [True, False])
    def test_failed_second_hop_is_named(self, factory: DialerFactory, named: bool) -> None:
        second = Address("192.0.2.1", 3128)
        request = (
            f"CONNECT {TARGET} HTTP/1.1\r\nHost: {TARGET}\r\n"
            "Proxy-Authorization: Basic dTpzZWNyZXQ=\r\n\r\n"
        ).encode()
        script = play(
            *HELLO,
            connect(second),
            b"\x05" + BOUND,
            request,
            b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n",
        )
        with server(script) as first:
            text = f"['socks5h://{first}', 'http://u:secret@{second}']"
            config = upstreams_of(f"two-hops: {text}")["two-hops"] if named else default_of(text)
            error = failure(factory.dialer(config))
        name = " of 'two-hops'" if named else ""
        assert str(error) == f"hop 2{name} (http://{second}): 407 proxy authentication required"
        assert (error.reason, error.upstream) == (Reason.AUTHENTICATION, True)

    def test_hop_that_cannot_reach_the_next_hop_is_named(self, factory: DialerFactory) -> None:
        second = Address("192.0.2.1", 3128)
        with server(play(*HELLO, connect(second), b"\x05\x04" + BOUND[1:])) as first:
            two = upstreams_of(f"two: ['socks5h://{first}', 'http://{second}']")["two"]
            error = failure(factory.dialer(two))
        assert str(error) == f"hop 1 of 'two' (socks5h://{first}): {second}: host unreachable"
        assert (error.reason, error.upstream) == (Reason.HOST_UNREACHABLE, True)

    def test_last_hop_that_reports_about_the_target_is_named(self, factory: DialerFactory) -> None:
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
            two = upstreams_of(f"two: ['socks5h://{first}', 'socks5h://{second}']")["two"]
            error = failure(factory.dialer(two))
        assert str(error) == f"hop 2 of 'two' (socks5h://{second}): {TARGET}: connection refused"
        assert (error.reason, error.upstream) == (Reason.REFUSED, False)

    def test_hop_of_a_named_upstream_in_a_chain_has_the_chains_name(
        self, factory: DialerFactory
    ) -> None:
        with refusing() as first:
            text = f"office: 'socks5h://{first}', two: [office, 'http://192.0.2.1:1']"
            error = failure(factory.dialer(upstreams_of(text)["two"]))
        assert str(error) == f"hop 1 of 'two' (socks5h://{first}): connection refused"

    def test_members_of_a_group_have_their_own_labels(self, factory: DialerFactory) -> None:
        with refusing() as first, refusing() as second:
            pool = upstreams_of(
                f"a: 'socks5h://{first}', pool: {{balance: failover, "
                f"members: [a, 'http://{second}', [a, 'http://{second}']]}}"
            )["pool"]
            error = failure(factory.dialer(pool))
        assert str(error) == (
            f"group 'pool': no member could connect: "
            f"a: 'a' (socks5h://{first}): connection refused; "
            f"http://{second}: http://{second}: connection refused; "
            f"socks5h://{first} -> http://{second}: hop 1 (socks5h://{first}): connection refused"
        )

    def test_no_error_contains_a_secret(self, factory: DialerFactory) -> None:
        """Hazard 111."""
        texts = []
        for answer in (b"\x05\xff", b"HTTP/1.1 407 No\r\n\r\n", b"nonsense\r\n\r\n", b""):

            def script(sock: socket.socket, answer: bytes = answer) -> None:
                sock.recv(9999)
                sock.sendall(answer)

            with server(script) as address:
                urls = ", ".join(
                    f"'{scheme}://user:hunter2@{address}'"
                    for scheme in ("socks5", "socks5h", "http")
                )
                error = failure(factory.dialer(default_of(f"{{members: [{urls}]}}")))
                texts += [str(error), repr(error)]
                for group in factory.groups():
                    texts += [member.error for member in group.members]
        assert texts and not any("hunter2" in text or "aHVudGVyMg" in text for text in texts)


class TestNames:
    """Names of upstreams, as records and rules show them."""

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
    def test_name_of_an_upstream(self, factory: DialerFactory, text: str, name: str | None) -> None:
        """The configured name, or else the text without secrets."""
        more = "upstreams: {one: 'http://h:1', pool: {members: [one]}}"
        dialer = factory.dialer(default_of(text, more))
        if name == "default":
            assert group_of(dialer).name == name
        elif name:
            assert dialer.name == name
        assert "secret" not in dialer.name

    def test_names_of_members(self, factory: DialerFactory) -> None:
        pool = factory.dialer(
            default_of(
                "{members: [one, 'http://u:p@h:2', [one, 'http://h:3'], direct]}",
                "upstreams: {one: 'http://h:1'}",
            )
        )
        names = ["one", "http://h:2", "http://h:1 -> http://h:3", "direct"]
        assert list(members_of(pool)) == names


class TestSocketOptions:
    """Options of the sockets that reach the first hop."""

    def test_first_hop_is_reached_from_the_bind_address(self, factory: DialerFactory) -> None:
        peers: list[str] = []
        with server(lambda sock: peers.append(sock.getpeername()[0])) as address:
            failure(factory.dialer(default_of(f"'http://{address}?bind=127.0.0.2'")))
            failure(factory.dialer(default_of(f"'http://{address}'")))
            wait_until(lambda: len(peers) == 2)
        assert peers == ["127.0.0.2", "127.0.0.1"]

    def test_target_is_reached_from_the_bind_address_of_direct(
        self, factory: DialerFactory
    ) -> None:
        dialer = factory.dialer(default_of("{url: direct, bind: 127.0.0.2}"))
        assert dialer.carries == {"tcp", "udp", "bind"}
        with server(read_to_end) as address:
            stream = dialer.dial(tcp_to(address))
            assert stream.local_address().host == "127.0.0.2"
            stream.close()
        with udp() as target:
            conn: Any = dialer.dial_packet(udp_to(TARGET))
            send(conn, address_of(target))
            data, peer = target.recvfrom(100)
            conn.close()
        assert (data, peer[0]) == (b"query", "127.0.0.2")

    def test_bind_address_of_the_wrong_family_is_unreachable(self, factory: DialerFactory) -> None:
        with refusing() as address:
            error = failure(factory.dialer(default_of(f"'http://{address}?bind=::1'")))
        assert (str(error), error.reason) == (
            f"http://{address}: bind: ::1 is IPv6, and the target has IPv4 addresses only",
            Reason.NETWORK_UNREACHABLE,
        )

    @pytest.mark.parametrize("bind", ["192.0.2.77", "nonexistent0"])
    def test_bind_address_or_interface_that_does_not_exist_is_the_upstreams_fault(
        self, factory: DialerFactory, bind: str
    ) -> None:
        with refusing() as address:
            error = failure(factory.dialer(default_of(f"'http://{address}?bind={bind}'")))
        assert str(error).startswith(f"http://{address}: ") and error.upstream

    @pytest.mark.parametrize(
        "key, option, value",
        [
            ("bind: lo", socket.SO_BINDTODEVICE, b"lo\0"),
            ("mark: 0x2a", socket.SO_MARK, (42).to_bytes(4, sys.byteorder)),
        ],
    )
    def test_interface_and_mark_are_set_on_tcp_and_udp_sockets(
        self, factory: DialerFactory, key: str, option: int, value: bytes
    ) -> None:
        with socket.socket() as probe:
            try:
                probe.setsockopt(socket.SOL_SOCKET, option, value)
            except PermissionError:
                pytest.skip("needs CAP_NET_ADMIN or CAP_NET_RAW")
        dialer = factory.dialer(default_of(f"{{url: direct, {key}}}"))
        with server(read_to_end) as address:
            stream = dialer.dial(tcp_to(address))
            assert stream.socket.getsockopt(socket.SOL_SOCKET, option, 16)[: len(value)] == value
            stream.close()
        with opened(lambda: dialer.dial_packet(udp_to(TARGET))) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, option, 16)[: len(value)] == value

    @pytest.mark.parametrize(
        "query, enabled, idle",
        [
            ("", 1, KEEPALIVE_IDLE),
            ("?keepalive=7s", 1, 7),
            ("?keepalive=0", 0, None),
            ("?keepalive=300ms", 1, 1),
        ],
    )
    def test_keepalive_option_is_set(
        self, factory: DialerFactory, query: str, enabled: int, idle: int | None
    ) -> None:
        with server(granting(TARGET)) as address:
            dialer = factory.dialer(default_of(f"'socks5h://{address}{query}'"))
            stream = dialer.dial(tcp_to(TARGET))
            sock = stream.socket
            assert bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) == bool(enabled)
            assert idle is None or sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == idle
            stream.close()

    def test_members_of_a_first_group_have_their_own_bind_addresses(
        self, factory: DialerFactory
    ) -> None:
        peers: list[str] = []
        with server(lambda sock: peers.append(sock.getpeername()[0])) as address:
            more = (
                f"upstreams: {{a: 'http://{address}?bind=127.0.0.2', "
                f"b: 'http://{address}?bind=127.0.0.3'}}"
            )
            text = "[{members: [a, b], balance: failover}, 'http://192.0.2.1:1']"
            failure(factory.dialer(default_of(text, more)))
            wait_until(lambda: len(peers) == 2)
        assert peers == ["127.0.0.2", "127.0.0.3"]

    def test_chain_opens_one_connection_from_the_first_hops_bind_address(
        self, factory: DialerFactory
    ) -> None:
        peers: list[str] = []
        second = Address("127.0.0.1", 9)

        def script(sock: socket.socket) -> None:
            peers.append(sock.getpeername()[0])
            granting(second, TARGET)(sock)

        with server(script) as first:
            text = f"['socks5h://{first}?bind=127.0.0.2', 'socks5h://{second}']"
            factory.dialer(default_of(text)).dial(tcp_to(TARGET)).close()
        assert peers == ["127.0.0.2"]


class TestTimeouts:
    """The factory's own time limit is so long that only the hop's can end these dials."""

    @pytest.mark.parametrize("scheme", ["socks4a", "socks5h", "http"])
    def test_hops_timeout_limits_its_handshake(self, factory: DialerFactory, scheme: str) -> None:
        with server(read_to_end) as address:
            dialer = factory.dialer(default_of(f"'{scheme}://{address}?timeout=100ms'"))
            error = failure(dialer)
        assert (str(error), error.reason, error.upstream) == (
            f"{scheme}://{address}: timed out",
            Reason.TIMEOUT,
            True,
        )

    def test_first_hops_timeout_limits_its_connection(self, factory: DialerFactory) -> None:
        with black_hole() as address:
            dialer = factory.dialer(default_of(f"'http://{address}?timeout=100ms'"))
            assert str(failure(dialer)) == f"http://{address}: timed out"

    def test_second_hops_timeout_limits_its_handshake(self, factory: DialerFactory) -> None:
        second = Address("192.0.2.1", 3128)
        with server(granting(second)) as first:
            text = f"['socks5h://{first}', 'http://{second}?timeout=100ms']"
            error = failure(factory.dialer(default_of(text)))
        assert str(error) == f"hop 2 (http://{second}): timed out"

    def test_hops_timeout_may_be_longer_than_the_general_one(
        self, target_resolver: TargetResolver
    ) -> None:
        """A proxy answers one client after another client has given up."""
        timed_out = threading.Event()

        def script(sock: socket.socket) -> None:
            assert timed_out.wait(SECONDS)
            granting(TARGET)(sock)

        factory = make_factory(target_resolver, 0.1)
        with server(script) as slow, server(read_to_end) as silent:
            dialer = factory.dialer(default_of(f"'socks5h://{slow}?timeout=5s'"))
            dial = Task(dialer.dial, tcp_to(TARGET))
            error = failure(factory.dialer(default_of(f"'socks5h://{silent}'")))
            assert error.reason is Reason.TIMEOUT
            timed_out.set()
            dial.result().close()

    def test_established_stream_has_no_time_limit(self, factory: DialerFactory) -> None:
        with server(granting(TARGET)) as address:
            dialer = factory.dialer(default_of(f"'socks5h://{address}?timeout=200ms'"))
            stream: Any = dialer.dial(tcp_to(TARGET))
            assert stream.deadline is None
            stream.close()


@contextlib.contextmanager
def opened(dial: Callable[[], Any]) -> Iterator[socket.socket]:
    """Yield the UDP socket that `dial` opens; close the packet connection at the end."""
    before = datagram_sockets()
    conn = dial()
    (number,) = datagram_sockets() - before
    with socket.socket(fileno=os.dup(number)) as sock:
        yield sock
    conn.close()


def datagram_sockets() -> set[int]:
    """Return the descriptors of all UDP sockets of this process."""
    descriptors = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as sock:
                    if sock.type == socket.SOCK_DGRAM:
                        descriptors.add(int(name))
        except OSError:
            # The descriptor of the directory itself is closed by now.
            pass
    return descriptors
