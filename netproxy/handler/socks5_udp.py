"""SOCKS5's datagrams (RFC 1928 section 7): from client to target through the NAT table.

A datagram, stop by stop: its raw header is the key of an entry in the table; a
hit sends its payload on at once, a miss asks who the sender is (the association
of a live control connection), parses, routes and makes the entry.  handle_packets
runs on the reader thread of a relay socket, open and close on control connections.
"""

from __future__ import annotations

from typing import Any, Callable, Hashable, NamedTuple

from netproxy.errors import ProtocolError
from netproxy.handler.stream_udp import refuse_without_udp
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Batch, Run, Span
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Router
from netproxy.interfaces.services import Counter
from netproxy.net.address import from_sockaddr
from netproxy.handler.bind import Announcer
from netproxy.net.datagram import ArenaPool
from netproxy.net.datagram_socket import DatagramSocket
from netproxy.net.stream import Stream
from netproxy.protocol import socks5
from netproxy.relay.association import Association, Associations
from netproxy.relay.nat import Entry, NatTable
from netproxy.relay.coalesce import Runs
from netproxy.relay.session import Client


class RelayState(NamedTuple):
    """What outlives a reload: who may send, and what is open."""

    associations: Associations
    table: NatTable
    arenas: ArenaPool


class Socks5UdpRelay:
    """Before it serves it is given `shared`, the listener's own socket, which all associations use, or

    `open_port(self, host)`, which makes a started relay listener for one association.
    """

    def __init__(
        self,
        listener: str,
        router: Router,
        state: RelayState,
        announcer: Announcer,
        counter: Counter,
    ) -> None:
        self._listener = listener
        self._router = router
        self._associations, self._table, _ = state
        self._announcer = announcer
        self._counter = counter
        self.shared: DatagramSocket | None = None
        self.open_port: Callable[[Any, str], Any] | None = None
        self._ports: dict[Association, Any] = {}

    # -- control connections

    def open(self, stream: Stream, flow: Flow) -> tuple[Association, Address]:
        """An association for a control connection, and BND.  `flow.target` is only the hint of the request.

        DialError where no datagram could leave, or no relay port is free.
        """
        refuse_without_udp(self._router, flow._replace(network="udp"))
        local = stream.local_address()
        port = self.open_port(self, local.host) if self.open_port else None
        relay = port.local if port else self.shared
        association = Association(flow.client.host, flow.target.port, flow.user, relay)
        if port:
            self._ports[association] = port
        self._associations.add(association)
        return association, self._announcer.bound(
            flow.client, local, relay.address.port, shared=port is None
        )

    def close(self, association: Association) -> None:
        """The control connection has ended: so do the endpoint, its sessions and their upstreams."""
        if self._associations.remove(association, self._table.bequeath) is None:
            self._table.end(association)
        port = self._ports.pop(association, None)
        if port:
            port.stop()

    # -- the reader thread of a relay socket

    def handle_packets(self, batch: Batch, local: DatagramSocket) -> None:
        arena, spans = batch
        forward = self._table.forward
        if len(spans) == 1 and len(spans[0][0]) == 1:  # a lone datagram takes the shortest way
            (offset,), length, _, _ = spans[0]
            entry, skip = self._look_up(arena, spans[0], local)
            if entry is not None:
                forward(arena, entry, Run([offset + skip], length - skip, length - skip))
            return
        runs = Runs(lambda entry, run: forward(arena, entry, run))
        add, begins_with = runs.add, arena.memory.startswith
        entry, sender, address, skip = None, None, b"", 0  # of the span before: most have the same
        for span in spans:
            offsets, length, last, peer = span
            if len(offsets) > 1 and not socks5.common_header(arena.memory, offsets, last):
                self._add_each(runs, arena, span, local)
                entry = None
                continue
            first = offsets[0] + socks5.FRAG_AT
            if entry is None or peer != sender or length < skip or not begins_with(address, first):
                entry, skip = self._look_up(arena, span, local)
                if entry is None:
                    continue
                sender, address = peer, arena.memory[first : offsets[0] + skip]
            add(entry, offsets, length, last, skip)
        runs.flush()

    def _add_each(self, runs: Runs, arena: Any, span: Span, local: DatagramSocket) -> None:
        """Datagrams that came together and have different headers."""
        offsets, length, last, peer = span
        for at in offsets:
            size = last if at == offsets[-1] else length
            entry, skip = self._look_up(arena, ((at,), size, size, peer), local)
            if entry is not None:
                runs.add(entry, (at,), size, size, skip)

    def _look_up(self, arena: Any, span: Span, local: DatagramSocket) -> tuple[Entry | None, int]:
        """The entry that the header of a span's datagrams leads to, and the header's length."""
        offsets, size, _, peer = span
        offset, count = offsets[0], len(offsets)
        memory = arena.memory
        skip = socks5.header_length(memory, offset) if size >= socks5.HEADER_SHORTEST else 0
        if not skip or skip > size:
            self._counter.count("drops", "malformed", count)
            return None, 0
        if memory[offset + socks5.FRAG_AT]:
            self._counter.count("drops", "fragment", count)
            return None, 0
        key = (peer, bytes(arena.view[offset + socks5.ATYP_AT : offset + skip]))
        return self._table.entries.get(key) or self._miss(key, local, count), skip

    def _miss(self, key: tuple[Hashable, bytes], local: DatagramSocket, count: int) -> Entry | None:
        """A new entry, or None, and then `count` datagrams have been counted."""
        peer, address = key
        client = self._table.clients.get(peer) or self._admit(peer, local)
        if client is None:
            self._counter.count("drops", "stranger", count)
            return None
        try:
            target = socks5.parse_target(address)
        except ProtocolError:
            self._counter.count("drops", "bad target", count)
            return None
        if not target.port:
            self._counter.count("drops", "bad target", count)
            return None
        flow = Flow("udp", client.address, target, self._listener, client.owner.user)
        return self._table.open(key, client, flow, self._router, count)

    def _admit(self, peer: Hashable, local: DatagramSocket) -> Client | None:
        endpoint = from_sockaddr(local.peer(peer))
        association = self._associations.claim(endpoint, local)
        if association is None:
            return None
        client = self._table.move_client(association, endpoint, peer)
        if client is None:
            client = Client(peer, endpoint, local, socks5.encode_header, association)
            self._table.add_client(client)
        if (
            association.ended
        ):  # while we were at it: close() may have looked for the client too early
            self._table.end(association)
            return None
        return client
