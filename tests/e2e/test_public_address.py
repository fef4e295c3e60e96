"""What clients outside are told behind NATs: at home, in a cloud, in a container.

Three hosts: `outside` has clients and STUN servers, `router` translates addresses, `box` runs the
daemon.  The addresses outside are none for documentation: miniupnpd maps no port at those.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import pytest

from tests.e2e.conftest import Start
from tests.e2e.namespaces import Namespace, connect, hosts
from tests.e2e.peers import Association, UdpEcho
from tests.e2e.support import SECONDS, Netproxyd, program, wait_for
from tests.support.router import Router, RouterServer
from tests.support.stun_server import StunServer

pytestmark = pytest.mark.e2e

BOX, INSIDE = "192.168.1.7", "192.168.1.1"
PUBLIC, MOVED, CLIENT, SECOND = (f"5.5.5.{number}" for number in (1, 9, 2, 3))
CLIENTS = "clients: [5.5.5.0/24, 192.168.1.0/24]"
PORT = 1080
STUN = f"stun: [{CLIENT}, {SECOND}]"
FORWARD = "dnat to 192.168.1.7"


class Net(NamedTuple):
    """The three hosts."""

    outside: Namespace
    router: Namespace
    box: Namespace

    @property
    def uplink(self) -> str:
        """The router's interface to the outside."""
        return f"to-{self.outside.name.rpartition('-')[2]}"


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with hosts("outside", "router", "box") as created:
        net = Net(*created)
        addresses = [f"{CLIENT}/24", f"{SECOND}/24"]
        connect(net.outside, addresses, net.router, [f"{PUBLIC}/24"])
        connect(net.router, [f"{INSIDE}/24"], net.box, [f"{BOX}/24"])
        net.box.ip("route", "add", "default", "via", INSIDE)
        net.router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        yield net


