"""The Port Control Protocol (PCP, RFC 6887): the opcodes ANNOUNCE and MAP, both roles.

One datagram is one message.  Options are sent by nobody here, and skipped in what comes.
Who asks has to try again (section 8.1.1), and to compare the source of an answer and the nonce.
No I/O.  Thread: any.
"""

from __future__ import annotations

import struct

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import V4_MAPPED_PREFIX, Address, ip_text, pack_ip
from netproxy.typed import NamedTuple

PORT = 5351
"""The port of a server, as of NAT-PMP (RFC 6887 section 19.1)."""
VERSION = 2
ANNOUNCE, MAP = 0, 1
NONCE_SIZE = 12
NO_NONCE = bytes(NONCE_SIZE)
SUCCESS, UNSUPPORTED_VERSION, NOT_AUTHORIZED, NO_RESOURCES, ADDRESS_MISMATCH = 0, 1, 2, 8, 12
RESULTS = {
    SUCCESS: "success",
    UNSUPPORTED_VERSION: "the version is not supported",
    NOT_AUTHORIZED: "not authorized",
    3: "malformed request",
    4: "the opcode is not supported",
    5: "an option is not supported",
    6: "malformed option",
    7: "the router has no network",
    NO_RESOURCES: "no resources",
    9: "the protocol is not supported",
    10: "the quota of this machine is used up",
    11: "the external address or port is taken",
    ADDRESS_MISMATCH: "another NAT is between this machine and the router",
    13: "too many peers",
}
"""What the result codes mean (section 7.4)."""
PROTOCOLS = {"tcp": 6, "udp": 17}
"""The numbers of IANA, which MAP names."""
SIZE_LIMIT = 1100
"""Bytes of a message (section 7)."""

_NETWORKS = {number: network for network, number in PROTOCOLS.items()}
_RESPONSE = 0x80
_REQUEST_HEADER = struct.Struct(">BB2xL16s")
_RESPONSE_HEADER = struct.Struct(">BBxBLL12x")
_MAP = struct.Struct(">12sB3xHH16s")
_HEADER_SIZE = 24
_MAP_SIZE = _HEADER_SIZE + _MAP.size


class Mapping(NamedTuple):
    """What MAP is about: a port of the client, and where others reach it."""

    nonce: bytes
    """12 bytes that others cannot guess: who has them may change the mapping."""
    network: str
    """ "tcp" or "udp"."""
    internal_port: int
    external: Address
    """In a request a wish; 0.0.0.0 and port 0 for none."""


class Request(NamedTuple):
    """Asks a server for a mapping, or for its epoch alone."""

    client: str
    """The address that the client sends from."""
    lifetime: int = 0
    """Seconds of the mapping; 0 deletes it."""
    mapping: Mapping | None = None
    """None: ANNOUNCE."""


class Response(NamedTuple):
    """What a server answers."""

    result: int
    lifetime: int
    """Seconds of the mapping; if it is refused, until another request may be of use."""
    epoch: int
    """Seconds since the server has begun, or has lost its mappings (section 8.5)."""
    mapping: Mapping | None = None
    """None: ANNOUNCE, or an error without it."""


class OtherVersion(ProtocolError):
    """The server does not speak version 2: version 0 is NAT-PMP (section 9)."""

    def __init__(self, version: int) -> None:
        super().__init__(f"the server speaks version {version} of PCP, not {VERSION}")
        self.version = version


# Request (RFC 6887 sections 7.1 and 11.1); ANNOUNCE has its first 24 bytes alone.
# +---------+------------+----------+-----------+----------------+
# | Version | 0 | Opcode | Reserved | Lifetime  | Client address |
# |    1    |     1      |    2     |    4      |       16       |
# +---------+------------+----------+-----------+----------------+--------------------+
# |  Nonce  |  Protocol  | Reserved | Internal port | Ext. port  |  External address  |
# |   12    |     1      |    3     |       2       |     2      |         16         |
# +---------+------------+----------+---------------+------------+--------------------+
def encode_request(request: Request) -> bytes:
    """Encode a request.  Raises ValueError for a name in place of an address."""
    opcode = ANNOUNCE if request.mapping is None else MAP
    client = _encode_host(request.client)
    return _REQUEST_HEADER.pack(VERSION, opcode, request.lifetime, client) + _encode_map(
        request.mapping
    )


