"""Which names and ports match which patterns.

The tables document how patterns are written in rules.
"""

from __future__ import annotations

import re
import tracemalloc

import pytest

from netproxy.protocol.host import parse_host
from netproxy.router.matchers import DomainSet, PortSet
from netproxy.router.patterns import KEYWORD, REGEX, parse_domain

LABEL = "a" * 63
# 253 characters, as many as a name may have, and 127 labels.
LONGEST = ".".join([LABEL, LABEL, LABEL, "b" * 61])
DEEPEST = ".".join("a" * 127)

# A pattern: names that it matches, and names that it does not.
DOMAINS = {
    # A single name.
    "ads.example": (
        "ads.example",
        "www.ads.example badads.example ads.example.org xads.example ads.exampl example ads",
    ),
    "Ads.EXAMPLE.": ("ads.example", "www.ads.example"),
    "localhost": ("localhost", "localhost.localdomain my.localhost"),
    "a_b-c.x1": ("a_b-c.x1", "a-b-c.x1"),
    "xn--bcher-kva.example": ("xn--bcher-kva.example", "bcher-kva.example"),
    # The names below it at any depth, not the name itself.
    "*.tracker.example": (
        "a.tracker.example a.b.tracker.example",
        "tracker.example nottracker.example a.tracker.example.org",
    ),
    "*.Tracker.Example.": ("a.tracker.example", "tracker.example"),
    "*.lan": ("printer.lan a.b.lan", "lan wlan printer.wlan"),
    # Both.  Hazard 76: never a name that merely ends in the same letters.
    ".trusted.net": (
        "trusted.net www.trusted.net a.b.trusted.net",
        "untrusted.net www.untrusted.net trusted.network net",
    ),
    ".COM.": ("com example.com a.b.com", "net example.net telecom com.net"),
    # Text anywhere in the name.
    "keyword:ads": (
        "ads ads.example example.ads loads.example x.badads.example",
        "ad.example a.ds",
    ),
    "keyword:ADS.": ("ads.example my.ads.example", "ads adserver.example"),
    # An expression that is searched for; names are in lower case.
    r"regex:^ad[0-9]+\.": ("ad1.example ad42.net", "ad.example bad1.example ad1 xad1.example"),
    r"regex:^AD[0-9]+\.": ("ad1.example", "ad.example"),
    r"regex:tracker": ("tracker mytrackers.example", "track.example"),
    r"regex:\.example$": ("a.example", "example a.example.org"),
    r"regex:^\S+(?<=ads)\.net\Z": ("loads.net", "loads.nets"),
    # Letters beyond ASCII, composed or not.  Sharp s and final sigma stay, as in the examples
    # of UTS 46.
    "BÜCHER.example": ("xn--bcher-kva.example", "bcher.example bucher.example"),
    "bu\u0308cher.example": ("xn--bcher-kva.example", ""),
    "*.日本。jp": ("www.xn--wgv71a.jp", "xn--wgv71a.jp"),
    ".ελλάδα。": ("xn--hxakic4aa www.xn--hxakic4aa", "xn--xn--hxakic4aa"),
    "Faß。example": ("xn--fa-hia.example", "fass.example"),
    "ΒΌΛΟς.example": ("xn--nxasmm1c.example", "xn--nxasmq6b.example"),
    "ΒΌΛΟΣ.example": ("xn--nxasmq6b.example", "xn--nxasmm1c.example"),
    # The longest name and the deepest one.
    LONGEST: (LONGEST, LONGEST[1:]),
    f"*.{LONGEST[64:]}": (LONGEST, LONGEST[64:]),
    "." + DEEPEST: (DEEPEST, DEEPEST[2:]),
    ".b.example": (DEEPEST[:200] + "b.example", DEEPEST),
}


@pytest.mark.parametrize("pattern", DOMAINS, ids=lambda pattern: ascii(pattern)[:40])
def test_pattern_matches_its_names_only(pattern: str) -> None:
    """Hazard 76."""
    matching, others = (set(names.split()) for names in DOMAINS[pattern])
    domains = DomainSet([pattern])
    assert {name for name in matching | others if name in domains} == matching


@pytest.mark.parametrize(
    ("host", "matches"),
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
def test_case_and_final_dot_of_a_requested_name_do_not_matter(host: bytes, matches: bool) -> None:
    """Hazard 76."""
    assert (parse_host(host) in DomainSet([".trusted.net"])) is matches


@pytest.mark.parametrize("address", ["10.0.0.1", "::1", "fe80::1%2", "fe80::ad", "::ffff:10.0.0.1"])
def test_address_matches_no_domain_pattern(address: str) -> None:
    patterns = ["keyword:1", "keyword:10.0", "keyword:ad", "regex:.", "regex:^", "regex:ad$"]
    assert address not in DomainSet(patterns)


def test_empty_set_has_no_members() -> None:
    assert "example" not in DomainSet([])
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
def test_patterns_of_one_name_are_combined(patterns: list[str]) -> None:
    domains = DomainSet(patterns)
    assert "a.example" in domains and "b.a.example" in domains and "example" not in domains


def test_deep_pattern_does_not_hide_a_shallow_one() -> None:
    domains = DomainSet(["d.c.b.a.example", "*.example", "keyword:zz", "regex:^q"])
    hosts = ("d.c.b.a.example", "c.b.a.example", "example", "zz", "q.x.y", "d.c.b.a.org")
    assert {host for host in hosts if host in domains} == {
        "d.c.b.a.example",
        "c.b.a.example",
        "zz",
        "q.x.y",
    }


def test_all_of_many_names_are_found_and_no_others() -> None:
    """There are enough names to share slots of the hash table."""
    names = [f"n{number}.example" for number in range(3000)]
    domains = DomainSet(names[::2])
    assert [name for name in names if name in domains] == names[::2]
    assert not [
        name
        for name in names
        if f"www.{name}" in domains or f"{name}.org" in domains or name[1:] in domains
    ]


def test_parsed_patterns_match_as_their_texts_do() -> None:
    texts = ["a.example", "*.b.example", ".c.example", "keyword:kk", "regex:^r"]
    names = ["a.example", "x.a.example", "b.example", "x.b.example", "c.example", "akk", "r", "ar"]
    assert (
        [name in DomainSet(texts) for name in names]
        == [name in DomainSet(map(parse_domain, texts)) for name in names]
        == [True, False, False, True, True, True, True, False]
    )


def test_set_of_names_takes_little_memory() -> None:
    """A str in a dict takes 120 bytes."""
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
def test_port_ranges_include_both_ends(
    ports: list[str], inside: list[int], outside: list[int]
) -> None:
    members = PortSet(ports)
    assert [port for port in inside + outside if port in members] == inside


def test_set_of_names_agrees_with_matching_each_pattern() -> None:
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
