"""UDP over TCP, version 2 (SagerNet/sing common/uot): the bytes of both roles.

A connection to the name MAGIC carries a request and then frames, one datagram in each.
Frames are found where they lie in a buffer and never copied; the caller decides what is
done with them and how much is buffered.  Version 1 has no request: its frames follow at
once and name their targets.  No I/O.  Thread: any.
"""

from __future__ import annotations

from netproxy.errors import ProtocolError
from netproxy.protocol import socks5
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Reader, Steps

# The host names that stand for UoT; the port beside them means nothing.
MAGIC, MAGIC_V1 = "sp.v2.udp-over-tcp.arpa", "sp.udp-over-tcp.arpa"
# ATYP in frames; requests have the numbers of SOCKS5.
IPV4, IPV6, NAME = 0, 1, 2

_SOCKS_TYPES = {IPV4: socks5.IPV4, IPV6: socks5.IPV6, NAME: socks5.NAME}
_FRAME_TYPES = {socks_type: frame_type for frame_type, socks_type in _SOCKS_TYPES.items()}
# Bytes of address and port behind ATYP in a request; of ATYP, address and port in a frame.
_REQUEST_SIZES = {socks5.IPV4: 6, socks5.IPV6: 18}
_FRAME_SIZES = {IPV4: 7, IPV6: 19}


class UotRequest(NamedTuple):
    """What a UoT stream is for."""

    connected: bool
    """True if each frame is for `target` and carries no address."""
    target: Address
    """If not connected: a hint at best."""


# Request; ATYP as in SOCKS5
# +-----------+------+----------+----------+
# | CONNECTED | ATYP | DST.ADDR | DST.PORT |
# |     1     |  1   | 4/1+n/16 |    2     |
# +-----------+------+----------+----------+
def read_request(reader: Reader) -> Steps[UotRequest]:
    """Read a request.

    Raises ProtocolError for a CONNECTED other than 0 and 1, an unknown ATYP and an invalid name.
    """
    connected, address_type = yield from reader.read_exactly(2)
    if connected > 1:
        raise ProtocolError("not a UoT request")
    if address_type == socks5.NAME:
        length = yield from reader.read_exactly(1)
        raw = length + (yield from reader.read_exactly(length[0] + 2))
    elif address_type in _REQUEST_SIZES:
        raw = yield from reader.read_exactly(_REQUEST_SIZES[address_type])
    else:
        raise ProtocolError("unknown address type in a UoT request")
    return UotRequest(connected == 1, socks5.parse_target(bytes((address_type,)) + raw))


def encode_request(request: UotRequest) -> bytes:
    """Encode a request."""
    return bytes((request.connected,)) + socks5.encode_address(request.target)


# Frame; ATYP is 0 for IPv4, 1 for IPv6, 2 for a name.  LEN counts DATA.  In a connected
# stream a frame begins with LEN.
# +------+----------+----------+-----+------+
# | ATYP | DST.ADDR | DST.PORT | LEN | DATA |
# |  1   | 4/16/1+n |    2     |  2  |      |
# +------+----------+----------+-----+------+
def encode_address(target: Address) -> bytes:
    """Encode ATYP, DST.ADDR and DST.PORT of a frame."""
    raw = socks5.encode_address(target)
    return bytes((_FRAME_TYPES[raw[0]],)) + raw[1:]


def parse_address(data: bytes) -> Address:
    """Parse exactly the bytes that encode_address() returns.  Raises ProtocolError."""
    if not data or data[0] not in _SOCKS_TYPES:
        raise ProtocolError("unknown address type in a UoT frame")
    return socks5.parse_target(bytes((_SOCKS_TYPES[data[0]],)) + data[1:])


def parse_frame(
    buffer: bytearray | memoryview, start: int, end: int, connected: bool
) -> tuple[int, int, int] | None:
    """Return the offsets of a frame's address, of its payload and of its end.

    The address ends at the two bytes of LEN before the payload, so that it is empty in a
    connected stream; parse_address() checks it.  Returns None if the buffer, which is filled
    up to `end`, does not hold the whole frame.  Raises ProtocolError for an unknown ATYP and
    an empty name, as soon as they have come.
    """
    length_at = start
    if not connected:
        if end - start < 2:
            return None
        length_at += _address_size(buffer[start], buffer[start + 1])
    payload = length_at + 2
    if payload > end:
        return None
    finish = payload + (buffer[length_at] << 8 | buffer[length_at + 1])
    return (start, payload, finish) if finish <= end else None


def _address_size(address_type: int, name_length: int) -> int:
    """Return the bytes of ATYP, DST.ADDR and DST.PORT.  `name_length` is the byte behind ATYP."""
    if address_type in _FRAME_SIZES:
        return _FRAME_SIZES[address_type]
    if address_type != NAME or not name_length:
        raise ProtocolError("unknown address type or empty name in a UoT frame")
    return 4 + name_length


class Frames:
    """The framing of a UoT stream (interfaces.datagrams.Framing)."""

    payload_limit = 65535

    def __init__(self, connected: Address | None = None) -> None:
        """`connected`: the only target; None if each frame names its target."""
        self._connected = connected

    def find(self, memory: bytearray, start: int, end: int) -> tuple[int, int, bytes | None] | None:
        """Return as Framing.find(); no frame is skipped.  Raises ProtocolError."""
        connected = self._connected is not None
        frame = parse_frame(memory, start, end, connected)
        if frame is None:
            return None
        address, payload, finish = frame
        return payload, finish, b"" if connected else bytes(memory[address : payload - 2])

    def prefix(self, address: bytes, size: int) -> bytes:
        """Return what precedes a payload of `size` bytes: its address and LEN."""
        return address + size.to_bytes(2, "big")

    def encode(self, target: Address) -> bytes:
        """Return the raw address of a target.  Raises ValueError if the stream is not for it."""
        if self._connected is None:
            return encode_address(target)
        if target != self._connected:
            raise ValueError(f"the connection is to {self._connected} alone")
        return b""

    def parse(self, address: bytes) -> Address:
        """Return the target of a raw address.  Raises ProtocolError."""
        return parse_address(address) if self._connected is None else self._connected
