"""SOCKS4 and SOCKS4a: bytes of requests and replies.

Sources: the SOCKS4 memo of Ying-Da Lee and its 4A extension.  Linear functions
over a Reader for what comes in, pure encoders for what goes out; no I/O of its own.
"""

from __future__ import annotations

from socket import AF_INET, inet_ntop
from typing import NamedTuple

from netproxy.errors import ProtocolError, Reason, ReplyTable
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.connections import Reader, Steps
from netproxy.protocol.host import HostError, parse_host

VERSION = 4
CONNECT, BIND = 1, 2
NO_ADDRESS = "0.0.0.0"
GRANTED, REJECTED, NO_IDENTD, OTHER_USER = 0x5A, 0x5B, 0x5C, 0x5D
STRING_LIMIT = (
    256  # a user id or name of 255 bytes and its NUL: no name is longer, and memory stays bounded
)

REPLIES: ReplyTable = {reason: REJECTED for reason in Reason}
REASONS = {NO_IDENTD: Reason.AUTHENTICATION, OTHER_USER: Reason.AUTHENTICATION}


class RequestError(ProtocolError):
    """A request that gets the one refusal SOCKS4 knows."""


class Socks4Request(NamedTuple):
    command: int
    target: Address
    user_id: bytes


def read_request(reader: Reader) -> Steps[Socks4Request]:
    """The request after its version byte has been seen but not read.

        VN(1)=4  CD(1)  DSTPORT(2)  DSTIP(4)  USERID  NUL  [ name NUL where DSTIP is 0.0.0.x, x not 0 ]

    Raises RequestError for 0.0.0.0 and for names that are none, ProtocolError for the rest.
    """
    head = yield from reader.read_exactly(8)
    if head[0] != VERSION:
        raise ProtocolError("not a SOCKS4 request")
    port = int.from_bytes(head[2:4], "big")
    user_id = (yield from reader.read_until(b"\0", STRING_LIMIT))[:-1]
    if head[4:7] != b"\0\0\0":
        return Socks4Request(head[1], Address(inet_ntop(AF_INET, head[4:8]), port), user_id)
    if head[7] == 0:
        raise RequestError("0.0.0.0 is no target")
    name = (yield from reader.read_until(b"\0", STRING_LIMIT))[:-1]
    try:
        host = parse_host(name)
    except HostError as error:
        raise RequestError(str(error)) from error
    if host == NO_ADDRESS:
        raise RequestError("0.0.0.0 is no target")
    return Socks4Request(head[1], Address(host, port), user_id)


def encode_request(command: int, target: Address, user_id: bytes = b"") -> bytes:
    """The client's side of read_request; a name goes as 4a."""
    ip, name = pack_ip(target.host), b""
    if ip is None or len(ip) != 4 or ip.startswith(b"\0\0\0"):  # 0.0.0.x means "a name follows"
        ip, name = b"\0\0\0\1", target.host.encode("ascii") + b"\0"
    return bytes((VERSION, command)) + target.port.to_bytes(2, "big") + ip + user_id + b"\0" + name


def encode_reply(code: int, bound: Address) -> bytes:
    """VN(1)=0  CD(1)  DSTPORT(2)  DSTIP(4); an address that is not IPv4 goes as 0.0.0.0."""
    ip = pack_ip(bound.host)
    if ip is None or len(ip) != 4:
        ip = b"\0\0\0\0"
    return bytes((0, code)) + bound.port.to_bytes(2, "big") + ip


def read_reply(reader: Reader) -> Steps[tuple[int, Address]]:
    """The server's answer: its code and the address it names."""
    reply = yield from reader.read_exactly(8)
    if reply[0] != 0:
        raise ProtocolError("not a SOCKS4 reply")
    return reply[1], Address(inet_ntop(AF_INET, reply[4:8]), int.from_bytes(reply[2:4], "big"))
