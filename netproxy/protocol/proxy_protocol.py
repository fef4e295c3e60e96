"""The PROXY protocol, versions 1 and 2 (haproxy doc/proxy-protocol.txt): the bytes of both roles.

A proxy sends a header before anything else, which names the client of the connection.  On a
listener that expects the header it is mandatory; the listener decides which peers are believed,
and how long it waits for the header.  Upstreams and fixed targets may get one.  No I/O of its own.
"""

from __future__ import annotations

import re

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import V4_MAPPED_PREFIX, Address, ip_text, pack_ip
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Reader, Steps

# Section 2.1: bytes of the longest line of version 1, with its CRLF.
LINE_LIMIT = 107
# Bytes behind the first 16 of version 2: 216 of UNIX paths, and TLVs with room for the names
# of a certificate.
BLOCK_LIMIT = 4096
PREFIX = b"PROXY "
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
VERSION, LOCAL, PROXY = 0x20, 0, 1
UNSPEC, TCP4, UDP4, TCP6, UDP6 = 0x00, 0x11, 0x12, 0x21, 0x22
UNIX_STREAM, UNIX_DATAGRAM = 0x31, 0x32

# Bytes of both addresses and ports, and of one address.
_BLOCKS = {UNSPEC: 0, TCP4: 12, UDP4: 12, TCP6: 36, UDP6: 36, UNIX_STREAM: 216, UNIX_DATAGRAM: 216}
_IP_SIZES = {TCP4: 4, UDP4: 4, TCP6: 16, UDP6: 16}
_LINE = re.compile(
    rb"(?:UNKNOWN(?: [^\r\n]*)?"
    rb"|TCP([46]) ([0-9A-Fa-f:.]+) ([0-9A-Fa-f:.]+) (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4}))\r\n\Z"
)


def read_header(reader: Reader) -> Steps[Address | None]:
    """Read a header and nothing behind it; return the address of the client.

    Returns None if the peer speaks for itself or its client has no IP address.
    Raises ProtocolError for anything else.  One byte is enough to refuse a client of SOCKS or
    TLS that sends no header and waits for an answer.
    """
    first = yield from reader.read_exactly(1)
    if first == PREFIX[:1]:
        return (yield from _read_line(reader))
    if first == SIGNATURE[:1]:
        return (yield from _read_block(reader))
    raise ProtocolError("no PROXY protocol header")


# Version 1 (section 2.1): one line of ASCII
#   PROXY TCP4 <source> <destination> <source port> <destination port> CRLF        or TCP6
#   PROXY UNKNOWN [ anything ] CRLF
def _read_line(reader: Reader) -> Steps[Address | None]:
    """Read a header of version 1 behind its first byte."""
    if (yield from reader.read_exactly(len(PREFIX) - 1)) != PREFIX[1:]:
        raise ProtocolError("no PROXY protocol header")
    match = _LINE.match((yield from reader.read_until(b"\r\n", LINE_LIMIT - len(PREFIX))))
    if not match:
        raise ProtocolError("not a PROXY protocol line")
    if match[1] is None:
        return None
    size = 4 if match[1] == b"4" else 16
    source, destination = pack_ip(match[2].decode("ascii")), pack_ip(match[3].decode("ascii"))
    if source is None or destination is None or not len(source) == len(destination) == size:
        raise ProtocolError("not two addresses of the line's family")
    port = int(match[4])
    if port > 65535 or int(match[5]) > 65535:
        raise ProtocolError("not a port")
    return Address(ip_text(source), port)


# Version 2 (section 2.2); LEN counts what follows it
# +-----------+---------+-----+-----+----------+----------+----------+----------+------+
# | SIGNATURE | VER/CMD | FAM | LEN | SRC.ADDR | DST.ADDR | SRC.PORT | DST.PORT | TLVs |
# |    12     |    1    |  1  |  2  |   4/16   |   4/16   |    2     |    2     |      |
# +-----------+---------+-----+-----+----------+----------+----------+----------+------+
def _read_block(reader: Reader) -> Steps[Address | None]:
    """Read a header of version 2 behind its first byte.

    LOCAL has its family ignored (section 2.2); LEN skips everything that comes with it.
    """
    head = SIGNATURE[:1] + (yield from reader.read_exactly(15))
    version, command, family = head[12] & 0xF0, head[12] & 0x0F, head[13]
    length = int.from_bytes(head[14:], "big")
    if not head.startswith(SIGNATURE) or version != VERSION or command not in (LOCAL, PROXY):
        raise ProtocolError("no PROXY protocol header")
    if length > BLOCK_LIMIT:
        raise ProtocolError("PROXY protocol header too long")
    if command == PROXY and length < _BLOCKS.get(family, BLOCK_LIMIT + 1):
        raise ProtocolError("unknown address family, or no room for its addresses")
    block = yield from reader.read_exactly(length)
    if command == LOCAL or family not in _IP_SIZES:
        return None
    size = _IP_SIZES[family]
    return Address(ip_text(block[:size]), int.from_bytes(block[2 * size : 2 * size + 2], "big"))


def encode_header(version: str, source: Address, destination: Address) -> bytes:
    """Encode the header of a TCP connection, "v1" or "v2".

    It names no addresses (UNKNOWN, LOCAL) if there is no client with an IP address and a port, as
    for a connection of the daemon's own, or if the destination is a name.
    """
    try:
        pair = _pack_pair(source, destination)
    except ValueError:
        pair = None
    if pair is None or not source.port:
        if version == "v1":
            return PREFIX + b"UNKNOWN\r\n"
        return SIGNATURE + bytes((VERSION | LOCAL, UNSPEC)) + b"\0\0"
    if version == "v2":
        return encode_v2(source, destination)
    # An IPv6 address in eight groups: section 2.1 allows no dots, not even in a v4-mapped one.
    hosts = [ip_text(host) if len(host) == 4 else host.hex(":", 2) for host in pair]
    family = "TCP4" if len(pair[0]) == 4 else "TCP6"
    return f"PROXY {family} {' '.join(hosts)} {source.port} {destination.port}\r\n".encode("ascii")


def encode_v2(source: Address, destination: Address, datagram: bool = False) -> bytes:
    """Encode a header of version 2 without TLVs.  Raises ValueError if either host is a name."""
    addresses = _pack_pair(source, destination)
    if len(addresses[0]) == 4:
        family = UDP4 if datagram else TCP4
    else:
        family = UDP6 if datagram else TCP6
    head = SIGNATURE + bytes((VERSION | PROXY, family)) + _BLOCKS[family].to_bytes(2, "big")
    ports = source.port.to_bytes(2, "big") + destination.port.to_bytes(2, "big")
    return head + b"".join(addresses) + ports


def _pack_pair(source: Address, destination: Address) -> tuple[bytes, bytes]:
    """Return both hosts in one family: beside IPv6, IPv4 goes v4-mapped.

    A header has no room for a scope (fe80::1%2).  Raises ValueError for a name.
    """
    first, second = (pack_ip(address.host.partition("%")[0]) for address in (source, destination))
    if first is None or second is None:
        raise ValueError("a PROXY protocol header takes addresses, not names")
    if len(first) == len(second):
        return first, second
    return (V4_MAPPED_PREFIX + first)[-16:], (V4_MAPPED_PREFIX + second)[-16:]
