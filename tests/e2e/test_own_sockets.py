"""The daemon's own listeners, by every address that leads to them, on every path (hazard 136).

The proxy is a host with secondary addresses, aliases, local routes, an IPv6 anycast address and
a routing table that only marked packets use.  The client is another host.  Each test runs with
netlink, and with a system call filter that takes netlink away.
"""

from __future__ import annotations

import socket
import struct
import subprocess
from typing import Callable, Iterator, NamedTuple

import pytest

from netproxy.errors import Reason
from tests.e2e.conftest import Start
from tests.e2e.namespaces import Namespace, connect, hosts
from tests.e2e.peers import (
    BIND,
    CONNECT,
    Association,
    Refused,
    TcpEcho,
    UdpEcho,
    echo,
    encode,
    exactly,
    socks5,
    udp,
)
from tests.e2e.seccomp import without_netlink
from tests.e2e.support import PROCESSES, SECONDS, Netproxyd, program, wait_for
from tests.support.certificates import certificates
from tests.support.dns import query, question

pytestmark = pytest.mark.e2e

BOX, SECONDARY, VIP, CLIENT = "10.78.1.1", "10.78.1.5", "10.78.1.77", "10.78.1.2"
BOX6, CLIENT6, ANYCAST6 = "2001:db8:78::1", "2001:db8:78::2", "2001:db8:78::"
MARK = 78
SPS, MARKED, METRICS, DNS, PUBLIC = 1080, 1081, 9180, 5353, 8022
OTHER, AGENTS = 1180, 7000
"""Of daemons that run beside the first one."""
TOKEN = "a token for two hosts"
IDLE_DESCRIPTORS = 60
"""Of an idle tunnel: ports, control connection, idle work connections."""
FIXED = 2000
"""The first port of the listeners with a fixed target."""
RULE_NOT_ALLOWED = 2
"""REP of SOCKS5 (RFC 1928 section 6)."""
REQUEST_REJECTED = 91
"""CD of SOCKS4."""

KINDS = {
    "primary": BOX,
    "secondary": SECONDARY,
    "mapped": f"::ffff:{SECONDARY}",
    "6to4": "2002:a4e:105::1",
    "other-interface": "10.78.8.1",
    "loopback-alias": "10.78.9.1",
    "local-route": "10.78.66.7",
    "loopback": "127.0.0.1",
    "loopback-net": "127.9.9.9",
    "unspecified": "0.0.0.0",
    "group": "224.0.0.1",
    "broadcast": "255.255.255.255",
    "primary6": BOX6,
    "anycast6": ANYCAST6,
    "other-interface6": "2001:db8:78:8::1",
    "loopback-alias6": "2001:db8:78:9::1",
    "local-route6": "2001:db8:78:66::7",
    "loopback6": "::1",
    "unspecified6": "::",
    "group6": "ff05::2",
}
"""Addresses that lead to the box itself."""
ONLY_MARKED = {"mark": "10.78.55.7", "mark6": "2001:db8:78:55::7"}
"""Addresses that lead to the box for packets with MARK."""
BROADCAST = {"net-broadcast": "10.78.1.255"}
"""Only netlink tells that it is an own address.  Sockets may not send to it anyway."""
SEEN_IN_CONFIGURATION = {"loopback", "loopback-net", "loopback6", "unspecified6"}
"""Kinds that the configuration may not name as servers of the daemon itself."""


class World(NamedTuple):
    """The two hosts, and the daemon on the box."""

    client: Namespace
    box: Namespace
    daemon: Netproxyd
    kinds: dict[str, str]
    """The addresses that lead to the box, by kind."""

    def targets(self) -> list[str]:
        """Return each kind's address and its name."""
        return [*self.kinds.values(), *(f"{kind}.test" for kind in self.kinds)]

    def dial(self, port: int = SPS) -> socket.socket:
        """Connect from the client to a port of the box."""
        sock = self.client.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.settimeout(SECONDS)
        sock.connect((BOX, port))
        return sock

    def refused(self) -> int:
        """Return the refusals as loops so far, by whichever path."""
        status = self.daemon.status()
        return sum(
            status.get(f"{name}{{{Reason.LOOP.value}}}", 0) for name in ("dial_failures", "drops")
        )


