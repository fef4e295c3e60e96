"""UDP datagrams that rules TPROXY of the kernel lead here: their clients know of no proxy.

Each datagram goes to the address that its client has written to.  A reply leaves from the
address that has sent it (handler.transparent.replies), through the same NAT table as that of
SOCKS5 datagrams.
"""

from __future__ import annotations

from functools import partial

from netproxy.handler.transparent.loops import NOT_LED_HERE
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS
from netproxy.interfaces.datagrams import Run
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.listeners import CLIENT_NOT_ALLOWED
from netproxy.net.address import from_sockaddr, unpack_sockaddr
from netproxy.net.datagram import ORIGINAL_TARGETS
from netproxy.relay.client import Client
from netproxy.relay.coalesce import Runs
from netproxy.typed import TYPE_CHECKING, Any, Hashable

if TYPE_CHECKING:
    from netproxy.access.permission import Permission
    from netproxy.handler.transparent.replies import ReplySockets
    from netproxy.handler.transparent.tcp import IsOwn
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import Batch, DatagramSocket
    from netproxy.interfaces.listeners import AllowedClients
    from netproxy.interfaces.routing import Router
    from netproxy.interfaces.services import Counter
    from netproxy.relay.entry import Entry
    from netproxy.relay.nat import NatTable


class TransparentUdp:
    """Sends datagrams to the addresses that their clients wrote to.  A PacketHandler.

    The key of a peer is (sockaddr, control message with the target, tag); the key of an entry
    is the sockaddr with the bytes of the target's, which are parsed for a new target only.
    A reload replaces `router`.
    """

    def __init__(
        self,
        router: Router,
        table: NatTable,
        replies: ReplySockets,
        permission: Permission,
        clients: AllowedClients,
        is_own: IsOwn,
        counter: Counter,
    ) -> None:
        """`is_own(network, address)`: whether an address is a listener of this daemon."""
        self.router = router
        self._table = table
        self._replies = replies
        self._permission = permission
        self._clients = clients
        self._is_own = is_own
        self._counter = counter

    def handle_packets(self, batch: Batch, local: DatagramSocket) -> None:
        """Send datagrams of clients to their targets.  Thread: the listener's reader."""
        arena, spans = batch.arena, batch.spans
        forward, entries = self._table.forward, self._table.entries
        runs: Runs[Entry] = Runs(partial(forward, arena))
        for offsets, length, last, peer in spans:
            key = _entry_key(peer)
            entry = entries.get(key) or self._miss(key, peer, local, len(offsets))
            if entry is None:
                continue
            if len(spans) == 1:
                # A lone datagram, or a train, needs no coalescing.
                forward(arena, entry, Run(offsets, length, last))
            else:
                runs.add(entry, offsets, length, last)
        runs.flush()

    def _miss(
        self, key: tuple[Hashable, bytes], peer: Hashable, local: DatagramSocket, count: int
    ) -> Entry | None:
        """Make the entry of a client and a target.

        Returns None if there is none to be had; the `count` datagrams have been counted then.
        """
        endpoint, target = from_sockaddr(local.peer(peer)), self._target(key[1])
        sources = self._permission.sources
        source = None if sources is None else sources.of("", partial(_reached, local))
        flow = Flow("udp", endpoint, target, self._permission.listener, "", source=source)
        if not target.port or self._is_own("udp", target):
            self._drop(flow, NOT_LED_HERE, "no rule of the kernel has led it here", count)
            return None
        if decided := self._clients.refused_by(endpoint.host):
            self._drop(flow, CLIENT_NOT_ALLOWED, decided, count)
            return None
        if self._permission.refuses(flow, count):
            return None
        client = self._table.clients.get(key[0])
        if client is None:
            replies = self._replies.of(endpoint)
            client = Client(key[0], endpoint, replies, self._replies.header, None)
            self._table.add_client(client)
        return self._table.open(key, client, flow, self.router, count)

    @staticmethod
    def _target(raw: bytes) -> Address:
        return from_sockaddr(unpack_sockaddr(raw)) if raw else UNSPECIFIED_ADDRESS

    def _drop(self, flow: Flow, reason: str, decided: str, count: int) -> None:
        if not self._counter.refuse_unrecorded("drops", reason, flow.client.host, count):
            self._counter.refuse(flow.refusal("drops", reason, decided), count)


# Any: only the socket that made a key reads it otherwise.
def _entry_key(peer: Any) -> tuple[Hashable, bytes]:
    """Return the key of an entry: the peer's sockaddr, and the sockaddr of the target.

    The latter is empty if the kernel has not told it.
    """
    if type(peer) is not tuple or len(peer) != 3:
        # A reload changes the protocol of the socket.
        return peer, b""
    name, message, _ = peer
    if message is None or message[:2] not in ORIGINAL_TARGETS:
        return name, b""
    return name, message[2]


def _reached(local: DatagramSocket) -> Address:
    return local.address
