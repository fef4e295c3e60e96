"""What a reload forbids is forbidden for all that is new, whatever is already open.

Real daemons: an association, a UoT stream, a connect-udp stream and a kept HTTP connection of
a client go on with what they have, and ask the running configuration for everything else.
"""

from __future__ import annotations

import base64
import socket
from typing import Any, Callable, Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.net.stream import Stream, complete
from netproxy.protocol import socks5, uot
from netproxy.protocol.http import capsule
from netproxy.protocol.http import connect_udp
from netproxy.protocol.socks5 import encode_header
from tests.support.handlers import LOCALHOST, SECONDS, eventually
from tests.support.dns import query, question
from tests.support.nameservers import framed, read_framed
from tests.support.relays import Running, UdpClient, UdpPort, running
from tests.support.sockets import nothing_comes, read_exactly, read_to_end

LISTENER = "listeners: [{listen: '127.0.0.1:0', udp: {relay_port: %s}%s}]\n"
ALICE, BOB = "users: {alice: {password: secret}}", "users: {bob: {password: secret}}"
OTHER_PASSWORD = "users: {alice: {password: other}}"
ELSEWHERE = ", clients: [192.0.2.0/24]"

CHANGES = {
    "user removed": (BOB, ""),
    "password changed": (OTHER_PASSWORD, ""),
    "client not allowed": (ALICE, ELSEWHERE),
    "not allowed by the rules": (ALICE + "\ndefault: block", ""),
}
"""The users and the listener's options of the second configuration, by the reason of a drop."""

RELAY_PORTS = ["shared", "any"]


def text(users: str, options: str = "", relay_port: str = "shared") -> str:
    return LISTENER % (relay_port, options) + "destinations: {deny: []}\n" + users


def log_in(port: int, command: int, target: Address) -> tuple[socket.socket, Address]:
    """Return the connection of a request of alice, and the address in the reply."""
    sock = socket.create_connection((LOCALHOST, port), SECONDS)
    stream = Stream(sock)
    sock.sendall(b"\5\1\2" + socks5.encode_credentials("alice", "secret"))
    sock.sendall(socks5.encode_request(command, target))
    assert complete(stream.read_exactly(4)) == b"\5\2\1\0"
    code, bound = complete(socks5.read_reply(stream))
    assert code == 0
    sock.settimeout(SECONDS)
    return sock, bound


class Association:
    """An association of alice that names no port."""

    def __init__(self, relay: Running) -> None:
        self.control, self.bound = log_in(relay.port, socks5.UDP_ASSOCIATE, Address("0.0.0.0", 0))
        self.port = UdpPort()

    def send(self, target: UdpPort, data: bytes) -> None:
        self.port.send(encode_header(target.address) + data, self.bound)

    def close(self) -> None:
        self.port.close()
        self.control.close()


class UotStream:
    """A UoT stream of alice for many targets."""

    def __init__(self, relay: Running) -> None:
        self.control, _ = log_in(relay.port, socks5.CONNECT, Address(uot.MAGIC, 443))
        self.control.sendall(uot.encode_request(uot.UotRequest(False, Address(LOCALHOST, 9))))

    def send(self, target: UdpPort, data: bytes) -> None:
        head = uot.encode_address(target.address) + len(data).to_bytes(2, "big")
        self.control.sendall(head + data)

    def close(self) -> None:
        self.control.close()


CLIENTS = {"associate": Association, "uot": UotStream}


@pytest.fixture
def target() -> Iterator[UdpPort]:
    with UdpPort() as target:
        yield target