def configuration(kinds: dict[str, str]) -> str:
    fixed = "".join(
        f"""
- {{listen: "0.0.0.0:{FIXED + 2 * index}", protocol: tcp, target: "{target(host, METRICS)}",
   clients: [10.78.1.0/24]}}
- {{listen: "0.0.0.0:{FIXED + 2 * index + 1}", protocol: udp, target: "{target(host, DNS)}",
   clients: [10.78.1.0/24]}}"""
        for index, host in enumerate(kinds.values())
    )
    names = ", ".join(f'{kind}.test: ["{host}"]' for kind, host in kinds.items())
    servers = "".join(
        f"""
  - {{domain: {kind}.{scheme}.test, servers: "{scheme}://{target(host, DNS)}"}}"""
        for kind, host in kinds.items()
        if kind not in SEEN_IN_CONFIGURATION
        for scheme in ("udp", "tcp")
    )
    return f"""
listeners:
- {{listen: "[::]:{SPS}", clients: [10.78.1.0/24, 2001:db8:78::/64]}}
- {{listen: "[::]:{MARKED}", clients: [10.78.1.0/24], upstream: "direct?mark={MARK}"}}
- {{listen: "[::]:{DNS}", protocol: dns, clients: [10.78.1.0/24]}}{fixed}
metrics: "[::]:{METRICS}"
metrics_token: 0123456789abcdef
destinations: {{deny: []}}
dns:
  servers: [192.0.2.1]
  hosts: {{{names}}}
  rules:{servers}
timeouts: {{connect: 2s}}
"""


