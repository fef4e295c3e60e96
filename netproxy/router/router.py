"""Chooses the upstream of a flow by rules.

The first rule that matches decides; without one, the user's own upstream, else that of the
listener, else the default.  A rule that looks at addresses has the name looked up, unless its
upstream resolves names itself.  The route carries the addresses that were found and permitted,
and only these are dialled.  Immutable, any thread; a reload replaces the router as a whole.
"""

from __future__ import annotations

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address, UnixAddress, pack_ip
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Route
from netproxy.router.auto import AutoDialer
from netproxy.typed import TYPE_CHECKING, Callable, Iterator, Mapping, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.routing import (
        DestinationGuard,
        Dialer,
        NamedFlows,
        Resolver,
        UserUpstreams,
    )

Condition = Callable[[Flow], bool]
LookUp = Callable[[Flow], Sequence[Address]]


class Rule(NamedTuple):
    """A rule: all of its conditions must hold."""

    text: str
    """The rule as the configuration has it, for people."""
    dialer: Dialer
    conditions: Sequence[Condition] = ()
    """The conditions that need no lookup, cheap ones first."""
    address_conditions: Sequence[Condition] = ()
    """The conditions that look at the flow's addresses."""
    client_conditions: Sequence[Condition] = ()
    """Those of `conditions` that look neither at the target nor at the time."""
    label: str = ""
    """The rule in records: "rules[2]"."""

    @property
    def depends_on_flow(self) -> bool:
        """True if it may match some flows of a client alone: it looks at the target or the time."""
        return bool(self.address_conditions) or len(self.client_conditions) < len(self.conditions)


class _LookupNeeded(Exception):
    """A name would have to be looked up, and the caller must not block."""


class Fallbacks(NamedTuple):
    """The upstreams of flows that no rule decides, in the order in which they are asked."""

    default: Dialer
    by_listener: Mapping[str, Dialer] = {}
    """The upstreams of listeners with their own."""
    by_user: UserUpstreams = {}
    """Those of users with their own, who come before listeners."""


