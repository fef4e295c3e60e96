"""The codec of the PROXY protocol, versions 1 and 2, in both roles."""

from __future__ import annotations

import pytest

from netproxy.errors import EndOfStream, LimitError, ProtocolError
from netproxy.interfaces.addresses import Address, ip_text, pack_ip
from netproxy.net.stream import complete
from netproxy.protocol.proxy_protocol import (
    BLOCK_LIMIT,
    LINE_LIMIT,
    SIGNATURE,
    TCP4,
    TCP6,
    UDP4,
    UDP6,
    UNIX_DATAGRAM,
    UNIX_STREAM,
    UNSPEC,
    encode_header,
    encode_v2,
    read_header,
)
from tests.support.proxy_header import encode_v1
from tests.support.readers import TRAILING, BytesReader, check_read, check_refused

SOURCE6 = b"\x20\1\x0d\xb8" + b"\0" * 11 + b"\1"
MAPPED = b"\0" * 10 + b"\xff\xff"
IPV4_BLOCK = b"\xc0\xa8\0\1\xc0\xa8\0\x0b\xdc\x04\x01\xbb"
IPV6_BLOCK = SOURCE6 + b"\0" * 15 + b"\1" + b"\xdc\x04\x01\xbb"
UNIX_BLOCK = b"/run/a".ljust(108, b"\0") + b"/run/b".ljust(108, b"\0")
TLVS = b"\4\0\3abc" + b"\1\0\2h2" + b"\x20\0\0"
WIDE = "ffff:" * 7 + "ffff"


def block(family: int, data: bytes, verb: int = 0x21) -> bytes:
    """Return a header of version 2; `verb` is its VER/CMD, by default PROXY."""
    return SIGNATURE + bytes((verb, family)) + len(data).to_bytes(2, "big") + data


