"""Opens the packets that come to a socket, and hands their datagrams to the flows.

The packets of a train are opened one by one where they lie in the arena; what was sealed in them
takes their place, so that a train of packets becomes a train of datagrams.
A packet that comes from elsewhere than those before must come from an address that is allowed.
Thread: one that reads a socket, and others for other sockets; the table has no lock of its own,
because a dictionary's own calls are atomic.
"""

from __future__ import annotations

from netproxy.errors import ProtocolError
from netproxy.interfaces.datagrams import Batch
from netproxy.interfaces.listeners import CLIENT_NOT_ALLOWED
from netproxy.interfaces.services import Refusal
from netproxy.protocol.tunnels.path import (
    HEADER,
    MESSAGES,
    OVERHEAD,
    TYPE,
    find_payload,
    parse_flow_number,
)
from netproxy.typed import TYPE_CHECKING, Hashable, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import Arena, Span
    from netproxy.interfaces.services import Counter
    from netproxy.tunnel.path.flows import PathFlow
    from netproxy.tunnel.path.keys import Epoch
    from netproxy.tunnel.path.path import Path
    from netproxy.tunnel.path.remote import Remote

LISTENER = "tunnel-path"
"""The listener in records of packets that are dropped."""

TRUNCATED, UNKNOWN, NO_FLOW, MALFORMED = (
    *("truncated", "unknown connection", "unknown flow"),
    "malformed",
)
"""Reasons to drop a packet, beside those of sealing.py, and CLIENT_NOT_ALLOWED."""


class Origin(Protocol):
    """The socket that packets come to."""

    def address(self, peer: Hashable) -> Address:
        """Return the address in the key of a peer."""

    def remote(self, peer: Hashable) -> Remote | None:
        """Return where packets to a peer are sent; None if its address is fixed."""

    def refused_by(self, peer: Hashable) -> str:
        """Return the key of the configuration that refuses packets of a peer; "" if none does."""


class _Train:
    """Datagrams of one flow that lie in a row, those but the last of one length."""

    __slots__ = ("flow", "address", "start", "length", "last", "count")

    def __init__(self, flow: PathFlow, start: int, length: int, address: bytes) -> None:
        self.flow = flow
        self.address = address
        self.start = start
        self.length = self.last = length
        self.count = 1

    def takes(self, flow: PathFlow, length: int, address: bytes) -> bool:
        """Return whether another datagram joins the train; then count it."""
        if (
            flow is not self.flow
            or not 0 < length <= self.length
            or self.last != self.length
            or address != self.address
        ):
            return False
        self.last = length
        self.count += 1
        return True

    def span(self, step: int) -> Span:
        """Return the datagrams, `step` bytes apart, as a span whose key is their address."""
        if self.count == 1:
            return (self.start,), self.length, self.length, self.address
        stop = self.start + (self.count - 1) * step + 1
        return range(self.start, stop, step), self.length, self.last, self.address


