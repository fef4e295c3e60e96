"""A reverse tunnel between hosts of their own: a user, a bridge, and behind a NAT that lets nobody in an agent with its network.

The sizes are those of a short run; NETPROXY_LONG=1 in the environment has 100 MB of TCP and 20 MB of QUIC.
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
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import pytest

from tests.e2e.conftest import Start
from tests.e2e.namespaces import Namespace, connect, hosts
from tests.e2e.peers import CONNECT, Association, TcpEcho, UdpEcho, echo, socks5, udp
from tests.e2e.support import Netproxyd, environment, program, wait_for
from tests.e2e.test_udp_clients import ANSWER, dig, dns_answer
from tests.support.certificates import certificates
from tests.support.sockets import Task

pytestmark = pytest.mark.e2e

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
UNDER_WAY = 64 << 20  # bytes: more than all the buffers hold between two programs
STANDING = 20  # descriptors of a tunnel at rest: ports, the control connection, connections that wait, sessions
TOKEN = "a token for hosts of their own"
NAT = """
table ip netproxy-test {
    chain out { type nat hook postrouting priority 100; ip saddr 192.168.77.0/24 oifname "to-bridge" masquerade; }
    chain in { type filter hook forward priority 0; iifname "to-bridge" ct state new drop; }
}
"""
# The daemon with the times of a minute cut to those of seconds.
HASTY = """
import sys
from netproxy.tunnel import agent, control
control.HEARTBEAT, control.DEAD, agent.BACKOFF_FIRST, agent.BACKOFF_LIMIT = 0.5, 3.0, 0.4, 0.8
from netproxy.cli import main
raise SystemExit(main(sys.argv[3:]))
"""


Iperf3 = Callable[..., "dict[str, Any]"]


class Net(NamedTuple):
    user: Namespace
    bridge: Namespace
    nat: Namespace
    home: Namespace


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with hosts("user", "bridge", "nat", "home") as made:
        net = Net(*made)
        connect(net.user, [f"{USER}/24"], net.bridge, [f"{BRIDGE}/24"])
        connect(net.bridge, [f"{OUTSIDE}/24"], net.nat, [f"{NAT_OUTSIDE}/24"])
        connect(net.nat, [f"{NAT_INSIDE}/24"], net.home, [f"{HOME}/24", f"{PRINTER}/24"])
        net.home.ip("route", "add", "default", "via", NAT_INSIDE)
        within(net.nat, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        net.nat.nft(NAT)
        yield net


def within(host: Namespace, *command: str) -> str:
    return subprocess.run(
        [program("ip"), "netns", "exec", host.name, *command],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


class Tunnel(NamedTuple):
    bridge: Netproxyd
    agent: Netproxyd

    def agents(self, net: Net) -> int:
        """Ports that agents have open."""
        return len(
            [line for line in listening(net) if not line.endswith((f":{AGENTS}", f":{SPS}"))]
        )


def listening(net: Net) -> list[str]:
    """host:port of what listens on the bridge's host, TCP."""
    return re.findall(
        r"^LISTEN\s+\S+\s+\S+\s+(\S+)", within(net.bridge, program("ss"), "-Hltn"), re.MULTILINE
    )


def bridge_text(ports: str) -> str:
    made = certificates()
    return f"""
listeners: [{{listen: "{BRIDGE}:{SPS}", clients: [10.80.1.0/24]}}]
tunnel:
  bridge:
    listen: {OUTSIDE}:{AGENTS}
    tls: {made.listener()}
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
    agent.said("tunnel: connected as 'home'", seconds=20)
    for one in (bridge, agent):
        one.baseline += STANDING
    return Tunnel(bridge, agent)


@pytest.fixture
def tunnel(netproxyd: Start, net: Net) -> Iterator[Tunnel]:
    """With a port for each kind of service, opened for the user's network."""
    everything = [SSH, WEB, ECHO, BULK, IPERF, f"{UDP}/udp", f"{DNS}/udp", f"{QUIC}/udp"]
    ports = ", ".join(f'"{BRIDGE}:{one}"' for one in everything)
    services = ", ".join(f'"{one}": "{HOME}:{str(one).partition("/")[0]}"' for one in everything)
    made = start(netproxyd, net, f"[{ports}]", f"{{{services}}}")
    wait_for(lambda: made.agents(net) == 5, 10.0, "the agent's ports are open")
    yield made


def user(net: Net, port: int) -> socket.socket:
    """A connection of the user's to a port of the bridge."""
    sock = net.user.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.settimeout(20)
    sock.connect((BRIDGE, port))
    return sock


def served_at(net: Net, port: int) -> bool:
    """Whether somebody listens there, on the agent's host."""
    return f"{HOME}:{port} " in within(net.home, program("ss"), "-Hltn")


