"""Parses domain names, networks and ports as users write them in rules and lists.

The results are canonical; matchers.py and interfaces.networks compile them into sets.
Every mistake is a ValueError with a message of one line, which repeats at most the
beginning of the text.  Pure.
"""

from __future__ import annotations

import re

from netproxy.interfaces.addresses import pack_ip
from netproxy.interfaces.networks import IpNetwork
from netproxy.typed import NamedTuple

# Kinds of domain patterns.  APEX (the name itself) and BELOW (the names below it) are bits.
APEX, BELOW, KEYWORD, REGEX = 1, 2, 4, 8
SUFFIX = APEX | BELOW

# Characters of a name: RFC 1035 section 2.3.4 allows 255 octets on the wire, two of them framing.
NAME_LIMIT = 253
PORT_LIMIT = 65535
# Characters of a wrong pattern that a message repeats.
EXCERPT_LIMIT = 60

# The syntax of protocol.host, in which a host whose last label is a number is an address.
_NAME = r"(?:[a-z0-9_-]{1,63}\.)*(?!(?:[0-9]+|0x[0-9a-f]*)\Z)[a-z0-9_-]{1,63}\Z"
_KEYWORD = r"[a-z0-9_.-]+\Z"
# Other characters that separate labels, RFC 3490 section 3.1.
_DOTS = {0x3002: ".", 0xFF0E: ".", 0xFF61: "."}
# Python's codec implements IDNA 2003, which maps sharp s, final sigma and the joiners to other
# letters, hence to another name.  Today's clients keep these letters (UTS 46).
_KEPT = "\u00df\u03c2\u200c\u200d"


class DomainPattern(NamedTuple):
    """One pattern for names."""

    kind: int
    """APEX, BELOW, SUFFIX, KEYWORD or REGEX."""
    text: str
    """The canonical name, the keyword or the expression."""


def parse_domain(text: str) -> DomainPattern:
    """Parse a domain pattern; raises ValueError.

    "ads.example" is that name, "*.ads.example" the names below it, ".ads.example" both;
    "keyword:ads" matches names with that text in them, "regex:^ad" is an expression.
    """
    if text.startswith("keyword:"):
        word = text[8:].lower()
        if not re.match(_KEYWORD, word):
            raise ValueError(
                f"'{excerpt(text)}' is not a valid keyword"
                " (expected ASCII letters, digits, '.', '-' and '_')"
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
    """Return a name in lower case and ASCII, without a final dot; raises ValueError."""
    name = (text if text.isascii() else _to_ascii(text)).lower()
    name = name[:-1] if name.endswith(".") else name
    if len(name) > NAME_LIMIT or not re.match(_NAME, name):
        kind = "an address, not a" if is_address(text) else "not a valid"
        hint = " (write the host alone)" if "://" in text else ""
        raise ValueError(f"'{excerpt(text)}' is {kind} domain name{hint}")
    return name


def is_address(text: str) -> bool:
    """Return whether the text is a literal address.  Its scope is ignored."""
    return text.isprintable() and pack_ip(text.partition("%")[0]) is not None


def _to_ascii(text: str) -> str:
    """Return the xn-- form of a name, "" if there is none."""
    # The time that the codec takes grows with the square of the length.
    if len(text) > NAME_LIMIT:
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
    """Compile an expression that is searched for in lower-case names; raises ValueError.

    The case of the expression does not matter.
    """
    if not text or not text.isascii():
        raise ValueError(
            f"'regex:{excerpt(text)}' is not a valid regular expression:"
            " it must be ASCII, as names are (xn--...), and not empty"
        )
    try:
        # An expression without capital letters need not ignore case, which is faster.
        return re.compile(text, 0 if text == text.lower() else re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"'regex:{excerpt(text)}' is not a valid regular expression: {excerpt(str(error))}"
        ) from error


def parse_network(text: str) -> IpNetwork:
    """Parse "10.0.0.0/8", "fd00::/8" or a single address; raises ValueError."""
    # No valid network is longer than an excerpt.
    return IpNetwork.parse(excerpt(text))


def parse_ports(text: str) -> range:
    """Parse "443" or "8000-8100", both ends included; raises ValueError."""
    first, dash, last = text.partition("-")
    ports = range(_parse_port(first, text), _parse_port(last if dash else first, text) + 1)
    if not ports:
        raise ValueError(f"'{text}' is not a valid range: the first port is above the last")
    return ports


def _parse_port(number: str, text: str) -> int:
    is_number = number.isascii() and number.isdigit() and len(number) <= 5
    if not is_number or int(number) > PORT_LIMIT:
        raise ValueError(
            f"'{excerpt(text)}' is not a valid port"
            f" (expected 443 or 8000-8100, at most {PORT_LIMIT})"
        )
    return int(number)


def excerpt(text: str) -> str:
    """Return the beginning of a user's text for a message, on one line."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= EXCERPT_LIMIT else text[: EXCERPT_LIMIT - 3] + "..."
