"""What a connection begins with: a PROXY header, TLS, and on an SPS port (smart proxy service) any client protocol.

A Gate stands before the handler of a listener that has the first two: both on the
connection's thread and under its handshake's deadline.  Only named peers send a PROXY
header, and these must: nothing is guessed.  What follows it is not read ahead, so that
TLS finds its first byte.  The protocols of one port are told apart by that byte;
datagrams to the same port number are SOCKS5's.
"""

from __future__ import annotations

import enum
from typing import Any, Callable, Container, Mapping

from netproxy.errors import LimitError, NeedsThread, ProtocolError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Handler, Wait
from netproxy.interfaces.datagrams import Batch
from netproxy.interfaces.services import Counter, Log
from netproxy.net.datagram_socket import DatagramSocket
from netproxy.net.stream import Stream
from netproxy.protocol.proxy_protocol import read_header

TUNNEL_FIRST = 0x9E  # of protocol.tunnel's magic, which few daemons need

Secure = Callable[[Stream], None]  # net.tls.accept with its context


class Speech(enum.Enum):
    SOCKS4 = "socks4"
    SOCKS5 = "socks5"
    HTTP = "http"
    TLS = "tls"
    TUNNEL = "tunnel"
    UNKNOWN = "unknown"


def detect(first: int) -> Speech:
    """What a client speaks whose first byte, 0-255, is `first`.

    SOCKS4 and SOCKS5 begin with their version, TLS with its handshake record type, HTTP with a letter of its
    method, an agent of a tunnel with a byte that is none of these; no two of them can be mistaken.
    """
    if first == 0x05:
        return Speech.SOCKS5
    if first == 0x04:
        return Speech.SOCKS4
    if first == 0x16:
        return Speech.TLS
    if 0x41 <= first <= 0x5A or 0x61 <= first <= 0x7A:
        return Speech.HTTP
    return Speech.TUNNEL if first == TUNNEL_FIRST else Speech.UNKNOWN


class SpsHandler:
    """Handler and PacketHandler.  Who speaks nothing in `handlers` is closed without a word, and counted."""

    def __init__(
        self, handlers: Mapping[Speech, Handler], packets: Any, counter: Counter, log: Log
    ) -> None:
        """`packets`: the PacketHandler for datagrams."""
        self._handlers = dict(handlers)
        self._attempts = {
            speech: handler.attempt
            for speech, handler in handlers.items()
            if hasattr(handler, "attempt")
        }
        self._packets = packets
        self._counter = counter
        self._log = log

    def handle(self, stream: Stream, client: Address) -> Wait | None:
        speech = detect(stream.peek())
        handler = self._handlers.get(speech)
        if handler is not None:
            return handler.handle(stream, client)
        self._counter.count("connections_refused", f"speaks {speech.value}")
        self._log.limited(
            (speech, client.host), "%s speaks %s to a plain proxy port", client.host, speech.value
        )
        return None

    def attempt(self, stream: Stream, client: Address) -> Wait | None:
        return stream.attempt(
            lambda: self._attempt(stream, client), lambda: self.handle(stream, client)
        )

    def _attempt(self, stream: Stream, client: Address) -> Wait | None:
        attempt = self._attempts.get(detect(stream.peek()))
        if attempt is None:
            raise NeedsThread
        return attempt(stream, client)

    def handle_packets(self, batch: Batch, local: DatagramSocket) -> None:
        self._packets.handle_packets(batch, local)


class Gate:
    """A Handler around another."""

    def __init__(
        self,
        inner: Any,
        proxies: Container[str],
        clients: Container[str] | None,
        secure: Secure | None,
        counter: Counter,
    ) -> None:
        """`proxies` send a PROXY header; who they speak for must be among `clients`, None for everybody."""
        self._inner: Handler = inner
        self._proxies = proxies
        self._clients = clients
        self._secure = secure
        self._counter = counter
        self.handle_packets: Callable[[Batch, DatagramSocket], None] = getattr(
            inner, "handle_packets", None
        )

    def handle(self, stream: Stream, client: Address) -> Wait | None:
        if client.host in self._proxies:
            client = read_header(_Exact(stream)) or client
            if self._clients is not None and client.host not in self._clients:
                self._counter.count("connections_refused", "client not allowed")
                return None
        if self._secure is not None:
            try:
                self._secure(stream)
            except ProtocolError:
                stream.close_staged()  # so that the client gets to read why
                raise
        return self._inner.handle(stream, client)


class _Exact:
    """A Reader that takes not one byte more than it is asked for."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def read_exactly(self, count: int) -> bytes:
        return self._stream.read_unbuffered(count)

    def read_until(self, separator: bytes, limit: int) -> bytes:
        data = b""
        while not data.endswith(separator):
            if len(data) >= limit:
                raise LimitError(f"no end within {limit} bytes")
            data += self._stream.read_unbuffered(1)
        return data
