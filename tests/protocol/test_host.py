"""Host names and addresses of requests in their canonical text."""

from __future__ import annotations

from socket import inet_aton, inet_ntoa

import pytest

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import ip_text, pack_ip
from netproxy.protocol.host import HostError, canonical_ipv6, parse_host

LABEL = b"a" * 63
LONGEST = b".".join([LABEL, LABEL, LABEL, b"a" * 61])  # 253 bytes

NAMES = {
    "plain": (b"example.com", "example.com"),
    "upper case": (b"WWW.Example.COM", "www.example.com"),
    "trailing dot": (b"example.com.", "example.com"),
    "one label": (b"localhost", "localhost"),
    "underscore and hyphen": (b"_dmarc.a-b.example", "_dmarc.a-b.example"),
    "IDN": (b"xn--bcher-kva.example", "xn--bcher-kva.example"),
    "leading digit": (b"1and1.com", "1and1.com"),
    "digit at the end of a label": (b"host1", "host1"),
    "hexadecimal look-alike": (b"a.0xfg", "a.0xfg"),
    "label of 63 bytes": (LABEL + b".com", "a" * 63 + ".com"),
    "name of 253 bytes": (LONGEST, LONGEST.decode()),
    "name of 253 bytes and a dot": (LONGEST + b".", LONGEST.decode()),
}

# Spellings of an address become the literal address, so that rules decide alike.
ADDRESSES = {
    "IPv4": (b"192.0.2.1", "192.0.2.1"),
    "IPv4 and a dot": (b"192.0.2.1.", "192.0.2.1"),
    "two parts": (b"127.1", "127.0.0.1"),
    "three parts": (b"127.1.2", "127.1.0.2"),
    "last of three parts fills 16 bits": (b"10.1.65535", "10.1.255.255"),
    "last of two parts fills 24 bits": (b"10.16777215", "10.255.255.255"),
    "decimal": (b"2130706433", "127.0.0.1"),
    "largest decimal": (b"4294967295", "255.255.255.255"),
    "zero": (b"0", "0.0.0.0"),
    "hexadecimal in two parts": (b"0x7f.1", "127.0.0.1"),
    "hexadecimal": (b"0X7F000001", "127.0.0.1"),
    "hexadecimal without digits": (b"0x", "0.0.0.0"),
    "octal": (b"0177.0.0.01", "127.0.0.1"),
    "octal of many zeros": (b"000000000000000000177.1", "127.0.0.1"),
    "IPv6 in brackets": (b"[::1]", "::1"),
    "IPv6": (b"::1", "::1"),
    "IPv6 in capitals and in full": (b"2001:DB8:0:0:0:0:0:1", "2001:db8::1"),
    "v4-mapped": (b"::ffff:127.0.0.1", "127.0.0.1"),
    "v4-mapped in brackets": (b"[::ffff:127.0.0.1]", "127.0.0.1"),
    "v4-mapped in hexadecimal": (b"::FFFF:7f00:1", "127.0.0.1"),
    "unspecified": (b"::", "::"),
    "embedded but not mapped": (b"64:ff9b::192.0.2.1", "64:ff9b::c000:201"),
}

