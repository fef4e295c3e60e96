"""A daemon whose users, listeners and upstreams have binds, with every protocol of clients.

All of 127.0.0.0/8 is this machine's, so that no test needs a network of its own.
"""

from __future__ import annotations

import socket
from base64 import b64encode
from typing import Any, Callable, Iterator

import pytest

from netproxy.daemon.build import build_for_questions
from netproxy.daemon.questions import PlanQuestions
from netproxy.daemon.runtime import Runtime
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.networks import IpNetwork
from netproxy.protocol import socks5
from tests.support.handlers import RecordingLog
from tests.support.relays import Running, UdpClient, UdpPort, configuration, described, running
from tests.support.sockets import SECONDS, address_of, listen, read_exactly, wait_until

pytest.importorskip("yaml")

PREFIX = "127.9.0.0/16"
OF_LISTENER, OF_ALICE = "127.0.0.31", "127.0.0.32"
USERS = f"""
users:
  alice: {{password: secret, bind: {OF_ALICE}}}
  bob: {{password: secret}}
"""
REACHED = "127.0.0.5"
"""An address of the listener that clients connect to."""


def port_of(daemon: Running) -> int:
    """Return the port of the only listener."""
    return int(daemon.daemon.summary().partition(",")[0].rpartition(":")[2])


def listener(bind: str, protocol: str = "sps", more: str = "") -> str:
    """Return a listener on all addresses, whose clients reach loopback."""
    return (
        f"listeners: [{{listen: '0.0.0.0:0', name: main, protocol: {protocol}, "
        f"clients: 127.0.0.0/8, auth: optional, bind: {bind}{more}}}]\n"
        "destinations: {allow: [127.0.0.0/8]}\n" + USERS
    )


class Client:
    """A TCP client of the daemon."""

    def __init__(self, daemon: Running, user: str) -> None:
        self.user = user
        self.socket = socket.create_connection((REACHED, port_of(daemon)), SECONDS)

    def socks4(self, target: Address) -> None:
        self.socket.sendall(
            b"\4\1" + target.port.to_bytes(2, "big") + socket.inet_aton(target.host) + b"\0"
        )
        assert read_exactly(self.socket, 8)[1] == 0x5A

    def socks5(self, target: Address) -> None:
        self.log_in()
        self.socket.sendall(socks5.encode_request(socks5.CONNECT, target))
        assert read_exactly(self.socket, 10)[1] == 0

    def log_in(self) -> None:
        self.socket.sendall(b"\5\1\2" if self.user else b"\5\1\0")
        read_exactly(self.socket, 2)
        if self.user:
            self.socket.sendall(socks5.encode_credentials(self.user, "secret"))
            assert read_exactly(self.socket, 2) == b"\1\0"

    def field(self) -> bytes:
        token = b64encode(f"{self.user}:secret".encode())
        return b"Proxy-Authorization: Basic %b\r\n" % token if self.user else b""

    def connect(self, target: Address) -> None:
        self.socket.sendall(
            b"CONNECT %b HTTP/1.1\r\nHost: x\r\n%b\r\n" % (str(target).encode(), self.field())
        )
        assert self.socket.recv(4096).startswith(b"HTTP/1.1 200 ")

    def get(self, target: Address) -> None:
        host = str(target).encode()
        self.socket.sendall(
            b"GET http://%b/ HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (host, host, self.field())
        )


@pytest.fixture
def target() -> Iterator[socket.socket]:
    with listen() as listening:
        yield listening


def seen_of(
    daemon: Running, target: socket.socket, way: Callable[..., None], user: str = ""
) -> str:
    """Return the address that a target sees of a client that asks in this way."""
    client = Client(daemon, user)
    way(client, address_of(target))
    accepted, peer = target.accept()
    accepted.close()
    client.socket.close()
    return str(peer[0])


WAYS = [Client.socks5, Client.connect, Client.get]


