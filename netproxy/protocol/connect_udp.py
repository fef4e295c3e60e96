"""Proxying UDP in HTTP/1.1 (RFC 9298): the request for an upgrade to connect-udp, and its answers.

Both roles, on the heads of http1; after a 101 both directions carry capsules
alone (protocol.capsule).  RFC 9931: a client sends none before it has read the
101, and a refusal closes the connection.  Only the default URI template.  No I/O.
"""

from __future__ import annotations

import re

from netproxy.errors import ProtocolError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.protocol import http1
from netproxy.protocol.host import HostError, parse_host
from netproxy.protocol.http1 import (
    HTTP_PORT,
    Fields,
    HttpError,
    HttpRequest,
    HttpResponse,
    field_list,
    field_values,
)

PROTOCOL = b"connect-udp"
PATH = b"/.well-known/masque/udp/%b/%d/"  # RFC 9298 section 2: the default template
ERROR_LIMIT = 64  # bytes of an upstream's error type in a message: the longest of RFC 9209 has 34

# Expressions as text: compiled where they are first needed, which in most daemons is never.
# What the template's expansion leaves as it is, RFC 3986 section 2.3, and what it escapes.
_TARGET = rb"(?:[Hh][Tt][Tt][Pp][Ss]?://([^/?#]+))?/\.well-known/masque/udp/((?:[A-Za-z0-9._~-]|%[0-9A-Fa-f]{2})+)/([0-9]{1,5})/\Z"
_ESCAPE = rb"%([0-9A-Fa-f]{2})"
# The first parameter of that name in Proxy-Status.  One within a quoted string is taken too: it only goes into a message.
_ERROR = rb"; *error=([A-Za-z*][!#$%%&'*+\-.^_`|~:/0-9A-Za-z]{0,%d})" % (ERROR_LIMIT - 1)

_UPGRADE: Fields = [
    (b"Connection", b"Upgrade"),
    (b"Upgrade", PROTOCOL),
    (b"Capsule-Protocol", b"?1"),
]
# RFC 9297 section 3.2: a message that is followed by capsules has none of these, or is malformed
_CONTENT = (b"content-length", b"content-type", b"transfer-encoding")

# RFC 9209 section 2.3
ERRORS: dict[Reason, bytes] = {
    Reason.GENERAL: b"destination_unavailable",
    Reason.DENIED: b"http_request_denied",
    Reason.NETWORK_UNREACHABLE: b"destination_ip_unroutable",
    Reason.HOST_UNREACHABLE: b"destination_ip_unroutable",
    Reason.NAME: b"dns_error",
    Reason.REFUSED: b"connection_refused",
    Reason.TIMEOUT: b"connection_timeout",
    Reason.UNSUPPORTED: b"proxy_configuration_error",
    Reason.AUTHENTICATION: b"proxy_configuration_error",
    Reason.PROTOCOL: b"http_protocol_error",
    Reason.LOOP: b"proxy_loop_detected",
}
REASONS = {error.decode("ascii"): reason for reason, error in ERRORS.items()} | {
    "destination_ip_unroutable": Reason.HOST_UNREACHABLE,
    "destination_unavailable": Reason.GENERAL,
    "destination_ip_prohibited": Reason.DENIED,
    "dns_timeout": Reason.TIMEOUT,
    "proxy_configuration_error": Reason.UNSUPPORTED,
}


# RFC 9298 section 3.2
# GET /.well-known/masque/udp/2001%3Adb8%3A%3A42/443/ HTTP/1.1
# Host: proxy.example
# Connection: Upgrade
# Upgrade: connect-udp
# Capsule-Protocol: ?1
def encode_request(target: Address, proxy: str, authorization: bytes = b"") -> bytes:
    """The head that asks `proxy` (the value of Host) for `target`; `authorization` is that of Proxy-Authorization.

    A scope (fe80::1%2) has no place in it.
    """
    # of what a canonical host is made of, the colon alone is to be escaped
    host = target.host.partition("%")[0].replace(":", "%3A").encode("ascii")
    fields = [(b"Host", proxy.encode("ascii")), *_UPGRADE]
    if authorization:
        fields.append((b"Proxy-Authorization", authorization))
    return http1.encode_request(HttpRequest(b"GET", PATH % (host, target.port), 1, fields))


def asks_for(request: HttpRequest) -> bool:
    """Whether a request is for an upgrade to connect-udp, and to nothing else.  HTTP/1.0 has none (RFC 9110 section 7.8)."""
    return (
        request.method == b"GET"
        and request.minor == 1
        and b"upgrade" in field_list(request.fields, b"connection")
        and field_list(request.fields, b"upgrade") == [PROTOCOL]
    )


def parse_target(request: HttpRequest) -> Address:
    """The UDP target of a request that asks_for() was true of, in absolute or origin form.

    HttpError 400 for another path, a host that is none (one with a zone is none), a port outside 1 to 65535,
    and for a request that declares a body: its bytes would be read as capsules.
    """
    match = re.match(_TARGET, request.target)
    if not match:
        raise HttpError(400, "not /.well-known/masque/udp/host/port/")
    if match[1]:
        http1.parse_authority(match[1], HTTP_PORT)
    if _has_content(request.fields):
        raise HttpError(400, "a request for connect-udp has no body")
    port = int(match[3])
    if not 0 < port < 65536:
        raise HttpError(400, "no port between 1 and 65535")
    try:
        return Address(
            parse_host(re.sub(_ESCAPE, lambda escape: bytes((int(escape[1], 16),)), match[2])), port
        )
    except HostError as error:
        raise HttpError(400, str(error)) from error


# RFC 9298 section 3.3
# HTTP/1.1 101 Switching Protocols
# Connection: Upgrade
# Upgrade: connect-udp
# Capsule-Protocol: ?1
def encode_accept() -> bytes:
    """The whole answer; capsules follow."""
    return http1.encode_response(HttpResponse(1, 101, b"Switching Protocols", _UPGRADE))


def status_field(reason: Reason, name: str) -> tuple[bytes, bytes]:
    """Proxy-Status of a refusal (RFC 9209); `name` is this proxy's, a token that begins with a letter."""
    return b"Proxy-Status", b"%b; error=%b" % (name.encode("ascii"), ERRORS[reason])


def check_response(response: HttpResponse) -> None:
    """ProtocolError unless capsules follow this answer: 101, one Upgrade, to connect-udp, and no field of a body.

    Its message tells the status and the first error of Proxy-Status (RFC 9209), if there is one.
    """
    upgrade = [value.lower() for value in field_values(response.fields, b"upgrade")]
    if (
        response.status == 101
        and b"upgrade" in field_list(response.fields, b"connection")
        and upgrade == [PROTOCOL]
        and not _has_content(response.fields)
    ):
        return
    error = proxy_error(response)
    raise ProtocolError(
        f"the proxy did not switch to connect-udp: it answered {response.status}"
        + (f" ({error})" if error else "")
    )


def proxy_error(response: HttpResponse) -> str:
    """The first error type of an answer's Proxy-Status (RFC 9209), "" where it has none."""
    found = re.search(_ERROR, b", ".join(field_values(response.fields, b"proxy-status")))
    return found[1].decode("ascii") if found else ""


def _has_content(fields: Fields) -> bool:
    return any(name.lower() in _CONTENT for name, _ in fields)
