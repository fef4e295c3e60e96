"""UDP over TCP, version 2 (SagerNet/sing common/uot): the bytes of both roles.

A stream that is asked for by the name MAGIC carries a request and then frames, each one datagram.
Frames are found where they lie in a buffer and never copied; what is done with them, and how much
is buffered, is the caller's affair.  Version 1 is its frames alone, none of them connected.
"""

from __future__ import annotations

from typing import NamedTuple

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Reader, Steps
from netproxy.protocol import socks5

MAGIC, MAGIC_V1 = (
    "sp.v2.udp-over-tcp.arpa",
    "sp.udp-over-tcp.arpa",
)  # the port beside them means nothing
IPV4, IPV6, NAME = 0, 1, 2  # of frames; requests have the numbers of SOCKS

_SOCKS_KINDS = {IPV4: socks5.IPV4, IPV6: socks5.IPV6, NAME: socks5.NAME}
_KINDS = {kind: own for own, kind in _SOCKS_KINDS.items()}
_REQUEST_SIZES = {socks5.IPV4: 6, socks5.IPV6: 18}  # address and port behind ATYP
_FRAME_SIZES = {IPV4: 7, IPV6: 19}  # ATYP, address and port


class UotRequest(NamedTuple):
    connected: bool  # every frame is for `target`, and carries no address
    target: Address  # where not connected, a hint at best


# +-----------+------+----------+----------+
# | CONNECTED | ATYP | DST.ADDR | DST.PORT |     ATYP as in SOCKS5
# |     1     |  1   | 4/1+n/16 |    2     |
# +-----------+------+----------+----------+
def read_request(reader: Reader) -> Steps[UotRequest]:
    """ProtocolError for a CONNECTED that is neither 0 nor 1, an unknown ATYP, and a name that is none."""
    connected, kind = yield from reader.read_exactly(2)
    if connected > 1:
        raise ProtocolError("not a UoT request")
    if kind == socks5.NAME:
        length = yield from reader.read_exactly(1)
        raw = length + (yield from reader.read_exactly(length[0] + 2))
    elif kind in _REQUEST_SIZES:
        raw = yield from reader.read_exactly(_REQUEST_SIZES[kind])
    else:
        raise ProtocolError("unknown address type in a UoT request")
    return UotRequest(connected == 1, socks5.parse_target(bytes((kind,)) + raw))


def encode_request(request: UotRequest) -> bytes:
    return bytes((request.connected,)) + socks5.encode_address(request.target)


# A frame; LEN counts DATA, and is all that stands before it where the stream is connected
# +------+----------+----------+-----+------+
# | ATYP | DST.ADDR | DST.PORT | LEN | DATA |      ATYP 0 IPv4, 1 IPv6, 2 name
# |  1   | 4/16/1+n |    2     |  2  |      |
# +------+----------+----------+-----+------+
def encode_address(target: Address) -> bytes:
    """ATYP, DST.ADDR and DST.PORT of a frame: the peer's, or where the datagram goes."""
    raw = socks5.encode_address(target)
    return bytes((_KINDS[raw[0]],)) + raw[1:]


def parse_address(data: bytes) -> Address:
    """What encode_address gave, from exactly those bytes; ProtocolError for any others."""
    if not data or data[0] not in _SOCKS_KINDS:
        raise ProtocolError("unknown address type in a UoT frame")
    return socks5.parse_target(bytes((_SOCKS_KINDS[data[0]],)) + data[1:])


def next_frame(
    buffer: bytearray | memoryview, start: int, end: int, connected: bool
) -> tuple[int, int, int] | None:
    """The frame at `start` of a buffer filled up to `end`; None where it is not all there yet.

    Where its address begins, where its payload begins, and where it ends.  The address goes up to the
    two bytes of LEN before the payload, so that it is empty in a connected stream; whether it is one,
    parse_address says.  ProtocolError, as soon as it shows, for an unknown ATYP and an empty name.
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


def _address_size(kind: int, length: int) -> int:
    """Bytes of ATYP, DST.ADDR and DST.PORT; `length` is the byte behind ATYP, which counts where there is a name."""
    if kind in _FRAME_SIZES:
        return _FRAME_SIZES[kind]
    if kind != NAME or not length:
        raise ProtocolError("unknown address type or empty name in a UoT frame")
    return 4 + length


class Frames:
    """The framing of a stream of such frames (net.framed.Framing)."""

    payload_limit = 65535

    def __init__(self, connected: Address | None = None) -> None:
        """`connected`: the one target; None where each frame names its own."""
        self._connected = connected

    def find(self, memory: bytearray, start: int, end: int) -> tuple[int, int, bytes | None] | None:
        found = next_frame(memory, start, end, self._connected is not None)
        if found is None:
            return None
        address, payload, finish = found
        return (
            payload,
            finish,
            bytes(memory[address : payload - 2]) if self._connected is None else b"",
        )

    def prefix(self, address: bytes, size: int) -> bytes:
        return address + size.to_bytes(2, "big")

    def encode(self, target: Address) -> bytes:
        if self._connected is None:
            return encode_address(target)
        if target != self._connected:
            raise ValueError(f"the connection is to {self._connected} alone")
        return b""

    def parse(self, address: bytes) -> Address:
        """ProtocolError for an address that is none."""
        return parse_address(address) if self._connected is None else self._connected
