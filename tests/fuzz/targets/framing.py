"""PROXY headers, capsules, UDP over TCP, and the handshakes and messages of tunnels."""

from __future__ import annotations

import ipaddress
import struct
from functools import partial
from typing import Any, Callable

from netproxy.interfaces.addresses import Address
from netproxy.protocol import proxy_protocol, tunnel, uot
from netproxy.protocol.http import bound_udp, capsule, connect_udp
from netproxy.protocol.http.capsule import Capsules
from netproxy.protocol.http.contexts import BoundCapsules
from netproxy.protocol.tunnels.datagrams import AddressedDatagrams
from netproxy.protocol.uot import Frames
from netproxy.tunnel.streams.chunks import ChunkedSocket
from tests.support.records import Records
from tests.fuzz.target import Outcome, Target, accepted, check_framing, check_reader, read_outcome

_TARGET = Address("192.0.2.1", 443)
_NAMES = (b"example.com", b"a.", b"127.1", b"::1", b"\xff", b"0.0.0.0")
_ADDRESSES = (b"\1\x7f\0\0\1\0\x50", b"\3\x0bexample.com\0\x50", b"\4" + bytes(15) + b"\1\0\x50")
_VARINTS = (b"\x00", b"\x3f", b"\x40\x40", b"\x80\0\x40\0", b"\xc0" + bytes(7), b"\xff" * 8)


# -- the PROXY protocol

_BLOCK_LIMIT = 300


def _check_proxy(data: bytes) -> None:
    header = check_reader(proxy_protocol.read_header, data, max(16 + _BLOCK_LIMIT, 107))
    if not header.accepted:
        return
    raw = data[: len(data) - len(header.rest)]
    expected = _client_in_line(raw) if raw.startswith(b"PROXY") else _client_in_block(raw)
    assert _client(header.result) == expected, (header, expected)
    if header.result is not None:
        written = proxy_protocol.encode_v2(header.result, header.result)
        assert _client_in_block(written) == expected
        again = read_outcome(proxy_protocol.read_header, written, len(written), 1)
        assert again[:3] == (True, header.result, b"")


_Client = tuple["ipaddress.IPv4Address | ipaddress.IPv6Address", int]


def _client(address: Address | None) -> _Client | None:
    return None if address is None else (ipaddress.ip_address(address.host), address.port)


def _client_in_line(line: bytes) -> _Client | None:
    """Read the source by section 2.1 of the specification."""
    _, family, *fields = line.removesuffix(b"\r\n").decode("latin-1").split(" ")
    if family == "UNKNOWN":
        return None
    source = ipaddress.ip_address(fields[0])
    assert f"TCP{source.version}" == family and len(fields) == 4
    return getattr(source, "ipv4_mapped", None) or source, int(fields[2])


def _client_in_block(block: bytes) -> _Client | None:
    """Read the source by section 2.2 of the specification."""
    signature, version_command, family, length = struct.unpack_from(">12sBBH", block)
    assert signature == b"\r\n\r\n\0\r\nQUIT\n" and version_command >> 4 == 2
    assert len(block) == 16 + length
    size = {1: 4, 2: 16}.get(family >> 4)
    if version_command & 15 == 0 or size is None or not family & 15:
        return None
    source = ipaddress.ip_address(block[16 : 16 + size])
    (port,) = struct.unpack_from(">H", block, 16 + 2 * size)
    return getattr(source, "ipv4_mapped", None) or source, port


# -- capsules

_VALUE_LIMIT, _PAYLOAD_LIMIT = 200, 190


def _check_capsules(data: bytes) -> None:
    number = accepted(capsule.parse_varint, data, 0, len(data))
    if number is not None:
        value, end = number
        assert value <= capsule.VARINT_LIMIT and end in (1, 2, 4, 8)
        shortest = capsule.encode_varint(value)
        assert len(shortest) <= end
        assert capsule.parse_varint(shortest, 0, len(shortest)) == (value, len(shortest))
    make = partial(Capsules, _TARGET)
    for payload, _ in check_framing(make, data, 16 + _VALUE_LIMIT):
        framed = make().prefix(b"", len(payload)) + payload
        assert check_framing(make, framed, 16 + _VALUE_LIMIT) == [(payload, b"")]


# -- bound streams of connect-udp


def _check_bound(data: bytes) -> None:
    accepted(bound_udp.parse_assign, data)
    accepted(bound_udp.parse_context, data)
    address = accepted(bound_udp.parse_address, data)
    if address is not None:
        assert bound_udp.parse_address(bound_udp.encode_address(address)) == address
    fields = [(b"connect-udp-bind", data), (b"proxy-public-address", data)]
    told = bound_udp.parse_public_addresses(fields)
    assert bound_udp.parse_public_addresses(bound_udp.accept_fields(told)) == told
    assert not (connect_udp.is_bind_offered(fields) and told)
    for first in (None, _TARGET):
        for is_proxy in (True, False):
            _check_contexts(data, first, is_proxy)


