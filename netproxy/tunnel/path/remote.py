"""Where the packets of a path are sent to, and how much before the peer has answered from there.

Thread: the reader of the socket writes, any thread sends.
"""

from __future__ import annotations

from netproxy.net.address import from_sockaddr
from netproxy.net.udp_sockets import largest_payload
from netproxy.tunnel.path.mtu import LADDER
from netproxy.typed import TYPE_CHECKING, Callable, Hashable

if TYPE_CHECKING:
    from netproxy.interfaces.datagrams import Arena, Destination, Run

AMPLIFICATION = 3
"""Bytes that may be sent to an address for each byte that has come from it, until the answer to a
PING has come from there (RFC 9000 section 8.1)."""


class Remote:
    """Where the packets of a path are sent to."""

    __slots__ = ("send", "destination", "peer", "validated", "_allowed")

    def __init__(
        self,
        send: Callable[[Arena, Run, Destination], None],
        destination: Destination,
        peer: Hashable = None,
        allowed: int = 0,
    ) -> None:
        """`send`: of the socket; `peer`: the key that packets from there have.

        Without `peer` it is the address of the configuration, which needs no proof.  `allowed`:
        bytes that may be sent before anything has come from there.
        """
        self.send = send
        self.destination = destination
        self.peer = peer
        self.validated = peer is None
        """True once the peer has answered from there."""
        self._allowed = allowed
        """Bytes that may be sent before that."""

    def allow(self, received: int) -> None:
        """Let AMPLIFICATION times as much be sent as has come: `received` bytes."""
        self._allowed += AMPLIFICATION * received

    def may_send(self, size: int) -> bool:
        """Take `size` bytes from what may be sent; return False if that is too much."""
        if self.validated:
            return True
        if size > self._allowed:
            return False
        self._allowed -= size
        return True

    def largest_packet(self) -> int:
        """Return the bytes of the largest packet that is worth a try: the first link takes it."""
        return largest_payload(from_sockaddr(self.destination.sockaddr)) or LADDER[-1]
