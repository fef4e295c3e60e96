"""SOCKS5 datagrams (RFC 1928 section 7): from the client to the target through the NAT table.

The raw header of a datagram is the key of an entry in the table.  A hit sends the payload at
once.  A miss asks which association the sender belongs to, parses the header, routes the flow
and makes the entry.  handle_packets() runs on the reader thread of a relay socket, open() and
close() on the threads of control connections.
"""

from __future__ import annotations

import struct
import time
from functools import partial

from netproxy.errors import ProtocolError
from netproxy.handler.datagrams.stream_udp import refuse_without_udp
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS
from netproxy.interfaces.datagrams import Run
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.services import Refusal
from netproxy.net.address import from_sockaddr
from netproxy.protocol import socks5
from netproxy.relay.association import Association, Associations
from netproxy.relay.client import Client
from netproxy.relay.coalesce import Runs
from netproxy.typed import TYPE_CHECKING, Callable, Hashable, NamedTuple, Protocol

if TYPE_CHECKING:
    from netproxy.handler.transparent.replies import ReplySockets
    from netproxy.access.permission import Permission
    from netproxy.handler.announce import Announcer
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import Arena, Batch, DatagramSocket, Span
    from netproxy.interfaces.routing import Router
    from netproxy.interfaces.services import Counter
    from netproxy.net.datagram import ArenaPool
    from netproxy.relay.entry import Entry
    from netproxy.relay.nat import NatTable


_IPV4_ADDRESS = struct.Struct(f"{socks5.HEADER_IPV4 - socks5.ATYP_AT}s")
"""The raw address in a header with ATYP 1: ATYP, DST.ADDR and DST.PORT."""
_DECIDED = {
    "malformed": "no header of RFC 1928 section 7",
    "fragment": "fragments are not supported",
    "unknown sender": "no association of the client expects this port",
    "bad target": "not a target",
}
"""What decides, for each reason that a datagram is dropped before it has an entry."""


class RelayState(NamedTuple):
    """What outlives a reload: the associations, and what they have open."""

    associations: Associations
    table: NatTable
    arenas: ArenaPool
    replies: ReplySockets | None = None
    """What replies leave by to clients that know of no proxy; None for all others."""


class RelayPort(Protocol):
    """A running listener for the datagrams of one association."""

    @property
    def local(self) -> DatagramSocket:
        """The socket that it reads."""

    def stop(self) -> None:
        """Stop and close it."""


class AnswerTaker(Protocol):
    """Takes answers to the daemon's own questions out of what comes to a relay socket."""

    def take(self, arena: Arena, span: Span, local: DatagramSocket) -> int:
        """Return how many datagrams of a span were answers.  Never blocks."""