def _check_contexts(data: bytes, first: Address | None, is_proxy: bool) -> None:
    made: list[BoundCapsules] = []

    def make() -> BoundCapsules:
        made.append(BoundCapsules(first, is_proxy, _is_even, lambda counter, reason: None))
        return made[-1]

    frames = check_framing(make, data, 16 + _VALUE_LIMIT)
    # However the bytes came, the answers and what is left of the contexts are the same.
    assert len({framing.take_answers() for framing in made[:3]}) == 1
    framing = made[0]
    for payload, raw in frames:
        assert raw is not None
        target = framing.parse(raw)
        if framing.takes(raw):
            framed = framing.prefix(raw, len(payload)) + payload
            start, end, again = framing.find(bytearray(framed), 0, len(framed)) or (0, 0, None)
            assert (framed[start:end], again) == (payload, raw)
        assert framing.parse(bound_udp.encode_address(target)) == target


def _is_even(target: Address) -> bool:
    return not target.port % 2


# -- UDP over TCP


def _check_uot(data: bytes) -> None:
    request = check_reader(uot.read_request, data, 2 + 1 + 255 + 2)
    if request.accepted:
        written = uot.encode_request(request.result)
        again = read_outcome(uot.read_request, written, len(written), 1)
        assert again[:3] == (True, request.result, b"")
    largest = 259 + 2 + 65535
    for make in (Frames, partial(Frames, _TARGET)):
        framing = make()
        for payload, raw in check_framing(make, data, largest):
            assert raw is not None
            target = accepted(framing.parse, raw)
            if target is None:
                continue
            again_raw = framing.encode(target)
            assert framing.parse(again_raw) == target
            framed = framing.prefix(again_raw, len(payload)) + payload
            assert check_framing(make, framed, largest) == [(payload, again_raw)]


# -- tunnels


def _check_handshake(data: bytes) -> None:
    hello = check_reader(tunnel.read_hello, data, 6 + 32 + 1 + 255 + 32)
    if hello.accepted:
        assert tunnel.encode_hello(hello.result) == data[: len(data) - len(hello.rest)]
    challenge = check_reader(tunnel.read_challenge, data, 33)
    if challenge.accepted:
        _check_answer(data, challenge, tunnel.encode_challenge)
    welcome = check_reader(tunnel.read_welcome, data, 49)
    if welcome.accepted:
        _check_answer(data, welcome, tunnel.encode_welcome)


def _check_answer(data: bytes, answer: Outcome, encode: Callable[[Any], bytes]) -> None:
    """Check what the bridge says.  Any: nonce or Welcome."""
    refused = isinstance(answer.result, int)
    written = tunnel.encode_refusal(answer.result) if refused else encode(answer.result)
    assert written == data[: len(data) - len(answer.rest)]


def _check_messages(data: bytes) -> None:
    message = check_reader(tunnel.read_message, data, 16 + 100)
    parsed = accepted(tunnel.parse_message, data)
    assert (parsed is not None) == message.accepted
    if parsed is not None:
        assert parsed == (message.result, len(data) - len(message.rest))
        kind, value = message.result
        written = tunnel.encode_message(kind, value)
        assert tunnel.parse_message(written) == (message.result, len(written))
        _check_value(value)
    framing = AddressedDatagrams()
    for payload, raw in check_framing(AddressedDatagrams, data, 16 + _VALUE_LIMIT):
        assert raw is not None
        target = accepted(framing.parse, raw)
        if target is not None:
            assert framing.parse(framing.encode(target)) == target
            framed = framing.prefix(raw, len(payload)) + payload
            longest = 16 + _VALUE_LIMIT + 8
            assert check_framing(AddressedDatagrams, framed, longest) == [(payload, raw)]


def _check_value(value: bytes) -> None:
    """Check a value as that of every type of message."""
    accepted(tunnel.parse_number, value)
    accepted(tunnel.parse_refuse, value)
    register = accepted(tunnel.parse_register, value)
    if register is not None:
        assert _value_of(tunnel.encode_register(register))[1:] == value[1:]
    registered = accepted(tunnel.parse_registered, value)
    if registered is not None:
        assert _value_of(tunnel.encode_registered(registered)) == value
    request = accepted(tunnel.parse_open, value)
    if request is not None:
        # Names come in one spelling, and v4-mapped addresses as IPv4.
        assert tunnel.parse_open(_value_of(tunnel.encode_open(request))) == request


def _value_of(message: bytes) -> bytes:
    parsed = tunnel.parse_message(message)
    assert parsed is not None and parsed[1] == len(message)
    return parsed[0].value


# -- streams in chunks

_CHUNK_LIMIT = 40
_READ_SIZES = (1, 7, 4096)


