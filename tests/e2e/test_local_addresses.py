"""Connections that leave from prefixes, addresses and interfaces, between three hosts.

The proxy is the host in the middle.  Two prefixes that no interface of it has are routed to it,
and a local route makes it accept them.  Each test runs with netlink, and with a system call
filter that takes netlink away.
"""

from __future__ import annotations

import ipaddress
import socket
from contextlib import closing
from typing import Iterator, NamedTuple

import pytest

from netproxy.errors import Reason
from tests.e2e.conftest import Start
from tests.e2e.namespaces import Namespace, connect, hosts
from tests.e2e.peers import CONNECT, Association, Login, Refused, UdpEcho, listen, socks5
from tests.e2e.seccomp import without_netlink
from tests.e2e.support import SECONDS, Netproxyd

pytestmark = pytest.mark.e2e

CLIENT, BOX, BOX_SECOND = "10.79.1.2", "10.79.1.1", "10.79.1.9"
BOX_TO_SERVER, SERVER, SERVER6 = "10.79.3.1", "10.79.3.2", "fd79:3::2"
PREFIX, PREFIX6 = "198.18.79.0/24", "2001:db8:79::/64"
NOT_LOCAL = "10.79.77.7"
"""An address that the proxy does not have."""
RULE_NOT_ALLOWED, NETWORK_UNREACHABLE = 2, 3
"""REP of SOCKS5 (RFC 1928 section 6)."""
CONNECTIONS = 300

BINDS = {
    1080: f"'{PREFIX6}'",
    1081: f"'{PREFIX}'",
    1082: "incoming",
    1083: "to-server",
    1084: "to-client",
    1085: NOT_LOCAL,
    1086: BOX_TO_SERVER,
}
"""The bind of a listener, by its port."""
SIX, FOUR, INCOMING, TO_SERVER, TO_CLIENT, MISSING, ADDRESS = BINDS
USERS = 1090
# The fixture that ends the daemon asks the first listener.
CONFIG = "listeners:\n- {listen: '0.0.0.0:1079', clients: 10.79.0.0/16, auth: none}\n" + "".join(
    f"- {{listen: '0.0.0.0:{port}', clients: 10.79.0.0/16, auth: none, bind: {bind}}}\n"
    for port, bind in BINDS.items()
)
CONFIG += f"""
- {{listen: '0.0.0.0:{USERS}', bind: {BOX_TO_SERVER}}}
users:
  alice: {{password: secret, bind: '{PREFIX6}', rotate: client}}
  bob: {{password: secret, bind: '{PREFIX}', rotate: user}}
  carol: {{password: secret}}
"""


class World(NamedTuple):
    """The hosts, and what listens on the server."""

    client: Namespace
    server: Namespace
    daemon: Netproxyd
    four: socket.socket
    six: socket.socket

    def connect(self, port: int, target: socket.socket, user: str = "") -> str:
        """Connect to a target through a port of the proxy; return the address it sees."""
        login: Login | None = (user, "secret") if user else None
        address = target.getsockname()[:2]
        sock, _ = socks5((BOX_SECOND, port), CONNECT, address, login, self.client.socket)
        with sock:
            accepted, peer = target.accept()
            accepted.close()
        return str(peer[0])

    def associate(self, port: int, user: str = "") -> Association:
        login = (user, "secret") if user else None
        return Association((BOX_SECOND, port), login, self.client.socket)


@pytest.fixture(scope="module", params=["netlink", "no-netlink"])
def world(shared_netproxyd: Start, request: pytest.FixtureRequest) -> Iterator[World]:
    with hosts("client", "box", "server") as (client, box, server):
        connect(client, [f"{CLIENT}/24"], box, [f"{BOX}/24", f"{BOX_SECOND}/24"])
        connect(
            box, [f"{BOX_TO_SERVER}/24", "fd79:3::1/64"], server, [f"{SERVER}/24", f"{SERVER6}/64"]
        )
        server.ip("route", "add", "default", "via", BOX_TO_SERVER)
        server.ip("-6", "route", "add", "default", "via", "fd79:3::1")
        for prefix in (PREFIX, PREFIX6):
            box.ip("route", "add", "local", prefix, "dev", "lo")
        filters = [box.enter]
        if request.param == "no-netlink":
            filters.append(without_netlink())
        with closing(listen(SERVER, server.socket)) as four:
            with closing(listen(SERVER6, server.socket)) as six:
                four.settimeout(SECONDS)
                six.settimeout(SECONDS)
                daemon = shared_netproxyd(
                    config=CONFIG,
                    host=BOX,
                    make=box.socket,
                    preexec_fn=lambda: [call() for call in filters],
                )
                yield World(client, server, daemon, four, six)
                daemon.finish()


