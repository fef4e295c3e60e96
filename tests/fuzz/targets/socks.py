"""SOCKS4, SOCKS5 and the headers of SOCKS5 datagrams."""

from __future__ import annotations

import ipaddress
import struct

from netproxy.interfaces.addresses import Address
from netproxy.protocol import socks4, socks5
from tests.fuzz.target import Outcome, Target, accepted, check_reader, read_outcome

_SOCKS4_LIMIT = 8 + 2 * 256
_SOCKS5_LIMIT = 4 + 1 + 255 + 2
_CREDENTIALS_LIMIT = 3 + 2 * 255
_NAMES = (b"example.com", b"a.", b"127.1", b"0x7f.1", b"::1", b"[::1]", b"0.0.0.0", b"\xff")
# Bytes behind ATYP by type, apart from a name, which tells its own.
_ADDRESS_SIZES = {1: 4, 4: 16}


def _check_socks4(data: bytes) -> None:
    request = check_reader(socks4.read_request, data, _SOCKS4_LIMIT)
    if request.accepted:
        _check_written_socks4(data, *request.result)
    reply = check_reader(socks4.read_reply, data, 8)
    if reply.accepted:
        code, bound = reply.result
        assert socks4.encode_reply(code, bound) == data[:8]


def _check_written_socks4(data: bytes, command: int, target: Address, user_id: bytes) -> None:
    written = socks4.encode_request(command, target, user_id)
    again = read_outcome(socks4.read_request, written, len(written), 1)
    assert again[:3] == (True, (command, target, user_id), b""), again
    for form in (data, written):
        # By the memo: a NUL ends the user, and for 0.0.0.x another one the name.
        version, read_command, port, ip = struct.unpack_from(">BBH4s", form)
        user, _, behind = form[8:].partition(b"\0")
        assert (version, read_command, port, user) == (4, command, target.port, user_id)
        if ip[:3] != b"\0\0\0":
            assert str(ipaddress.IPv4Address(ip)) == target.host
        elif form is written:
            assert behind == target.host.encode() + b"\0"


def _check_socks5(data: bytes) -> None:
    for read, limit in (
        (socks5.read_methods, 2 + 255),
        (socks5.read_method, 2),
        (socks5.read_credentials_status, 2),
    ):
        check_reader(read, data, limit)
    credentials = check_reader(socks5.read_credentials, data, _CREDENTIALS_LIMIT)
    if credentials.accepted:
        user, password = credentials.result
        sizes = struct.pack("B", len(user)), struct.pack("B", len(password))
        raw = b"\1" + sizes[0] + user + sizes[1] + password
        assert data.startswith(raw)
    request = check_reader(socks5.read_request, data, _SOCKS5_LIMIT)
    if request.accepted:
        _check_written_socks5(data, request)
    reply = check_reader(socks5.read_reply, data, _SOCKS5_LIMIT)
    if reply.accepted:
        _check_written_socks5(data, reply)


def _check_written_socks5(data: bytes, message: Outcome) -> None:
    """Check a request or a reply, which have the same form."""
    code, address = message.result
    written = socks5.encode_request(code, address)
    assert written == socks5.encode_reply(code, address)
    again = read_outcome(socks5.read_request, written, len(written), 1)
    assert again[:3] == (True, (code, address), b""), again
    assert written[:3] == bytes((5, code, 0))
    _check_address(written[3:], address)
    if len(data) - len(message.rest) > 4 and data[3] in _ADDRESS_SIZES:
        _check_address(data[3 : len(data) - len(message.rest)], address)


def _check_address(raw: bytes, address: Address) -> None:
    """Check ATYP, address and port against RFC 1928 section 5."""
    (port,) = struct.unpack(">H", raw[-2:])
    if raw[0] == 3:
        assert raw[2:-2] == address.host.encode() and raw[1] == len(raw) - 4
    else:
        ip = ipaddress.ip_address(raw[1:-2])
        assert len(raw) == 3 + _ADDRESS_SIZES[raw[0]]
        expected = getattr(ip, "ipv4_mapped", None) or ip
        assert ipaddress.ip_address(address.host) == expected, (raw, address)
    assert port == address.port


def _check_datagrams(data: bytes) -> None:
    """Two bytes tell how many datagrams follow, and the length of each but the last."""
    if len(data) < 3:
        return
    count, step, memory = 1 + data[0] % 40, 1 + data[1], bytearray(data[2:])
    count = min(count, -(-len(memory) // step))
    last = min(step, len(memory) - (count - 1) * step)
    offsets = range(0, count * step, step)
    if len(memory) >= 5:
        _check_header(bytes(memory))
    skip = socks5.common_header(memory, offsets, last)
    ends = [*(at + step for at in offsets[:-1]), offsets[-1] + last]
    datagrams = [bytes(memory[start:end]) for start, end in zip(offsets, ends, strict=True)]
    headers = {datagram[2 : _header_size(datagram)] for datagram in datagrams}
    whole = all(0 < _header_size(datagram) <= len(datagram) for datagram in datagrams)
    same = len(headers) == 1 and whole
    assert skip == (_header_size(datagrams[0]) if same else 0), (skip, datagrams)


def _header_size(datagram: bytes) -> int:
    """Return the bytes of header by RFC 1928 section 7, 0 if it is no header."""
    if len(datagram) < 8:
        return 0
    if datagram[3] == 3:
        return 4 + 1 + datagram[4] + 2
    return 4 + _ADDRESS_SIZES[datagram[3]] + 2 if datagram[3] in _ADDRESS_SIZES else 0


def _check_header(datagram: bytes) -> None:
    size = socks5.header_length(datagram)
    assert size == (_header_size(datagram.ljust(8, b"\0")))
    target = accepted(socks5.parse_target, datagram[socks5.ATYP_AT : size])
    if target is not None:
        header = socks5.encode_header(target)
        assert header[:3] == b"\0\0\0"
        assert socks5.parse_target(header[3:]) == target
        _check_address(header[3:], target)


TARGETS = (
    Target(
        "socks4",
        _check_socks4,
        (b"\4\1", b"\4\2", b"\0\x5a", b"\0\x5b", b"\0\0\0\1", b"\0\x50", *_NAMES),
    ),
    Target(
        "socks5",
        _check_socks5,
        (b"\5\1\0", b"\5\2\0", b"\5\3\0", b"\5\0\0", b"\1\1u\1p", b"\3\1", b"\0\x50", *_NAMES),
    ),
    Target(
        "socks-udp",
        _check_datagrams,
        (b"\0\0\0\1", b"\0\0\0\3", b"\0\0\0\4", b"\0\0\1", b"\0\x35", *_NAMES),
    ),
)
