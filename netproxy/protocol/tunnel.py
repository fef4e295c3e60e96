"""The reverse tunnel protocol, version 1: the bytes of both roles, agent and bridge.

The agent dials the bridge.  Each connection begins with a handshake in which each side proves
that it has the token without sending it.  After it the connection carries capsules (RFC 9297) of
our own types.  A control connection carries nothing else; a work connection, once it is opened,
is one stream of bytes or of datagrams (protocol.tunnels.datagrams).  man/netproxy-tunnel.7
describes the same for others.  No I/O; any thread.
"""

from __future__ import annotations

import re
import struct

from netproxy.errors import ProtocolError, Reason
from netproxy.protocol import socks5
from netproxy.protocol.http.capsule import VARINT_LONGEST, encode_varint, parse_varint
from netproxy.typed import TYPE_CHECKING, Iterable, Mapping, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Reader, Steps

MAGIC, VERSION = b"\x9eNPT", 1
CONTROL, WORK, RESUME, ATTACH = range(4)
"""Kinds of connection.  RESUME is another control connection of a session, ATTACH another work
connection of a flow (protocol.tunnels.path)."""

NONCE_SIZE, PROOF_SIZE, SESSION_SIZE = 32, 32, 16
"""Bytes."""

MESSAGE_LIMIT = 4096
"""Bytes of a capsule's value; DATAGRAM capsules have a limit of their own."""

SERVICES_LIMIT = 1000
"""Services of one agent: a REGISTERED message of so many fits in MESSAGE_LIMIT."""

PING_SIZE = 8
"""Bytes of a PING's value."""

_AGENT_NAME = r"[A-Za-z0-9_-]{1,63}\Z"
_HEAD_SIZE = len(MAGIC) + 2
_CHALLENGE, _WELCOME, _REFUSAL = 1, 2, 3
# Signed before the role, which makes each proof valid for one side only.
_LABEL = b"netproxy tunnel 1 "

NOT_PROVEN, NAME_IN_USE, NO_SESSION, TOO_MANY, NO_FLOW = 1, 2, 3, 4, 5
"""Reasons of a refused handshake."""

REFUSALS = {
    NOT_PROVEN: "unknown name or wrong token",
    NAME_IN_USE: "another agent with this name is connected",
    NO_SESSION: "the session has ended",
    TOO_MANY: "enough work connections are waiting",
    NO_FLOW: "the flow has ended",
}

# Types of capsules.
REGISTER, REGISTERED, PING, PONG, WANT, CLOSE, OPEN, ACCEPT, REFUSE = range(0x4E5401, 0x4E540A)
OPEN_REUSABLE, PATH_OFFER, PATH_END, FLOW, RESUMABLE = range(0x4E540A, 0x4E540F)
DIRECT_OFFER, DIRECT_FLOW, DIRECT_END, DIRECT_STATE = range(0x4E5410, 0x4E5414)
OF_PATHS = frozenset({PATH_OFFER, PATH_END, DIRECT_OFFER, DIRECT_FLOW, DIRECT_END})
"""The messages of a bridge about datagram paths."""

SERVED, NOT_ALLOWED, CANNOT_LISTEN = 0, 1, 2
"""Outcomes of the registration of a service."""

OUTCOMES = {
    SERVED: "served",
    NOT_ALLOWED: "not allowed by the bridge",
    CANNOT_LISTEN: "the bridge cannot listen there",
}

STOPPING, REPLACED, WITHDRAWN = 1, 2, 3
"""Reasons to close a control connection."""

CLOSINGS = {
    STOPPING: "it is stopping",
    REPLACED: "another agent with this name took over",
    WITHDRAWN: "its configuration has changed",
}

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
    12: Reason.LIMIT,
}
"""The reasons of a REFUSE message and of failed dials."""

_REASON_CODES = {reason: code for code, reason in REASONS.items()}
# IANA protocol numbers.
_NETWORKS = {6: "tcp", 17: "udp"}
_NETWORK_NUMBERS = {name: number for number, name in _NETWORKS.items()}
_TO_SERVICE, _TO_ADDRESS = 0, 1
# Flags of a REGISTER message, in the order of the fields of Registration.
_FLAGS = (1, 2, 4, 8, 16)
_FLOW = struct.Struct("!QQ")


