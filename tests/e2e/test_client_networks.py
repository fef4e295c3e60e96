"""Who may connect, and when: files of networks, denied clients, ports of agents, hours of rules."""

from __future__ import annotations

import re
import socket
import time
from contextlib import closing
from pathlib import Path
from typing import Callable

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import CONNECT, Association, Refused, TcpEcho, UdpEcho, echo, socks5
from tests.e2e.support import LOOPBACK, SECONDS, Netproxyd, environment, wait_for
from tests.support.ports import free_port

pytestmark = pytest.mark.e2e

TOKEN = "a token of twenty bytes"
PORT_KEYS = "clients: [127.0.0.0/8, '!127.0.9.0/24'], clients_deny: [127.0.0.66]"
BRIDGE = f"""
listeners: [{{listen: "127.0.0.1:0", clients: !file office.txt, clients_deny: !file banned.txt}}]
tunnel:
  bridge:
    listen: tcp://127.0.0.1:AGENTS
    agents: {{home: {{token: {TOKEN}, ports: [
      {{port: PORT, {PORT_KEYS}}}, {{port: PORT/udp, {PORT_KEYS}}}]}}}}
destinations: {{deny: []}}
"""
AGENT = f"""
listeners: [{{listen: "127.0.0.1:0"}}]
tunnel:
  agent:
    bridge: tcp://127.0.0.1:AGENTS
    name: home
    token: {TOKEN}
    services: {{PORT: "127.0.0.1:TCP", PORT/udp: "127.0.0.1:UDP"}}
"""


def filled(text: str, values: dict[str, int]) -> str:
    """Return a configuration with ports in the place of words."""
    for word, value in values.items():
        text = text.replace(word, str(value))
    return text


def source(host: str) -> Callable[..., socket.socket]:
    """Return a function that makes sockets as socket.socket does, bound to an address."""

    def make(*arguments: int) -> socket.socket:
        sock = socket.socket(*arguments)
        sock.settimeout(SECONDS)
        sock.bind((host, 0))
        return sock

    return make


def answered(daemon: Netproxyd, host: str, port: int = 0) -> bool:
    """Return whether a client at an address is answered: by SOCKS5, or by an echo at a port."""
    with closing(source(host)(socket.AF_INET, socket.SOCK_STREAM)) as sock:
        try:
            sock.connect((LOOPBACK, port or daemon.port))
            sock.sendall(b"\5\1\0")
            return bool(sock.recv(1))
        except ConnectionError:
            return False


def send_from(host: str, port: int, is_answered: bool) -> None:
    """Send a datagram with the address that it is from, and receive its echo."""
    with closing(source(host)(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.sendto(host.encode(), (LOOPBACK, port))
        if is_answered:
            assert sock.recv(64) == host.encode()


def decided(daemon: Netproxyd) -> list[tuple[str, str]]:
    """Return client and deciding key of each refusal in the log, sorted."""
    lines = daemon.all_lines('reason="client not allowed"')
    return sorted(re.findall(r"client=(\S+) .* decided=(\S+)", "\n".join(lines)))


def test_clients_of_listeners_and_of_ports(netproxyd: Start, tmp_path: Path) -> None:
    """A reload reads the files again; one with an error changes nothing."""
    office, banned = tmp_path / "office.txt", tmp_path / "banned.txt"
    office.write_text("127.0.0.0/8  # this machine\n!127.0.9.0/24\n")
    banned.write_text("127.0.0.66\n")
    port, agents = free_port(), free_port()
    seen: list[bytes] = []
    with TcpEcho() as tcp, UdpEcho(answer=lambda data: seen.append(data) or data) as udp:
        values = {"AGENTS": agents, "PORT": port, "TCP": tcp.address[1], "UDP": udp.address[1]}
        daemon, agent = (netproxyd(config=filled(text, values)) for text in (BRIDGE, AGENT))
        # An idle tunnel keeps connections.
        daemon.baseline = agent.baseline = 0
        wait_for(lambda: answered(daemon, "127.0.0.2", port), SECONDS, "the port of the agent")
        hosts = {"127.0.0.2": "", "127.0.9.1": "clients", "127.0.0.66": "clients_deny"}
        for host, key in hosts.items():
            assert answered(daemon, host) == answered(daemon, host, port) == (not key)
        for host in reversed(hosts):
            send_from(host, port, is_answered=not hosts[host])
        assert seen == [b"127.0.0.2"]
        refused = [(host, key) for host, key in hosts.items() if key]
        assert decided(daemon) == sorted(3 * refused)

        office.write_text("127.0.0.0/8\n")
        banned.write_text("127.0.0.2\n")
        daemon.reload()
        assert [host for host in hosts if answered(daemon, host)] == ["127.0.9.1", "127.0.0.66"]

        banned.write_text("# all are fine\n127.0.0.300\n")
        daemon.reload()
        (line,) = daemon.said(f"{banned}:2: ")
        assert "listeners[0].clients_deny[0]: '127.0.0.300' is not a valid network" in line
        assert not answered(daemon, "127.0.0.2")


def test_rules_with_hours_follow_the_time_zone(netproxyd: Start) -> None:
    """The daemon's zone is one in which it is noon now."""
    zone = f"NOON{time.gmtime().tm_hour - 12:+d}"
    rules = """
rules:
  - {port: NIGHT, hours: "22:00-02:00", via: direct}
  - {port: NIGHT, not: {hours: "22:00-02:00"}, via: block}
  - {port: UDP, hours: ["20:00-21:00", "10:00-15:00"], via: direct}
  - {port: DAY, hours: "mon-sun 10:00-15:00", via: direct}
"""
    with TcpEcho() as day, TcpEcho() as night, UdpEcho() as udp:
        values = {"NIGHT": night.address[1], "DAY": day.address[1], "UDP": udp.address[1]}
        text = "listeners: [{listen: '127.0.0.1:0'}]" + filled(rules, values)
        daemon = netproxyd(config=text, env=environment(TZ=zone))
        control, _ = socks5(daemon.server, CONNECT, day.address)
        with closing(control):
            echo(control, b"at noon")
        with Association(daemon.server) as association:
            association.echo(udp.address, b"at noon")
        with pytest.raises(Refused) as caught:
            socks5(daemon.server, CONNECT, night.address)
        assert caught.value.code == 2
        daemon.said(r"rule=rules\[3\]")
        daemon.said(r"rule=rules\[1\]")
