"""The first bytes of a connection: a PROXY header, TLS, and the protocol on an SPS port.

SPS is the smart proxy service: one port number for all client protocols, which their first
byte tells apart.  Datagrams to the same port number are those of SOCKS5.  A Gate precedes
the handler of a listener with PROXY headers or TLS.  The configured peers must send a PROXY
header, and no other peer may.  No byte behind the header is read, because TLS needs it.
"""

from __future__ import annotations

import enum
from functools import partial

from netproxy.errors import DeadlineError, EndOfStream, LimitError, ProtocolError
from netproxy.interfaces.connections import Blocking, Progress
from netproxy.interfaces.listeners import CLIENT_NOT_ALLOWED
from netproxy.interfaces.services import Refusal
from netproxy.typed import TYPE_CHECKING, Callable, Mapping, TypeAlias

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Handler, Handshake, Ready, Steps, Stream, Watched
    from netproxy.interfaces.datagrams import Batch, DatagramSocket, PacketHandler
    from netproxy.interfaces.listeners import AllowedClients
    from netproxy.interfaces.networks import HostSet
    from netproxy.interfaces.services import Counter

# The first byte of protocol.tunnel's magic; that module is loaded only if a tunnel needs it.
TUNNEL_FIRST = 0x9E

TlsHandshake: TypeAlias = "Callable[[Stream], None]"
"""Makes the TLS handshake of a connection; blocks.  Raises ProtocolError, StreamError."""


class ClientProtocol(enum.Enum):
    """What a client speaks; the value is the word in logs and counters."""

    SOCKS4 = "socks4"
    SOCKS5 = "socks5"
    HTTP = "http"
    TLS = "tls"
    TUNNEL = "tunnel"
    UNKNOWN = "unknown"


def detect(first: int) -> ClientProtocol:
    """Return the protocol of a client whose first byte, 0-255, is `first`.

    SOCKS4 and SOCKS5 begin with their version, TLS with its record type "handshake", HTTP
    with a letter of its method or an empty line (RFC 9112 section 2.2), a tunnel's agent with
    a byte that is none of these.
    """
    if first == 0x05:
        return ClientProtocol.SOCKS5
    if first == 0x04:
        return ClientProtocol.SOCKS4
    if first == 0x16:
        return ClientProtocol.TLS
    if 0x41 <= first <= 0x5A or 0x61 <= first <= 0x7A or first == 0x0D:
        return ClientProtocol.HTTP
    return ClientProtocol.TUNNEL if first == TUNNEL_FIRST else ClientProtocol.UNKNOWN


class SpsHandler:
    """Serves all client protocols on one port number.  A Handler and a PacketHandler.

    A client whose protocol has no handler is closed and counted.
    """

    def __init__(
        self,
        handlers: Mapping[ClientProtocol, Handler],
        packets: PacketHandler | None,
        counter: Counter,
        listener: str,
    ) -> None:
        """Serve `handlers` of `listener`.  `packets` handles datagrams; None without UDP."""
        self._handlers = dict(handlers)
        # By the first byte: an enum as a key is hashed by Python code each time.
        self._by_first = [handlers.get(detect(first)) for first in range(256)]
        self._packets = packets
        self._counter = counter
        self._listener = listener

    def handle(self, stream: Stream, client: Address) -> Handshake:
        """Hand the connection to the handler of its protocol."""
        first = yield from stream.peek()
        handler = self._by_first[first]
        if stream.trace is not None:
            stream.trace.step("protocol", protocol=detect(first).value)
        if handler is not None:
            return (yield from handler.handle(stream, client))
        protocol = detect(first)
        spoken = f"speaks {protocol.value}"
        known = self._handlers.keys() - {ClientProtocol.UNKNOWN}
        served = ", ".join(sorted(protocol.value for protocol in known))
        decided = f"the port serves {served}"
        self._counter.refuse(
            Refusal("connections_refused", spoken, self._listener, client.host, "", decided)
        )
        return None

    def handle_packets(self, batch: Batch, local: DatagramSocket) -> None:
        """Hand datagrams to the handler of SOCKS5 datagrams.  Thread: the listener's reader."""
        if self._packets is not None:
            self._packets.handle_packets(batch, local)


