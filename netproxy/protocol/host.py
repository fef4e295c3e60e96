"""Host names and literal addresses as they stand in requests, made canonical.

One function decides for every protocol what a host may look like, so that
rules, dialling and chaining see one spelling: "0x7f.1", "2130706433", "[::1]"
and "::ffff:127.0.0.1" are the addresses they mean.  Pure; no I/O.
"""

from __future__ import annotations

import re
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import ip_text

NAME_LIMIT = 253  # RFC 1035 section 2.3.4: 255 octets on the wire, two of them framing
_LABELS = re.compile(rb"[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?\Z")
_NUMBER = re.compile(rb"(?:0[xX][0-9A-Fa-f]*|[0-9]+)\Z")


class HostError(ProtocolError):
    """The bytes are no host; they are not repeated in the message, since a log may show it."""


def parse_host(raw: bytes) -> str:
    """Canonical text of a name, an IPv4 address in any spelling of inet_aton(3), or an IPv6 address, bracketed or not.

    Raises HostError for anything else: control characters, spaces, URL characters, NUL, labels that
    are empty or over 63 bytes, names over 253, bytes that are not ASCII.
    """
    if raw[:1] == b"[" and raw[-1:] == b"]":
        return canonical_ipv6(raw[1:-1])
    if b":" in raw:
        return canonical_ipv6(raw)
    if not _LABELS.match(raw) or len(raw.rstrip(b".")) > NAME_LIMIT:
        raise HostError("not a host name")
    raw = raw[:-1] if raw.endswith(b".") else raw
    if _NUMBER.match(raw.rsplit(b".", 1)[-1]):
        return _loose_ipv4(raw)
    return raw.decode("ascii").lower()


def canonical_ipv6(raw: bytes) -> str:
    """The one text of an IPv6 address; a v4-mapped one is the IPv4 address it stands for.  No zone."""
    try:
        packed = inet_pton(AF_INET6, raw.decode("ascii"))
    except (OSError, ValueError) as error:
        raise HostError("not an IPv6 address") from error
    return ip_text(packed)


def _loose_ipv4(raw: bytes) -> str:
    """inet_aton(3): one to four parts, each decimal, octal (0..) or hexadecimal (0x..), the last filling what is left."""
    parts = raw.split(b".")
    if len(parts) > 4 or not all(map(_NUMBER.match, parts)):
        raise HostError("not an IPv4 address")
    numbers = [_number(part) for part in parts]
    room = 256 ** (5 - len(parts))
    if any(number > 255 for number in numbers[:-1]) or numbers[-1] >= room:
        raise HostError("not an IPv4 address")
    value = numbers[-1]
    for place, number in enumerate(numbers[:-1]):
        value += number << (24 - 8 * place)
    return inet_ntop(AF_INET, value.to_bytes(4, "big"))


def _number(part: bytes) -> int:
    try:
        if part[:2].lower() == b"0x":
            return int(part[2:] or b"0", 16)
        return int(part, 8 if len(part) > 1 and part.startswith(b"0") else 10)
    except ValueError as error:  # an 8 or 9 in an octal number
        raise HostError("not an IPv4 address") from error
