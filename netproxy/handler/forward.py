"""Listeners with a fixed target: all that comes in goes there, TCP connections or datagrams.

The target is reached through the router, as a proxied flow is.  Nobody logs in here, so that
by default only the target may reply to a client's datagrams, and the listener's `clients` are
checked for each new client.
"""

from __future__ import annotations

from functools import partial

from netproxy.errors import DialError, StreamError
from netproxy.interfaces.datagrams import Run
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.listeners import CLIENT_NOT_ALLOWED
from netproxy.net.address import from_sockaddr
from netproxy.net.datagram import reached_address
from netproxy.protocol.proxy_protocol import encode_header
from netproxy.relay.client import Client, no_header
from netproxy.relay.coalesce import Runs
from netproxy.typed import TYPE_CHECKING, Hashable

if TYPE_CHECKING:
    from netproxy.access.permission import Permission
    from netproxy.handler.outbound import Outbound
    from netproxy.handler.transparent.sniffer import Sniffer
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Handshake, Stream
    from netproxy.interfaces.datagrams import Batch, DatagramSocket
    from netproxy.interfaces.listeners import AllowedClients
    from netproxy.interfaces.routing import Router
    from netproxy.interfaces.services import Counter
    from netproxy.relay.entry import Entry
    from netproxy.relay.nat import NatTable


class TcpForward:
    """Connects every connection to one target.  A Handler."""

    def __init__(
        self,
        listener: str,
        outbound: Outbound,
        target: Address,
        permission: Permission | None = None,
        sniffer: Sniffer | None = None,
        send_proxy: str = "",
    ) -> None:
        """`permission` tells where flows leave from; None for a port of a tunnel's agent.

        `sniffer` finds the names that clients want, None if nothing looks for them.
        `send_proxy`: the PROXY header for the target, "v1" or "v2"; "" for none.
        """
        self._permission = permission
        self._sniffer = sniffer
        self._send_proxy = send_proxy
        self._listener = listener
        self._outbound = outbound
        self._target = target

    def handle(self, stream: Stream, client: Address) -> Handshake:
        """Connect to the target and relay."""
        sources = self._permission.sources if self._permission is not None else None
        source = None if sources is None else sources.of("", stream.local_address)
        route = stream.port_route
        flow = Flow(
            "tcp", client, self._target, self._listener, "", source=source, port_route=route
        )
        if self._sniffer is not None:
            flow = yield from self._sniffer.named(flow, stream)
        return (yield from relay_to_target(self._outbound, flow, stream, self._send_proxy))


def relay_to_target(
    outbound: Outbound, flow: Flow, stream: Stream, send_proxy: str = ""
) -> Handshake:
    """Connect to the target of a flow, and relay; a client whose target fails is reset.

    `send_proxy`: the PROXY header for the target, "v1" or "v2"; "" for none.
    """
    stream.handshaking = False
    try:
        connection = yield from outbound.connect(flow, stream)
    except DialError:
        # The client has no protocol that could tell it; the dial has been recorded.
        stream.reset()
        return None
    if send_proxy:
        try:
            header = encode_header(send_proxy, flow.client, stream.local_address())
            connection.upstream.reply(header)
        except StreamError:
            connection.finish("reset")
            stream.reset()
            return None
    return connection.accept(stream, b"")


class UdpForward:
    """Sends all datagrams to one target, and its replies back.  A PacketHandler.

    The key of an entry has the client's key alone.
    """

    def __init__(
        self,
        listener: str,
        router: Router,
        table: NatTable,
        target: Address,
        clients: AllowedClients,
        counter: Counter,
        permission: Permission | None = None,
    ) -> None:
        """`clients` are the addresses that may send; `permission` is as in TcpForward."""
        self._permission = permission
        self._listener = listener
        self._router = router
        self._table = table
        self._target = target
        self.clients = clients
        """May be replaced at any time, for the clients that come later."""
        self._counter = counter

    def handle_packets(self, batch: Batch, local: DatagramSocket) -> None:
        """Send datagrams of clients to the target.  Thread: the listener's reader."""
        arena, spans = batch.arena, batch.spans
        forward = self._table.forward
        entries = self._table.entries
        if len(spans) == 1:
            # A lone datagram, or a train, needs no coalescing.
            offsets, length, last, peer = spans[0]
            entry = entries.get((peer, b"")) or self._miss(peer, local, len(offsets))
            if entry is not None:
                forward(arena, entry, Run(offsets, length, last))
            return
        runs: Runs[Entry] = Runs(partial(forward, arena))
        for offsets, length, last, peer in spans:
            entry = entries.get((peer, b"")) or self._miss(peer, local, len(offsets))
            if entry is not None:
                runs.add(entry, offsets, length, last)
        runs.flush()

    def _miss(self, peer: Hashable, local: DatagramSocket, count: int) -> Entry | None:
        """Make the entry of a client.

        Returns None if there is none to be had; the `count` datagrams have been counted then.
        """
        endpoint = from_sockaddr(local.peer(peer))
        sources = self._permission.sources if self._permission is not None else None
        reached = partial(reached_address, local, peer)
        source = None if sources is None else sources.of("", reached)
        flow = Flow("udp", endpoint, self._target, self._listener, "", source=source)
        if decided := self.clients.refused_by(endpoint.host):
            reason, counter = CLIENT_NOT_ALLOWED, self._counter
            if not counter.refuse_unrecorded("drops", reason, endpoint.host, count):
                counter.refuse(flow.refusal("drops", reason, decided), count)
            return None
        client = self._table.clients.get(peer)
        if client is None:
            client = Client(peer, endpoint, local, no_header, None)
            self._table.add_client(client)
        return self._table.open((peer, b""), client, flow, self._router, count)