class LateHandler:
    """Hands connections to a handler that is made for the first one.  A Handler.

    The modules of the handler take no memory until then.
    """

    def __init__(self, make: Callable[[], Handler]) -> None:
        """`make` may block, because it loads modules.

        It may raise CannotLoad, which ends the connection; the next one tries again.  Two first
        connections at once may both call it: one of the handlers serves the others.
        """
        self._make = make
        self._handler: Handler | None = None

    def handle(self, stream: Stream, client: Address) -> Handshake:
        """Hand the connection on."""
        if self._handler is None:
            self._handler = yield Blocking(self._make)
        return (yield from self._handler.handle(stream, client))


class Gate:
    """Reads a PROXY header and makes the TLS handshake before another handler.  A Handler."""

    def __init__(
        self,
        handler: Handler,
        proxies: HostSet,
        clients: AllowedClients,
        tls: TlsHandshake | None,
        counter: Counter,
        listener: str,
    ) -> None:
        """`proxies` send a PROXY header; the client that it names must be among `clients`.

        `listener` is the name in records.
        """
        from netproxy.protocol.proxy_protocol import read_header  # late: few listeners need it

        self._read_header = read_header
        self._handler = handler
        self._proxies = proxies
        self._clients = clients
        self._tls = tls
        self._counter = counter
        self._listener = listener

    def handle(self, stream: Stream, client: Address) -> Handshake:
        """Handle a connection; the inner handler sees the client of the PROXY header."""
        if client.host in self._proxies:
            client = (yield from self._read_header(ExactReader(stream))) or client
            if decided := self._clients.refused_by(client.host):
                key = "connections_refused", CLIENT_NOT_ALLOWED
                self._counter.refuse(Refusal(*key, self._listener, client.host, "", decided))
                return None
        tls = self._tls
        if tls is not None:
            try:
                yield Blocking(partial(tls, stream))
            except ProtocolError:
                # The client reads the alert that says why.
                yield from stream.close_staged()
                raise
        return (yield from self._handler.handle(stream, client))


class ExactReader:
    """A Reader that receives no byte behind those it returns, and the need for its bytes.

    TLS, which reads the socket itself, needs the bytes that follow.  Bytes that an sni listener
    has left unread come first.
    """

    light = True

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._missing = 0
        self._received = b""

    def begin(self) -> bool | Progress:
        """Return whether bytes came, or PENDING.  Raises DeadlineError, StreamError."""
        if self._stream.watched()[1] == 0.0:
            raise DeadlineError("out of time")
        received = self._stream.receive(self._missing)
        if received is None:
            return Progress.PENDING
        self._received = bytes(received)
        return bool(received)

    def watched(self) -> tuple[Watched, float | None]:
        """Watch for bytes until the stream's deadline."""
        return self._stream.watched()

    def proceed(self, ready: Ready) -> bool | Progress:
        """Return as begin()."""
        if not ready:
            raise DeadlineError("out of time")
        return self.begin()

    def block(self) -> bool:
        """Not reached: the need never asks for a thread."""
        raise AssertionError

    def read_exactly(self, count: int) -> Steps[bytes]:
        """Read `count` bytes.  Raises EndOfStream."""
        ahead = min(count, len(self._stream.unread()))
        data = (yield from self._stream.read_exactly(ahead)) if ahead else b""
        while len(data) < count:
            self._missing = count - len(data)
            if not (yield self):
                message = f"closed after {len(data)} of {count} bytes"
                raise EndOfStream(message, partial=bool(data))
            data += self._received
        return data

    def read_until(self, separator: bytes, limit: int) -> Steps[bytes]:
        """Read up to and including `separator`.  Raises LimitError, EndOfStream."""
        data = b""
        while not data.endswith(separator):
            if len(data) >= limit:
                raise LimitError(f"no end within {limit} bytes")
            data += yield from self.read_exactly(1)
        return data
