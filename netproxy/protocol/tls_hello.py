"""Reads the server name and the ALPN protocols from the first bytes of a TLS connection.

A client of TLS names the server in its first message, the ClientHello (RFC 8446 section 4.1.2).
The message may be split over several records, and a record over several segments.  With
Encrypted Client Hello the name is that of the outer message (RFC 9849 section 4): the public
name.  The bytes are only looked at: nothing is decrypted or verified.  Pure; no I/O.
"""

from __future__ import annotations

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import pack_ip
from netproxy.protocol.host import HostError, parse_host
from netproxy.typed import NamedTuple

HANDSHAKE = 0x16
"""The first byte of a TLS connection: the content type of the record with the ClientHello."""
HELLO_LIMIT = 16384
"""Bytes of a connection that are looked at.  A ClientHello with post-quantum keys has 2,000."""
RECORDS_LIMIT = 256
"""Records that a ClientHello may be split over: each look at the bytes begins anew."""
_RECORD_HEADER, _MESSAGE_HEADER = 5, 4
_MAJOR_VERSION = 3
_CLIENT_HELLO = 1
_VERSION_AND_RANDOM = 2 + 32
_SESSION_ID_LIMIT = 32
_SERVER_NAME, _ALPN = 0, 16
_HOST_NAME = 0


class HelloError(ProtocolError):
    """The bytes are not a ClientHello, or one that exceeds the limits."""


class ClientHello(NamedTuple):
    """What a client of TLS says of the server that it wants."""

    name: str
    """The host name in its canonical text; "" if there is none, or an address stands there."""
    alpn: tuple[str, ...]
    """The names of application protocols, the preferred first; each byte is one character."""


# A record, and the messages that one or more records carry (RFC 8446 sections 5.1 and 4):
#   +------+---------+--------+------------------------------------------------------+
#   | 0x16 | version | length | fragment of: 0x01, length of 3 bytes, ClientHello     |
#   |  1   |    2    |   2    | length                                               |
#   +------+---------+--------+------------------------------------------------------+
def parse_client_hello(data: bytes) -> ClientHello | int:
    """Return the ClientHello that the bytes of a connection begin with.

    If the message is incomplete, returns how many bytes must have come before the next look.
    Raises HelloError for anything that is not a ClientHello.
    """
    message = b""
    at = 0
    for _ in range(RECORDS_LIMIT):
        header = data[at : at + _RECORD_HEADER]
        if (header and header[0] != HANDSHAKE) or (len(header) > 1 and header[1] != _MAJOR_VERSION):
            raise HelloError("not a TLS handshake")
        at += _RECORD_HEADER
        if len(header) < _RECORD_HEADER:
            return _more(at)
        length = int.from_bytes(header[3:], "big")
        if length == 0:
            raise HelloError("an empty TLS record")
        message += data[at : at + length]
        at = _more(at + length)
        if message and message[0] != _CLIENT_HELLO:
            raise HelloError("not a ClientHello")
        if len(message) >= _MESSAGE_HEADER:
            size = _MESSAGE_HEADER + int.from_bytes(message[1:_MESSAGE_HEADER], "big")
            if len(message) >= size:
                return _parse_message(message[_MESSAGE_HEADER:size])
            _more(size)
        if at > len(data):
            return at
    raise HelloError("a ClientHello of too many records")


def _more(needed: int) -> int:
    """Return how many bytes are needed.  Raises HelloError for more than may be looked at."""
    if needed > HELLO_LIMIT:
        raise HelloError("a ClientHello that is too long")
    return needed


# RFC 8446 section 4.1.2; one vector after another, each behind its length:
#   version 2, random 32, session id 1+n, cipher suites 2+n, compression methods 1+n,
#   extensions 2+n: (type 2, data 2+n)...
def _parse_message(message: bytes) -> ClientHello:
    fields = _Vectors(message, _VERSION_AND_RANDOM)
    session_id, suites, compression = fields.take(1), fields.take(2), fields.take(1)
    if len(session_id) > _SESSION_ID_LIMIT or not suites or len(suites) % 2 or not compression:
        raise HelloError("a ClientHello with a malformed field")
    # The extensions may be missing: RFC 5246 section 7.4.1.2.
    extensions = _Vectors(fields.take(2) if fields.left else b"")
    fields.end()
    found: dict[int, bytes] = {}
    while extensions.left:
        kind = extensions.number(2)
        if kind in found:
            raise HelloError("a ClientHello with an extension twice")
        found[kind] = extensions.take(2)
    name = _parse_server_name(found[_SERVER_NAME]) if _SERVER_NAME in found else ""
    return ClientHello(name, _parse_alpn(found[_ALPN]) if _ALPN in found else ())


# RFC 6066 section 3: a vector 2+n of (type 1, name 2+n); the one type is 0, a host name.
def _parse_server_name(extension: bytes) -> str:
    outer = _Vectors(extension)
    names = _Vectors(outer.take(2))
    outer.end()
    found: list[bytes] = []
    while names.left:
        kind, raw = names.number(1), names.take(2)
        if kind == _HOST_NAME:
            found.append(raw)
    if len(found) > 1:
        raise HelloError("a ClientHello with two host names")
    try:
        name = parse_host(found[0]) if found else ""
    except HostError:
        return ""
    # Section 3: addresses are not permitted.  Some clients send them.
    return "" if pack_ip(name) is not None else name


# RFC 7301 section 3.1: a vector 2+n of names 1+n, none of them empty.
def _parse_alpn(extension: bytes) -> tuple[str, ...]:
    outer = _Vectors(extension)
    names = _Vectors(outer.take(2))
    outer.end()
    found = []
    while names.left:
        found.append(names.take(1).decode("latin-1"))
    if not all(found):
        raise HelloError("a ClientHello with an empty protocol name")
    return tuple(found)


class _Vectors:
    """Bytes that are taken from the front.  All methods raise HelloError if too few are left."""

    def __init__(self, data: bytes, skipped: int = 0) -> None:
        self._data = data
        self._at = skipped

    @property
    def left(self) -> bool:
        """True if there are bytes left."""
        return self._at < len(self._data)

    def number(self, size: int) -> int:
        """Take a number of `size` bytes."""
        return int.from_bytes(self._bytes(size), "big")

    def take(self, size: int) -> bytes:
        """Take a vector, whose length stands before it in `size` bytes."""
        return self._bytes(self.number(size))

    def end(self) -> None:
        """Raise HelloError if there are bytes left."""
        if self.left:
            raise HelloError("a ClientHello with bytes behind its end")

    def _bytes(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) < size:
            raise HelloError("a ClientHello with a field that exceeds it")
        self._at += size
        return taken