def target(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def run_in(host: Namespace, *command: str) -> None:
    """Run a command in a namespace."""
    subprocess.run([program("ip"), "netns", "exec", host.name, *command], check=True)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Namespace, Namespace]]:
    with hosts("client", "box") as (client, box):
        box_addresses = [f"{BOX}/24", f"{SECONDARY}/24", f"{BOX6}/64"]
        connect(box, box_addresses, client, [f"{CLIENT}/24", f"{CLIENT6}/64"])
        box.ip("link", "add", "spare", "type", "veth", "peer", "spare-peer")
        for device in ("spare", "spare-peer"):
            box.ip("link", "set", device, "up")
        run_in(box, "sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
        for address, device in (
            ("10.78.8.1/32", "spare"),
            ("2001:db8:78:8::1/128", "spare"),
            ("10.78.9.1/32", "lo"),
            ("2001:db8:78:9::1/128", "lo"),
        ):
            options = ("nodad",) if ":" in address else ()
            box.ip("address", "add", address, "dev", device, *options)
        box.ip("route", "add", "local", "10.78.66.0/24", "dev", "lo")
        box.ip("-6", "route", "add", "local", "2001:db8:78:66::/64", "dev", "lo")
        for option in ("-4", "-6"):
            box.ip(option, "rule", "add", "fwmark", str(MARK), "lookup", "78")
        box.ip("route", "add", "local", "10.78.55.0/24", "dev", "lo", "src", BOX, "table", "78")
        box.ip("-6", "route", "add", "local", "2001:db8:78:55::/64", "dev", "lo", "table", "78")
        box.ip("route", "add", "default", "via", CLIENT)
        box.ip("-6", "route", "add", "default", "via", CLIENT6)
        wait_for(
            lambda: ANYCAST6 + " " in box.ip("-6", "route", "show", "table", "local"),
            SECONDS,
            "the box has an anycast address",
        )
        yield client, box


@pytest.fixture(scope="module", params=["netlink", "no-netlink"])
def world(
    request: pytest.FixtureRequest, shared_netproxyd: Start, pair: tuple[Namespace, Namespace]
) -> Iterator[World]:
    client, box = pair
    kinds, filters = {**KINDS, **BROADCAST}, [box.enter]
    if request.param == "no-netlink":
        kinds = KINDS
        filters.append(without_netlink())
    daemon = shared_netproxyd(
        config=configuration(kinds),
        host=BOX,
        make=box.socket,
        preexec_fn=lambda: [call() for call in filters],
    )
    yield World(client, box, daemon, kinds)
    # The next one has the same ports.
    daemon.finish()


# -- paths of connections: each returns how the proxy has refused


def by_socks5(world: World, host: str, port: int, command: int = CONNECT, to: int = SPS) -> str:
    try:
        sock, bound = socks5((BOX, to), command, (host, port), make=world.client.socket)
    except Refused as error:
        return "refused" if error.code == RULE_NOT_ALLOWED else str(error.code)
    sock.close()
    return f"connected from {bound}"


def by_bind(world: World, host: str, port: int) -> str:
    return by_socks5(world, host, port, BIND)


def by_socks4a(world: World, host: str, port: int) -> str:
    with world.dial() as sock:
        sock.sendall(b"\4\1" + struct.pack("!H", port) + b"\0\0\0\1\0" + host.encode() + b"\0")
        code = exactly(sock, 8)[1]
        return "refused" if code == REQUEST_REJECTED else str(code)


def by_socks4(world: World, host: str, port: int) -> str:
    with world.dial() as sock:
        sock.sendall(b"\4\1" + struct.pack("!H", port) + socket.inet_aton(host) + b"\0")
        code = exactly(sock, 8)[1]
        return "refused" if code == REQUEST_REJECTED else str(code)


def by_http_connect(world: World, host: str, port: int) -> str:
    authority = target(host, port)
    return http(world, f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n")


def by_http_get(world: World, host: str, port: int) -> str:
    authority = target(host, port)
    request = f"GET http://{authority}/metrics HTTP/1.1\r\nHost: {authority}\r\n\r\n"
    return http(world, request)


def by_connect_udp(world: World, host: str, port: int) -> str:
    path = f"/.well-known/masque/udp/{host.replace(':', '%3A')}/{port}/"
    return http(
        world,
        f"GET {path} HTTP/1.1\r\nHost: {target(BOX, SPS)}\r\nConnection: upgrade\r\n"
        "Upgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n\r\n",
    )


def http(world: World, request: str) -> str:
    """Send a request; return "refused" if the answer says that it would loop."""
    with world.dial() as sock:
        sock.sendall(request.encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += exactly(sock, 1)
        if b"error=proxy_loop_detected" in head and b" 403 " in head.splitlines()[0]:
            return "refused"
        return head.decode()


def by_uot(world: World, host: str, port: int) -> str:
    """A stream for one target, which is reset."""
    with uot(world) as sock:
        packet = query(question("a.test"))
        sock.sendall(b"\1" + encode((host, port)) + struct.pack("!H", len(packet)) + packet)
        try:
            return f"got {sock.recv(100)!r}"
        except ConnectionResetError:
            return "refused"


def uot(world: World) -> socket.socket:
    name = ("sp.v2.udp-over-tcp.arpa", 0)
    sock, _ = socks5((BOX, SPS), CONNECT, name, make=world.client.socket)
    return sock


Path = Callable[[World, str, int], str]


def any_host(host: str) -> bool:
    return True


def is_name(host: str) -> bool:
    return host.endswith(".test")


def is_socks4_address(host: str) -> bool:
    """0.0.0.x announces a name in SOCKS4a."""
    return ":" not in host and not is_name(host) and not host.startswith("0.")


PATHS: dict[str, tuple[Path, Callable[[str], bool], tuple[int, ...]]] = {
    "socks5": (by_socks5, any_host, (METRICS, SPS, DNS, FIXED)),
    "bind": (by_bind, lambda host: host not in ("0.0.0.0", "::"), (METRICS,)),
    "socks4": (by_socks4, is_socks4_address, (METRICS,)),
    "socks4a": (by_socks4a, is_name, (METRICS,)),
    "http-connect": (by_http_connect, any_host, (METRICS, SPS)),
    "http-get": (by_http_get, any_host, (METRICS,)),
    "connect-udp": (by_connect_udp, any_host, (DNS, SPS)),
    "uot": (by_uot, any_host, (DNS, SPS)),
}
"""Each with the hosts that it can be asked for, and the ports to try."""


@pytest.mark.parametrize("path", PATHS)
def test_own_sockets_are_refused_to_connections(world: World, path: str) -> None:
    """Hazards 77, 81 and 136."""
    ask, takes, ports = PATHS[path]
    asked = [(host, port) for host in filter(takes, world.targets()) for port in ports]
    before = world.refused()
    outcomes = {target: ask(world, *target) for target in asked}
    assert {target: how for target, how in outcomes.items() if how != "refused"} == {}
    assert len(asked) > 8
    wait_for(lambda: world.refused() - before >= len(asked), SECONDS, "refusals")


@pytest.mark.parametrize("path", ["associate", "uot"])
def test_own_sockets_are_refused_to_datagrams(world: World, path: str) -> None:
    """Hazards 77, 81 and 136.  The only answer is that of a target on another host.

    The own port has the number of that target's port.
    """
    before = world.refused()
    packet = query(question("a.test"))
    # Names are looked up first, so that their datagrams may come later than the others.
    addresses = list(world.kinds.values())
    names = [f"{kind}.test" for kind in world.kinds]
    with UdpEcho(CLIENT, world.client.socket, port=DNS) as target:
        if path == "associate":
            with Association((BOX, SPS), make=world.client.socket) as client:
                for host in (*addresses, *names):
                    client.send((host, DNS), packet)
                wait_for(lambda: world.refused() - before >= 2 * len(addresses), SECONDS, "drops")
                assert client.echo(target.address, b"hello")[0] == target.address
        else:
            with uot(world) as sock:
                sock.sendall(b"\0" + encode(("0.0.0.0", 0)))
                for host in (*addresses, *names):
                    sock.sendall(frame(host, DNS, packet))
                wait_for(lambda: world.refused() - before >= 2 * len(addresses), SECONDS, "drops")
                hello = frame(*target.address, b"hello")
                sock.sendall(hello)
                assert exactly(sock, len(hello)) == hello
        assert len(target.sources) == 1


def frame(host: str, port: int, data: bytes) -> bytes:
    """Return a frame of UoT that names its target."""
    raw = encode((host, port))
    kind = {1: b"\0", 4: b"\1", 3: b"\2"}[raw[0]]
    return kind + raw[1:] + struct.pack("!H", len(data)) + data


def test_fixed_targets_do_not_lead_back(world: World) -> None:
    """Hazard 136.  Of connections and of datagrams."""
    before = world.refused()
    for index in range(len(world.kinds)):
        try:
            with world.dial(FIXED + 2 * index) as sock:
                assert sock.recv(1) == b""
        except ConnectionResetError:
            pass
    wait_for(lambda: world.refused() - before >= len(world.kinds), SECONDS, "refusals")
    drops = f"drops{{{Reason.LOOP.value}}}"
    before = world.daemon.status().get(drops, 0)
    with udp(CLIENT, world.client.socket) as sock:
        for index in range(len(world.kinds)):
            sock.sendto(query(question("a.test")), (BOX, FIXED + 2 * index + 1))
        wait_for(
            lambda: world.daemon.status().get(drops, 0) - before >= len(world.kinds),
            SECONDS,
            "drops",
        )
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(100)


@pytest.mark.parametrize("scheme", ["udp", "tcp"])
def test_own_dns_listener_is_not_asked(world: World, scheme: str) -> None:
    """Hazard 136.  Each query is forwarded once and fails, so it did not come back."""
    before = world.daemon.status().get("queries{forwarded}", 0)
    with udp(CLIENT, world.client.socket) as sock:
        kinds = world.kinds.keys() - SEEN_IN_CONFIGURATION
        for number, kind in enumerate(kinds):
            sock.sendto(query(question(f"{kind}.{scheme}.test"), id=number), (BOX, DNS))
            answer = sock.recv(512)
            assert answer[:2] == struct.pack("!H", number)
            assert answer[3] & 15 == 2, f"{kind}: not SERVFAIL"
    after = world.daemon.status()["queries{forwarded}"]
    assert after - before == len(kinds)


def test_mark_of_the_upstream_decides(world: World) -> None:
    """Hazard 136.  Addresses that only marked packets reach by a local route."""
    for host in ONLY_MARKED.values():
        assert by_socks5(world, host, METRICS, to=MARKED) == "refused"
    before = world.refused() + world.daemon.status().get("drops{target failed}", 0)
    with (
        Association((BOX, MARKED), make=world.client.socket) as client,
        UdpEcho(CLIENT, world.client.socket, port=DNS) as target,
    ):
        for host in ONLY_MARKED.values():
            client.send((host, DNS), query(question("a.test")))
        # A datagram that comes after the refusal of its target is counted as "target failed".
        wait_for(
            lambda: (
                world.refused() + world.daemon.status().get("drops{target failed}", 0) - before
                >= len(ONLY_MARKED)
            ),
            SECONDS,
            "drops",
        )
        assert client.echo(target.address, b"hello")[0] == target.address


@pytest.mark.parametrize("port", [SPS, METRICS])
def test_same_port_of_another_host_is_reached(world: World, port: int) -> None:
    """Hazard 136.  The number of a port alone refuses nothing."""
    with TcpServer(CLIENT, world.client, port):
        for to in (SPS, MARKED):
            sock, _ = socks5((BOX, to), CONNECT, (CLIENT, port), make=world.client.socket)
            with sock:
                echo(sock, b"hello")


def test_address_counts_as_soon_as_the_machine_has_it(world: World) -> None:
    """Hazard 136.  A virtual address that moves between two hosts (VRRP)."""
    device = ("dev", "to-client")
    client_device = ("dev", "to-box")
    world.client.ip("address", "add", f"{VIP}/32", *client_device)
    with TcpServer(VIP, world.client, METRICS):
        for _ in range(2):
            sock, _bound = socks5((BOX, SPS), CONNECT, (VIP, METRICS), make=world.client.socket)
            with sock:
                echo(sock, b"hello")
            # Its last segments must not come to the address's new owner.
            wait_for(lambda: not world.daemon.status()["connections"], SECONDS, "its end")
            world.box.ip("address", "add", f"{VIP}/32", *device)
            assert by_socks5(world, VIP, METRICS) == "refused"
            world.box.ip("address", "del", f"{VIP}/32", *device)
    world.client.ip("address", "del", f"{VIP}/32", *client_device)


# -- daemons of other configurations


def start(netproxyd: Start, host: Namespace, address: str, config: str) -> Netproxyd:
    return netproxyd(config=config, host=address, make=host.socket, preexec_fn=host.enter)


def test_own_listener_is_no_upstream(netproxyd: Start, pair: tuple[Namespace, Namespace]) -> None:
    """Hazards 77 and 136.  By a name for every kind of address; nothing goes round even once.

    An address of most kinds would be an error of the configuration.
    """
    client, box = pair
    hops = [(OTHER + 1 + index, f"{kind}.own.test") for index, kind in enumerate(KINDS)]
    hosts = ", ".join(f"{kind}.own.test: ['{host}']" for kind, host in KINDS.items())
    listeners = "".join(
        f"""
- {{listen: "0.0.0.0:{port}", clients: [10.78.1.0/24],
   upstream: "socks5://{target(host, OTHER)}"}}"""
        for port, host in hops
    )
    daemon = start(
        netproxyd,
        box,
        BOX,
        f'listeners:\n- {{listen: "[::]:{OTHER}", clients: [10.78.0.0/16]}}{listeners}\n'
        f"dns: {{hosts: {{{hosts}}}}}",
    )
    for port, host in hops:
        with pytest.raises(Refused):
            socks5((BOX, port), CONNECT, ("192.0.2.1", 9), make=client.socket)
        said = daemon.said(f"listener=sps-{port} .*finished|finished .*listener=sps-{port} ")
        assert len(said) == 1 and Reason.LOOP.value in said[0], host
    assert not daemon.lines(f"listener=sps-{OTHER} ")


def test_relay_port_of_another_client_is_not_reached(
    netproxyd: Start, pair: tuple[Namespace, Namespace]
) -> None:
    """Hazards 77 and 136.  Its datagrams would come from the box, as those of a client there."""
    client, box = pair
    daemon = start(
        netproxyd,
        box,
        BOX,
        f"""
listeners: [{{listen: "0.0.0.0:{OTHER}", clients: [10.78.1.0/24], udp: {{relay_port: any}}}}]
destinations: {{deny: []}}
""",
    )
    drops = f"drops{{{Reason.LOOP.value}}}"
    with (
        Association((BOX, OTHER), make=client.socket) as attacker,
        Association((SECONDARY, OTHER), make=box.socket) as victim,
        UdpEcho(CLIENT, client.socket) as server,
    ):
        for host in (SECONDARY, KINDS["mapped"], KINDS["6to4"]):
            attacker.send((host, victim.bound[1]), b"\0\0\0" + encode(server.address) + b"forged")
        wait_for(lambda: daemon.status().get(drops) == 3, SECONDS, "drops")
        victim.echo(server.address, b"hello")
        assert len(server.sources) == 1


def bridge_text(listener: str, ports: str, rules: str = "[]") -> str:
    return f"""
listeners: [{{listen: "{listener}:{OTHER}", clients: [10.78.0.0/16]}}]
destinations: {{deny: []}}
tunnel:
  bridge:
    listen: "{listener}:{AGENTS}"
    tls: {certificates().listener()}
    agents: {{home: {{token: {TOKEN}, ports: [{ports}]}}}}
rules: {rules}
"""


def agent_text(listener: str, bridge: str, services: str) -> str:
    return f"""
listeners: [{{listen: "{listener}:{OTHER}", clients: [10.78.0.0/16]}}]
destinations: {{deny: []}}
tunnel:
  agent:
    bridge: tls://{bridge}:{AGENTS}
    name: home
    token: {TOKEN}
    tls: {{ca: "{certificates().path("ca.pem")}", server_name: localhost}}
    exit: true
    services: {{{services}}}
"""


def test_clients_of_the_bridge_do_not_reach_public_ports(
    netproxyd: Start, pair: tuple[Namespace, Namespace]
) -> None:
    """Hazards 77 and 136.  Only through the bridge itself; others use them."""
    client, box = pair
    bridge = start(netproxyd, box, BOX, bridge_text("[::]", f'"0.0.0.0:{PUBLIC}"'))
    with TcpServer(CLIENT, client, PUBLIC):
        text = agent_text(CLIENT, BOX, f'"{PUBLIC}": "{CLIENT}:{PUBLIC}"')
        agent = start(netproxyd, client, CLIENT, text)
        agent.said("tunnel: connected as 'home'", seconds=SECONDS)
        wait_for(lambda: reaches(client, PUBLIC), SECONDS, "the agent's port is open")
        for daemon in (bridge, agent):
            daemon.baseline += IDLE_DESCRIPTORS
        for host in KINDS.values():
            with pytest.raises(Refused) as caught:
                socks5((BOX, OTHER), CONNECT, (host, PUBLIC), make=client.socket)
            assert caught.value.code == RULE_NOT_ALLOWED, host


def reaches(client: Namespace, port: int) -> bool:
    """Return whether an echo server answers at a port of the box."""
    with client.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(SECONDS)
        try:
            sock.connect((BOX, port))
            echo(sock, b"hello")
        except (OSError, EOFError):
            return False
        return True


def test_bridge_cannot_ask_an_exit_for_its_own_listeners(
    netproxyd: Start, pair: tuple[Namespace, Namespace]
) -> None:
    """Hazards 77 and 136.  Services may be such listeners: the agent's file says so."""
    client, box = pair
    rules = f"[{{port: {OTHER}, via: tunnel://home}}]"
    bridge = start(netproxyd, client, CLIENT, bridge_text(CLIENT, f'"{CLIENT}:{PUBLIC}"', rules))
    text = agent_text("[::]", CLIENT, f'"{PUBLIC}": "{SECONDARY}:{OTHER}"')
    agent = start(netproxyd, box, BOX, text)
    agent.said("tunnel: connected as 'home'", seconds=SECONDS)
    for daemon in (bridge, agent):
        daemon.baseline += IDLE_DESCRIPTORS
    for host in KINDS.values():
        with pytest.raises(Refused) as caught:
            socks5((CLIENT, OTHER), CONNECT, (host, OTHER), make=client.socket)
        assert caught.value.code == RULE_NOT_ALLOWED, host
    assert not agent.lines(f"listener=sps-{OTHER} ")
    refused = f"tunnel_refused{{{Reason.LOOP.value}}}"
    # The bridge itself refuses the unspecified addresses, which are its own as well.
    wait_for(lambda: agent.status()[refused] == len(KINDS) - 2, SECONDS, "all are counted")
    with TcpEcho(CLIENT, client.socket) as server:

        def by_service() -> socket.socket | None:
            try:
                return socks5((CLIENT, PUBLIC), CONNECT, server.address, make=client.socket)[0]
            except OSError:
                return None

        with wait_for(by_service, SECONDS, "the agent's port is open") as sock:
            echo(sock, b"hello")


class TcpServer(TcpEcho):
    """An echo server on a chosen port of a host."""

    def __init__(self, host: str, namespace: Namespace, port: int) -> None:
        def make(*arguments: int) -> socket.socket:
            return _PortSocket(namespace.socket(*arguments), port)

        super().__init__(host, make)


class _PortSocket(socket.socket):
    """A socket that binds one port, whatever port it is told."""

    def __init__(self, sock: socket.socket, port: int) -> None:
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self._port = port

    def bind(self, address: tuple[str, int]) -> None:  # type: ignore[override]
        super().bind((address[0], self._port))


def test_missing_netlink_is_said_once(world: World) -> None:
    for host in world.kinds.values():
        by_socks5(world, host, METRICS)
    said = world.daemon.lines("cannot ask the kernel for routes")
    assert len(said) == (0 if BROADCAST.keys() <= world.kinds.keys() else PROCESSES)
