"""Rules that lead the daemon's own traffic back to it, and routers in a row."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any, Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.namespaces import connect, hosts
from tests.e2e.peers import TcpEcho, UdpEcho, echo, udp
from tests.e2e.router import (
    CLIENTS,
    REDIRECT,
    ROUTER,
    ROUTER_OUT,
    SERVER,
    TPROXY,
    Net,
    configuration,
    iptables_rules,
    network,
    netproxyctl_nft,
    rules,
    run_in,
)
from tests.e2e.support import SECONDS, Netproxyd

pytestmark = [pytest.mark.e2e, pytest.mark.long]

# A user of every system that the daemon does not run as: the rules leave nothing of it out.
STRANGER = ("--output", "--user", "nobody")
MARKED = "default: {url: direct, mark: 77}"
SESSIONS = 8
SILENCE = 0.3
WITH_OWN = f"[{ROUTER_OUT}/32, {CLIENTS[1:]}"
LISTENERS = {
    "redirect": REDIRECT.replace(CLIENTS, WITH_OWN).replace(
        "network: udp,", f"network: udp, udp: {{max_sessions_per_client: {SESSIONS}}},"
    ),
    "tproxy": TPROXY.replace(
        "name: lan4", f"name: lan4, udp: {{max_sessions_per_client: {SESSIONS}}}"
    ),
}


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with network() as created:
        yield created


def start(netproxyd: Start, net: Net, tmp_path: Path, config: str) -> tuple[Netproxyd, Path]:
    daemon = netproxyd(
        config=config, host=ROUTER, make=net.router.socket, preexec_fn=net.router.enter
    )
    daemon.baseline = 0  # its UDP sessions outlive the test
    path = tmp_path / "rules.yaml"
    path.write_text(config)
    return daemon, path


def dial(make: object, port: int) -> socket.socket:
    sock: socket.socket = make(socket.AF_INET, socket.SOCK_STREAM)  # type: ignore[operator]
    sock.settimeout(SECONDS)
    sock.connect((SERVER, port))
    return sock


@pytest.mark.parametrize("kind", LISTENERS)
def test_own_connection_that_comes_back_is_ended(
    netproxyd: Start, net: Net, tmp_path: Path, kind: str
) -> None:
    """Hazard 150."""
    daemon, path = start(netproxyd, net, tmp_path, configuration(LISTENERS[kind]))
    with rules(net, path, *STRANGER), TcpEcho(SERVER, net.internet.socket) as target:
        for make in (net.client.socket, net.router.socket):
            # The reset may come before the end of connect().
            with contextlib.suppress(ConnectionResetError):
                with dial(make, target.address[1]) as sock:
                    assert sock.recv(1) == b""
        status = daemon.status()
    assert status.get("requests_refused{loop}", 0) + len(daemon.all_lines("ended=loop")) >= 2
    # Each of the two flows came back a few times at most, and none reached the target.
    assert status["connections{accepted}"] <= 40


@pytest.mark.parametrize("kind", LISTENERS)
def test_own_datagrams_that_come_back_are_bounded(
    netproxyd: Start, net: Net, tmp_path: Path, kind: str
) -> None:
    """Hazard 150."""
    daemon, path = start(netproxyd, net, tmp_path, configuration(LISTENERS[kind]))
    with rules(net, path, *STRANGER), UdpEcho(SERVER, net.internet.socket) as target:
        with udp("0.0.0.0", net.client.socket) as sock:
            sock.settimeout(SILENCE)
            sock.sendto(b"x", target.address)
            with pytest.raises(TimeoutError):
                sock.recv(1)
        assert daemon.status()["sessions_opened{}"] <= 2 * SESSIONS + 2
    assert target.sources == []


@pytest.mark.any_workers
@pytest.mark.parametrize("apply", [rules, iptables_rules])
@pytest.mark.parametrize("kind", LISTENERS)
def test_flows_of_the_router_itself_are_led_and_the_daemons_are_not(
    netproxyd: Start, net: Net, tmp_path: Path, kind: str, apply: Any
) -> None:
    config = configuration(LISTENERS[kind], MARKED)
    daemon, path = start(netproxyd, net, tmp_path, config)
    with (
        apply(net, path, "--output", "--user", "no-such-user"),
        TcpEcho(SERVER, net.internet.socket) as target,
        UdpEcho(SERVER, net.internet.socket) as udp_target,
    ):
        for make in (net.client.socket, net.router.socket):
            with dial(make, target.address[1]) as sock:
                echo(sock, b"hello")
            with udp("0.0.0.0", make) as sock:
                sock.settimeout(SECONDS)
                sock.sendto(b"hello", udp_target.address)
                assert sock.recvfrom(100) == (b"hello", udp_target.address)
        assert len(daemon.said(rf"msg=finished .*target={SERVER}:{target.address[1]}", 2)) == 2
        assert daemon.status()["sessions_opened{}"] == 2


def test_output_without_a_mark_or_a_user_is_refused(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "netproxyd.yaml"
    path.write_text(configuration(TPROXY))
    process = netproxyctl_nft(net.router, path, "--output", "--user", "no-such-user")
    assert process.returncode == 64
    assert "set `mark` on all upstreams (direct has none)" in process.stderr


def test_check_names_what_is_missing(net: Net, tmp_path: Path) -> None:
    """Hazard 152."""
    path = tmp_path / "netproxyd.yaml"
    path.write_text(configuration(TPROXY))
    process = netproxyctl_nft(net.router, path, "--check")
    assert process.returncode == 1
    missing = [line for line in process.stdout.splitlines() if line.startswith("missing:")]
    assert len(missing) == 5, process.stdout
    with rules(net, path):
        process = netproxyctl_nft(net.router, path, "--check")
        assert (process.returncode, "missing" in process.stdout) == (0, False), process.stdout
    process = netproxyctl_nft(net.router, path, "--check")
    assert process.returncode == 1


def test_start_warns_of_a_missing_route(netproxyd: Start, net: Net, tmp_path: Path) -> None:
    """Hazard 152."""
    daemon, _ = start(netproxyd, net, tmp_path, configuration(TPROXY))
    assert len(daemon.said("no route leads packets with the mark 0x4e50", 2)) == 2


def test_two_routers_in_a_row(netproxyd: Start, tmp_path: Path) -> None:
    """Hazard 150: each leads the flow to its own daemon, once."""
    with hosts("lan", "first", "second", "world") as (client, first, second, internet):
        connect(client, ["10.82.1.2/24"], first, ["10.82.1.1/24"])
        connect(first, ["198.51.100.1/24"], second, ["198.51.100.2/24"])
        connect(second, ["203.0.113.1/24"], internet, [f"{SERVER}/24"])
        client.ip("route", "add", "default", "via", "10.82.1.1")
        first.ip("route", "add", "default", "via", "198.51.100.2")
        daemons = []
        sides = ((first, "10.82.1.1", "to-lan"), (second, "198.51.100.2", "to-first"))
        for number, (host, address, lan) in enumerate(sides):
            run_in(host, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
            config = (
                "listeners:\n"
                f"  - {{protocol: sps, listen: '{address}:1080', allow_open: true, name: sps}}\n"
                "  - {protocol: tproxy, listen: '127.0.0.1:7893', name: lan}\n"
            )
            path = tmp_path / f"rules{number}.yaml"
            path.write_text(config)
            daemon = netproxyd(config=config, host=address, make=host.socket, preexec_fn=host.enter)
            daemon.baseline = 0
            daemons.append(daemon)
            host.nft(netproxyctl_nft(host, path, "--lan", lan).stdout)
            run_in(host, "sh", "-e", "-c", netproxyctl_nft(host, path, "--routes").stdout)
        with (
            TcpEcho(SERVER, internet.socket) as target,
            UdpEcho(SERVER, internet.socket) as udp_target,
        ):
            with dial(client.socket, target.address[1]) as sock:
                echo(sock, b"hello" * 100)
            with udp("0.0.0.0", client.socket) as sock:
                sock.settimeout(SECONDS)
                sock.sendto(b"hello", udp_target.address)
                assert sock.recvfrom(100) == (b"hello", udp_target.address)
        for daemon in daemons:
            daemon.said(rf"target={SERVER}:{target.address[1]}")
            assert daemon.status()["sessions_opened{}"] == 1
            daemon.finish()


def test_client_reaches_another_one_by_the_port_that_targets_see(
    netproxyd: Start, tmp_path: Path
) -> None:
    """Hazard 37: rules leave the router's addresses alone, so that it comes from the client."""
    with hosts("lan", "neighbour", "gateway", "world") as (client, neighbour, router, internet):
        connect(client, ["10.82.1.2/24"], router, ["10.82.1.1/24"])
        connect(neighbour, ["10.82.2.2/24"], router, ["10.82.2.1/24"])
        connect(router, ["203.0.113.1/24"], internet, [f"{SERVER}/24"])
        run_in(router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        for number, host in enumerate((client, neighbour), 1):
            host.ip("route", "add", "default", "via", f"10.82.{number}.1")
        config = (
            "listeners:\n"
            "  - {protocol: sps, listen: '10.82.1.1:1080', allow_open: true, name: sps}\n"
            "  - {protocol: tproxy, listen: '127.0.0.1:7893', name: lan}\n"
        )
        path = tmp_path / "rules.yaml"
        path.write_text(config)
        daemon = netproxyd(
            config=config, host="10.82.1.1", make=router.socket, preexec_fn=router.enter
        )
        daemon.baseline = 0
        lans = ("--lan", "to-lan", "--lan", "to-neighbour")
        router.nft(netproxyctl_nft(router, path, *lans).stdout)
        run_in(router, "sh", "-e", "-c", netproxyctl_nft(router, path, "--routes").stdout)
        with (
            UdpEcho(SERVER, internet.socket) as target,
            udp("10.82.1.2", client.socket) as sock,
            udp("10.82.2.2", neighbour.socket) as other,
        ):
            for end in (sock, other):
                end.settimeout(SECONDS)
                end.sendto(b"hello", target.address)
                assert end.recvfrom(100) == (b"hello", target.address)
            sock.sendto(b"hairpin", target.sources[1])
            assert other.recvfrom(100) == (b"hairpin", sock.getsockname())
            other.sendto(b"answer", sock.getsockname())
            assert sock.recvfrom(100) == (b"answer", other.getsockname())
        daemon.finish()


@pytest.mark.any_workers
@pytest.mark.parametrize("listeners", [REDIRECT, TPROXY])
def test_several_workers_share_a_transparent_listener(
    netproxyd: Start, net: Net, tmp_path: Path, listeners: str
) -> None:
    config = configuration(listeners, "workers: 2")
    daemon = netproxyd(
        *("-w", "2"),
        config=config,
        host=ROUTER,
        make=net.router.socket,
        preexec_fn=net.router.enter,
    )
    daemon.baseline = 0
    path = tmp_path / "rules.yaml"
    path.write_text(config)
    with (
        rules(net, path),
        TcpEcho(SERVER, net.internet.socket) as target,
        UdpEcho(SERVER, net.internet.socket) as udp_target,
    ):
        for _ in range(12):
            with dial(net.client.socket, target.address[1]) as sock:
                echo(sock, b"hello")
            with udp("0.0.0.0", net.client.socket) as sock:
                sock.settimeout(SECONDS)
                for text in (b"first", b"second"):
                    sock.sendto(text, udp_target.address)
                    assert sock.recvfrom(100) == (text, udp_target.address)
        assert len(set(udp_target.sources)) == 12
    daemon.finish()
