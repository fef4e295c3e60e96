"""Wrong patterns in rules and lists: each is an error of one line that says what is wrong."""

from __future__ import annotations

import pytest

from netproxy.router.matchers import DomainSet, PortSet
from netproxy.router.patterns import EXCERPT_LIMIT, parse_domain, parse_network

LABEL = "a" * 63
# 254 characters, one more than a name may have.
TOO_LONG = ".".join([LABEL, LABEL, LABEL, "b" * 62])

_NO_KEYWORD = "is not a valid keyword (expected ASCII letters, digits, '.', '-' and '_')"
_NO_EXPRESSION = "is not a valid regular expression: "
_NOT_ASCII = _NO_EXPRESSION + "it must be ASCII, as names are (xn--...), and not empty"

BAD_NAMES = {
    "": "",
    ".": "",
    "*": "*",
    "*.": "",
    "..example": ".example",
    "a..example": "a..example",
    "a.example..": "a.example..",
    "ads*.example": "ads*.example",
    "*.*.example": "*.example",
    " a.example": " a.example",
    "a b.example": "a b.example",
    "a.example\n": "a.example\\n",
    "a\0.example": "a\\x00.example",
    "a.example:443": "a.example:443",
    "word:ads": "word:ads",
    LABEL + "a.example": f"{LABEL[:57]}...",
    TOO_LONG: f"{LABEL[:57]}...",
    "ü" * 64 + ".example": f"{'ü' * 57}...",
    "ü." * 200 + "example": f"{('ü.' * 30)[:57]}...",
    "ß/a.example": "ß/a.example",
    "ü..example": "ü..example",
    # The codec writes it a/c.
    "\u2100.example": "\u2100.example",
    "\ud800.example": "\\ud800.example",
    # A host whose last label is a number is an address.
    "*.0.0.1": "0.0.1",
    "a.0x1f": "a.0x1f",
    "10.0.0.0/8": "10.0.0.0/8",
}
BAD_DOMAINS = {
    **{text: f"'{excerpt}' is not a valid domain name" for text, excerpt in BAD_NAMES.items()},
    "10.0.0.1": "'10.0.0.1' is an address, not a domain name",
    "::1": "'::1' is an address, not a domain name",
    "keyword:": f"'keyword:' {_NO_KEYWORD}",
    "keyword:a b": f"'keyword:a b' {_NO_KEYWORD}",
    "keyword:ü": f"'keyword:ü' {_NO_KEYWORD}",
    "regex:": f"'regex:' {_NOT_ASCII}",
    "regex:ü": f"'regex:ü' {_NOT_ASCII}",
    "regex:a(": f"'regex:a(' {_NO_EXPRESSION}missing ), unterminated subpattern at position 1",
    "regex:*": f"'regex:*' {_NO_EXPRESSION}nothing to repeat at position 0",
}


@pytest.mark.parametrize("pattern", BAD_DOMAINS, ids=lambda pattern: ascii(pattern)[:40])
def test_bad_domain_is_an_error_of_one_line(pattern: str) -> None:
    with pytest.raises(ValueError) as caught:
        DomainSet(["good.example", pattern])
    assert type(caught.value) is ValueError and str(caught.value) == BAD_DOMAINS[pattern]


@pytest.mark.parametrize(
    "expression",
    ["(" * 5000 + ")" * 5000, "a{99999999999999999999}", "(?P<" + "n" * 5000 + ">a)(?P=m)"],
)
def test_expression_that_breaks_the_compiler_is_a_short_error(expression: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_domain("regex:" + expression)
    message = str(caught.value)
    assert message.startswith(f"'regex:{expression[:20]}") and "\n" not in message
    assert len(message) < 3 * EXCERPT_LIMIT


_EXPECTED = "(expected an address or CIDR, such as 10.0.0.0/8)"
BAD_NETWORKS = {
    "10.0.0.1/8": "bits behind the prefix are set (write 10.0.0.0/8)",
    "fd00::1/64": "bits behind the prefix are set (write fd00::/64)",
    "::ffff:10.0.0.1/104": "bits behind the prefix are set (write ::ffff:10.0.0.0/104)",
    "10.0.0.0/33": "the prefix is longer than 32 bits",
    "::/129": "the prefix is longer than 128 bits",
}
NO_NETWORKS = {
    **{text: text for text in ("", "example", "10.0.0.0/", "10.0.0.0/-1", "10.0.0.0/ 8")},
    **{text: text for text in ("10.0.0.0/²", "10.0.0/24", "010.0.0.0/8", "10.0.0.0/8/8")},
    **{text: text for text in ("10.0.0.0/255.0.0.0", "10.0.0.1/0008", "[::1]", "fe80::1%eth0")},
    "::1\0": "::1\\x00",
    "1" * 99: "1" * 57 + "...",
}


@pytest.mark.parametrize("text", BAD_NETWORKS)
def test_bad_prefix_is_an_error_that_says_why(text: str) -> None:
    """Hazard 79."""
    with pytest.raises(ValueError) as caught:
        parse_network(text)
    assert str(caught.value) == f"'{text}' is not a valid network: {BAD_NETWORKS[text]}"


@pytest.mark.parametrize("text", NO_NETWORKS)
def test_text_that_is_no_network_is_an_error_of_one_line(text: str) -> None:
    """Hazard 79."""
    with pytest.raises(ValueError) as caught:
        parse_network(text)
    assert str(caught.value) == f"'{NO_NETWORKS[text]}' is not a valid network {_EXPECTED}"


BAD_PORTS = (
    *("", "-", "80-", "-80", "http", "65536", "80-65536", "1-2-3", "+80", "8_0", " 80", "²"),
    *("80 - 90", "0x50", "9" * 99, "9" * 5000),
)


@pytest.mark.parametrize("text", BAD_PORTS)
def test_bad_port_is_an_error_of_one_line(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        PortSet(["443", text])
    excerpt = text if len(text) <= EXCERPT_LIMIT else text[:57] + "..."
    assert str(caught.value) == (
        f"'{excerpt}' is not a valid port (expected 443 or 8000-8100, at most 65535)"
    )


def test_ports_in_reverse_order_are_an_error() -> None:
    with pytest.raises(ValueError) as caught:
        PortSet(["8100-8000"])
    assert str(caught.value) == (
        "'8100-8000' is not a valid range: the first port is above the last"
    )
