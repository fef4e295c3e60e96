"""The NAT Port Mapping Protocol (NAT-PMP, RFC 6886), both roles.

One datagram is one message.  It has no transaction ID: who asks has one question at a time, and
compares the source of an answer and the port in it.  No I/O.  Thread: any.
"""

from __future__ import annotations

import struct

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import ip_text, pack_ip
from netproxy.typed import NamedTuple

PORT = 5351
"""The port of a gateway, as of PCP."""
VERSION = 0
SUCCESS, UNSUPPORTED_VERSION, NOT_AUTHORIZED, NO_RESOURCES = 0, 1, 2, 4
RESULTS = {
    SUCCESS: "success",
    UNSUPPORTED_VERSION: "the version is not supported",
    NOT_AUTHORIZED: "not authorized",
    3: "the router has no network",
    NO_RESOURCES: "no resources",
    5: "the opcode is not supported",
}
"""What the result codes mean (RFC 6886 section 3.5)."""

_ADDRESS = 0
_OPCODES = {"udp": 1, "tcp": 2}
_NETWORKS = {opcode: network for network, opcode in _OPCODES.items()}
_RESPONSE = 0x80
_MAP_REQUEST = struct.Struct(">BB2xHHL")
_RESPONSE_HEADER = struct.Struct(">BBHL")
_MAP_RESPONSE = struct.Struct(">HHL")
_HEADER_SIZE, _HOST_SIZE = 8, 4


class MapRequest(NamedTuple):
    """Asks for a mapping."""

    network: str
    """ "tcp" or "udp"."""
    internal_port: int
    external_port: int
    """A wish; 0 for none."""
    lifetime: int
    """Seconds; 0 deletes the mapping."""


class AddressRequest(NamedTuple):
    """Asks for the external address of the gateway."""


class MapResponse(NamedTuple):
    """Answers a MapRequest."""

    result: int
    epoch: int
    """Seconds since the gateway has begun, or has lost its mappings (section 3.6)."""
    network: str
    internal_port: int = 0
    external_port: int = 0
    lifetime: int = 0


class AddressResponse(NamedTuple):
    """Answers an AddressRequest."""

    result: int
    epoch: int
    host: str = "0.0.0.0"


# Requests (RFC 6886 sections 3.2 and 3.3): that for the address has the first two bytes alone.
# +---------+--------+----------+---------------+---------------+----------+
# | Version | Opcode | Reserved | Internal port | External port | Lifetime |
# |    1    |   1    |    2     |       2       |       2       |    4     |
# +---------+--------+----------+---------------+---------------+----------+
def encode_request(request: AddressRequest | MapRequest) -> bytes:
    """Encode a request."""
    if isinstance(request, AddressRequest):
        return bytes((VERSION, _ADDRESS))
    network, internal, external, lifetime = request
    return _MAP_REQUEST.pack(VERSION, _OPCODES[network], internal, external, lifetime)


def parse_request(datagram: bytes) -> AddressRequest | MapRequest:
    """Return the request in a datagram.  Raises ProtocolError."""
    if datagram[:1] != bytes((VERSION,)):
        raise ProtocolError("another version of NAT-PMP")
    if datagram[1:] == bytes((_ADDRESS,)):
        return AddressRequest()
    if len(datagram) != _MAP_REQUEST.size or datagram[1] not in _NETWORKS:
        raise ProtocolError("not a request of NAT-PMP")
    _, opcode, internal, external, lifetime = _MAP_REQUEST.unpack(datagram)
    return MapRequest(_NETWORKS[opcode], internal, external, lifetime)


# Responses: after the header the address, or three numbers; errors may end with the header.
# +---------+------------+--------+-------+   +---------+   +----------+----------+----------+
# | Version | 128+Opcode | Result | Epoch |   | Address |   | Internal | External | Lifetime |
# |    1    |     1      |   2    |   4   |   |    4    |   |  port 2  |  port 2  |    4     |
# +---------+------------+--------+-------+   +---------+   +----------+----------+----------+
def encode_response(response: AddressResponse | MapResponse) -> bytes:
    """Encode a response.  Raises ValueError for anything but an IPv4 address."""
    result, epoch = response[:2]
    if isinstance(response, AddressResponse):
        packed = pack_ip(response.host)
        if packed is None or len(packed) != _HOST_SIZE:
            raise ValueError("NAT-PMP carries IPv4 addresses alone")
        return _RESPONSE_HEADER.pack(VERSION, _RESPONSE | _ADDRESS, result, epoch) + packed
    opcode = _RESPONSE | _OPCODES[response.network]
    numbers = response.internal_port, response.external_port, response.lifetime
    return _RESPONSE_HEADER.pack(VERSION, opcode, result, epoch) + _MAP_RESPONSE.pack(*numbers)


def parse_response(datagram: bytes) -> AddressResponse | MapResponse:
    """Return the response in a datagram.  Raises ProtocolError."""
    if len(datagram) < _HEADER_SIZE:
        raise ProtocolError("a response of NAT-PMP is truncated")
    version, opcode, result, epoch = _RESPONSE_HEADER.unpack_from(datagram)
    kind = opcode & ~_RESPONSE
    if version != VERSION or not opcode & _RESPONSE or kind not in (_ADDRESS, *_NETWORKS):
        raise ProtocolError("not a response of NAT-PMP")
    rest = datagram[_HEADER_SIZE:]
    is_error = result != SUCCESS
    if kind == _ADDRESS:
        if len(rest) != _HOST_SIZE and not is_error:
            raise ProtocolError("a response of NAT-PMP with a wrong length")
        return AddressResponse(result, epoch, "0.0.0.0" if is_error else ip_text(rest))
    if len(rest) == _MAP_RESPONSE.size:
        return MapResponse(result, epoch, _NETWORKS[kind], *_MAP_RESPONSE.unpack(rest))
    if not is_error:
        raise ProtocolError("a response of NAT-PMP with a wrong length")
    return MapResponse(result, epoch, _NETWORKS[kind])
