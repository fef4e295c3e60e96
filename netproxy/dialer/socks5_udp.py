"""Datagrams through a SOCKS5 proxy: one association per client endpoint (RFC 1928 section 7).

A Socks5PacketConn wraps the packet connection of the hop before.  Each datagram goes to the
proxy's relay port behind a header that names its target.  The headers of several such hops
follow each other and are sent as one iovec; payloads are not copied.  When the control
connection ends, a worker makes another association.  The socket stays, and with it the port
that targets see, as far as the proxy preserves it.
"""

from __future__ import annotations

import threading
import time
from functools import partial

from netproxy.errors import DialError, ProtocolError
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, pack_ip
from netproxy.interfaces.datagrams import Batch
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.services import refuse_dropped
from netproxy.net.address import SourceAddresses, from_sockaddr
from netproxy.net.datagram import PinnedHeader
from netproxy.protocol import socks5
from netproxy.typed import TYPE_CHECKING, Hashable, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.dialer.direct import TargetResolver
    from netproxy.interfaces.datagrams import Deliverer, PacketDependencies
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import (
        Arena,
        Destination,
        Header,
        PacketConn,
        Run,
        SocketAddress,
        Span,
    )

RETRY_SECONDS = 2.0
"""Between two attempts to make another association."""
JOINED_LIMIT = 256
"""Joined headers that a destination keeps, one for each header of the next hop."""


class RelaySource(Protocol):
    """Opens UDP associations at one proxy.  dialer.socks5 has the implementation."""

    def associate(self) -> tuple[Stream, Address]:
        """Return a control connection with an association, and the address of its relay.

        Blocks.  Raises DialError.
        """

    def dial_relay(self, relay: Address) -> PacketConn:
        """Open a packet connection to a relay.  Blocks.  Raises DialError."""


class Socks5Destination:
    """A target, as the header that names it."""

    __slots__ = ("header", "sockaddr", "_joined")

    def __init__(self, target: Address) -> None:
        self.header = PinnedHeader(socks5.encode_header(target))
        self.sockaddr: SocketAddress = (target.host, target.port)
        self._joined: dict[bytes, PinnedHeader] = {}

    def before(self, header: Header) -> PinnedHeader:
        """Return this header followed by a header of the next hop."""
        joined = self._joined.get(header.data)
        if joined is None:
            if len(self._joined) >= JOINED_LIMIT:
                self._joined.clear()
            joined = self._joined[header.data] = PinnedHeader(self.header.data + header.data)
        return joined


