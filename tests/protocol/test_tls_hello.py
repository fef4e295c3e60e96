"""Server names and ALPN protocols of TLS ClientHellos, of real programs and made here.

client_hellos/ has the first bytes that programs sent to a listening socket, each in one record.

Captured on 29 November 2026: curl 7.88, wget 1.21, OpenSSL 3.0, GnuTLS 3.7, CPython 3.11, Node.js
20, OpenJDK 17, Go 1.19, Chromium 156 and Firefox 153.

Captured on 30 November 2026: git 2.39 (libcurl 7.88 with GnuTLS 3.7), Botan 2.19 and Erlang/OTP 25
of Debian 12; pyOpenSSL 26.4 (OpenSSL 4.0), curl_cffi 0.17 (BoringSSL, as three browsers), uv 0.13
(rustls), awscrt 0.38 (s2n), python-mbedtls 2.10 and tlslite-ng 0.8 of PyPI.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from netproxy.protocol.tls_hello import (
    HELLO_LIMIT,
    RECORDS_LIMIT,
    ClientHello,
    HelloError,
    parse_client_hello,
)

HELLOS = {
    path.stem: path.read_bytes() for path in (Path(__file__).parent / "client_hellos").iterdir()
}
WEB = ("h2", "http/1.1")
LONGEST = ".".join(["a" * 60] * 4)

PROGRAMS = {
    "botan": ("botan.example", WEB),
    "botan-no-name": ("", ()),
    "chromium": ("chromium.example", WEB),
    "curl": ("curl.example", WEB),
    "curl-address": ("", WEB),
    "curl-cffi-address": ("", WEB),
    "curl-cffi-chrome": ("chrome.example", WEB),
    "curl-cffi-firefox": ("firefox.example", WEB),
    "curl-cffi-safari": ("safari.example", WEB),
    "curl-http1": ("curl.example", ("http/1.1",)),
    "curl-no-alpn": ("curl.example", ()),
    "curl-tls12": ("curl.example", WEB),
    "erlang": ("erlang.example", WEB),
    "erlang-no-name": ("", ()),
    "firefox": ("firefox.example", WEB),
    "git": ("git.example", WEB),
    "gnutls": ("gnutls.example", ("h2",)),
    "gnutls-no-name": ("", ()),
    "gnutls-tls12": ("gnutls.example", ()),
    "go": ("go.example", WEB),
    "go-no-name": ("", ()),
    "go-plain": ("go.example", ()),
    "java": ("java.example", WEB),
    "java-no-name": ("", ()),
    "java-plain": ("java.example", ()),
    "java-tls12": ("java.example", ()),
    "mbedtls": ("mbedtls.example", WEB),
    "mbedtls-no-name": ("", ()),
    "node": ("node.example", WEB),
    "node-https": ("node.example", ()),
    "node-no-name": ("", ()),
    "node-tls12": ("node.example", ()),
    "openssl": ("openssl.example", WEB),
    "openssl-dot": ("openssl.example", ()),
    "openssl-many-protocols": ("openssl.example", tuple(str(number) for number in range(1, 901))),
    "openssl-no-name": ("", ()),
    "openssl-small": ("openssl.example", ()),
    "openssl-tls11": ("openssl.example", ()),
    "openssl-tls12": ("openssl.example", ()),
    "pyopenssl": ("pyopenssl.example", ("h2",)),
    "pyopenssl-no-name": ("", ()),
    "python": ("python.example", ()),
    "python-alpn": ("python.example", (*WEB, "acme-tls/1")),
    "python-idn": ("xn--bcher-kva.example", ()),
    "python-long": (LONGEST, ()),
    "python-no-name": ("", ()),
    "s2n": ("aws.example", WEB),
    "s2n-no-name": ("", ()),
    "tlslite": ("tlslite.example", ("http/1.1",)),
    "tlslite-no-name": ("", ()),
    "uv": ("uv.example", WEB),
    "uv-address": ("", WEB),
    "wget": ("localhost", ()),
}


def vector(size: int, data: bytes) -> bytes:
    return len(data).to_bytes(size, "big") + data


def extension(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(2, "big") + vector(2, data)


def server_name(*names: bytes, kind: int = 0) -> bytes:
    entries = b"".join(bytes([kind]) + vector(2, name) for name in names)
    return extension(0, vector(2, entries))


def alpn(*names: bytes) -> bytes:
    return extension(16, vector(2, b"".join(vector(1, name) for name in names)))


def hello(
    extensions: bytes | None,
    session_id: bytes = bytes(32),
    suites: bytes = b"\x13\x01",
    compression: bytes = b"\0",
    trailing: bytes = b"",
) -> bytes:
    """Return a handshake message."""
    message = b"\x03\x03" + bytes(32) + vector(1, session_id) + vector(2, suites)
    message += vector(1, compression) + trailing
    message += b"" if extensions is None else vector(2, extensions)
    return b"\x01" + vector(3, message)


def records(message: bytes, size: int = 16384) -> bytes:
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + vector(2, piece) for piece in pieces)


ECH = extension(0xFE0D, b"\0\0\x01\0\x01\x2a" + vector(2, bytes(32)) + vector(2, bytes(200)))
NAMED = server_name(b"a.example")

VALID = {
    "no extensions": (hello(None), "", ()),
    "an empty list of extensions": (hello(b""), "", ()),
    "a name": (hello(NAMED), "a.example", ()),
    "a name in capitals": (hello(server_name(b"A.Example")), "a.example", ()),
    "a name and ALPN": (hello(alpn(b"h2") + NAMED), "a.example", ("h2",)),
    "the outer name of ECH": (hello(ECH + server_name(b"public.example")), "public.example", ()),
    "an ALPN name with any byte": (hello(alpn(b"\n\x00\xff")), "", ("\n\x00\xff",)),
    "a name of an unknown kind": (hello(server_name(b"a.example", kind=7)), "", ()),
    "an empty list of names": (hello(server_name()), "", ()),
    "an IPv4 address": (hello(server_name(b"192.0.2.1")), "", ()),
    "an IPv6 address": (hello(server_name(b"2001:db8::1")), "", ()),
    "a name with NUL": (hello(server_name(b"a.example\0.b.example")), "", ()),
    "a name with a line feed": (hello(server_name(b"a.example\n")), "", ()),
    "an empty name": (hello(server_name(b"")), "", ()),
    "a name of 254 bytes": (hello(server_name(b"a." * 126 + b"aa")), "", ()),
    "no session id": (hello(NAMED, session_id=b""), "a.example", ()),
    "a ticket of 14 KB": (hello(extension(35, bytes(14000)) + NAMED), "a.example", ()),
}

INVALID = {
    "HTTP": b"GET / HTTP/1.1\r\n",
    "SOCKS5": b"\x05\x01\x00",
    "SSH": b"SSH-2.0-OpenSSH",
    "SSLv2": b"\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10",
    "TLS alert": b"\x15\x03\x01\x00\x02\x02\x28",
    "wrong major version": b"\x16\x02\x00",
    "empty record": b"\x16\x03\x01\x00\x00",
    "another handshake message": b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
    "message over the limit": b"\x16\x03\x01\x00\x04\x01\x00\x40\x00",
    "message of 16 MiB": b"\x16\x03\x01\x00\x04\x01\xff\xff\xff",
    "record over the limit": b"\x16\x03\x01\xff\xff",
    "session id of 33 bytes": records(hello(NAMED, session_id=bytes(33))),
    "no cipher suites": records(hello(NAMED, suites=b"")),
    "half a cipher suite": records(hello(NAMED, suites=b"\x13")),
    "no compression": records(hello(NAMED, compression=b"")),
    "a byte before the extensions": records(hello(NAMED, trailing=b"\xff")),
    "a byte behind the extensions": records(b"\x01" + vector(3, hello(NAMED)[4:] + b"\0")),
    "two lists of names": records(hello(NAMED + NAMED)),
    "two names": records(hello(server_name(b"a.example", b"b.example"))),
    "a byte behind the names": records(hello(extension(0, vector(2, b"") + b"\0"))),
    "a name without its length": records(hello(extension(0, vector(2, b"\0\0")))),
    "a name that exceeds its list": records(hello(extension(0, vector(2, b"\0\0\xffa")))),
    "an empty extension for the name": records(hello(extension(0, b""))),
    "an empty ALPN name": records(hello(alpn(b"h2", b""))),
    "a byte behind ALPN": records(hello(extension(16, vector(2, b"") + b"\0"))),
    "extensions without their length": records(hello(None, trailing=b"\0")),
    "half an extension": records(hello(b"\0\0\0")),
    "empty message": records(b"\x01\0\0\0"),
}

TABLE = {name: (HELLOS[name], *expected) for name, expected in PROGRAMS.items()}
TABLE |= {name: (records(message), *rest) for name, (message, *rest) in VALID.items()}  # type: ignore[misc]
CASES = pytest.mark.parametrize(("data", "name", "alpn"), TABLE.values(), ids=TABLE)


def feed(data: bytes, step: int) -> tuple[ClientHello | int, int]:
    """Return the result for data that comes in steps, and how often it was looked at."""
    needed: ClientHello | int = 0
    looks = 0
    for end in [*range(step, len(data), step), len(data)]:
        if isinstance(needed, int) and end >= needed:
            needed = parse_client_hello(data[:end])
            looks += 1
    return needed, looks


def test_table_has_every_captured_hello() -> None:
    assert PROGRAMS.keys() == HELLOS.keys()
    assert len(HELLOS) == 53


@CASES
def test_whole_hello_gives_name_and_protocols(
    data: bytes, name: str, alpn: tuple[str, ...]
) -> None:
    assert parse_client_hello(data) == ClientHello(name, alpn)


@CASES
def test_hello_is_read_byte_by_byte_with_few_looks(
    data: bytes, name: str, alpn: tuple[str, ...]
) -> None:
    """Hazard 153."""
    result, looks = feed(data, 1)
    assert result == ClientHello(name, alpn)
    assert looks == 3  # the first byte, the header of the record, all of the record


@CASES
def test_truncated_hello_asks_for_more_bytes_than_there_are(
    data: bytes, name: str, alpn: tuple[str, ...]
) -> None:
    """Hazard 153."""
    for end in range(min(len(data), 700)):
        needed = parse_client_hello(data[:end])
        assert isinstance(needed, int)
        assert end < needed <= len(data)


@CASES
@pytest.mark.parametrize("size", [100, 512, 1000])
def test_hello_may_be_split_over_records(
    data: bytes, name: str, alpn: tuple[str, ...], size: int
) -> None:
    """Hazard 153."""
    split = records(data[5:], size)
    if len(split) > HELLO_LIMIT:
        pytest.skip("over the limit")
    assert parse_client_hello(split) == ClientHello(name, alpn)
    assert feed(split, 1)[0] == ClientHello(name, alpn)


@CASES
def test_bytes_behind_the_hello_are_left_alone(
    data: bytes, name: str, alpn: tuple[str, ...]
) -> None:
    for trailing in (b"\x16", b"\xff" * 40000, data):
        assert parse_client_hello(data + trailing) == ClientHello(name, alpn)


def test_records_of_one_byte_are_read_up_to_the_limit() -> None:
    message = hello(NAMED)
    assert parse_client_hello(records(message, 1)) == ClientHello("a.example", ())
    longer = hello(extension(21, bytes(RECORDS_LIMIT)) + NAMED)
    with pytest.raises(HelloError):
        parse_client_hello(records(longer, 1))


@pytest.mark.parametrize("data", INVALID.values(), ids=INVALID)
def test_anything_else_is_refused(data: bytes) -> None:
    """Hazard 153."""
    with pytest.raises(HelloError):
        parse_client_hello(data)


def test_refusal_comes_with_the_first_byte_that_tells() -> None:
    for data in (b"G", b"\x05", b"\x16\x02", b"\x16\x03\x01\x00\x00", b"\x16\x03\x01\x00\x10\x02"):
        parse_client_hello(data[:-1])
        with pytest.raises(HelloError):
            parse_client_hello(data)


@pytest.mark.parametrize("name", HELLOS)
def test_changed_bytes_raise_nothing_else(name: str) -> None:
    """Hazard 153."""
    choose = random.Random(name)
    for _ in range(300):
        data = bytearray(HELLOS[name])
        for _ in range(choose.randrange(1, 4)):
            data[choose.randrange(len(data))] = choose.randrange(256)
        try:
            result = parse_client_hello(bytes(data[: choose.randrange(len(data) + 1)]))
        except HelloError:
            continue
        assert isinstance(result, ClientHello) or 0 < result <= HELLO_LIMIT
