"""The NAT table of the UDP relay: (client endpoint, target) -> entry -> session.

This module has the one lock of the UDP relay.  Every event of the state machine (entry.py)
is applied here, under the lock; blocking work follows outside it (pending_dial.py).
A hit is one dictionary lookup by the listener's reader thread, without the lock.
A session ends in two steps, on any thread: it is removed from the table, then closed.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Callable, Hashable, Iterable, NamedTuple, Sequence

from netproxy.errors import DialError, FlowRefused, Reason
from netproxy.interfaces.accounts import limit_reason
from netproxy.relay.deferring_lock import DeferringLock
from netproxy.relay.entry import Action, Entry, EntryState, Key, NatMapping
from netproxy.relay.pending_dial import PendingDials
from netproxy.relay.quota import SessionLimits, SessionQuota
from netproxy.relay.session import ENDPOINT_INDEPENDENT, Session
from netproxy.relay.waiting_datagrams import WaitingQueues

if TYPE_CHECKING:
    from netproxy.interfaces.accounts import Accounts
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import Arena, Destination, Run
    from netproxy.interfaces.fairness import FairSubmit
    from netproxy.interfaces.flows import Flow, Observer
    from netproxy.interfaces.routing import Route, Router
    from netproxy.interfaces.services import Counter, Log
    from netproxy.net.datagram import ArenaPool
    from netproxy.relay.client import Client

ENTRIES_LIMIT = 4096
"""Entries of a session, which has one client.  At the limit the oldest is evicted; the next
datagram to its target makes a new one."""
UNROUTED_LIMIT = 256
"""Entries of a client in state ROUTING."""
ASSOCIATION_ENDED = "association ended"
RETRY_SECONDS = 2.0
"""How long a failed dial or lookup is not repeated.  After that a datagram repeats it."""


class NatPolicy(NamedTuple):
    """How a table behaves as a NAT, in the words of RFC 4787."""

    limits: SessionLimits
    idle_timeout: float = 300.0
    """Seconds, for sessions that have seen both directions (REQ-5)."""
    symmetric: bool = False
    """True for one mapping for each target; otherwise it is endpoint-independent (REQ-1)."""
    filtering: str = ENDPOINT_INDEPENDENT
    """Which sources may reply (REQ-8)."""


class NatDependencies(NamedTuple):
    """What a table and its sessions need of the daemon."""

    arenas: ArenaPool
    dials: FairSubmit
    names: FairSubmit
    """A pool of its own: a name server that does not answer must delay no dial."""
    counter: Counter
    observer: Observer
    accounts: Accounts
    log: Log


class NatTable:
    """The clients, entries and sessions of one UDP listener."""

    def __init__(self, policy: NatPolicy, dependencies: NatDependencies) -> None:
        # Guards all attributes below, and every Client, Entry and NatMapping in them.
        # The listener's reader looks entries up without it, which the GIL makes safe.
        self._lock = DeferringLock()
        self._policy = policy
        self._quota = SessionQuota(policy.limits, dependencies.accounts)
        self._waiting = WaitingQueues()
        self._mappings: dict[Session, NatMapping] = {}
        self.entries: dict[Key, Entry] = {}
        self.clients: dict[Hashable, Client] = {}
        """By their keys at the listener's socket."""
        _, _, _, self._counter, self._observer, self._accounts, self._log = dependencies
        self._pending = PendingDials(self, dependencies)

    def __len__(self) -> int:
        """Return the number of sessions."""
        return len(self._mappings)

    def set_policy(self, policy: NatPolicy) -> None:
        """Apply the policy of a new configuration.  Sessions that exist keep their mapping."""
        with self._lock:
            self._policy = policy
            self._quota.limits = policy.limits

    # -- the reader thread of the listener

    def forward(self, arena: Arena, entry: Entry, run: Run) -> None:
        """Send a run to its target, or let it wait until its entry is ready."""
        destination = entry.destination
        if destination is None:
            destination = self._wait(arena, entry, run)
            if destination is None:
                return
        entry.session.send(arena, run, destination)

    def _wait(self, arena: Arena, entry: Entry, run: Run) -> Destination | None:
        """Queue or drop a run of an entry that was not ready.

        Returns the destination if the entry has become ready meanwhile.
        """
        count, now = len(run.offsets), time.monotonic()
        if entry.state is EntryState.FAILED and now < entry.retry_at:
            # Without the table's lock, because a client may flood a dead target.
            self._drop(entry.flow, "target failed", count, entry.ended)
            return None
        with self._lock:
            action = entry.on_retry(now)
            if entry.state is EntryState.READY:
                return entry.destination
            if entry.queueing:
                dropped, reason = self._waiting.put(entry, arena, run), "waiting queue full"
            else:
                dropped = count
                reason = entry.ended if entry.state is EntryState.GONE else "upstream failed"
        if dropped:
            self._drop(entry.flow, reason, dropped)
        self._pending.perform(entry, action)
        return None

    def add_client(self, client: Client) -> None:
        """Add a client endpoint that was admitted."""
        with self._lock:
            self.clients[client.peer] = client

    def move_client(self, owner: object, address: Address, peer: Hashable) -> Client | None:
        """Find an owner's client by its address and give it `peer` as one more key.

        The key changes if the client sends to another local address.  Its sessions stay, and
        replies still leave from the local address that it used first.
        """
        with self._lock:
            for client in self.clients.values():
                if client.owner is owner and client.address == address:
                    self.clients[peer], client.peers = client, (*client.peers, peer)
                    return client
            return None

    def open(
        self, key: Key, client: Client, flow: Flow, router: Router, count: int = 1
    ) -> Entry | None:
        """Make the entry of a new target, and its session unless the client has it already.

        Returns None if the target has no upstream or a limit is reached.  The `count`
        datagrams that asked for the entry have then been counted as dropped.
        """
        try:
            route = router.route_without_blocking(flow)
            if route is None:
                return self._enter_unrouted(key, client, flow, router, count)
            self._pending.check_carries_udp(route)
            entry = Entry(key, client, flow)
            action = self._enter(entry, route)
        except FlowRefused as error:
            self._drop(flow, error.said, count, error.decided)
            return None
        except DialError as error:
            self._drop(flow, error.reason.value, count, error.decided or str(error))
            with self._lock:
                self._keep_while_used(client, key[0])
            return None
        self._pending.perform(entry, action)
        return entry

    def open_now(self, key: Key, client: Client, route: Route) -> Entry:
        """Make an entry that is ready.  Blocks.  Raises DialError, FlowRefused without room."""
        entry = Entry(key, client, route.flow)
        self._pending.open_now(entry, self._enter(entry, route))
        return entry

    def _enter(self, entry: Entry, route: Route) -> Action:
        """Add an entry whose route is known.  Raises FlowRefused if it finds no room."""
        client, action = entry.client, Action.NONE
        with self._lock:
            if not self._admits(entry):
                raise FlowRefused(Reason.GENERAL, said=ASSOCIATION_ENDED)
            mapping, evicted = self._mapping_for(client, route)
            if isinstance(mapping, NatMapping):
                self.entries[entry.key] = entry
                action = self._attach(entry, route.flow, mapping)
            self._keep_while_used(client, entry.key[0])
        self._close_all(evicted)
        if isinstance(mapping, FlowRefused):
            raise mapping
        return action

    def _enter_unrouted(
        self, key: Key, client: Client, flow: Flow, router: Router, count: int
    ) -> Entry | None:
        """Add an entry whose target must be looked up before its upstream is known."""
        entry = Entry(key, client, flow)
        with self._lock:
            if not self._admits(entry):
                self._drop_later(entry, ASSOCIATION_ENDED, count)
                return None
            if len(client.unrouted) >= UNROUTED_LIMIT:
                self._drop_later(entry, "waiting queue full", count)
                return None
            self.entries[key] = entry
            client.unrouted.add(key)
        self._pending.look_up(entry, router)
        if entry.state is EntryState.GONE:
            self._drop(flow, entry.ended, count)
            return None
        return entry

    # -- events of the state machine; any thread

    def routed(self, entry: Entry, route: Route) -> Action:
        """Event "routed" of an entry in state ROUTING."""
        client, action = entry.client, Action.NONE
        with self._lock:
            if entry.state is not EntryState.ROUTING:
                return action
            mapping, evicted = self._mapping_for(client, route)
            if isinstance(mapping, NatMapping):
                client.unrouted.discard(entry.key)
                action = self._attach(entry, route.flow, mapping)
        self._close_all(evicted)
        if isinstance(mapping, FlowRefused):
            self.routing_failed(entry, mapping.said, mapping.decided)
        return action

    def routing_failed(self, entry: Entry, reason: str, decided: str = "") -> None:
        """Event "failed" of an entry in state ROUTING: the next datagram makes a new entry."""
        with self._lock:
            if entry.state is EntryState.ROUTING:
                entry.client.unrouted.discard(entry.key)
                self._forget(entry, reason, decided)
                self._keep_while_used(entry.client, entry.key[0])

    def dialled(self, mapping: NatMapping) -> Sequence[Entry]:
        """Event "dialled" of a mapping and of its entries; return the entries to prepare.

        If the mapping was removed during the dial, its connection is shut down.
        """
        with self._lock:
            if mapping.on_dialled():
                return [entry for entry in mapping.entries.values() if entry.on_dialled()]
        mapping.session.shutdown()
        return ()

    def dial_failed(self, mapping: NatMapping, reason: str, decided: str = "") -> None:
        """Event "dial failed" of a mapping, and "failed" of its entries."""
        with self._lock:
            if mapping.on_dial_failed(time.monotonic() + RETRY_SECONDS):
                for entry in mapping.entries.values():
                    self._fail(entry, mapping.retry_at, reason, decided)

    def prepared(self, entry: Entry, destination: Destination) -> bool:
        """Event "prepared"; return False if the entry was removed meanwhile."""
        with self._lock:
            if not entry.on_prepared(destination):
                return False
            entry.session.permit(destination)
            return True

    def prepare_failed(self, entry: Entry, reason: str, decided: str = "") -> None:
        """Event "failed" of an entry whose destination cannot be prepared."""
        with self._lock:
            self._fail(entry, time.monotonic() + RETRY_SECONDS, reason, decided)

    def take_waiting(self, entry: Entry) -> Sequence[bytes]:
        """Return what waits for an entry in state FLUSHING; if nothing does, event "flushed"."""
        with self._lock:
            if entry.state is not EntryState.FLUSHING:
                return ()
            waiting = self._waiting.take(entry)
            if not waiting:
                entry.on_flushed()
            return waiting

    # -- ends; any thread

    def end(self, owner: object, reason: str = ASSOCIATION_ENDED) -> int:
        """End all clients of an owner (an association, a stream), with their sessions.

        Returns how many sessions there were.
        """
        with self._lock:
            owned = [client for client in self.clients.values() if client.owner is owner]
            ended = self._end_clients(owned, reason)
        self._close_all(ended)
        return len(ended)

    def end_client(self, client: Client, reason: str) -> None:
        """End one client endpoint, with its sessions; its next datagram makes a new one."""
        with self._lock:
            ended = self._end_clients([client], reason)
        self._close_all(ended)

    def transfer(self, owner: object, successor: object) -> None:
        """Give the clients of an owner that has ended to its successor: they end with it."""
        with self._lock:
            for client in self.clients.values():
                if client.owner is owner:
                    client.owner = successor

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Remove the sessions that are idle; return the calls that close them.

        Only datagrams of the client keep a session alive (RFC 4787 REQ-6).
        """
        idle: list[NatMapping] = []
        with self._lock:
            self._quota.sweep()
            for session, mapping in self._mappings.items():
                if session.active:
                    session.active = False
                    session.seen = now
                elif now - session.seen >= mapping.idle_limit(self._policy.idle_timeout):
                    idle.append(mapping)
            for mapping in idle:
                self._remove(mapping, "idle")
        return [partial(self._close, mapping.session) for mapping in idle]

    def close(self, reason: str = "shutdown") -> None:
        """End everything; `reason` is why its sessions end."""
        with self._lock:
            ended = list(self._mappings.values())
            for mapping in ended:
                self._remove(mapping, reason)
            for client in self.clients.values():
                self._forget_unrouted(client)
            self.clients.clear()
        self._close_all(ended)

    def end_session(self, session: Session, reason: str) -> None:
        """End a session, if it has not ended.  The client's next datagram makes a new one."""
        with self._lock:
            mapping = self._mappings.get(session)
            if mapping is None:
                return
            self._remove(mapping, reason)
        self._close(session)

    # -- after the lock

    def _close_all(self, mappings: Iterable[NatMapping]) -> None:
        for mapping in mappings:
            self._close(mapping.session)

    def _close(self, session: Session) -> None:
        """Record a session that was removed; its own thread closes the descriptor."""
        session.shutdown()
        self._counter.count("sessions_evicted", session.ended)
        self._observer.finished(session.record())

    def _drop(self, flow: Flow, reason: str, count: int, decided: str = "") -> None:
        """Count and record datagrams that are dropped."""
        if not self._counter.refuse_unrecorded("drops", reason, flow.client.host, count):
            self._counter.refuse(flow.refusal("drops", reason, decided), count)

    # -- under the lock

    def _drop_later(self, entry: Entry, reason: str, count: int, decided: str = "") -> None:
        self._lock.defer(partial(self._drop, entry.flow, reason, count, decided))

    def _admits(self, entry: Entry) -> bool:
        """Return False if the entry's client has ended meanwhile."""
        return self.clients.get(entry.key[0]) is entry.client

    def _mapping_for(
        self, client: Client, route: Route
    ) -> tuple[NatMapping | FlowRefused, Sequence[NatMapping]]:
        """Return the client's mapping for a route, and those that were evicted to make room.

        The mapping is an error if there is no room.  The caller closes the evicted ones.
        """
        dialer, flow, rule = route
        symmetric = self._policy.symmetric or dialer.symmetric
        key: object = (dialer, flow.target) if symmetric else dialer
        if key in client.mappings:
            return client.mappings[key], ()
        now, host = time.monotonic(), client.address.host
        evicted: list[NatMapping] = []
        if not self._quota.has_room(host, flow.user):
            session = self._quota.evictable(self._mappings, client, flow.user, now)
            if session is not None:
                evicted.append(self._mappings[session])
                self._remove(evicted[0], "evicted")
        if not self._quota.has_room(host, flow.user):
            reached = self._quota.reached(host, flow.user)
            return FlowRefused(Reason.LIMIT, said=limit_reason(reached), decided=reached), evicted
        try:
            account = self._accounts.open(flow)
        except FlowRefused as error:
            return error, evicted
        filtering = client.filtering or self._policy.filtering
        session = Session(client, flow, dialer, filtering, now, self, account)
        session.rule = rule
        return self._add(NatMapping(client, key, session)), evicted

    def _add(self, mapping: NatMapping) -> NatMapping:
        session = mapping.session
        mapping.client.mappings[mapping.key] = mapping
        self._mappings[session] = mapping
        self._quota.add(session)
        self._counter.count("sessions_opened", "")
        if self._log.tracing:
            session.trace = self._log.trace(session.flow.listener, session.flow.client)
            self._lock.defer(session.tell_begin)
        self._observer.began(session)
        return mapping

    def _attach(self, entry: Entry, flow: Flow, mapping: NatMapping) -> Action:
        """Event "routed" of an entry that is in the table."""
        if len(mapping.entries) >= ENTRIES_LIMIT:
            oldest = next(iter(mapping.entries.values()))
            del mapping.entries[oldest.key]
            self._forget(oldest)
        action = entry.on_routed(flow, mapping, time.monotonic())
        if entry.state is EntryState.FAILED:
            self._drop_waiting(entry, "upstream failed")
        return action

    def _fail(self, entry: Entry, retry_at: float, reason: str, decided: str) -> None:
        if entry.on_failed(retry_at):
            entry.ended = decided or reason
            self._drop_waiting(entry, reason, decided)

    def _drop_waiting(self, entry: Entry, reason: str, decided: str = "") -> None:
        if lost := len(self._waiting.take(entry)):
            self._drop_later(entry, reason, lost, decided)

    def _remove(self, mapping: NatMapping, reason: str) -> None:
        """Event "removed" of a mapping and of its entries."""
        session, client = mapping.session, mapping.client
        mapping.on_removed()
        session.ended = reason
        for entry in mapping.entries.values():
            self._forget(entry)
        mapping.entries = {}
        del self._mappings[session]
        del client.mappings[mapping.key]
        self._quota.remove(session)
        session.account.close()
        self._keep_while_used(client, client.peer)

    def _forget(self, entry: Entry, reason: str = "evicted", decided: str = "") -> None:
        """Event "removed" of an entry."""
        del self.entries[entry.key]
        if entry.prepared is not None:
            entry.session.forbid(entry.prepared)
        self._drop_waiting(entry, reason, decided)
        entry.on_removed(reason)

    def _end_clients(self, clients: Sequence[Client], reason: str) -> Sequence[NatMapping]:
        """Remove clients under all their keys; return their mappings, which are to be closed."""
        gone = dict.fromkeys(clients)  # two keys may stand for one client
        ended = [mapping for client in gone for mapping in client.mappings.values()]
        for mapping in ended:
            self._remove(mapping, reason)
        for client in gone:
            self._forget_unrouted(client)
            for peer in [peer for peer in client.peers if self.clients.get(peer) is client]:
                del self.clients[peer]
        return ended

    def _forget_unrouted(self, client: Client) -> None:
        for key in client.unrouted:
            self._forget(self.entries[key])
        client.unrouted = set()

    def _keep_while_used(self, client: Client, peer: Hashable) -> None:
        """Keep a client without owner in the table as long as it has anything."""
        if client.owner is None:
            self.clients.pop(peer, None)
            if client.mappings or client.unrouted:
                self.clients[peer] = client