class PathTable:
    """The paths of one side, by the connection IDs of packets that come."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._epochs: dict[bytes, tuple[Path, Epoch]] = {}

    def add(self, path: Path, epoch: Epoch) -> None:
        """Accept packets of a key."""
        self._epochs[epoch.identifier] = path, epoch

    def retire(self, epoch: Epoch) -> None:
        """Accept packets of a key no more."""
        self._epochs.pop(epoch.identifier, None)

    def take(self, batch: Batch, origin: Origin) -> None:
        """Open the packets of a batch, and hand their datagrams over; never blocks."""
        arena = batch.arena
        found: dict[PathFlow, list[Span]] = {}
        for span in batch.spans:
            step = span[0][1] - span[0][0] if len(span[0]) > 1 else 0
            for train in self._open_span(arena, span, origin):
                found.setdefault(train.flow, []).append(train.span(step))
        for flow, spans in found.items():
            if not flow.deliver(Batch(arena, spans)):
                # It has just ended.
                count = sum(len(offsets) for offsets, _, _, _ in spans)
                self._drop(NO_FLOW, batch.spans[0][3], origin, count)

    def _open_span(self, arena: Arena, span: Span, origin: Origin) -> list[_Train]:
        offsets, length, last, peer = span
        trains: list[_Train] = []
        train: _Train | None = None
        final = len(offsets) - 1
        for index, at in enumerate(offsets):
            size = length if index < final else last
            opened = self._open(arena.view[at : at + size], peer, origin)
            if opened is None:
                train = None
                continue
            flow, start, count, address = opened
            if train is None or not train.takes(flow, count, address):
                train = _Train(flow, at + start, count, address)
                trains.append(train)
        return trains

    def _open(
        self, packet: memoryview, peer: Hashable, origin: Origin
    ) -> tuple[PathFlow, int, int, bytes] | None:
        """Open a packet where it lies.

        Return the flow of its datagram, where the payload begins in the packet, its bytes and its
        raw address; None if there is no datagram in it.
        """
        if len(packet) <= OVERHEAD or packet[0] != TYPE:
            is_cut = len(packet) > 0 and packet[0] == TYPE
            self._drop(TRUNCATED if is_cut else MALFORMED, peer, origin)
            return None
        _, identifier, counter = HEADER.unpack_from(packet)
        known = self._epochs.get(identifier)
        if known is None:
            self._drop(UNKNOWN, peer, origin)
            return None
        path, epoch = known
        if decided := _refused_by(path, peer, origin):
            self._drop(CLIENT_NOT_ALLOWED, peer, origin, decided=decided)
            return None
        plain, is_newest = path.open(epoch, packet, counter)
        if isinstance(plain, str):
            self._drop(plain, peer, origin)
            return None
        if is_newest:
            self._follow(path, len(packet), peer, origin)
        try:
            number, start = parse_flow_number(plain)
            if number == MESSAGES:
                path.take_message(plain, epoch, peer)
                return None
            flow = path.flows.get(number)
            if flow is not None:
                path.note_active()
                return _place(packet, plain, start, flow)
            path.no_flow(number)
            self._drop(NO_FLOW, peer, origin)
        except ProtocolError:
            self._drop(MALFORMED, peer, origin)
        return None

    @staticmethod
    def _follow(path: Path, size: int, peer: Hashable, origin: Origin) -> None:
        """Send to where the newest packet has come from, if the other side may move."""
        remote = path.remote
        if remote is None or remote.peer not in (None, peer):
            remote = origin.remote(peer)
            if remote is not None:
                remote.allow(size)
                path.follow(remote)
        elif not remote.validated:
            remote.allow(size)

    def _drop(
        self, reason: str, peer: Hashable, origin: Origin, count: int = 1, decided: str = ""
    ) -> None:
        if not self._counter.refuse_unrecorded("drops", reason, "", count):
            host = origin.address(peer).host
            refusal = Refusal("drops", reason, LISTENER, host, "a packet", decided, "udp")
            self._counter.refuse(refusal, count)


def _refused_by(path: Path, peer: Hashable, origin: Origin) -> str:
    """Return the key that refuses a peer to which the path does not lead, "" if none does.

    A path goes on to lead where it leads, as a connection goes on, whatever a reload has changed.
    """
    remote = path.remote
    if remote is not None and remote.peer in (None, peer):
        return ""
    return origin.refused_by(peer)


def _place(
    packet: memoryview, plain: bytes, start: int, flow: PathFlow
) -> tuple[PathFlow, int, int, bytes]:
    """Put what was sealed in the ciphertext's place; return as PathTable._open().

    The flow's part begins at `start`.  Raises ProtocolError.
    """
    end = find_payload(plain, start) if flow.is_addressed else start
    packet[HEADER.size : HEADER.size + len(plain)] = plain
    return flow, HEADER.size + end, len(plain) - end, plain[start:end]
