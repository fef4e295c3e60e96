"""A scripted STUN server with two addresses, on sockets of loopback or behind a simulated NAT.

The simulated NAT is a transport of admin.nat.exchange whose clock stands still except while
somebody waits: silence costs no time.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import threading
from typing import Callable, Iterator, NamedTuple, Sequence

from netproxy.admin.nat.report import (
    ADDRESS_AND_PORT_DEPENDENT,
    ADDRESS_DEPENDENT,
    ENDPOINT_INDEPENDENT,
)
from netproxy.admin.nat.exchange import Arrival, SendError
from netproxy.interfaces.addresses import Address
from netproxy.net.address import from_sockaddr, to_sockaddr
from netproxy.protocol import stun
from netproxy.protocol.stun import BindingError, BindingSuccess

FIRST, SECOND = Address("192.0.2.10", 3478), Address("192.0.2.11", 3479)
LONE = Address("198.51.100.1", 3478)
INSIDE, OUTSIDE = "10.0.0.2", "203.0.113.5"


class Script(NamedTuple):
    """How a server answers."""

    second: bool = True
    """True if it tells its other address, and answers from there."""
    changes: bool = True
    """False if it answers from where it was asked, whatever the request says."""
    mute: frozenset[str] = frozenset()
    """Hosts of the server that do not answer."""
    origin: bool = True
    error: int = 0
    """The code of its answer, 0 for success."""
    lost: int = 0
    """Requests that are lost before the first that is answered, for each transaction."""
    redirects: bool = True
    """False if it answers to the source of a request, whatever RESPONSE-PORT says."""


class Server:
    """Both addresses and both ports of a server of RFC 5780."""

    def __init__(
        self, first: Address = FIRST, second: Address = SECOND, script: Script | None = None
    ) -> None:
        self.first, self.second = first, second
        self.script = script or Script()
        self.requests: list[tuple[Address, stun.BindingRequest]] = []
        """Where each request has come to."""
        self._seen: dict[bytes, int] = {}

    @property
    def addresses(self) -> list[Address]:
        first, second = self.first, self.second
        alone = [first]
        both = [second._replace(port=first.port), first._replace(port=second.port), second]
        return alone + both if self.script.second else alone

    def answer(self, at: Address, client: Address, data: bytes) -> tuple[Address, bytes] | None:
        """Return where the answer is sent from, and the answer; None for none."""
        request, script = stun.parse_request(data), self.script
        self.requests.append((at, request))
        seen = self._seen[request.transaction] = self._seen.get(request.transaction, 0) + 1
        if at.host in script.mute or seen <= script.lost:
            return None
        other = self._other(at)
        if script.error:
            phrase = stun.PHRASES.get(script.error, "")
            return at, stun.encode_response(BindingError(request.transaction, script.error, phrase))
        source = at
        if script.changes:
            host = other.host if request.change_ip else at.host
            source = Address(host, other.port if request.change_port else at.port)
        response = BindingSuccess(
            request.transaction,
            client,
            origin=source if script.origin else None,
            other=other if script.second else None,
            software="scripted",
        )
        return source, stun.encode_response(response)

    def _other(self, at: Address) -> Address:
        first, second = self.first, self.second
        return Address(
            second.host if at.host == first.host else first.host,
            second.port if at.port == first.port else first.port,
        )


class Nat(NamedTuple):
    """What a simulated NAT does."""

    mapping: str = ENDPOINT_INDEPENDENT
    filtering: str = ADDRESS_AND_PORT_DEPENDENT
    hairpin: bool = False
    preserves: bool = False
    inside: str = INSIDE
    outside: str = OUTSIDE
    symmetric: bool = False
    """True for a proxy that has a connection for each target."""
    lifetime: float = math.inf
    """Seconds that an idle mapping is kept."""


NO_NAT = Nat(filtering=ENDPOINT_INDEPENDENT, preserves=True, inside=OUTSIDE)


class SimulatedNat:
    """Two local ports behind a NAT, and servers outside (exchange.Transport)."""

    def __init__(self, nat: Nat, servers: Sequence[Server], knows_local: bool = True) -> None:
        self._nat, self._servers = nat, servers
        self._knows_local = knows_local
        self.per_target = nat.symmetric
        self.now = 100.0
        self.sent: list[tuple[int, Address]] = []
        self.errors: dict[str, str] = {}
        """Errors by the host that cannot be sent to."""
        self.reports: dict[Address, str] = {}
        """Errors that the network reports of an address."""
        self._mappings: dict[tuple[int, object], Address] = {}
        self._asked: dict[Address, set[Address]] = {}
        self._used: dict[Address, float] = {}
        self.arrived: list[Arrival] = []

    def clock(self) -> float:
        return self.now

    def local(self, target: Address) -> Sequence[Address | None]:
        ports = range(2)
        locals_ = [Address(self._nat.inside, 5000 + 7 * port) for port in ports]
        return locals_ if self._knows_local else [None for _ in ports]

    def send(self, port: int, target: Address, data: bytes) -> None:
        self.sent.append((port, target))
        if target.host in self.errors:
            raise SendError(self.errors[target.host])
        if target in self.reports:
            self.arrived.append(Arrival(port, target, b"", self.reports[target]))
            return
        external = self._external(port, target)
        self._asked[external].add(target)
        self._used[external] = self.now
        for server in self._servers:
            if target in server.addresses and (answer := server.answer(target, external, data)):
                response_port = stun.parse_request(data).response_port
                if response_port and server.script.redirects:
                    self._deliver(external._replace(port=response_port), *answer)
                else:
                    self._deliver(external, *answer)
        if target in self._asked and self._nat.hairpin:
            self._deliver(target, external, data)

    def receive(self, seconds: float) -> Arrival | None:
        if self.arrived:
            return self.arrived.pop(0)
        self.now += seconds
        return None

    def _external(self, port: int, target: Address) -> Address:
        keys: dict[str, object] = {
            ENDPOINT_INDEPENDENT: "",
            ADDRESS_DEPENDENT: target.host,
            ADDRESS_AND_PORT_DEPENDENT: target,
        }
        key = port, keys[self._nat.mapping]
        if key not in self._mappings:
            number = 5000 + 7 * port if self._nat.preserves else 40000 + len(self._mappings)
            external = Address(self._nat.outside, number)
            self._mappings[key] = external
            self._asked[external] = set()
        return self._mappings[key]

    def _deliver(self, external: Address, source: Address, data: bytes) -> None:
        """Lead a datagram inside, if it may pass."""
        asked = self._asked.get(external, set())
        if self.now - self._used.get(external, -math.inf) > self._nat.lifetime:
            return
        may_pass = {
            ENDPOINT_INDEPENDENT: True,
            ADDRESS_DEPENDENT: source.host in {address.host for address in asked},
            ADDRESS_AND_PORT_DEPENDENT: source in asked,
        }
        if may_pass[self._nat.filtering]:
            port = next(key[0] for key, found in self._mappings.items() if found == external)
            self.arrived.append(Arrival(port, source, data))


@contextlib.contextmanager
def stun_server(
    hosts: Sequence[str] = ("127.0.0.1", "127.0.0.2"), script: Script | None = None
) -> Iterator[Server]:
    """Run a server on loopback, with one address or two; ports come from the kernel."""
    with contextlib.ExitStack() as stack:
        sockets: dict[int, tuple[Address, socket.socket]] = {}

        def bind(host: str, port: int = 0) -> Address:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            sock.bind((host, port))
            address = from_sockaddr(sock.getsockname())
            sockets[sock.fileno()] = address, sock
            return address

        first, second = _bind_all(bind, hosts, sockets)
        server = Server(first, second, script)
        waker, woken = socket.socketpair()
        stack.callback(waker.close)
        stack.callback(woken.close)
        thread = threading.Thread(
            target=_serve, args=(server, sockets, woken), name="test-stun", daemon=True
        )
        thread.start()
        stack.callback(thread.join, 5)
        stack.callback(waker.send, b"x")
        yield server


def _bind_all(
    bind: Callable[..., Address],
    hosts: Sequence[str],
    sockets: dict[int, tuple[Address, socket.socket]],
) -> tuple[Address, Address]:
    """Return two addresses, of which both ports are free on both hosts, and bound."""
    for _ in range(20):
        sockets.clear()
        with contextlib.suppress(OSError):
            first, other = bind(hosts[0]), bind(hosts[0])
            for host in hosts[1:]:
                bind(host, first.port)
                other = bind(host, other.port)
            return first, other
    raise AssertionError("no ports are free on all addresses")


def _serve(
    server: Server, sockets: dict[int, tuple[Address, socket.socket]], woken: socket.socket
) -> None:
    by_address = {address: sock for address, sock in sockets.values()}
    poll = select.poll()
    for number in (*sockets, woken.fileno()):
        poll.register(number, select.POLLIN)
    while True:
        for number, _ in poll.poll():
            if number == woken.fileno():
                return
            at, sock = sockets[number]
            data, sender = sock.recvfrom(2048)
            client = from_sockaddr(sender)
            if stun.is_message(data) and (answer := server.answer(at, client, data)):
                source, response = answer
                by_address[source].sendto(response, to_sockaddr(client, sock.family))
