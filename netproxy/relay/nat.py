"""The NAT table of the UDP relay: (client endpoint, target) -> entry -> session.

This module has the one lock of the UDP relay.  Every event of the state machine (entry.py)
is applied here, under the lock; blocking work follows outside it (pending_dial.py).
A hit is one dictionary lookup by the listener's reader thread, without the lock.
A session ends in two steps, on any thread: it is removed from the table, then closed.
"""

from __future__ import annotations

import time
from functools import partial

from netproxy.errors import DialError, FlowRefused, Reason
from netproxy.interfaces.routing import Route
from netproxy.relay.entry import Action, Entry, EntryState, Key, NatMapping
from netproxy.relay.pending_dial import PendingDials
from netproxy.relay.quota import SessionQuota
from netproxy.relay.table.deferring_lock import DeferringLock
from netproxy.relay.table.fake_renewals import FakeRenewals
from netproxy.relay.table.mapping_choice import ASSOCIATION_ENDED, MappingChoice
from netproxy.relay.table.waiting_datagrams import WaitingQueues
from netproxy.typed import TYPE_CHECKING, Callable, Hashable, Iterable, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.accounts import SharedGauge
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import Arena, Destination, Run
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Router
    from netproxy.relay.client import Client
    from netproxy.relay.session import Session
    from netproxy.relay.table.policy import NatDependencies, NatPolicy

ENTRIES_LIMIT = 4096
"""Entries of a session, which has one client.  At the limit the oldest is evicted; the next
datagram to its target makes a new one."""
UNROUTED_LIMIT = 256
"""Entries of a client in state ROUTING."""
RETRY_SECONDS = 2.0
"""How long a failed dial or lookup is not repeated.  After that a datagram repeats it."""