LINES = {
    "TCP4 of the specification": (
        b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n",
        Address("192.168.0.1", 56324),
    ),
    "TCP4 with short addresses": (
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1111 443\r\n",
        Address("1.2.3.4", 1111),
    ),
    "TCP4 longest": (
        b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n",
        Address("255.255.255.255", 65535),
    ),
    "TCP4 shortest": (b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n", Address("0.0.0.0", 0)),
    "TCP6": (b"PROXY TCP6 2001:db8::1 ::1 56324 443\r\n", Address("2001:db8::1", 56324)),
    "TCP6 upper case and long": (
        b"PROXY TCP6 2001:0DB8:0000:0000:0000:0000:0000:0001 ::1 1 2\r\n",
        Address("2001:db8::1", 1),
    ),
    "TCP6 longest": (f"PROXY TCP6 {WIDE} {WIDE} 65535 65535\r\n".encode(), Address(WIDE, 65535)),
    "TCP6 unspecified": (b"PROXY TCP6 :: :: 0 0\r\n", Address("::", 0)),
    "TCP6 v4-mapped": (b"PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2\r\n", Address("192.0.2.1", 1)),
    "TCP6 v4-mapped in hexadecimal": (
        b"PROXY TCP6 ::ffff:c000:201 ::1 1 2\r\n",
        Address("192.0.2.1", 1),
    ),
    "UNKNOWN": (b"PROXY UNKNOWN\r\n", None),
    "UNKNOWN and a space": (b"PROXY UNKNOWN \r\n", None),
    "UNKNOWN and addresses": (b"PROXY UNKNOWN 1.2.3.4 5.6.7.8 1111 443\r\n", None),
    "UNKNOWN and anything": (b"PROXY UNKNOWN  \0\xff TCP4\r\n", None),
    "UNKNOWN longest": (f"PROXY UNKNOWN {WIDE} {WIDE} 65535 65535\r\n".encode(), None),
}

REFUSED_LINES = {
    "no space": b"PROXYTCP4 1.2.3.4 5.6.7.8 1111 443\r\n",
    "lower case": b"proxy TCP4 1.2.3.4 5.6.7.8 1111 443\r\n",
    "tab": b"PROXY\tTCP4 1.2.3.4 5.6.7.8 1111 443\r\n",
    "two spaces before the family": b"PROXY  TCP4 1.2.3.4 5.6.7.8 1111 443\r\n",
    "two spaces before the source": b"PROXY TCP4  1.2.3.4 5.6.7.8 1111 443\r\n",
    "two spaces before the destination": b"PROXY TCP4 1.2.3.4  5.6.7.8 1111 443\r\n",
    "two spaces before the source port": b"PROXY TCP4 1.2.3.4 5.6.7.8  1111 443\r\n",
    "two spaces before the destination port": b"PROXY TCP4 1.2.3.4 5.6.7.8 1111  443\r\n",
    "space at the end": b"PROXY TCP4 1.2.3.4 5.6.7.8 1111 443 \r\n",
    "tab between addresses": b"PROXY TCP4 1.2.3.4\t5.6.7.8 1111 443\r\n",
    "one field more": b"PROXY TCP4 1.2.3.4 5.6.7.8 1111 443 1\r\n",
    "one field less": b"PROXY TCP4 1.2.3.4 5.6.7.8 1111\r\n",
    "no family": b"PROXY \r\n",
    "family alone": b"PROXY TCP4\r\n",
    "family in lower case": b"PROXY tcp4 1.2.3.4 5.6.7.8 1111 443\r\n",
    "family TCP5": b"PROXY TCP5 1.2.3.4 5.6.7.8 1111 443\r\n",
    "family TCP": b"PROXY TCP 1.2.3.4 5.6.7.8 1111 443\r\n",
    "family UDP4": b"PROXY UDP4 1.2.3.4 5.6.7.8 1111 443\r\n",
    "UNKNOWN in lower case": b"PROXY unknown\r\n",
    "UNKNOWN with a tail": b"PROXY UNKNOWNS\r\n",
    "UNKNOWN with a line feed": b"PROXY UNKNOWN a\nb\r\n",
    "UNKNOWN with a carriage return": b"PROXY UNKNOWN a\rb\r\n",
    "UNKNOWN with two carriage returns": b"PROXY UNKNOWN\r\r\n",
    "carriage return at the end": b"PROXY TCP4 1.2.3.4 5.6.7.8 1111 443\r\r\n",
    "line feed for the end": b"PROXY TCP4 1.2.3.4 5.6.7.8 1111 443\nGET / HTTP/1.1\r\n",
    "carriage return for the end": b"PROXY TCP4 1.2.3.4 5.6.7.8 1111 443\rGET / HTTP/1.1\r\n",
    "IPv6 in TCP4": b"PROXY TCP4 ::1 ::1 1111 443\r\n",
    "IPv6 destination in TCP4": b"PROXY TCP4 1.2.3.4 ::1 1111 443\r\n",
    "IPv4 in TCP6": b"PROXY TCP6 1.2.3.4 5.6.7.8 1111 443\r\n",
    "IPv4 destination in TCP6": b"PROXY TCP6 ::1 5.6.7.8 1111 443\r\n",
    "v4-mapped in TCP4": b"PROXY TCP4 ::ffff:1.2.3.4 5.6.7.8 1111 443\r\n",
    "leading zero in the source": b"PROXY TCP4 01.2.3.4 5.6.7.8 1111 443\r\n",
    "leading zero in the destination": b"PROXY TCP4 1.2.3.4 5.6.7.08 1111 443\r\n",
    "octet of 256": b"PROXY TCP4 256.2.3.4 5.6.7.8 1111 443\r\n",
    "three octets": b"PROXY TCP4 1.2.3 5.6.7.8 1111 443\r\n",
    "five octets": b"PROXY TCP4 1.2.3.4.5 5.6.7.8 1111 443\r\n",
    "address as one number": b"PROXY TCP4 16909060 5.6.7.8 1111 443\r\n",
    "address as hexadecimal": b"PROXY TCP4 0x1020304 5.6.7.8 1111 443\r\n",
    "address with a dot behind it": b"PROXY TCP4 1.2.3.4. 5.6.7.8 1111 443\r\n",
    "address in brackets": b"PROXY TCP6 [::1] ::1 1111 443\r\n",
    "address with a scope": b"PROXY TCP6 fe80::1%2 ::1 1111 443\r\n",
    "IPv6 of nine groups": b"PROXY TCP6 1:2:3:4:5:6:7:8:9 ::1 1111 443\r\n",
    "IPv6 of seven groups": b"PROXY TCP6 1:2:3:4:5:6:7 ::1 1111 443\r\n",
    "IPv6 twice shortened": b"PROXY TCP6 1::2::3 ::1 1111 443\r\n",
    "IPv6 group of five digits": b"PROXY TCP6 12345::1 ::1 1111 443\r\n",
    "colon": b"PROXY TCP6 : ::1 1111 443\r\n",
    "dot": b"PROXY TCP4 . 5.6.7.8 1111 443\r\n",
    "name": b"PROXY TCP4 localhost 5.6.7.8 1111 443\r\n",
    "no source": b"PROXY TCP4  5.6.7.8 1111 443\r\n",
    "source port of 65536": b"PROXY TCP4 1.2.3.4 5.6.7.8 65536 443\r\n",
    "destination port of 65536": b"PROXY TCP4 1.2.3.4 5.6.7.8 1111 65536\r\n",
    "port of six digits": b"PROXY TCP4 1.2.3.4 5.6.7.8 111111 443\r\n",
    "source port with a leading zero": b"PROXY TCP4 1.2.3.4 5.6.7.8 01111 443\r\n",
    "destination port with a leading zero": b"PROXY TCP4 1.2.3.4 5.6.7.8 1111 0443\r\n",
    "port 00": b"PROXY TCP4 1.2.3.4 5.6.7.8 00 443\r\n",
    "port with a sign": b"PROXY TCP4 1.2.3.4 5.6.7.8 +1111 443\r\n",
    "negative port": b"PROXY TCP4 1.2.3.4 5.6.7.8 -1 443\r\n",
    # int() accepts it.
    "port with an underscore": b"PROXY TCP4 1.2.3.4 5.6.7.8 1_1 443\r\n",
    "port in hexadecimal": b"PROXY TCP4 1.2.3.4 5.6.7.8 0x1 443\r\n",
    "port in superscript": "PROXY TCP4 1.2.3.4 5.6.7.8 1² 443\r\n".encode(),
    "NUL": b"PROXY TCP4 1.2.3.4\0 5.6.7.8 1111 443\r\n",
    "another method that begins with P": b"POST / HTTP/1.1\r\n",
}

BLOCKS = {
    "TCP4": (block(TCP4, IPV4_BLOCK), Address("192.168.0.1", 56324)),
    "UDP4": (block(UDP4, IPV4_BLOCK), Address("192.168.0.1", 56324)),
    "TCP4 unspecified": (block(TCP4, b"\0" * 12), Address("0.0.0.0", 0)),
    "TCP4 all ones": (block(TCP4, b"\xff" * 12), Address("255.255.255.255", 65535)),
    "TCP4 with TLVs": (block(TCP4, IPV4_BLOCK + TLVS), Address("192.168.0.1", 56324)),
    "TCP4 with a byte that is no TLV": (
        block(TCP4, IPV4_BLOCK + b"\4"),
        Address("192.168.0.1", 56324),
    ),
    "TCP6": (block(TCP6, IPV6_BLOCK), Address("2001:db8::1", 56324)),
    "UDP6": (block(UDP6, IPV6_BLOCK), Address("2001:db8::1", 56324)),
    "TCP6 with TLVs": (block(TCP6, IPV6_BLOCK + TLVS), Address("2001:db8::1", 56324)),
    "TCP6 v4-mapped": (
        block(TCP6, MAPPED + b"\x7f\0\0\1" + SOURCE6 + b"\0\1\0\2"),
        Address("127.0.0.1", 1),
    ),
    "TCP6 v4-compatible is IPv6": (
        block(TCP6, b"\0" * 15 + b"\1" + SOURCE6 + b"\0\1\0\2"),
        Address("::1", 1),
    ),
    "UNIX stream": (block(UNIX_STREAM, UNIX_BLOCK), None),
    "UNIX datagram with TLVs": (block(UNIX_DATAGRAM, UNIX_BLOCK + TLVS), None),
    "UNSPEC": (block(UNSPEC, b""), None),
    "UNSPEC with a block": (block(UNSPEC, IPV4_BLOCK), None),
    "LOCAL": (block(UNSPEC, b"", 0x20), None),
    "LOCAL with a block": (block(TCP4, IPV4_BLOCK + TLVS, 0x20), None),
    "LOCAL with a block too short": (block(TCP4, b"\1", 0x20), None),
    "LOCAL of an unknown family": (block(0xFF, b"abc", 0x20), None),
}

REFUSED_BLOCKS = {
    "version 0": block(TCP4, IPV4_BLOCK, 0x01),
    "version 1": block(TCP4, IPV4_BLOCK, 0x11),
    "version 3": block(TCP4, IPV4_BLOCK, 0x31),
    "version 15": block(TCP4, IPV4_BLOCK, 0xF1),
    "version 3 LOCAL": block(UNSPEC, b"", 0x30),
    "signature with another end": SIGNATURE[:-1] + b"\r" + block(TCP4, IPV4_BLOCK)[12:],
    "signature with another start": b"\r\r" + block(TCP4, IPV4_BLOCK)[2:],
    "signature broken in the middle": SIGNATURE[:4] + b"\1" + block(TCP4, IPV4_BLOCK)[5:],
    "empty lines": b"\r\n" * 8,
    "TCP4 one byte short": block(TCP4, IPV4_BLOCK[:-1]),
    "TCP4 without a block": block(TCP4, b""),
    "UDP4 one byte short": block(UDP4, IPV4_BLOCK[:-1]),
    "TCP6 one byte short": block(TCP6, IPV6_BLOCK[:-1]),
    "TCP6 with a block of IPv4": block(TCP6, IPV4_BLOCK),
    "UDP6 one byte short": block(UDP6, IPV6_BLOCK[:-1]),
    "UNIX stream one byte short": block(UNIX_STREAM, UNIX_BLOCK[:-1]),
    "UNIX datagram one byte short": block(UNIX_DATAGRAM, UNIX_BLOCK[:-1]),
}

# What comes from a client that is not behind a proxy.
NO_HEADER = {
    "SOCKS4": b"\4",
    "SOCKS5": b"\5",
    "TLS": b"\x16",
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "SSH": b"SSH-2.0-x\r\n",
    "NUL": b"\0",
    "line feed": b"\n",
    "space": b" PROXY UNKNOWN\r\n",
    "lower case": b"p",
}

PAIRS = {
    "IPv4": (
        Address("192.168.0.1", 56324),
        Address("192.168.0.11", 443),
        b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n",
        b"\x21\x11\0\x0c" + IPV4_BLOCK,
    ),
    "IPv6": (
        Address("2001:db8::1", 56324),
        Address("::1", 443),
        b"PROXY TCP6 2001:db8::1 ::1 56324 443\r\n",
        b"\x21\x21\0\x24" + IPV6_BLOCK,
    ),
    "IPv4 to IPv6": (
        Address("192.0.2.1", 1),
        Address("2001:db8::1", 65535),
        b"PROXY TCP6 ::ffff:c000:0201 2001:db8::1 1 65535\r\n",
        b"\x21\x21\0\x24" + MAPPED + b"\xc0\0\2\1" + SOURCE6 + b"\0\1\xff\xff",
    ),
    "IPv6 to IPv4": (
        Address("2001:db8::1", 65535),
        Address("192.0.2.1", 0),
        b"PROXY TCP6 2001:db8::1 ::ffff:c000:0201 65535 0\r\n",
        b"\x21\x21\0\x24" + SOURCE6 + MAPPED + b"\xc0\0\2\1" + b"\xff\xff\0\0",
    ),
    "longest": (
        Address(WIDE, 65535),
        Address(WIDE, 65535),
        f"PROXY TCP6 {WIDE} {WIDE} 65535 65535\r\n".encode(),
        b"\x21\x21\0\x24" + b"\xff" * 36,
    ),
}


@pytest.mark.parametrize(
    ("data", "client"), [*LINES.values(), *BLOCKS.values()], ids=[*LINES, *BLOCKS]
)
def test_header_is_read_to_its_last_byte(data: bytes, client: Address | None) -> None:
    check_read(read_header, data, client)


@pytest.mark.parametrize(
    "data",
    [*REFUSED_LINES.values(), *REFUSED_BLOCKS.values()],
    ids=[*REFUSED_LINES, *REFUSED_BLOCKS],
)
def test_invalid_header_is_refused(data: bytes) -> None:
    """Python's int() and strip() accept some of these."""
    check_refused(read_header, data, ProtocolError)


@pytest.mark.parametrize("data", NO_HEADER.values(), ids=NO_HEADER)
def test_client_without_header_is_refused_after_its_first_byte(data: bytes) -> None:
    check_refused(read_header, data, ProtocolError)
    reader = BytesReader(data + TRAILING, step=1)
    with pytest.raises(ProtocolError):
        complete(read_header(reader))
    assert reader.taken == 1


def test_unknown_family_is_refused() -> None:
    known = {UNSPEC, TCP4, UDP4, TCP6, UDP6, UNIX_STREAM, UNIX_DATAGRAM}
    assert known == {0x00, 0x11, 0x12, 0x21, 0x22, 0x31, 0x32}
    for family in set(range(256)) - known:
        check_refused(read_header, block(family, b"\0" * 16), ProtocolError)


def test_unknown_command_is_refused() -> None:
    for command in range(2, 16):
        check_refused(read_header, block(TCP4, IPV4_BLOCK, 0x20 | command), ProtocolError)


def test_constants_have_the_values_of_the_specification() -> None:
    assert SIGNATURE.hex() == "0d0a0d0a000d0a515549540a"
    assert (LINE_LIMIT, BLOCK_LIMIT) == (107, 4096)
    assert (TCP4, UDP4, TCP6, UDP6) == (0x11, 0x12, 0x21, 0x22)


def test_line_of_107_bytes_is_the_longest() -> None:
    line = b"PROXY UNKNOWN ".ljust(LINE_LIMIT - 2, b"x") + b"\r\n"
    assert len(line) == 107
    check_read(read_header, line, None)
    check_refused(read_header, line[:-2] + b"x\r\n", LimitError)


@pytest.mark.parametrize("start", [b"PROXY UNKNOWN ", b"PROXY TCP4 ", b"PROXY "])
def test_line_without_end_is_read_up_to_107_bytes(start: bytes) -> None:
    """Hazard 12."""
    reader = BytesReader(start + b"1" * 10_000, step=1)
    with pytest.raises(LimitError):
        complete(read_header(reader))
    assert reader.taken <= LINE_LIMIT


def test_block_of_4096_bytes_is_the_longest() -> None:
    for family, verb, start, client in (
        (TCP4, 0x21, IPV4_BLOCK, Address("192.168.0.1", 56324)),
        (TCP6, 0x21, IPV6_BLOCK, Address("2001:db8::1", 56324)),
        (UNIX_STREAM, 0x21, UNIX_BLOCK, None),
        (UNSPEC, 0x21, b"", None),
        (0xFF, 0x20, b"", None),
    ):
        data = block(family, start.ljust(BLOCK_LIMIT, b"\0"), verb)
        reader = BytesReader(data + TRAILING)
        assert complete(read_header(reader)) == client
        assert reader.rest() == TRAILING
        with pytest.raises(EndOfStream):
            complete(read_header(BytesReader(data[:-1])))


@pytest.mark.parametrize("length", [BLOCK_LIMIT + 1, 65535])
@pytest.mark.parametrize(
    ("family", "verb"), [(TCP4, 0x21), (UNSPEC, 0x21), (UNSPEC, 0x20), (0xFF, 0x21), (0xFF, 0x20)]
)
def test_block_over_the_limit_is_refused_unread(family: int, verb: int, length: int) -> None:
    reader = BytesReader(
        SIGNATURE + bytes((verb, family)) + length.to_bytes(2, "big") + b"\0" * length, step=1
    )
    with pytest.raises(ProtocolError) as caught:
        complete(read_header(reader))
    assert not isinstance(caught.value, EndOfStream)
    assert reader.taken == 16


def test_end_of_stream_within_a_header_is_partial() -> None:
    for data in (b"PROXY TCP4 1.2", SIGNATURE[:5]):
        with pytest.raises(EndOfStream) as caught:
            complete(read_header(BytesReader(data)))
        assert caught.value.partial


@pytest.mark.parametrize(
    ("source", "destination", "line", "after_signature"), PAIRS.values(), ids=PAIRS
)
def test_receiver_reads_what_the_sender_encodes(
    source: Address, destination: Address, line: bytes, after_signature: bytes
) -> None:
    assert encode_v1(source, destination) == line
    check_read(read_header, line, source)
    header = encode_v2(source, destination)
    assert header == SIGNATURE + after_signature
    check_read(read_header, header, source)
    datagram = encode_v2(source, destination, datagram=True)
    assert datagram == header[:13] + bytes((header[13] + 1,)) + header[14:]
    check_read(read_header, datagram, source)


def test_scope_of_a_link_local_address_is_not_encoded() -> None:
    source, destination = Address("fe80::1%2", 1), Address("fe80::2%eth0", 2)
    assert encode_v1(source, destination) == b"PROXY TCP6 fe80::1 fe80::2 1 2\r\n"
    check_read(read_header, encode_v2(source, destination), Address("fe80::1", 1))


@pytest.mark.parametrize("encode", [encode_v1, encode_v2])
def test_name_is_not_encoded(encode: object) -> None:
    literal, name = Address("192.0.2.1", 1), Address("example.com", 2)
    for pair in ((literal, name), (name, literal), (name, name)):
        with pytest.raises(ValueError, match="not names"):
            encode(*pair)  # type: ignore[operator]


def test_any_addresses_are_read_as_they_were_encoded() -> None:
    pytest.importorskip("hypothesis")
    from hypothesis import given, settings, strategies as st

    hosts = st.ip_addresses().map(lambda address: ip_text(address.packed))
    addresses = st.builds(Address, hosts, st.integers(0, 65535))

    @settings(max_examples=200, deadline=None)
    @given(addresses, addresses, st.booleans())
    def check(source: Address, destination: Address, datagram: bool) -> None:
        line = encode_v1(source, destination)
        assert len(line) <= 104
        for data in (line, encode_v2(source, destination, datagram)):
            reader = BytesReader(data + TRAILING)
            assert complete(read_header(reader)) == source
            assert reader.rest() == TRAILING

    check()


def test_any_bytes_are_read_alike_whole_and_byte_by_byte() -> None:
    """The only exception that they may raise is ProtocolError."""
    pytest.importorskip("hypothesis")
    from hypothesis import given, settings, strategies as st

    words = st.sampled_from(
        [
            b"PROXY ",
            b"TCP4 ",
            b"TCP6 ",
            b"UNKNOWN",
            b"1.2.3.4 ",
            b"::1 ",
            b"1 ",
            b"65535",
            b"65536",
            b"\r\n",
            b"\r",
            b"\n",
            b" ",
            SIGNATURE,
            b"\x20",
            b"\x21",
            b"\x11",
            b"\x22",
            b"\x31",
            b"\0\x0c",
            b"\0\x24",
            b"\0\0",
            b"\x10\x01",
            b"\0" * 12,
        ]
    )

    def outcome(data: bytes, step: int) -> object:
        reader = BytesReader(data, step)
        try:
            client = complete(read_header(reader))
        except ProtocolError as error:
            return type(error), str(error)
        assert client is None or is_canonical_ip(client.host) and 0 <= client.port <= 65535
        return client, reader.rest()

    @settings(max_examples=200, deadline=None)
    @given(
        st.one_of(
            st.tuples(
                st.sampled_from([b"PROXY ", b"PROXY TCP4 ", SIGNATURE + b"\x21", b""]),
                st.lists(words, max_size=8),
            ).map(lambda parts: parts[0] + b"".join(parts[1])),
            st.binary(max_size=60),
        )
    )
    def check(data: bytes) -> None:
        assert outcome(data, 0) == outcome(data, 1)

    check()


def is_canonical_ip(host: str) -> bool:
    packed = pack_ip(host)
    return packed is not None and ip_text(packed) == host


class TestEncodeHeader:
    PAIRS = pytest.mark.parametrize(
        "source, destination, read",
        [
            (Address("192.0.2.1", 1), Address("192.0.2.2", 65535), Address("192.0.2.1", 1)),
            (Address("2001:db8::1", 5), Address("::1", 443), Address("2001:db8::1", 5)),
            (Address("192.0.2.1", 5), Address("::1", 443), Address("192.0.2.1", 5)),
            (Address("fe80::1%2", 5), Address("192.0.2.2", 443), Address("fe80::1", 5)),
            (Address("192.0.2.1", 5), Address("proxy.example", 443), None),
            (Address("127.0.0.1", 0), Address("192.0.2.2", 443), None),
            (Address("", 0), Address("192.0.2.2", 443), None),
        ],
    )

    @PAIRS
    @pytest.mark.parametrize("version", ["v1", "v2"])
    def test_header_is_read_as_its_source(
        self, version: str, source: Address, destination: Address, read: Address | None
    ) -> None:
        check_read(read_header, encode_header(version, source, destination), read)

    def test_version_1_is_one_line_in_ascii(self) -> None:
        source, destination = Address("192.0.2.1", 1), Address("2001:db8::1", 443)
        assert encode_header("v1", source, source) == b"PROXY TCP4 192.0.2.1 192.0.2.1 1 1\r\n"
        assert encode_header("v1", source, destination) == (
            b"PROXY TCP6 0000:0000:0000:0000:0000:ffff:c000:0201 "
            b"2001:0db8:0000:0000:0000:0000:0000:0001 1 443\r\n"
        )
        assert encode_header("v1", Address("", 0), source) == b"PROXY UNKNOWN\r\n"

    def test_version_2_without_addresses_is_local(self) -> None:
        header = encode_header("v2", Address("a.example", 1), Address("192.0.2.1", 1))
        assert header == SIGNATURE + b"\x20\0\0\0"