class Socks5PacketConn:
    """A packet connection through a SOCKS5 proxy.

    One thread receives; any thread may send.
    """

    deliverer: Deliverer | None = None
    # The proxy tells where it receives, and not where it sends from.
    bound: Sequence[Address] = ()

    def __init__(
        self,
        source: RelaySource,
        target_resolver: TargetResolver | None,
        dependencies: PacketDependencies,
    ) -> None:
        """Make the association.  Raises DialError, and then nothing is left open.

        `target_resolver` looks the names of targets up; None leaves them to the proxy.
        """
        self._relay_source = source
        self._target_resolver = target_resolver
        self._dependencies = dependencies
        self._closed = False
        # Guards _reopening.
        self._lock = threading.Lock()
        self._reopening = False
        self._retry_at = 0.0
        self._sources = SourceAddresses(socks5.parse_target)
        self._relay: Destination | None = None
        """Where datagrams go; None while there is no association."""
        self._relay_host = ""
        """The only host whose datagrams count; "" if only the hop before knows its address."""
        self._control, bound = source.associate()
        self.member = self._control.member
        try:
            self._via = source.dial_relay(bound)
        except BaseException:
            self._control.close()
            raise
        self.wait = self._via.wait
        try:
            self._use(self._control, bound)
        except BaseException:
            self._via.close()
            raise

    def reaches(self, target: Address) -> bool:
        """Return True: the association is for all targets."""
        return True

    def prepare(self, flow: Flow) -> Socks5Destination:
        """Return the destination for the flow's target.

        May block for a name lookup.  Raises DialError.
        """
        resolver = self._target_resolver
        return Socks5Destination(resolver.addresses(flow)[0] if resolver else flow.target)

    def send(self, arena: Arena, run: Run, destination: Socks5Destination) -> None:
        """Send a run to the relay, as PacketConn.send.  Sets the run's header."""
        relay = self._relay
        if relay is None:
            refuse_dropped(self._dependencies.counter, "association lost", len(run.offsets))
            if time.monotonic() >= self._retry_at:
                self._reopen_soon()
            return
        run.header = destination.header if run.header is None else destination.before(run.header)
        self._via.send(arena, run, relay)

    def receive(self, arena: Arena) -> Batch:
        """Return what has arrived from the relay, without its headers."""
        spans: list[Span] = []
        for span in self._via.receive(arena).spans:
            offsets, length, last, peer = span
            if self._relay_host and self._via.source(peer).host != self._relay_host:
                refuse_dropped(self._dependencies.counter, "unknown sender", len(offsets))
            elif len(offsets) == 1 or (
                isinstance(offsets, range) and socks5.common_header(arena.memory, offsets, last)
            ):
                self._strip(arena, span, spans)
            else:
                for offset in offsets:
                    size = last if offset == offsets[-1] else length
                    self._strip(arena, ((offset,), size, size, peer), spans)
        return Batch(arena, spans)

    def source(self, peer: Hashable) -> Address:
        """Return the address that the key of a span stands for."""
        return self._sources[peer]

    def shutdown(self) -> None:
        """Wake the thread in wait(); the descriptor stays open until close()."""
        self._closed = True
        self._relay = None
        # The watch then finds the end of the control connection and closes it.
        self._control.shutdown()
        self._via.shutdown()

    def close(self) -> None:
        """Close the descriptor.  Only the thread that waits may call this."""
        self.shutdown()
        self._via.close()

    def _strip(self, arena: Arena, span: Span, spans: list[Span]) -> None:
        """Append a span without its header; its peer becomes the source that the header names."""
        offsets, length, last, _ = span
        memory, start = arena.memory, offsets[0]
        skip = socks5.header_length(memory, start) if last >= socks5.HEADER_SHORTEST else 0
        if not skip or skip > last:
            refuse_dropped(self._dependencies.counter, "malformed", len(offsets))
            return
        if memory[start + socks5.FRAG_AT]:
            refuse_dropped(self._dependencies.counter, "fragment", len(offsets))
            return
        source = bytes(memory[start + socks5.ATYP_AT : start + skip])
        try:
            self._sources.learn(source, spans)
        except ProtocolError:
            refuse_dropped(self._dependencies.counter, "malformed", len(offsets))
            return
        if len(offsets) == 1:
            spans.append(((start + skip,), length - skip, length - skip, source))
        else:
            payloads = range(start + skip, offsets[-1] + skip + 1, offsets[1] - start)
            spans.append((payloads, length - skip, last - skip, source))

    def _use(self, control: Stream, bound: Address) -> None:
        """Begin to use an association.  Raises DialError, and then `control` is closed."""
        try:
            relay = self._via.prepare(Flow("udp", UNSPECIFIED_ADDRESS, bound, "", ""))
            host = from_sockaddr(relay.sockaddr).host
            self._control, self._relay_host = control, host if pack_ip(host) is not None else ""
            self._relay = relay
            self._watch(control)
        except BaseException:
            self._relay = None
            control.close()
            raise

    def _watch(self, control: Stream) -> None:
        self._dependencies.watch(control, partial(self._control_readable, control))

    def _control_readable(self, control: Stream) -> None:
        """Watch on if bytes have come, which mean nothing; otherwise the association has ended."""
        if not self._closed and control.skip():
            self._watch(control)
            return
        control.close()
        self._relay = None
        # Within RETRY_SECONDS a proxy may have refused this way: the next datagram tries again.
        if time.monotonic() >= self._retry_at:
            self._reopen_soon()

    def _reopen_soon(self) -> None:
        with self._lock:
            if self._closed or self._reopening:
                return
            self._reopening = True
        if not self._dependencies.submit(self._reopen):
            self._reopening = False

    def _reopen(self) -> None:
        self._retry_at = time.monotonic() + RETRY_SECONDS
        try:
            self._use(*self._relay_source.associate())
        except DialError:
            # The session ends; the client's next datagram begins another one.
            self._via.shutdown()
        finally:
            self._reopening = False
        if self._closed:
            self.shutdown()
