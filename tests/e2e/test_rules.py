"""Rules with curl and dig, reloads of rules, and the auto upstream with an unreachable target."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Iterator

import pytest

from tests.e2e import nameservers
from tests.e2e.conftest import Start
from tests.e2e.namespaces import Namespace, connect, hosts
from tests.e2e.origin import HELLO, Origin, serving
from tests.e2e.peers import (
    CONNECT,
    Association,
    Refused,
    TcpEcho,
    UdpEcho,
    _Server,
    echo,
    socks5,
    udp,
)
from tests.e2e.support import ANY_PORT, LOOPBACK, PROCESSES, Netproxyd, environment, program
from tests.support import dns
from tests.support.ports import free_port, reserve_port

pytestmark = pytest.mark.e2e

BOX, SERVER, SERVER_SECOND = "10.78.3.1", "10.78.3.2", "10.78.3.3"
PORT = 1080
# 203.0.113.7
ANSWER = b"\xcb\0\x71\7"
# Exit statuses of curl for a 403 with -f and for a refusing SOCKS proxy.
HTTP_ERROR, PROXY_ERROR = 22, 97

RULES = """
listeners:
  - {name: main, listen: "127.0.0.1:0"}
  - {name: names, protocol: udp, listen: "127.0.0.1:0", target: "127.0.0.1:DNS"}
upstreams: {second: "socks5h://127.0.0.1:SECOND"}
rules:
  - {domain_file: LIST, via: block}
  - {domain: [.far.localhost, "keyword:remote"], via: second}
  - {listener: names, via: second}
  - {ip: 127.0.0.0/8, port: ORIGIN, not: {domain: [.localhost, localhost]}, via: block}
