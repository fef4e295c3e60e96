"""A reverse tunnel between network namespaces: a user, a bridge, and an agent behind a NAT.

A short run transfers little; NETPROXY_LONG=1 in the environment asks for 100 MB of TCP and 20 MB
of QUIC.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import pytest

from tests.e2e.conftest import Start
from tests.e2e.namespaces import Namespace, connect, hosts
from tests.e2e.peers import CONNECT, Association, TcpEcho, UdpEcho, echo, socks5, udp
from tests.e2e.support import SECONDS, Netproxyd, environment, program, wait_for
from tests.e2e.test_udp_clients import ANSWER, dig, dns_answer
from tests.support.certificates import certificates
from tests.support.sockets import Task

pytestmark = [pytest.mark.e2e, pytest.mark.long]

LONG = bool(os.environ.get("NETPROXY_LONG"))
TCP_BYTES, QUIC_BYTES = (100_000_000, 20_000_000) if LONG else (8_000_000, 2_000_000)
USER, BRIDGE, OUTSIDE, NAT_OUTSIDE, NAT_INSIDE, HOME, PRINTER = (
    "10.80.1.2",
    "10.80.1.1",
    "10.80.2.1",
    "10.80.2.2",
    "192.168.77.1",
    "192.168.77.2",
    "192.168.77.9",
)
AGENTS, SPS = 7000, 1080
SSH, WEB, ECHO, BULK, IPERF, UDP, DNS, QUIC = 8022, 8080, 8007, 8009, 5201, 8053, 8054, 8443

IDLE_DESCRIPTORS = 20
"""Of an idle tunnel: ports, control connection, idle work connections, sessions."""

TOKEN = "a token for network namespaces"
NAT = """
table ip netproxy-test {
    chain out {
        type nat hook postrouting priority 100;
        ip saddr 192.168.77.0/24 oifname "to-bridge" masquerade;
    }
    chain in {
        type filter hook forward priority 0;
        iifname "to-bridge" ct state new drop;
    }
}
"""
CUT = """
table ip cut { chain everything { type filter hook forward priority -10; drop; }; }
"""
# The daemon with timeouts of seconds in place of a minute.
SHORT_TIMEOUTS = """
import sys
from netproxy.tunnel import agent
from netproxy.tunnel.control import connection
connection.HEARTBEAT_SECONDS, connection.DEAD_SECONDS = 0.5, 3.0
agent.RECONNECT_FIRST, agent.RECONNECT_LIMIT = 0.4, 0.8
from netproxy.cli import main
raise SystemExit(main(sys.argv[3:]))
"""


Iperf3 = Callable[..., "dict[str, Any]"]
"""Runs iperf3 with more options; returns the "end" of its JSON."""


class Net(NamedTuple):
    """The network namespaces."""

    user: Namespace
    bridge: Namespace
    nat: Namespace
    home: Namespace


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with hosts("user", "bridge", "nat", "home") as namespaces:
        net = Net(*namespaces)
        connect(net.user, [f"{USER}/24"], net.bridge, [f"{BRIDGE}/24"])
        connect(net.bridge, [f"{OUTSIDE}/24"], net.nat, [f"{NAT_OUTSIDE}/24"])
        connect(net.nat, [f"{NAT_INSIDE}/24"], net.home, [f"{HOME}/24", f"{PRINTER}/24"])
        net.home.ip("route", "add", "default", "via", NAT_INSIDE)
        run_in(net.nat, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        net.nat.nft(NAT)
        yield net


def run_in(host: Namespace, *command: str) -> str:
    """Run a command in a namespace; return its output."""
    return subprocess.run(
        [program("ip"), "netns", "exec", host.name, *command],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


class Tunnel(NamedTuple):
    """The daemons of a tunnel."""

    bridge: Netproxyd
    agent: Netproxyd

    def public_ports(self, net: Net) -> int:
        """Return the number of TCP ports that the bridge has opened for agents."""
        own = (f":{AGENTS}", f":{SPS}")
        return sum(not address.endswith(own) for address in listening(net))


def listening(net: Net) -> list[str]:
    """Return host:port of the TCP listeners in the bridge's namespace."""
    listeners = run_in(net.bridge, program("ss"), "-Hltn")
    return re.findall(r"^LISTEN\s+\S+\s+\S+\s+(\S+)", listeners, re.MULTILINE)


def bridge_text(ports: str) -> str:
    return f"""
listeners: [{{listen: "{BRIDGE}:{SPS}", clients: [10.80.1.0/24]}}]
tunnel:
  bridge:
    listen: {OUTSIDE}:{AGENTS}
    tls: {certificates().listener()}
    agents: {{home: {{token: {TOKEN}, ports: {ports}}}}}
rules: [{{ip: [192.168.77.0/24], via: tunnel://home}}]
"""


