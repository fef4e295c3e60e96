"""A reader over bytes, and the checks that read each case of a codec in several ways.

A case is read whole, byte by byte, with more bytes behind it, and cut short at every byte.
BytesReader behaves like net.stream.Stream without a socket: bytes that the peer has sent and
the codec has not read are unread.
"""

from __future__ import annotations

from typing import Any, Callable

import pytest

from netproxy.errors import EndOfStream, LimitError, ProtocolError

TRAILING = b"\x05\x04\x00\r\n\r\nGET a"
"""Bytes that look like the start of several protocols."""

Read = Callable[["BytesReader"], Any]


class BytesReader:
    """A peer that sends `data`, `step` bytes at a time (0: all at once), and closes."""

    def __init__(self, data: bytes, step: int = 0) -> None:
        self._data = data
        self._step = step or len(data)
        self._unread = b""
        self.taken = 0
        """Bytes that the peer has sent."""

    def read_exactly(self, count: int) -> bytes:
        while len(self._unread) < count:
            if not self._fill():
                raise EndOfStream("closed too early", partial=bool(self._unread))
        return self._give(count)

    def read_until(self, separator: bytes, limit: int) -> bytes:
        while (found := self._unread.find(separator, 0, limit)) < 0:
            if len(self._unread) >= limit:
                raise LimitError("no end in sight")
            if not self._fill():
                raise EndOfStream("closed within a line", partial=bool(self._unread))
        return self._give(found + len(separator))

    def read_some(self, limit: int) -> bytes:
        if not self._unread:
            self._fill()
        return self._give(min(limit, len(self._unread)))

    def rest(self) -> bytes:
        """Return all that the codec has not read."""
        return self._unread + self._data[self.taken :]

    def _fill(self) -> bool:
        piece = self._data[self.taken : self.taken + self._step]
        self.taken += len(piece)
        self._unread += piece
        return bool(piece)

    def _give(self, count: int) -> bytes:
        data, self._unread = self._unread[:count], self._unread[count:]
        return data


def check_read(read: Read, data: bytes, expected: object) -> None:
    """Check that `data` reads as `expected` in all four ways; what follows stays unread."""
    for step in (0, 1):
        for trailing in (b"", TRAILING):
            reader = BytesReader(data + trailing, step)
            assert read(reader) == expected
            assert reader.rest() == trailing
    for cut in range(len(data)):
        with pytest.raises(EndOfStream) as caught:
            read(BytesReader(data[:cut]))
        assert cut or not caught.value.partial


def check_refused(
    read: Read, data: bytes, error: type[ProtocolError], **attributes: object
) -> None:
    """Check that `data` raises exactly `error` with `attributes`, without reading beyond it.

    Cut short, it raises any ProtocolError.
    """
    for step in (0, 1):
        for trailing in (b"", TRAILING):
            with pytest.raises(ProtocolError) as caught:
                read(BytesReader(data + trailing, step))
            assert type(caught.value) is error
            assert {name: getattr(caught.value, name) for name in attributes} == attributes
    for cut in range(len(data)):
        with pytest.raises(ProtocolError):
            read(BytesReader(data[:cut]))
