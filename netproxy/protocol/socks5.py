"""SOCKS5 (RFC 1928) and its user/password method (RFC 1929): the bytes of both roles.

Linear functions over a Reader for what comes in, pure encoders for what goes
out.  What a server reads is what the client functions beside it encode.  No I/O,
no policy: an unknown command is returned as it is, the handler refuses it.
"""

from __future__ import annotations

from typing import NamedTuple

from netproxy.errors import ProtocolError, Reason, ReplyTable
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address, ip_text, pack_ip
from netproxy.interfaces.connections import Reader, Steps
from netproxy.protocol.host import HostError, parse_host

VERSION = 5
NO_AUTHENTICATION, USERNAME_PASSWORD, NO_ACCEPTABLE = 0x00, 0x02, 0xFF
CONNECT, BIND, UDP_ASSOCIATE = 1, 2, 3
IPV4, NAME, IPV6 = 1, 3, 4
SUCCEEDED, GENERAL_FAILURE, NOT_ALLOWED, NETWORK_UNREACHABLE, HOST_UNREACHABLE = 0, 1, 2, 3, 4
REFUSED, TTL_EXPIRED, COMMAND_NOT_SUPPORTED, ADDRESS_NOT_SUPPORTED = 5, 6, 7, 8

REPLIES: ReplyTable = {
    Reason.GENERAL: GENERAL_FAILURE,
    Reason.DENIED: NOT_ALLOWED,
    Reason.NETWORK_UNREACHABLE: NETWORK_UNREACHABLE,
    Reason.HOST_UNREACHABLE: HOST_UNREACHABLE,
    Reason.NAME: HOST_UNREACHABLE,
    Reason.REFUSED: REFUSED,
    Reason.TIMEOUT: TTL_EXPIRED,
    Reason.UNSUPPORTED: COMMAND_NOT_SUPPORTED,
    Reason.AUTHENTICATION: GENERAL_FAILURE,
    Reason.PROTOCOL: GENERAL_FAILURE,
    Reason.LOOP: NOT_ALLOWED,
}
# the way back, for the client role: what a server's reply says about the dial
REASONS = {
    NOT_ALLOWED: Reason.DENIED,
    NETWORK_UNREACHABLE: Reason.NETWORK_UNREACHABLE,
    HOST_UNREACHABLE: Reason.HOST_UNREACHABLE,
    REFUSED: Reason.REFUSED,
    TTL_EXPIRED: Reason.TIMEOUT,
    COMMAND_NOT_SUPPORTED: Reason.UNSUPPORTED,
    ADDRESS_NOT_SUPPORTED: Reason.UNSUPPORTED,
}


class RequestError(ProtocolError):
    """A request that is answered with `reply` and closed."""

    def __init__(self, reply: int, message: str) -> None:
        super().__init__(message)
        self.reply = reply


class Socks5Request(NamedTuple):
    command: int
    target: Address


# +-----+----------+----------+      +-----+--------+
# | VER | NMETHODS | METHODS  |  ->  | VER | METHOD |
# +-----+----------+----------+      +-----+--------+
def read_methods(reader: Reader) -> Steps[bytes]:
    """The methods that a client offers, one byte each; may be none."""
    version, count = yield from reader.read_exactly(2)
    if version != VERSION:
        raise ProtocolError("not a SOCKS5 greeting")
    return (yield from reader.read_exactly(count))


def encode_methods(methods: bytes) -> bytes:
    return bytes((VERSION, len(methods))) + methods


def encode_method(method: int) -> bytes:
    return bytes((VERSION, method))


def read_method(reader: Reader) -> Steps[int]:
    version, method = yield from reader.read_exactly(2)
    if version != VERSION:
        raise ProtocolError("not a SOCKS5 server")
    return method


# RFC 1929
# +-----+------+----------+------+----------+      +-----+--------+
# | 01  | ULEN |  UNAME   | PLEN |  PASSWD  |  ->  | 01  | STATUS |
# +-----+------+----------+------+----------+      +-----+--------+
def read_credentials(reader: Reader) -> Steps[tuple[bytes, bytes]]:
    """User name and password; ProtocolError for another version or an empty field (RFC 1929: 1 to 255)."""
    version, length = yield from reader.read_exactly(2)
    if version != 1:
        raise ProtocolError("not RFC 1929")
    user = yield from reader.read_exactly(length)
    (length,) = yield from reader.read_exactly(1)
    password = yield from reader.read_exactly(length)
    if not user or not password:
        raise ProtocolError("empty user name or password")
    return user, password


def encode_credentials(user: str, password: str) -> bytes:
    """ValueError where either is empty or over 255 bytes of UTF-8."""
    raw = [user.encode(), password.encode()]
    if not all(0 < len(part) < 256 for part in raw):
        raise ValueError("user name and password take 1 to 255 bytes")
    return b"\1" + b"".join(bytes((len(part),)) + part for part in raw)


def encode_credentials_status(accepted: bool) -> bytes:
    return b"\1\0" if accepted else b"\1\1"


def read_credentials_status(reader: Reader) -> Steps[bool]:
    """Version 5 is taken as well: servers in use send it."""
    version, status = yield from reader.read_exactly(2)
    if version not in (1, VERSION):
        raise ProtocolError("not an RFC 1929 answer")
    return status == 0


