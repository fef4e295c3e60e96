"""What patterns match and what they do not; the tables are the documentation of how rules are written."""

from __future__ import annotations

import re
import tracemalloc

import pytest

from netproxy.interfaces.addresses import ip_text
from netproxy.interfaces.networks import IpNetwork
from netproxy.protocol.host import parse_host
from netproxy.router.matchers import DomainSet, NetworkSet, PortSet
from netproxy.router.patterns import KEYWORD, REGEX, SHOWN, parse_domain

LABEL = "a" * 63
LONGEST = ".".join([LABEL, LABEL, LABEL, "b" * 61])  # 253 letters
DEEPEST = ".".join("a" * 127)

# pattern: names that it matches, and names that it does not
DOMAINS = {
    # a name alone
    "ads.example": (
        "ads.example",
        "www.ads.example badads.example ads.example.org xads.example ads.exampl example ads",
    ),
    "Ads.EXAMPLE.": ("ads.example", "www.ads.example"),
    "localhost": ("localhost", "localhost.localdomain my.localhost"),
    "a_b-c.x1": ("a_b-c.x1", "a-b-c.x1"),
    "xn--bcher-kva.example": ("xn--bcher-kva.example", "bcher-kva.example"),
    # what is below it, at any depth, and not the name itself
    "*.tracker.example": (
        "a.tracker.example a.b.tracker.example",
        "tracker.example nottracker.example a.tracker.example.org",
    ),
    "*.Tracker.Example.": ("a.tracker.example", "tracker.example"),
    "*.lan": ("printer.lan a.b.lan", "lan wlan printer.wlan"),
    # both; hazard 76: never a name that only ends in the same letters
    ".trusted.net": (
        "trusted.net www.trusted.net a.b.trusted.net",
        "untrusted.net www.untrusted.net trusted.network net",
    ),
    ".COM.": ("com example.com a.b.com", "net example.net telecom com.net"),
    # text anywhere
    "keyword:ads": (
        "ads ads.example example.ads loads.example x.badads.example",
        "ad.example a.ds",
    ),
    "keyword:ADS.": ("ads.example my.ads.example", "ads adserver.example"),
    # an expression, searched for; names are in lower case
    r"regex:^ad[0-9]+\.": ("ad1.example ad42.net", "ad.example bad1.example ad1 xad1.example"),
    r"regex:^AD[0-9]+\.": ("ad1.example", "ad.example"),
    r"regex:tracker": ("tracker mytrackers.example", "track.example"),
    r"regex:\.example$": ("a.example", "example a.example.org"),
    r"regex:^\S+(?<=ads)\.net\Z": ("loads.net", "loads.nets"),
    # letters beyond ASCII, composed or not; sharp s and final sigma stay what they are, as in the examples of UTS 46
    "BÜCHER.example": ("xn--bcher-kva.example", "bcher.example bucher.example"),
    "bu\u0308cher.example": ("xn--bcher-kva.example", ""),
    "*.日本。jp": ("www.xn--wgv71a.jp", "xn--wgv71a.jp"),
    ".ελλάδα。": ("xn--hxakic4aa www.xn--hxakic4aa", "xn--xn--hxakic4aa"),
    "Faß。example": ("xn--fa-hia.example", "fass.example"),
    "ΒΌΛΟς.example": ("xn--nxasmm1c.example", "xn--nxasmq6b.example"),
    "ΒΌΛΟΣ.example": ("xn--nxasmq6b.example", "xn--nxasmm1c.example"),
    # as long, and as deep, as can be
    LONGEST: (LONGEST, LONGEST[1:]),
    f"*.{LONGEST[64:]}": (LONGEST, LONGEST[64:]),
    "." + DEEPEST: (DEEPEST, DEEPEST[2:]),
    ".b.example": (DEEPEST[:200] + "b.example", DEEPEST),
}


@pytest.mark.parametrize("pattern", DOMAINS, ids=lambda pattern: ascii(pattern)[:40])
def test_a_pattern_matches_these_names_and_not_those(pattern: str) -> None:
    """Hazard 76."""
    yes, no = (set(names.split()) for names in DOMAINS[pattern])
    domains = DomainSet([pattern])
    assert {name for name in yes | no if name in domains} == yes


