"""Renews the use of the fake addresses that UDP sessions were opened with.

A fake address that nobody uses is given to another name: not while a session lives, whose client
may send to the address from another port.  NatTable holds its lock for each call.
"""

from __future__ import annotations

from functools import partial

from netproxy.typed import TYPE_CHECKING, Callable, Iterable

if TYPE_CHECKING:
    from netproxy.relay.entry import NatMapping

SECONDS = 30.0
"""How often a use is renewed.  It lasts for two minutes."""


class FakeRenewals:
    """When the uses of a table are renewed next."""

    def __init__(self, renew: Callable[[str, Iterable[str]], None]) -> None:
        """`renew` notes that a client (its host) goes on to use fake addresses."""
        self._renew = renew
        self._next = 0.0

    def due(self, mappings: Iterable[NatMapping], now: float) -> list[Callable[[], None]]:
        """Return the calls that renew the uses of mappings, if it is time."""
        if now < self._next:
            return []
        self._next = now + SECONDS
        return [
            partial(self._renew, mapping.client.address.host, _fake_hosts(mapping))
            for mapping in mappings
            if mapping.name
        ]


def _fake_hosts(mapping: NatMapping) -> set[str]:
    """Return the fake addresses that the client of a mapping writes to."""
    written = (entry.written for entry in mapping.entries.values())
    return {address.host for address in written if address is not None}