def served(net: Net, port: int) -> Callable[..., socket.socket]:
    """Makes the sockets of a server of peers on a chosen port of the agent's host."""

    def make(*arguments: Any) -> socket.socket:
        return _Bound(net.home.socket(*arguments), port)

    return make


class _Bound(socket.socket):
    """A socket that is bound to one port, whatever it is asked for."""

    def __init__(self, sock: socket.socket, port: int) -> None:
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self._port = port

    def bind(self, address: Any) -> None:
        super().bind((address[0], self._port))


# -- through ports


def test_ssh(tunnel: Tunnel, net: Net, tmp_path: Path) -> None:
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
        wait_for(
            lambda: served_at(net, SSH), 10.0, "sshd listens"
        )  # a reset is no reason for ssh to try again
        command = [
            program("ssh"),
            "-F",
            "none",
            "-p",
            str(SSH),
            "-i",
            str(tmp_path / "user"),
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            f"root@{BRIDGE}",
            "cat; echo done",
        ]
        done = subprocess.run(
            command,
            preexec_fn=net.user.enter,
            input=b"x" * 1_000_000,
            capture_output=True,
            timeout=30,
        )
        assert done.stdout == b"x" * 1_000_000 + b"done\n", done.stderr
    finally:
        daemon.terminate()
        daemon.wait()


def test_http(tunnel: Tunnel, net: Net, tmp_path: Path) -> None:
    (tmp_path / "page").write_text("a page of the agent's network\n")
    web = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "http.server",
            "--bind",
            HOME,
            "--directory",
            str(tmp_path),
            str(WEB),
        ],
        preexec_fn=net.home.enter,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        done = subprocess.run(
            [
                program("curl"),
                "-q",
                "-sS",
                "--fail",
                "--retry",
                "9",
                "--retry-all-errors",
                "--retry-delay",
                "1",
                f"http://{BRIDGE}:{WEB}/page",
            ],
            preexec_fn=net.user.enter,
            env=environment(),
            capture_output=True,
            timeout=30,
        )
        assert done.stdout == b"a page of the agent's network\n", done.stderr
    finally:
        web.terminate()
        web.wait()


def test_bulk_both_ways_with_a_half_close(tunnel: Tunnel, net: Net) -> None:
    """The end of what the user sends reaches the service, whose own bytes still come, to the last."""
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
        with user(net, BULK) as sock:
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
    """A server in the agent's network and what calls it from the user's, by a port of the bridge; gives what it tells."""
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
            timeout=30,
        )
        told = json.loads(done.stdout)
        assert not done.returncode and "error" not in told, told.get("error")
        return told["end"]

    try:
        wait_for(lambda: served_at(net, IPERF), 10.0, "iperf3 listens")
        yield call
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("direction", [(), ("-R",)], ids=["up", "down"])
def test_iperf3(iperf3: Iperf3, direction: tuple[str, ...]) -> None:
    """Its control connection and one for each stream come by the same port.

    At full speed it breaks off with what is under way, and does not count that; with pauses after blocks nothing is under way
    at its end, and what came is what was sent.
    """
    end = iperf3("-P", "2", *direction)
    assert [stream["receiver"]["bytes"] > 1 << 20 for stream in end["streams"]] == [True, True]
    assert 0 <= end["sum_sent"]["bytes"] - end["sum_received"]["bytes"] < UNDER_WAY
    end = iperf3(
        "-b", "40M", "-l", "1M", *direction
    )  # a block each 0.21 s: the last one has 0.16 s
    assert end["sum_received"]["bytes"] == end["sum_sent"]["bytes"] >= 4 << 20


def test_udp_echo(tunnel: Tunnel, net: Net) -> None:
    """A session for each of the user's ports, sizes kept up to the largest."""
    with UdpEcho(HOME, served(net, UDP)) as target:
        for _ in range(3):
            with udp(USER, net.user.socket) as sock:
                for size in (0, 1, 1200, 1472, 9000, 65507):
                    data = random.Random(size).randbytes(size)
                    sock.sendto(data, (BRIDGE, UDP))
                    assert sock.recvfrom(65536) == (data, (BRIDGE, UDP))
        assert len(set(target.sources)) == 3


def test_dig(tunnel: Tunnel, net: Net) -> None:
    with UdpEcho(HOME, served(net, DNS), dns_answer):
        for number in range(3):
            assert dig((BRIDGE, DNS), name=f"n{number}.test", preexec_fn=net.user.enter) == ANSWER


def test_quic(tunnel: Tunnel, net: Net, tmp_path: Path) -> None:
    pytest.importorskip("aioquic")
    from tests.e2e import quic

    data = random.Random(3).randbytes(QUIC_BYTES)

    def transfer() -> bytes:
        net.user.enter()
        return quic.transfer(QUIC, data, 120.0, BRIDGE)

    with quic.EchoServer(tmp_path, HOME, net.home.enter, QUIC):
        assert Task(transfer).result(120) == data


# -- through the exit