# +-----+-----+-------+------+----------+----------+
# | VER | CMD |  RSV  | ATYP | DST.ADDR | DST.PORT |     reply: REP for CMD, BND for DST
# +-----+-----+-------+------+----------+----------+
def read_request(reader: Reader) -> Steps[Socks5Request]:
    """RSV may be anything.  RequestError 08 for an unknown ATYP, 04 for a name that is none.

    An ASSOCIATE's address is a hint that many clients fill with rubbish, so that there a name that is
    none reads as "0.0.0.0".
    """
    version, command, _, kind = yield from reader.read_exactly(4)
    if version != VERSION:
        raise ProtocolError("not a SOCKS5 request")
    raw = yield from _read_raw_address(reader, kind)
    try:
        return Socks5Request(command, _address(kind, raw))
    except HostError as error:
        if command == UDP_ASSOCIATE:
            return Socks5Request(command, Address("0.0.0.0", int.from_bytes(raw[-2:], "big")))
        raise RequestError(HOST_UNREACHABLE, str(error)) from error


def encode_request(command: int, target: Address) -> bytes:
    return bytes((VERSION, command, 0)) + encode_address(target)


def encode_reply(reply: int, bound: Address) -> bytes:
    return bytes((VERSION, reply, 0)) + encode_address(bound)


def read_reply(reader: Reader) -> Steps[tuple[int, Address]]:
    """REP and BND; a bound name that is none reads as "0.0.0.0"."""
    version, reply, _, kind = yield from reader.read_exactly(4)
    if version != VERSION:
        raise ProtocolError("not a SOCKS5 reply")
    if reply != SUCCEEDED and kind not in (IPV4, NAME, IPV6):
        return reply, UNSPECIFIED_ADDRESS  # some servers put nothing there when they refuse
    raw = yield from _read_raw_address(reader, kind)
    try:
        return reply, _address(kind, raw)
    except HostError:
        return reply, Address("0.0.0.0", int.from_bytes(raw[-2:], "big"))


def encode_address(address: Address) -> bytes:
    """ATYP, address and port; a scope (fe80::1%2) has no place in it."""
    host = address.host.partition("%")[0]
    packed = pack_ip(host)
    if packed is None:
        name = host.encode("ascii")
        return bytes((NAME, len(name))) + name + address.port.to_bytes(2, "big")
    return bytes((IPV4 if len(packed) == 4 else IPV6,)) + packed + address.port.to_bytes(2, "big")


# UDP (RFC 1928 section 7), both ways
# +------+------+------+----------+----------+----------+
# | RSV  | FRAG | ATYP | DST.ADDR | DST.PORT |   DATA   |
# |  2   |  1   |  1   | 4/1+n/16 |    2     |          |
# +------+------+------+----------+----------+----------+
HEADER_IPV4, HEADER_IPV6 = 10, 22
HEADER_SHORTEST = 8  # a name of one byte
ATYP_AT, FRAG_AT = 3, 2  # offsets in the header
FEW = 16  # datagrams up to which headers are compared one by one, as measured


def header_length(datagram: memoryview | bytearray | bytes, start: int = 0) -> int:
    """Bytes of header of the datagram at `start`, 0 for an unknown ATYP; at least 5 bytes must be there."""
    kind = datagram[start + ATYP_AT]
    if kind == IPV4:
        return HEADER_IPV4
    if kind == NAME:
        return 7 + datagram[start + ATYP_AT + 1]
    return HEADER_IPV6 if kind == IPV6 else 0


def common_header(memory: bytearray, offsets: range, last: int) -> int:
    """The length of the header that all datagrams at `offsets` have, 0 where they differ or one has none.

    `last` is the length of the final one, and none is shorter.
    """
    start, count, step = offsets.start, len(offsets), offsets.step
    if last < HEADER_SHORTEST:
        return 0
    skip = header_length(memory, start)
    if not skip or skip > last:
        return 0
    if count <= FEW:
        header = memory[start + FRAG_AT : start + skip]
        return skip if all([memory.startswith(header, at + FRAG_AT) for at in offsets]) else 0
    end = start + (count - 1) * step + last  # column by column: less work than one by one
    columns = range(start + FRAG_AT, start + skip)
    return skip if all([memory[at:end:step].count(memory[at]) == count for at in columns]) else 0


def parse_target(address: bytes) -> Address:
    """The target in ATYP, DST.ADDR and DST.PORT; HostError for a name that is none."""
    kind, length = address[0] if address else 0, len(address)
    if kind == NAME and length > 3 and length == 4 + address[1]:
        return _address(kind, address[2:])
    if (kind, length) in ((IPV4, 7), (IPV6, 19)):
        return _address(kind, address[1:])
    raise HostError("not ATYP, address and port")


def encode_header(source: Address) -> bytes:
    """The header before a datagram from, or to, `source`; FRAG 0."""
    return b"\0\0\0" + encode_address(source)


def _read_raw_address(reader: Reader, kind: int) -> Steps[bytes]:
    if kind == IPV4:
        return (yield from reader.read_exactly(6))
    if kind == IPV6:
        return (yield from reader.read_exactly(18))
    if kind == NAME:
        (length,) = yield from reader.read_exactly(1)
        return (yield from reader.read_exactly(length + 2))
    raise RequestError(ADDRESS_NOT_SUPPORTED, "unknown address type")


def _address(kind: int, raw: bytes) -> Address:
    host = parse_host(raw[:-2]) if kind == NAME else ip_text(raw[:-2])
    return Address(host, int.from_bytes(raw[-2:], "big"))
