"""NetProxy's tunnel, version 1: the bytes of both roles, an agent that dials out and the bridge that it dials.

A connection begins with a handshake, in which each side proves that it has the token
without sending it; then it carries capsules (RFC 9297) of kinds of our own.  A control
connection carries nothing else; a work connection, once it is opened, is one stream of
bytes or of datagrams.  man/netproxy-tunnel.7 says the same to others.  No I/O; any thread.
"""

from __future__ import annotations

import re
from typing import Iterable, NamedTuple, Sequence

from netproxy.errors import ProtocolError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Reader
from netproxy.protocol import socks5
from netproxy.protocol.capsule import DATAGRAM, VARINT_LONGEST, encode_varint, parse_varint

MAGIC, VERSION = b"\x9eNPT", 1
CONTROL, WORK = 0, 1  # kinds of connection
NONCE_SIZE, PROOF_SIZE, SESSION_SIZE = 32, 32, 16
CHALLENGED, WELCOMED, REFUSED = 1, 2, 3  # what the bridge says in the handshake
NAME = r"[A-Za-z0-9_-]{1,63}\Z"  # of an agent
MESSAGE_LIMIT = 4096  # bytes of a capsule's value, but for datagrams
SERVICES_LIMIT = 1000  # of an agent: what a REGISTERED has room for
PING_SIZE = 8
_LABEL = b"netproxy tunnel 1 "  # in what is signed, before the role: each proof is good for one side alone

# Why a handshake is refused
NOT_PROVEN, NAME_IN_USE, NO_SESSION, TOO_MANY = 1, 2, 3, 4
REFUSALS = {
    NOT_PROVEN: "it does not know this name with this token",
    NAME_IN_USE: "another agent of this name is connected",
    NO_SESSION: "the session has ended",
    TOO_MANY: "it has enough connections waiting",
}

# Capsules
REGISTER, REGISTERED, PING, PONG, WANT, CLOSE, OPEN, ACCEPT, REFUSE = range(0x4E5401, 0x4E540A)

# What comes of a service
SERVED, NOT_ALLOWED, CANNOT_LISTEN = 0, 1, 2
OUTCOMES = {
    SERVED: "served",
    NOT_ALLOWED: "not allowed by the bridge",
    CANNOT_LISTEN: "the bridge cannot listen there",
}

# Why a bridge, or an agent, closes a control connection
STOPPING, REPLACED, WITHDRAWN = 1, 2, 3
CLOSINGS = {
    STOPPING: "it stops",
    REPLACED: "another agent of this name took over",
    WITHDRAWN: "its configuration has changed",
}

# REFUSE, and the reasons of dials
REASONS = {
    1: Reason.GENERAL,
    2: Reason.DENIED,
    3: Reason.NETWORK_UNREACHABLE,
    4: Reason.HOST_UNREACHABLE,
    5: Reason.NAME,
    6: Reason.REFUSED,
    7: Reason.TIMEOUT,
    8: Reason.UNSUPPORTED,
    9: Reason.AUTHENTICATION,
    10: Reason.PROTOCOL,
    11: Reason.LOOP,
}
_CODES = {reason: code for code, reason in REASONS.items()}

_NETWORKS = {6: "tcp", 17: "udp"}  # IANA's protocol numbers
_NUMBERS = {name: number for number, name in _NETWORKS.items()}
_TO_SERVICE, _TO_ADDRESS = 0, 1
_HEAD = len(MAGIC) + 2


class Hello(NamedTuple):
    kind: int
    name: str
    nonce: bytes
    session: bytes = b""  # of a work connection: of the control connection that it belongs to


class Welcome(NamedTuple):
    """The bridge's answer to a proof that holds."""

    proof: bytes
    session: bytes


class Service(NamedTuple):
    """A port of the bridge."""

    network: str  # "tcp" or "udp"
    port: int

    def __str__(self) -> str:
        return f"{self.port}/{self.network}"


class Opening(NamedTuple):
    """What a work connection becomes."""

    network: str
    client: Address  # on whose behalf, for records and PROXY headers
    target: Service | Address  # a service of the agent's, or what its exit leads to


