"""Asks STUN servers from the socket of a listener, and finds their answers among its datagrams.

The answers come to the listener's reader thread, among the datagrams of clients.  No datagram of
a client is looked at: take() gets what is none of SOCKS5, which would be dropped.
"""

from __future__ import annotations

from netproxy.errors import ProtocolError
from netproxy.net.address import from_sockaddr
from netproxy.net.udp_sockets import send_alone
from netproxy.protocol import stun
from netproxy.public_address.changes import COUNTER
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import Arena, Span
    from netproxy.interfaces.datagrams import DatagramSocket as ClientSocket
    from netproxy.interfaces.services import Counter
    from netproxy.net.datagram_socket import DatagramSocket

ASKED_LIMIT = 64
"""Questions that are remembered: those of the last rounds, whose answers may come late or twice."""

Answered = Callable[[bytes, "Address | None"], None]
"""Is told of an answer: its transaction, and the address in it, None for an error."""


class StunPort:
    """The questions that one UDP socket has asked.  Thread: any."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self.local: DatagramSocket | None = None
        """The socket; None before it is bound."""
        self.answered: Answered | None = None
        # The server of each transaction, None once it has answered.  Each access is atomic.
        self._asked: dict[bytes, Address | None] = {}

    def ask(self, server: Address, transaction: bytes) -> bool:
        """Send a Binding request; return False if it cannot be sent.  Never blocks."""
        if self.local is None:
            return False
        if transaction not in self._asked:
            while len(self._asked) >= ASKED_LIMIT:
                self._asked.pop(next(iter(self._asked)), None)
            self._asked[transaction] = server
        request = stun.encode_request(stun.BindingRequest(transaction))
        return send_alone(self.local, request, server)

    def take(self, arena: Arena, span: Span, local: ClientSocket) -> int:
        """Take answers out of datagrams that are none of SOCKS5; return how many were taken.

        Never blocks.  Thread: the listener's reader.
        """
        if not self._asked:
            return 0
        offsets, length, last, peer = span
        taken = 0
        for offset in offsets:
            size = last if offset == offsets[-1] else length
            datagram = arena.view[offset : offset + size]
            if stun.is_message(datagram):
                source = from_sockaddr(local.peer(peer))
                taken += self._take_one(bytes(datagram), source)
        return taken

    def _take_one(self, datagram: bytes, source: Address) -> bool:
        """Return whether a datagram answers a question, and comes from the server."""
        try:
            response = stun.parse_response(datagram)
        except ProtocolError:
            return False
        transaction = response.transaction
        if transaction not in self._asked:
            return False
        server = self._asked[transaction]
        if server is None:
            # A request that was sent twice has two answers.
            self._counter.count(COUNTER, "answer repeated")
            return True
        if server != source:
            return False
        self._asked[transaction] = None
        if self.answered is not None:
            mapped = response.mapped if isinstance(response, stun.BindingSuccess) else None
            self.answered(transaction, mapped)
        return True