"""


class NameServer(_Server):
    """A DNS server that answers all names with one address."""

    def __init__(self) -> None:
        super().__init__(udp(LOOPBACK))

    def _serve(self, sock: object) -> None:
        data, peer = self.socket.recvfrom(4096)
        end = data.index(b"\0", 12) + 5
        self.socket.sendto(data[:2] + dns.answer(data[12:end], (dns.a(60, ANSWER),))[2:], peer)


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def pair(
    shared_netproxyd: Start, origin: Origin, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Netproxyd, Netproxyd]]:
    """The daemon with the rules and its upstream."""
    blocked = tmp_path_factory.mktemp("lists") / "blocked.txt"
    blocked.write_text("# advertisements\n*.ads.localhost\n0.0.0.0 tracker.localhost\n")
    port = free_port()
    with NameServer() as server:
        text = RULES
        values = {"LIST": blocked, "SECOND": port, "ORIGIN": origin.port, "DNS": server.address[1]}
        for word, value in values.items():
            text = text.replace(word, str(value))
        yield shared_netproxyd(config=text), shared_netproxyd("-l", f"sps://{LOOPBACK}:{port}")


def curl(daemon: Netproxyd, scheme: str, url: str) -> tuple[int, bytes]:
    """Run curl through the daemon. Return its exit status and the body."""
    options = ("-q", "-sS", "-f", "--noproxy", "", "-m", "50", "-x", daemon.url(scheme))
    command = (program("curl"), *options, url)
    process = subprocess.run(command, capture_output=True, env=environment(), timeout=60)
    return process.returncode, process.stdout


@pytest.mark.parametrize(
    "scheme, refused", [("http", HTTP_ERROR), ("socks5h", PROXY_ERROR), ("socks4a", PROXY_ERROR)]
)
class TestCurl:
    @pytest.mark.parametrize("host", ["www.ads.localhost", "TRACKER.localhost"])
    def test_name_of_a_block_list_is_refused(
        self,
        pair: tuple[Netproxyd, Netproxyd],
        origin: Origin,
        scheme: str,
        refused: int,
        host: str,
    ) -> None:
        assert curl(pair[0], scheme, origin.url(host=host)) == (refused, b"")

    def test_name_with_a_rule_for_an_upstream_is_sent_to_it_by_name(
        self, pair: tuple[Netproxyd, Netproxyd], origin: Origin, scheme: str, refused: int
    ) -> None:
        host = f"{scheme}.far.localhost"
        assert curl(pair[0], scheme, origin.url(host=host)) == (0, HELLO)
        pair[0].said(f"target={host}:{origin.port} .*upstream=second")
        pair[1].said(f"target={host}:{origin.port}")

    def test_name_without_a_rule_is_dialled_directly(
        self, pair: tuple[Netproxyd, Netproxyd], origin: Origin, scheme: str, refused: int
    ) -> None:
        assert curl(pair[0], scheme, origin.url(host="ads.localhost")) == (0, HELLO)
        pair[0].said(f"target=ads.localhost:{origin.port} .*upstream=direct")

    def test_blocked_address_is_refused_in_every_spelling(
        self, pair: tuple[Netproxyd, Netproxyd], origin: Origin, scheme: str, refused: int
    ) -> None:
        """Hazard 11. Its names are not blocked."""
        for spelling in ("127.0.0.1", "127.1", "0x7f.1", "2130706433"):
            assert curl(pair[0], scheme, origin.url(host=spelling)) == (refused, b"")


def test_dig_through_a_udp_listener_with_a_target_leaves_through_the_rules_upstream(
    pair: tuple[Netproxyd, Netproxyd],
) -> None:
    port = next(port for network, _, port in reversed(pair[0].listens) if network == "udp")
    answer = nameservers.dig(port, "a.name.test", "A")
    assert answer.data == ["203.0.113.7"], answer.text


def test_reload_with_a_faulty_list_keeps_the_old_rules(
    netproxyd: Start, origin: Origin, tmp_path: Path
) -> None:
    """Hazard 105."""
    names = tmp_path / "names.txt"
    names.write_text("ads.localhost\n")
    rules = f"rules: [{{domain_file: {names}, via: block}}]\n"
    daemon = netproxyd(config=f"listeners: [{{listen: '127.0.0.1:0'}}]\n{rules}")
    assert curl(daemon, "http", origin.url(host="ads.localhost"))[0] == HTTP_ERROR
    names.write_text("two words\n")
    daemon.reload()
    daemon.said(
        r"not reloaded: .*rules\[0\]: .*names.txt:1: 'two words' is not a valid domain name"
    )
    assert curl(daemon, "http", origin.url(host="ads.localhost"))[0] == HTTP_ERROR
    names.write_text("other.localhost\n")
    daemon.reload()
    assert curl(daemon, "http", origin.url(host="ads.localhost")) == (0, HELLO)


def test_reload_of_rules_leaves_running_connections_and_sessions_alone(
    netproxyd: Start, tmp_path: Path
) -> None:
    """New connections follow the new rules; a session keeps its source port for new targets."""
    second = netproxyd("-l", ANY_PORT)
    config = tmp_path / "rules.yaml"
    base = f"""
listeners: [{{name: main, listen: '127.0.0.1:0'}}]
upstreams: {{second: 'socks5h://127.0.0.1:{second.port}'}}
"""
    config.write_text(base + "rules: [{network: tcp, via: second}, {port: 1, via: block}]\n")
    daemon = netproxyd("-c", str(config))
    with (
        TcpEcho() as tcp,
        UdpEcho() as first,
        UdpEcho() as other,
        Association(daemon.server) as client,
    ):
        flow, _ = socks5(daemon.server, CONNECT, tcp.address)
        with flow:
            echo(flow, b"before")
            client.echo(first.address, b"before")
            blocked = f"{{network: tcp, port: {tcp.address[1]}, via: block}}"
            config.write_text(f"{base}rules: [{blocked}, {{network: udp, via: direct}}]\n")
            daemon.reload()
            # Its upstream is in no rule any more.
            echo(flow, b"after")
            client.echo(first.address, b"after")
            client.echo(other.address, b"another target")
            assert len(set(first.sources + other.sources)) == 1
            with pytest.raises(Refused) as caught:
                socks5(daemon.server, CONNECT, tcp.address)[0].close()
            assert caught.value.code == 2


@pytest.fixture(scope="module")
def net() -> Iterator[tuple[Namespace, Namespace]]:
    """Two hosts, box and server. Packets of the box to the server's first address are dropped."""
    with hosts("box", "server") as (box, server):
        connect(box, [f"{BOX}/24"], server, [f"{SERVER}/24", f"{SERVER_SECOND}/24"])
        server.nft(f"""
table ip netproxy-test {{
    chain in {{
        type filter hook input priority 0;
        ip saddr {BOX} ip daddr {SERVER} counter drop
    }}
}}""")
        yield box, server


