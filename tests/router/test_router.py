"""Which way out a flow takes, as a table: rules as they are written, flows as people say them, what is decided.

Unless a row's rules say otherwise everything leaves by `far`, which looks no name up here, so that
the last column is the rules' own doing: the names that were asked for.  Ways out:

    far, office   names go to the proxy as they are (socks5h)
    branch        names are looked up here (socks5), as for direct
    guests        a listener with a way out of its own, `parents`; the other listener is main
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Dialer, Route
from netproxy.protocol import connect_udp, http1, socks4, socks5
from netproxy.router.router import RuleRouter
from tests.support.readers import BytesReader
from tests.support.routing import StubResolver, flow, routing

pytest.importorskip("yaml")

BASE = """
listeners: [{name: main, listen: "127.0.0.1:1080"}, {name: guests, listen: "127.0.0.1:1081", upstream: parents}]
upstreams: {far: socks5h://192.0.2.1:1, office: socks5h://192.0.2.2:1, branch: socks5://192.0.2.3:1, parents: socks5h://192.0.2.4:1}
default: far
geoip_database: /nowhere/countries.mmdb
"""
NAMES: dict[str, Sequence[str] | None] = {
    "public.example": ["203.0.113.10"],
    "intranet.example": ["10.0.0.5"],
    "both.example": ["203.0.113.12", "10.0.0.7"],
    "v6.example": ["2001:db8::5"],
    "silent.example": None,
    "ads.example": ["203.0.113.13"],
}
COUNTRIES = {
    "203.0.113.10": {"country": {"iso_code": "CN"}},
    "10.0.0.5": {"registered_country": {"iso_code": "DE"}},
    "203.0.113.12": {"country": "FR"},
    "2001:db8::5": {"continent": {"code": "EU"}},
}


class Row(NamedTuple):
    flow: str
    way: str  # or why there is none
    asked: tuple[str, ...] = ()  # names that were looked up


ASKED_PUBLIC, ASKED_INTRANET, ASKED_BOTH = (
    ("public.example",),
    ("intranet.example",),
    ("both.example",),
)

TABLE: list[tuple[str, str, list[Row]]] = [
    (
        "no rules: the listener's own way out, else the default",
        "[]",
        [
            Row("tcp 192.168.1.5 -> public.example:443 on main", "far"),
            Row("tcp 192.168.1.5 -> public.example:443 on guests", "parents"),
            Row("udp 192.168.1.5 -> 198.51.100.1:53 on guests", "parents"),
        ],
    ),
    (
        "a rule without conditions takes all, the listener's own way out with it",
        "[{via: office}]",
        [
            Row("tcp 192.168.1.5 -> public.example:443 on main", "office"),
            Row("tcp 192.168.1.5 -> public.example:443 on guests", "office"),
        ],
    ),
    (
        "the first match wins",
        "[{domain: .example, via: office}, {domain: public.example, via: block}, {port: 443, via: block}]",
        [
            Row("tcp 192.168.1.5 -> public.example:443 on main", "office"),
            Row("tcp 192.168.1.5 -> public.test:443 on main", "block"),
            Row("tcp 192.168.1.5 -> public.test:80 on guests", "parents"),
        ],
    ),
    (
        "domains: a name, names below it, both, a word, an expression (hazard 76)",
        r"""[{domain: [trusted.net, "*.below.test", .suffix.test, "keyword:track", 'regex:^cdn\d+\.', BÜCHER.example], via: office}]""",
        [
            Row("tcp 192.168.1.5 -> trusted.net:80 on main", "office"),
            Row("tcp 192.168.1.5 -> TRUSTED.net.:80 on main", "office"),
            Row("tcp 192.168.1.5 -> www.trusted.net:80 on main", "far"),
            Row("tcp 192.168.1.5 -> untrusted.net:80 on main", "far"),
            Row("tcp 192.168.1.5 -> a.below.test:80 on main", "office"),
            Row("tcp 192.168.1.5 -> below.test:80 on main", "far"),
            Row("tcp 192.168.1.5 -> suffix.test:80 on main", "office"),
            Row("tcp 192.168.1.5 -> a.b.suffix.test:80 on main", "office"),
            Row("tcp 192.168.1.5 -> nosuffix.test:80 on main", "far"),
            Row("tcp 192.168.1.5 -> pixel.tracker.test:80 on main", "office"),
            Row("tcp 192.168.1.5 -> cdn12.example.test:80 on main", "office"),
            Row("tcp 192.168.1.5 -> xn--bcher-kva.example:80 on main", "office"),
            Row("tcp 192.168.1.5 -> 10.0.0.1:80 on main", "far"),
        ],
    ),
    (
        "networks: a literal address needs no lookup, a name one",
        "[{ip: [10.0.0.0/8, '2001:db8::/32'], via: branch}]",
        [
            Row("tcp 192.168.1.5 -> 10.1.2.3:80 on main", "branch"),
            Row("tcp 192.168.1.5 -> [2001:db8::1]:80 on main", "branch"),
            Row("tcp 192.168.1.5 -> 11.1.2.3:80 on main", "far"),
            Row("tcp 192.168.1.5 -> intranet.example:80 on main", "branch", ASKED_INTRANET),
            Row("tcp 192.168.1.5 -> v6.example:80 on main", "branch", ("v6.example",)),
            Row("tcp 192.168.1.5 -> public.example:80 on main", "far", ASKED_PUBLIC),
            Row("udp 192.168.1.5 -> intranet.example:80 on main", "branch", ASKED_INTRANET),
        ],
    ),
    (
        "any address of a name is enough",
        "[{ip: 10.0.0.0/8, via: branch}]",
        [Row("tcp 192.168.1.5 -> both.example:80 on main", "branch", ASKED_BOTH)],
    ),
    (
        "literal forms are the addresses they mean (hazard 11)",
        "[{ip: [127.0.0.0/8, '::1'], via: office}, {domain: 'keyword:1', via: block}]",
        [
            Row("tcp 192.168.1.5 -> 127.1:80 on main", "office"),
            Row("tcp 192.168.1.5 -> 0x7f.1:80 on main", "office"),
            Row("tcp 192.168.1.5 -> 2130706433:80 on main", "office"),
            Row("tcp 192.168.1.5 -> 0177.0.0.1:80 on main", "office"),
            Row("tcp 192.168.1.5 -> [::ffff:127.0.0.1]:80 on main", "office"),
            Row("tcp 192.168.1.5 -> [0:0::0:1]:80 on main", "office"),
        ],
    ),
    (
        "several rules with networks: a name is looked up once",
        "[{ip: 172.16.0.0/12, via: block}, {ip: 192.168.0.0/16, via: branch}, {ip: 10.0.0.0/8, via: direct}]",
        [
            Row("tcp 192.168.1.5 -> intranet.example:80 on main", "direct", ASKED_INTRANET),
            Row("tcp 192.168.1.5 -> public.example:80 on main", "far", ASKED_PUBLIC),
        ],
    ),
    (
        "a way out that takes names has none looked up for it, and then no name is in its networks",
        "[{ip: 10.0.0.0/8, via: office}]",
        [
            Row("tcp 192.168.1.5 -> 10.1.2.3:80 on main", "office"),
            Row("tcp 192.168.1.5 -> intranet.example:80 on main", "far"),
        ],
    ),
    (
        "unless another rule had it looked up before",
        "[{ip: 172.16.0.0/12, via: direct}, {ip: 10.0.0.0/8, via: office}]",
        [Row("tcp 192.168.1.5 -> intranet.example:80 on main", "office", ASKED_INTRANET)],
    ),
    (
        "what is blocked by its address is found by its name too",
        "[{ip: 10.0.0.0/8, via: block}]",
        [
            Row("tcp 192.168.1.5 -> intranet.example:80 on main", "block", ASKED_INTRANET),
            Row("udp 192.168.1.5 -> both.example:80 on main", "block", ASKED_BOTH),
            Row("tcp 192.168.1.5 -> public.example:80 on main", "far", ASKED_PUBLIC),
        ],
    ),
    (
        "and what auto takes by its address",
        "[{ip: 10.0.0.0/8, via: auto, upstream: office}]",
        [
            Row("tcp 192.168.1.5 -> intranet.example:80 on main", "auto", ASKED_INTRANET),
            Row("tcp 192.168.1.5 -> public.example:80 on main", "far", ASKED_PUBLIC),
        ],
    ),
    (
        "what is blocked by its name is not looked up",
        "[{domain: .ads.example, via: block}, {ip: 10.0.0.0/8, via: branch}]",
        [
            Row("tcp 192.168.1.5 -> ads.example:80 on main", "block"),
            Row("udp 192.168.1.5 -> www.ads.example:80 on main", "block"),
        ],
    ),
    (
        "a name that is not found is in no network, and is asked for once",
        "[{ip: 0.0.0.0/0, via: direct}, {ip: '::/0', via: branch}]",
        [
            Row("tcp 192.168.1.5 -> nowhere.example:80 on main", "far", ("nowhere.example",)),
            Row("tcp 192.168.1.5 -> silent.example:80 on main", "far", ("silent.example",)),
        ],
    ),
    (
        "and then a way out that needs its address has none",
        "[{ip: 10.0.0.0/8, via: branch}, {via: direct}]",
        [
            Row(
                "tcp 192.168.1.5 -> nowhere.example:80 on main",
                Reason.NAME.value,
                ("nowhere.example",),
            ),
            Row(
                "tcp 192.168.1.5 -> silent.example:80 on main",
                Reason.TIMEOUT.value,
                ("silent.example",),
            ),
            Row(
                "udp 192.168.1.5 -> nowhere.example:80 on main",
                Reason.NAME.value,
                ("nowhere.example",),
            ),
        ],
    ),
    (
        "cheap conditions come first: what another condition rules out is not looked up",
        "[{ip: 10.0.0.0/8, port: 22, via: direct}, {ip: 10.0.0.0/8, network: udp, via: direct}]",
        [
            Row("tcp 192.168.1.5 -> intranet.example:80 on main", "far"),
            Row("tcp 192.168.1.5 -> intranet.example:22 on main", "direct", ASKED_INTRANET),
        ],
    ),
    (
        "ports and ranges, both ends included",
        "[{port: [443, 8000-8100], via: office}]",
        [
            Row("tcp 192.168.1.5 -> public.example:443 on main", "office"),
            Row("tcp 192.168.1.5 -> public.example:8000 on main", "office"),
            Row("tcp 192.168.1.5 -> public.example:8100 on main", "office"),
            Row("tcp 192.168.1.5 -> public.example:8101 on main", "far"),
            Row("tcp 192.168.1.5 -> public.example:444 on main", "far"),
        ],
    ),
    (
        "the network",
        "[{network: udp, via: office}, {network: [tcp, udp], via: branch}]",
        [
            Row("udp 192.168.1.5 -> 198.51.100.1:53 on main", "office"),
            Row("tcp 192.168.1.5 -> 198.51.100.1:53 on main", "branch"),
        ],
    ),
    (
        "the client, whichever socket it came by (hazard 81: its address is unwrapped)",
        "[{client: [192.168.1.0/24, 'fd00::/8'], via: office}]",
        [
            Row("tcp 192.168.1.77 -> public.example:443 on main", "office"),
            Row("tcp fd00::5 -> public.example:443 on main", "office"),
            Row("tcp fe80::5%2 -> public.example:443 on main", "far"),
            Row("tcp 192.168.2.1 -> public.example:443 on main", "far"),
        ],
    ),
    (
        "the user; nobody is none",
        "[{user: [alice, bob], via: office}]",
        [
            Row("tcp alice@192.168.1.5 -> public.example:443 on main", "office"),
            Row("udp bob@192.168.1.5 -> public.example:443 on main", "office"),
            Row("tcp eve@192.168.1.5 -> public.example:443 on main", "far"),
            Row("tcp 192.168.1.5 -> public.example:443 on main", "far"),
        ],
    ),
    (
        "the listener",
        "[{listener: guests, via: office}]",
        [
            Row("tcp 192.168.1.5 -> public.example:443 on guests", "office"),
            Row("tcp 192.168.1.5 -> public.example:443 on main", "far"),
        ],
    ),
    (
        "the country of any address",
        "[{geoip: [CN, de], via: direct}, {geoip: fr, via: branch}]",
        [
            Row("tcp 192.168.1.5 -> 203.0.113.10:80 on main", "direct"),
            Row("tcp 192.168.1.5 -> intranet.example:80 on main", "direct", ASKED_INTRANET),
            Row("tcp 192.168.1.5 -> both.example:80 on main", "branch", ASKED_BOTH),
            Row("tcp 192.168.1.5 -> v6.example:80 on main", "far", ("v6.example",)),
            Row("tcp 192.168.1.5 -> 198.51.100.1:80 on main", "far"),
        ],
    ),
    (
        "a country or a network: either is enough",
        "[{geoip: CN, ip: 10.0.0.0/8, via: direct}]",
        [
            Row("tcp 192.168.1.5 -> 203.0.113.10:80 on main", "direct"),
            Row("tcp 192.168.1.5 -> 10.9.9.9:80 on main", "direct"),
        ],
    ),
    (
        "all conditions of a rule must hold",
        "[{domain: .example, port: 443, user: alice, client: 192.168.0.0/16, network: tcp, listener: main, via: office}]",
        [
            Row("tcp alice@192.168.1.5 -> public.example:443 on main", "office"),
            Row("tcp alice@192.168.1.5 -> public.example:80 on main", "far"),
            Row("tcp alice@172.16.1.5 -> public.example:443 on main", "far"),
            Row("udp alice@192.168.1.5 -> public.example:443 on main", "far"),
            Row("tcp alice@192.168.1.5 -> public.test:443 on main", "far"),
            Row("tcp bob@192.168.1.5 -> public.example:443 on main", "far"),
            Row("tcp alice@192.168.1.5 -> public.example:443 on guests", "parents"),
        ],
    ),
    (
        "files of names and of networks (their lines)",
        "[{domain_file: FILES/names.txt, via: office}, {ip_file: [FILES/networks.txt], via: branch}]",
        [
            Row("tcp 192.168.1.5 -> listed.test:80 on main", "office"),
            Row("tcp 192.168.1.5 -> www.below.test:80 on main", "office"),
            Row("tcp 192.168.1.5 -> hosts.test:80 on main", "office"),
            Row("tcp 192.168.1.5 -> www.dnsmasq.test:80 on main", "office"),
            Row("tcp 192.168.1.5 -> 10.20.30.40:80 on main", "branch"),
            Row("tcp 192.168.1.5 -> intranet.example:80 on main", "branch", ASKED_INTRANET),
            Row("tcp 192.168.1.5 -> 11.20.30.40:80 on main", "far"),
        ],
    ),
    (
        "a file and a list of one kind: either is enough",
        "[{domain_file: FILES/names.txt, domain: more.test, via: office}]",
        [
            Row("tcp 192.168.1.5 -> listed.test:80 on main", "office"),
            Row("tcp 192.168.1.5 -> more.test:80 on main", "office"),
        ],
    ),
    (
        "not: none of these may hold",
        "[{domain: .example, not: {domain: ads.example, port: [25, 465]}, via: office}]",
        [
            Row("tcp 192.168.1.5 -> public.example:80 on main", "office"),
            Row("tcp 192.168.1.5 -> ads.example:80 on main", "far"),
            Row("tcp 192.168.1.5 -> public.example:25 on main", "far"),
        ],
    ),
    (
        "not a client, not a user",
        "[{not: {client: 192.168.1.0/24, user: alice}, via: block}]",
        [
            Row("tcp bob@10.0.0.9 -> public.example:80 on main", "block"),
            Row("tcp alice@10.0.0.9 -> public.example:80 on main", "far"),
            Row("tcp bob@192.168.1.9 -> public.example:80 on main", "far"),
        ],
    ),
    (
        "not a network: none of its addresses",
        "[{not: {ip: 10.0.0.0/8}, via: branch}]",
        [
            Row("tcp 192.168.1.5 -> public.example:80 on main", "branch", ASKED_PUBLIC),
            Row("tcp 192.168.1.5 -> both.example:80 on main", "far", ASKED_BOTH),
            Row("tcp 192.168.1.5 -> 10.0.0.1:80 on main", "far"),
        ],
    ),
    (
        "not a network, for a way out that takes names: a name is in none",
        "[{not: {ip: 10.0.0.0/8}, via: office}]",
        [
            Row("tcp 192.168.1.5 -> intranet.example:80 on main", "office"),
            Row("tcp 192.168.1.5 -> 10.0.0.1:80 on main", "far"),
        ],
    ),
    (
        "everything but a country",
        "[{not: {geoip: CN}, via: branch}, {via: direct}]",
        [
            Row("tcp 192.168.1.5 -> 203.0.113.10:80 on main", "direct"),
            Row("tcp 192.168.1.5 -> 198.51.100.1:80 on main", "branch"),
        ],
    ),
    (
        "a way out of its own, written in the rule",
        "[{port: 22, via: 'socks5h://192.0.2.9:1080'}, {port: 23, via: [office, branch]}]",
        [
            Row("tcp 192.168.1.5 -> public.example:22 on main", "socks5h://192.0.2.9:1080"),
            Row(
                "tcp 192.168.1.5 -> 198.51.100.1:23 on main",
                "socks5h://192.0.2.2:1 -> socks5://192.0.2.3:1",
            ),
        ],
    ),
]
ROWS = [
    pytest.param(rules, row, id=f"{title}: {row.flow}")
    for title, rules, rows in TABLE
    for row in rows
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "names.txt").write_text(
        "# a comment\nlisted.test\n*.below.test\n0.0.0.0 hosts.test\nserver=/dnsmasq.test/192.0.2.53\n"
    )
    (tmp_path / "networks.txt").write_text("10.0.0.0/8\n2001:db8:1::/48   # ours\n")
    return tmp_path


@pytest.fixture(autouse=True)
def countries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the place of the optional package."""
    module: Any = types.ModuleType("maxminddb")
    module.InvalidDatabaseError = RuntimeError
    module.open_database = lambda path: COUNTRIES
    monkeypatch.setitem(sys.modules, "maxminddb", module)
    yield


def router(rules: str, names: StubResolver) -> RuleRouter:
    return routing(f"{BASE}rules: {rules}\n", names).router


def decide(rules: str, text: str, names: StubResolver) -> str:
    try:
        return router(rules, names).route(flow(text)).dialer.name
    except DialError as error:
        return error.reason.value


def test_the_table_has_rows() -> None:
    assert len(ROWS) >= 90


@pytest.mark.parametrize("rules, row", ROWS)
def test_table(rules: str, row: Row, files: Path) -> None:
    names = StubResolver(NAMES)
    way = decide(rules.replace("FILES", str(files)), row.flow, names)
    assert (way, tuple(names.lookups)) == (row.way, row.asked)


class TestWhatIsDialled:
    """Hazard 75: the addresses that were looked up go with the decision."""

    def test_the_addresses_that_the_rules_saw(self) -> None:
        names = StubResolver(NAMES)
        route = router("[{ip: 10.0.0.0/8, via: direct}]", names).route(
            flow("tcp 192.168.1.5 -> both.example:80 on main")
        )
        assert route.flow.addresses == (Address("203.0.113.12", 80), Address("10.0.0.7", 80))
        assert route.flow.target == Address("both.example", 80) and names.lookups == ["both.example"]

    def test_a_way_out_that_looks_up_itself_gets_none(self) -> None:
        names = StubResolver(NAMES)
        assert (
            router("[]", names)
            .route(flow("tcp 192.168.1.5 -> both.example:80 on main"))
            .flow.addresses
            == ()
        )
        assert names.lookups == []

    @pytest.mark.parametrize("via", ["direct", "branch"])
    def test_a_way_out_that_needs_them_has_them_looked_up_once(self, via: str) -> None:
        names = StubResolver(NAMES)
        route = router(f"[{{via: {via}}}]", names).route(
            flow("tcp 192.168.1.5 -> public.example:80 on main")
        )
        assert route.flow.addresses == (Address("203.0.113.10", 80),) and names.lookups == [
            "public.example"
        ]

    def test_a_literal_is_its_own_address_whatever_the_way_out(self) -> None:
        for via in ("direct", "branch", "office"):
            route = router(f"[{{via: {via}}}]", StubResolver({})).route(
                flow("tcp 192.168.1.5 -> 0x7f.1:80 on main")
            )
            assert route.flow.addresses == (Address("127.0.0.1", 80),)


class TestAtOnce:
    """For the thread that reads datagrams and may not wait."""

    FLOW = "udp 192.168.1.5 -> intranet.example:80 on main"

    @pytest.mark.parametrize(
        "rules",
        [
            "[{via: direct}]",
            "[{ip: 10.0.0.0/8, via: branch}]",
            "[{ip: 10.0.0.0/8, via: block}]",
            "[{via: auto, upstream: office}]",
        ],
    )
    def test_a_name_that_nobody_has_asked_for_lately_is_none(self, rules: str) -> None:
        names = StubResolver(NAMES)
        one = router(rules, names)
        assert one.route_without_blocking(flow(self.FLOW)) is None and names.lookups == []
        names.cached.add("intranet.example")
        assert one.route_without_blocking(flow(self.FLOW)) == one.route(flow(self.FLOW))

    @pytest.mark.parametrize(
        "rules",
        [
            "[]",
            "[{domain: .example, via: office}]",
            "[{domain: .example, via: block}]",
            "[{ip: 10.0.0.0/8, port: 81, via: direct}]",
        ],
    )
    def test_what_needs_no_lookup_is_decided(self, rules: str) -> None:
        names = StubResolver({})
        one = router(rules, names)
        route = one.route_without_blocking(flow(self.FLOW))
        assert (
            isinstance(route, Route) and route == one.route(flow(self.FLOW)) and names.lookups == []
        )

    def test_a_literal_address_is_decided(self) -> None:
        route = router("[{ip: 10.0.0.0/8, via: direct}]", StubResolver({})).route_without_blocking(
            flow("udp 192.168.1.5 -> 10.0.0.1:80 on main")
        )
        assert (
            route is not None
            and route.dialer.name == "direct"
            and route.flow.addresses == (Address("10.0.0.1", 80),)
        )

    def test_a_name_that_lately_was_none_is_in_no_network(self) -> None:
        names = StubResolver({})
        names.cached.add("intranet.example")
        one = router("[{ip: 10.0.0.0/8, via: direct}]", names)
        assert one.route_without_blocking(flow(self.FLOW)) is not None
        with pytest.raises(DialError) as caught:
            router("[{via: direct}]", names).route_without_blocking(flow(self.FLOW))
        assert caught.value.reason is Reason.NAME


class TestWays:
    """What a flow may take wherever it goes: whether an ASSOCIATE is worth while, and the way of a BIND for anybody."""

    @staticmethod
    def ways(rules: str, text: str) -> list[str]:
        return [dialer.name for dialer in router(rules, StubResolver({})).candidates(flow(text))]

    @pytest.mark.parametrize(
        "rules, text, expected",
        [
            ("[]", "udp 192.168.1.5 -> 0.0.0.0:0 on main", ["far"]),
            ("[]", "udp 192.168.1.5 -> 0.0.0.0:0 on guests", ["parents"]),
            (
                "[{domain: a.test, via: office}, {port: 53, via: branch}]",
                "udp 192.168.1.5 -> 0.0.0.0:0 on main",
                ["office", "branch", "far"],
            ),
            (
                "[{ip: 10.0.0.0/8, via: office}]",
                "udp 192.168.1.5 -> 0.0.0.0:0 on main",
                ["office", "far"],
            ),
            (
                "[{network: udp, via: office}, {domain: a.test, via: branch}]",
                "udp 192.168.1.5 -> 0.0.0.0:0 on main",
                ["office"],
            ),
            (
                "[{network: udp, via: office}, {domain: a.test, via: branch}]",
                "tcp 192.168.1.5 -> 0.0.0.0:0 on main",
                ["branch", "far"],
            ),
            (
                "[{network: tcp, domain: a.test, via: office}]",
                "udp 192.168.1.5 -> 0.0.0.0:0 on main",
                ["far"],
            ),
            (
                "[{user: alice, ip: 10.0.0.0/8, via: office}]",
                "udp bob@192.168.1.5 -> 0.0.0.0:0 on main",
                ["far"],
            ),
            (
                "[{not: {client: 192.168.0.0/16, port: 1}, via: office}]",
                "udp 192.168.1.5 -> 0.0.0.0:0 on main",
                ["far"],
            ),
            (
                "[{not: {domain: a.test}, via: office}]",
                "udp 192.168.1.5 -> 0.0.0.0:0 on main",
                ["office", "far"],
            ),
        ],
    )
    def test_rules_about_the_target_may_match_and_others_do_or_do_not(
        self, rules: str, text: str, expected: list[str]
    ) -> None:
        assert self.ways(rules, text) == expected


class TestExplain:
    def test_names_the_rule_in_the_files_words(self) -> None:
        text, route = router(
            "[{domain: a.test, via: block}, {ip: [10.0.0.0/8, 'fd00::/8'], not: {port: 22}, via: direct}]",
            StubResolver(NAMES),
        ).explain(flow("udp alice@192.168.1.5 -> intranet.example:443 on main"))
        assert text == "rules[1] (ip: [10.0.0.0/8, fd00::/8], not: {port: 22})"
        assert (
            isinstance(route, Route)
            and route.dialer.name == "direct"
            and route.flow.addresses == (Address("10.0.0.5", 443),)
        )

    def test_a_long_list_is_cut(self) -> None:
        text, _ = router("[{port: [1, 2, 3, 4, 5, 6, 7], via: direct}]", StubResolver({})).explain(
            flow("tcp 10.0.0.1 -> 10.0.0.2:7 on main")
        )
        assert text == "rules[0] (port: [1, 2, 3, 4, 5, ...])"

    def test_no_rule_is_no_words(self) -> None:
        text, route = router("[{port: 1, via: block}]", StubResolver({})).explain(
            flow("tcp 192.168.1.5 -> a.test:2 on guests")
        )
        assert text == "" and isinstance(route, Route) and route.dialer.name == "parents"

    def test_what_may_not_be_reached_says_so(self) -> None:
        text, error = routing(
            BASE + "rules: [{via: direct}]\ndestinations: {deny: [private]}", StubResolver(NAMES)
        ).router.explain(flow("tcp 192.168.1.5 -> intranet.example:443 on main"))
        assert (
            text == "rules[0] (everything)"
            and isinstance(error, DialError)
            and error.reason is Reason.DENIED
        )

    def test_a_name_that_is_not_found_says_so(self) -> None:
        _, error = router("[{via: direct}]", StubResolver({})).explain(
            flow("tcp 192.168.1.5 -> a.test:443 on main")
        )
        assert isinstance(error, DialError) and str(error) == "a.test: name not resolved"


def by_socks5(host: bytes, port: int) -> Address:
    return socks5.read_request(
        BytesReader(b"\5\1\0\3%c%b%b" % (len(host), host, port.to_bytes(2, "big")))
    ).target


def by_socks5_udp(host: bytes, port: int) -> Address:
    return socks5.parse_target(b"\3%c%b%b" % (len(host), host, port.to_bytes(2, "big")))


def by_socks4a(host: bytes, port: int) -> Address:
    return socks4.read_request(
        BytesReader(b"\4\1%b\0\0\0\1me\0%b\0" % (port.to_bytes(2, "big"), host))
    ).target


def by_connect(host: bytes, port: int) -> Address:
    host = b"[%b]" % host if b":" in host else host
    return http1.parse_authority(b"%b:%d" % (host, port))


def by_forward(host: bytes, port: int) -> Address:
    host = b"[%b]" % host if b":" in host else host
    return http1.parse_origin(
        http1.read_request(
            BytesReader(b"GET http://%b:%d/ HTTP/1.1\r\nHost: a\r\n\r\n" % (host, port))
        )
    ).address


def by_connect_udp(host: bytes, port: int) -> Address:
    return connect_udp.parse_target(
        http1.read_request(
            BytesReader(
                b"GET /.well-known/masque/udp/%b/%d/ HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: connect-udp\r\n\r\n"
                % (host.replace(b":", b"%3A"), port)
            )
        )
    )


@pytest.mark.parametrize(
    "read", [by_socks5, by_socks5_udp, by_socks4a, by_connect, by_forward, by_connect_udp]
)
@pytest.mark.parametrize(
    "spelling",
    [
        b"127.1",
        b"0x7f.1",
        b"2130706433",
        b"0177.0.0.1",
        b"::ffff:127.0.0.1",
        b"::ffff:7f00:1",
        b"127.0.0.1.",
    ],
)
def test_hazard_11_every_protocol_has_one_spelling_for_an_address(
    read: Any, spelling: bytes
) -> None:
    target = read(spelling, 80)
    assert target == Address("127.0.0.1", 80)
    one = router("[{ip: 127.0.0.0/8, via: office}]", StubResolver({}))
    assert (
        one.route(Flow("tcp", Address("192.168.1.5", 5), target, "main", "")).dialer.name
        == "office"
    )


def test_a_flow_that_has_its_addresses_is_not_looked_up() -> None:
    names = StubResolver(NAMES)
    given = flow("tcp 192.168.1.5 -> intranet.example:80 on main")._replace(
        addresses=(Address("10.9.9.9", 80),)
    )
    route = router("[{ip: 10.9.0.0/16, via: direct}]", names).route(given)
    assert (
        route.dialer.name == "direct"
        and names.lookups == []
        and route.flow.addresses == given.addresses
    )


def test_one_way_out_is_one_dialer_whoever_names_it() -> None:
    """Sessions hang on it: those of two rules that name one way out share their port."""
    one = router(
        "[{port: 1, via: office}, {port: 2, via: office}, {port: 3, via: direct}, {port: 4, via: direct}]",
        StubResolver({}),
    )

    def way(port: int) -> Dialer:
        return one.route(flow(f"udp 192.168.1.5 -> 192.0.2.77:{port} on main")).dialer

    assert way(1) is way(2) and way(3) is way(4) and way(1) is not way(3)
