"""Reads the host of an HTTP/1 request from the first bytes of a connection.

It looks for the field Host alone, and only until it has found it: the request is another
server's to read and to judge.  Pure; no I/O.
"""

from __future__ import annotations

import re

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import pack_ip
from netproxy.protocol.host import HostError, parse_host

HEAD_LIMIT = 16384
"""Bytes of a connection that are looked at."""
# Methods in use are letters; the line is cut off anywhere.
_LINE_START = re.compile(rb"[A-Z]{1,20} |[A-Z]{0,20}\Z")
_LINE = re.compile(rb"[A-Z]{1,20} [^\s]+ HTTP/1\.[0-9]\r?\Z")
_HOST = re.compile(rb"(?i:host):[ \t]*([^\r]*?)[ \t]*\r?\Z")
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n"


def parse_request_host(data: bytes) -> str | None:
    """Return the host that the request names, "" if it names none or an address.

    Returns None if more bytes must come.  Raises ProtocolError if this is no HTTP/1 request.
    """
    # The verdict must not depend on how many bytes beyond the limit have come at once.
    data = data[:HEAD_LIMIT]
    first, end, rest = data.partition(b"\n")
    if not _LINE_START.match(first) or data.startswith(_HTTP2_PREFACE):
        raise ProtocolError("not an HTTP/1 request")
    if not end and len(data) < HEAD_LIMIT:
        return None
    if not _LINE.match(first):
        raise ProtocolError("not an HTTP/1 request")
    while True:
        line, end, rest = rest.partition(b"\n")
        if not end and len(data) < HEAD_LIMIT:
            return None
        if not end:
            raise ProtocolError("a head that is too long")
        if line in (b"", b"\r"):
            return ""
        match = _HOST.match(line)
        if match:
            return _parse_name(match[1])


def _parse_name(raw: bytes) -> str:
    """Return the name in a value of Host: a host with or without a port."""
    host, colon, port = raw.rpartition(b":")
    if not colon or not port.isdigit():
        host = raw
    try:
        name = parse_host(host)
    except HostError:
        return ""
    return "" if pack_ip(name) is not None else name
