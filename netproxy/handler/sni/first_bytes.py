"""Looks at the first bytes of a connection for the server that its client wants: TLS or HTTP.

The bytes stay unread, and are relayed as they came.  How many bytes are kept and how often they
are parsed is bounded; the time is that of the stream's deadline.  The name is what the client
says, and proves nothing.  Thread: any.
"""

from __future__ import annotations

from netproxy.interfaces.flows import FirstBytes
from netproxy.protocol.http.request_host import HEAD_LIMIT, parse_request_host
from netproxy.protocol.tls_hello import ClientHello, parse_client_hello
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Steps, Stream

TLS, HTTP = "tls", "http"
LOOKS_LIMIT = 64
"""Times that the bytes of one connection are parsed: a client may send them one by one."""


def look(stream: Stream, kind: str) -> Steps[FirstBytes]:
    """Return what a ClientHello (TLS) or the head of a request (HTTP) tells.

    There is no name if the client ends, or if it sends its bytes in too many pieces.
    Raises DeadlineError, StreamError; ProtocolError for anything that is not of this kind.
    """
    needed = 0
    for _ in range(LOOKS_LIMIT):
        seen, needed = _parse(kind, stream.unread(), needed)
        if seen is not None:
            return seen
        length = len(stream.unread())
        while len(stream.unread()) < needed or not _has_news(kind, stream.unread(), length):
            if not (yield stream):
                return FirstBytes(kind)
    return FirstBytes(kind)


def _parse(kind: str, data: bytes, needed: int) -> tuple[FirstBytes | None, int]:
    """Return what the bytes tell, None if there must be more; and how many there must be then.

    Raises ProtocolError.
    """
    if kind == HTTP:
        name = parse_request_host(data)
        return (None if name is None else FirstBytes(kind, name)), 0
    hello = parse_client_hello(data)
    if isinstance(hello, ClientHello):
        return FirstBytes(kind, *hello), needed
    return None, hello


def _has_news(kind: str, data: bytes, length: int) -> bool:
    """Return whether the bytes behind the first `length` ones may change the result."""
    return kind == TLS or data.find(b"\n", length) >= 0 or len(data) >= HEAD_LIMIT