def test_socks_into_the_agents_network(tunnel: Tunnel, net: Net) -> None:
    """CONNECT and UDP of the user's, by the bridge's own proxy port and a rule."""
    with (
        TcpEcho(PRINTER, net.home.socket) as tcp,
        UdpEcho(PRINTER, net.home.socket) as one,
        UdpEcho(HOME, net.home.socket) as other,
    ):
        sock, _ = socks5((BRIDGE, SPS), CONNECT, tcp.address, make=net.user.socket, seconds=20)
        with sock:
            echo(sock, b"hello")
        with Association((BRIDGE, SPS), make=net.user.socket) as client:
            for target in (one, other):
                assert client.echo(target.address, b"hello")[0] == target.address
        assert {source[1] for source in one.sources} == {
            source[1] for source in other.sources
        }  # one port for all


def test_curl_into_the_agents_network(tunnel: Tunnel, net: Net, tmp_path: Path) -> None:
    (tmp_path / "page").write_text("printer\n")
    web = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "http.server",
            "--bind",
            PRINTER,
            "--directory",
            str(tmp_path),
            "80",
        ],
        preexec_fn=net.home.enter,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for scheme in ("socks5h", "http"):
            done = subprocess.run(
                [
                    program("curl"),
                    "-q",
                    "-sS",
                    "--fail",
                    "--retry",
                    "9",
                    "--retry-all-errors",
                    "--retry-delay",
                    "1",
                    "-x",
                    f"{scheme}://{BRIDGE}:{SPS}",
                    f"http://{PRINTER}/page",
                ],
                preexec_fn=net.user.enter,
                env=environment(),
                capture_output=True,
                timeout=30,
            )
            assert done.stdout == b"printer\n", done.stderr
    finally:
        web.terminate()
        web.wait()


# -- faults


def test_agent_is_not_reached_but_by_the_tunnel(tunnel: Tunnel, net: Net) -> None:
    """What these hosts are for: nobody gets in from outside."""
    with (
        TcpEcho(HOME, net.home.socket) as target,
        net.user.socket(socket.AF_INET, socket.SOCK_STREAM) as sock,
    ):
        sock.settimeout(1)
        with pytest.raises(OSError):
            sock.connect(target.address)


def test_network_that_is_cut_and_comes_back(netproxyd: Start, net: Net) -> None:
    """Hazard 126, with a tenth of its times: both sides find out, ports are free, and all is well again by itself."""
    hasty = {"python": (sys.executable, "-c", HASTY)}
    with TcpEcho(HOME, net.home.socket) as target:
        tunnel = start(
            netproxyd,
            net,
            f'["{BRIDGE}:{ECHO}"]',
            f'{{"{ECHO}": "{HOME}:{target.address[1]}"}}',
            **hasty,
        )
        wait_for(lambda: tunnel.agents(net) == 1, 10.0, "the port is open")
        with user(net, ECHO) as sock:
            echo(sock, b"hello")
        threads = [len(os.listdir(f"/proc/{one.process.pid}/task")) for one in tunnel]
        for turn in (1, 2):
            net.nat.nft(
                "table ip cut { chain everything { type filter hook forward priority -10; drop; }; }"
            )
            try:
                tunnel.bridge.said("agent 'home' is gone: silent for 3 s", turn, seconds=20)
                tunnel.agent.said("tunnel: .*silent for 3 s", seconds=20)
                assert not tunnel.agents(net)
            finally:
                net.nat.nft("delete table ip cut")
            tunnel.agent.said("tunnel: connected as 'home'", turn + 1, seconds=20)
            wait_for(lambda: tunnel.agents(net) == 1, 10.0, "the port is open again")
            with user(net, ECHO) as sock:
                echo(sock, b"hello")
        now = [len(os.listdir(f"/proc/{one.process.pid}/task")) for one in tunnel]
        assert max(after - before for after, before in zip(now, threads)) <= 4


def test_bridge_that_is_killed_and_comes_back(netproxyd: Start, net: Net) -> None:
    """Hazard 125."""
    hasty = {"python": (sys.executable, "-c", HASTY)}
    with TcpEcho(HOME, net.home.socket) as target:
        ports, services = f'["{BRIDGE}:{ECHO}"]', f'{{"{ECHO}": "{HOME}:{target.address[1]}"}}'
        tunnel = start(netproxyd, net, ports, services, **hasty)
        tunnel.bridge.kill()
        time.sleep(3)
        netproxyd(
            config=bridge_text(ports),
            host=BRIDGE,
            make=net.bridge.socket,
            preexec_fn=net.bridge.enter,
            **hasty,
        )
        tunnel.agent.said("tunnel: connected as 'home'", 2, seconds=20)
        wait_for(lambda: tunnel.agents(net) == 1, 10.0, "the port is open again")
        with user(net, ECHO) as sock:
            echo(sock, b"hello")