class TestDatagrams:
    @pytest.mark.parametrize("relay_port", RELAY_PORTS)
    @pytest.mark.parametrize("kind", CLIENTS)
    @pytest.mark.parametrize("reason", CHANGES)
    def test_new_target_is_dropped_and_counted_and_the_old_one_goes_on(
        self, target: UdpPort, reason: str, kind: str, relay_port: str
    ) -> None:
        make: Callable[[Running], Any] = CLIENTS[kind]
        with running(text(ALICE, "", relay_port)) as relay, UdpPort() as new:
            client = make(relay)
            client.send(target, b"first")
            seen = target.expect(b"first")
            users, options = CHANGES[reason]
            relay.reload(text(users, options, relay_port))
            client.send(new, b"forbidden")
            eventually(lambda: relay.count("drops", reason) == 1)
            client.send(target, b"goes on")
            assert target.expect(b"goes on") == seen and new.silent()
            # It is new again once its session has ended.
            relay.sweep(1000)
            client.send(target, b"too late")
            eventually(lambda: relay.count("drops", reason) == 2)
            assert target.silent()
            client.close()

    @pytest.mark.parametrize("kind", CLIENTS)
    def test_new_target_is_reached_if_nothing_forbids_it(self, target: UdpPort, kind: str) -> None:
        more = "users: {alice: {password: secret}, bob: {password: secret}}\nlog: {level: debug}"
        make: Callable[[Running], Any] = CLIENTS[kind]
        with running(text(ALICE)) as relay:
            client = make(relay)
            relay.reload(text(more, ", clients: [127.0.0.0/8]"))
            client.send(target, b"permitted")
            target.expect(b"permitted")
            client.close()

    def test_user_that_comes_back_may_go_on(self, target: UdpPort) -> None:
        with running(text(ALICE)) as relay:
            client = Association(relay)
            relay.reload(text(BOB))
            client.send(target, b"forbidden")
            eventually(lambda: relay.count("drops", "user removed") == 1)
            relay.reload(text(ALICE))
            client.send(target, b"permitted")
            target.expect(b"permitted")
            client.close()

    def test_client_without_login_gets_nothing_new_once_a_login_is_required(
        self, target: UdpPort
    ) -> None:
        with running(text("")) as relay, UdpPort() as port:
            control = socket.create_connection((LOCALHOST, relay.port), SECONDS)
            control.sendall(b"\5\1\0" + socks5.encode_request(3, Address("0.0.0.0", 0)))
            stream = Stream(control)
            assert complete(stream.read_exactly(2)) == b"\5\0"
            bound = complete(socks5.read_reply(stream))[1]
            relay.reload(text(ALICE))
            port.send(encode_header(target.address) + b"anonymous", bound)
            eventually(lambda: relay.count("drops", "login required") == 1)
            assert target.silent()
            control.close()


def test_expired_session_of_a_connect_udp_stream_is_not_opened_again(target: UdpPort) -> None:
    authorization = b"Basic " + base64.b64encode(b"alice:secret")
    with running(text(ALICE)) as relay:
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
            sock.sendall(connect_udp.encode_request(target.address, "proxy", authorization))
            assert read_exactly(sock, 12) == b"HTTP/1.1 101"
            sock.sendall(capsule.datagram_header(5) + b"first")
            target.expect(b"first")
            relay.reload(text(BOB))
            sock.sendall(capsule.datagram_header(7) + b"goes on")
            target.expect(b"goes on")
            relay.sweep(1000)
            sock.sendall(capsule.datagram_header(8) + b"too late")
            eventually(lambda: relay.count("drops", "user removed") == 1)
            assert target.silent()


def test_uot_stream_of_a_removed_listener_ends_with_its_next_datagram(target: UdpPort) -> None:
    with running(text(ALICE)) as relay:
        client = UotStream(relay)
        client.send(target, b"first")
        target.expect(b"first")
        relay.reload("listeners: [{name: other, listen: '127.0.0.1:0'}]")
        client.send(target, b"second")
        assert client.control.recv(1) == b"" and target.silent()
        client.close()


class TestHandshakes:
    """A reload comes between the first bytes of a connection and the end of its request."""

    @pytest.mark.parametrize("command", [socks5.CONNECT, socks5.UDP_ASSOCIATE])
    @pytest.mark.parametrize("reason", ["user removed", "password changed", "client not allowed"])
    def test_socks5_request_behind_the_login_is_refused(self, reason: str, command: int) -> None:
        with running(text(ALICE)) as relay, socket.create_server((LOCALHOST, 0)) as origin:
            with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
                sock.sendall(b"\5\1\2" + socks5.encode_credentials("alice", "secret"))
                assert read_exactly(sock, 4) == b"\5\2\1\0"
                users, options = CHANGES[reason]
                relay.reload(text(users, options))
                target = Address(*origin.getsockname())
                sock.sendall(socks5.encode_request(command, target))
                assert read_to_end(sock)[:2] == b"\5\2"
            assert relay.count("requests_refused", reason) == 1
            assert nothing_comes(origin, 0)

    @pytest.mark.parametrize(
        "begun, rest, refusal",
        [
            (b"\4\1", b"\0\11\177\0\0\1\0", b"\0\x5b"),
            (b"GET http://127.0.0.1:9/", b" HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 403"),
            (b"CONNECT 127.0.0.1:9", b" HTTP/1.1\r\n\r\n", b"HTTP/1.1 403"),
            (b"\5\1\0", socks5.encode_request(1, Address(LOCALHOST, 9)), b"\5\0\5\2"),
        ],
        ids=["socks4", "http", "http connect", "socks5"],
    )
    def test_request_of_a_client_that_is_not_allowed_any_more_is_refused(
        self, begun: bytes, rest: bytes, refusal: bytes
    ) -> None:
        with running(text("")) as relay:
            with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
                sock.sendall(begun)
                eventually(lambda: relay.count("connections", "accepted") == 1)
                relay.reload(text("", ELSEWHERE))
                sock.sendall(rest)
                assert read_to_end(sock)[: len(refusal)] == refusal
            assert relay.count("requests_refused", "client not allowed") == 1
            assert not relay.count("dial_failures", "connection refused")


