"""The NAT table of the UDP relay: (client endpoint, target) -> the session whose upstream is reused.

A hit is one dictionary lookup by the listener's reader thread, without a lock.
A miss asks the router and makes an entry; what must be looked up or dialled for
it is done by a worker while its datagrams wait in a bounded queue, so that the
reader never blocks.  The janitor's thread evicts: first out of the table, then closed.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, Hashable, NamedTuple, Sequence

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Run
from netproxy.interfaces.flows import Flow, Observer
from netproxy.interfaces.routing import Route, Router
from netproxy.interfaces.services import Counter, Log
from netproxy.net.datagram import ArenaPool
from netproxy.relay.quota import SessionQuota, SessionLimits
from netproxy.relay.entry import Entry, Key, Opening, Workers
from netproxy.relay.session import INDEPENDENT, Client, Session

ENTRIES_LIMIT = (
    4096  # entries a session: targets of one client; the oldest yields and may come back
)
UNROUTED_LIMIT = 256  # entries a client whose names are looked up before their way out is known
ONE_WAY_SECONDS = 60.0  # idle time of a session that nobody has answered
DNS_PORT = 53
DNS_SECONDS = (
    10.0  # idle time of a session that only spoke to name servers and still waits for an answer
)


class NatPolicy(NamedTuple):
    """How a table behaves as a NAT, in the words of RFC 4787."""

    caps: SessionLimits
    idle_timeout: float = 300.0  # seconds, for sessions that have seen both directions (REQ-5)
    symmetric: bool = False  # one mapping for each target; else endpoint-independent (REQ-1)
    filtering: str = INDEPENDENT  # whose answers pass (REQ-8)


class NatTable:
    """One for each UDP listener."""

    def __init__(
        self,
        policy: NatPolicy,
        arenas: ArenaPool,
        workers: Workers,
        counter: Counter,
        observer: Observer,
        log: Log,
    ) -> None:
        self._policy = policy
        self._quota = SessionQuota(policy.caps)
        self._counter = counter
        self._observer = observer
        self._log = log
        # Guards clients, entries, the sets of sessions and entries in them, and waiting queues.
        # The listener's reader looks entries up without it, which the GIL makes safe.
        self._lock = threading.Lock()
        self.entries: dict[Key, Entry] = {}
        self.clients: dict[Hashable, Client] = {}
        self._sessions: set[Session] = set()
        self._names = workers.names
        self._opening = Opening(self._lock, workers, arenas, self._upstream_ended, counter, log)
        self._barren: set[tuple[str, str]] = (
            set()
        )  # who found no idle session to replace since the last expire()

    def __len__(self) -> int:
        return len(self._sessions)

    def set_policy(self, policy: NatPolicy) -> None:
        """After a reload; sessions that live keep their mapping."""
        with self._lock:
            self._policy = policy
            self._quota.caps = policy.caps

    # -- the reader thread of the listener

    def forward(self, arena: Any, entry: Entry, run: Run) -> None:
        """Sends a run to its target, or lets it wait for the dial under way."""
        if entry.destination is None and not self._opening.wait(arena, entry, run):
            return
        session = entry.session
        session.count_sent(run)  # before the answer can come
        session.conn.send(arena, run, entry.destination)

    def add_client(self, client: Client) -> None:
        """A client endpoint that was admitted."""
        with self._lock:
            self.clients[client.peer] = client

    def move_client(self, owner: Hashable, address: Address, peer: Hashable) -> Client | None:
        """An owner's endpoint `address` that is known by another key, because it came to another local address of ours before.

        Its sessions stay, and answers still leave from the address that it used first.
        """
        with self._lock:
            client = next(
                (
                    one
                    for one in self.clients.values()
                    if one.owner is owner and one.address == address
                ),
                None,
            )
            if client is not None:
                self.clients[peer] = client
            return client

    def open(
        self, key: Key, client: Client, flow: Flow, router: Router, count: int = 1
    ) -> Entry | None:
        """A new entry for a target by the way out that `router` knows, with the client's session for it, old or new.

        None where nothing leads there or at a limit, and then the `count` datagrams that asked for it have been counted.
        """
        try:
            route = router.route_without_blocking(flow)
            if route is None:
                return self._enter_unrouted(key, client, flow, router, count)
            self._check_carried(route)
        except DialError as error:
            self._counter.count("drops", error.reason.value, count)
            with self._lock:
                self._keep_while_used(client, key[0])
            return None
        entry = self._enter(key, client, route, count)
        if entry is not None:
            self._opening.advance(entry)
        return entry

    def open_now(self, key: Key, client: Client, route: Route) -> Entry:
        """The same, dialled and resolved when it returns; for threads that may wait.  DialError."""
        entry = self._enter(key, client, route, 0)
        if entry is None:
            raise DialError(Reason.GENERAL, said="no room for another UDP session")
        self._opening.open_now(entry)
        return entry

    def _enter(self, key: Key, client: Client, route: Route, count: int) -> Entry | None:
        with self._lock:
            if self.clients.get(key[0]) is not client:
                self._counter.count("drops", "association ended", count)
                return None
            entry = Entry(key, client, route.flow)
            session, evicted = self._session_for(client, route)
            if session:
                self.entries[key] = entry
                self._attach(entry, session)
            self._keep_while_used(client, key[0])
        self._after_entering(client, session, evicted, count)
        return entry if session else None

    def _after_entering(
        self, client: Client, session: Session | None, evicted: Session | None, count: int
    ) -> None:
        if evicted:
            self._close(evicted)
        if session is None:
            self._counter.count("drops", "session limit", count)
            self._log.limited(
                ("sessions", id(self)), "%s: no room for another UDP session", client.address.host
            )

    def _check_carried(self, route: Route) -> None:
        """DialError for a way out without datagrams."""
        dialer = route.dialer
        if "udp" in dialer.carries:
            return
        try:
            dialer.dial_packet(route.flow)  # which says, without dialling, which hop is in the way
        except DialError as error:
            if error.reason is not Reason.DENIED:  # what a rule refuses is as it was meant
                self._log.limited(("dial", dialer.name), "udp by %s: %s", dialer.name, error)
            raise

    # -- entries whose name is looked up before their way out is known

    def _enter_unrouted(
        self, key: Key, client: Client, flow: Flow, router: Router, count: int
    ) -> Entry | None:
        with self._lock:
            if self.clients.get(key[0]) is not client:
                self._counter.count("drops", "association ended", count)
                return None
            if len(client.unrouted) >= UNROUTED_LIMIT:
                self._counter.count("drops", "waiting queue full", count)
                return None
            entry = self.entries[key] = Entry(key, client, flow)
            client.unrouted.add(key)
        if not self._names(lambda: self._find_way(entry, router)):
            self._counter.count("drops", "lookup queue full", count)
            self._give_up(entry, "lookup queue full")
            return None
        return entry

    def _find_way(self, entry: Entry, router: Router) -> None:
        """On a worker's thread."""
        try:
            route = router.route(entry.flow)
            self._check_carried(route)
        except DialError as error:
            self._give_up(entry, error.reason.value)
            return
        except Exception:
            self._give_up(entry, "internal error")
            raise
        with self._lock:
            if entry.gone:
                return
            entry.flow = route.flow
            session, evicted = self._session_for(entry.client, route)
            if session:
                entry.client.unrouted.discard(entry.key)
                self._attach(entry, session)
        self._after_entering(entry.client, session, evicted, 0)
        if session:
            self._opening.advance(entry)
        else:
            self._give_up(entry, "session limit")

    def _give_up(self, entry: Entry, reason: str) -> None:
        """The next datagram for it begins anew."""
        with self._lock:
            if not entry.gone:
                entry.client.unrouted.discard(entry.key)
                self._forget(entry.key, reason)
                self._keep_while_used(entry.client, entry.key[0])

    # -- ends

    def end(self, owner: Hashable, reason: str = "association ended") -> None:
        """Ends every session of an owner (an association), at once."""
        with self._lock:
            gone = [
                (peer, client) for peer, client in self.clients.items() if client.owner is owner
            ]
            sessions = list(
                {session: None for _, client in gone for session in client.sessions.values()}
            )
            for session in sessions:
                self._remove(session, reason)
            for peer, client in gone:
                self._forget_unrouted(client)
                del self.clients[peer]
        for session in sessions:
            self._close(session)

    def bequeath(self, owner: Hashable, heir: Hashable) -> None:
        """An owner has ended, but not its endpoints: they end with the heir."""
        with self._lock:
            for client in self.clients.values():
                if client.owner is owner:
                    client.owner = heir

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Sessions that nobody sent on for their idle time; what came back does not count (RFC 4787 REQ-6)."""
        dead: list[Session] = []
        with self._lock:
            self._barren.clear()
            for session in self._sessions:
                if session.active:
                    session.active = False
                    session.seen = now
                elif now - session.seen >= self._patience(session):
                    dead.append(session)
            for session in dead:
                self._remove(session, "idle")
        return [lambda session=session: self._close(session) for session in dead]

    def close(self) -> None:
        """Ends everything."""
        with self._lock:
            sessions = list(self._sessions)
            for session in sessions:
                self._remove(session, "shutdown")
            for client in self.clients.values():
                self._forget_unrouted(client)
            self.clients.clear()
        for session in sessions:
            self._close(session)

    def _upstream_ended(self, session: Session) -> None:
        """On the session's own thread: the client's next datagram makes a new one."""
        with self._lock:
            if session not in self._sessions:
                return
            self._remove(session, "upstream closed")
        self._close(session)

    def _kill(self, session: Session) -> None:
        """On any thread; its client's next datagram makes a new one."""
        with self._lock:
            if session not in self._sessions:
                return
            self._remove(session, "killed")
        self._close(session)

    def _close(self, session: Session) -> None:
        """After its removal, outside the lock: its reader closes the descriptor."""
        if session.conn is not None:
            session.conn.shutdown()
        self._counter.count("sessions_evicted", session.ended)
        self._observer.finished(session.record())

    # -- under the lock

    def _patience(self, session: Session) -> float:
        """Seconds that a session may be idle."""
        idle = self._policy.idle_timeout
        if session.only_dns:  # ends with its last answer: a resolver asks from a new port each time
            answered = 0 < session.datagrams_sent <= session.datagrams_received
            return 0.0 if answered else min(DNS_SECONDS, idle)
        return idle if session.received else min(ONE_WAY_SECONDS, idle)

    def _session_for(self, client: Client, route: Route) -> tuple[Session | None, Session | None]:
        """The client's session for a way out, old or new, None without room; and one that yielded its place, to be closed."""
        dialer, flow = route
        policy, now = self._policy, time.monotonic()
        mapping = (dialer, flow.target) if policy.symmetric or dialer.symmetric else dialer
        session = client.sessions.get(mapping)
        evicted = None if session else self._make_room(client, flow.user, now)
        if session is None and self._quota.has_room(client.address.host, flow.user):
            session = self._add_session(
                Session(
                    client,
                    mapping,
                    flow,
                    dialer,
                    client.filtering or policy.filtering,
                    now,
                    self._kill,
                )
            )
        return session, evicted

    def _keep_while_used(self, client: Client, peer: Hashable) -> None:
        """A client that is nobody's is known by what it has, and as long as it has anything."""
        if client.owner is None:
            self.clients.pop(peer, None)
            if client.sessions or client.unrouted:
                self.clients[peer] = client

    def _add_session(self, session: Session) -> Session:
        session.client.sessions[session.mapping] = session
        self._sessions.add(session)
        self._quota.add(session)
        self._counter.count("sessions_opened", "")
        self._observer.began(session)
        return session

    def _attach(self, entry: Entry, session: Session) -> None:
        if len(session.entries) >= ENTRIES_LIMIT:
            oldest = next(iter(session.entries))
            del session.entries[oldest]
            self._forget(oldest)
        session.only_dns = session.only_dns and entry.flow.target.port == DNS_PORT
        entry.session = session
        session.entries[entry.key] = entry

    def _forget_unrouted(self, client: Client) -> None:
        for key in client.unrouted:
            self._forget(key)
        client.unrouted = set()

    def _forget(self, key: Key, reason: str = "evicted") -> None:
        entry = self.entries.pop(key)
        entry.gone = True
        if entry.permitted is not None:
            entry.session.forbid(entry.permitted)
        self._opening.fail_entry(entry, 0.0, reason)

    def _remove(self, session: Session, reason: str) -> None:
        session.ended = reason
        for key in session.entries:
            self._forget(key)
        session.entries = {}
        self._sessions.discard(session)
        client = session.client
        client.sessions.pop(session.mapping, None)
        self._quota.remove(session)
        self._keep_while_used(client, client.peer)

    def _make_room(self, client: Client, user: str, now: float) -> Session | None:
        """At a limit the session that has been idle longest yields; the caller closes it after the lock."""
        host = client.address.host
        if self._quota.has_room(host, user):
            return None
        if (host, user) in self._barren:
            return (
                None  # looked through a moment ago: a flood of new flows must not pay that for each
            )
        oldest = self._quota.yielding(self._sessions, host, user, now)
        if oldest is not None:
            self._remove(oldest, "yielded")
        else:
            self._barren.add((host, user))
        return oldest
