"""Readers over bytes, and the ways in which every case of a codec is tried.

A case is read whole, byte by byte, with more bytes behind it, and truncated at every byte,
so that it takes one line in a table.  A BytesReader behaves like net.stream.Stream without
a socket: what the codec has not asked for stays unread.
"""

from __future__ import annotations

from typing import Any, Callable, Generator, Iterator

import pytest

from netproxy.errors import EndOfStream, LimitError, ProtocolError
from netproxy.interfaces.connections import Steps
from netproxy.net.stream import complete
from netproxy.protocol.http.http1_message import Body, Framing

# Looks like the start of several protocols.
TRAILING = b"\x05\x04\x00\r\n\r\nGET a"

Read = Callable[["BytesReader"], Any]


class BytesReader:
    """A Reader of a peer that sends `data`, `step` bytes at a time (0: all at once), and closes.

    It has every byte at hand, so that its generators yield nothing.
    """

    def __init__(self, data: bytes, step: int = 0) -> None:
        self._data = data
        self._step = step or len(data)
        self._unread = b""
        # Bytes that the peer has sent.
        self.taken = 0

    def read_exactly(self, count: int) -> Steps[bytes]:
        yield from ()
        while len(self._unread) < count:
            if not self._receive():
                raise EndOfStream("closed too early", partial=bool(self._unread))
        return self._take(count)

    def read_until(self, separator: bytes, limit: int) -> Steps[bytes]:
        yield from ()
        while (at := self._unread.find(separator, 0, limit)) < 0:
            if len(self._unread) >= limit:
                raise LimitError("no separator within the limit")
            if not self._receive():
                raise EndOfStream("closed within a line", partial=bool(self._unread))
        return self._take(at + len(separator))

    def read_some(self, limit: int) -> Steps[bytes]:
        yield from ()
        if not self._unread:
            self._receive()
        return self._take(min(limit, len(self._unread)))

    def rest(self) -> bytes:
        """Return all bytes that the codec has not read."""
        return self._unread + self._data[self.taken :]

    def _receive(self) -> bool:
        received = self._data[self.taken : self.taken + self._step]
        self.taken += len(received)
        self._unread += received
        return bool(received)

    def _take(self, count: int) -> bytes:
        data, self._unread = self._unread[:count], self._unread[count:]
        return data


def read_body(reader: BytesReader, framing: Framing, status: int = 400) -> Iterator[bytes]:
    """Yield the pieces of a body."""
    body = Body(reader, framing, status)
    while piece := complete(body.read()):
        yield piece


def run(read: Read, reader: BytesReader) -> Any:
    """Return what a codec reads, whether it is a generator or a plain function."""
    result = read(reader)
    return complete(result) if isinstance(result, Generator) else result


def check_read(read: Read, data: bytes, expected: object) -> None:
    """Check that `data` is read as `expected`, and that the bytes behind it stay unread."""
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
    """Check that `data` raises exactly `error` with `attributes`, without more bytes.

    Truncated, it raises any ProtocolError.
    """
    for step in (0, 1):
        for trailing in (b"", TRAILING):
            with pytest.raises(ProtocolError) as caught:
                run(read, BytesReader(data + trailing, step))
            assert type(caught.value) is error
            assert {name: getattr(caught.value, name) for name in attributes} == attributes
    for cut in range(len(data)):
        with pytest.raises(ProtocolError):
            run(read, BytesReader(data[:cut]))
