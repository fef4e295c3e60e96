"""Listeners with a fixed target: whatever comes in goes there, TCP or UDP, by the same ways as a proxied flow.

Nobody logs in here, so that only a target may answer a client's datagrams, and
the listener's `clients` are checked for each new one.
"""

from __future__ import annotations

from typing import Container, Hashable

from netproxy.errors import DialError
from netproxy.handler.outbound import Connector
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Wait
from netproxy.interfaces.datagrams import Batch, Run
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Router
from netproxy.interfaces.services import Counter
from netproxy.net.address import from_sockaddr
from netproxy.net.datagram_socket import DatagramSocket
from netproxy.net.stream import Stream
from netproxy.relay.nat import Entry, NatTable
from netproxy.relay.coalesce import Runs
from netproxy.relay.session import Client


class TcpForward:
    def __init__(self, listener: str, connector: Connector, target: Address) -> None:
        self._listener = listener
        self._connector = connector
        self._target = target

    def handle(self, stream: Stream, client: Address) -> Wait | None:
        stream.welcome()
        try:
            passage = self._connector.open(Flow("tcp", client, self._target, self._listener, ""))
        except DialError:
            stream.reset()  # there is no other way to say it; the dial has been recorded
            return None
        return passage.accept(stream, b"")


class UdpForward:
    """PacketHandler.  The key of an entry is the client's alone."""

    def __init__(
        self,
        listener: str,
        router: Router,
        table: NatTable,
        target: Address,
        clients: Container[str] | None,
        counter: Counter,
    ) -> None:
        """`clients`: who may send, None for everybody."""
        self._listener = listener
        self._router = router
        self._table = table
        self._target = target
        self._clients = clients
        self._counter = counter

    def handle_packets(self, batch: Batch, local: DatagramSocket) -> None:
        arena, spans = batch
        forward = self._table.forward
        entries = self._table.entries
        if len(spans) == 1:
            offsets, length, last, peer = spans[0]
            entry = entries.get((peer, b"")) or self._miss(peer, local, len(offsets))
            if entry is not None:
                forward(arena, entry, Run(offsets, length, last))
            return
        runs = Runs(lambda entry, run: forward(arena, entry, run))
        for offsets, length, last, peer in spans:
            entry = entries.get((peer, b"")) or self._miss(peer, local, len(offsets))
            if entry is not None:
                runs.add(entry, offsets, length, last)
        runs.flush()

    def _miss(self, peer: Hashable, local: DatagramSocket, count: int) -> Entry | None:
        endpoint = from_sockaddr(local.peer(peer))
        if self._clients is not None and endpoint.host not in self._clients:
            self._counter.count("drops", "client not allowed", count)
            return None
        client = self._table.clients.get(peer)
        if client is None:
            client = Client(peer, endpoint, local, _no_header, None)
            self._table.add_client(client)
        flow = Flow("udp", endpoint, self._target, self._listener, "")
        return self._table.open((peer, b""), client, flow, self._router, count)


def _no_header(source: Address) -> bytes:
    return b""