class TestTcp:
    @pytest.mark.parametrize("way", WAYS)
    def test_user_comes_before_listener(self, target: socket.socket, way: Any) -> None:
        with running(listener(OF_LISTENER)) as daemon:
            seen = [seen_of(daemon, target, way, user) for user in ("", "bob", "alice")]
        assert seen == [OF_LISTENER, OF_LISTENER, OF_ALICE]

    @pytest.mark.parametrize("way", WAYS)
    def test_user_without_bind_of_the_listener(self, target: socket.socket, way: Any) -> None:
        text = listener(OF_LISTENER).replace(f", bind: {OF_LISTENER}", "")
        with running(text) as daemon:
            seen = [seen_of(daemon, target, way, user) for user in ("bob", "alice")]
        assert seen == ["127.0.0.1", OF_ALICE]

    @pytest.mark.parametrize("way", [*WAYS, Client.socks4])
    def test_incoming_is_the_address_that_the_client_connected_to(
        self, target: socket.socket, way: Any
    ) -> None:
        with running(listener("incoming")) as daemon:
            assert seen_of(daemon, target, way) == REACHED

    @pytest.mark.parametrize("way", [*WAYS, Client.socks4])
    def test_incoming_of_an_upstream(self, target: socket.socket, way: Any) -> None:
        text = listener(OF_LISTENER) + "default: 'direct?bind=incoming'"
        with running(text) as daemon:
            assert seen_of(daemon, target, way) == REACHED

    def test_incoming_of_a_proxy(self, target: socket.socket) -> None:
        """The bind of the listener is for direct flows alone."""
        with running(listener(OF_LISTENER)) as second:
            proxy = f"default: 'socks4://127.0.0.1:{port_of(second)}?bind=incoming'"
            with running(listener(OF_LISTENER) + proxy) as first:
                assert seen_of(first, target, Client.socks5) == OF_LISTENER
            wait_until(lambda: REACHED in str(second.log.records))

    def test_listener_with_a_fixed_target(self, target: socket.socket) -> None:
        more = f", target: '{address_of(target)}'"
        for bind, expected in (("incoming", REACHED), (OF_LISTENER, OF_LISTENER)):
            text = listener(bind, "tcp", more).replace("auth: optional, ", "")
            with running(text) as daemon:
                assert seen_of(daemon, target, lambda *_: None) == expected

    def test_hundreds_of_connections_have_addresses_of_the_prefix(
        self, target: socket.socket
    ) -> None:
        with running(listener(PREFIX)) as daemon:
            seen = {seen_of(daemon, target, Client.socks5) for _ in range(300)}
        # 300 random addresses of 65,534 have less than one equal pair on average.
        assert len(seen) > 290
        assert all(IpNetwork.parse(PREFIX).holds(host) for host in seen)

    def test_via_auto_leaves_from_the_users_address(self, target: socket.socket) -> None:
        rules = "rules: [{via: auto, upstream: 'socks4://127.0.0.1:9'}]"
        with running(listener(OF_LISTENER) + rules) as daemon:
            assert seen_of(daemon, target, Client.socks5, "alice") == OF_ALICE

    def test_target_of_the_other_family_has_a_record_that_names_the_key(self) -> None:
        with running(listener("2001:db8::/64")) as daemon:
            client = Client(daemon, "bob")
            client.log_in()
            client.socket.sendall(socks5.encode_request(socks5.CONNECT, Address("127.0.0.1", 9)))
            assert read_exactly(client.socket, 10)[1] == 3  # network unreachable
            client.socket.close()
            decided = "bind of listener 'main': 2001:db8::/64"
            wait_until(lambda: decided in str(daemon.log.records))

    def test_reload_changes_the_bind_of_what_is_new(self, target: socket.socket) -> None:
        with running(listener(OF_LISTENER)) as daemon:
            client = Client(daemon, "")
            daemon.reload(listener("127.0.0.33"))
            # The connection began before the reload.
            client.socks5(address_of(target))
            assert target.accept()[1][0] == "127.0.0.33"
            client.socket.close()


class TestKeptConnections:
    """HTTP requests on one connection of a client."""

    def answer(self, accepted: socket.socket) -> None:
        assert accepted.recv(4096).startswith(b"GET / ")
        accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    def test_another_user_gets_a_connection_of_its_own(self, target: socket.socket) -> None:
        seen = []
        with running(listener(OF_LISTENER)) as daemon:
            client = Client(daemon, "")
            accepted: list[socket.socket] = []
            for user in ("alice", "alice", "bob"):
                client.user = user
                client.get(address_of(target))
                if user not in seen:
                    seen.append(user)
                    accepted.append(target.accept()[0])
                self.answer(accepted[-1])
                wait_until(lambda: b"ok" in client.socket.recv(4096))
            hosts = [sock.getpeername()[0] for sock in accepted[1:]]
            for sock in accepted:
                sock.close()
            client.socket.close()
        assert (seen, hosts) == (["alice", "bob"], [OF_LISTENER])


