"""Readers over bytes, and the ways in which every codec case is tried.

A case is read whole, byte by byte, with more bytes behind it, and cut short at
every byte; its table stays one line a case.  BytesReader behaves like
net.stream.Stream without a socket: what it has taken and not given is unread.
"""

from __future__ import annotations

from typing import Any, Callable, Generator, Iterator

import pytest

from netproxy.errors import EndOfStream, LimitError, ProtocolError
from netproxy.interfaces.connections import Steps
from netproxy.net.stream import complete
from netproxy.protocol.http1_message import Body, Framing

TRAILING = b"\x05\x04\x00\r\n\r\nGET a"  # looks like the start of anything

Read = Callable[["BytesReader"], Any]


class BytesReader:
    """A peer that sends `data`, `step` bytes at a time (0: all at once), and closes."""

    def __init__(self, data: bytes, step: int = 0) -> None:
        self._data = data
        self._step = step or len(data)
        self._unread = b""
        self.taken = 0  # bytes that the peer got rid of

    def read_exactly(self, count: int) -> Steps[bytes]:
        while len(self._unread) < count:
            if not self._fill():
                raise EndOfStream("closed too early", partial=bool(self._unread))
        return self._give(count)
        yield  # a generator, though it never waits

    def read_until(self, separator: bytes, limit: int) -> Steps[bytes]:
        while (at := self._unread.find(separator, 0, limit)) < 0:
            if len(self._unread) >= limit:
                raise LimitError("no end in sight")
            if not self._fill():
                raise EndOfStream("closed within a line", partial=bool(self._unread))
        return self._give(at + len(separator))
        yield

    def read_some(self, limit: int) -> Steps[bytes]:
        if not self._unread:
            self._fill()
        return self._give(min(limit, len(self._unread)))
        yield

    def rest(self) -> bytes:
        """All that was not given to the codec."""
        return self._unread + self._data[self.taken :]

    def _fill(self) -> bool:
        piece = self._data[self.taken : self.taken + self._step]
        self.taken += len(piece)
        self._unread += piece
        return bool(piece)

    def _give(self, count: int) -> bytes:
        data, self._unread = self._unread[:count], self._unread[count:]
        return data


def read_body(reader: BytesReader, framing: Framing, status: int = 400) -> Iterator[bytes]:
    """The pieces of a body."""
    body = Body(reader, framing, status)
    while piece := complete(body.read()):
        yield piece


def run(read: Read, reader: BytesReader) -> Any:
    """What a codec reads, whether it is a generator or a plain function."""
    result = read(reader)
    return complete(result) if isinstance(result, Generator) else result


def check_read(read: Read, data: bytes, expected: object) -> None:
    """`data` reads as `expected` in all four ways; what comes behind it stays unread."""
    for step in (0, 1):
        for trailing in (b"", TRAILING):
            reader = BytesReader(data + trailing, step)
            assert run(read, reader) == expected
            assert reader.rest() == trailing
    for cut in range(len(data)):
        with pytest.raises(EndOfStream) as caught:
            run(read, BytesReader(data[:cut]))
        assert cut or not caught.value.partial


def check_refused(
    read: Read, data: bytes, error: type[ProtocolError], **attributes: object
) -> None:
    """`data` raises exactly `error` with `attributes`, without waiting for more; cut short, some ProtocolError."""
    for step in (0, 1):
        for trailing in (b"", TRAILING):
            with pytest.raises(ProtocolError) as caught:
                run(read, BytesReader(data + trailing, step))
            assert type(caught.value) is error
            assert {name: getattr(caught.value, name) for name in attributes} == attributes
    for cut in range(len(data)):
        with pytest.raises(ProtocolError):
            run(read, BytesReader(data[:cut]))
