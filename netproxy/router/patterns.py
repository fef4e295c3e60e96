"""Names, networks and ports as users write them in rules and lists, made canonical.

Whatever is wrong is a ValueError of one line that repeats no more than the
beginning of what was written.  Pure; matchers.py compiles what comes out here.
"""

from __future__ import annotations

import re
from socket import AF_INET, AF_INET6, inet_ntop
from typing import NamedTuple

from netproxy.interfaces.addresses import pack_ip
from netproxy.interfaces.networks import IpNetwork

# Kinds of domain patterns.  The first two are bits: what a suffix matches is its apex and what is below it.
APEX, BELOW, KEYWORD, REGEX = 1, 2, 4, 8
SUFFIX = APEX | BELOW

NAME_LIMIT = 253  # RFC 1035 section 2.3.4: 255 octets on the wire, two of them framing
PORT_LIMIT = 65535
SHOWN = 60  # characters of a bad pattern in a message
# as in protocol.host; what ends in a number is an address there, so that no name does
_NAME = r"(?:[a-z0-9_-]{1,63}\.)*(?!(?:[0-9]+|0x[0-9a-f]*)\Z)[a-z0-9_-]{1,63}\Z"
_KEYWORD = r"[a-z0-9_.-]+\Z"
_DOTS = {0x3002: ".", 0xFF0E: ".", 0xFF61: "."}  # RFC 3490 section 3.1: they part labels too
# IDNA 2003, which Python's codec speaks, makes other letters of sharp s, final sigma and the joiners, hence somebody
# else's name; today's clients keep them (UTS 46)
_KEPT = "\u00df\u03c2\u200c\u200d"


class DomainPattern(NamedTuple):
    kind: int
    text: str  # the name, the keyword or the expression


def parse_domain(text: str) -> DomainPattern:
    """Of "ads.example" (that name), "*.ads.example" (names below it), ".ads.example" (both), "keyword:ads", "regex:^ad"."""
    if text.startswith("keyword:"):
        word = text[8:].lower()
        if not re.match(_KEYWORD, word):
            raise ValueError(
                f"'{shown(text)}': a keyword is made of ASCII letters, digits, '.', '-' and '_'"
            )
        return DomainPattern(KEYWORD, word)
    if text.startswith("regex:"):
        compile_expression(text[6:])
        return DomainPattern(REGEX, text[6:])
    if text.startswith("*."):
        return DomainPattern(BELOW, parse_name(text[2:]))
    if text.startswith("."):
        return DomainPattern(SUFFIX, parse_name(text[1:]))
    return DomainPattern(APEX, parse_name(text))


def parse_name(text: str) -> str:
    """A name in lower case and ASCII, without its final dot."""
    name = (text if text.isascii() else _to_ascii(text)).lower()
    name = name[:-1] if name.endswith(".") else name
    if len(name) > NAME_LIMIT or not re.match(_NAME, name):
        raise ValueError(
            f"'{shown(text)}' is {'an address, not a' if is_address(text) else 'no'} domain name"
        )
    return name


def is_address(text: str) -> bool:
    """Whether it is a literal address, its scope ignored."""
    return text.isprintable() and pack_ip(text.partition("%")[0]) is not None


def _to_ascii(text: str) -> str:
    """The xn-- form of a name, "" where there is none."""
    if len(text) > NAME_LIMIT:  # the codec's time grows with the square of it
        return ""
    try:
        return ".".join(map(_label_to_ascii, text.translate(_DOTS).split(".")))
    except UnicodeError:
        return ""


def _label_to_ascii(label: str) -> str:
    if not any(letter in label for letter in _KEPT):
        return label.encode("idna").decode("ascii")
    folded = "".join(letter if letter in _KEPT else letter.casefold() for letter in label)
    return "xn--" + folded.encode("punycode").decode("ascii")


def compile_expression(text: str) -> re.Pattern[str]:
    """An expression that is searched for in names, which are in lower case; its own case does not matter."""
    if not text or not text.isascii():
        raise ValueError(
            f"'regex:{shown(text)}': an expression is not empty, and ASCII as names are (xn--...)"
        )
    try:
        # one without a capital letter need not ignore case, and is faster
        return re.compile(text, 0 if text == text.lower() else re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"'regex:{shown(text)}' is no regular expression: {shown(str(error))}"
        ) from error


def parse_network(text: str) -> IpNetwork:
    """Of "10.0.0.0/8", "fd00::/8" or a single address."""
    try:
        return IpNetwork.parse(text)
    except ValueError as error:
        raise ValueError(_wrong_network(text)) from error


def _wrong_network(text: str) -> str:
    host, _, length = text.partition("/")
    packed = pack_ip(host) if host.isprintable() else None
    bits = int(length) if length.isascii() and length.isdigit() and len(length) <= 3 else None
    if packed is None or bits is None:
        return (
            f"'{shown(text)}' is no network: write it as 10.0.0.0/8, fd00::/8 or a single address"
        )
    shift = len(packed) * 8 - bits
    if shift < 0:
        return f"'{text}' is no network: its prefix is longer than {len(packed) * 8} bits"
    network = (int.from_bytes(packed, "big") >> shift << shift).to_bytes(len(packed), "big")
    meant = inet_ntop(AF_INET if len(packed) == 4 else AF_INET6, network)
    return f"'{text}' has bits set behind its prefix: the network is {meant}/{bits}"


def parse_ports(text: str) -> range:
    """Of "443" or "8000-8100", both ends included."""
    first, dash, last = text.partition("-")
    ports = range(_parse_port(first, text), _parse_port(last if dash else first, text) + 1)
    if not ports:
        raise ValueError(f"'{text}': the first port is above the last")
    return ports


def _parse_port(number: str, text: str) -> int:
    if not (
        number.isascii() and number.isdigit() and len(number) <= 5 and int(number) <= PORT_LIMIT
    ):
        raise ValueError(
            f"'{shown(text)}' is no port: write it as 443 or 8000-8100, up to {PORT_LIMIT}"
        )
    return int(number)


def shown(text: str) -> str:
    """What a message repeats: the beginning, on one line."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
