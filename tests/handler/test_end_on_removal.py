"""What a user has open ends when a reload removes the user or the password, if that is wanted."""

from __future__ import annotations

import base64
import socket
from typing import Any, Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol import socks5
from netproxy.protocol.http import capsule
from netproxy.protocol.http import connect_udp
from tests.handler.test_reload_permissions import Association, UotStream, log_in
from tests.support.handlers import LOCALHOST, eventually
from tests.support.relays import Running, UdpPort, running
from tests.support.sockets import SECONDS, black_hole, nothing_comes, read_exactly, read_to_end

BOTH = "users: {alice: {password: secret}, bob: {password: secret}}"
CHANGES = {
    "user removed": "users: {bob: {password: secret}}",
    "password changed": "users: {alice: {password: other}, bob: {password: secret}}",
}
LINE = "ended because a user was removed or a password changed: "


def text(users: str, more: str = "end_on_removal: true") -> str:
    listeners = "listeners: [{name: main, listen: '127.0.0.1:0'}]"
    return f"{listeners}\ndestinations: {{deny: []}}\n{users}\n{more}"


def told(relay: Running) -> list[str]:
    return [line for line in relay.log.lines if LINE in line]


def ends(relay: Running) -> list[tuple[str, str, str]]:
    """Return network, user and end of each record."""
    return [(record.flow.network, record.flow.user, record.ended) for record in relay.log.records]


@pytest.fixture
def origin() -> Iterator[socket.socket]:
    with socket.create_server((LOCALHOST, 0)) as server:
        server.settimeout(SECONDS)
        yield server


@pytest.fixture
def target() -> Iterator[UdpPort]:
    with UdpPort() as target:
        yield target


def open_tunnel(relay: Running, origin: socket.socket) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a tunnel of alice that has carried bytes."""
    client, _ = log_in(relay.port, socks5.CONNECT, Address(*origin.getsockname()))
    upstream, _ = origin.accept()
    upstream.settimeout(SECONDS)
    client.sendall(b"hello")
    assert read_exactly(upstream, 5) == b"hello"
    return client, upstream


@pytest.mark.parametrize("why", CHANGES)
def test_tunnel_ends_with_its_reason(origin: socket.socket, why: str) -> None:
    with running(text(BOTH)) as relay:
        client, upstream = open_tunnel(relay, origin)
        relay.reload(text(CHANGES[why]))
        assert read_to_end(client) == read_to_end(upstream) == b""
        eventually(lambda: ends(relay) == [("tcp", "alice", why)])
        assert [line.partition(LINE)[2] for line in told(relay)] == ["flows=1 connections=1"]
        eventually(lambda: not relay.daemon.live)
        client.close()
        upstream.close()


def test_dial_in_progress_ends() -> None:
    with running(text(BOTH)) as relay, black_hole() as silent:
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as client:
            client.sendall(b"\5\1\2" + socks5.encode_credentials("alice", "secret"))
            client.sendall(socks5.encode_request(socks5.CONNECT, silent))
            assert read_exactly(client, 4) == b"\5\2\1\0"
            # The client and the pending dial are watched.
            eventually(lambda: len(relay.daemon._runtime.poller) == 1)
            eventually(lambda: relay.daemon._tcp_listeners()[0].connections()[0].stream.login)
            relay.reload(text(CHANGES["user removed"]))
            read_to_end(client)
        eventually(lambda: ends(relay) == [("tcp", "alice", "user removed")])


@pytest.mark.parametrize("kind", [Association, UotStream])
@pytest.mark.parametrize("why", CHANGES)
def test_sessions_end_with_their_stream_or_control_connection(
    target: UdpPort, kind: Any, why: str
) -> None:
    with running(text(BOTH)) as relay:
        client = kind(relay)
        client.send(target, b"first")
        target.expect(b"first")
        relay.reload(text(CHANGES[why]))
        assert client.control.recv(1) == b""
        eventually(relay.idle)
        eventually(lambda: ends(relay) == [("udp", "alice", why)])
        assert relay.count("sessions_evicted", why) == 1
        eventually(lambda: not relay.daemon.live)
        client.close()


def test_connect_udp_stream_ends(target: UdpPort) -> None:
    authorization = b"Basic " + base64.b64encode(b"alice:secret")
    with running(text(BOTH)) as relay:
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
            sock.sendall(connect_udp.encode_request(target.address, "proxy", authorization))
            assert read_exactly(sock, 12) == b"HTTP/1.1 101"
            sock.sendall(capsule.datagram_header(5) + b"first")
            target.expect(b"first")
            relay.reload(text(CHANGES["user removed"]))
            read_to_end(sock)
        eventually(lambda: ends(relay) == [("udp", "alice", "user removed")])
        eventually(lambda: not relay.daemon.live)


def test_request_that_an_origin_has_not_answered_ends(origin: socket.socket) -> None:
    host, port = origin.getsockname()
    credentials = base64.b64encode(b"alice:secret")
    with running(text(BOTH)) as relay:
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as client:
            client.sendall(
                b"GET http://%b:%d/ HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic %b\r\n\r\n"
                % (host.encode(), port, credentials)
            )
            upstream, _ = origin.accept()
            upstream.settimeout(SECONDS)
            assert upstream.recv(4096).startswith(b"GET / ")
            relay.reload(text(CHANGES["user removed"]))
            assert b"200 OK" not in read_to_end(client)
            assert read_to_end(upstream) == b""
            upstream.close()
        eventually(lambda: ends(relay) == [("tcp", "alice", "user removed")])


@pytest.mark.parametrize("more", ["", "end_on_removal: false"])
def test_everything_goes_on_unless_it_is_wanted(
    origin: socket.socket, target: UdpPort, more: str
) -> None:
    with running(text(BOTH, more)) as relay:
        client, upstream = open_tunnel(relay, origin)
        association = Association(relay)
        association.send(target, b"first")
        target.expect(b"first")
        relay.reload(text(CHANGES["user removed"], more))
        association.send(target, b"goes on")
        target.expect(b"goes on")
        client.sendall(b"goes on")
        assert read_exactly(upstream, 7) == b"goes on"
        assert not told(relay) and not relay.log.records
        association.close()
        client.close()
        upstream.close()


def test_reload_that_changes_no_login_ends_nothing(origin: socket.socket) -> None:
    with running(text(BOTH)) as relay:
        client, upstream = open_tunnel(relay, origin)
        relay.reload(text("users: {alice: {password: secret}}", "end_on_removal: true"))
        client.sendall(b"goes on")
        assert read_exactly(upstream, 7) == b"goes on"
        assert nothing_comes(client) and not told(relay)
        client.close()
        upstream.close()


def test_tunnel_of_a_listener_that_is_removed_with_the_user_ends(origin: socket.socket) -> None:
    with running(text(BOTH)) as relay:
        client, upstream = open_tunnel(relay, origin)
        other = text(CHANGES["user removed"]).replace("main", "other")
        relay.reload(other.replace("127.0.0.1:0", "127.0.0.2:0"))
        assert read_to_end(client) == b""
        eventually(lambda: ends(relay) == [("tcp", "alice", "user removed")])
        client.close()
        upstream.close()