def agent_text(services: str) -> str:
    return f"""
listeners: [{{listen: "127.0.0.1:{SPS}"}}]
tunnel:
  agent:
    bridge: tls://{OUTSIDE}:{AGENTS}
    name: home
    token: {TOKEN}
    tls: {{ca: "{certificates().path("ca.pem")}", server_name: localhost}}
    exit: true
    services: {services}
"""


def start(netproxyd: Start, net: Net, ports: str, services: str, **more: Any) -> Tunnel:
    bridge = netproxyd(
        config=bridge_text(ports),
        host=BRIDGE,
        make=net.bridge.socket,
        preexec_fn=net.bridge.enter,
        **more,
    )
    agent = netproxyd(
        config=agent_text(services), make=net.home.socket, preexec_fn=net.home.enter, **more
    )
    agent.said("tunnel: connected as 'home'")
    for daemon in (bridge, agent):
        daemon.baseline += IDLE_DESCRIPTORS
    return Tunnel(bridge, agent)


@pytest.fixture
def tunnel(netproxyd: Start, net: Net) -> Iterator[Tunnel]:
    """Run a tunnel with a public port for each kind of service, open to the user's network."""
    all_ports = [SSH, WEB, ECHO, BULK, IPERF, f"{UDP}/udp", f"{DNS}/udp", f"{QUIC}/udp"]
    ports = ", ".join(f'"{BRIDGE}:{port}"' for port in all_ports)
    services = ", ".join(f'"{port}": "{HOME}:{str(port).partition("/")[0]}"' for port in all_ports)
    tunnel = start(netproxyd, net, f"[{ports}]", f"{{{services}}}")
    wait_for(lambda: tunnel.public_ports(net) == 5, SECONDS, "the agent's ports are open")
    yield tunnel


def dial_as_user(net: Net, port: int) -> socket.socket:
    """Connect from the user's namespace to a port of the bridge."""
    sock = net.user.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.settimeout(SECONDS)
    sock.connect((BRIDGE, port))
    return sock


def served_at(net: Net, port: int) -> bool:
    """Return whether a server listens on a port in the agent's namespace."""
    return f"{HOME}:{port} " in run_in(net.home, program("ss"), "-Hltn")


def served(net: Net, port: int) -> Callable[..., socket.socket]:
    """Return a maker of server sockets on a chosen port in the agent's namespace."""

    def make(*arguments: Any) -> socket.socket:
        return _PortSocket(net.home.socket(*arguments), port)

    return make


class _PortSocket(socket.socket):
    """A socket that binds one port, whatever port it is told."""

    def __init__(self, sock: socket.socket, port: int) -> None:
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self._port = port

    def bind(self, address: Any) -> None:
        super().bind((address[0], self._port))


def thread_count(daemon: Netproxyd) -> int:
    """Return the threads of the first process, which asks its workers with threads of its own."""
    daemon.status()
    return len(os.listdir(f"/proc/{daemon.process.pid}/task"))


# -- public ports


