"""The names in the first bytes of a connection: TLS ClientHellos and the heads of HTTP requests.

What is found must not depend on how the bytes come, nor on what follows.
"""

from __future__ import annotations

from netproxy.errors import ProtocolError
from netproxy.protocol.host import parse_host
from netproxy.protocol.http.request_host import HEAD_LIMIT, parse_request_host
from netproxy.protocol.tls_hello import HELLO_LIMIT, ClientHello, parse_client_hello
from tests.fuzz.target import TRAILING, Target


def _hello(data: bytes) -> ClientHello | int | None:
    """Return what the codec returns, None for a refusal."""
    try:
        return parse_client_hello(data)
    except ProtocolError:
        return None


def _check_hello(data: bytes) -> None:
    whole = _hello(data)
    for end in range(len(data)):
        part = _hello(data[:end])
        if isinstance(part, int):
            assert end < part <= HELLO_LIMIT
        elif part is None:
            assert whole is None, end
        else:
            assert part == whole, end
    if isinstance(whole, ClientHello):
        assert _hello(data + TRAILING) == whole
        assert all(whole.alpn)
        _check_name(whole.name)
        # Its name is in the bytes, unless it is split over records.
        split = data[5 + int.from_bytes(data[3:5], "big") :][:1] == b"\x16"
        assert split or whole.name.encode() in data.lower()
    elif whole is None:
        assert _hello(data + TRAILING) is None


def _host(data: bytes) -> tuple[bool, str | None]:
    """Return whether the codec accepts the bytes, and what it returns."""
    try:
        return True, parse_request_host(data)
    except ProtocolError:
        return False, None


def _check_host(data: bytes) -> None:
    accepted, host = _host(data)
    for end in range(len(data)):
        part_accepted, part = _host(data[:end])
        if not part_accepted:
            assert not accepted, end
        elif part is not None:
            assert (accepted, host) == (True, part), end
    if accepted and host is None:
        assert len(data) < HEAD_LIMIT
    elif host is not None:
        assert _host(data + TRAILING) == (True, host)
        _check_name(host)
        assert host.encode() in data.lower()


def _check_name(name: str) -> None:
    """Check that a name is canonical, and no address."""
    assert name == "" or parse_host(name.encode()) == name
    assert ":" not in name and not name.rpartition(".")[2].isdigit()


TARGETS = (
    Target(
        "tls-hello",
        _check_hello,
        (
            *(b"\x16\x03\x01", b"\x01\0\0\x40\x03\x03", bytes(32), b"\x13\x01", b"\x01\0"),
            *(b"\0\0\0\x0e\0\x0c\0\0\x09a.example", b"\0\x10\0\x05\0\x03\x02h2", b"\xfe\x0d"),
            *(b"\0\x09192.0.2.1", b"\0\0", b"\xff\xff", b"a.example", b"A.EXAMPLE."),
        ),
        1024,
        {"protocol.tls_hello.HELLO_LIMIT": 900, "protocol.tls_hello.RECORDS_LIMIT": 6},
    ),
    Target(
        "request-host",
        _check_host,
        (
            *(b"GET / HTTP/1.1\r\n", b"POST /x HTTP/1.0\n", b"Host: ", b"host:", b"\r\n", b"\n"),
            *(b"a.example", b"A.Example:80", b"[::1]:80", b"192.0.2.1", b":", b" ", b"\t", b"."),
            *(b"PRI * HTTP/2.0\r\n", b"Accept: */*\r\n"),
        ),
        1024,
        {"protocol.http.request_host.HEAD_LIMIT": 500},
    ),
)
