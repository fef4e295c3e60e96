"""Probes of NAT behaviour discovery through an upstream: two packet connections of its dialer.

A dialer whose connections have one target each, such as connect-udp, gets a connection for
every target of a port.  Each connection has a thread that receives.  All is closed in the end.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time

from netproxy.admin.nat.discovery import PORTS
from netproxy.admin.nat.exchange import Arrival, SendError, parse_servers, probe_nat
from netproxy.dialer.group import MEMBER_TRIES
from netproxy.errors import DialError, NetProxyError
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address
from netproxy.interfaces.flows import Flow
from netproxy.typed import TYPE_CHECKING, Mapping, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.answers import JsonObject
    from netproxy.interfaces.datagrams import Destination, PacketConn
    from netproxy.interfaces.routing import Dialer
    from netproxy.net.datagram import ArenaPool

SECONDS = 45.0
"""For connections and name lookups of one discovery: netproxyctl does not wait much longer."""
WAITING_LIMIT = 256
"""Datagrams that wait to be looked at; more are dropped: they are not answers."""
STOP_SECONDS = 2.0
"""For the threads to end."""
_LONGEST = 2048
"""Bytes of a datagram that are looked at: an answer has some hundred."""


class UpstreamTransport:
    """Two local ports of an upstream (exchange.Transport).

    Thread: one, besides those that receive.
    """

    def __init__(self, dialer: Dialer, arenas: ArenaPool) -> None:
        """Use `dialer`, of whose groups the same members carry everything."""
        self._given = dialer
        self._dialer = dialer.fixed_for(_flow(UNSPECIFIED_ADDRESS))
        self._arenas = arenas
        self._deadline = time.monotonic() + SECONDS
        # By the local port, and by the target if a connection has one alone.
        self._connections: dict[tuple[int, Address | None], _Connection] = {}
        self._arrived: queue.Queue[Arrival] = queue.Queue(WAITING_LIMIT)

    @property
    def per_target(self) -> bool:
        """True if each target has a connection of its own."""
        own = any(target is not None for _, target in self._connections)
        return own or self._dialer.symmetric

    def local(self, target: Address) -> Sequence[Address | None]:
        """Return None for each port: only the upstream knows."""
        return [None for _ in PORTS]

    def send(self, port: int, target: Address, data: bytes) -> None:
        """Send a datagram.  Blocks for a connection or a lookup.  Raises DialError or SendError."""
        connection = self._connections.get((port, target))
        shared = self._connections.get((port, None))
        if connection is None and shared is not None and shared.reaches(target):
            connection = shared
        if connection is None:
            conn = self._dial(target)
            connection = _Connection(port, conn, self._arenas, self._arrived)
            # Of a connection for all targets the proxy may tell that only now.
            is_shared = shared is None and connection.reaches(UNSPECIFIED_ADDRESS)
            self._connections[port, None if is_shared else target] = connection
            connection.start()
        self._check_time()
        connection.send(target, data)

    def receive(self, seconds: float) -> Arrival | None:
        """Wait for at most `seconds`; return what has come, None if nothing has."""
        try:
            return self._arrived.get(timeout=seconds)
        except queue.Empty:
            return None

    def close(self) -> None:
        """End all connections."""
        for connection in self._connections.values():
            connection.shutdown()
        for connection in self._connections.values():
            connection.join()

    def _dial(self, target: Address) -> PacketConn:
        """Open a connection; the first one may choose other members of groups."""
        for tries in itertools.count(1):
            self._check_time()
            try:
                return self._dialer.dial_packet(_flow(target))
            except DialError:
                # A member that has failed backs off, so that the groups choose another one.
                chosen = self._given.fixed_for(_flow(target))
                if self._connections or chosen is self._dialer or tries == MEMBER_TRIES:
                    raise
                self._dialer = chosen
        raise AssertionError

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise SendError("the upstream takes too long")


class _Connection:
    """A packet connection, and the thread that receives from it and closes it."""

    def __init__(
        self, port: int, conn: PacketConn, arenas: ArenaPool, arrived: queue.Queue[Arrival]
    ) -> None:
        self._port, self._conn = port, conn
        self._arenas, self._arrived = arenas, arrived
        self._destinations: dict[Address, Destination] = {}
        self._thread = threading.Thread(target=self._read, name=f"nat-probe-{port}", daemon=True)
        self._ended = False

    def reaches(self, target: Address) -> bool:
        """Return whether the connection is for a target."""
        return self._conn.reaches(target)

    def start(self) -> None:
        """Receive from now on.  Raises SendError if no thread can be had."""
        try:
            self._thread.start()
        except RuntimeError as error:
            # "can't start new thread"
            self._conn.close()
            raise SendError(str(error)) from error

    def send(self, target: Address, data: bytes) -> None:
        """Send a datagram.  May block for a lookup.  Raises DialError or SendError."""
        if target not in self._destinations:
            self._destinations[target] = self._conn.prepare(_flow(target))
        if self._ended:
            raise SendError("the upstream has closed its connection")
        arena = self._arenas.take()
        try:
            self._conn.send(arena, arena.put(data), self._destinations[target])
        finally:
            self._arenas.give(arena)

    def shutdown(self) -> None:
        """Wake the thread, which closes the connection."""
        if self._thread.ident is not None:
            self._conn.shutdown()

    def join(self) -> None:
        """Wait for the end of the thread."""
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)

    def _read(self) -> None:
        try:
            while self._conn.wait():
                self._take()
        finally:
            self._ended = True
            self._conn.close()

    def _take(self) -> None:
        arena = self._arenas.take()
        try:
            for offsets, length, last, peer in self._conn.receive(arena).spans:
                source = self._conn.source(peer)
                for offset in offsets:
                    size = last if offset == offsets[-1] else length
                    data = bytes(arena.view[offset : offset + min(size, _LONGEST)])
                    with contextlib.suppress(queue.Full):
                        self._arrived.put_nowait(Arrival(self._port, source, data))
        finally:
            self._arenas.give(arena)


class UpstreamError(NetProxyError):
    """There is no such upstream, or it carries no UDP."""


def probe_upstream(
    name: str, dialers: Mapping[str, Dialer], arenas: ArenaPool, servers: object
) -> JsonObject:
    """Ask STUN servers, a list of texts, through one of some upstreams; return the Report.

    Blocks for up to a minute.  Raises UpstreamError or ServerError.
    """
    addresses = parse_servers(servers)
    dialer = dialers.get(name)
    if dialer is None:
        raise UpstreamError(f"there is no upstream '{name}' (known: {', '.join(dialers)})")
    if "udp" not in dialer.carries:
        raise UpstreamError(f"upstream '{name}' carries no UDP: {dialer.refusal.value}")
    with contextlib.closing(UpstreamTransport(dialer, arenas)) as transport:
        return probe_nat(addresses, transport).as_json()


def _flow(target: Address) -> Flow:
    """Return NetProxy's own flow to a target."""
    return Flow("udp", UNSPECIFIED_ADDRESS, target, "", "")
