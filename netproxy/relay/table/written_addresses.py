"""The fake addresses that a client of a UDP session has written to, by the sources of replies.

NatTable holds its lock for add(); the session's thread calls find().
"""

from __future__ import annotations

from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.bounded import BoundedDict
from netproxy.net.address import from_sockaddr
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.datagrams import Destination
    from netproxy.relay.entry import Entry

TARGETS_LIMIT = 4096
"""Targets of one session whose addresses are known by another one: as many as it has entries."""


class WrittenAddresses:
    """The addresses that a client has written to, by those that reply.

    A target with several names is known by the one that was written to last.  What an entry
    leaves behind stays until it is the oldest.
    """

    def __init__(self) -> None:
        # What the client has written to, by the address that the datagrams go to.
        self._targets: BoundedDict[Address, Address] = BoundedDict(TARGETS_LIMIT)
        # Fake hosts, by the hosts that the datagrams go to.
        self._hosts: BoundedDict[str, str] = BoundedDict(TARGETS_LIMIT)
        self._has_plain_targets = False
        # The fake host whose name the upstream resolves, and the ports that were written to.
        # There is one such host at most: see NatTable.
        self._unresolved = ""
        self._ports: set[int] = set()

    def add(self, entry: Entry, destination: Destination) -> None:
        """Note the destination of an entry."""
        target, written = from_sockaddr(destination.sockaddr), entry.written
        self._targets.put(target, written or target)
        if written is None:
            self._has_plain_targets = True
        elif pack_ip(target.host) is not None:
            self._hosts.put(target.host, written.host)
        else:
            self._unresolved = written.host
            self._ports.add(written.port)

    def find(self, source: Address) -> Address:
        """Return what the client has written to, for a source; the source itself if unknown."""
        written = self._targets.get(source)
        if written is not None:
            return written
        host = self._hosts.get(source.host)
        # An unknown address on the port of the unresolved name, or of a client that has written
        # to nobody else, is most likely one of the name's.
        is_likely = source.port in self._ports or not (self._has_plain_targets or self._hosts)
        if host is None and self._unresolved and is_likely:
            host = self._unresolved
        return source if host is None else Address(host, source.port)
