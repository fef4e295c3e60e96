"""The blocking work for entries of the NAT table: route lookups, dials, preparing, flushing.

Two pools of workers do it, so that the reader thread of a listener never blocks.  Nothing
here changes a state: each result is an event that NatTable applies under its lock, and its
answer says what is left to do.
"""

from __future__ import annotations

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import pack_ip
from netproxy.relay.entry import Action
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.datagrams import Destination
    from netproxy.interfaces.routing import Route, Router
    from netproxy.relay.entry import Entry, NatMapping
    from netproxy.relay.nat import NatTable
    from netproxy.relay.table.policy import NatDependencies

QUEUE_FULL = "lookup queue full"
"""The reason of datagrams that are dropped because too many lookups wait."""


class PendingDials:
    """Does the work of one NatTable."""

    def __init__(self, table: NatTable, dependencies: NatDependencies) -> None:
        self._table = table
        self._dependencies = dependencies
        self._log = dependencies.log

    # -- any thread; these do not block

    def look_up(self, entry: Entry, router: Router) -> None:
        """Have a worker route an entry; event "failed" of the entry if too many lookups wait."""
        self._dependencies.names(_RouteTask(self, entry, router))

    def perform(self, entry: Entry, action: Action) -> None:
        """Do what is left to do for an entry, or have a worker do it."""
        if action is Action.PREPARE:
            self._prepare_soon(entry)
        elif action is Action.DIAL:
            self._dependencies.dials(_DialTask(self, entry.mapping))

    def check_carries_udp(self, route: Route) -> None:
        """Raise DialError if the upstream of a route carries no datagrams.

        The error names the hop that is in the way, or the rule that refuses the target.
        """
        dialer = route.dialer
        if "udp" in dialer.carries:
            return
        try:
            # Does not dial: it raises the error that names the hop.
            dialer.dial_packet(route.flow)
        except DialError as error:
            decided = error.decided_by(route.rule) or f"udp by {dialer.name}: {error}"
            raise DialError(error.reason, error.detail, decided=decided) from error

    # -- a thread that may block

    def open_now(self, entry: Entry, action: Action) -> None:
        """Dial and prepare an entry on the calling thread.  Raises DialError."""
        mapping = entry.mapping
        if action is Action.DIAL:
            for other in self.open_mapping(mapping):
                if other is not entry:
                    self._prepare_soon(other)
        try:
            if action is Action.NONE:
                said = f"{mapping.session.dialer.name} is being dialled"
                raise DialError(Reason.GENERAL, said=said)
            destination = mapping.session.conn.prepare(entry.flow)
        except DialError as error:
            self._table.prepare_failed(entry, error.why)
            raise
        self._flush(entry, destination)

    def open_mapping(self, mapping: NatMapping) -> Sequence[Entry]:
        """Dial on the calling thread; return the entries to prepare.  Raises DialError."""
        try:
            return self._open(mapping)
        except DialError as error:
            self._table.dial_failed(mapping, error.why)
            raise

    # -- workers

    def route(self, entry: Entry, router: Router) -> None:
        """Route an entry and do what is left to do then."""
        try:
            route = router.route(entry.flow)
            self.check_carries_udp(route)
        except DialError as error:
            decided = error.decided or str(error)
            self._table.routing_failed(entry, error.why, decided)
            return
        except Exception:
            self._table.routing_failed(entry, "internal error")
            raise
        self.perform(entry, self._table.routed(entry, route))

    def dial(self, mapping: NatMapping) -> None:
        """Dial the upstream of a mapping, and do what is left to do for its entries."""
        try:
            entries = self._open(mapping)
        except DialError as error:
            self._log_failure(mapping.session.dialer.name, error)
            self._table.dial_failed(mapping, error.why, str(error))
            return
        except Exception:
            self._table.dial_failed(mapping, "internal error")
            raise
        for entry in entries:
            self._prepare_soon(entry)

    def _open(self, mapping: NatMapping) -> Sequence[Entry]:
        """Dial and start the session; return the entries to prepare."""
        session = mapping.session
        conn = session.dialer.dial_packet(session.flow)
        try:
            session.start(conn, self._dependencies)
        except RuntimeError as error:
            # No thread to be had.
            conn.close()
            raise DialError(Reason.GENERAL, said=str(error)) from error
        return self._table.dialled(mapping)

    def _prepare_soon(self, entry: Entry) -> None:
        """Prepare an address at once, a name on a worker.

        One slow lookup must not delay the other targets of a session.
        """
        if entry.flow.addresses or pack_ip(entry.flow.target.host) is not None:
            self.prepare(entry)
        else:
            self._dependencies.names(_PrepareTask(self, entry))

    def prepare(self, entry: Entry) -> None:
        """Prepare the destination of an entry and send what waits for it."""
        try:
            destination = entry.session.conn.prepare(entry.flow)
        except DialError as error:
            decided = error.decided or str(error)
            self._table.prepare_failed(entry, error.why, decided)
        except Exception:
            self._table.prepare_failed(entry, "internal error")
            raise
        else:
            self._flush(entry, destination)

    def _flush(self, entry: Entry, destination: Destination) -> None:
        """Send what has waited.  The reader thread sends itself once nothing waits."""
        if not self._table.prepared(entry, destination):
            return
        session, arenas = entry.session, self._dependencies.arenas
        arena = arenas.take()
        try:
            while waiting := self._table.take_waiting(entry):
                for data in waiting:
                    session.send(arena, arena.put(data), destination)
        finally:
            arenas.give(arena)

    def _log_failure(self, upstream: str, error: DialError) -> None:
        self._log.limited(("dial", upstream), "udp by %s: %s", upstream, error)

    def drop_dial(self, mapping: NatMapping) -> None:
        """Give up the dial of a mapping.  Does not block."""
        self._table.dial_failed(mapping, "dial queue full")

    def drop_route(self, entry: Entry) -> None:
        """Give up an entry that was to be routed.  Does not block."""
        self._table.routing_failed(entry, QUEUE_FULL)

    def drop_prepare(self, entry: Entry) -> None:
        """Give up an entry that was to be prepared.  Does not block."""
        self._table.prepare_failed(entry, QUEUE_FULL)