class Socks5UdpRelay:
    """The UDP side of a SOCKS5 listener.  A PacketHandler.

    Before it serves, either `shared` or `open_port` must be set.
    """

    def __init__(
        self,
        permission: Permission,
        router: Router,
        state: RelayState,
        announcer: Announcer,
        counter: Counter,
    ) -> None:
        """`permission` is asked for each new target."""
        self._permission, self._listener = permission, permission.listener
        self.router = router
        self._associations, self._table = state.associations, state.table
        self._entries = self._table.entries
        self._announcer = announcer
        self._counter = counter
        self.shared: DatagramSocket | None = None
        """The listener's own socket, which all associations use."""
        self.open_port: Callable[[Socks5UdpRelay, str], RelayPort] | None = None
        """Opens a relay port on a host address for one association.  Raises DialError."""
        self.answers: AnswerTaker | None = None
        """Gets what is not of SOCKS5; None if the daemon asks nothing from this socket."""
        self._ports: dict[Association, RelayPort] = {}

    # -- control connections

    def open(self, flow: Flow, reached: Address) -> tuple[Association, Address]:
        """Make the association of a control connection; return it with BND.ADDR and BND.PORT.

        `flow.target` is the hint of the request; `reached` the local address of the connection.
        Raises DialError if no datagram could leave or no relay port is free.
        """
        refuse_without_udp(self.router, flow._replace(network="udp"))
        port = self.open_port(self, reached.host) if self.open_port else None
        local = self.shared if port is None else port.local
        assert local is not None
        association = Association(flow.client.host, flow.target.port, flow.user, local)
        association.stamp, association.reached = flow.stamp, reached
        if port is not None:
            self._ports[association] = port
        self._associations.add(association)
        is_shared = port is None
        bound = self._announcer.bound(flow.client, reached, local.address.port, shared=is_shared)
        return association, bound

    def close(self, association: Association) -> None:
        """End an association with its endpoints, sessions and upstreams."""
        if self._associations.remove(association, self._table) is None:
            self._table.end(association)
        port = self._ports.pop(association, None)
        if port is not None:
            port.stop()

    # -- the reader thread of a relay socket

    def handle_packets(self, batch: Batch, local: DatagramSocket) -> None:
        """Send datagrams of clients to their targets."""
        arena, spans = batch.arena, batch.spans
        if len(spans) == 1 and (len(spans[0][0]) == 1 or _has_one_header(arena, spans[0])):
            # A lone datagram, or a train, needs no coalescing.
            self._forward_span(arena, spans[0], local)
            return
        runs: Runs[Entry] = Runs(partial(self._table.forward, arena))
        add, begins_with = runs.add, arena.memory.startswith
        # Of the span before: most spans have the same sender and header.
        sender: Hashable = None
        entry, header, skip = None, bytearray(), 0
        for span in spans:
            offsets, length, last, peer = span
            if isinstance(offsets, range) and not socks5.common_header(arena.memory, offsets, last):
                self._add_each(runs, arena, span, local)
                entry = None
                continue
            first = offsets[0] + socks5.FRAG_AT
            if entry is None or peer != sender or length < skip or not begins_with(header, first):
                entry, skip = self._look_up(arena, span, local)
                if entry is None:
                    continue
                sender, header = peer, arena.memory[first : offsets[0] + skip]
            add(entry, offsets, length, last, skip)
        runs.flush()

    def _forward_span(self, arena: Arena, span: Span, local: DatagramSocket) -> None:
        """Send a datagram, or a train with one header, to its target."""
        entry, skip = self._look_up(arena, span, local)
        if entry is None:
            return
        offsets, length, last, _ = span
        if len(offsets) == 1:
            offsets = (offsets[0] + skip,)
        else:
            assert isinstance(offsets, range)
            offsets = range(offsets.start + skip, offsets.stop + skip, offsets.step)
        self._table.forward(arena, entry, Run(offsets, length - skip, last - skip))

    def _add_each(self, runs: Runs[Entry], arena: Arena, span: Span, local: DatagramSocket) -> None:
        """Add datagrams that came together but have different headers."""
        offsets, length, last, peer = span
        for offset in offsets:
            size = last if offset == offsets[-1] else length
            entry, skip = self._look_up(arena, ((offset,), size, size, peer), local)
            if entry is not None:
                runs.add(entry, (offset,), size, size, skip)

    def _look_up(self, arena: Arena, span: Span, local: DatagramSocket) -> tuple[Entry | None, int]:
        """Return the entry for the header of a span's datagrams, and the header's length."""
        offsets, size, _, peer = span
        offset, memory = offsets[0], arena.memory
        at = offset + socks5.ATYP_AT
        if size >= socks5.HEADER_IPV4 and memory[at] == socks5.IPV4:
            # Of most datagrams.
            skip = socks5.HEADER_IPV4
            (address,) = _IPV4_ADDRESS.unpack_from(memory, at)
        else:
            skip = socks5.header_length(memory, offset) if size >= socks5.HEADER_SHORTEST else 0
            if not skip or skip > size:
                self._drop_span("malformed", arena, span, local)
                return None, 0
            address = bytes(memory[at : offset + skip])
        if memory[offset + socks5.FRAG_AT]:
            self._drop_span("fragment", arena, span, local)
            return None, 0
        entry = self._entries.get((peer, address))
        return entry or self._miss(peer, address, local, len(offsets)), skip

    def _miss(
        self, peer: Hashable, address: bytes, local: DatagramSocket, count: int
    ) -> Entry | None:
        """Make the entry of a client and a raw address.

        Returns None if there is none to be had; the `count` datagrams have been counted then.
        """
        client = self._table.clients.get(peer) or self._admit(peer, local)
        if client is None:
            self._drop("unknown sender", peer, local, count)
            return None
        try:
            target = socks5.parse_target(address)
        except ProtocolError:
            target = UNSPECIFIED_ADDRESS
        if not target.port:
            self._drop("bad target", peer, local, count)
            return None
        association, user = client.owner, client.user
        assert isinstance(association, Association)
        sources, stamp = self._permission.sources, association.stamp
        source = None if sources is None else sources.of(user, association.local_address)
        flow = Flow("udp", client.address, target, self._listener, user, (), stamp, source)
        if self._permission.refuses(flow, count):
            return None
        return self._table.open((peer, address), client, flow, self.router, count)

    def _drop_span(self, reason: str, arena: Arena, span: Span, local: DatagramSocket) -> None:
        """Count and record datagrams without a header of SOCKS5, except answers to ourselves.

        A message of STUN has its length where FRAG and ATYP would be: it is never taken for one
        of SOCKS5.
        """
        count = len(span[0])
        if self.answers is not None:
            count -= self.answers.take(arena, span, local)
        if count:
            self._drop(reason, span[3], local, count)

    def _drop(self, reason: str, peer: Hashable, local: DatagramSocket, count: int) -> None:
        """Count and record datagrams that have no entry."""
        client = from_sockaddr(local.peer(peer)).host
        if self._counter.refuse_unrecorded("drops", reason, client, count):
            return
        decided = _DECIDED[reason]
        refusal = Refusal("drops", reason, self._listener, client, "", decided, "udp")
        self._counter.refuse(refusal, count)

    def _admit(self, peer: Hashable, local: DatagramSocket) -> Client | None:
        """Return the client of an endpoint that an association admits, None for all others."""
        endpoint = from_sockaddr(local.peer(peer))
        claim = self._associations.claim(endpoint, local, time.monotonic())
        if claim is None:
            return None
        association = claim.association
        if claim.displaced is not None:
            self._table.end_client(claim.displaced, "displaced")
        client = None
        if not claim.is_new:
            client = self._table.move_client(association, endpoint, peer)
        if client is None:
            wrap, user = socks5.encode_header, association.user
            client = Client(peer, endpoint, local, wrap, association, user)
            self._table.add_client(client)
            self._associations.note(association, client)
        if association.ended:
            # It has ended meanwhile, and close() may have looked for the client too early.
            self._table.end(association)
            return None
        return client


def _has_one_header(arena: Arena, span: Span) -> bool:
    """Return whether all datagrams of a train have the same header, and the last one more."""
    offsets, _, last, _ = span
    return isinstance(offsets, range) and (
        0 < socks5.common_header(arena.memory, offsets, last) < last
    )