def in_prefix(prefix: str, seen: set[str]) -> bool:
    network = ipaddress.ip_network(prefix)
    return all(ipaddress.ip_address(host) in network for host in seen)


def test_each_connection_from_a_64_has_another_address(world: World) -> None:
    seen = {world.connect(SIX, world.six) for _ in range(CONNECTIONS)}
    assert len(seen) == CONNECTIONS
    assert in_prefix(PREFIX6, seen) and "2001:db8:79::" not in seen


def test_connections_from_an_ipv4_prefix(world: World) -> None:
    seen = {world.connect(FOUR, world.four) for _ in range(CONNECTIONS)}
    # 300 random addresses of 254: 176 different ones on average, with a deviation of 6.
    assert len(seen) > 120
    assert in_prefix(PREFIX, seen) and not seen & {"198.18.79.0", "198.18.79.255"}


@pytest.mark.parametrize("port, prefix", [(SIX, PREFIX6), (FOUR, PREFIX)])
def test_targets_of_a_udp_session_see_one_address(world: World, port: int, prefix: str) -> None:
    host = SERVER6 if port == SIX else SERVER
    seen: set[str] = set()
    with UdpEcho(host, world.server.socket) as one, UdpEcho(host, world.server.socket) as two:
        for _ in range(20):
            with world.associate(port) as client:
                for target in (one, two, one):
                    client.echo(target.address, b"hello")
            assert one.sources[-2:] == [two.sources[-1]] * 2
            seen.add(one.sources[-1][0])
    assert len(seen) > 10 and in_prefix(prefix, seen)


def test_incoming_is_the_address_that_the_client_connected_to(world: World) -> None:
    assert world.connect(INCOMING, world.four) == BOX_SECOND
    with UdpEcho(SERVER, world.server.socket) as target, world.associate(INCOMING) as client:
        client.echo(target.address, b"hello")
        assert target.sources[0][0] == BOX_SECOND


def test_interface_decides_the_route(world: World) -> None:
    assert world.connect(TO_SERVER, world.four) == BOX_TO_SERVER
    assert world.connect(TO_SERVER, world.six) == "fd79:3::1"
    with pytest.raises(Refused):
        world.connect(TO_CLIENT, world.six)


def test_plain_address_that_the_machine_lacks_is_refused(world: World) -> None:
    with pytest.raises(Refused) as caught:
        world.connect(MISSING, world.four)
    assert caught.value.code == NETWORK_UNREACHABLE
    assert world.connect(ADDRESS, world.four) == BOX_TO_SERVER


def test_target_of_the_other_family_is_refused_and_the_record_names_the_key(world: World) -> None:
    with pytest.raises(Refused) as caught:
        world.connect(SIX, world.four)
    assert caught.value.code == NETWORK_UNREACHABLE
    assert world.daemon.said(f"decided=.*bind of listener 'sps-{SIX}': {PREFIX6}")


def test_users_have_addresses_of_their_own(world: World) -> None:
    alice = {world.connect(USERS, world.six, "alice") for _ in range(10)}
    bob = {world.connect(USERS, world.four, "bob") for _ in range(10)}
    assert len(alice) == len(bob) == 1
    assert in_prefix(PREFIX6, alice) and in_prefix(PREFIX, bob)
    assert world.connect(USERS, world.four, "carol") == BOX_TO_SERVER
    with UdpEcho(SERVER6, world.server.socket) as target, world.associate(USERS, "alice") as client:
        client.echo(target.address, b"hello")
        # TCP and UDP of a client leave from one address (RFC 4787 REQ-2).
        assert {target.sources[0][0]} == alice


@pytest.mark.parametrize("host", [BOX, BOX_TO_SERVER, "198.18.79.7"])
@pytest.mark.parametrize("port", [FOUR, INCOMING, ADDRESS])
def test_own_listeners_are_refused_from_every_bind(world: World, port: int, host: str) -> None:
    """Hazard 136."""
    with pytest.raises(Refused) as caught:
        sock, _ = socks5((BOX_SECOND, port), CONNECT, (host, FOUR), make=world.client.socket)
        sock.close()
    assert caught.value.code == RULE_NOT_ALLOWED
    world.daemon.counted(f"dial_failures{{{Reason.LOOP.value}}}", 1)
