"""The wish of a client for a direct path to the agent: a field of its request for connect-udp.

The messages that follow it are those of protocol.tunnels.direct.  A module of its own, because
every daemon looks for the field, and few have a tunnel.  Both roles; no I/O; any thread.
"""

from __future__ import annotations

import re

from netproxy.protocol.http1 import field_values
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.protocol.http1 import HttpRequest

FIELD = b"Netproxy-Direct"
"""The field of a request for connect-udp that asks for a direct path."""

WISH_SIZE = 16
"""Bytes of what a client calls itself: random, so that nobody else can say it."""

_WISH = rb"[0-9a-f]{%d}\Z" % (2 * WISH_SIZE)


def encode_wish(identifier: bytes) -> tuple[bytes, bytes]:
    """Return the field of a request that asks for a direct path."""
    return FIELD, identifier.hex().encode("ascii")


def parse_wish(request: HttpRequest) -> bytes:
    """Return what the client calls itself, b"" if it does not ask for a direct path.

    A field that is malformed is no wish: the request itself is served all the same.
    """
    values = field_values(request.fields, FIELD.lower())
    if len(values) != 1 or not re.match(_WISH, values[0]):
        return b""
    return bytes.fromhex(values[0].decode("ascii"))