@pytest.mark.parametrize(
    ("asked", "matches"),
    [
        (b"trusted.net", True),
        (b"TRUSTED.net", True),
        (b"Trusted.Net.", True),
        (b"www.trusted.net.", True),
        (b"WWW.trusted.net", True),
        (b"untrusted.net", False),
        (b"UnTrusted.net.", False),
        (b"trusted.net.example", False),
    ],
)
def test_names_as_clients_ask_for_them(asked: bytes, matches: bool) -> None:
    """Hazard 76: a final dot and case mean nothing."""
    assert (parse_host(asked) in DomainSet([".trusted.net"])) is matches


@pytest.mark.parametrize("address", ["10.0.0.1", "::1", "fe80::1%2", "fe80::ad", "::ffff:10.0.0.1"])
def test_an_address_is_in_no_set_of_names(address: str) -> None:
    patterns = [
        "keyword:1",
        "keyword:10.0",
        "keyword:ad",
        "regex:.",
        "regex:^",
        "regex:ad$",
        "*.example",
    ]
    assert address not in DomainSet(patterns)


def test_an_empty_set_has_nothing() -> None:
    assert "example" not in DomainSet([])
    assert (
        "example" not in NetworkSet([])
        and "0.0.0.0" not in NetworkSet([])
        and "::" not in NetworkSet([])
    )
    assert 0 not in PortSet([])


@pytest.mark.parametrize(
    "patterns",
    [
        ["a.example", "*.a.example"],
        ["*.a.example", "a.example"],
        ["a.example"] * 3 + [".a.example"],
        [".a.example", "a.example"],
        [".A.example", "*.a.example."],
    ],
)
def test_patterns_of_one_name_add_up(patterns: list[str]) -> None:
    domains = DomainSet(patterns)
    assert "a.example" in domains and "b.a.example" in domains and "example" not in domains


def test_a_deep_pattern_does_not_hide_a_shallow_one() -> None:
    domains = DomainSet(["d.c.b.a.example", "*.example", "keyword:zz", "regex:^q"])
    asked = ("d.c.b.a.example", "c.b.a.example", "example", "zz", "q.x.y", "d.c.b.a.org")
    assert {name for name in asked if name in domains} == {
        "d.c.b.a.example",
        "c.b.a.example",
        "zz",
        "q.x.y",
    }


def test_every_one_of_many_names_is_found_and_nothing_else() -> None:
    """Enough of them to share places in a hash table."""
    names = [f"n{number}.example" for number in range(3000)]
    domains = DomainSet(names[::2])
    assert [name for name in names if name in domains] == names[::2]
    assert not [
        name
        for name in names
        if f"www.{name}" in domains or f"{name}.org" in domains or name[1:] in domains
    ]


def test_parsed_patterns_do_as_well_as_text() -> None:
    texts = ["a.example", "*.b.example", ".c.example", "keyword:kk", "regex:^r"]
    names = ["a.example", "x.a.example", "b.example", "x.b.example", "c.example", "akk", "r", "ar"]
    assert (
        [name in DomainSet(texts) for name in names]
        == [name in DomainSet(map(parse_domain, texts)) for name in names]
        == [True, False, False, True, True, True, True, False]
    )


