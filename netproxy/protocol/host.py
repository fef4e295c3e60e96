"""Host names and literal addresses as they stand in requests, made canonical.

One function decides for every protocol what a host may look like, so that rules, dialling
and chaining see one spelling: "0x7f.1", "2130706433", "[::1]" and "::ffff:127.0.0.1" become
the addresses they stand for.  Pure; no I/O.
"""

from __future__ import annotations

import re
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import ip_text

# RFC 1035 section 2.3.4: 255 octets on the wire, two of them framing.
NAME_LIMIT = 253
_LABELS = re.compile(rb"[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?\Z")
_NUMBER = re.compile(rb"(?:0[xX][0-9A-Fa-f]*|[0-9]+)\Z")


class HostError(ProtocolError):
    """The bytes are not a host.

    The message does not repeat the bytes, because it may go to a log.
    """


def parse_host(raw: bytes) -> str:
    """Return the canonical text of a name or an address.

    Accepts a name, an IPv4 address in any spelling of inet_aton(3), or an IPv6 address with
    or without brackets.  Raises HostError for anything else: control characters, spaces, URL
    characters, NUL, empty labels, labels over 63 bytes, names over 253 bytes, bytes that are
    not ASCII.
    """
    if raw[:1] == b"[" and raw[-1:] == b"]":
        return canonical_ipv6(raw[1:-1])
    if b":" in raw:
        return canonical_ipv6(raw)
    if not _LABELS.match(raw) or len(raw.rstrip(b".")) > NAME_LIMIT:
        raise HostError("not a host name")
    raw = raw[:-1] if raw.endswith(b".") else raw
    if _NUMBER.match(raw.rsplit(b".", 1)[-1]):
        return _parse_loose_ipv4(raw)
    return raw.decode("ascii").lower()


def canonical_ipv6(raw: bytes) -> str:
    """Return the canonical text of an IPv6 address; of a v4-mapped one, that of the IPv4 address.

    Raises HostError; an address with a zone is not accepted either.
    """
    try:
        packed = inet_pton(AF_INET6, raw.decode("ascii"))
    except (OSError, ValueError) as error:
        raise HostError("not an IPv6 address") from error
    return ip_text(packed)


def _parse_loose_ipv4(raw: bytes) -> str:
    """Return the IPv4 address of any spelling of inet_aton(3).

    One to four parts, each decimal, octal (0..) or hexadecimal (0x..); the last part fills
    the bytes that are left.
    """
    parts = raw.split(b".")
    if len(parts) > 4 or not all(map(_NUMBER.match, parts)):
        raise HostError("not an IPv4 address")
    numbers = [_parse_number(part) for part in parts]
    last_limit = 256 ** (5 - len(parts))
    if any(number > 255 for number in numbers[:-1]) or numbers[-1] >= last_limit:
        raise HostError("not an IPv4 address")
    value = numbers[-1]
    for place, number in enumerate(numbers[:-1]):
        value += number << (24 - 8 * place)
    return inet_ntop(AF_INET, value.to_bytes(4, "big"))


def _parse_number(part: bytes) -> int:
    try:
        if part[:2].lower() == b"0x":
            return int(part[2:] or b"0", 16)
        return int(part, 8 if len(part) > 1 and part.startswith(b"0") else 10)
    except ValueError as error:  # an 8 or 9 in an octal number
        raise HostError("not an IPv4 address") from error
