"""Chooses the route of an sni listener, by what the first bytes of a connection tell.

The first route whose conditions all hold decides.  Immutable; any thread.
"""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.networks import HostSet
    from netproxy.interfaces.flows import FirstBytes


class PortConditions(NamedTuple):
    """The conditions of one route."""

    protocols: frozenset[str]
    """What the client speaks; empty for anything."""
    names: HostSet | None
    """The name in a ClientHello; None for any."""
    alpn: frozenset[str]
    """The client offers one of these; empty if that does not matter."""
    hosts: HostSet | None
    """The host of an HTTP request; None for any."""

    def hold(self, seen: FirstBytes) -> bool:
        """Return whether all conditions hold.  `protocols` tells what a name belongs to."""
        if self.protocols and seen.protocol not in self.protocols:
            return False
        for names in (self.names, self.hosts):
            if names is not None and not (seen.name and seen.name in names):
                return False
        return not self.alpn or any(protocol in self.alpn for protocol in seen.alpn)


class ConditionRoutes:
    """The routes of a listener by their conditions (interfaces.routing.PortRoutes)."""

    def __init__(self, routes: Sequence[PortConditions]) -> None:
        self._routes = tuple(routes)

    def choose(self, seen: FirstBytes) -> int | None:
        """Return the index of the first route that a connection matches, None if none does."""
        for index, conditions in enumerate(self._routes):
            if conditions.hold(seen):
                return index
        return None