class TestAutoUpstream:
    """The box cannot reach the server's first address. Its upstream, which runs there, can.

    The connect timeout is longer than a client waits: a client is served in time only if the
    deadline of direct attempts counts.
    """

    @pytest.fixture
    def daemons(
        self, netproxyd: Start, net: tuple[Namespace, Namespace]
    ) -> tuple[Netproxyd, Netproxyd]:
        box, server = net
        upstream = netproxyd(
            "-l",
            f"sps://{SERVER_SECOND}:{PORT}?clients=10.78.3.0/24",
            host=SERVER_SECOND,
            make=server.socket,
            preexec_fn=server.enter,
        )
        text = f"""
listeners: [{{name: main, listen: "127.0.0.1:{PORT}"}}]
upstreams: {{far: "socks5h://{SERVER_SECOND}:{PORT}"}}
rules: [{{ip: 10.78.3.0/24, via: auto, upstream: far}}]
auto: {{deadline: 1s, direct: {SERVER_SECOND}}}
timeouts: {{connect: 300s}}
"""
        return netproxyd(config=text, make=box.socket, preexec_fn=box.enter), upstream

    @staticmethod
    def visit(daemon: Netproxyd, target: tuple[str, int]) -> None:
        """Use a connection to the target."""
        with socks5(daemon.server, CONNECT, target, make=daemon.make)[0] as sock:
            echo(sock, b"hello")

    def teach(self, daemon: Netproxyd, target: tuple[str, int]) -> None:
        """Have all workers learn of the target: the kernel gives connections to any of them."""
        for _ in range(1 if PROCESSES == 1 else 16):
            self.visit(daemon, target)

    @staticmethod
    def direct_attempts(net: tuple[Namespace, Namespace]) -> int:
        """Return how many packets to the unreachable address were dropped."""
        match = re.search(r"counter packets (\d+)", net[1].nft_list("ip netproxy-test"))
        assert match
        return int(match[1])

    def test_unreachable_target_is_tried_directly_once_and_then_not_again(
        self, daemons: tuple[Netproxyd, Netproxyd], net: tuple[Namespace, Namespace]
    ) -> None:
        """What is known of a target survives a reload."""
        daemon, upstream = daemons
        with TcpEcho(SERVER, net[1].socket) as target:
            before = self.direct_attempts(net)
            self.teach(daemon, target.address)
            attempts = self.direct_attempts(net)
            assert attempts > before
            self.visit(daemon, target.address)
            daemon.reload()
            self.visit(daemon, target.address)
            assert self.direct_attempts(net) == attempts
            upstream.said(f"target={SERVER}:{target.address[1]}", 3)
            daemon.said("upstream=auto", 3)

    def test_reachable_target_is_dialled_directly(
        self, daemons: tuple[Netproxyd, Netproxyd], net: tuple[Namespace, Namespace]
    ) -> None:
        daemon, upstream = daemons
        with TcpEcho(SERVER_SECOND, net[1].socket) as target:
            self.visit(daemon, target.address)
        assert not upstream.all_lines("target=")

    def test_datagrams_use_what_connections_have_learnt_about_a_target(
        self, daemons: tuple[Netproxyd, Netproxyd], net: tuple[Namespace, Namespace]
    ) -> None:
        daemon, _ = daemons
        port = reserve_port(SERVER, net[1].socket).release()
        with (
            TcpEcho(SERVER, net[1].socket, port) as target,
            UdpEcho(SERVER, net[1].socket, port=port) as datagrams,
            Association(daemon.server, make=daemon.make) as client,
        ):
            self.teach(daemon, target.address)
            client.echo(target.address, b"hello")
            assert {source[0] for source in datagrams.sources} <= {SERVER, SERVER_SECOND}
