"""Which sources may reply in a UDP session, and by which address its client knows them.

Filtering is that of RFC 4787 section 5.  A client that has written to a fake address must get
replies from there; the source of the reply is another address, which the client has never seen.
NatTable holds its lock for permit() and forbid(); the session's thread calls the others.
"""

from __future__ import annotations

from netproxy.interfaces.addresses import pack_ip
from netproxy.net.address import from_sockaddr
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import Destination
    from netproxy.relay.entry import Entry
    from netproxy.relay.table.written_addresses import WrittenAddresses

ENDPOINT_INDEPENDENT = "endpoint-independent"
"""Any source may reply."""
ADDRESS_DEPENDENT = "address-dependent"
"""Only addresses that the client has sent to may reply."""
ADDRESS_AND_PORT_DEPENDENT = "address-and-port-dependent"
"""Only targets that the client has sent to may reply."""

_ANY_SOURCE = ""
"""The permission given by a target name that an upstream proxy resolves."""


class ReplySources:
    """The sources of one session."""

    __slots__ = ("filtering", "_permitted", "_written")

    def __init__(self, filtering: str) -> None:
        """`filtering` stays the same: a reload must not mix two kinds of permission."""
        self.filtering = filtering
        # What may reply, and the entries that permit it.  Empty if filtering is off.
        self._permitted: dict[Address | str, int] = {}
        # Made with the first target that has a fake address.
        self._written: WrittenAddresses | None = None

    def permit(self, entry: Entry, destination: Destination) -> bool:
        """Let the target of a prepared entry reply from now on.

        Returns True if sources may be known by other addresses than before.
        """
        if self.filtering != ENDPOINT_INDEPENDENT:
            permission = self._permission(destination)
            self._permitted[permission] = self._permitted.get(permission, 0) + 1
        if self._written is not None:
            self._written.add(entry, destination)
        elif entry.written is not None:
            # late: few configurations have fake addresses.  daemon.build has loaded it already.
            from netproxy.relay.table.written_addresses import WrittenAddresses

            self._written = WrittenAddresses()
            for other in entry.mapping.entries.values():
                if other.prepared is not None:
                    self._written.add(other, other.prepared)
        return self._written is not None

    def forbid(self, destination: Destination) -> bool:
        """Take back what permit() has given; return True if sources may not reply any more."""
        if self.filtering == ENDPOINT_INDEPENDENT:
            return False
        permission = self._permission(destination)
        left = self._permitted.get(permission, 0) - 1
        if left > 0:
            self._permitted[permission] = left
            return False
        self._permitted.pop(permission, None)
        return True

    def may_reply(self, source: Address) -> bool:
        """Return whether a source may reply."""
        permitted = self._permitted
        return (
            self.filtering == ENDPOINT_INDEPENDENT
            or source in permitted
            or source.host in permitted
            or _ANY_SOURCE in permitted
        )

    def known_as(self, source: Address) -> Address:
        """Return the address by which the client knows a source."""
        return source if self._written is None else self._written.find(source)

    def _permission(self, destination: Destination) -> Address | str:
        target = from_sockaddr(destination.sockaddr)
        if pack_ip(target.host) is None:
            # Only the proxy that resolves the name knows which address will reply.
            return _ANY_SOURCE
        return target.host if self.filtering == ADDRESS_DEPENDENT else target