class _DialTask:
    """The dial of a mapping's upstream (interfaces.fairness.ClientTask)."""

    __slots__ = ("client", "_dials", "_mapping")

    def __init__(self, dials: PendingDials, mapping: NatMapping) -> None:
        self.client = mapping.client.address.host
        self._dials = dials
        self._mapping = mapping

    def run(self) -> None:
        """Dial; blocks."""
        self._dials.dial(self._mapping)

    def drop(self) -> None:
        """Give the dial up."""
        self._dials.drop_dial(self._mapping)


class _RouteTask:
    """The route of an entry whose target is a name (interfaces.fairness.ClientTask)."""

    __slots__ = ("client", "_dials", "_entry", "_router")

    def __init__(self, dials: PendingDials, entry: Entry, router: Router) -> None:
        self.client = entry.client.address.host
        self._dials = dials
        self._entry = entry
        self._router = router

    def run(self) -> None:
        """Route the entry; blocks."""
        self._dials.route(self._entry, self._router)

    def drop(self) -> None:
        """Give the entry up."""
        self._dials.drop_route(self._entry)


class _PrepareTask:
    """The destination of an entry whose target is a name (interfaces.fairness.ClientTask)."""

    __slots__ = ("client", "_dials", "_entry")

    def __init__(self, dials: PendingDials, entry: Entry) -> None:
        self.client = entry.client.address.host
        self._dials = dials
        self._entry = entry

    def run(self) -> None:
        """Prepare the destination; blocks."""
        self._dials.prepare(self._entry)

    def drop(self) -> None:
        """Give the entry up."""
        self._dials.drop_prepare(self._entry)