def parse_request(datagram: bytes) -> Request:
    """Return the request in a datagram.

    Raises OtherVersion, and ProtocolError for anything else that is not a request.
    """
    opcode = _parse_opcode(datagram)
    if opcode & _RESPONSE:
        raise ProtocolError("a response of PCP, not a request")
    _, _, lifetime, client = _REQUEST_HEADER.unpack_from(datagram)
    mapping = None if opcode == ANNOUNCE else _parse_map(datagram)
    return Request(ip_text(client), lifetime, mapping)


# Response (sections 7.2 and 11.1), before the same 36 bytes of MAP.
# +---------+------------+----------+--------+-----------+-------+----------+
# | Version | 1 | Opcode | Reserved | Result | Lifetime  | Epoch | Reserved |
# |    1    |     1      |    1     |   1    |     4     |   4   |    12    |
# +---------+------------+----------+--------+-----------+-------+----------+
def encode_response(response: Response) -> bytes:
    """Encode a response.  Raises ValueError for a name in place of an address."""
    opcode = _RESPONSE | (ANNOUNCE if response.mapping is None else MAP)
    result, lifetime, epoch, mapping = response
    return _RESPONSE_HEADER.pack(VERSION, opcode, result, lifetime, epoch) + _encode_map(mapping)


def parse_response(datagram: bytes) -> Response:
    """Return the response in a datagram.

    Raises OtherVersion, and ProtocolError for anything else that is not a response.
    """
    opcode = _parse_opcode(datagram)
    if not opcode & _RESPONSE:
        raise ProtocolError("a request of PCP, not a response")
    _, _, result, lifetime, epoch = _RESPONSE_HEADER.unpack_from(datagram)
    # A server that does not understand a request may answer with the header alone.
    has_mapping = opcode == _RESPONSE | MAP and (result == SUCCESS or len(datagram) > _HEADER_SIZE)
    return Response(result, lifetime, epoch, _parse_map(datagram) if has_mapping else None)


def _parse_opcode(datagram: bytes) -> int:
    """Return the opcode of a message, with the bit of a response."""
    if len(datagram) >= 2 and datagram[0] != VERSION:
        raise OtherVersion(datagram[0])
    size = len(datagram)
    if not _HEADER_SIZE <= size <= SIZE_LIMIT or size % 4:
        raise ProtocolError("a message of PCP with a wrong length")
    opcode = datagram[1]
    if opcode & ~_RESPONSE not in (ANNOUNCE, MAP):
        raise ProtocolError("an unknown opcode of PCP")
    return opcode


def _encode_map(mapping: Mapping | None) -> bytes:
    if mapping is None:
        return b""
    protocol, external = PROTOCOLS[mapping.network], mapping.external
    host = _encode_host(external.host)
    return _MAP.pack(mapping.nonce, protocol, mapping.internal_port, external.port, host)


def _parse_map(datagram: bytes) -> Mapping:
    if len(datagram) < _MAP_SIZE:
        raise ProtocolError("a MAP of PCP is truncated")
    nonce, protocol, internal, external, host = _MAP.unpack_from(datagram, _HEADER_SIZE)
    if protocol not in _NETWORKS:
        raise ProtocolError(f"a MAP of PCP for the protocol {protocol}")
    return Mapping(nonce, _NETWORKS[protocol], internal, Address(ip_text(host), external))


def _encode_host(host: str) -> bytes:
    packed = pack_ip(host)
    if packed is None:
        raise ValueError("PCP carries addresses, not names")
    return V4_MAPPED_PREFIX + packed if len(packed) == 4 else packed