def reason_text(texts: Mapping[int, str], reason: int) -> str:
    """Return a number in words, of REFUSALS, OUTCOMES or CLOSINGS."""
    return texts.get(reason, f"unknown reason {reason}")


class Hello(NamedTuple):
    """What the agent sends first on each connection."""

    kind: int
    """CONTROL, WORK, RESUME or ATTACH."""
    name: str
    nonce: bytes
    session: bytes = b""
    """Unless the kind is CONTROL: the session that the agent's control connection was given."""
    path: int = 0
    """For ATTACH: the path of the flow, and its number there."""
    flow: int = 0

    @property
    def session_and_flow(self) -> bytes:
        """The bytes behind the name, which the agent's proof signs as well."""
        flow = _FLOW.pack(self.path, self.flow) if self.kind == ATTACH else b""
        return self.session + flow


class Welcome(NamedTuple):
    """The bridge's answer to a valid proof."""

    proof: bytes
    session: bytes


class BridgePort(NamedTuple):
    """A port of the bridge, which identifies a service of the agent."""

    network: str
    """ "tcp" or "udp"."""
    port: int

    def __str__(self) -> str:
        return f"{self.port}/{self.network}"


class Registration(NamedTuple):
    """What an agent tells its bridge with REGISTER."""

    services: Sequence[BridgePort]
    """All ports that the agent wants to serve."""
    is_exit: bool
    reuses: bool = False
    """True if the bridge may send OPEN_REUSABLE."""
    takes_paths: bool = False
    """True if the bridge may send PATH_OFFER, PATH_END and FLOW (protocol.tunnels.path)."""
    resumes: bool = False
    """True if the bridge may send RESUMABLE: the agent will go on with a session."""
    takes_direct: bool = False
    """True if the bridge may have clients talk to the agent directly (protocol.tunnels.direct)."""


class OpenRequest(NamedTuple):
    """What the bridge wants a work connection to carry."""

    network: str
    """ "tcp" or "udp"."""
    client: Address
    """The client of the bridge, for the agent's records and for PROXY headers."""
    target: BridgePort | Address
    """A service, or an address that an agent dials as an exit."""


class TunnelMessage(NamedTuple):
    """A capsule."""

    kind: int
    """REGISTER to DIRECT_STATE; a type of a later version may have any other number."""
    value: bytes


# -- the handshake


# Hello, agent to bridge; no SESSION for CONTROL; PATH and FLOW for ATTACH alone
# +-------+---------+------+-------+-----+------+---------+------+------+
# | MAGIC | VERSION | KIND | NONCE | LEN | NAME | SESSION | PATH | FLOW |
# |   4   |    1    |  1   |  32   |  1  | 1-63 |   16    |  8   |  8   |
# +-------+---------+------+-------+-----+------+---------+------+------+
def encode_hello(hello: Hello) -> bytes:
    """Return the bytes of a hello."""
    name = hello.name.encode("ascii")
    head = MAGIC + bytes((VERSION, hello.kind))
    return head + hello.nonce + bytes((len(name),)) + name + hello.session_and_flow


def read_hello(reader: Reader) -> Steps[Hello]:
    """Read a hello.

    Raises ProtocolError for another version, an unknown kind and an invalid agent name.
    """
    head = yield from reader.read_exactly(_HEAD_SIZE)
    if not head.startswith(MAGIC):
        raise ProtocolError("not a tunnel agent")
    version, kind = head[-2:]
    if version != VERSION or kind > ATTACH:
        raise ProtocolError(
            f"unknown tunnel version {version} or connection kind {kind}"
            f" (supported: version {VERSION}, kinds {CONTROL} to {ATTACH})"
        )
    nonce = yield from reader.read_exactly(NONCE_SIZE)
    length = yield from reader.read_exactly(1)
    raw_name = yield from reader.read_exactly(length[0])
    name = raw_name.decode("latin-1")
    if not re.match(_AGENT_NAME, name):
        raise ProtocolError("not a valid agent name")
    session = flow = b""
    if kind != CONTROL:
        session = yield from reader.read_exactly(SESSION_SIZE)
    if kind == ATTACH:
        flow = yield from reader.read_exactly(_FLOW.size)
    return Hello(kind, name, nonce, session, *(_FLOW.unpack(flow) if flow else ()))