@pytest.fixture
def servers(net: Net) -> Iterator[list[StunServer]]:
    sockets = [net.outside.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    for sock, host in zip(sockets, (CLIENT, SECOND), strict=True):
        sock.bind((host, 3478))
    with StunServer(sockets[0]) as first, StunServer(sockets[1]) as second:
        yield [first, second]


@pytest.fixture
def echo(net: Net) -> Iterator[UdpEcho]:
    with UdpEcho(CLIENT, net.outside.socket) as target:
        yield target


def translate(net: Net, before: str, behind: str) -> None:
    """Have the router translate what comes from outside, and what goes there."""
    outside = net.uplink
    net.router.nft(f"""
table ip nat-test {{}}
delete table ip nat-test
table ip nat-test {{
    chain before {{ type nat hook prerouting priority -100; iifname {outside} {before}; }}
    chain behind {{ type nat hook postrouting priority 100; oifname {outside} {behind}; }}
}}""")


def start(netproxyd: Start, net: Net, keys: str, *arguments: str) -> Netproxyd:
    config = f'listeners: [{{listen: ":{PORT}", name: main, {CLIENTS}, {keys}}}]'
    where = {"host": BOX, "make": net.box.socket, "preexec_fn": net.box.enter}
    return netproxyd(*arguments, config=config, **where)


def told(net: Net, server: tuple[str, int], echo: UdpEcho | None = None) -> tuple[str, int]:
    """Return what a client outside is told; with `echo`, a datagram there and back as well."""
    with Association(server, make=net.outside.socket) as client:
        if echo is not None:
            assert client.echo(echo.address, b"hello") == (echo.address, client.bound)
        return client.bound


@pytest.mark.parametrize(
    "before, behind, announce, port",
    [
        # A router at home, with forwarded ports.
        (f"meta l4proto {{tcp, udp}} th dport {PORT} {FORWARD}", "masquerade", "auto", PORT),
        # One that gives each target another port.
        (f"meta l4proto {{tcp, udp}} th dport {PORT} {FORWARD}", "masquerade random", "auto", PORT),
        # A cloud: the public address is translated as a whole.
        (f"ip daddr {PUBLIC} {FORWARD}", f"snat to {PUBLIC}", "auto", PORT),
        # A container whose port has another number outside.
        (
            f"meta l4proto {{tcp, udp}} th dport 2080 {FORWARD}:{PORT}",
            "masquerade",
            "auto:2080",
            2080,
        ),
    ],
    ids=["home", "each target another port", "cloud", "container"],
)
def test_client_outside_is_told_an_address_that_leads_to_the_box(
    netproxyd: Start,
    net: Net,
    servers: list[StunServer],
    echo: UdpEcho,
    before: str,
    behind: str,
    announce: str,
    port: int,
) -> None:
    """Hazard 43."""
    translate(net, before, behind)
    daemon = start(netproxyd, net, f'announce: "{announce}", {STUN}')
    daemon.said(rf"'main' announces {PUBLIC}:")
    wait_for(lambda: told(net, (PUBLIC, port)) == (PUBLIC, port), SECONDS, "all servers count")
    told(net, (PUBLIC, port), echo)
    # The router itself comes with a private address.
    with Association((BOX, PORT), make=net.router.socket) as client:
        assert client.bound == (BOX, PORT)
    assert {request.host for server in servers for request in server.requests} == {PUBLIC}


@pytest.fixture
def moving(net: Net) -> Iterator[Callable[[], None]]:
    """Return what gives the router another public address; it has the first one afterwards."""

    def move(before: str = PUBLIC, after: str = MOVED) -> None:
        net.router.ip("address", "delete", f"{before}/24", "dev", net.uplink)
        net.router.ip("address", "add", f"{after}/24", "dev", net.uplink)

    yield move
    move(MOVED, PUBLIC)


def test_change_of_the_public_address_is_followed(
    netproxyd: Start, net: Net, servers: list[StunServer], echo: UdpEcho, moving: Callable[[], None]
) -> None:
    translate(net, f"meta l4proto {{tcp, udp}} th dport {PORT} {FORWARD}", "masquerade")
    daemon = start(netproxyd, net, f"announce: auto, {STUN}")
    daemon.said(rf"'main' announces {PUBLIC}:{PORT}")
    moving()
    # It would be noticed within half a minute.
    daemon.reload()
    daemon.said(rf"'main' announces {MOVED}:{PORT} \(seen by .*, it was {PUBLIC}:{PORT}\)")
    assert told(net, (MOVED, PORT), echo) == (MOVED, PORT)


def test_all_workers_announce_what_one_has_found(
    netproxyd: Start, net: Net, servers: list[StunServer], echo: UdpEcho
) -> None:
    translate(net, f"meta l4proto {{tcp, udp}} th dport {PORT} {FORWARD}", "masquerade")
    daemon = start(netproxyd, net, f"announce: auto, {STUN}", "-w", "2")
    daemon.provoked = r"worker [01] has died \(SIGKILL\)"
    daemon.said(rf"'main' announces {PUBLIC}:{PORT}")

    def all_announce() -> bool:
        # The kernel chooses the worker of each connection.
        return {told(net, (PUBLIC, PORT)) for _ in range(8)} == {(PUBLIC, PORT)}

    wait_for(all_announce, SECONDS, "all workers announce it")
    # A worker that begins anew asks the other; the first one asks the servers again.
    for number, worker in enumerate(daemon.workers()):
        os.kill(worker, signal.SIGKILL)
        daemon.said(f"worker {number} is started again")
        wait_for(all_announce, SECONDS, "all workers announce it again")
    told(net, (PUBLIC, PORT), echo)


# -- port mapping


class Miniupnpd:
    """miniupnpd on the router, with the chains of nftables that it fills."""

    def __init__(self, net: Net, folder: Path) -> None:
        self._net, self._program = net, program("miniupnpd")
        self._config, self._pid_file = folder / "miniupnpd.conf", folder / "miniupnpd.pid"
        inside = f"to-{net.box.name.rpartition('-')[2]}"
        options = {
            **{"ext_ifname": net.uplink, "listening_ip": inside, "enable_natpmp": "yes"},
            **{"enable_upnp": "no", "system_uptime": "no", "lease_file": folder / "leases"},
            **{"upnp_table_name": "upnp", "upnp_nat_table_name": "upnp"},
            **{"upnp_forward_chain": "mapped", "upnp_nat_chain": "redirected"},
            "upnp_nat_postrouting_chain": "translated",
            "uuid": "abaf1a4b-fe54-4766-99bb-0bf527c32ba3",
        }
        lines = [f"{key}={value}\n" for key, value in options.items()]
        self._config.write_text("".join(lines) + "allow 1024-65535 0.0.0.0/0 1024-65535\n")
        self.start()

    def start(self) -> None:
        """Start without any mapping."""
        self._net.router.nft(f"""
table inet upnp {{}}
delete table inet upnp
table inet upnp {{
    chain mapped {{}}
    chain redirected {{}}
    chain translated {{}}
    chain forward {{ type filter hook forward priority 0; jump mapped; }}
    chain before {{ type nat hook prerouting priority -100; jump redirected; }}
    chain behind {{
        type nat hook postrouting priority 100; jump translated;
        oifname {self._net.uplink} masquerade;
    }}
}}""")
        command = [self._program, "-d", "-f", str(self._config), "-P", str(self._pid_file)]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=self._net.router.enter,
        )

    def stop(self) -> None:
        """End it, and forget its mappings."""
        self._process.kill()
        self._process.wait()
        self._net.router.nft("table inet upnp {}\ndelete table inet upnp\n")

    def mapped(self) -> int:
        """Return the number of ports that are mapped."""
        return self._net.router.nft_list("inet upnp").count(f"dnat ip to {BOX}:{PORT}")