REFUSED = {
    "empty": b"",
    "255 bytes": LABEL + b"." + LABEL + b"." + LABEL + b"." + LABEL,
    "254 bytes": LONGEST + b"a",
    "NUL": b"example\0.com",
    "NUL at the end": b"example.com\0",
    "CRLF": b"example.com\r\nX: y",
    "LF at the end": b"example.com\n",
    "space": b"exa mple.com",
    "space before": b" example.com",
    "two dots": b"a..b",
    "dot": b".",
    "dot before": b".example.com",
    "two dots at the end": b"example.com..",
    "label of 64 bytes": b"a" * 64,
    "label of 64 bytes inside": b"www." + b"a" * 64 + b".com",
    "UTF-8": "bücher.example".encode(),
    "Latin-1": b"b\xfccher.example",
    "superscript digit": "1²".encode(),
    # Control characters, space and characters of URLs.
    "control character": b"a\x1bb",
    "DEL": b"a\x7fb",
    "tab": b"a\tb",
    "slash": b"a/b",
    "at": b"user@a",
    "hash": b"a#b",
    "question mark": b"a?b",
    "backslash": b"a\\b",
    "percent": b"%61",
    "comma": b"a,b",
    "star": b"*",
    # These look like addresses but are not.
    "part over 255": b"256.0.0.1",
    "last part over 255": b"1.2.3.256",
    "last of three parts over 16 bits": b"1.2.65536",
    "last of two parts over 24 bits": b"1.16777216",
    "over 32 bits": b"4294967296",
    "over 32 bits in hexadecimal": b"0x100000000",
    "63 digits": b"9" * 63,
    "five parts": b"1.2.3.4.5",
    "five parts, the last zero": b"1.2.3.4.0",
    "octal with an 8": b"08.0.0.1",
    "name that ends in a number": b"example.1",
    "name that ends in a hexadecimal number": b"example.0xff",
    "plus sign": b"+1.2.3.4",
    "port": b"192.0.2.1:80",
    "name and port": b"example.com:80",
    "IPv4 in brackets": b"[127.0.0.1]",
    "name in brackets": b"[example.com]",
    "nothing in brackets": b"[]",
    "bracket open": b"[::1",
    "bracket closed": b"::1]",
    "brackets twice": b"[[::1]]",
    "one bracket": b"[",
    "bracket and port": b"[::1]:80",
    "zone": b"fe80::1%eth0",
    "nine groups": b"1:2:3:4:5:6:7:8:9",
    "three colons": b":::",
    "IPv6 and a dot": b"::1.",
    "IPv6 and NUL": b"::1\0",
    "IPv6 and a space": b"::1 ",
    "IPv6 not ASCII": b"::\xff",
    "v4-mapped in a loose spelling": b"::ffff:127.1",
}


@pytest.mark.parametrize(("raw", "host"), NAMES.values(), ids=NAMES)
def test_name_becomes_lower_case_without_its_last_dot(raw: bytes, host: str) -> None:
    """Hazard 76."""
    assert parse_host(raw) == host
    assert pack_ip(host) is None


@pytest.mark.parametrize(("raw", "host"), ADDRESSES.values(), ids=ADDRESSES)
def test_address_in_any_spelling_becomes_its_canonical_text(raw: bytes, host: str) -> None:
    """Hazard 11."""
    assert parse_host(raw) == host
    assert parse_host(host.encode()) == host
    packed = pack_ip(host)
    assert packed is not None
    assert ip_text(packed) == host


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED)
def test_invalid_host_is_refused(raw: bytes) -> None:
    """Hazard 10."""
    with pytest.raises(HostError):
        parse_host(raw)


def test_error_message_does_not_repeat_the_host() -> None:
    for raw in (b"secret\n", b"secret.1", b"secret:1", b"4294967296"):
        with pytest.raises(HostError) as caught:
            parse_host(raw)
        assert raw.decode().strip() not in str(caught.value)


def test_host_error_is_a_protocol_error() -> None:
    assert issubclass(HostError, ProtocolError)


@pytest.mark.parametrize(
    "raw", [b"127.1", b"0x7f.1", b"0177.1", b"2130706433", b"10.1.65535", b"1.2.3.4"]
)
def test_loose_ipv4_is_read_as_inet_aton_reads_it(raw: bytes) -> None:
    assert parse_host(raw) == inet_ntoa(inet_aton(raw.decode()))


def test_canonical_ipv6_refuses_brackets_and_ipv4() -> None:
    assert canonical_ipv6(b"::FFFF:192.0.2.1") == "192.0.2.1"
    for raw in (b"[::1]", b"192.0.2.1", b""):
        with pytest.raises(HostError):
            canonical_ipv6(raw)


def test_ip_text_of_packed_bytes() -> None:
    """Hazard 81."""
    assert ip_text(b"\x7f\0\0\1") == "127.0.0.1"
    assert ip_text(b"\0" * 15 + b"\1") == "::1"
    assert ip_text(b"\0" * 10 + b"\xff\xff\x7f\0\0\1") == "127.0.0.1"


def test_pack_ip_of_text() -> None:
    assert pack_ip("192.0.2.1") == b"\xc0\0\2\1"
    assert pack_ip("2001:db8::1") == b"\x20\1\x0d\xb8" + b"\0" * 11 + b"\1"


@pytest.mark.parametrize("host", ["example.com", "host1", "a.b2", "", "1:x"])
def test_pack_ip_of_a_name_is_none(host: str) -> None:
    assert pack_ip(host) is None