class TestUdp:
    def test_association_of_a_user(self) -> None:
        with running(listener(OF_LISTENER)) as daemon, UdpPort() as first, UdpPort() as second:
            with UdpClient(port_of(daemon), REACHED) as client:
                seen = [client.check_echo(target) for target in (first, second)]
        assert seen[0] == seen[1] and seen[0].host == OF_LISTENER

    def test_session_has_one_address_of_the_prefix_for_all_targets(self) -> None:
        hosts = set()
        more = ", rotate: connection"
        with running(listener(PREFIX, more=more)) as daemon, UdpPort() as one, UdpPort() as two:
            for _ in range(20):
                with UdpClient(port_of(daemon), REACHED) as client:
                    seen = [client.check_echo(target) for target in (one, two, one)]
                assert len(set(seen)) == 1
                hosts.add(seen[0].host)
        assert len(hosts) > 15
        assert all(IpNetwork.parse(PREFIX).holds(host) for host in hosts)

    @pytest.mark.parametrize("relay_port", ["shared", "any"])
    def test_incoming_is_the_address_of_the_control_connection(self, relay_port: str) -> None:
        more = f", udp: {{relay_port: {relay_port}}}"
        with running(listener("incoming", more=more)) as daemon, UdpPort() as target:
            with UdpClient(port_of(daemon), REACHED) as client:
                assert client.check_echo(target).host == REACHED

    @pytest.mark.parametrize("listen", ["0.0.0.0:0", "127.0.0.5:0"])
    @pytest.mark.parametrize("batching", ["mmsg", "trains", "single"])
    def test_incoming_of_a_fixed_target(self, listen: str, batching: str) -> None:
        with UdpPort() as target:
            text = listener("incoming", "udp", f", target: '{target.address}'")
            text = text.replace("auth: optional, ", "").replace("0.0.0.0:0", listen)
            with running(f"{text}udp: {{batching: {batching}}}") as daemon, UdpPort() as client:
                client.send(b"query", Address(REACHED, port_of(daemon)))
                assert target.expect(b"query").host == REACHED

    def test_connect_udp_of_a_user(self) -> None:
        with running(listener(OF_LISTENER)) as daemon, UdpPort() as target:
            client = Client(daemon, "alice")
            client.socket.sendall(
                b"GET /.well-known/masque/udp/127.0.0.1/%d/ HTTP/1.1\r\nHost: proxy.test\r\n%b"
                b"Connection: Upgrade\r\nUpgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n\r\n"
                % (target.address.port, client.field())
            )
            assert client.socket.recv(4096).startswith(b"HTTP/1.1 101 ")
            # The type of a datagram capsule, its length, the context, and the payload.
            client.socket.sendall(b"\0\6\0query")
            assert target.expect(b"query").host == OF_ALICE
            client.socket.close()


class TestDescriptions:
    TEXT = f"""
listeners: [{{listen: '127.0.0.1:1', name: main, bind: '{PREFIX}', rotate: user}}]
upstreams:
  exit: {{url: direct, bind: '2001:db8:1::/64', rotate: 10m}}
  marked: {{url: direct, mark: 7}}
  proxy: 'socks5://192.0.2.9:1080'
  pool: {{members: ['direct?bind=192.0.2.1', 'http://192.0.2.9:1?bind=eth0', direct]}}
rules:
- {{domain: exit.test, via: exit}}
- {{domain: marked.test, via: marked}}
- {{domain: proxy.test, via: proxy}}
- {{domain: auto.test, via: auto, upstream: proxy}}
dns:
  hosts:
    exit.test: '2001:db8::9'
    marked.test: 192.0.2.8
    other.test: 192.0.2.8
    auto.test: 192.0.2.8
{USERS}"""

    def test_description_of_a_configuration(self) -> None:
        lines = described(self.TEXT)
        assert lines[0].endswith(f"upstream direct, directly from {PREFIX}, rotate user")
        assert lines[1] == f"user alice: directly from {OF_ALICE}"
        assert "upstream exit: direct carries bind, tcp, udp; from 2001:db8:1::/64, rotate 10m" in (
            lines
        )
        (pool,) = [line for line in lines if line.startswith("upstream pool: ")]
        assert pool.endswith("; from 192.0.2.1 or eth0")
        assert [line for line in lines if "marked" in line] == [
            "upstream marked: direct carries bind, tcp, udp"
        ]

    @pytest.mark.parametrize(
        "flow, expected",
        [
            ("exit.test:1", ["2001:db8:1::/64, rotate 10m (bind of the upstream)"]),
            (
                "alice@127.0.0.1 -> exit.test:1",
                ["2001:db8:1::/64, rotate 10m (bind of the upstream)"],
            ),
            ("alice@127.0.0.1 -> other.test:1", [f"{OF_ALICE} (users.alice.bind)"]),
            ("alice@127.0.0.1 -> marked.test:1", [f"{OF_ALICE} (users.alice.bind)"]),
            ("alice@127.0.0.1 -> auto.test:1", [f"{OF_ALICE} (users.alice.bind)"]),
            ("bob@127.0.0.1 -> other.test:1", [f"{PREFIX}, rotate user (bind of listener 'main')"]),
            ("bob@127.0.0.1 -> proxy.test:1", []),
        ],
    )
    def test_explanation_of_a_flow(self, flow: str, expected: list[str]) -> None:
        parts = Runtime(RecordingLog())  # type: ignore[arg-type]
        try:
            plan = build_for_questions(configuration(self.TEXT), parts)
            lines = PlanQuestions(plan).explain(flow)
        finally:
            parts.stop()
        said = [line.partition(": ")[2] for line in lines if line.startswith("from: ")]
        assert said == expected