def _check_chunks(data: bytes) -> None:
    """Read a direction in all ways; all must have the outcome that the page describes."""
    expected, outcome = _direction(data)
    cut = len(data) // 2
    single = [data[at : at + 1] for at in range(len(data))]
    for pieces in ([data], single, [data[:cut], data[cut:]]):
        for ahead in (0, 1):
            for size in _READ_SIZES:
                kept = [piece for piece in pieces[ahead:] if piece]
                unread = b"".join(pieces[:ahead])
                stream = ChunkedSocket(Records(kept, is_cut=True), unread)
                read, seen = _read_direction(stream, size, len(data))
                assert seen == outcome
                # A fault may cost what was read with it, as a reset does.
                assert read == expected or (seen == "refused" and expected.startswith(read))


def _read_direction(stream: ChunkedSocket, size: int, limit: int) -> tuple[bytes, str]:
    data, view = b"", memoryview(bytearray(size))
    for _ in range(limit + 1):
        try:
            count = stream.recv_into(view)
        except ConnectionResetError:
            return data, "cut"
        except OSError:
            return data, "refused"
        if not count:
            break
        data += view[:count]
    assert stream.peer_ended and not stream.recv_into(view)
    return data, "ended"


def _direction(data: bytes) -> tuple[bytes, str]:
    """Return the bytes of a direction and its outcome."""
    read = b""
    while len(data) >= 4:
        (length,) = struct.unpack_from(">I", data)
        data = data[4:]
        if not length:
            return read, "ended"
        if length == 0xFFFFFFFF:
            return read + data, "ended"
        if length > _CHUNK_LIMIT:
            return read, "refused"
        read, data = read + data[:length], data[length:]
    return read, "cut"


TARGETS = (
    Target(
        "proxy",
        _check_proxy,
        (
            *(b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN", b"\r\n", b" ", b"192.0.2.1 "),
            *(b"2001:db8::1 ", b"65535", b"\x21\x11\0\x0c", b"\x21\x21\0\x24", b"\x20\0\0\0"),
            *(proxy_protocol.SIGNATURE, b"\0\xd8", bytes(12), b"::ffff:192.0.2.1 "),
        ),
        limits={"protocol.proxy_protocol.BLOCK_LIMIT": _BLOCK_LIMIT},
    ),
    Target(
        "capsule",
        _check_capsules,
        (b"\0\6\0hello", b"\0\1\0", b"\0\2\1x", b"\x40\0", *_VARINTS),
        1024,
        {
            "protocol.http.capsule.VALUE_LIMIT": _VALUE_LIMIT,
            "protocol.http.capsule.UDP_PAYLOAD_LIMIT": _PAYLOAD_LIMIT,
        },
    ),
    Target(
        "bound-udp",
        _check_bound,
        (
            *(b"\x11\2\2\0", b"\x11\x08\4\4\xc0\0\2\1\0\x50", b"\x12\1\2", b"\x13\1\2"),
            *(b"\0\x0a\2\4\xc0\0\2\1\0\x50hi", b"\0\3\4hi", b"\0\3\0hi", b"\x11\x14\6\6"),
            *(b"\x11\x08\1\4\xc0\0\2\1\0\x50", *_VARINTS, b'"192.0.2.1:80"', b"?1;a=1"),
        ),
        1024,
        {
            "protocol.http.contexts.CONTEXTS_LIMIT": 4,
            "protocol.http.contexts.CLOSED_LIMIT": 4,
            "protocol.http.contexts.UDP_PAYLOAD_LIMIT": _PAYLOAD_LIMIT,
            "protocol.http.contexts._DATAGRAM_LIMIT": _VALUE_LIMIT,
        },
    ),
    Target(
        "uot",
        _check_uot,
        (b"\1\1", b"\0\3", b"\0\x7f\0\0\1\0\x35\0\2hi", b"\2\1a\0\x35\0\0", *_NAMES, *_ADDRESSES),
        1024,
    ),
    Target(
        "tunnel-handshake",
        _check_handshake,
        (tunnel.MAGIC + b"\1\0", tunnel.MAGIC + b"\1\1", b"\3\1", b"\2", b"\4name", bytes(32)),
        1024,
    ),
    Target(
        "tunnel-messages",
        _check_messages,
        (
            *(b"\x80\x4e\x54", b"\x80\x4e\x54\1\4\0\6\0\x50", b"\x80\x4e\x54\x07", b"\6", b"\x11"),
            *(*_ADDRESSES, *_VARINTS, *_NAMES, b"\0\x09\2\1\x7f\0\0\1\0\x35x", b"\0\2"),
        ),
        1024,
        {
            "protocol.tunnel.MESSAGE_LIMIT": 100,
            "protocol.tunnel.SERVICES_LIMIT": 8,
            "protocol.tunnels.datagrams._VALUE_LIMIT": _VALUE_LIMIT,
        },
    ),
    Target(
        "tunnel-chunks",
        _check_chunks,
        (bytes(4), b"\xff\xff\xff\xff", b"\0\0\0\5hello", b"\0\0\0\x28", b"\0\0\0\x29", b"\0"),
        256,
        {"tunnel.streams.chunks.CHUNK_LIMIT": _CHUNK_LIMIT},
    ),
)
