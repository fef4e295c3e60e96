"""What one client endpoint has open: its way back, and a session for each way out.

A Session owns one upstream packet connection, reused for every target that is
reached by the same way out, and the thread that reads it and nothing else.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, Hashable

from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.datagrams import PacketConn, Run
from netproxy.interfaces.flows import Flow, Record, Traffic
from netproxy.interfaces.routing import Dialer
from netproxy.interfaces.services import Counter, Log
from netproxy.net.address import from_sockaddr
from netproxy.net.datagram import ArenaPool, Destination, PinnedHeader
from netproxy.relay.coalesce import Runs

INDEPENDENT, ADDRESS, ADDRESS_AND_PORT = (
    "endpoint-independent",
    "address-dependent",
    "address-and-port-dependent",
)
ANYBODY = ""
SOURCES_LIMIT = (
    4096  # headers of sources kept a session: anyone may send to its port, and memory is bounded
)


class Client:
    """One client endpoint on one listening socket.  Guarded by its NatTable's lock, but for what its sessions read."""

    __slots__ = (
        "peer",
        "address",
        "local",
        "reply_destination",
        "wrap",
        "owner",
        "sessions",
        "filtering",
        "drain",
        "waiting",
        "unrouted",
    )

    def __init__(
        self,
        peer: Hashable,
        address: Address,
        local: Any,
        wrap: Callable[[Address], bytes],
        owner: Hashable,
    ) -> None:
        """`wrap` gives the header before a reply from a source; `owner` is what it ends with (an association)."""
        self.peer = peer
        self.address = address
        self.local = local
        self.reply_destination: Destination = local.reply_destination(peer)
        self.wrap = wrap
        self.owner = owner
        self.sessions: dict[Hashable, Session] = {}  # by mapping
        self.drain: Callable[[Callable[[], Any]], None] | None = (
            None  # waits for what could not be sent at once, where it comes by a stream
        )
        self.waiting = 0  # datagrams of its entries that wait
        self.unrouted: set[Hashable] = set()  # keys of entries whose way out is not known yet
        self.filtering = ""  # who may answer it, "" where the listener's policy says so


