"""A UDP session: the traffic of one mapping, and the thread that reads its upstream.

The reader thread of the listener sends (send), or a worker that flushes a queue.  The
session's own thread receives replies and sends them to the client, each behind the header
that names its source (reply_sources.py).  When the session begins and ends is NatTable's affair.
"""

from __future__ import annotations

import threading
import time
from functools import partial

from netproxy.interfaces.datagrams import Run
from netproxy.interfaces.flows import Record, Traffic
from netproxy.interfaces.listeners import decided_by
from netproxy.interfaces.routing import Route
from netproxy.net.datagram import PinnedHeader
from netproxy.relay.coalesce import Runs, datagrams_within
from netproxy.relay.connection import tell_route
from netproxy.relay.table.reply_sources import ReplySources
from netproxy.typed import TYPE_CHECKING, Callable, Hashable, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.accounts import Account, Pace
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import Arena, Batch, Destination, PacketConn
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.services import Trace
    from netproxy.interfaces.routing import Dialer
    from netproxy.relay.client import Client
    from netproxy.relay.entry import Entry
    from netproxy.relay.table.policy import NatDependencies

RATE = "rate limit"
"""The reason of datagrams that a limit of bytes per second does not let through."""
SOURCES_LIMIT = 4096
"""Headers kept for one session.  Anyone may send to its port, and memory is bounded."""


class SessionTable(Protocol):
    """What a session tells of its end."""

    def end_session(self, session: Session, reason: str) -> None:
        """End a session that is still in the table.  Thread: any."""