# Challenge and welcome, bridge to agent; a refusal may replace either.
# Between challenge and welcome the agent sends PROOF alone.
# +----+-------+      +----+-------+---------+      +----+--------+
# | 01 | NONCE |      | 02 | PROOF | SESSION |      | 03 | REASON |
# | 1  |  32   |      | 1  |  32   |   16    |      | 1  |   1    |
# +----+-------+      +----+-------+---------+      +----+--------+
def encode_challenge(nonce: bytes) -> bytes:
    """Return the bytes of a challenge with the bridge's nonce."""
    return bytes((_CHALLENGE,)) + nonce


def encode_welcome(welcome: Welcome) -> bytes:
    """Return the bytes of a welcome."""
    return bytes((_WELCOME,)) + welcome.proof + welcome.session


def encode_refusal(reason: int) -> bytes:
    """Return the bytes of a refusal; `reason` is a key of REFUSALS."""
    return bytes((_REFUSAL, reason))


def read_challenge(reader: Reader) -> Steps[bytes | int]:
    """Read a challenge: return the bridge's nonce, or the reason of its refusal.

    Raises ProtocolError for anything else.
    """
    kind = yield from reader.read_exactly(1)
    if not _is_answer(kind[0], _CHALLENGE):
        reason = yield from reader.read_exactly(1)
        return reason[0]
    nonce = yield from reader.read_exactly(NONCE_SIZE)
    return nonce


def read_welcome(reader: Reader) -> Steps[Welcome | int]:
    """Read a welcome: return it, or the reason of the bridge's refusal.

    Raises ProtocolError for anything else.
    """
    kind = yield from reader.read_exactly(1)
    if not _is_answer(kind[0], _WELCOME):
        reason = yield from reader.read_exactly(1)
        return reason[0]
    proof = yield from reader.read_exactly(PROOF_SIZE)
    session = yield from reader.read_exactly(SESSION_SIZE)
    return Welcome(proof, session)


def _is_answer(kind: int, expected: int) -> bool:
    """Return whether the bridge sent what was expected, False for a refusal."""
    if kind not in (expected, _REFUSAL):
        raise ProtocolError("not a tunnel bridge")
    return kind == expected


# The bytes that a proof signs; SESSION: of the agent all that follows the name in its hello
# +-------+------+------+-----+------+---------------+----------------+-----------+
# | LABEL | ROLE | KIND | LEN | NAME | AGENT'S NONCE | BRIDGE'S NONCE |  SESSION  |
# |  18   |  1   |  1   |  1  | 1-63 |      32       |       32       | 0, 16, 32 |
# +-------+------+------+-----+------+---------------+----------------+-----------+
def agent_proof(token: bytes, hello: Hello, nonce: bytes) -> bytes:
    """Return the agent's proof; `nonce` is the bridge's."""
    return _sign(token, b"A", hello, nonce, hello.session_and_flow)


def bridge_proof(token: bytes, hello: Hello, nonce: bytes, session: bytes) -> bytes:
    """Return the bridge's proof; `nonce` is the bridge's, `session` that of its welcome."""
    return _sign(token, b"B", hello, nonce, session)


def _sign(token: bytes, role: bytes, hello: Hello, nonce: bytes, session: bytes) -> bytes:
    # Imported late: a daemon without a tunnel does not need it.
    import hmac

    name = hello.name.encode("ascii")
    signed = _LABEL + role + bytes((hello.kind, len(name))) + name + hello.nonce + nonce + session
    return hmac.digest(token, signed, "sha256")


