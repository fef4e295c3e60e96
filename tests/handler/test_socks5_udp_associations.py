"""SOCKS5 associations through a real daemon: who may send, and what ends with an association."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack
from typing import Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.net.stream import Stream, complete
from netproxy.protocol.socks5 import encode_header, read_reply
from tests.support.handlers import LOCALHOST, descriptors, eventually
from tests.support.ports import CANDIDATES
from tests.support.relays import (
    NO_HINT,
    SPS,
    Running,
    UdpClient,
    UdpPort,
    associate,
    running,
    sessions_threads,
)

WILDCARD = "listeners: [{listen: '%s', allow_open: true}]\ndestinations: {deny: []}"
IDLE = "listeners: [{listen: '127.0.0.1:0', udp: {idle_timeout: 200s}}]"
OWN_PORTS = "listeners: [{listen: '127.0.0.1:0', udp: {relay_port: %s}}]"


@pytest.fixture
def relay() -> Iterator[Running]:
    with running() as relay:
        yield relay


# -- which association a datagram belongs to


def test_port_in_the_request_decides_which_association_is_meant(relay: Running) -> None:
    with UdpPort() as target, UdpClient(relay.port) as first, UdpClient(relay.port) as second:
        first.check_echo(target, b"first")
        first.leave()
        # The session was that of `first`, though the association of `second` is newer.
        eventually(lambda: relay.state()["sessions"] == 0)
        assert relay.state()["associations"] == 1
        second.check_echo(target, b"second")


def test_guessed_endpoint_outlives_a_wrong_guess(relay: Running) -> None:
    with (
        UdpPort() as target,
        UdpClient(relay.port, hint=NO_HINT) as old,
        UdpClient(relay.port, hint=NO_HINT) as new,
    ):
        # `old` takes the association of `new`, the newest without an endpoint, and `new` that
        # of `old`.
        old.check_echo(target)
        new.check_echo(target)
        new.leave()
        eventually(lambda: relay.state()["associations"] == 1)
        old.check_echo(target)
        old.leave()
        eventually(lambda: relay.state() == {"associations": 0, "sessions": 0, "entries": 0})


def test_successor_still_admits_its_own_endpoint(relay: Running) -> None:
    with UdpPort() as target, UdpClient(relay.port, hint=NO_HINT) as later:
        for _ in range(3):
            with UdpClient(relay.port, hint=NO_HINT) as first:
                first.check_echo(target)
            eventually(lambda: relay.state()["associations"] == 1)
        # Its first datagram comes after other clients have come and gone.
        later.check_echo(target)
    assert not relay.drops()


def test_associations_get_an_endpoint_each_before_one_gets_a_second(relay: Running) -> None:
    with ExitStack() as stack:
        target = stack.enter_context(UdpPort())
        clients = [stack.enter_context(UdpClient(relay.port, hint=NO_HINT)) for _ in range(3)]
        third = clients.pop()
        third.leave()
        eventually(lambda: relay.state()["associations"] == 2)
        for client in clients:
            client.check_echo(target)
        third.check_echo(target)
        assert relay.state()["sessions"] == 3
        for client in clients:
            client.leave()
        eventually(relay.idle)
        third.to(target.address, b"without association")
        eventually(lambda: relay.count("drops", "unknown sender") == 1)
        assert target.silent()


def test_association_of_another_address_is_not_taken(relay: Running) -> None:
    with (
        UdpClient(relay.port, source="127.0.0.2") as client,
        UdpPort() as target,
        UdpPort() as other,
    ):
        other.send(encode_header(target.address) + b"hello", client.bound)
        eventually(lambda: relay.count("drops", "unknown sender") == 1)
        client.check_echo(target)


# -- what ends


@pytest.mark.parametrize("leaving", ["end", "reset", "half"])
def test_sessions_threads_and_descriptors_end_with_the_control_connection(
    relay: Running, leaving: str
) -> None:
    """Hazard 25."""
    with UdpPort() as target, UdpPort("::1") as other:
        before = descriptors()
        with UdpClient(relay.port) as client:
            client.check_echo(target)
            client.check_echo(other)
            assert sessions_threads() == 1
            client.leave(leaving)
            eventually(relay.idle, 1.0)
            eventually(lambda: not sessions_threads(), 1.0)
            client.control.close()
            # The client's own socket is left.
            eventually(lambda: descriptors() == before + 1, 1.0)
            client.to(target.address, b"still there?")
            eventually(lambda: relay.count("drops", "unknown sender") == 1)
            assert target.silent()
    assert [record.ended for record in relay.log.records] == ["association ended"]


def test_bytes_on_a_control_connection_are_ignored(relay: Running) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target:
        client.control.sendall(b"x" * 100000)
        client.check_echo(target)
        client.control.sendall(b"\5\1\0")
        client.check_echo(target)


def test_association_outlives_the_deadline_of_the_handshake() -> None:
    with (
        running(SPS + "\ntimeouts: {handshake: 100ms}") as relay,
        UdpClient(relay.port) as client,
        UdpPort() as target,
    ):
        with socket.create_connection((LOCALHOST, relay.port)) as idle:
            # The deadline has passed.
            assert idle.recv(1) == b""
        client.check_echo(target)


def test_record_of_a_session_has_its_traffic(relay: Running) -> None:
    with UdpPort() as target:
        with UdpClient(relay.port) as client:
            for data in (b"", b"12345"):
                client.check_echo(target, data)
            address = Address(*client.socket.getsockname())
        eventually(lambda: relay.log.records)
    record = relay.log.records[0]
    assert record.flow[:6] == (
        "udp",
        address,
        target.address,
        record.flow.listener,
        "",
        (target.address,),
    )
    assert (
        record.upstream,
        record.sent,
        record.received,
        record.datagrams_sent,
        record.datagrams_received,
    ) == ("direct", 5, 5, 2, 2)


def test_datagrams_have_the_user_of_their_control_connection() -> None:
    text = "users: {alice: {password: secret}}\nlisteners: [{listen: '127.0.0.1:0'}]"
    with running(text) as relay, UdpPort() as target, UdpPort() as client:
        with socket.create_connection((LOCALHOST, relay.port)) as control:
            control.sendall(b"\5\1\2\1\5alice\6secret\5\3\0\1\0\0\0\0\0\0")
            stream = Stream(control)
            assert complete(stream.read_exactly(4)) == b"\5\2\1\0"
            bound = complete(read_reply(stream))[1]
            client.send(encode_header(target.address) + b"hello", bound)
            target.expect(b"hello")
        eventually(lambda: relay.log.records)
    assert relay.log.records[0].flow.user == "alice"


def test_idle_session_ends_and_the_next_datagram_makes_a_new_one() -> None:
    """Hazard 34.  There is no black hole."""
    with running(IDLE) as relay, UdpClient(relay.port) as client, UdpPort() as target:
        before = client.check_echo(target)
        relay.sweep(100)
        assert relay.state()["sessions"] == 1
        relay.sweep(200)
        assert relay.state() == {"associations": 1, "sessions": 0, "entries": 0}
        eventually(lambda: not sessions_threads())
        assert client.check_echo(target) != before


def test_only_datagrams_of_the_client_keep_a_session_alive() -> None:
    """Hazard 35.  Otherwise anyone could keep the session open."""
    with running(IDLE) as relay, UdpClient(relay.port) as client, UdpPort() as target:
        seen = client.check_echo(target)
        relay.sweep(0)
        target.send(b"inbound", seen)
        assert client.receive()[0] == b"inbound"
        relay.sweep(200)
        assert relay.state()["sessions"] == 0


def test_daemon_stops_with_live_associations() -> None:
    before = descriptors()
    with UdpPort() as target, ExitStack() as stack:
        with running() as relay:
            clients = [stack.enter_context(UdpClient(relay.port)) for _ in range(5)]
            for client in clients:
                client.check_echo(target)
        for client in clients:
            assert client.control.recv(1) == b""
    eventually(lambda: descriptors() == before)


# -- where replies come from, and relay ports


@pytest.mark.parametrize(
    "listen, servers",
    [
        ("0.0.0.0:0", ["127.0.0.1", "127.0.0.2"]),
        ("[::]:0", ["127.0.0.1", "127.0.0.2", "::1"]),
        (":0", ["127.0.0.2", "::1"]),
    ],
)
def test_replies_come_from_bnd_on_a_wildcard_listener(listen: str, servers: list[str]) -> None:
    """Hazard 42."""
    with running(WILDCARD % listen) as relay, UdpPort() as target, ExitStack() as stack:
        clients = [
            stack.enter_context(
                UdpClient(relay.port, server, server if ":" in server else LOCALHOST)
            )
            for server in servers
        ]
        for client, server in zip(clients, servers, strict=True):
            assert client.bound == Address(server, relay.port)
            # Its socket is connected to BND, and receives nothing from elsewhere.
            client.check_echo(target)
        for client in clients:
            client.check_echo(target, b"again")


def test_datagram_to_another_local_address_does_not_move_replies_away_from_bnd() -> None:
    """Hazard 42."""
    with (
        running(WILDCARD % "0.0.0.0:0") as relay,
        UdpClient(relay.port) as client,
        UdpPort() as target,
    ):
        seen = client.check_echo(target)
        client.socket.sendto(
            encode_header(target.address) + b"elsewhere", ("127.0.0.2", relay.port)
        )
        # The mapping is the same, and the reply comes from the address the client sent to.
        assert target.expect(b"elsewhere") == seen
        assert client.check_echo(target) == seen


def test_ipv6_client_reaches_targets_of_both_families() -> None:
    with (
        running("listeners: [{listen: '[::1]:0'}]") as relay,
        UdpClient(relay.port, "::1", "::1") as client,
    ):
        with UdpPort() as target, UdpPort("::1") as other:
            assert client.bound == Address("::1", relay.port)
            assert client.check_echo(target).port == client.check_echo(other).port


@pytest.mark.parametrize("ports", ["any", "range"])
def test_association_with_its_own_relay_socket_closes_it(ports: str) -> None:
    first, last = free_ports(4)
    with (
        running(OWN_PORTS % (ports if ports == "any" else f"{first}-{last}")) as relay,
        UdpPort() as target,
    ):
        before = descriptors()
        with UdpClient(relay.port) as client, UdpClient(relay.port) as other:
            bound = {client.bound.port, other.bound.port}
            assert len(bound) == 2 and relay.port not in bound
            assert ports == "any" or all(first <= port <= last for port in bound)
            assert client.bound.host == LOCALHOST
            client.check_echo(target)
            other.check_echo(target)
            with UdpPort() as unknown:
                unknown.send(encode_header(target.address) + b"no way", client.bound)
                eventually(lambda: relay.count("drops", "unknown sender") == 1)
        eventually(lambda: descriptors() == before, 1.0)
        eventually(
            lambda: (
                not any(thread.name.startswith("udp-listener") for thread in threading.enumerate())
            ),
            1.0,
        )
        for port in bound:
            # The port may be bound again.
            UdpPort(LOCALHOST, port).close()
        assert relay.idle() and target.silent()


def test_client_with_its_own_relay_port_keeps_to_its_own_association() -> None:
    """The relay socket tells two clients of one address apart, whatever port they named."""
    with running(OWN_PORTS % "any") as relay, UdpPort() as target:
        with (
            UdpClient(relay.port, hint=NO_HINT) as first,
            UdpClient(relay.port, hint=NO_HINT) as other,
        ):
            first.check_echo(target)
            other.check_echo(target)
            other.leave()
            eventually(lambda: relay.state()["associations"] == 1)
            first.check_echo(target)


def test_association_is_refused_until_a_port_of_the_range_is_free() -> None:
    port, _ = free_ports(1)
    with running(OWN_PORTS % f"{port}-{port}") as relay, UdpPort() as target:
        before = descriptors()
        with UdpClient(relay.port) as client:
            with associate(relay.port) as refused:
                assert refused.recv(16) == b"\5\1\0\1\0\0\0\0\0\0"
                assert refused.recv(1) == b""
            client.check_echo(target)
        eventually(lambda: descriptors() == before)
        with UdpClient(relay.port) as client:
            client.check_echo(target)


def test_association_through_an_upstream_without_udp_is_refused_with_07() -> None:
    text = SPS + "\nupstreams: {up: 'http://127.0.0.1:9?udp=none'}\ndefault: up"
    with running(text) as relay, associate(relay.port) as control:
        assert control.recv(16) == b"\5\7\0\1\0\0\0\0\0\0"
        assert control.recv(1) == b""


# -- reload


@pytest.mark.parametrize("changed", ["", "\nlog: {level: debug}", "\ntimeouts: {connect: 3s}"])
def test_association_keeps_working_over_a_reload(relay: Running, changed: str) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target, UdpPort() as new:
        seen = client.check_echo(target)
        relay.reload(SPS + changed)
        assert client.check_echo(target) == seen
        client.check_echo(new)
        client.leave()
        eventually(relay.idle, 1.0)


def test_association_with_its_own_port_keeps_working_over_a_reload() -> None:
    with running(OWN_PORTS % "any") as relay, UdpPort() as target, UdpPort() as new:
        before = descriptors()
        with UdpClient(relay.port) as client:
            client.check_echo(target)
            relay.reload(OWN_PORTS % "any" + "\nlog: {level: debug}")
            client.check_echo(target)
            client.check_echo(new)
        eventually(lambda: relay.idle() and descriptors() == before)


def test_new_target_after_a_reload_uses_the_new_upstream(relay: Running) -> None:
    with UdpClient(relay.port) as client, UdpPort() as target, UdpPort() as new:
        client.check_echo(target)
        relay.reload(SPS + "\ndefault: block")
        client.to(new.address, b"denied")
        eventually(lambda: relay.count("drops", "not allowed by the rules") == 1)
        # An entry that exists keeps its upstream.
        client.check_echo(target)
        assert new.silent()


def free_ports(count: int) -> tuple[int, int]:
    """Return the first and last of `count` free ports that the kernel does not assign itself."""
    for first in range(CANDIDATES.start, CANDIDATES.stop - count, count):
        try:
            for port in range(first, first + count):
                UdpPort(LOCALHOST, port).close()
        except OSError:
            continue
        return first, first + count - 1
    raise AssertionError("no free ports")
