"""Which mapping a target of a client gets: one that the client has, or a new one with its session.

NatTable holds its lock for every call.
"""

from __future__ import annotations

from netproxy.errors import FlowRefused, Reason
from netproxy.interfaces.accounts import refused_by
from netproxy.interfaces.addresses import pack_ip
from netproxy.relay.entry import NatMapping
from netproxy.relay.session import Session
from netproxy.typed import TYPE_CHECKING, Callable, Sequence, TypeAlias

if TYPE_CHECKING:
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Dialer, Route
    from netproxy.relay.client import Client
    from netproxy.relay.entry import Entry
    from netproxy.relay.quota import SessionQuota
    from netproxy.relay.session import SessionTable
    from netproxy.relay.table.policy import NatDependencies, NatPolicy

    Choice: TypeAlias = tuple[NatMapping | FlowRefused, Sequence[NatMapping]]

ASSOCIATION_ENDED = "association ended"
REROUTED = "rerouted"
"""Why a session ends whose client may have no other one, and a target has another upstream."""


class MappingChoice:
    """Chooses mappings, and makes them, for one NatTable."""

    def __init__(
        self,
        table: SessionTable,
        policy: NatPolicy,
        quota: SessionQuota,
        mappings: dict[Session, NatMapping],
        dependencies: NatDependencies,
        remove: Callable[[NatMapping, str], None],
        defer: Callable[[Callable[[], None]], None],
    ) -> None:
        """`mappings` are those of the table, which new ones are added to.

        `remove(mapping, reason)` removes one; `defer(call)` makes a call without the lock.
        """
        self.policy = policy
        self._table, self._quota, self._mappings = table, quota, mappings
        self._counter, self._log = dependencies.counter, dependencies.log
        self._observer, self._accounts = dependencies.observer, dependencies.accounts
        self._remove, self._defer = remove, defer

    def choose(self, entry: Entry, route: Route, now: float) -> Choice:
        """Return the client's mapping for a route, and those that were removed for it.

        The mapping is an error if there is none.  The caller closes the removed ones.
        """
        client, flow = entry.client, route.flow
        if client.bound_ended is not None:
            return self._choose_bound(client, route)
        key = self._key(entry, route)
        if key in client.mappings:
            return client.mappings[key], ()
        host = client.address.host
        evicted: list[NatMapping] = []
        if not self._quota.has_room(host, flow.user):
            session = self._quota.evictable(self._mappings, client, flow.user, now)
            if session is not None:
                evicted.append(self._mappings[session])
                self._remove(evicted[0], "evicted")
        if not (self._quota.has_room(host, flow.user) and self._quota.claim(host)):
            reached = self._quota.reached(host, flow.user)
            return refused_by(reached), evicted
        try:
            return self._make(client, route, key, now), evicted
        except FlowRefused as error:
            self._quota.give_up(host)
            return error, evicted

    def _key(self, entry: Entry, route: Route) -> object:
        """Return the key of the mapping for a route among those of the client."""
        dialer, flow, _ = route
        if self.policy.symmetric or dialer.symmetric or _is_alone(dialer, flow):
            return dialer, flow.target
        shared, name = entry.client.mappings.get(dialer), flow.target.host
        if shared is not None and not shared.reaches(flow.target):
            return dialer, flow.target
        if entry.written is None or not dialer.resolves_names:
            return dialer
        # The upstream alone knows the addresses of names: replies of two would look alike.
        return dialer if shared is None or shared.name in ("", name) else (dialer, name)

    def _choose_bound(self, client: Client, route: Route) -> Choice:
        """Return the only mapping of a client whose address at targets must stay, as choose().

        A target that now has another upstream ends it: the client may then begin again.
        """
        ended = list(client.mappings.values())
        for mapping in ended:
            if mapping.session.dialer is route.dialer:
                if mapping.reaches(route.flow.target):
                    return mapping, ()
                return FlowRefused(Reason.UNSUPPORTED, said=Reason.UNSUPPORTED.value), ()
        for mapping in ended:
            self._remove(mapping, REROUTED)
        if not ended:
            return FlowRefused(Reason.GENERAL, said=ASSOCIATION_ENDED), ()
        decided = f"{route.rule or 'default'} leads to {route.dialer.name}"
        return FlowRefused(Reason.GENERAL, said=REROUTED, decided=decided), ended

    def _make(self, client: Client, route: Route, key: object, now: float) -> NatMapping:
        """Add a mapping with its session.  Raises FlowRefused."""
        dialer, flow, rule = route
        account = self._accounts.open(flow)
        filtering = client.filtering or self.policy.filtering
        session = Session(client, flow, dialer, filtering, now, self._table, account)
        session.rule = rule
        mapping = NatMapping(client, key, session)
        client.mappings[key] = mapping
        self._mappings[session] = mapping
        self._quota.add(session)
        self._counter.count("sessions_opened", "")
        if self._log.tracing:
            session.trace = self._log.trace(flow.listener, flow.client)
            self._defer(session.tell_begin)
        self._observer.began(session)
        return mapping


def _is_alone(dialer: Dialer, flow: Flow) -> bool:
    """Return whether a flow's target is a name that shares no connection of its upstream."""
    may_bind = dialer.knows_bound and dialer.resolves_names
    return may_bind and pack_ip(flow.target.host) is None
