"""The first bytes of a connection: a PROXY header, TLS, and on an SPS port any protocol.

SPS is the smart proxy service: one port number for all client protocols, told apart by
their first byte; datagrams to the same port number are SOCKS5's.  A Gate precedes the
handler of a listener with PROXY headers or TLS.  Only the configured peers send a PROXY
header, and these must: nothing is guessed.  No byte behind the header is read, so that
TLS finds its first byte.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Callable, Mapping, TypeAlias

from netproxy.errors import ProtocolError
from netproxy.interfaces.connections import Blocking
from netproxy.net.stream import ExactReader
from netproxy.protocol.proxy_protocol import read_header

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Handler, Handshake, Stream
    from netproxy.interfaces.datagrams import Batch, DatagramSocket, PacketHandler
    from netproxy.interfaces.networks import HostSet
    from netproxy.interfaces.services import Counter, Log

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
    with a letter of its method, a tunnel's agent with a byte that is none of these.
    """
    if first == 0x05:
        return ClientProtocol.SOCKS5
    if first == 0x04:
        return ClientProtocol.SOCKS4
    if first == 0x16:
        return ClientProtocol.TLS
    if 0x41 <= first <= 0x5A or 0x61 <= first <= 0x7A:
        return ClientProtocol.HTTP
    return ClientProtocol.TUNNEL if first == TUNNEL_FIRST else ClientProtocol.UNKNOWN


class SpsHandler:
    """Handler and PacketHandler.  A protocol without a handler is closed and counted."""

    def __init__(
        self,
        handlers: Mapping[ClientProtocol, Handler],
        packets: PacketHandler | None,
        counter: Counter,
        log: Log,
    ) -> None:
        """`packets` handles datagrams; None without UDP."""
        self._handlers = dict(handlers)
        self._packets = packets
        self._counter = counter
        self._log = log

    def handle(self, stream: Stream, client: Address) -> Handshake:
        """Hand the connection to the handler of its protocol."""
        protocol = detect((yield from stream.peek()))
        handler = self._handlers.get(protocol)
        if handler is not None:
            return (yield from handler.handle(stream, client))
        self._counter.count("connections_refused", f"speaks {protocol.value}")
        self._log.limited(
            (protocol, client.host),
            "%s speaks %s to a plain proxy port",
            client.host,
            protocol.value,
        )
        return None

    def handle_packets(self, batch: Batch, local: DatagramSocket) -> None:
        """Handle datagrams."""
        if self._packets is not None:
            self._packets.handle_packets(batch, local)


class Gate:
    """Handler: reads a PROXY header and makes the TLS handshake before another handler."""

    def __init__(
        self,
        handler: Handler,
        proxies: HostSet,
        clients: HostSet | None,
        tls: TlsHandshake | None,
        counter: Counter,
    ) -> None:
        """`proxies` send a PROXY header; the client that it names must be among `clients`.

        `clients` None: every client may come.
        """
        self._handler = handler
        self._proxies = proxies
        self._clients = clients
        self._tls = tls
        self._counter = counter

    def handle(self, stream: Stream, client: Address) -> Handshake:
        """Handle a connection; the inner handler sees the client of the PROXY header."""
        if client.host in self._proxies:
            client = (yield from read_header(ExactReader(stream))) or client
            if self._clients is not None and client.host not in self._clients:
                self._counter.count("connections_refused", "client not allowed")
                return None
        tls = self._tls
        if tls is not None:
            try:
                yield Blocking(lambda: tls(stream))
            except ProtocolError:
                yield from stream.close_staged()  # so that the client gets to read why
                raise
        return (yield from self._handler.handle(stream, client))
