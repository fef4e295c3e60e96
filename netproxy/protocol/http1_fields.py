"""Which header fields go on to the next hop, and which this proxy adds (RFC 9110 section 7.6).  Pure."""
from __future__ import annotations

from netproxy.protocol.http1 import Fields, Origin, Request, Response, field_list, field_values
from netproxy.protocol.http1_body import Framing, declared_length

# What is meant for one hop, or written anew by this one.  The fields that Connection names go as well,
# but these are never lost to it: they are written from what was parsed.
_HOP_BY_HOP = frozenset({
    b"connection", b"proxy-connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade",
    b"content-length", b"via"})
_REQUEST_ONLY = frozenset({b"host", b"proxy-authorization", b"max-forwards"})
_RESPONSE_ONLY = frozenset({b"proxy-authenticate"})
_UPGRADES = (b"websocket",)     # the one upgrade in use; h2c would carry requests past the rules


def request_fields(request: Request, origin: Origin, framing: Framing, pseudonym: bytes,
                   upgrade: bytes | None) -> Fields:
    """The fields of the request as it goes to the origin."""
    fields = [(b"Host", origin.host), *_kept(request.fields, _HOP_BY_HOP | _REQUEST_ONLY)]
    left = field_values(request.fields, b"max-forwards")
    if left:
        fields.append((b"Max-Forwards", _one_less(left[0]) if request.method in (b"OPTIONS", b"TRACE") else left[0]))
    fields.append(_via(request.fields, request.minor, pseudonym))
    if framing.chunked:
        fields.append((b"Transfer-Encoding", b"chunked"))
    elif field_values(request.fields, b"content-length"):
        fields.append((b"Content-Length", b"%d" % (framing.length or 0)))
    if upgrade:
        fields += [(b"Connection", b"Upgrade"), (b"Upgrade", upgrade)]
    return fields


def response_fields(response: Response, framing: Framing, chunked: bool, pseudonym: bytes) -> Fields:
    """The fields of an answer as it goes to the client; `chunked`: its body goes on in chunks."""
    fields = _kept(response.fields, _HOP_BY_HOP | _RESPONSE_ONLY)
    fields.append(_via(response.fields, response.minor, pseudonym))
    if chunked:
        fields.append((b"Transfer-Encoding", b"chunked"))
    elif response.status >= 200 and response.status != 204:
        # also in the answer to HEAD and in a 304, which tell the length of a body that is not there
        length = declared_length(response.fields)
        if length is not None and not framing.chunked:
            fields.append((b"Content-Length", b"%d" % length))
    return fields


def upgrade_of(fields: Fields) -> bytes | None:
    """The protocol that a request wants to switch to, if it is one that passes through here."""
    wanted = field_list(fields, b"upgrade")
    if b"upgrade" in field_list(fields, b"connection") and len(wanted) == 1 and wanted[0] in _UPGRADES:
        return wanted[0]
    return None


def _kept(fields: Fields, dropped: frozenset[bytes]) -> Fields:
    dropped = dropped | frozenset(field_list(fields, b"connection"))
    return [field for field in fields if field[0].lower() not in dropped]


def _via(fields: Fields, minor: int, pseudonym: bytes) -> tuple[bytes, bytes]:
    return b"Via", b", ".join([*field_values(fields, b"via"), b"1.%d %b" % (minor, pseudonym)])


def _one_less(value: bytes) -> bytes:
    return b"%d" % max(0, int(value) - 1) if value.isdigit() and len(value) < 10 else value
