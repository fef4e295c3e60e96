"""Which way out a flow takes: rules in order, the first that matches; else its listener's own way, else the default.

A rule that looks at addresses has a name looked up, unless its way out leaves names
to a proxy.  What is decided carries the addresses that were found and that may be
reached, and these alone are dialled.  Immutable; a reload swaps it whole.
"""

from __future__ import annotations

from typing import Callable, Iterator, Mapping, NamedTuple, Sequence

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import DestinationGuard, Dialer, Resolver, Route
from netproxy.router.auto import AutoDialer

Condition = Callable[[Flow], bool]
LookUp = Callable[[Address], Sequence[Address]]


class Rule(NamedTuple):
    """All conditions must hold; those of `placed` look at the flow's addresses."""

    text: str  # as the configuration has it, for people
    dialer: Dialer
    conditions: Sequence[Condition] = ()  # cheap ones first
    placed: Sequence[Condition] = ()
    general: Sequence[Condition] = ()  # those of `conditions` that do not look at the target

    @property
    def aimed(self) -> bool:
        """Whether it looks at the target at all."""
        return bool(self.placed) or len(self.general) < len(self.conditions)


class LookupNeeded(Exception):
    """A name would have to be looked up, and whoever asks cannot wait."""


class RuleRouter:
    """A Router.  `by_listener`: ways out of listeners that have one of their own."""

    def __init__(
        self,
        rules: Sequence[Rule],
        default: Dialer,
        by_listener: Mapping[str, Dialer],
        resolver: Resolver,
        guard: DestinationGuard,
    ) -> None:
        self._rules = tuple(rules)
        self._default = default
        self._by_listener = dict(by_listener)
        self._resolver = resolver
        self._gatekeeper = guard

    def route(self, flow: Flow) -> Route:
        return self._route(flow, self._resolver.resolve)

    def route_without_blocking(self, flow: Flow) -> Route | None:
        try:
            return self._route(flow, self._known)
        except LookupNeeded:
            return None

    def candidates(self, flow: Flow) -> Iterator[Dialer]:
        for rule in self._rules:
            if all(condition(flow) for condition in rule.general):
                yield rule.dialer
                if not rule.aimed:
                    return
        yield self._otherwise(flow)

    def explain(self, flow: Flow) -> tuple[str, Route | DialError]:
        """Which rule decides, in the configuration's words, and what comes of it.  May wait for a name."""
        rule = ""
        try:
            rule, dialer, flow, failure = self._decide(flow, self._resolver.resolve)
            return rule, self._placed(dialer, flow, failure, self._resolver.resolve)
        except DialError as error:
            return rule, error

    def _known(self, target: Address) -> Sequence[Address]:
        found = self._resolver.known(target)
        if found is None:
            raise LookupNeeded
        return found

    def _route(self, flow: Flow, look_up: LookUp) -> Route:
        _, dialer, flow, failure = self._decide(flow, look_up)
        return self._placed(dialer, flow, failure, look_up)

    def _decide(self, flow: Flow, look_up: LookUp) -> tuple[str, Dialer, Flow, DialError | None]:
        """The rule's text, its way out, and the flow with what has been looked up for its rules, or why nothing was found."""
        failure: DialError | None = None
        for rule in self._rules:
            if not all(condition(flow) for condition in rule.conditions):
                continue
            if rule.placed:
                if not (
                    flow.addresses or failure or (_leaves_names(rule.dialer) and _is_name(flow))
                ):
                    flow, failure = _looked_up(flow, look_up)
                if not all(condition(flow) for condition in rule.placed):
                    continue  # where nobody knows its addresses, it is in no network
            return rule.text, rule.dialer, flow, failure
        return "", self._otherwise(flow), flow, failure

    def _otherwise(self, flow: Flow) -> Dialer:
        return self._by_listener.get(flow.listener, self._default)

    def _placed(
        self, dialer: Dialer, flow: Flow, failure: DialError | None, look_up: LookUp
    ) -> Route:
        """The decision, with its addresses where the way out needs them; DialError where they may not be reached."""
        if isinstance(dialer, AutoDialer) and flow.network == "udp":
            dialer, flow, failure = _datagrams_of(dialer, flow, failure, look_up)
        addresses: Sequence[Address] = flow.addresses
        if not addresses:
            if not _is_name(flow):
                addresses = (flow.target,)
            elif not dialer.resolves_names:
                if failure:
                    raise failure  # what was asked once is not asked again
                addresses = look_up(flow.target)
        if addresses:
            flow = Flow(*flow[:5], self._gatekeeper.permitted(flow, addresses))
        return Route(dialer, flow)


def _datagrams_of(
    auto: AutoDialer, flow: Flow, failure: DialError | None, look_up: LookUp
) -> tuple[Dialer, Flow, DialError | None]:
    """Datagrams tell of no failure, so that they go where connections to the same target have gone; else where their name is known."""
    dialer = auto.known_way(flow)
    if dialer is auto.upstream or flow.addresses:
        return dialer, flow, failure
    if failure is None:
        flow, failure = _looked_up(flow, look_up)
    return (auto.upstream if failure and not auto.pinned_way(flow) else dialer), flow, failure


def _leaves_names(dialer: Dialer) -> bool:
    """Whether a proxy finds out where names are.  What leads nowhere may be refused for its address; auto finds out itself, at first."""
    return dialer.resolves_names and bool(dialer.carries) and not isinstance(dialer, AutoDialer)


def _is_name(flow: Flow) -> bool:
    return pack_ip(flow.target.host) is None


def _looked_up(flow: Flow, look_up: LookUp) -> tuple[Flow, DialError | None]:
    """The flow with its addresses, or why there are none."""
    try:
        return flow._replace(addresses=tuple(look_up(flow.target))), None
    except DialError as error:
        if error.reason not in (Reason.NAME, Reason.TIMEOUT):
            raise
        return flow, error