@pytest.fixture
def mapping(net: Net, tmp_path: Path) -> Iterator[Miniupnpd]:
    router = Miniupnpd(net, tmp_path)
    yield router
    router.stop()


@pytest.mark.parametrize("protocol", ["pcp", "nat-pmp"])
def test_real_router_maps_the_ports(
    netproxyd: Start, net: Net, mapping: Miniupnpd, echo: UdpEcho, protocol: str
) -> None:
    net.router.nft("table ip nat-test {}\ndelete table ip nat-test\n")
    daemon = start(netproxyd, net, f"announce: auto, port_mapping: {protocol}")
    daemon.said(rf"(tcp|udp) port {PORT} is mapped to {PUBLIC}:{PORT} \({protocol}, router", 2)
    assert told(net, (PUBLIC, PORT), echo) == (PUBLIC, PORT)
    assert mapping.mapped() == 2
    daemon.finish()
    wait_for(lambda: mapping.mapped() == 0, SECONDS, "the mappings are released")


def test_restarted_router_is_asked_again(netproxyd: Start, net: Net, echo: UdpEcho) -> None:
    net.router.nft("table ip nat-test {}\ndelete table ip nat-test\n")
    router = Router()
    router.host = PUBLIC
    sock = net.router.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((INSIDE, 5351))
    with RouterServer(router, sock):
        daemon = start(netproxyd, net, "announce: auto, port_mapping: pcp")
        daemon.said(rf"'main' announces {PUBLIC}:{PORT}")
        daemon.said(rf"port {PORT} is mapped", 2)
        router.restart()
        router.host = MOVED
        # It would be noticed within a minute.
        daemon.reload()
        daemon.said(f"the router {INSIDE} has lost its port mappings")
        daemon.said(rf"'main' announces {MOVED}:{PORT} \(port mapping, it was {PUBLIC}:{PORT}\)")
        assert len(router.mappings) == 2
        daemon.finish()
        assert router.mappings == {}
