"""One end of a control connection, as both sides have it: small messages, and a heartbeat.

Whoever reads it says when; sending may come from any thread.  A side that takes no
message at once, or has said nothing for DEAD seconds, is given up.
"""

from __future__ import annotations

import threading
import time
from typing import Iterator

from netproxy.errors import EndOfStream, ProtocolError, StreamError
from netproxy.net.stream import Stream
from netproxy.protocol import tunnel
from netproxy.protocol.tunnel import Message

HEARTBEAT = 10.0  # seconds between two pings
DEAD = 30.0  # without a byte, and the other side is taken for gone


def arrived(stream: Stream) -> Iterator[Message]:
    """The messages that are there whole, taken off a stream; ProtocolError."""
    while found := tunnel.next_message(stream.unread()):
        message, end = found
        stream.read_exactly(end)
        yield message


class Control:
    def __init__(self, stream: Stream, begun: bool = True) -> None:
        """`stream` has its handshake behind it, but for what begin() is told; until then nothing is sent."""
        stream.limit(None)
        self.stream = stream
        self.rtt = 0.0  # seconds, the last; 0: not known
        self.heard = self.answered = (
            time.monotonic()
        )  # the last byte, and the last answer to a ping
        self._ping_at = self.heard
        self._lock = threading.Lock()  # one message at a time; guards _held
        self._held: list[bytes] | None = None if begun else []  # messages that wait for begin()

    def send(self, data: bytes) -> None:
        """One message, or more; never waits: a side that has no room for it is given up, and its reader finds the end."""
        with self._lock:
            if self._held is not None:
                self._held.append(data)
                return
            try:
                whole = self.stream.write_some(data) == len(data)
            except StreamError:
                whole = False
        if not whole:
            self.stream.shutdown()

    def begin(self, data: bytes) -> None:
        """The end of the handshake, and after it what was to be sent meanwhile; StreamError."""
        with self._lock:
            held, self._held = self._held or [], None
            data = b"".join((data, *held))
            if self.stream.write_some(data) != len(data):
                raise StreamError("it takes nothing")

    def ping(self) -> None:
        self.send(tunnel.encode(tunnel.PING, time.monotonic_ns().to_bytes(tunnel.PING_SIZE, "big")))

    def beat(self, now: float) -> float:
        """Pings when it is time; the seconds until it wants to be called again.  StreamError where the other side is silent."""
        if now - self.heard >= DEAD:
            raise StreamError(f"silent for {DEAD:g} s")
        if now >= self._ping_at:
            self._ping_at = now + HEARTBEAT
            self.ping()
        return max(0.0, min(self._ping_at, self.heard + DEAD) - now)

    def receive(self) -> Iterator[Message]:
        """What has come, bar pings and their answers.  EndOfStream, ProtocolError, StreamError."""
        going_on = self.stream.read_ahead()
        self.heard = time.monotonic()
        for message in arrived(self.stream):
            if message.kind == tunnel.PING:
                self.send(tunnel.encode(tunnel.PONG, _ping(message.value)))
            elif message.kind == tunnel.PONG:
                self.answered = self.heard
                self.rtt = max(
                    0.0, (time.monotonic_ns() - int.from_bytes(_ping(message.value), "big")) / 1e9
                )
            else:
                yield message
        if not going_on:
            raise EndOfStream("closed", partial=bool(self.stream.unread()))

    def close(self, reason: int) -> None:
        """Says why it ends; whoever reads it finds the end."""
        self.send(tunnel.encode_number(tunnel.CLOSE, reason))
        self.stream.shutdown()


def _ping(value: bytes) -> bytes:
    if len(value) != tunnel.PING_SIZE:
        raise ProtocolError("not a ping")
    return value
