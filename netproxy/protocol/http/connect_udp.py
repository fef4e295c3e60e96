"""Proxying UDP in HTTP/1.1 (RFC 9298): the request to upgrade to connect-udp, and its answers.

Both roles, on the heads of http1; behind a 101 both directions carry only capsules
(protocol.http.capsule).  RFC 9931: a client sends no capsule before it has read the 101, and a
refusal closes the connection.  Only the default URI template is supported.  The extension for all
targets of a client is in bound_udp.py.  No I/O.
"""

from __future__ import annotations

import re

from netproxy.errors import ProtocolError, Reason
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address
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
from netproxy.typed import Sequence

PROTOCOL = b"connect-udp"
# RFC 9298 section 2: the default template.
PATH = b"/.well-known/masque/udp/%b/%d/"
# The path of a request without a target: an asterisk in place of host and port (bound_udp.py).
ANY_PATH = b"/.well-known/masque/udp/%2A/%2A/"
# The field by which both ends agree on the extension of bound_udp.py.
BIND_FIELD = b"Connect-UDP-Bind"
# Bytes of an upstream's error type in a message: the longest of RFC 9209 has 34.
ERROR_LIMIT = 64

# These expressions are text: they are compiled on first use, which most daemons never reach.
# The host has what the expansion of the template leaves as it is (unreserved characters,
# RFC 3986 section 2.3), and what it escapes.
_TARGET = (
    rb"(?:[Hh][Tt][Tt][Pp][Ss]?://([^/?#]+))?/\.well-known/masque/udp/"
    rb"((?:[A-Za-z0-9._~-]|%[0-9A-Fa-f]{2})+)/([0-9]{1,5}|%2[Aa])/\Z"
)
_ESCAPE = rb"%([0-9A-Fa-f]{2})"
# The first parameter "error" in Proxy-Status.  It may also match within a quoted string: the
# result only goes into a message.
_ERROR = rb"; *error=([A-Za-z*][!#$%%&'*+\-.^_`|~:/0-9A-Za-z]{0,%d})" % (ERROR_LIMIT - 1)

# A Boolean that is true, with parameters that have no meaning (RFC 9651 sections 4.2.3 and 4.2.7).
_TRUE = (
    rb"\?1(?:; *[a-z*][a-z0-9_\-.*]*(?:=(?:"
    rb'@?-?[0-9]{1,15}(?:\.[0-9]{1,3})?|%?"(?:[ !#-\[\]-~]|\\["\\])*"|:[A-Za-z0-9+/=]*:|\?[01]'
    rb"|[A-Za-z*][!#$%&'*+\-.^_`|~:/0-9A-Za-z]*))?)*\Z"
)
_UPGRADE: Fields = [
    (b"Connection", b"Upgrade"),
    (b"Upgrade", PROTOCOL),
    (b"Capsule-Protocol", b"?1"),
]
# RFC 9297 section 3.2: a message with one of these is not followed by capsules.
_CONTENT = (b"content-length", b"content-type", b"transfer-encoding")

# Error types in Proxy-Status (RFC 9209 section 2.3).
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
    Reason.LIMIT: b"connection_limit_reached",
}
REASONS = {error.decode("ascii"): reason for reason, error in ERRORS.items()} | {
    "destination_ip_unroutable": Reason.HOST_UNREACHABLE,
    "destination_unavailable": Reason.GENERAL,
    "destination_ip_prohibited": Reason.DENIED,
    "dns_timeout": Reason.TIMEOUT,
    "proxy_configuration_error": Reason.UNSUPPORTED,
}