@pytest.mark.any_workers
def test_ssh_through_a_public_port(tunnel: Tunnel, net: Net, tmp_path: Path) -> None:
    for name in ("host", "user"):
        subprocess.run(
            [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)],
            check=True,
        )
    (tmp_path / "sshd_config").write_text(f"""
ListenAddress {HOME}:{SSH}
HostKey {tmp_path}/host
AuthorizedKeysFile {tmp_path}/user.pub
StrictModes no
UsePAM no
PidFile none
""")
    os.makedirs("/run/sshd", exist_ok=True)
    daemon = subprocess.Popen(
        [program("sshd"), "-D", "-e", "-f", str(tmp_path / "sshd_config")],
        preexec_fn=net.home.enter,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # ssh does not try again after a reset.
        wait_for(lambda: served_at(net, SSH), SECONDS, "sshd listens")
        no_host_key = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null")
        options = [part for option in no_host_key for part in ("-o", option)]
        login = ["-p", str(SSH), "-i", str(tmp_path / "user"), *options, f"root@{BRIDGE}"]
        command = [program("ssh"), "-F", "none", *login, "cat; echo done"]
        done = subprocess.run(
            command,
            preexec_fn=net.user.enter,
            input=b"x" * 1_000_000,
            capture_output=True,
            timeout=SECONDS,
        )
        assert done.stdout == b"x" * 1_000_000 + b"done\n", done.stderr
    finally:
        daemon.terminate()
        daemon.wait()


@contextmanager
def web_server(net: Net, directory: Path, host: str, port: int) -> Iterator[None]:
    """Serve a directory over HTTP in the agent's namespace."""
    options = ("--bind", host, "--directory", str(directory), str(port))
    process = subprocess.Popen(
        [sys.executable, "-m", "http.server", *options],
        preexec_fn=net.home.enter,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def curl(net: Net, *arguments: str) -> bytes:
    """Run curl in the user's namespace; return the body.  Tries again until the server listens."""
    retry = ("--retry", "9", "--retry-all-errors", "--retry-delay", "1")
    done = subprocess.run(
        [program("curl"), "-q", "-sS", "--fail", *retry, *arguments],
        preexec_fn=net.user.enter,
        env=environment(),
        capture_output=True,
        timeout=SECONDS,
    )
    assert not done.returncode, done.stderr
    return done.stdout


def test_http_through_a_public_port(tunnel: Tunnel, net: Net, tmp_path: Path) -> None:
    (tmp_path / "page").write_text("a page of the agent's network\n")
    with web_server(net, tmp_path, HOME, WEB):
        page = curl(net, f"http://{BRIDGE}:{WEB}/page")
    assert page == b"a page of the agent's network\n"


def test_half_close_passes_through_with_all_bytes(tunnel: Tunnel, net: Net) -> None:
    """The user's end of stream reaches the service, and the service's bytes still arrive."""
    up, down = random.Random(1).randbytes(1 << 20), random.Random(2).randbytes(1 << 20)
    rounds = TCP_BYTES // len(up)

    def serve(listening: socket.socket) -> int:
        sock, _ = listening.accept()
        with sock:
            total, sender = 0, Task(lambda: [sock.sendall(down) for _ in range(rounds)])
            while data := sock.recv(1 << 18):
                total += len(data)
            sender.result(120)
            sock.sendall(b"the end was seen")
            return total

    with net.home.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOME, BULK))
        listening.listen()
        server = Task(serve, listening)
        with dial_as_user(net, BULK) as sock:
            sender = Task(
                lambda: ([sock.sendall(up) for _ in range(rounds)], sock.shutdown(socket.SHUT_WR))
            )
            received, tail = 0, b""
            while data := sock.recv(1 << 18):
                received += len(data)
                tail = (tail + data)[-16:]
            sender.result(120)
        assert server.result(120) == rounds * len(up)
        assert (received, tail) == (rounds * len(down) + 16, b"the end was seen")


