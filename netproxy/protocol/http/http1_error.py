"""Error responses of our own: what a client is told, and the id of its record.  Pure."""

from __future__ import annotations

from netproxy.protocol.http1 import PHRASES, HttpError, HttpResponse, encode_response
from netproxy.typed import Sequence


class RecordedError(HttpError):
    """An error with a record of its own: that of a flow, or that of a wrong password (407)."""

    def __init__(self, status: int, message: str, name: str = "") -> None:
        """`name`: the id of the record, "" if the client is told none."""
        super().__init__(status, message)
        self.id = name


def encode_error(
    status: int,
    message: str,
    extra: Sequence[tuple[bytes, bytes]] = (),
    head: bool = False,
    name: str = "",
) -> bytes:
    """Encode an error response of our own, text/plain, behind which the connection closes.

    `extra` are further fields.  `head`: it answers a HEAD request and has no body.  `name`: the id
    of the error's record, "" for none.
    """
    body = error_body(message, name)
    fields = [
        (b"Content-Type", b"text/plain; charset=us-ascii"),
        (b"X-Content-Type-Options", b"nosniff"),
        (b"Content-Length", b"%d" % len(body)),
        (b"Connection", b"close"),
        *id_fields(name),
        *extra,
    ]
    response = HttpResponse(1, status, PHRASES[status].encode(), fields)
    return encode_response(response) + (b"" if head else body)


def error_body(message: str, name: str) -> bytes:
    """Return the text of an error for people, with the id of its record, if there is one."""
    with_id = f" (id {name})" if name else ""
    return f"{message}{with_id}\n".encode("ascii", "backslashreplace")


def id_fields(name: str) -> list[tuple[bytes, bytes]]:
    """Return the field with the id of a record, if there is one: few clients show the text."""
    return [(b"Netproxy-Id", name.encode())] if name else []