BAD_DOMAINS = {
    "": "'' is no domain name",
    ".": "'' is no domain name",
    "*": "'*' is no domain name",
    "*.": "'' is no domain name",
    "..example": "'.example' is no domain name",
    "a..example": "'a..example' is no domain name",
    "a.example..": "'a.example..' is no domain name",
    "ads*.example": "'ads*.example' is no domain name",
    "*.*.example": "'*.example' is no domain name",
    " a.example": "' a.example' is no domain name",
    "a b.example": "'a b.example' is no domain name",
    "a.example\n": "'a.example\\n' is no domain name",
    "a\0.example": "'a\\x00.example' is no domain name",
    "http://a.example/": "'http://a.example/' is no domain name",
    "a.example:443": "'a.example:443' is no domain name",
    "word:ads": "'word:ads' is no domain name",
    LABEL + "a.example": f"'{LABEL[:57]}...' is no domain name",
    LONGEST + "b": f"'{LABEL[:57]}...' is no domain name",
    "ü" * 64 + ".example": f"'{'ü' * 57}...' is no domain name",
    "ü." * 200 + "example": f"'{('ü.' * 30)[:57]}...' is no domain name",
    "ß/a.example": "'ß/a.example' is no domain name",
    "ü..example": "'ü..example' is no domain name",
    "\u2100.example": "'\u2100.example' is no domain name",  # the codec writes it a/c
    "\ud800.example": "'\\ud800.example' is no domain name",
    "10.0.0.1": "'10.0.0.1' is an address, not a domain name",
    "::1": "'::1' is an address, not a domain name",
    "*.0.0.1": "'0.0.1' is no domain name",  # names that end in a number are addresses when they are asked for
    "a.0x1f": "'a.0x1f' is no domain name",
    "10.0.0.0/8": "'10.0.0.0/8' is no domain name",
    "keyword:": "'keyword:': a keyword is made of ASCII letters, digits, '.', '-' and '_'",
    "keyword:a b": "'keyword:a b': a keyword is made of ASCII letters, digits, '.', '-' and '_'",
    "keyword:ü": "'keyword:ü': a keyword is made of ASCII letters, digits, '.', '-' and '_'",
    "regex:": "'regex:': an expression is not empty, and ASCII as names are (xn--...)",
    "regex:ü": "'regex:ü': an expression is not empty, and ASCII as names are (xn--...)",
    "regex:a(": "'regex:a(' is no regular expression: missing ), unterminated subpattern at position 1",
    "regex:*": "'regex:*' is no regular expression: nothing to repeat at position 0",
}


@pytest.mark.parametrize("pattern", BAD_DOMAINS, ids=lambda pattern: ascii(pattern)[:40])
def test_a_bad_domain_is_one_clear_line(pattern: str) -> None:
    with pytest.raises(ValueError) as caught:
        DomainSet(["good.example", pattern])
    assert type(caught.value) is ValueError and str(caught.value) == BAD_DOMAINS[pattern]