class Message(NamedTuple):
    kind: int
    value: bytes


# -- the handshake


# Hello, agent to bridge; SESSION only for WORK
# +-------+---------+------+-------+-----+------+---------+
# | MAGIC | VERSION | KIND | NONCE | LEN | NAME | SESSION |
# |   4   |    1    |  1   |  32   |  1  | 1-63 |   16    |
# +-------+---------+------+-------+-----+------+---------+
def encode_hello(hello: Hello) -> bytes:
    name = hello.name.encode("ascii")
    return (
        MAGIC
        + bytes((VERSION, hello.kind))
        + hello.nonce
        + bytes((len(name),))
        + name
        + hello.session
    )


def read_hello(reader: Reader) -> Hello:
    """ProtocolError for another version, an unknown kind and a name that no agent can have."""
    head = reader.read_exactly(_HEAD)
    if not head.startswith(MAGIC):
        raise ProtocolError("no tunnel's agent")
    if head[4] != VERSION or head[5] not in (CONTROL, WORK):
        raise ProtocolError(
            f"a tunnel of version {head[4]}, kind {head[5]}: known is version {VERSION}"
        )
    nonce = reader.read_exactly(NONCE_SIZE)
    raw = reader.read_exactly(reader.read_exactly(1)[0])
    name = raw.decode("latin-1")
    if not re.match(NAME, name):
        raise ProtocolError("not an agent's name")
    return Hello(
        head[5], name, nonce, reader.read_exactly(SESSION_SIZE) if head[5] == WORK else b""
    )


# Challenge and welcome, or a refusal in place of either, bridge to agent; between them PROOF alone, agent to bridge
# +----+-------+      +----+-------+---------+      +----+--------+
# | 01 | NONCE |      | 02 | PROOF | SESSION |      | 03 | REASON |
# | 1  |  32   |      | 1  |  32   |   16    |      | 1  |   1    |
# +----+-------+      +----+-------+---------+      +----+--------+
def encode_challenge(nonce: bytes) -> bytes:
    return bytes((CHALLENGED,)) + nonce


def encode_welcome(welcome: Welcome) -> bytes:
    return bytes((WELCOMED,)) + welcome.proof + welcome.session


def encode_refusal(reason: int) -> bytes:
    return bytes((REFUSED, reason))


def read_challenge(reader: Reader) -> bytes | int:
    """The bridge's nonce, or why it refuses."""
    return (
        reader.read_exactly(NONCE_SIZE) if _says(reader, CHALLENGED) else reader.read_exactly(1)[0]
    )


def read_welcome(reader: Reader) -> Welcome | int:
    """What an agent's proof is answered with, or why it is refused."""
    if not _says(reader, WELCOMED):
        return reader.read_exactly(1)[0]
    return Welcome(reader.read_exactly(PROOF_SIZE), reader.read_exactly(SESSION_SIZE))


def _says(reader: Reader, wanted: int) -> bool:
    said = reader.read_exactly(1)[0]
    if said not in (wanted, REFUSED):
        raise ProtocolError("not a tunnel's bridge")
    return said == wanted


# What is signed
# +-------+------+------+-----+------+---------------+----------------+---------+
# | LABEL | ROLE | KIND | LEN | NAME | AGENT'S NONCE | BRIDGE'S NONCE | SESSION |     SESSION as far as there is one
# |  18   |  1   |  1   |  1  | 1-63 |      32       |       32       | 0 or 16 |
# +-------+------+------+-----+------+---------------+----------------+---------+
def agent_proof(token: bytes, hello: Hello, nonce: bytes) -> bytes:
    """`nonce` is the bridge's."""
    return _sign(token, b"A", hello, nonce, hello.session)


def bridge_proof(token: bytes, hello: Hello, nonce: bytes, session: bytes) -> bytes:
    return _sign(token, b"B", hello, nonce, session)


