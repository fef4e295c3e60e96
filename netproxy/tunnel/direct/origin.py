"""The socket of an agent or of a client, as the place that packets come to (table.Origin).

Its own path leads to the bridge, whose address is fixed.  Direct paths lead to addresses that the
bridge has named, and follow packets that come from elsewhere: each address is first checked by the
policy of destinations, on a thread that may block.
"""

from __future__ import annotations

import threading
from functools import partial

from netproxy.errors import NetProxyError
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS
from netproxy.interfaces.bounded import BoundedDict
from netproxy.interfaces.flows import TUNNEL_DIRECT, Flow
from netproxy.tunnel.path.remote import Remote
from netproxy.typed import TYPE_CHECKING, Hashable

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import Destination, PacketConn
    from netproxy.tunnel.pool import Submit

PEERS_LIMIT = 256
"""Addresses of peers that are kept: each pair has one, and another one after a move."""

PROBE_BYTES = 16 * 1200
"""Bytes that may be sent to an address which the bridge has named before anything has come from
there: those of one attempt."""

_NOBODY = object()
"""The key of a peer from which nothing has come yet."""


class ConnOrigin:
    """A packet connection, and where packets leave by it."""

    def __init__(self, conn: PacketConn, submit: Submit) -> None:
        """`submit` runs a call on the dial pool."""
        self.conn = conn
        self._submit = submit
        # Guards the two: any thread puts.
        self._lock = threading.Lock()
        self._destinations: BoundedDict[Address, Destination] = BoundedDict(PEERS_LIMIT)
        self._refused: BoundedDict[Address, None] = BoundedDict(PEERS_LIMIT)
        """Addresses that are being checked, or that no packet may be sent to."""

    def address(self, peer: Hashable) -> Address:
        """Return the address in the key of a peer."""
        return self.conn.source(peer)

    def refused_by(self, peer: Hashable) -> str:
        """Return "": packets that are authentic may come from anywhere."""
        return ""

    def remote(self, peer: Hashable) -> Remote | None:
        """Return where packets to the peer of a direct path are sent.

        None until its address has been checked: a later packet asks again.
        """
        address = self.conn.source(peer)
        destination = self._destinations.get(address)
        if destination is not None:
            return Remote(self.conn.send, destination, peer)
        with self._lock:
            if address in self._refused:
                return None
            self._refused.put(address, None)
        if not self._submit(partial(self._check, address)):
            with self._lock:
                self._refused.pop(address, None)
        return None

    def lead_to(self, address: Address) -> Remote:
        """Return where to send what no packet has come from yet.  Blocks.  Raises DialError."""
        return Remote(self.conn.send, self._prepare(address), _NOBODY, PROBE_BYTES)

    def _check(self, address: Address) -> None:
        try:
            self._prepare(address)
        except NetProxyError:
            return
        with self._lock:
            self._refused.pop(address, None)

    def _prepare(self, address: Address) -> Destination:
        """Return the destination for an address that may be sent to.  Raises DialError."""
        flow = Flow("udp", UNSPECIFIED_ADDRESS, address, TUNNEL_DIRECT, "")
        destination = self.conn.prepare(flow)
        with self._lock:
            self._destinations.put(address, destination)
        return destination
