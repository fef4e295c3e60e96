"""A file of rules as people write it: curl and dig through it, auto with a target behind a black hole, and a reload."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Iterator

import pytest

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
from tests.e2e.support import ANY_PORT, LOOPBACK, Netproxyd, environment, free_port, program
from tests.support import dns

pytestmark = pytest.mark.e2e

BOX, SERVER, SERVER_SECOND = "10.78.3.1", "10.78.3.2", "10.78.3.3"
PORT = 1080
DEADLINE, CONNECT_TIMEOUT = (
    1.5,
    20.0,
)  # seconds: of the direct way, and what a connection may take else
ANSWER = b"\xcb\0\x71\7"  # 203.0.113.7

RULES = """
listeners: [{name: main, listen: "127.0.0.1:0"}, {name: names, protocol: udp, listen: "127.0.0.1:0", target: "127.0.0.1:DNS"}]
upstreams: {second: "socks5h://127.0.0.1:SECOND"}
rules:
  - {domain_file: LIST, via: block}
  - {domain: [.far.localhost, "keyword:remote"], via: second}
  - {listener: names, via: second}
  - {ip: 127.0.0.0/8, port: ORIGIN, not: {domain: [.localhost, localhost]}, via: block}
"""


class NameServer(_Server):
    """Answers all names with one address."""

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
    """The daemon with the rules, which is the first to end, and its upstream."""
    blocked = tmp_path_factory.mktemp("lists") / "blocked.txt"
    blocked.write_text("# advertisements\n*.ads.localhost\n0.0.0.0 tracker.localhost\n")
    port = free_port()
    with NameServer() as server:
        text = RULES
        for word, value in (
            ("LIST", blocked),
            ("SECOND", port),
            ("ORIGIN", origin.port),
            ("DNS", server.address[1]),
        ):
            text = text.replace(word, str(value))
        yield shared_netproxyd(config=text), shared_netproxyd("-l", f"sps://{LOOPBACK}:{port}")


def curl(daemon: Netproxyd, scheme: str, url: str) -> tuple[int, bytes]:
    """Exit status and body."""
    done = subprocess.run(
        [
            program("curl"),
            "-q",
            "-sS",
            "-f",
            "--noproxy",
            "",
            "-m",
            "20",
            "-x",
            daemon.url(scheme),
            url,
        ],
        capture_output=True,
        env=environment(),
        timeout=30,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("scheme, refused", [("http", 22), ("socks5h", 97), ("socks4a", 97)])
class TestCurl:
    @pytest.mark.parametrize("host", ["www.ads.localhost", "TRACKER.localhost"])
    def test_what_a_list_blocks_is_refused(
        self,
        pair: tuple[Netproxyd, Netproxyd],
        origin: Origin,
        scheme: str,
        refused: int,
        host: str,
    ) -> None:
        assert curl(pair[0], scheme, origin.url(host=host)) == (refused, b"")

    def test_what_has_a_way_of_its_own_takes_it_by_its_name(
        self, pair: tuple[Netproxyd, Netproxyd], origin: Origin, scheme: str, refused: int
    ) -> None:
        host = f"{scheme}.far.localhost"
        assert curl(pair[0], scheme, origin.url(host=host)) == (0, HELLO)
        pair[0].said(f"target={host}:{origin.port} .*upstream=second")
        pair[1].said(f"target={host}:{origin.port}")

    def test_the_rest_goes_directly(
        self, pair: tuple[Netproxyd, Netproxyd], origin: Origin, scheme: str, refused: int
    ) -> None:
        assert curl(pair[0], scheme, origin.url(host="ads.localhost")) == (0, HELLO)
        pair[0].said(f"target=ads.localhost:{origin.port} .*upstream=direct")

    def test_an_address_is_blocked_that_its_names_are_not(
        self, pair: tuple[Netproxyd, Netproxyd], origin: Origin, scheme: str, refused: int
    ) -> None:
        for spelling in ("127.0.0.1", "127.1", "0x7f.1", "2130706433"):
            assert curl(pair[0], scheme, origin.url(host=spelling)) == (refused, b"")


def test_dig_through_a_fixed_target_and_the_rules_way_out(
    pair: tuple[Netproxyd, Netproxyd],
) -> None:
    port = next(port for network, _, port in reversed(pair[0].listens) if network == "udp")
    done = subprocess.run(
        [
            program("dig"),
            f"@{LOOPBACK}",
            "-p",
            str(port),
            "a.name.test",
            "A",
            "+short",
            "+tries=1",
            "+time=5",
        ],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=20,
    )
    assert done.stdout.split() == ["203.0.113.7"]


def test_a_mistake_in_a_list_leaves_the_rules_as_they_were(
    netproxyd: Start, origin: Origin, tmp_path: Path
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("ads.localhost\n")
    daemon = netproxyd(
        config=f"listeners: [{{listen: '127.0.0.1:0'}}]\nrules: [{{domain_file: {names}, via: block}}]\n"
    )
    assert curl(daemon, "http", origin.url(host="ads.localhost"))[0] == 22
    names.write_text("two words\n")
    daemon.reload()
    daemon.said(
        r"not reloaded: .*rules\[0\]: .*names.txt:1: 'two words' is not a valid domain name"
    )
    assert curl(daemon, "http", origin.url(host="ads.localhost"))[0] == 22
    names.write_text("other.localhost\n")
    daemon.reload()
    assert curl(daemon, "http", origin.url(host="ads.localhost")) == (0, HELLO)


def test_a_reload_that_changes_the_rules_leaves_what_runs_alone(
    netproxyd: Start, tmp_path: Path
) -> None:
    second = netproxyd("-l", ANY_PORT)
    config = tmp_path / "rules.yaml"
    base = f"listeners: [{{name: main, listen: '127.0.0.1:0'}}]\nupstreams: {{second: 'socks5h://127.0.0.1:{second.port}'}}\n"
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
            config.write_text(
                f"{base}rules: [{{network: tcp, port: {tcp.address[1]}, via: block}}, {{network: udp, via: direct}}]\n"
            )
            daemon.reload()
            echo(flow, b"after")  # by a way that no rule names any more
            client.echo(first.address, b"after")
            client.echo(other.address, b"another target")  # decided anew, and on the same port
            assert len(set(first.sources + other.sources)) == 1
            with pytest.raises(Refused) as caught:
                socks5(daemon.server, CONNECT, tcp.address)[0].close()
            assert caught.value.code == 2


@pytest.fixture(scope="module")
def net() -> Iterator[tuple[Namespace, Namespace]]:
    with hosts("box", "server") as (box, server):
        connect(box, [f"{BOX}/24"], server, [f"{SERVER}/24", f"{SERVER_SECOND}/24"])
        server.nft(
            f"table ip netproxy-test {{\n chain in {{ type filter hook input priority 0; ip saddr {BOX} ip daddr {SERVER} drop; }}\n}}"
        )
        yield box, server


class TestAutoBehindABlackHole:
    """The box cannot reach the server's first address; its upstream, which is over there, can."""

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
auto: {{deadline: {DEADLINE * 1000:.0f}ms, direct: {SERVER_SECOND}}}
timeouts: {{connect: {CONNECT_TIMEOUT:.0f}s}}
"""
        return netproxyd(config=text, make=box.socket, preexec_fn=box.enter), upstream

    @staticmethod
    def visit(daemon: Netproxyd, target: tuple[str, int]) -> float:
        """How long until the client is connected."""
        started = time.monotonic()
        sock, _ = socks5(daemon.server, CONNECT, target, make=daemon.make, seconds=CONNECT_TIMEOUT)
        took = time.monotonic() - started
        with sock:
            echo(sock, b"hello")
        return took

    def test_the_first_visit_has_the_short_deadline_and_the_second_none(
        self, daemons: tuple[Netproxyd, Netproxyd], net: tuple[Namespace, Namespace]
    ) -> None:
        daemon, upstream = daemons
        with TcpEcho(SERVER, net[1].socket) as target:
            assert DEADLINE <= self.visit(daemon, target.address) < CONNECT_TIMEOUT / 2
            assert self.visit(daemon, target.address) < DEADLINE
            daemon.reload()
            assert self.visit(daemon, target.address) < DEADLINE  # what is known outlives a reload
            upstream.said(f"target={SERVER}:{target.address[1]}", 3)
            daemon.said("upstream=auto", 3)

    def test_what_can_be_reached_is_reached_directly(
        self, daemons: tuple[Netproxyd, Netproxyd], net: tuple[Namespace, Namespace]
    ) -> None:
        daemon, upstream = daemons
        with TcpEcho(SERVER_SECOND, net[1].socket) as target:
            assert self.visit(daemon, target.address) < DEADLINE
        assert not upstream.all_lines("target=")

    def test_datagrams_follow_what_connections_have_found(
        self, daemons: tuple[Netproxyd, Netproxyd], net: tuple[Namespace, Namespace]
    ) -> None:
        daemon, _ = daemons
        with TcpEcho(SERVER, net[1].socket) as target:
            with (
                UdpEcho(SERVER, net[1].socket, port=target.address[1]) as datagrams,
                Association(daemon.server, make=daemon.make) as client,
            ):
                self.visit(daemon, target.address)
                client.echo(target.address, b"hello")
                assert {source[0] for source in datagrams.sources} <= {SERVER, SERVER_SECOND}