class RuleRouter:
    """The Router."""

    def __init__(
        self,
        rules: Sequence[Rule],
        fallbacks: Fallbacks,
        resolver: Resolver,
        guard: DestinationGuard,
        names: NamedFlows | None = None,
        sockets: Dialer | None = None,
    ) -> None:
        """Route by `rules`, then by `fallbacks`.

        `names` names flows to an address; None for nothing that does.  `sockets` connects to
        targets that are UNIX sockets; None if there are none.
        """
        self._rules = tuple(rules)
        self._default, self._by_listener, self._by_user = fallbacks
        self._resolver = resolver
        self._guard = guard
        self._names = names
        self._sockets = sockets

    def named(self, flow: Flow) -> Flow:
        """Return the flow with the name that its client wants.  Raises FlowRefused."""
        return flow if self._names is None else self._names.named(flow)

    def route(self, flow: Flow) -> Route:
        """Decide about a flow that named() has returned; may block for a lookup.

        Raises DialError if the target may not be reached or its name is not found.
        """
        rule, dialer, flow, failure = self._decide(flow, self._look_up)
        return self._complete(rule, dialer, flow, failure, self._look_up)

    def route_without_blocking(self, flow: Flow) -> Route | None:
        """Decide; return None if a name must be looked up first.  Raises DialError."""
        try:
            rule, dialer, flow, failure = self._decide(flow, self._known_addresses)
            return self._complete(rule, dialer, flow, failure, self._known_addresses)
        except _LookupNeeded:
            return None

    def candidates(self, flow: Flow) -> Iterator[Dialer]:
        """Yield all dialers that a flow like this may get, whatever its target and time."""
        for rule in self._rules:
            if all(condition(flow) for condition in rule.client_conditions):
                yield rule.dialer
                if not rule.depends_on_flow:
                    return
        own = self._by_user.get(flow.user) if flow.user else None
        yield own[1] if own else self._by_listener.get(flow.listener, self._default)

    def through(self, label: str, dialer: Dialer) -> RuleRouter:
        """Return a router that leads every flow to one dialer; `label` is its rule in records."""
        rule = Rule(label, dialer, label=label)
        fallbacks, resolver, guard = Fallbacks(dialer), self._resolver, self._guard
        return RuleRouter((rule,), fallbacks, resolver, guard, sockets=self._sockets)

    def explain(self, flow: Flow) -> tuple[str, Route | DialError]:
        """Return the text of the rule that decides about a flow of named(), and the outcome.

        Without a rule, the text is Route.rule, or "" if nothing has decided.  May block for a
        lookup.
        """
        rule = ""
        try:
            label, dialer, flow, failure = self._decide(flow, self._look_up)
            rule = next((rule.text for rule in self._rules if rule.label == label), label)
            return rule, self._complete(label, dialer, flow, failure, self._look_up)
        except DialError as error:
            return rule, error

    def _look_up(self, flow: Flow) -> Sequence[Address]:
        return self._resolver.resolve(flow.target, flow.client.host)

    def _known_addresses(self, flow: Flow) -> Sequence[Address]:
        addresses = self._resolver.known(flow.target)
        if addresses is None:
            raise _LookupNeeded
        return addresses

    def _decide(self, flow: Flow, look_up: LookUp) -> tuple[str, Dialer, Flow, DialError | None]:
        """Return what decides (Route.rule), the dialer, and the flow with its addresses.

        The flow has addresses if the rules needed a lookup.  The last item says why that
        lookup failed.
        """
        failure: DialError | None = None
        for rule in self._rules:
            if not all(condition(flow) for condition in rule.conditions):
                continue
            if rule.address_conditions:
                if not (flow.addresses or failure or _needs_no_addresses(rule.dialer, flow)):
                    flow, failure = _with_addresses(flow, look_up)
                # Without addresses the flow is in no network.
                if not all(condition(flow) for condition in rule.address_conditions):
                    continue
            return rule.label, rule.dialer, flow, failure
        if flow.user and (own := self._by_user.get(flow.user)) is not None:
            return *own, flow, failure
        if flow.listener in self._by_listener:
            return "listener", self._by_listener[flow.listener], flow, failure
        return "default", self._default, flow, failure

    def _complete(
        self, rule: str, dialer: Dialer, flow: Flow, failure: DialError | None, look_up: LookUp
    ) -> Route:
        """Return the route, with permitted addresses if the upstream needs addresses.

        Raises DialError if none is permitted or the name is not found.
        """
        if isinstance(flow.target, UnixAddress):
            # This machine alone reaches it: an upstream that blocks nothing leads there.
            assert self._sockets is not None
            return Route(self._sockets if dialer.carries else dialer, flow, rule)
        if isinstance(dialer, AutoDialer) and flow.network == "udp":
            dialer, flow, failure = _choose_for_datagrams(dialer, flow, failure, look_up)
        addresses: Sequence[Address] = flow.addresses
        if not addresses:
            if pack_ip(flow.target.host) is not None:
                addresses = (flow.target,)
            elif not dialer.resolves_names:
                if failure:
                    # The same lookup has failed a moment ago.
                    raise failure
                addresses = look_up(flow)
        if addresses:
            flow = flow.with_addresses(self._guard.permitted(flow, addresses))
            seen = flow.seen
            if seen is not None and seen.leads and dialer.resolves_names and dialer.carries:
                # The addresses stay: what dials directly, such as auto, dials these.
                flow = flow._replace(target=Address(seen.host, flow.target.port))
        return Route(dialer, flow, rule)


def _choose_for_datagrams(
    auto: AutoDialer, flow: Flow, failure: DialError | None, look_up: LookUp
) -> tuple[Dialer, Flow, DialError | None]:
    """Choose the dialer of `auto` for datagrams, whose loss is not noticed.

    They go where connections to the same target have gone.  Without a verdict they go
    direct, or by the upstream if the name is not found here.
    """
    dialer = auto.preferred_dialer(flow)
    if dialer is auto.upstream or flow.addresses:
        return dialer, flow, failure
    if failure is None:
        flow, failure = _with_addresses(flow, look_up)
    if failure and not auto.pinned_dialer(flow):
        dialer = auto.upstream
    return dialer, flow, failure


def _needs_no_addresses(dialer: Dialer, flow: Flow) -> bool:
    """Return whether a rule for this upstream needs no addresses of the flow's name.

    An upstream that carries nothing (block) may be chosen for an address, and auto tries
    direct first: both need the lookup.  A UNIX socket has no addresses.
    """
    if isinstance(flow.target, UnixAddress):
        return True
    leaves_names = dialer.resolves_names and bool(dialer.carries)
    is_name = pack_ip(flow.target.host) is None
    return leaves_names and is_name and not isinstance(dialer, AutoDialer)


def _with_addresses(flow: Flow, look_up: LookUp) -> tuple[Flow, DialError | None]:
    """Return the flow with the addresses of its target, or why there are none."""
    try:
        return flow.with_addresses(tuple(look_up(flow))), None
    except DialError as error:
        if error.reason not in (Reason.NAME, Reason.TIMEOUT):
            raise
        return flow, error