def secrets_equal(given: bytes, expected: bytes) -> bool:
    """Compare in a time that does not tell where the two differ."""
    # Imported late, as in _sign().
    import hmac

    return hmac.compare_digest(given, expected)


# -- capsules


# RFC 9297 section 3.2
# +----------+------------+-------+
# | Type (i) | Length (i) | Value |
# +----------+------------+-------+
def encode_message(kind: int, value: bytes = b"") -> bytes:
    """Return the bytes of a capsule."""
    return encode_varint(kind) + encode_varint(len(value)) + value


def parse_message(buffer: bytes) -> tuple[TunnelMessage, int] | None:
    """Return the capsule at the start of a buffer and its end, None until it is complete.

    Raises ProtocolError as soon as the length is known to exceed MESSAGE_LIMIT.
    """
    kind = parse_varint(buffer, 0, len(buffer))
    length = parse_varint(buffer, kind[1], len(buffer)) if kind else None
    if not kind or not length:
        return None
    _check_length(length[0])
    end = length[1] + length[0]
    if end > len(buffer):
        return None
    return TunnelMessage(kind[0], buffer[length[1] : end]), end


def read_message(reader: Reader) -> Steps[TunnelMessage]:
    """Read a capsule.  Raises ProtocolError if it is longer than MESSAGE_LIMIT."""
    kind = yield from _read_varint(reader)
    length = yield from _read_varint(reader)
    _check_length(length)
    value = yield from reader.read_exactly(length)
    return TunnelMessage(kind, value)


def _check_length(length: int) -> None:
    if length > MESSAGE_LIMIT:
        raise ProtocolError(f"a tunnel message of {length} bytes (limit {MESSAGE_LIMIT})")


def _read_varint(reader: Reader) -> Steps[int]:
    first = yield from reader.read_exactly(1)
    rest = yield from reader.read_exactly((1 << (first[0] >> 6)) - 1)
    parsed = parse_varint(first + rest, 0, VARINT_LONGEST)
    assert parsed is not None
    return parsed[0]


# REGISTER; FLAGS are the bits of Registration      REGISTERED
# +-------+----------------------+       +--------------------------------+
# | FLAGS | NETWORK | PORT | ... |       | NETWORK | PORT | OUTCOME | ... |
# |   1   |    1    |  2   |     |       |    1    |  2   |    1    |     |
# +-------+----------------------+       +--------------------------------+
def encode_register(registration: Registration) -> bytes:
    """Return the bytes of a REGISTER message."""
    services, *said = registration
    flags = sum(flag for flag, is_set in zip(_FLAGS, said, strict=True) if is_set)
    value = bytes((flags,)) + b"".join(map(_encode_bridge_port, services))
    return encode_message(REGISTER, value)


def parse_register(value: bytes) -> Registration:
    """Return the registration in a REGISTER message.  Raises ProtocolError."""
    if len(value) % 3 != 1 or len(value) > 1 + 3 * SERVICES_LIMIT:
        raise ProtocolError("a malformed REGISTER message")
    services = [_parse_bridge_port(value[at : at + 3]) for at in range(1, len(value), 3)]
    return Registration(services, *(bool(value[0] & flag) for flag in _FLAGS))


def encode_registered(outcomes: Iterable[tuple[BridgePort, int]]) -> bytes:
    """Return the bytes of a REGISTERED message: each port with a key of OUTCOMES."""
    value = b"".join(_encode_bridge_port(port) + bytes((outcome,)) for port, outcome in outcomes)
    return encode_message(REGISTERED, value)


def parse_registered(value: bytes) -> list[tuple[BridgePort, int]]:
    """Return the ports and their outcomes, which may be unknown ones.  Raises ProtocolError."""
    if len(value) % 4:
        raise ProtocolError("a malformed REGISTERED message")
    return [
        (_parse_bridge_port(value[at : at + 3]), value[at + 3]) for at in range(0, len(value), 4)
    ]


def encode_number(kind: int, number: int) -> bytes:
    """Return the bytes of a message that is a number.

    WANT: a count; CLOSE and REFUSE: a reason; PATH_END: a path.
    """
    return encode_message(kind, encode_varint(number))


