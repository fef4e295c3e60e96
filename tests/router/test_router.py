"""Which upstream a flow takes: a table of rules, flows and decisions.

Unless the rules of a row say otherwise, everything leaves by `far`, which needs no lookup
here.  The last column, the names that were looked up, is then the rules' own doing.
Upstreams:

    far, office   names go to the proxy as they are (socks5h)
    branch        names are looked up here (socks5), as for direct
    parents       the upstream of the listener `guests`; the other listener is `main`
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Dialer, Route
from netproxy.net.stream import complete
from netproxy.protocol import http1, socks4, socks5
from netproxy.protocol.http import connect_udp
from netproxy.router.router import RuleRouter
from tests.support.readers import BytesReader
from tests.support.routing import StubResolver, flow, routing

pytest.importorskip("yaml")

BASE = """
listeners:
- {name: main, listen: "127.0.0.1:1080"}
- {name: guests, listen: "127.0.0.1:1081", upstream: parents}
upstreams:
  far: socks5h://192.0.2.1:1
  office: socks5h://192.0.2.2:1
  branch: socks5://192.0.2.3:1
  parents: socks5h://192.0.2.4:1
users: {alice: {password: x}, bob: {password: y}, carol: {password: z, upstream: branch}}
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
    """A flow and what is decided for it."""

    flow: str
    outcome: str
    """The upstream's name, or the reason of the DialError."""
    lookups: tuple[str, ...] = ()
    """The names that were looked up."""


ASKED_PUBLIC, ASKED_INTRANET = ("public.example",), ("intranet.example",)
ASKED_BOTH = ("both.example",)