# Request (RFC 9298 section 3.2)
# GET /.well-known/masque/udp/2001%3Adb8%3A%3A42/443/ HTTP/1.1
# Host: proxy.example
# Connection: Upgrade
# Upgrade: connect-udp
# Capsule-Protocol: ?1
def encode_request(
    target: Address,
    proxy: str,
    authorization: bytes = b"",
    is_bound: bool = False,
    more: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """Encode the request for `target`; it has no room for a scope (fe80::1%2).

    `proxy` is the value of Host, `authorization` that of Proxy-Authorization; `more` fields follow.
    `is_bound` asks for a stream for all targets; UNSPECIFIED_ADDRESS then stands for no target.
    """
    fields = [(b"Host", proxy.encode("ascii")), *_UPGRADE, *more]
    if is_bound:
        fields.append((BIND_FIELD, b"?1"))
    if authorization:
        fields.append((b"Proxy-Authorization", authorization))
    return http1.encode_request(HttpRequest(b"GET", encode_path(target), 1, fields))


def encode_path(target: Address) -> bytes:
    """Return the path of the request for `target`."""
    if target == UNSPECIFIED_ADDRESS:
        return ANY_PATH
    # The colon is the only character of a canonical host that must be escaped.
    host = target.host.partition("%")[0].replace(":", "%3A").encode("ascii")
    return PATH % (host, target.port)


def asks_for(request: HttpRequest) -> bool:
    """Return whether a request asks for an upgrade to connect-udp, and to nothing else.

    HTTP/1.0 has no upgrade (RFC 9110 section 7.8).
    """
    return (
        request.method == b"GET"
        and request.minor == 1
        and b"upgrade" in field_list(request.fields, b"connection")
        and field_list(request.fields, b"upgrade") == [PROTOCOL]
    )


def is_bind_offered(fields: Fields) -> bool:
    """Return whether a message has the field Connect-UDP-Bind, and it is true.

    Every other value, and several fields, are as good as none.
    """
    values = field_values(fields, BIND_FIELD.lower())
    return len(values) == 1 and re.match(_TRUE, values[0]) is not None


def parse_target(request: HttpRequest) -> Address:
    """Return the UDP target of a request for connect-udp, in absolute or origin form.

    Returns UNSPECIFIED_ADDRESS for two asterisks in a request for all targets.  Raises HttpError
    with 400 for another path, an invalid host (a zone makes it invalid), a port outside 1 to
    65535, and a declared body, whose bytes would be read as capsules.
    """
    match = re.match(_TARGET, request.target)
    if not match:
        raise HttpError(400, "not /.well-known/masque/udp/host/port/")
    if match[1]:
        http1.parse_authority(match[1], HTTP_PORT)
    if _has_content(request.fields):
        raise HttpError(400, "a request for connect-udp has no body")
    asterisks = [part in (b"%2A", b"%2a") for part in match.group(2, 3)]
    if all(asterisks) and is_bind_offered(request.fields):
        return UNSPECIFIED_ADDRESS
    if any(asterisks):
        raise HttpError(400, "asterisks stand for host and port together, with Connect-UDP-Bind")
    port = int(match[3])
    if not 0 < port < 65536:
        raise HttpError(400, "no port between 1 and 65535")
    try:
        return Address(parse_host(re.sub(_ESCAPE, _unescape, match[2])), port)
    except HostError as error:
        raise HttpError(400, str(error)) from error


# Answer (RFC 9298 section 3.3)
# HTTP/1.1 101 Switching Protocols
# Connection: Upgrade
# Upgrade: connect-udp
# Capsule-Protocol: ?1
def encode_accept(more: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """Encode the answer that capsules follow, with `more` fields."""
    return http1.encode_response(HttpResponse(1, 101, b"Switching Protocols", [*_UPGRADE, *more]))


def status_field(reason: Reason, name: str) -> tuple[bytes, bytes]:
    """Return the field Proxy-Status of a refusal (RFC 9209).

    `name` is this proxy's, a token that begins with a letter.
    """
    return b"Proxy-Status", b"%b; error=%b" % (name.encode("ascii"), ERRORS[reason])


def check_response(response: HttpResponse) -> None:
    """Check that capsules follow an answer: 101, one Upgrade, to connect-udp, no declared body.

    Raises ProtocolError, whose message has the status and the first error of Proxy-Status.
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
    suffix = f" ({error})" if error else ""
    message = f"the proxy did not switch to connect-udp: it answered {response.status}{suffix}"
    raise ProtocolError(message)


def proxy_error(response: HttpResponse) -> str:
    """Return the first error type in an answer's Proxy-Status (RFC 9209), "" for none."""
    match = re.search(_ERROR, b", ".join(field_values(response.fields, b"proxy-status")))
    return match[1].decode("ascii") if match else ""


def _unescape(escape: re.Match[bytes]) -> bytes:
    return bytes((int(escape[1], 16),))


def _has_content(fields: Fields) -> bool:
    return any(name.lower() in _CONTENT for name, _ in fields)
