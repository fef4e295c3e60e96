"""Flows of one client for dialers, and a router and a destination guard that permit all."""

from __future__ import annotations

from typing import Callable, Sequence

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Dialer, Route, RouteSelectors

CLIENT = Address("192.0.2.1", 5)


def tcp_to(target: Address) -> Flow:
    return Flow("tcp", CLIENT, target, "main", "")


def udp_to(target: Address) -> Flow:
    return Flow("udp", CLIENT, target, "main", "")


class Anywhere:
    """A DestinationGuard that permits every address."""

    def permitted(self, flow: Flow, addresses: Sequence[Address]) -> tuple[Address, ...]:
        return tuple(addresses)

    def is_own_port(self, flow: Flow) -> bool:
        return False

    def without_own(
        self, flow: Flow, addresses: Sequence[Address], selectors: RouteSelectors
    ) -> tuple[Address, ...]:
        return tuple(addresses)


class NamesNothing:
    """Base of routers that know no name for an address."""

    def named(self, flow: Flow) -> Flow:
        return flow


class OneUpstream(NamesNothing):
    """A Router that sends all flows to one upstream.

    Names are looked up by `look_up`; without it nothing is.
    """

    def __init__(self, dialer: Dialer) -> None:
        self.dialer = dialer
        self.look_up: Callable[[Address], Sequence[Address]] | None = None
        self.flows: list[Flow] = []

    def route(self, flow: Flow) -> Route:
        self.flows.append(flow)
        if self.look_up is not None:
            flow = flow._replace(addresses=tuple(self.look_up(flow.target)))
        return Route(self.dialer, flow)

    route_without_blocking = route

    def candidates(self, flow: Flow) -> list[Dialer]:
        return [self.dialer]
