"""Announces the address that an interface has at the moment of each reply."""

from __future__ import annotations

from netproxy.interfaces.addresses import Address
from netproxy.net.address import is_ipv6
from netproxy.net.local.interfaces import interface_address
from netproxy.public_address.changes import Change
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.public_address.changes import Changes


class InterfaceAddress:
    """The address of an interface (handler.announce.AddressSource).  Thread: any."""

    may_block = True
    """The kernel's lock on its interfaces may be held for a moment."""

    def __init__(self, interface: str, changes: Changes) -> None:
        self._interface = interface
        self._changes = changes

    def addresses(self, local: Address) -> Sequence[Address]:
        """Return the address of the family of `local`; none if the interface has none."""
        ipv6 = is_ipv6(local.host)
        host = interface_address(self._interface, ipv6)
        address = Address(host, 0) if host else None
        source = f"interface {self._interface}"
        missing = f"{source} has no {'IPv6' if ipv6 else 'IPv4'} address to announce"
        self._changes.note(Change(source, ipv6, address, source if host else missing, not host))
        return () if address is None else (address,)