def _sign(token: bytes, role: bytes, hello: Hello, nonce: bytes, session: bytes) -> bytes:
    import hmac  # late: a daemon without a tunnel needs none

    name = hello.name.encode("ascii")
    signed = _LABEL + role + bytes((hello.kind, len(name))) + name + hello.nonce + nonce + session
    return hmac.digest(token, signed, "sha256")


def same(one: bytes, other: bytes) -> bool:
    """In a time that does not tell where they differ."""
    import hmac  # late: as above

    return hmac.compare_digest(one, other)


# -- capsules


def encode(kind: int, value: bytes = b"") -> bytes:
    return encode_varint(kind) + encode_varint(len(value)) + value


def next_message(buffer: bytes) -> tuple[Message, int] | None:
    """The capsule at the start of a buffer and where it ends; None until it is whole.

    ProtocolError as soon as its head tells a length over MESSAGE_LIMIT.
    """
    kind = parse_varint(buffer, 0, len(buffer))
    length = parse_varint(buffer, kind[1], len(buffer)) if kind else None
    if not kind or not length:
        return None
    _check_length(length[0])
    end = length[1] + length[0]
    return (Message(kind[0], buffer[length[1] : end]), end) if end <= len(buffer) else None


def read_message(reader: Reader) -> Message:
    """The same, from whoever has it to give."""
    kind = _read_varint(reader)
    length = _read_varint(reader)
    _check_length(length)
    return Message(kind, reader.read_exactly(length))


def _check_length(length: int) -> None:
    if length > MESSAGE_LIMIT:
        raise ProtocolError(f"a capsule of {length} bytes on a tunnel")


def _read_varint(reader: Reader) -> int:
    first = reader.read_exactly(1)
    size = 1 << (first[0] >> 6)
    found = parse_varint(first + reader.read_exactly(size - 1), 0, VARINT_LONGEST)
    assert found is not None
    return found[0]


# REGISTER: FLAGS, 01 for an exit, and for each service | NETWORK 1 | PORT 2 |; REGISTERED: the same, each with | OUTCOME 1 |
def encode_register(services: Iterable[Service], leads_out: bool) -> bytes:
    return encode(REGISTER, bytes((leads_out,)) + b"".join(map(_encode_service, services)))


def parse_register(value: bytes) -> tuple[list[Service], bool]:
    """The services, and whether the agent is an exit."""
    if len(value) % 3 != 1 or len(value) > 1 + 3 * SERVICES_LIMIT:
        raise ProtocolError("not a REGISTER")
    return [_parse_service(value[at : at + 3]) for at in range(1, len(value), 3)], bool(
        value[0] & 1
    )


def encode_registered(outcomes: Sequence[tuple[Service, int]]) -> bytes:
    return encode(
        REGISTERED,
        b"".join(_encode_service(service) + bytes((outcome,)) for service, outcome in outcomes),
    )


def parse_registered(value: bytes) -> list[tuple[Service, int]]:
    if len(value) % 4:
        raise ProtocolError("not a REGISTERED")
    return [(_parse_service(value[at : at + 3]), value[at + 3]) for at in range(0, len(value), 4)]


def encode_number(kind: int, number: int) -> bytes:
    """WANT: how many; CLOSE and REFUSE: a reason."""
    return encode(kind, encode_varint(number))


def parse_number(value: bytes) -> int:
    found = parse_varint(value, 0, len(value))
    if found is None:
        raise ProtocolError("a capsule without its number")
    return found[0]


# OPEN; CLIENT and an address as target are ATYP, ADDR and PORT of SOCKS5, a service is its port
# +---------+--------+-----+--------+      +------------+
# | NETWORK | CLIENT | 00  |  PORT  |  or  | 01 | TARGET |
# |    1    |  7-19  |  1  |   2    |      | 1  | 7-259  |
# +---------+--------+-----+--------+      +------------+
def encode_open(opening: Opening) -> bytes:
    target = opening.target
    end = (
        bytes((_TO_SERVICE,)) + target.port.to_bytes(2, "big")
        if isinstance(target, Service)
        else bytes((_TO_ADDRESS,)) + socks5.encode_address(target)
    )
    return encode(
        OPEN, bytes((_NUMBERS[opening.network],)) + socks5.encode_address(opening.client) + end
    )


