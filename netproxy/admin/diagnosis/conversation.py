"""What a test says on the connection or UDP session that it has opened, and what comes back.

Thread: that of the test.
"""

from __future__ import annotations

import os

from netproxy.errors import DeadlineError, DialError, Reason, printable
from netproxy.net.stream import complete
from netproxy.protocol import dns, http1
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import Destination, PacketConn
    from netproxy.net.datagram import ArenaPool

DNS_PORT = 53
ANSWER_SECONDS = 10.0
"""For TLS and for the answer to a request."""
BANNER_SECONDS = 1.0
"""For a target that speaks first, as those of SSH and mail do."""
BANNER = 80
"""Bytes of it that are shown."""
REPLY_SECONDS = 5.0
"""For the answer to a datagram."""
_ENCRYPTED, _HTTP = ("https", "wss"), ("http", "https")
_TYPE_NS, _CLASS_IN = 2, 1
_CODES = ("NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED")


def speak(stream: Stream, scheme: str, host: str, step: Callable[[str, str], None]) -> None:
    """Do what the scheme of a URL says; "" stands for a target without one.

    Raises ProtocolError or StreamError.
    """
    stream.limit(ANSWER_SECONDS)
    if scheme in _ENCRYPTED:
        _encrypt(stream, host, step)
    if scheme in _HTTP:
        _request(stream, host, step)
    elif not scheme:
        _listen(stream, step)


def _encrypt(stream: Stream, host: str, step: Callable[[str, str], None]) -> None:
    # Imported late: some MiB, which stay.
    from netproxy.net import tls

    tls.connect(stream, tls.client_context(), host)
    step("tls", f"{tls.version(stream)}, the certificate is valid for {host}")


def _request(stream: Stream, host: str, step: Callable[[str, str], None]) -> None:
    in_field = f"[{host}]" if ":" in host else host
    fields = [(b"Host", in_field.encode()), (b"User-Agent", b"netproxyctl"), (b"Accept", b"*/*")]
    request = http1.HttpRequest(b"HEAD", b"/", 1, [*fields, (b"Connection", b"close")])
    stream.write(http1.encode_request(request))
    response = complete(http1.read_response(stream))
    phrase = printable(response.phrase.decode("ascii", "backslashreplace"))
    step("answer", f"HTTP/1.{response.minor} {response.status} {phrase}".rstrip())


def _listen(stream: Stream, step: Callable[[str, str], None]) -> None:
    stream.limit(BANNER_SECONDS)
    try:
        said = complete(stream.read_some(BANNER))
    except DeadlineError:
        step("silent", "the target says nothing by itself, as most do")
        return
    text = said.decode("ascii", "backslashreplace").rstrip()
    if said:
        step("answer", f"the target says: {printable(text)}")
    else:
        step("closed", "the target has closed the connection")


def ask_name_server(
    conn: PacketConn, destination: Destination, arenas: ArenaPool, begin: Callable[[float], None]
) -> str:
    """Ask for the name servers of the root; return what has been answered.

    `begin(seconds)` is told that there must be an answer within so many seconds: another thread
    calls conn.shutdown() then.  Raises DialError.
    """
    number = int.from_bytes(os.urandom(2), "big")
    query = dns.encode_query(number, dns.Question("", _TYPE_NS, _CLASS_IN))
    arena = arenas.take()
    try:
        begin(REPLY_SECONDS)
        conn.send(arena, arena.put(query), destination)
        while conn.wait():
            for offsets, length, last, _ in conn.receive(arena).spans:
                for offset in offsets:
                    size = last if offset == offsets[-1] else length
                    if answer := _answer(bytes(arena.view[offset : offset + size]), number):
                        return answer
    finally:
        arenas.give(arena)
    said = f"no answer to a DNS query within {REPLY_SECONDS:g} s"
    raise DialError(Reason.TIMEOUT, said=said)


def _answer(message: bytes, number: int) -> str:
    """Return what an answer says, "" if it is another one's."""
    if len(message) < dns.HEADER_SIZE:
        return ""
    header = dns.parse_header(message)
    if header.id != number:
        return ""
    code = _CODES[header.rcode] if header.rcode < len(_CODES) else f"code {header.rcode}"
    return f"DNS answer {code}, {len(message)} bytes"
