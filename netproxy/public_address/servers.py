"""Knows the addresses of STUN servers; names are looked up on a thread of a pool."""

from __future__ import annotations

import math
from functools import partial

from netproxy.errors import DialError
from netproxy.interfaces.addresses import pack_ip
from netproxy.net.address import is_ipv6
from netproxy.typed import TYPE_CHECKING, Callable, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.routing import Resolver

LOOKUP_SECONDS = 30.0
"""Between two lookups of a name whose server has not answered."""


class Servers:
    """The STUN servers of one listener.  Thread: any."""

    def __init__(
        self,
        names: Sequence[Address],
        resolver: Resolver,
        submit: Callable[[Callable[[], None]], bool],
    ) -> None:
        """`submit` runs a task that may block; False if its queue is full."""
        self.names = tuple(names)
        self._resolver = resolver
        self._submit = submit
        # Replaced as a whole, name by name, as the times are.
        self._addresses: dict[Address, Sequence[Address]] = {
            name: (name,) if pack_ip(name.host) else () for name in names
        }
        # Monotonic seconds when each name is to be looked up.
        self._due = {name: 0.0 for name in names if not pack_ip(name.host)}

    def look_up(self, now: float) -> None:
        """Begin the lookups that are due.  Never blocks.  Thread: the janitor's."""
        for name, due in self._due.items():
            if due <= now and self._submit(partial(self._resolve, name)):
                self._due[name] = now + LOOKUP_SECONDS

    def no_answer(self, name: Address, now: float) -> None:
        """Look the name of a silent server up again: it may have moved."""
        if name in self._due:
            self._due[name] = min(self._due[name], now + LOOKUP_SECONDS)

    def of_family(self, ipv6: bool) -> list[tuple[Address, Address]]:
        """Return each server that has an address of a family: its name, and the first of them."""
        servers = []
        for name in self.names:
            addresses = self._addresses[name]
            of_family = [address for address in addresses if is_ipv6(address.host) == ipv6]
            if of_family:
                servers.append((name, of_family[0]))
        return servers

    def _resolve(self, name: Address) -> None:
        try:
            self._addresses[name] = tuple(self._resolver.resolve(name))
        except DialError:
            # It is due again; the addresses of before are kept.
            return
        self._due[name] = math.inf
