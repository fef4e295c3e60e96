"""Datagrams through a SOCKS5 proxy: one ASSOCIATE for each client endpoint (RFC 1928 section 7).

A PacketConn around that of the hop before: each datagram goes to the proxy's relay
port behind a header that names its target.  Headers of several such hops lie one
behind the other and are sent as one iovec; payloads are not copied.  When the
control connection ends a worker makes another association; the socket, and so what
targets see of the client as far as the proxy lets them, stays.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, Hashable, Sequence

from netproxy.dialer.hop import Services
from netproxy.errors import DialError, ProtocolError
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.datagrams import Batch, PacketConn, Run, Span
from netproxy.interfaces.flows import Flow
from netproxy.net.address import SourceAddresses, from_sockaddr
from netproxy.net.datagram import PinnedHeader
from netproxy.net.stream import Stream
from netproxy.protocol import socks5

RETRY_SECONDS = 2.0  # between two tries to associate anew
NOBODY = Address("0.0.0.0", 0)  # the client of what a connection wants for itself
JOINED_LIMIT = 256  # headers of the hops behind this one that are kept joined to ours


class Socks5Destination:
    """A target, as the header that names it."""

    __slots__ = ("header", "sockaddr", "_joined")

    def __init__(self, target: Address) -> None:
        self.header = PinnedHeader(socks5.encode_header(target))
        self.sockaddr = (*target,)
        self._joined: dict[bytes, PinnedHeader] = {}

    def before(self, header: PinnedHeader) -> PinnedHeader:
        """Our header, and behind it that of the next hop."""
        joined = self._joined.get(header.data)
        if joined is None:
            if len(self._joined) >= JOINED_LIMIT:
                self._joined.clear()
            joined = self._joined[header.data] = PinnedHeader(self.header.data + header.data)
        return joined


class Socks5PacketConn:
    """`associate` opens a control connection and gives the relay's address, `reach` what leads there.

    `find` is None where names go to the proxy.
    """

    def __init__(
        self,
        associate: Callable[[], tuple[Stream, Address]],
        reach: Callable[[Address], PacketConn],
        find: Callable[[Flow], Sequence[Address]] | None,
        services: Services,
    ) -> None:
        """DialError."""
        self._associate = associate
        self._find = find
        self._services = services
        self._closed = False
        self._lock = threading.Lock()  # guards _reopening
        self._reopening = False
        self._retry_at = 0.0
        self._sources = SourceAddresses(socks5.parse_target)
        self._relay: Any = None  # None: the association is lost
        self._relay_host = (
            ""  # whose answers are taken; "" where only the hop before knows its address
        )
        self._control, bound = associate()
        try:
            self._via = reach(bound)
        except BaseException:
            self._control.close()
            raise
        self.wait = self._via.wait
        try:
            self._settle(self._control, bound)
        except BaseException:
            self._via.close()
            raise

    def prepare(self, flow: Flow) -> Socks5Destination:
        return Socks5Destination(self._find(flow)[0] if self._find else flow.target)

    def send(self, arena: Any, run: Run, destination: Socks5Destination) -> None:
        relay = self._relay
        if relay is None:
            self._services.counter.count("drops", "association lost", len(run.offsets))
            if time.monotonic() >= self._retry_at:
                self._reopen_soon()
            return
        run.header = destination.header if run.header is None else destination.before(run.header)
        self._via.send(arena, run, relay)

    def receive(self, arena: Any) -> Batch:
        found: list[Span] = []
        for span in self._via.receive(arena).spans:
            offsets, _, last, peer = span
            if self._relay_host and self._via.source(peer).host != self._relay_host:
                self._services.counter.count("drops", "stranger", len(offsets))
            elif len(offsets) == 1 or socks5.common_header(arena.memory, offsets, last):
                self._strip(arena, span, found)
            else:
                for at in offsets:
                    length = last if at == offsets[-1] else span[1]
                    self._strip(arena, ((at,), length, length, peer), found)
        return Batch(arena, found)

    def source(self, peer: Hashable) -> Address:
        return self._sources[peer]  # type: ignore[index]

    def shutdown(self) -> None:
        self._closed = True
        self._relay = None
        self._control.shutdown()  # whoever watches it closes it
        self._via.shutdown()

    def close(self) -> None:
        self.shutdown()
        self._via.close()

    def _strip(self, arena: Any, span: Span, found: list[Span]) -> None:
        """Adds a span without its header; its peer is then the source that the header names."""
        offsets, length, last, _ = span
        memory, at = arena.memory, offsets[0]
        skip = socks5.header_length(memory, at) if last >= socks5.HEADER_SHORTEST else 0
        if not skip or skip > last:
            self._services.counter.count("drops", "malformed", len(offsets))
            return
        if memory[at + socks5.FRAG_AT]:
            self._services.counter.count("drops", "fragment", len(offsets))
            return
        source = bytes(memory[at + socks5.ATYP_AT : at + skip])
        try:
            self._sources.learn(source, found)
        except ProtocolError:
            self._services.counter.count("drops", "malformed", len(offsets))
            return
        if len(offsets) == 1:
            found.append(((at + skip,), length - skip, length - skip, source))
        else:
            traffic = range(at + skip, offsets[-1] + skip + 1, offsets[1] - at)
            found.append((traffic, length - skip, last - skip, source))

    def _settle(self, control: Stream, bound: Address) -> None:
        """The association's way is there; DialError, and then the control connection is closed."""
        try:
            relay = self._via.prepare(Flow("udp", NOBODY, bound, "", ""))
            host = from_sockaddr(relay.sockaddr).host
            self._control, self._relay_host = control, host if pack_ip(host) is not None else ""
            self._relay = relay
            self._services.watch(control, lambda: self._control_said(control))
        except BaseException:
            self._relay = None
            control.close()
            raise

    def _control_said(self, control: Stream) -> None:
        """Nothing is due on a control connection but its end."""
        if not self._closed and control.skip():
            self._services.watch(control, lambda: self._control_said(control))
            return
        control.close()
        self._relay = None
        if (
            time.monotonic() >= self._retry_at
        ):  # else the next datagram does it: a proxy may refuse in this way
            self._reopen_soon()

    def _reopen_soon(self) -> None:
        with self._lock:
            if self._closed or self._reopening:
                return
            self._reopening = True
        if not self._services.submit(self._reopen):
            self._reopening = False

    def _reopen(self) -> None:
        self._retry_at = time.monotonic() + RETRY_SECONDS
        try:
            self._settle(*self._associate())
        except DialError:
            self._via.shutdown()  # the session ends, and the client's next datagram begins another
        finally:
            self._reopening = False
        if self._closed:
            self.shutdown()
