"""SOCKS5 (RFC 1928) and its user/password method (RFC 1929): the bytes of both roles.

`read_` functions are generators over a Reader, `encode_` and `parse_` functions are pure.
The server reads what the client functions beside it encode.  No I/O of its own, no policy:
an unknown command is returned as it is, and the handler refuses it.
"""

from __future__ import annotations

from socket import AF_INET, inet_ntop

from netproxy.errors import ProtocolError, Reason, ReplyTable
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address, ip_text, pack_ip
from netproxy.protocol.host import HostError, parse_host
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Reader, Steps

VERSION = 5
# Of the user/password method (RFC 1929).
CREDENTIALS_VERSION = 1
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
    Reason.LIMIT: NOT_ALLOWED,
}
# For the client role: the reason of the DialError for a server's reply.
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
    """A request that is answered with `reply`; then the connection is closed."""

    def __init__(self, reply: int, message: str) -> None:
        super().__init__(message)
        self.reply = reply


class Socks5Request(NamedTuple):
    """A request: CONNECT, BIND or UDP ASSOCIATE, or a command that the handler refuses."""

    command: int
    target: Address


# Methods (RFC 1928 section 3)
# +-----+----------+----------+      +-----+--------+
# | VER | NMETHODS | METHODS  |  ->  | VER | METHOD |
# |  1  |    1     | 0 to 255 |      |  1  |   1    |
# +-----+----------+----------+      +-----+--------+
def read_methods(reader: Reader) -> Steps[bytes]:
    """Read the methods that a client offers, one byte each; possibly none.

    Raises ProtocolError.
    """
    version, count = yield from reader.read_exactly(2)
    if version != VERSION:
        raise ProtocolError("not a SOCKS5 greeting")
    return (yield from reader.read_exactly(count))


def encode_methods(methods: bytes) -> bytes:
    """Encode the methods that a client offers."""
    return bytes((VERSION, len(methods))) + methods


def encode_method(method: int) -> bytes:
    """Encode the method that the server has chosen."""
    return bytes((VERSION, method))


def read_method(reader: Reader) -> Steps[int]:
    """Read the method that the server has chosen.  Raises ProtocolError."""
    version, method = yield from reader.read_exactly(2)
    if version != VERSION:
        raise ProtocolError("not a SOCKS5 server")
    return method


# Credentials (RFC 1929 section 2)
# +-----+------+----------+------+----------+      +-----+--------+
# | VER | ULEN |  UNAME   | PLEN |  PASSWD  |  ->  | VER | STATUS |
# |  1  |  1   | 1 to 255 |  1   | 1 to 255 |      |  1  |   1    |
# +-----+------+----------+------+----------+      +-----+--------+
def read_credentials(reader: Reader) -> Steps[tuple[bytes, bytes]]:
    """Read user name and password.

    Raises ProtocolError for another version or an empty field.
    """
    version, length = yield from reader.read_exactly(2)
    if version != CREDENTIALS_VERSION:
        raise ProtocolError("not RFC 1929 credentials")
    user = yield from reader.read_exactly(length)
    (length,) = yield from reader.read_exactly(1)
    password = yield from reader.read_exactly(length)
    if not user or not password:
        raise ProtocolError("empty user name or password")
    return user, password


def encode_credentials(user: str, password: str) -> bytes:
    """Encode user name and password.

    Raises ValueError if either is empty or over 255 bytes of UTF-8.
    """
    fields = [user.encode(), password.encode()]
    if not all(0 < len(field) < 256 for field in fields):
        raise ValueError("user name and password take 1 to 255 bytes")
    return bytes((CREDENTIALS_VERSION,)) + b"".join(
        bytes((len(field),)) + field for field in fields
    )


def encode_credentials_status(accepted: bool) -> bytes:
    """Encode the answer to credentials."""
    return b"\1\0" if accepted else b"\1\1"


def read_credentials_status(reader: Reader) -> Steps[bool]:
    """Return whether the server has accepted the credentials.

    Accepts version 5 as well, because servers in use send it.  Raises ProtocolError.
    """
    version, status = yield from reader.read_exactly(2)
    if version not in (CREDENTIALS_VERSION, VERSION):
        raise ProtocolError("not an RFC 1929 answer")
    return status == 0


# Request (RFC 1928 section 4), and reply (section 6) with REP for CMD and BND for DST
# +-----+-----+-------+------+----------+----------+
# | VER | CMD |  RSV  | ATYP | DST.ADDR | DST.PORT |
# |  1  |  1  |   1   |  1   | 4/1+n/16 |    2     |
# +-----+-----+-------+------+----------+----------+
def read_request(reader: Reader) -> Steps[Socks5Request]:
    """Read a request; RSV may be anything.

    The address of a UDP ASSOCIATE is a hint that many clients fill with rubbish, so that an
    invalid name there reads as "0.0.0.0".  Raises RequestError with ADDRESS_NOT_SUPPORTED
    for an unknown ATYP, with HOST_UNREACHABLE for an invalid name.
    """
    version, command, _, address_type = yield from reader.read_exactly(4)
    if version != VERSION:
        raise ProtocolError("not a SOCKS5 request")
    raw = yield from _read_raw_address(reader, address_type)
    try:
        return Socks5Request(command, _parse_raw_address(address_type, raw))
    except HostError as error:
        if command == UDP_ASSOCIATE:
            return Socks5Request(command, _unspecified_host(raw))
        raise RequestError(HOST_UNREACHABLE, str(error)) from error


