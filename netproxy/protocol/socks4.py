"""SOCKS4 and SOCKS4a: the bytes of both roles.

Sources: the SOCKS4 memo of Ying-Da Lee and its 4A extension.  `read_` functions are
generators over a Reader, `encode_` functions are pure.  No I/O of its own, no policy.
"""

from __future__ import annotations

from socket import AF_INET, inet_ntop

from netproxy.errors import ProtocolError, Reason, ReplyTable
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address, pack_ip
from netproxy.protocol.host import HostError, parse_host
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Reader, Steps

VERSION = 4
CONNECT, BIND = 1, 2
GRANTED, REJECTED, NO_IDENTD, OTHER_USER = 0x5A, 0x5B, 0x5C, 0x5D
# Bytes of USERID or of a name with its NUL, so that memory stays bounded.  No valid name is
# longer than 253 bytes.
STRING_LIMIT = 256

REPLIES: ReplyTable = {reason: REJECTED for reason in Reason}
REASONS = {NO_IDENTD: Reason.AUTHENTICATION, OTHER_USER: Reason.AUTHENTICATION}


class RequestError(ProtocolError):
    """A request that is answered with REJECTED, the only refusal of SOCKS4."""


class Socks4Request(NamedTuple):
    """A request: CONNECT or BIND, or a command that the handler refuses."""

    command: int
    target: Address
    user_id: bytes


# Request; a NAME follows if DSTIP is 0.0.0.x with x other than 0 (SOCKS4a)
# +------+----+---------+-------+--------+-----+------+-----+
# | VN=4 | CD | DSTPORT | DSTIP | USERID | NUL | NAME | NUL |
# |  1   | 1  |    2    |   4   |   n    |  1  |  n   |  1  |
# +------+----+---------+-------+--------+-----+------+-----+
def read_request(reader: Reader) -> Steps[Socks4Request]:
    """Read a request.

    The target 0.0.0.0 is for BIND alone: any peer may come.  Raises RequestError for another
    request with that target and for invalid names, ProtocolError for anything else that is
    not a request.
    """
    head = yield from reader.read_exactly(8)
    if head[0] != VERSION:
        raise ProtocolError("not a SOCKS4 request")
    port = int.from_bytes(head[2:4], "big")
    user_id = (yield from reader.read_until(b"\0", STRING_LIMIT))[:-1]
    if head[4:7] != b"\0\0\0" or head[7] == 0:
        host = inet_ntop(AF_INET, head[4:8])
    else:
        name = (yield from reader.read_until(b"\0", STRING_LIMIT))[:-1]
        try:
            host = parse_host(name)
        except HostError as error:
            raise RequestError(str(error)) from error
    if host == UNSPECIFIED_ADDRESS.host and head[1] != BIND:
        raise RequestError("0.0.0.0 is not a valid target")
    return Socks4Request(head[1], Address(host, port), user_id)


def encode_request(command: int, target: Address, user_id: bytes = b"") -> bytes:
    """Encode a request; a target that is not an IPv4 address goes as a SOCKS4a name."""
    ip, name = pack_ip(target.host), b""
    if ip is None or len(ip) != 4 or ip.startswith(b"\0\0\0"):
        ip, name = b"\0\0\0\1", target.host.encode("ascii") + b"\0"
    return bytes((VERSION, command)) + target.port.to_bytes(2, "big") + ip + user_id + b"\0" + name


# Reply
# +------+----+---------+-------+
# | VN=0 | CD | DSTPORT | DSTIP |
# |  1   | 1  |    2    |   4   |
# +------+----+---------+-------+
def encode_reply(code: int, bound: Address) -> bytes:
    """Encode a reply; an address that is not IPv4 goes as 0.0.0.0."""
    ip = pack_ip(bound.host)
    if ip is None or len(ip) != 4:
        ip = b"\0\0\0\0"
    return bytes((0, code)) + bound.port.to_bytes(2, "big") + ip


def read_reply(reader: Reader) -> Steps[tuple[int, Address]]:
    """Read a reply: its code and address.  Raises ProtocolError."""
    reply = yield from reader.read_exactly(8)
    if reply[0] != 0:
        raise ProtocolError("not a SOCKS4 reply")
    return reply[1], Address(inet_ntop(AF_INET, reply[4:8]), int.from_bytes(reply[2:4], "big"))