class NatTable:
    """The clients, entries and sessions of one UDP listener."""

    def __init__(
        self, policy: NatPolicy, dependencies: NatDependencies, shared: SharedGauge | None = None
    ) -> None:
        """`shared` counts the sessions of all worker processes; None if there is one process."""
        # Guards all attributes below, and every Client, Entry and NatMapping in them.
        # The listener's reader looks entries up without it, which the GIL makes safe.
        self._lock = DeferringLock()
        self._quota = SessionQuota(policy.limits, dependencies.accounts, shared)
        self._waiting = WaitingQueues()
        self._mappings: dict[Session, NatMapping] = {}
        self.entries: dict[Key, Entry] = {}
        self.clients: dict[Hashable, Client] = {}
        """By their keys at the listener's socket."""
        _, _, _, self._counter, self._observer, _, _, _ = dependencies
        self._choice = MappingChoice(
            self, policy, self._quota, self._mappings, dependencies, self._remove, self._lock.defer
        )
        self._renewals = FakeRenewals(dependencies.renew_fake)
        self._pending = PendingDials(self, dependencies)

    def __len__(self) -> int:
        """Return the number of sessions."""
        return len(self._mappings)

    @property
    def symmetric(self) -> bool:
        """True if new sessions are for one target each."""
        return self._choice.policy.symmetric

    def set_policy(self, policy: NatPolicy) -> None:
        """Apply the policy of a new configuration.  Sessions that exist keep their mapping."""
        with self._lock:
            self._choice.policy = policy
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
        written = flow.target
        try:
            flow = router.named(flow)
            entry = Entry(key, client, flow, None if flow.target is written else written)
            route = router.route_without_blocking(flow)
            if route is None:
                return self._enter_unrouted(entry, router, count)
            self._pending.check_carries_udp(route)
            action = self._enter(entry, route)
        except DialError as error:
            reason, decided = error.why, error.decided or str(error)
            if isinstance(error, FlowRefused):
                reason, decided = error.said, error.decided
            self._drop(flow, reason, count, decided)
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

    def open_bound(self, client: Client, route: Route) -> Session:
        """Open a client's session before it has a target.

        Blocks.  Raises DialError, FlowRefused without room.
        """
        entry = Entry((client.peer, b""), client, route.flow)
        with self._lock:
            if not self._admits(entry):
                raise FlowRefused(Reason.GENERAL, said=ASSOCIATION_ENDED)
            mapping, evicted = self._choice.choose(entry, route, time.monotonic())
            if isinstance(mapping, NatMapping):
                mapping.on_needed(time.monotonic())
        self._close_all(evicted)
        if isinstance(mapping, FlowRefused):
            raise mapping
        self._pending.open_mapping(mapping)
        return mapping.session

    def keep_bound(self, client: Client, ended: Callable[[], None]) -> bool:
        """Let a client have no other session than its only one, which is never idle.

        `ended` is called at the session's end, on any thread; it must not block.  Returns False
        if the session has ended already.
        """
        with self._lock:
            if len(client.mappings) == 1:
                client.bound_ended = ended
        return client.bound_ended is not None

    def _enter(self, entry: Entry, route: Route) -> Action:
        """Add an entry whose route is known.  Raises FlowRefused if it finds no room."""
        client, action = entry.client, Action.NONE
        with self._lock:
            if not self._admits(entry):
                raise FlowRefused(Reason.GENERAL, said=ASSOCIATION_ENDED)
            mapping, evicted = self._choice.choose(entry, route, time.monotonic())
            if isinstance(mapping, NatMapping):
                self.entries[entry.key] = entry
                action = self._attach(entry, route.flow, mapping)
            self._keep_while_used(client, entry.key[0])
        self._close_all(evicted)
        if isinstance(mapping, FlowRefused):
            raise mapping
        return action

    def _enter_unrouted(self, entry: Entry, router: Router, count: int) -> Entry | None:
        """Add an entry whose target must be looked up before its upstream is known."""
        client = entry.client
        with self._lock:
            if not self._admits(entry):
                self._drop_later(entry, ASSOCIATION_ENDED, count)
                return None
            if len(client.unrouted) >= UNROUTED_LIMIT:
                self._drop_later(entry, "waiting queue full", count)
                return None
            self.entries[entry.key] = entry
            client.unrouted.add(entry.key)
        self._pending.look_up(entry, router)
        if entry.state is EntryState.GONE:
            self._drop(entry.flow, entry.ended, count)
            return None
        return entry

    # -- events of the state machine; any thread

    def routed(self, entry: Entry, route: Route) -> Action:
        """Event "routed" of an entry in state ROUTING."""
        client, action = entry.client, Action.NONE
        with self._lock:
            if entry.state is not EntryState.ROUTING:
                return action
            mapping, evicted = self._choice.choose(entry, route, time.monotonic())
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

        Entries that the connection does not reach have moved to mappings of their own.
        If the mapping was removed during the dial, its connection is shut down.
        """
        with self._lock:
            if mapping.on_dialled():
                self._move_strays(mapping)
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
            entry.session.permit(entry, destination)
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
        """Remove the sessions that are idle; return the calls that close them, and renew others.

        Only datagrams of the client keep a session alive (RFC 4787 REQ-6).
        """
        idle: list[NatMapping] = []
        with self._lock:
            idle_timeout = self._choice.policy.idle_timeout
            self._quota.sweep()
            for session, mapping in self._mappings.items():
                if session.active:
                    session.active = False
                    session.seen = now
                elif now - session.seen >= mapping.idle_limit(idle_timeout):
                    idle.append(mapping)
            for mapping in idle:
                self._remove(mapping, "idle")
            calls = self._renewals.due(self._mappings.values(), now)
        return [partial(self._close, mapping.session) for mapping in idle] + calls

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
        if session.client.bound_ended is not None:
            session.client.bound_ended()

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

    def _move_strays(self, mapping: NatMapping) -> None:
        """Event "moved" of the entries that a mapping's connection does not reach."""
        session = mapping.session
        for entry in list(mapping.entries.values()):
            if mapping.reaches(entry.flow.target):
                continue
            if not entry.on_moved():
                del mapping.entries[entry.key]
                self._forget(entry)
                continue
            route = Route(session.dialer, entry.flow, session.rule)
            other, evicted = self._choice.choose(entry, route, time.monotonic())
            if isinstance(other, NatMapping):
                action = self._attach(entry, entry.flow, other)
                self._lock.defer(partial(self._pending.perform, entry, action))
            else:
                self._forget(entry, other.said, other.decided)
            self._lock.defer(partial(self._close_all, evicted))

    def _attach(self, entry: Entry, flow: Flow, mapping: NatMapping) -> Action:
        """Event "routed" of an entry that is in the table."""
        if len(mapping.entries) >= ENTRIES_LIMIT:
            oldest = next(iter(mapping.entries.values()))
            del mapping.entries[oldest.key]
            self._forget(oldest)
        if not mapping.session.flow.target.port:
            # A session that began without a target is recorded with its first one.
            mapping.session.flow = flow
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