class TestDns:
    """A connection for DNS queries that is kept open."""

    TEXT = "dns: {servers: [192.0.2.53], hosts: {a.test: 192.0.2.1}}\n"
    LISTEN = "listeners: [{name: %s, listen: '127.0.0.1:0', protocol: dns, network: tcp%s}]"

    @pytest.mark.parametrize(
        "reason, name, options",
        [("client not allowed", "names", ELSEWHERE), ("listener removed", "other", "")],
    )
    def test_next_query_is_refused(self, reason: str, name: str, options: str) -> None:
        asked = query(question("a.test"))
        with running(self.TEXT + self.LISTEN % ("names", "")) as relay:
            with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
                for _ in range(2):
                    sock.sendall(framed(asked))
                    assert read_framed(sock)[-4:] == bytes((192, 0, 2, 1))
                relay.reload(self.TEXT + self.LISTEN % (name, options))
                sock.sendall(framed(asked))
                assert read_to_end(sock) == b""
            assert relay.count("requests_refused", reason) == 1


def test_session_of_a_removed_listener_does_not_end_by_a_shutdown(target: UdpPort) -> None:
    with running("listeners: [{name: main, listen: '127.0.0.1:0'}]") as relay:
        client = UdpClient(relay.port)
        client.check_echo(target)
        relay.reload("listeners: [{name: other, listen: '127.0.0.1:0'}]")
        relay.wait_for_count("sessions_evicted", "listener removed", 1)
        eventually(lambda: relay.log.records)
        assert [record.ended for record in relay.log.records] == ["listener removed"]
        assert not relay.count("sessions_evicted", "shutdown")
        client.close()


class TestHttp:
    def get(self, sock: socket.socket, port: int, password: str = "secret") -> None:
        credentials = base64.b64encode(f"alice:{password}".encode()).decode()
        sock.sendall(
            f"GET http://{LOCALHOST}:{port}/ HTTP/1.1\r\nHost: {LOCALHOST}:{port}\r\n"
            f"Proxy-Authorization: Basic {credentials}\r\n\r\n".encode()
        )

    @pytest.mark.parametrize(
        "reason, status",
        [
            ("user removed", b"407"),
            ("password changed", b"407"),
            ("client not allowed", b"403"),
            ("not allowed by the rules", b"403"),
        ],
    )
    def test_next_request_of_a_kept_connection_is_refused(self, reason: str, status: bytes) -> None:
        answer = b"HTTP/1.1 204 No Content\r\n\r\n"
        with running(text(ALICE)) as relay, socket.create_server((LOCALHOST, 0)) as origin:
            port = origin.getsockname()[1]
            with socket.create_connection((LOCALHOST, relay.port), SECONDS) as client:
                self.get(client, port)
                upstream, _ = origin.accept()
                upstream.settimeout(SECONDS)
                assert upstream.recv(4096).startswith(b"GET / ")
                upstream.sendall(answer)
                assert read_exactly(client, 12) == b"HTTP/1.1 204"
                while not client.recv(4096).endswith(b"\r\n\r\n"):
                    pass
                users, options = CHANGES[reason]
                relay.reload(text(users, options))
                self.get(client, port)
                assert read_to_end(client)[:12] == b"HTTP/1.1 " + status
                # Nothing has come to the origin.
                assert read_to_end(upstream) == b""
                upstream.close()
            if reason == "client not allowed":
                assert relay.count("requests_refused", reason) == 1

    def test_next_request_is_served_with_the_new_password(self) -> None:
        with running(text(ALICE)) as relay, socket.create_server((LOCALHOST, 0)) as origin:
            port = origin.getsockname()[1]
            with socket.create_connection((LOCALHOST, relay.port), SECONDS) as client:
                self.get(client, port)
                upstream, _ = origin.accept()
                upstream.settimeout(SECONDS)
                for password in ("secret", "other"):
                    assert upstream.recv(4096).startswith(b"GET / ")
                    upstream.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
                    assert read_exactly(client, 12) == b"HTTP/1.1 204"
                    while not client.recv(4096).endswith(b"\r\n\r\n"):
                        pass
                    if password == "secret":
                        relay.reload(text(OTHER_PASSWORD))
                        self.get(client, port, "other")
                upstream.close()