def parse_open(value: bytes) -> Opening:
    size = address_size(value, 1, len(value)) or len(value)
    end = 1 + size
    if end >= len(value) or value[0] not in _NETWORKS:
        raise ProtocolError("not an OPEN")
    network, client, rest = _NETWORKS[value[0]], socks5.parse_target(value[1:end]), value[end + 1 :]
    if value[end] == _TO_ADDRESS:
        return Opening(network, client, socks5.parse_target(rest))
    if value[end] != _TO_SERVICE or len(rest) != 2:
        raise ProtocolError("an OPEN of something unknown")
    return Opening(network, client, Service(network, int.from_bytes(rest, "big")))


def encode_accept() -> bytes:
    return encode(ACCEPT)


def encode_refuse(reason: Reason) -> bytes:
    return encode_number(REFUSE, _CODES[reason])


def parse_refuse(value: bytes) -> Reason:
    """A reason of a later version is just a failure."""
    return REASONS.get(parse_number(value), Reason.GENERAL)


def address_size(buffer: bytes | bytearray, start: int, end: int) -> int:
    """Bytes of ATYP, ADDR and PORT at `start`; 0 where `end` comes before it is known.  ProtocolError for an unknown ATYP."""
    if end - start < 2:
        return 0
    kind = buffer[start]
    if kind == socks5.NAME:
        return 4 + buffer[start + 1]
    if kind not in (socks5.IPV4, socks5.IPV6):
        raise ProtocolError("unknown address type on a tunnel")
    return 7 if kind == socks5.IPV4 else 19


def _encode_service(service: Service) -> bytes:
    return bytes((_NUMBERS[service.network],)) + service.port.to_bytes(2, "big")


def _parse_service(raw: bytes) -> Service:
    if raw[0] not in _NETWORKS:
        raise ProtocolError("a service that is neither TCP nor UDP")
    return Service(_NETWORKS[raw[0]], int.from_bytes(raw[1:], "big"))


# -- datagrams of an exit, behind ACCEPT

# A DATAGRAM capsule of context 2, whose payload begins with the address of the peer's, or where it goes
# +----+------------+---------+----------+----------+------+
# | 00 | Length (i) |   02    |   ATYP   |   ADDR   | PORT |  DATA
# +----+------------+---------+----------+----------+------+
_ADDRESSED = 2
_VALUE_LIMIT = VARINT_LONGEST + 259 + 65507


class AddressedDatagrams:
    """The framing of a stream for all targets of one client (net.framed.Framing)."""

    payload_limit = 65507  # what UDP over IPv4 has room for

    def find(self, memory: bytearray, start: int, end: int) -> tuple[int, int, bytes | None] | None:
        """As net.framed.Framing says: other capsules and contexts are skipped."""
        kind = parse_varint(memory, start, end)
        length = parse_varint(memory, kind[1], end) if kind else None
        if not kind or not length:
            return None
        finish = length[1] + length[0]
        if kind[0] != DATAGRAM:
            return length[1], finish, None
        if length[0] > _VALUE_LIMIT:
            raise ProtocolError("a DATAGRAM capsule is longer than any UDP payload")
        if finish > end:
            return None
        context = parse_varint(memory, length[1], finish)
        if not context:
            raise ProtocolError("a DATAGRAM capsule without a context ID")
        if context[0] != _ADDRESSED:
            return length[1], finish, None
        size = address_size(memory, context[1], finish)
        payload = context[1] + size
        if not size or not 0 <= finish - payload <= self.payload_limit:
            raise ProtocolError("a datagram without its address, or too long")
        return payload, finish, bytes(memory[context[1] : payload])

    def prefix(self, address: bytes, size: int) -> bytes:
        return b"\0%b\2%b" % (encode_varint(1 + len(address) + size), address)

    def encode(self, target: Address) -> bytes:
        return socks5.encode_address(target)

    def parse(self, address: bytes) -> Address:
        return socks5.parse_target(address)
