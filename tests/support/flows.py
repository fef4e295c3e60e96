"""Flows for dialers: whoever asks is the same client.  And who lets all of them pass."""

from __future__ import annotations

from typing import Callable, Sequence

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Dialer, Route

CLIENT = Address("192.0.2.1", 5)


def tcp_to(target: Address) -> Flow:
    return Flow("tcp", CLIENT, target, "main", "")


def udp_to(target: Address) -> Flow:
    return Flow("udp", CLIENT, target, "main", "")


class Anywhere:
    """A Gatekeeper that keeps nobody out."""

    def permitted(self, flow: Flow, addresses: Sequence[Address]) -> tuple[Address, ...]:
        return tuple(addresses)


class OneWay:
    """A Router for which all flows take one way out; nothing is looked up but by `look_up`."""

    def __init__(self, dialer: Dialer) -> None:
        self.dialer = dialer
        self.look_up: Callable[[Address], Sequence[Address]] | None = None
        self.flows: list[Flow] = []

    def route(self, flow: Flow) -> Route:
        self.flows.append(flow)
        return Route(
            self.dialer,
            flow._replace(addresses=tuple(self.look_up(flow.target))) if self.look_up else flow,
        )

    route_without_blocking = route

    def candidates(self, flow: Flow) -> list[Dialer]:
        return [self.dialer]