@pytest.mark.parametrize(
    "expression",
    ["(" * 5000 + ")" * 5000, "a{99999999999999999999}", "(?P<" + "n" * 5000 + ">a)(?P=m)"],
)
def test_expressions_that_break_the_compiler_are_one_short_line(expression: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_domain("regex:" + expression)
    assert str(caught.value).startswith(f"'regex:{expression[:20]}") and "\n" not in str(
        caught.value
    )
    assert len(str(caught.value)) < 3 * SHOWN


def test_names_take_little_memory() -> None:
    """Not the 120 bytes that a str in a dict takes."""
    patterns = [parse_domain(f"ads{number}.example.com") for number in range(4000)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        domains = DomainSet(patterns)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "ads3999.example.com" in domains
    assert (after - before) / len(patterns) < 45 and (peak - before) / len(patterns) < 60


# network: addresses in it, and hosts that are not
NETWORKS = {
    "10.0.0.0/8": (
        "10.0.0.0 10.255.255.255 ::ffff:10.1.2.3 ::ffff:a01:203",
        "9.255.255.255 11.0.0.0 ::10.0.0.1 a00:: example ten.10",
    ),
    "192.0.2.7": ("192.0.2.7 ::ffff:192.0.2.7", "192.0.2.6 192.0.2.8 ::c000:207"),
    "0.0.0.0/0": ("0.0.0.0 255.255.255.255", ":: ::1 example"),
    "255.255.255.255/32": ("255.255.255.255", "255.255.255.254"),
    "128.0.0.0/1": ("128.0.0.0 255.255.255.255", "127.255.255.255"),
    "fd00::/8": (
        "fd00:: fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff fd12::1%eth0",
        "fcff:ffff:ffff:ffff:ffff:ffff:ffff:ffff fe00::",
    ),
    "FE80::/10": ("fe80::1 fe80::1%2 febf::", "fec0:: example"),
    "2001:db8::1": ("2001:db8::1", "2001:db8:: 2001:db8::2 2001:db8:0:1::1"),
    "2001:db8::/64": (
        "2001:db8:: 2001:db8::ffff:ffff:ffff:ffff",
        "2001:db7:ffff:ffff:ffff:ffff:ffff:ffff 2001:db8:0:1::",
    ),
    "2001:db8::8000:0:0:0/65": (
        "2001:db8::8000:0:0:0 2001:db8::ffff:ffff:ffff:ffff",
        "2001:db8::7fff:ffff:ffff:ffff 2001:db8:0:1::",
    ),
    "::/0": (":: ::1 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "0.0.0.0 ::ffff:10.0.0.1 example"),
    "::ffff:10.0.0.0/104": ("10.0.0.1 ::ffff:10.0.0.1", "11.0.0.1 ::a00:1"),
    "::ffff:0:0/96": ("0.0.0.0 255.255.255.255", ":: ::fffe:ffff:ffff ::1:0:0:0"),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_holds_these_addresses_and_not_those(network: str) -> None:
    """Hazard 81: a v4-mapped address is the IPv4 address it stands for."""
    yes, no = (set(hosts.split()) for hosts in NETWORKS[network])
    networks = NetworkSet([network])
    assert {host for host in yes | no if host in networks} == yes


def test_networks_side_by_side_or_within_each_other_are_one() -> None:
    networks = NetworkSet(
        [
            "10.0.2.0/24",
            "10.0.0.0/23",
            "10.0.0.8/29",
            "10.0.0.0/23",
            "10.0.4.0/24",
            "fd00::/16",
            "fd01::/16",
            "fd00:1::/32",
        ]
    )
    asked = (
        "9.255.255.255 10.0.0.0 10.0.0.9 10.0.0.16 10.0.1.255 10.0.2.0 10.0.2.255 10.0.3.0 10.0.3.255 10.0.4.0 10.0.5.0 "
        "fcff:: fd00::1 fd00:2:: fd01:ffff:: fd02::"
    )
    assert [host for host in asked.split() if host not in networks] == [
        "9.255.255.255",
        "10.0.3.0",
        "10.0.3.255",
        "10.0.5.0",
        "fcff::",
        "fd02::",
    ]


def test_parsed_networks_do_as_well_as_text() -> None:
    assert "10.0.0.1" in NetworkSet([IpNetwork.parse("10.0.0.0/8")])
    assert "10.0.0.1" not in NetworkSet([IpNetwork.parse("11.0.0.0/8")])


BAD_NETWORKS = {
    "10.0.0.1/8": "'10.0.0.1/8' has bits set behind its prefix: the network is 10.0.0.0/8",
    "fd00::1/64": "'fd00::1/64' has bits set behind its prefix: the network is fd00::/64",
    "::ffff:10.0.0.1/104": "'::ffff:10.0.0.1/104' has bits set behind its prefix: the network is ::ffff:10.0.0.0/104",
    "10.0.0.0/33": "'10.0.0.0/33' is no network: its prefix is longer than 32 bits",
    "::/129": "'::/129' is no network: its prefix is longer than 128 bits",
} | {
    text: f"'{seen}' is no network: write it as 10.0.0.0/8, fd00::/8 or a single address"
    for text, seen in {
        "": "",
        "example": "example",
        "10.0.0.0/": "10.0.0.0/",
        "10.0.0.0/-1": "10.0.0.0/-1",
        "10.0.0.0/ 8": "10.0.0.0/ 8",
        "10.0.0.0/²": "10.0.0.0/²",
        "10.0.0/24": "10.0.0/24",
        "010.0.0.0/8": "010.0.0.0/8",
        "10.0.0.0/8/8": "10.0.0.0/8/8",
        "10.0.0.0/255.0.0.0": "10.0.0.0/255.0.0.0",
        "10.0.0.1/0008": "10.0.0.1/0008",
        "[::1]": "[::1]",
        "fe80::1%eth0": "fe80::1%eth0",
        "::1\0": "::1\\x00",
        "1" * 99: "1" * 57 + "...",
    }.items()
}


@pytest.mark.parametrize("network", BAD_NETWORKS)
def test_a_bad_network_is_one_clear_line(network: str) -> None:
    """Hazard 79."""
    with pytest.raises(ValueError) as caught:
        NetworkSet(["10.0.0.0/8", network])
    assert str(caught.value) == BAD_NETWORKS[network]


@pytest.mark.parametrize(
    ("ports", "inside", "outside"),
    [
        (["443"], [443], [442, 444, 0, 65535]),
        (["8000-8100"], [8000, 8050, 8100], [7999, 8101]),
        (
            ["443", "80", "8000-8100", "8101", "8050-8200"],
            [80, 443, 8000, 8101, 8200],
            [81, 442, 444, 7999, 8201],
        ),
        (["0-1023"], [0, 1023], [1024]),
        (["65535"], [65535], [65534]),
        (["0-65535"], [0, 1, 65535], []),
        (["7-7"], [7], [6, 8]),
    ],
)
def test_ports(ports: list[str], inside: list[int], outside: list[int]) -> None:
    found = PortSet(ports)
    assert [port for port in inside + outside if port in found] == inside


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        "80-",
        "-80",
        "http",
        "65536",
        "80-65536",
        "1-2-3",
        "+80",
        "8_0",
        " 80",
        "²",
        "80 - 90",
        "0x50",
        "9" * 99,
        "9" * 5000,
    ],
)
def test_a_bad_port_is_one_clear_line(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        PortSet(["443", text])
    seen = text if len(text) <= SHOWN else text[:57] + "..."
    assert str(caught.value) == f"'{seen}' is no port: write it as 443 or 8000-8100, up to 65535"


def test_ports_the_wrong_way_round_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"^'8100-8000': the first port is above the last$"):
        PortSet(["8100-8000"])


def test_domains_agree_with_the_naive_way() -> None:
    pytest.importorskip("hypothesis")
    from hypothesis import given, settings, strategies as st

    names = st.lists(st.sampled_from(["a", "b", "ab", "ba", "xn--a"]), min_size=1, max_size=5).map(
        ".".join
    )
    patterns = st.one_of(
        names,
        names.map("*.{}".format),
        names.map(".{}".format),
        names.map("keyword:{}".format),
        st.sampled_from(["regex:^ab", "regex:ab$", r"regex:^b\.a\.", "regex:A.B.A"]),
    )

    def matches(pattern: str, host: str) -> bool:
        kind, text = parse_domain(pattern)
        if kind in (KEYWORD, REGEX):
            return text in host if kind == KEYWORD else bool(re.search(text.lower(), host))
        name = pattern.lstrip("*.")
        return (
            host == name
            and not pattern.startswith("*")
            or host.endswith("." + name)
            and pattern != name
        )

    @settings(max_examples=300, deadline=None)
    @given(st.lists(patterns, max_size=8), st.lists(names, max_size=8))
    def check(given_patterns: list[str], hosts: list[str]) -> None:
        domains = DomainSet(given_patterns)
        for host in hosts:
            assert (host in domains) == any(matches(pattern, host) for pattern in given_patterns)

    check()


def test_networks_agree_with_the_naive_way() -> None:
    pytest.importorskip("hypothesis")
    from hypothesis import given, settings, strategies as st

    def network(size: int, value: int, shift: int) -> IpNetwork:
        return IpNetwork(size, value >> shift, shift)

    def number(raw: bytes) -> int:
        return int.from_bytes(raw, "big")

    def edges(one: IpNetwork) -> list[str]:
        """The first address and the last, and their neighbours outside."""
        first, behind, limit = (
            one.prefix << one.shift,
            (one.prefix + 1) << one.shift,
            1 << one.size * 8,
        )
        return [
            ip_text(value.to_bytes(one.size, "big"))
            for value in (first - 1, first, behind - 1, behind)
            if 0 <= value < limit
        ]

    # few different bytes, so that networks touch and hold each other
    few = st.sampled_from([0, 1, 127, 128, 254, 255])
    four, sixteen = (st.lists(few, min_size=size, max_size=size).map(bytes) for size in (4, 16))
    hosts = st.one_of(four, sixteen).map(ip_text)
    networks = st.one_of(
        st.builds(network, st.just(4), four.map(number), st.integers(0, 32)),
        st.builds(network, st.just(16), sixteen.map(number), st.integers(0, 128)),
    )

    @settings(max_examples=300, deadline=None)
    @given(st.lists(networks, max_size=12), st.lists(hosts, max_size=12))
    def check(given_networks: list[IpNetwork], asked: list[str]) -> None:
        found = NetworkSet(given_networks)
        for host in asked + [edge for one in given_networks for edge in edges(one)]:
            assert (host in found) == any(one.holds(host) for one in given_networks)

    check()
