"""Sends and receives messages and heartbeats on a control connection, for agent and bridge.

The owner of the connection decides when to read; any thread may send.  A peer that does not
take a message at once, or that has sent nothing for DEAD_SECONDS, is given up.
"""

from __future__ import annotations

import threading
import time

from netproxy.errors import EndOfStream, ProtocolError, StreamError
from netproxy.net.stream import complete
from netproxy.protocol import tunnel
from netproxy.typed import TYPE_CHECKING, Iterator

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.protocol.tunnel import TunnelMessage

HEARTBEAT_SECONDS = 10.0
"""Between two pings."""

DEAD_SECONDS = 30.0
"""A peer that has sent no byte for so long is dead."""


def take_messages(stream: Stream) -> Iterator[TunnelMessage]:
    """Take the complete messages among the unread bytes off a stream.  Raises ProtocolError."""
    while parsed := tunnel.parse_message(stream.unread()):
        message, end = parsed
        # All of them are there, so that nothing is waited for.
        complete(stream.read_exactly(end))
        yield message


class ControlConnection:
    """A control connection after its handshake."""

    def __init__(self, stream: Stream, begun: bool = True) -> None:
        """Take the stream over.

        Unless `begun`, the last bytes of the handshake are still to be sent: messages are held
        back until begin() sends both.
        """
        stream.limit(None)
        self.stream = stream
        self.rtt = 0.0
        """Seconds, of the last ping; 0 if not known."""
        self.last_received = self.last_pong = time.monotonic()
        """Monotonic seconds of the last byte, and of the last answer to a ping."""
        self._next_ping = self.last_received
        # When the first PING was sent since the last byte; None if nothing is waited for.
        self._asked: float | None = None
        # One message at a time; guards _held.
        self._lock = threading.Lock()
        self._held: list[bytes] | None = None if begun else []
        """Messages that wait for begin(), None after it."""

    def send(self, data: bytes) -> None:
        """Send one or more messages without blocking.  Thread: any.

        If the socket buffer is full the connection is shut down, and its reader sees the end.
        """
        with self._lock:
            if self._held is not None:
                self._held.append(data)
                return
            try:
                complete = self.stream.write_some(data) == len(data)
            except StreamError:
                complete = False
        if not complete:
            self.stream.shutdown()

    def begin(self, data: bytes) -> None:
        """Send the last bytes of the handshake and the messages held back.

        Raises StreamError.
        """
        with self._lock:
            held, self._held = self._held or [], None
            data = b"".join((data, *held))
            if self.stream.write_some(data) != len(data):
                raise StreamError("the socket buffer is full")

    def ping(self) -> None:
        """Send a PING that holds the time."""
        if self._asked is None:
            self._asked = time.monotonic()
        now = time.monotonic_ns().to_bytes(tunnel.PING_SIZE, "big")
        self.send(tunnel.encode_message(tunnel.PING, now))

    @property
    def asked(self) -> float | None:
        """When a PING was sent behind which nothing has come, in monotonic seconds; or None."""
        return self._asked

    def heartbeat(self, now: float) -> float:
        """Ping if it is time; return the seconds until the next call is due.

        `now` is in monotonic seconds.  Raises StreamError if the peer is dead.
        """
        if now - self.last_received >= DEAD_SECONDS:
            raise StreamError(f"silent for {DEAD_SECONDS:g} s")
        if now >= self._next_ping:
            self._next_ping = now + HEARTBEAT_SECONDS
            self.ping()
        return max(0.0, min(self._next_ping, self.last_received + DEAD_SECONDS) - now)

    def receive(self) -> Iterator[TunnelMessage]:
        """Receive without blocking; answer pings and yield all other messages.

        Raises EndOfStream, ProtocolError or StreamError.
        """
        is_open = self.stream.read_ahead()
        self.last_received, self._asked = time.monotonic(), None
        for message in take_messages(self.stream):
            if message.kind == tunnel.PING:
                self.send(tunnel.encode_message(tunnel.PONG, _ping_value(message)))
            elif message.kind == tunnel.PONG:
                self.last_pong = self.last_received
                sent = int.from_bytes(_ping_value(message), "big")
                self.rtt = max(0.0, (time.monotonic_ns() - sent) / 1e9)
            else:
                yield message
        if not is_open:
            raise EndOfStream("closed by the peer", partial=bool(self.stream.unread()))

    def close(self, reason: int) -> None:
        """Send a CLOSE message and shut the connection down; its reader sees the end."""
        self.send(tunnel.encode_number(tunnel.CLOSE, reason))
        self.stream.shutdown()


def _ping_value(message: TunnelMessage) -> bytes:
    if len(message.value) != tunnel.PING_SIZE:
        raise ProtocolError("a malformed PING or PONG message")
    return message.value