def parse_number(value: bytes) -> int:
    """Return the number in a message that is a number.  Raises ProtocolError."""
    parsed = parse_varint(value, 0, len(value))
    if parsed is None:
        raise ProtocolError("a tunnel message without its number")
    return parsed[0]


# OPEN and OPEN_REUSABLE; CLIENT and an address as target are ATYP, ADDR and PORT of SOCKS5
# (RFC 1928 section 5)
# +---------+--------+-----+--------+      +------------+
# | NETWORK | CLIENT | 00  |  PORT  |  or  | 01 | TARGET |
# |    1    |  7-19  |  1  |   2    |      | 1  | 7-259  |
# +---------+--------+-----+--------+      +------------+
def encode_open(request: OpenRequest, kind: int = OPEN) -> bytes:
    """Return the bytes of an OPEN message, or of another `kind`: OPEN_REUSABLE."""
    target = request.target
    if isinstance(target, BridgePort):
        encoded_target = bytes((_TO_SERVICE,)) + target.port.to_bytes(2, "big")
    else:
        encoded_target = bytes((_TO_ADDRESS,)) + socks5.encode_address(target)
    network = bytes((_NETWORK_NUMBERS[request.network],))
    return encode_message(kind, network + socks5.encode_address(request.client) + encoded_target)


def parse_open(value: bytes) -> OpenRequest:
    """Return the request in an OPEN or OPEN_REUSABLE message.  Raises ProtocolError."""
    size = address_size(value, 1, len(value)) or len(value)
    end = 1 + size
    if end >= len(value) or value[0] not in _NETWORKS:
        raise ProtocolError("a malformed OPEN message")
    network, client, rest = _NETWORKS[value[0]], socks5.parse_target(value[1:end]), value[end + 1 :]
    if value[end] == _TO_ADDRESS:
        return OpenRequest(network, client, socks5.parse_target(rest))
    if value[end] != _TO_SERVICE or len(rest) != 2:
        raise ProtocolError("an OPEN message with an unknown kind of target")
    return OpenRequest(network, client, BridgePort(network, int.from_bytes(rest, "big")))


def encode_accept(flow: int = 0) -> bytes:
    """Return the bytes of an ACCEPT message; `flow`: of a FLOW message that is taken, 0: none."""
    return encode_number(ACCEPT, flow) if flow else encode_message(ACCEPT)


def parse_accept(value: bytes) -> int:
    """Return the flow that the agent has taken, 0 for none.  Raises ProtocolError."""
    return parse_number(value) if value else 0


def encode_refuse(reason: Reason) -> bytes:
    """Return the bytes of a REFUSE message."""
    return encode_number(REFUSE, _REASON_CODES[reason])


def parse_refuse(value: bytes) -> Reason:
    """Return the reason in a REFUSE message: GENERAL for a number of a later version.

    Raises ProtocolError.
    """
    return REASONS.get(parse_number(value), Reason.GENERAL)


def address_size(buffer: bytes | bytearray, start: int, end: int) -> int:
    """Return the bytes of ATYP, ADDR and PORT at `start`, 0 if too few are there before `end`.

    Raises ProtocolError for an unknown ATYP.
    """
    if end - start < 2:
        return 0
    kind = buffer[start]
    if kind == socks5.NAME:
        return 4 + buffer[start + 1]
    if kind not in (socks5.IPV4, socks5.IPV6):
        raise ProtocolError("an unknown address type in a tunnel message")
    return 7 if kind == socks5.IPV4 else 19


def _encode_bridge_port(port: BridgePort) -> bytes:
    return bytes((_NETWORK_NUMBERS[port.network],)) + port.port.to_bytes(2, "big")


def _parse_bridge_port(raw: bytes) -> BridgePort:
    if raw[0] not in _NETWORKS:
        raise ProtocolError("a service that is neither TCP nor UDP")
    return BridgePort(_NETWORKS[raw[0]], int.from_bytes(raw[1:], "big"))