@pytest.fixture
def iperf3(tunnel: Tunnel, net: Net) -> Iterator[Iperf3]:
    """Run an iperf3 server at the agent; return what runs its client at the user."""
    client = [program("iperf3"), "-c", BRIDGE, "-p", str(IPERF), "-J", "-t", "1"]
    server = subprocess.Popen(
        [program("iperf3"), "-s", "-B", HOME, "-p", str(IPERF)],
        preexec_fn=net.home.enter,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def call(*options: str) -> dict[str, Any]:
        done = subprocess.run(
            [*client, *options],
            preexec_fn=net.user.enter,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        report = json.loads(done.stdout)
        assert not done.returncode and "error" not in report, report.get("error")
        return report["end"]

    try:
        wait_for(lambda: served_at(net, IPERF), SECONDS, "iperf3 listens")
        yield call
    finally:
        server.terminate()
        server.wait()


@pytest.mark.any_workers
@pytest.mark.parametrize("direction", [(), ("-R",)], ids=["up", "down"])
def test_iperf3_through_a_public_port(iperf3: Iperf3, direction: tuple[str, ...]) -> None:
    """Its control connection and its streams use the same port.

    It ends while bytes are in buffers, and does not count these: what is sent is more than what
    is received.  The bytes themselves are compared by the tests above.
    """
    end = iperf3("-P", "2", *direction)
    assert [stream["receiver"]["bytes"] > 1 << 20 for stream in end["streams"]] == [True, True]
    assert end["sum_received"]["bytes"] <= end["sum_sent"]["bytes"]


def test_each_udp_client_has_a_session_and_sizes_are_kept(tunnel: Tunnel, net: Net) -> None:
    with UdpEcho(HOME, served(net, UDP)) as target:
        for _ in range(3):
            with udp(USER, net.user.socket) as sock:
                for size in (0, 1, 1200, 1472, 9000, 65507):
                    data = random.Random(size).randbytes(size)
                    sock.sendto(data, (BRIDGE, UDP))
                    assert sock.recvfrom(65536) == (data, (BRIDGE, UDP))
        assert len(set(target.sources)) == 3


def test_dns_queries_through_a_public_port(tunnel: Tunnel, net: Net) -> None:
    with UdpEcho(HOME, served(net, DNS), dns_answer):
        for number in range(3):
            assert dig((BRIDGE, DNS), name=f"n{number}.test", preexec_fn=net.user.enter) == ANSWER


@pytest.mark.any_workers
def test_quic_through_a_public_port(tunnel: Tunnel, net: Net, tmp_path: Path) -> None:
    pytest.importorskip("aioquic")
    from tests.e2e import quic

    data = random.Random(3).randbytes(QUIC_BYTES)

    def transfer() -> bytes:
        net.user.enter()
        return quic.transfer(QUIC, data, 120.0, BRIDGE)

    with quic.EchoServer(tmp_path, HOME, net.home.enter, QUIC):
        assert Task(transfer).result(120) == data


# -- the exit


def test_socks_through_a_rule_and_the_exit(tunnel: Tunnel, net: Net) -> None:
    """CONNECT and UDP ASSOCIATE at the bridge's own proxy port."""
    with (
        TcpEcho(PRINTER, net.home.socket) as tcp,
        UdpEcho(PRINTER, net.home.socket) as first,
        UdpEcho(HOME, net.home.socket) as second,
    ):
        sock, _ = socks5((BRIDGE, SPS), CONNECT, tcp.address, make=net.user.socket)
        with sock:
            echo(sock, b"hello")
        with Association((BRIDGE, SPS), make=net.user.socket) as client:
            for target in (first, second):
                assert client.echo(target.address, b"hello")[0] == target.address
        # The agent sends from one port to all targets.
        first_ports, second_ports = (
            {source[1] for source in target.sources} for target in (first, second)
        )
        assert first_ports == second_ports


def test_curl_through_a_rule_and_the_exit(tunnel: Tunnel, net: Net, tmp_path: Path) -> None:
    (tmp_path / "page").write_text("printer\n")
    with web_server(net, tmp_path, PRINTER, 80):
        for scheme in ("socks5h", "http"):
            page = curl(net, "-x", f"{scheme}://{BRIDGE}:{SPS}", f"http://{PRINTER}/page")
            assert page == b"printer\n"


# -- faults


def test_agent_is_reached_by_the_tunnel_alone(tunnel: Tunnel, net: Net) -> None:
    """The NAT lets no connection in, on which the other tests rely."""
    with (
        TcpEcho(HOME, net.home.socket) as target,
        net.user.socket(socket.AF_INET, socket.SOCK_STREAM) as sock,
    ):
        sock.settimeout(1)
        with pytest.raises(OSError):
            sock.connect(target.address)


def test_tunnel_recovers_after_the_network_was_cut(netproxyd: Start, net: Net) -> None:
    """Hazard 126: both sides notice, ports are closed, and the agent connects again."""
    short_timeouts = {"python": (sys.executable, "-c", SHORT_TIMEOUTS)}
    with TcpEcho(HOME, net.home.socket) as target:
        tunnel = start(
            netproxyd,
            net,
            f'["{BRIDGE}:{ECHO}"]',
            f'{{"{ECHO}": "{HOME}:{target.address[1]}"}}',
            **short_timeouts,
        )
        wait_for(lambda: tunnel.public_ports(net) == 1, SECONDS, "the port is open")
        with dial_as_user(net, ECHO) as sock:
            echo(sock, b"hello")
        before = [thread_count(daemon) for daemon in tunnel]
        for turn in (1, 2):
            net.nat.nft(CUT)
            try:
                tunnel.bridge.said("agent 'home' disconnected: silent for 3 s", turn)
                tunnel.agent.said("tunnel: .*silent for 3 s")
                assert not tunnel.public_ports(net)
            finally:
                net.nat.nft("delete table ip cut")
            tunnel.agent.said("tunnel: connected as 'home'", turn + 1)
            wait_for(lambda: tunnel.public_ports(net) == 1, SECONDS, "the port is open again")
            with dial_as_user(net, ECHO) as sock:
                echo(sock, b"hello")
        after = [thread_count(daemon) for daemon in tunnel]
        assert max(now - then for now, then in zip(after, before, strict=True)) <= 4


def test_tunnel_recovers_after_the_bridge_was_killed(netproxyd: Start, net: Net) -> None:
    """Hazard 125."""
    short_timeouts = {"python": (sys.executable, "-c", SHORT_TIMEOUTS)}
    with TcpEcho(HOME, net.home.socket) as target:
        ports, services = f'["{BRIDGE}:{ECHO}"]', f'{{"{ECHO}": "{HOME}:{target.address[1]}"}}'
        tunnel = start(netproxyd, net, ports, services, **short_timeouts)
        tunnel.bridge.kill()
        time.sleep(3)
        netproxyd(
            config=bridge_text(ports),
            host=BRIDGE,
            make=net.bridge.socket,
            preexec_fn=net.bridge.enter,
            **short_timeouts,
        )
        tunnel.agent.said("tunnel: connected as 'home'", 2)
        wait_for(lambda: tunnel.public_ports(net) == 1, SECONDS, "the port is open again")
        with dial_as_user(net, ECHO) as sock:
            echo(sock, b"hello")