class Session:
    """One client endpoint's datagrams by one way out."""

    __slots__ = (
        "client",
        "mapping",
        "flow",
        "dialer",
        "conn",
        "only_dns",
        "_counter",
        "_permitted",
        "_filtering",
        "entries",
        "active",
        "seen",
        "ended",
        "dialling",
        "retry_at",
        "_log",
        "started",
        "number",
        "_kill",
        "_headers",
        "sent",
        "received",
        "datagrams_sent",
        "datagrams_received",
    )

    def __init__(
        self,
        client: Client,
        mapping: Hashable,
        flow: Flow,
        dialer: Dialer,
        filtering: str,
        now: float,
        kill: Callable[[Session], None],
    ) -> None:
        """`mapping` is its key among the client's; `flow` that of its first datagram; `now` is monotonic.

        `filtering` is for its whole life: a reload must not mix two kinds of permission.
        """
        self.client = client
        self.mapping = mapping
        self.flow = flow
        self.dialer = dialer
        self.conn: PacketConn | None = None  # None while it is dialled
        self.entries: dict[
            Hashable, Any
        ] = {}  # the NatTable's entries that lead here by their keys, oldest first
        self.only_dns = True  # all its targets are name servers
        self._permitted: dict[
            Address | str, int
        ] = {}  # who may answer, and for how many entries, if filtered
        self._filtering = filtering
        self.active = True  # a datagram went out since the janitor last looked
        self.seen = now
        self.ended = ""
        self.dialling = False  # a worker is at it
        self.retry_at = 0.0  # after a failed dial, when the next may be tried (monotonic)
        self.started = now
        self.number = 0  # the observer's
        self._kill = kill
        self._headers: dict[Hashable, PinnedHeader] = {}
        self.sent = self.received = self.datagrams_sent = self.datagrams_received = 0

    def start(
        self,
        conn: PacketConn,
        arenas: ArenaPool,
        ended: Callable[[Session], None],
        counter: Counter,
        log: Log,
    ) -> None:
        """Gives the session its upstream and its reader; RuntimeError where no thread can be had.

        `ended` is called by the reader when the upstream is shut down or has ended by itself.
        """
        thread = threading.Thread(
            target=self._read,
            args=(conn, arenas, ended),
            daemon=True,
            name=f"udp-session {self.client.address}",
        )
        self.conn = conn
        self._counter = counter
        self._log = log
        try:
            thread.start()
        except RuntimeError:
            self.conn = None
            raise

    def permit(self, destination: Destination) -> None:
        """Something goes to `destination`: by the filtering (RFC 4787 section 5) it may answer from now on."""
        if self._filtering != INDEPENDENT:
            permitted = self._permission(destination)
            self._permitted[permitted] = self._permitted.get(permitted, 0) + 1

    def forbid(self, destination: Destination) -> None:
        """An entry that led to `destination` is gone."""
        permitted = self._permission(destination) if self._permitted else ""
        left = self._permitted.get(permitted, 0) - 1
        if left > 0:
            self._permitted[permitted] = left
        else:
            self._permitted.pop(permitted, None)
            if self._filtering != INDEPENDENT:
                self._headers.clear()  # of who might answer until now

    def _permission(self, destination: Destination) -> Address | str:
        target = from_sockaddr(destination.sockaddr)
        if pack_ip(target.host) is None:
            return ANYBODY  # only the proxy that resolves the name knows from where it will be answered
        return target.host if self._filtering == ADDRESS else target

    def count_sent(self, run: Run) -> None:
        count = len(run.offsets)
        self.active = True
        self.datagrams_sent += count
        self.sent += run.length * (count - 1) + run.last

    def record(self) -> Record:
        return Record(
            self.flow,
            self.dialer.name,
            self.sent,
            self.received,
            time.monotonic() - self.started,
            self.ended,
            self.datagrams_sent,
            self.datagrams_received,
            self.number,
        )

    def traffic(self) -> Traffic:
        return Traffic(self.sent, self.received, self.datagrams_sent, self.datagrams_received)

    def idle(self) -> float:
        """As the janitor knows it, to the second: of what its client sent."""
        return 0.0 if self.active else time.monotonic() - self.seen

    def kill(self) -> None:
        self._kill(self)

    def _read(self, conn: PacketConn, arenas: ArenaPool, ended: Callable[[Session], None]) -> None:
        drain = self.client.drain
        while conn.wait():
            arena = arenas.take()
            try:
                self._deliver(conn, arena)
            except Exception:  # a fault in one batch must not silence the session
                self._counter.count("drops", "internal error")
                self._log.exception("relaying answers to a client")
            finally:
                arenas.give(arena)
            if drain is not None:
                drain(
                    lambda: self.ended
                )  # the client's stream takes no more: without an arena that is no burden
        ended(self)
        conn.close()

    def _deliver(self, conn: PacketConn, arena: Any) -> None:
        """From the upstream to the client: each datagram behind the header that names its source."""
        spans = conn.receive(arena).spans
        headers = self._headers
        if len(spans) == 1:  # a lone datagram, or those of one source, take the shortest way
            offsets, length, last, peer = spans[0]
            header = headers.get(peer) or self._header(conn, peer, len(offsets))
            if header is not None:
                self._send_back(arena, header, Run(offsets, length, last))
            return
        runs = Runs(lambda header, run: self._send_back(arena, header, run))
        for offsets, length, last, peer in spans:
            header = headers.get(peer) or self._header(conn, peer, len(offsets))
            if header is not None:
                runs.add(header, offsets, length, last)
        runs.flush()

    def _send_back(self, arena: Any, header: PinnedHeader, run: Run) -> None:
        client, count = self.client, len(run.offsets)
        run.header = header if header.data else None
        client.local.send(arena, run, client.reply_destination)
        self.received += run.length * (count - 1) + run.last
        self.datagrams_received += count

    def _header(self, conn: PacketConn, peer: Hashable, count: int) -> PinnedHeader | None:
        """The header for a source not seen before; None where it may not answer (yet), and then `count` are counted."""
        source = conn.source(peer)
        permitted = self._permitted
        if self._filtering != INDEPENDENT and not (
            source in permitted or source.host in permitted or ANYBODY in permitted
        ):
            self._counter.count("drops", "filtered", count)
            return None
        if len(self._headers) >= SOURCES_LIMIT:
            self._headers.clear()
        header = self._headers[peer] = PinnedHeader(self.client.wrap(source))
        return header