def encode_request(command: int, target: Address) -> bytes:
    """Encode a request."""
    return bytes((VERSION, command, 0)) + encode_address(target)


def encode_reply(reply: int, bound: Address) -> bytes:
    """Encode a reply."""
    return bytes((VERSION, reply, 0)) + encode_address(bound)


def read_reply(reader: Reader) -> Steps[tuple[int, Address]]:
    """Read a reply: REP and BND; an invalid name reads as "0.0.0.0".  Raises ProtocolError."""
    version, reply, _, address_type = yield from reader.read_exactly(4)
    if version != VERSION:
        raise ProtocolError("not a SOCKS5 reply")
    if reply != SUCCEEDED and address_type not in (IPV4, NAME, IPV6):
        # Some servers send no address when they refuse.
        return reply, UNSPECIFIED_ADDRESS
    raw = yield from _read_raw_address(reader, address_type)
    try:
        return reply, _parse_raw_address(address_type, raw)
    except HostError:
        return reply, _unspecified_host(raw)


def encode_address(address: Address) -> bytes:
    """Encode ATYP, address and port; they have no room for a scope (fe80::1%2)."""
    host = address.host.partition("%")[0]
    packed = pack_ip(host)
    if packed is None:
        name = host.encode("ascii")
        return bytes((NAME, len(name))) + name + address.port.to_bytes(2, "big")
    return bytes((IPV4 if len(packed) == 4 else IPV6,)) + packed + address.port.to_bytes(2, "big")


# Header of a datagram (RFC 1928 section 7), both ways
# +------+------+------+----------+----------+----------+
# | RSV  | FRAG | ATYP | DST.ADDR | DST.PORT |   DATA   |
# |  2   |  1   |  1   | 4/1+n/16 |    2     | variable |
# +------+------+------+----------+----------+----------+
HEADER_IPV4, HEADER_IPV6 = 10, 22
# With a name of one byte.
HEADER_SHORTEST = 8
# Offsets in the header.
ATYP_AT, FRAG_AT = 3, 2
# Up to this many datagrams, comparing header by header is faster than column by column (measured).
FEW = 16


def header_length(datagram: memoryview | bytearray | bytes, start: int = 0) -> int:
    """Return the bytes of header of the datagram at `start`, 0 for an unknown ATYP.

    At least 5 bytes must be there.
    """
    address_type = datagram[start + ATYP_AT]
    if address_type == IPV4:
        return HEADER_IPV4
    if address_type == NAME:
        return 7 + datagram[start + ATYP_AT + 1]
    return HEADER_IPV6 if address_type == IPV6 else 0


def common_header(memory: bytearray, offsets: range, last: int) -> int:
    """Return the length of the header that all datagrams at `offsets` have in common.

    `last` is the length of the final datagram in bytes, and no other is shorter.
    Returns 0 if the headers differ or a datagram is too short for one.
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
    # Column by column: each byte of the header must be the same in all datagrams.
    end = start + (count - 1) * step + last
    columns = range(start + FRAG_AT, start + skip)
    return skip if all([memory[at:end:step].count(memory[at]) == count for at in columns]) else 0


def parse_target(address: bytes) -> Address:
    """Parse ATYP, DST.ADDR and DST.PORT.  Raises HostError."""
    address_type, length = address[0] if address else 0, len(address)
    if address_type == NAME and length > 3 and length == 4 + address[1]:
        return _parse_raw_address(address_type, address[2:])
    if (address_type, length) in ((IPV4, 7), (IPV6, 19)):
        return _parse_raw_address(address_type, address[1:])
    raise HostError("not ATYP, address and port")


def encode_header(source: Address) -> bytes:
    """Encode the header of a datagram from, or to, an address; FRAG is 0."""
    return b"\0\0\0" + encode_address(source)


def _read_raw_address(reader: Reader, address_type: int) -> Steps[bytes]:
    """Read address and port, without the length of a name."""
    if address_type == IPV4:
        return (yield from reader.read_exactly(6))
    if address_type == IPV6:
        return (yield from reader.read_exactly(18))
    if address_type == NAME:
        (length,) = yield from reader.read_exactly(1)
        return (yield from reader.read_exactly(length + 2))
    raise RequestError(ADDRESS_NOT_SUPPORTED, "unknown address type")


def _parse_raw_address(address_type: int, raw: bytes) -> Address:
    if address_type == IPV4:
        host = inet_ntop(AF_INET, raw[:-2])
    else:
        host = parse_host(raw[:-2]) if address_type == NAME else ip_text(raw[:-2])
    return Address(host, int.from_bytes(raw[-2:], "big"))


def _unspecified_host(raw: bytes) -> Address:
    """Return the port of a raw address whose host cannot be used."""
    return UNSPECIFIED_ADDRESS._replace(port=int.from_bytes(raw[-2:], "big"))