class Session:
    """The datagrams of one client endpoint through one upstream.  A LiveFlow."""

    __slots__ = (
        *("client", "flow", "dialer", "rule", "trace", "conn", "active", "seen", "ended"),
        *("started", "number", "sent", "received", "datagrams_sent", "datagrams_received"),
        *("account", "sources", "_up", "_down", "_table", "_headers"),
        *("_reader", "_dependencies", "_send", "_delivering"),
    )

    def __init__(
        self,
        client: Client,
        flow: Flow,
        dialer: Dialer,
        filtering: str,
        now: float,
        table: SessionTable,
        account: Account,
    ) -> None:
        """Make a session that is not started.

        `flow` is that of its first datagram; the table closes its `account`.  `now` is monotonic.
        """
        self.client = client
        self.flow = flow
        self.dialer = dialer
        self.rule = ""  # Route.rule
        self.trace: Trace | None = None
        """Writes the steps of the session to the log; None unless its level is debug."""
        self.conn: PacketConn
        """Set by start(); used only while the mapping is OPEN."""
        self.active = True
        """True if a datagram was sent since the janitor last looked."""
        self.seen = now
        """Monotonic time at which the janitor last found it active."""
        self.ended = ""  # why it was removed from the table
        self.started, self.number = now, 0
        self.sent = self.received = self.datagrams_sent = self.datagrams_received = 0
        self._table, self.account = table, account
        self._up, self._down = account.up, account.down
        account.attach(self)
        self.sources = ReplySources(filtering)
        self._headers: dict[Hashable, PinnedHeader] = {}
        # Held by the thread that sends to the client: another one may deliver as well.
        self._delivering = threading.Lock()
        self._reader: threading.Thread | None = None
        self._dependencies: NatDependencies
        self._send: Callable[[Arena, Run, Destination], None]

    def start(self, conn: PacketConn, dependencies: NatDependencies) -> None:
        """Start the thread that reads `conn` and closes it in the end.  Raises RuntimeError."""
        self.conn, self._send = conn, conn.send
        self._dependencies = dependencies
        self._reader = threading.Thread(
            target=self._read, daemon=True, name=f"udp-session {self.client.address}"
        )
        if self.trace is not None:
            self.trace.step("connected", network="udp", member=conn.member)
        if conn.deliverer is not None:
            conn.deliverer.sink = self._deliver_beside
        try:
            self._reader.start()
        except RuntimeError:
            self._reader = None
            raise

    def tell_begin(self) -> None:
        """Write the step "routed" of the session's first datagram."""
        if self.trace is not None:
            route = Route(self.dialer, self.flow, self.rule)
            tell_route(self.trace, route, network="udp")

    def send(self, arena: Arena, run: Run, destination: Destination) -> None:
        """Send a run to its target.  Counts it first, before a reply can come."""
        self.active = True
        count, size = len(run.offsets), run.last
        if count > 1:
            size += run.length * (count - 1)
        if self.sent + size > self._up.mark:
            run, size = self._within(self._up, self.sent, run)
            if not (count := len(run.offsets)):
                return
        self.datagrams_sent += count
        self.sent += size
        self._send(arena, run, destination)

    def shutdown(self) -> None:
        """Wake the session's thread, which closes the upstream.  Thread: any."""
        if self._reader is not None:
            self.conn.shutdown()

    # -- who may reply; NatTable holds its lock

    def permit(self, entry: Entry, destination: Destination) -> None:
        """Let the target of an entry reply from now on."""
        if self.sources.permit(entry, destination):
            self._headers = {}

    def forbid(self, destination: Destination) -> None:
        """Take back what permit() has given for an entry."""
        if self.sources.forbid(destination):
            self._headers = {}

    # -- a LiveFlow

    def record(self) -> Record:
        """Write the step "ended"; return the record for the access log."""
        if self.trace is not None:
            self.trace.step("ended", network="udp", ended=self.ended)
        seconds, moved = time.monotonic() - self.started, (self.sent, self.received)
        datagrams = self.datagrams_sent, self.datagrams_received
        member = self.conn.member if self._reader is not None else ""
        record = Record(self.flow, self.dialer.name, *moved, seconds, self.ended, *datagrams)
        decided = decided_by(self.ended, self.flow.user)
        return record._replace(number=self.number, rule=self.rule, member=member, decided=decided)

    def traffic(self) -> Traffic:
        """Return what the session has carried so far.  Thread: any."""
        return Traffic(self.sent, self.received, self.datagrams_sent, self.datagrams_received)

    def idle(self) -> float:
        """Return the seconds since the client last sent, as exact as the janitor's second."""
        return 0.0 if self.active else time.monotonic() - self.seen

    def kill(self, ended: str = "killed") -> None:
        """End the session.  Thread: any."""
        self._table.end_session(self, ended)

    def has_ended(self) -> bool:
        """Return whether the session is out of the table."""
        return bool(self.ended)

    # -- the session's thread

    def _read(self) -> None:
        arenas, draining = self._dependencies.arenas, self.client.draining
        while self.conn.wait():
            arena = arenas.take()
            try:
                with self._delivering:
                    self._deliver(self.conn.receive(arena))
            except Exception:
                # A fault in one batch must not silence the session.
                self._dependencies.counter.count("drops", "internal error")
                self._dependencies.log.exception("relaying replies to a client")
            finally:
                arenas.give(arena)
            if draining is not None:
                # The client's stream may take no more.  No arena is held while it is full.
                draining.drain(self.has_ended)
        self._table.end_session(self, "upstream closed")
        self.conn.close()

    def _deliver_beside(self, batch: Batch) -> None:
        """Send to the client what has come on another thread than the session's."""
        with self._delivering:
            self._deliver(batch)
        deliverer, draining = self.conn.deliverer, self.client.draining
        if draining is not None and draining.waits and deliverer is not None:
            # Only the session's thread may wait until the client's stream takes more.
            deliverer.nudge()

    def _deliver(self, batch: Batch) -> None:
        """Send what has arrived to the client, each datagram behind its source's header."""
        arena, spans = batch.arena, batch.spans
        headers = self._headers
        if len(spans) == 1:
            # A lone datagram, or a train, needs no coalescing.
            offsets, length, last, peer = spans[0]
            header = headers.get(peer) or self._header(peer, len(offsets))
            if header is not None:
                self._send_back(arena, header, Run(offsets, length, last))
            return
        runs = Runs(partial(self._send_back, arena))
        for offsets, length, last, peer in spans:
            header = headers.get(peer) or self._header(peer, len(offsets))
            if header is not None:
                runs.add(header, offsets, length, last)
        runs.flush()

    def _send_back(self, arena: Arena, header: PinnedHeader, run: Run) -> None:
        client, count, size = self.client, len(run.offsets), run.last
        if count > 1:
            size += run.length * (count - 1)
        if self.received + size > self._down.mark:
            run, size = self._within(self._down, self.received, run)
            if not (count := len(run.offsets)):
                return
        run.header = header if header.data else None
        client.local.send(arena, run, client.reply_destination)
        self.received += size
        self.datagrams_received += count

    def _within(self, pace: Pace, moved: int, run: Run) -> tuple[Run, int]:
        """Return the part of a run that a direction may carry, and its bytes.

        `moved`: what the direction has carried so far.  The rest is counted as dropped.
        """
        allowed = datagrams_within(pace, moved, run)
        dropped = len(run.offsets) - allowed
        if dropped:
            counter, flow = self._dependencies.counter, self.flow
            if not counter.refuse_unrecorded("drops", RATE, flow.client.host, dropped):
                counter.refuse(flow.refusal("drops", RATE, pace.decided()), dropped)
            run = Run(run.offsets[:allowed], run.length, run.length)
        return run, run.length * (allowed - 1) + run.last if allowed else 0

    def _header(self, peer: Hashable, count: int) -> PinnedHeader | None:
        """Return the header for a source that has none yet.

        Returns None if it may not reply, and counts its `count` datagrams.
        """
        # Whatever replaces the headers meanwhile may have changed what this one says.
        headers, source = self._headers, self.conn.source(peer)
        if not self.sources.may_reply(source):
            self._drop_filtered(source, count)
            return None
        if self.trace is not None and not self._headers and not self.datagrams_received:
            self.trace.step("first reply", network="udp", source=source)
        if len(headers) >= SOURCES_LIMIT:
            headers.clear()
        header = headers[peer] = PinnedHeader(self.client.wrap(self.sources.known_as(source)))
        return header

    def _drop_filtered(self, source: Address, count: int) -> None:
        counter, flow = self._dependencies.counter, self.flow
        if not counter.refuse_unrecorded("drops", "filtered", flow.client.host, count):
            refusal = flow.refusal("drops", "filtered", f"udp.filtering {self.sources.filtering}")
            counter.refuse(refusal._replace(asked=f"reply from {source}"), count)