TABLE: list[tuple[str, str, list[Row]]] = [
    (
        "no rules: the listener's own upstream, else the default",
        "[]",
        [
            Row("tcp 192.168.1.5 -> public.example:443 on main", "far"),
            Row("tcp 192.168.1.5 -> public.example:443 on guests", "parents"),
            Row("udp 192.168.1.5 -> 198.51.100.1:53 on guests", "parents"),
        ],
    ),
    (
        "a user's own upstream comes after the rules and before that of the listener",
        "[{port: 443, via: office}]",
        [
            Row("tcp carol@192.168.1.5 -> public.example:443 on main", "office"),
            Row("tcp carol@192.168.1.5 -> 203.0.113.10:80 on main", "branch"),
            Row("tcp carol@192.168.1.5 -> 203.0.113.10:80 on guests", "branch"),
            Row("udp carol@192.168.1.5 -> 203.0.113.10:53 on guests", "branch"),
            Row("tcp alice@192.168.1.5 -> public.example:80 on guests", "parents"),
            Row("tcp 192.168.1.5 -> public.example:80 on guests", "parents"),
        ],
    ),
    (
        "a rule without conditions takes all flows, of listeners with an upstream too",
        "[{via: office}]",
        [
            Row("tcp 192.168.1.5 -> public.example:443 on main", "office"),
            Row("tcp 192.168.1.5 -> public.example:443 on guests", "office"),
        ],
    ),
    (
        "the first match wins",
        "[{domain: .example, via: office}, {domain: public.example, via: block}, "
        "{port: 443, via: block}]",
        [
            Row("tcp 192.168.1.5 -> public.example:443 on main", "office"),
            Row("tcp 192.168.1.5 -> public.test:443 on main", "block"),
            Row("tcp 192.168.1.5 -> public.test:80 on guests", "parents"),
        ],
    ),
    (
        "domains: a name, names below it, both, a keyword, an expression (hazard 76)",
        r"[{domain: [trusted.net, '*.below.test', .suffix.test, 'keyword:track', "
        r"'regex:^cdn\d+\.', BÜCHER.example], via: office}]",
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
        "networks: a name is looked up, a literal address is not",
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
        "commands: what a client asks for, over TCP or as datagrams",
        "[{command: connect, not: {port: 443}, via: block}, {command: [bind, udp], via: office}, "
        "{command: http, via: branch}]",
        [
            Row("tcp 192.168.1.5 -> 10.0.0.1:80 on main", "block"),
            Row("tcp 192.168.1.5 -> 10.0.0.1:443 on main", "far"),
            Row("http 192.168.1.5 -> 10.0.0.1:80 on main", "branch"),
            Row("bind 192.168.1.5 -> 10.0.0.1:80 on main", "office"),
            Row("udp 192.168.1.5 -> 10.0.0.1:80 on main", "office"),
        ],
    ),
    (
        "the user * is everybody who has logged in",
        "[{user: '*', via: office}]",
        [
            Row("tcp alice@192.168.1.5 -> 10.0.0.1:80 on main", "office"),
            Row("tcp 192.168.1.5 -> 10.0.0.1:80 on main", "far"),
        ],
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
        "[{ip: 172.16.0.0/12, via: block}, {ip: 192.168.0.0/16, via: branch}, "
        "{ip: 10.0.0.0/8, via: direct}]",
        [
            Row("tcp 192.168.1.5 -> intranet.example:80 on main", "direct", ASKED_INTRANET),
            Row("tcp 192.168.1.5 -> public.example:80 on main", "far", ASKED_PUBLIC),
        ],
    ),
    (
        "no lookup for an upstream that resolves names: then no name is in the networks",
        "[{ip: 10.0.0.0/8, via: office}]",
        [
            Row("tcp 192.168.1.5 -> 10.1.2.3:80 on main", "office"),
            Row("tcp 192.168.1.5 -> intranet.example:80 on main", "far"),
        ],
    ),
    (
        "addresses that were looked up for an earlier rule count for every rule",
        "[{ip: 172.16.0.0/12, via: direct}, {ip: 10.0.0.0/8, via: office}]",
        [Row("tcp 192.168.1.5 -> intranet.example:80 on main", "office", ASKED_INTRANET)],
    ),
    (
        "a block by address needs the lookup of a name",
        "[{ip: 10.0.0.0/8, via: block}]",
        [
            Row("tcp 192.168.1.5 -> intranet.example:80 on main", "block", ASKED_INTRANET),
            Row("udp 192.168.1.5 -> both.example:80 on main", "block", ASKED_BOTH),
            Row("tcp 192.168.1.5 -> public.example:80 on main", "far", ASKED_PUBLIC),
        ],
    ),
    (
        "auto by address needs the lookup of a name",
        "[{ip: 10.0.0.0/8, via: auto, upstream: office}]",
        [
            Row("tcp 192.168.1.5 -> intranet.example:80 on main", "auto", ASKED_INTRANET),
            Row("tcp 192.168.1.5 -> public.example:80 on main", "far", ASKED_PUBLIC),
        ],
    ),
    (
        "a block by name needs no lookup",
        "[{domain: .ads.example, via: block}, {ip: 10.0.0.0/8, via: branch}]",
        [
            Row("tcp 192.168.1.5 -> ads.example:80 on main", "block"),
            Row("udp 192.168.1.5 -> www.ads.example:80 on main", "block"),
        ],
    ),
    (
        "a name that is not found is in no network, and is looked up once",
        "[{ip: 0.0.0.0/0, via: direct}, {ip: '::/0', via: branch}]",
        [
            Row("tcp 192.168.1.5 -> nowhere.example:80 on main", "far", ("nowhere.example",)),
            Row("tcp 192.168.1.5 -> silent.example:80 on main", "far", ("silent.example",)),
        ],
    ),
    (
        "an upstream that needs the address of a name that is not found",
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
        "no lookup if a condition that needs none does not hold",
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
        "the client (hazard 81: whatever the socket's family)",
        "[{client: [192.168.1.0/24, 'fd00::/8'], via: office}]",
        [
            Row("tcp 192.168.1.77 -> public.example:443 on main", "office"),
            Row("tcp fd00::5 -> public.example:443 on main", "office"),
            Row("tcp fe80::5%2 -> public.example:443 on main", "far"),
            Row("tcp 192.168.2.1 -> public.example:443 on main", "far"),
        ],
    ),
    (
        "the user; a client without login has none",
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
        "[{domain: .example, port: 443, user: alice, client: 192.168.0.0/16, network: tcp, "
        "listener: main, via: office}]",
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
        "files of names and of networks",
        "[{domain_file: FILES/names.txt, via: office}, "
        "{ip_file: [FILES/networks.txt], via: branch}]",
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
        "not a network, for an upstream that resolves names: a name is in no network",
        "[{not: {ip: 10.0.0.0/8}, via: office}]",
        [
            Row("tcp 192.168.1.5 -> intranet.example:80 on main", "office"),
            Row("tcp 192.168.1.5 -> 10.0.0.1:80 on main", "far"),
        ],
    ),
    (
        "not a country",
        "[{not: {geoip: CN}, via: branch}, {via: direct}]",
        [
            Row("tcp 192.168.1.5 -> 203.0.113.10:80 on main", "direct"),
            Row("tcp 192.168.1.5 -> 198.51.100.1:80 on main", "branch"),
        ],
    ),
    (
        "an upstream that is written in the rule",
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
        "# a comment\nlisted.test\n*.below.test\n0.0.0.0 hosts.test\n"
        "server=/dnsmasq.test/192.0.2.53\n"
    )
    (tmp_path / "networks.txt").write_text("10.0.0.0/8\n2001:db8:1::/48   # ours\n")
    return tmp_path


@pytest.fixture(autouse=True)
def countries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the optional package."""
    module: Any = types.ModuleType("maxminddb")
    module.InvalidDatabaseError = RuntimeError
    module.open_database = lambda path: COUNTRIES
    monkeypatch.setitem(sys.modules, "maxminddb", module)
    yield


def router(rules: str, names: StubResolver) -> RuleRouter:
    """Return the router of these rules."""
    return routing(f"{BASE}rules: {rules}\n", names).router


def decide(rules: str, text: str, names: StubResolver) -> str:
    """Return the name of a flow's upstream, or the reason of the DialError."""
    try:
        return router(rules, names).route(flow(text)).dialer.name
    except DialError as error:
        return error.reason.value


def test_table_of_decisions_is_long() -> None:
    assert len(ROWS) >= 90


@pytest.mark.parametrize("rules, row", ROWS)
def test_flow_takes_the_upstream_in_the_table(rules: str, row: Row, files: Path) -> None:
    names = StubResolver(NAMES)
    outcome = decide(rules.replace("FILES", str(files)), row.flow, names)
    assert (outcome, tuple(names.lookups)) == (row.outcome, row.lookups)


class TestAddresses:
    """Hazard 75: the route carries the addresses that were looked up."""

    def test_route_carries_the_addresses_that_the_rules_saw(self) -> None:
        names = StubResolver(NAMES)
        route = router("[{ip: 10.0.0.0/8, via: direct}]", names).route(
            flow("tcp 192.168.1.5 -> both.example:80 on main")
        )
        assert route.flow.addresses == (Address("203.0.113.12", 80), Address("10.0.0.7", 80))
        assert route.flow.target == Address("both.example", 80)
        assert names.lookups == ["both.example"]

    def test_upstream_that_resolves_names_gets_no_addresses(self) -> None:
        names = StubResolver(NAMES)
        route = router("[]", names).route(flow("tcp 192.168.1.5 -> both.example:80 on main"))
        assert route.flow.addresses == () and names.lookups == []

    @pytest.mark.parametrize("host", ["203.0.113.10", "public.example"])
    def test_route_keeps_everything_else_of_the_flow(self, host: str) -> None:
        asked = flow(f"udp alice@192.168.1.5 -> {host}:80 on main")._replace(stamp="a password")
        route = router("[{via: direct}]", StubResolver(NAMES)).route(asked)
        assert route.flow == asked._replace(addresses=(Address("203.0.113.10", 80),))

    @pytest.mark.parametrize("via", ["direct", "branch"])
    def test_addresses_for_an_upstream_are_looked_up_once(self, via: str) -> None:
        names = StubResolver(NAMES)
        route = router(f"[{{via: {via}}}]", names).route(
            flow("tcp 192.168.1.5 -> public.example:80 on main")
        )
        assert route.flow.addresses == (Address("203.0.113.10", 80),)
        assert names.lookups == ["public.example"]

    def test_literal_address_is_in_the_route_for_any_upstream(self) -> None:
        for via in ("direct", "branch", "office"):
            route = router(f"[{{via: {via}}}]", StubResolver({})).route(
                flow("tcp 192.168.1.5 -> 0x7f.1:80 on main")
            )
            assert route.flow.addresses == (Address("127.0.0.1", 80),)


class TestRouteWithoutBlocking:
    """What the thread that reads datagrams calls."""

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
    def test_name_that_is_not_cached_has_no_route_without_blocking(self, rules: str) -> None:
        names = StubResolver(NAMES)
        rule_router, given = router(rules, names), flow(self.FLOW)
        assert rule_router.route_without_blocking(given) is None and names.lookups == []
        names.cached.add("intranet.example")
        assert rule_router.route_without_blocking(given) == rule_router.route(given)

    @pytest.mark.parametrize(
        "rules",
        [
            "[]",
            "[{domain: .example, via: office}]",
            "[{domain: .example, via: block}]",
            "[{ip: 10.0.0.0/8, port: 81, via: direct}]",
        ],
    )
    def test_flow_that_needs_no_lookup_is_routed_without_blocking(self, rules: str) -> None:
        names = StubResolver({})
        rule_router, given = router(rules, names), flow(self.FLOW)
        route = rule_router.route_without_blocking(given)
        assert isinstance(route, Route) and route == rule_router.route(given)
        assert names.lookups == []

    def test_literal_address_is_routed_without_blocking(self) -> None:
        route = router("[{ip: 10.0.0.0/8, via: direct}]", StubResolver({})).route_without_blocking(
            flow("udp 192.168.1.5 -> 10.0.0.1:80 on main")
        )
        assert route is not None and route.dialer.name == "direct"
        assert route.flow.addresses == (Address("10.0.0.1", 80),)

    def test_name_that_was_recently_not_found_is_in_no_network(self) -> None:
        names = StubResolver({})
        names.cached.add("intranet.example")
        by_network = router("[{ip: 10.0.0.0/8, via: direct}]", names)
        assert by_network.route_without_blocking(flow(self.FLOW)) is not None
        with pytest.raises(DialError) as caught:
            router("[{via: direct}]", names).route_without_blocking(flow(self.FLOW))
        assert caught.value.reason is Reason.NAME


class TestCandidates:
    """The upstreams that a flow may take to any target: for an ASSOCIATE, and for a BIND."""

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
    def test_candidates_are_the_upstreams_of_rules_that_may_match(
        self, rules: str, text: str, expected: list[str]
    ) -> None:
        candidates = router(rules, StubResolver({})).candidates(flow(text))
        assert [dialer.name for dialer in candidates] == expected


class TestExplain:
    def test_explanation_has_the_rule_as_it_is_written(self) -> None:
        text, route = router(
            "[{domain: a.test, via: block}, "
            "{ip: [10.0.0.0/8, 'fd00::/8'], not: {port: 22}, via: direct}]",
            StubResolver(NAMES),
        ).explain(flow("udp alice@192.168.1.5 -> intranet.example:443 on main"))
        assert text == "rules[1] (ip: [10.0.0.0/8, fd00::/8], not: {port: 22})"
        assert isinstance(route, Route) and route.dialer.name == "direct"
        assert route.flow.addresses == (Address("10.0.0.5", 443),)

    def test_explanation_cuts_a_long_list(self) -> None:
        text, _ = router("[{port: [1, 2, 3, 4, 5, 6, 7], via: direct}]", StubResolver({})).explain(
            flow("tcp 10.0.0.1 -> 10.0.0.2:7 on main")
        )
        assert text == "rules[0] (port: [1, 2, 3, 4, 5, ...])"

    def test_explanation_without_a_rule_says_whose_upstream_it_is(self) -> None:
        text, route = router("[{port: 1, via: block}]", StubResolver({})).explain(
            flow("tcp 192.168.1.5 -> a.test:2 on guests")
        )
        assert text == "listener" and isinstance(route, Route) and route.dialer.name == "parents"

    def test_explanation_names_the_upstream_of_the_user(self) -> None:
        text, route = router("[{port: 1, via: block}]", StubResolver({})).explain(
            flow("tcp carol@192.168.1.5 -> 203.0.113.10:2 on guests")
        )
        assert text == "users.carol.upstream"
        assert isinstance(route, Route)
        assert (route.dialer.name, route.rule) == ("branch", "users.carol.upstream")

    def test_explanation_of_a_denied_target_is_the_error(self) -> None:
        text, error = routing(
            BASE + "rules: [{via: direct}]\ndestinations: {deny: [private]}", StubResolver(NAMES)
        ).router.explain(flow("tcp 192.168.1.5 -> intranet.example:443 on main"))
        assert text == "rules[0] (everything)"
        assert isinstance(error, DialError) and error.reason is Reason.DENIED

    def test_explanation_of_a_name_that_is_not_found_is_the_error(self) -> None:
        _, error = router("[{via: direct}]", StubResolver({})).explain(
            flow("tcp 192.168.1.5 -> a.test:443 on main")
        )
        assert isinstance(error, DialError) and str(error) == "a.test: name not resolved"


def by_socks5(host: bytes, port: int) -> Address:
    """Parse the target of a SOCKS5 request."""
    return complete(
        socks5.read_request(
            BytesReader(b"\5\1\0\3%c%b%b" % (len(host), host, port.to_bytes(2, "big")))
        )
    ).target


def by_socks5_udp(host: bytes, port: int) -> Address:
    """Parse the target of a SOCKS5 datagram."""
    return socks5.parse_target(b"\3%c%b%b" % (len(host), host, port.to_bytes(2, "big")))


def by_socks4a(host: bytes, port: int) -> Address:
    """Parse the target of a SOCKS4a request."""
    return complete(
        socks4.read_request(
            BytesReader(b"\4\1%b\0\0\0\1me\0%b\0" % (port.to_bytes(2, "big"), host))
        )
    ).target


def by_connect(host: bytes, port: int) -> Address:
    """Parse the target of a CONNECT request."""
    host = b"[%b]" % host if b":" in host else host
    return http1.parse_authority(b"%b:%d" % (host, port))


def by_forward(host: bytes, port: int) -> Address:
    """Parse the target of a GET request."""
    host = b"[%b]" % host if b":" in host else host
    return http1.parse_origin(
        complete(
            http1.read_request(
                BytesReader(b"GET http://%b:%d/ HTTP/1.1\r\nHost: a\r\n\r\n" % (host, port))
            )
        )
    ).address


def by_connect_udp(host: bytes, port: int) -> Address:
    """Parse the target of a connect-udp request."""
    return connect_udp.parse_target(
        complete(
            http1.read_request(
                BytesReader(
                    b"GET /.well-known/masque/udp/%b/%d/ HTTP/1.1\r\nHost: a\r\n"
                    b"Connection: upgrade\r\nUpgrade: connect-udp\r\n\r\n"
                    % (host.replace(b":", b"%3A"), port)
                )
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
def test_spelling_of_an_address_is_canonical_in_every_protocol(
    read: Callable[[bytes, int], Address], spelling: bytes
) -> None:
    """Hazard 11."""
    target = read(spelling, 80)
    assert target == Address("127.0.0.1", 80)
    rule_router = router("[{ip: 127.0.0.0/8, via: office}]", StubResolver({}))
    given = Flow("tcp", Address("192.168.1.5", 5), target, "main", "")
    assert rule_router.route(given).dialer.name == "office"


def test_flow_with_addresses_is_not_looked_up() -> None:
    names = StubResolver(NAMES)
    given = flow("tcp 192.168.1.5 -> intranet.example:80 on main")._replace(
        addresses=(Address("10.9.9.9", 80),)
    )
    route = router("[{ip: 10.9.0.0/16, via: direct}]", names).route(given)
    assert route.dialer.name == "direct" and names.lookups == []
    assert route.flow.addresses == given.addresses


def test_rules_with_one_upstream_share_its_dialer() -> None:
    """A UDP session belongs to a dialer: flows of both rules must leave by one port."""
    rule_router = router(
        "[{port: 1, via: office}, {port: 2, via: office}, "
        "{port: 3, via: direct}, {port: 4, via: direct}]",
        StubResolver({}),
    )

    def dialer(port: int) -> Dialer:
        return rule_router.route(flow(f"udp 192.168.1.5 -> 192.0.2.77:{port} on main")).dialer

    assert dialer(1) is dialer(2) and dialer(3) is dialer(4) and dialer(1) is not dialer(3)
