"""From the raw tree to the schema: every key, its default, and the exact words of every error."""

from __future__ import annotations

import pytest

from netproxy.config.load import load_text
from netproxy.config.node import Problems
from netproxy.config.read import check, read_config
from netproxy.config.schema import (
    AnnounceConfig,
    Config,
    HopConfig,
    LimitsConfig,
    ListenerConfig,
    LogConfig,
    MetricsConfig,
    TimeoutsConfig,
    UdpConfig,
    UserConfig,
    UpstreamConfig,
)
from netproxy.errors import ConfigError
from netproxy.interfaces.addresses import ActivationAddress, Address
from netproxy.interfaces.networks import IpNetwork

pytest.importorskip("yaml")
HASH = "scrypt$1024$1$1$AAECAwQFBgcICQoLDA0ODw==$" + "A" * 43 + "="


def placeless(config: Config) -> Config:
    """Without the places in the file, which tests of errors look at."""
    return config._replace(
        users={name: user._replace(place="") for name, user in config.users.items()}
    )


def read(text: str) -> Config:
    problems = Problems()
    return check(read_config(load_text(text.encode(), "c.yaml"), problems), problems)


def errors(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text)
    return str(caught.value).split("\n")


def listener(text: str) -> ListenerConfig:
    (one,) = read(f"listeners: [{{listen: '127.0.0.1:1080', {text}}}]").listeners
    return one


class TestDefaults:
    @pytest.mark.parametrize("text", ["", "---", "listeners: []", "users: {}\nlog:\ntimeouts:\n"])
    def test_an_empty_file_is_valid(self, text: str) -> None:
        assert read(text) == Config(())

    def test_of_a_listener_on_loopback(self) -> None:
        assert listener("") == ListenerConfig(
            "sps",
            (Address("127.0.0.1", 1080),),
            "sps-1080",
            udp=UdpConfig(max_sessions_per_client=4096),
            limits=LimitsConfig(connections_per_client=1024),
        )

    def test_of_a_listener_for_others_has_limits_for_each_client(self) -> None:
        (one,) = read("listeners: [{listen: ':1080', clients: 10.0.0.0/8}]").listeners
        assert (one.udp.max_sessions_per_client, one.limits.connections_per_client) == (64, 256)

    def test_are_those_of_the_standards(self) -> None:
        assert TimeoutsConfig() == TimeoutsConfig(10.0, 10.0, 7440.0, 300.0, 30.0)
        assert UdpConfig().idle_timeout == 300.0

    def test_users_are_asked_for_where_there_are_any(self) -> None:
        (one,) = read(
            f"listeners: [{{listen: ':1080'}}]\nusers: {{alice: {{password: {HASH}}}}}"
        ).listeners
        assert one.auth == "required"


class TestValues:
    def test_everything(self) -> None:
        config = read(f"""
listeners:
  - protocol: socks5
    listen: 127.0.0.1:8000-8001
    network: [tcp]
    name: main
    announce: [{{clients: 192.168.0.0/16, address: 192.168.1.1}}, 203.0.113.5:1080]
    auth: optional
    clients: [192.168.0.0/16, "::1"]
    upstream: office
    udp: {{relay_port: 20000-20010, mapping: symmetric, filtering: address-dependent, idle_timeout: 2m, max_sessions: 10,
           max_sessions_per_client: 5}}
    limits: {{connections: 7, connections_per_client: 3}}
upstreams:
  office: socks5://user:pass@10.0.0.1:1080
  both: [office, http://proxy.example:3128]
default: both
users: {{alice: {{password: {HASH}, limits: {{sessions: 4}}}}}}
timeouts: {{handshake: 1s, connect: 2s, tcp_idle: 3h, half_close: 4m, drain: 500ms}}
log: {{level: debug, format: json, access: false}}
udp: {{batching: single}}
tcp: {{splice: false}}
""")
        office = HopConfig("socks5", Address("10.0.0.1", 1080), "user", "pass")
        way = UpstreamConfig((office,), "office")
        both = UpstreamConfig((office, HopConfig("http", Address("proxy.example", 3128))), "both")
        assert placeless(config) == Config(
            listeners=(
                ListenerConfig(
                    "socks5",
                    (Address("127.0.0.1", 8000), Address("127.0.0.1", 8001)),
                    "main",
                    ("tcp",),
                    announce=(
                        AnnounceConfig(
                            Address("192.168.1.1", 0), (IpNetwork.parse("192.168.0.0/16"),)
                        ),
                        AnnounceConfig(Address("203.0.113.5", 1080)),
                    ),
                    auth="optional",
                    clients=(IpNetwork.parse("192.168.0.0/16"), IpNetwork.parse("::1")),
                    upstream=way,
                    udp=UdpConfig("20000-20010", 120.0, "symmetric", "address-dependent", 10, 5),
                    limits=LimitsConfig(7, 3),
                ),
            ),
            upstreams={"office": way, "both": both},
            default=both,
            users={"alice": UserConfig(HASH, 4)},
            batching="single",
            splice=False,
            timeouts=TimeoutsConfig(1.0, 2.0, 10800.0, 240.0, 0.5),
            log=LogConfig("debug", "json", False),
        )

    @pytest.mark.parametrize(
        "text, announced",
        [
            ("announce: 203.0.113.5", [("203.0.113.5", 0)]),
            ("announce: 'proxy.example:1080'", [("proxy.example", 1080)]),
            ("announce: [203.0.113.5, '2001:db8::1']", [("203.0.113.5", 0), ("2001:db8::1", 0)]),
            ("announce: {address: 203.0.113.5}", [("203.0.113.5", 0)]),
        ],
    )
    def test_announce_in_all_its_forms(self, text: str, announced: list) -> None:
        assert [tuple(one.address) for one in listener(text).announce] == announced

    @pytest.mark.parametrize(
        "protocol, filtering", [("tcp", "endpoint-independent"), ("udp", "address-dependent")]
    )
    def test_a_fixed_target(self, protocol: str, filtering: str) -> None:
        """Nobody logs in to a forward's UDP port: RFC 4787 REQ-8."""
        one = listener(f"protocol: {protocol}, target: '10.0.0.5:53'")
        assert (one.target, one.network, one.udp.filtering) == (
            Address("10.0.0.5", 53),
            (protocol,),
            filtering,
        )

    @pytest.mark.parametrize(
        "text, chain",
        [
            ("default: block", ("block",)),
            ("default: [direct]", ("direct",)),
            (
                "default: b\nupstreams: {a: 'http://h:1', b: [a, 'socks5://h:2']}",
                ("http", "socks5"),
            ),
            ("default: [a, a]\nupstreams: {a: 'http://h:1'}", ("http", "http")),
        ],
    )
    def test_chains(self, text: str, chain: tuple) -> None:
        assert (
            tuple(hop.scheme for hop in read(text).default.steps if isinstance(hop, HopConfig))
            == chain
        )

    def test_names_and_passwords_stay_text(self) -> None:
        """HAZARDS 113."""
        assert placeless(read("users: {0123: {password: 1.10}, no: {password: 0123}}")).users == {
            "0123": UserConfig("1.10"),
            "no": UserConfig("0123"),
        }

    def test_a_password_is_never_shown(self) -> None:
        """HAZARDS 111."""
        config = read(
            "users: {alice: {password: hunter2}}\nupstreams: {a: 'http://u:hunter2@h:1'}\ndefault: a"
        )
        assert "hunter2" not in repr(config) and "hunter2" not in "".join(config.warnings)

    def test_the_text_of_a_way_shows_no_password(self) -> None:
        way = UpstreamConfig(
            (HopConfig("socks5", Address("::1", 1), "u", "hunter2"), HopConfig("direct"))
        )
        assert way.text == "socks5://[::1]:1 -> direct"


class TestWarnings:
    @pytest.mark.parametrize(
        "text, warning",
        [
            (
                "users: {alice: {password: plain}}",
                "users.alice.password is plain text: make a hash with 'netproxyctl hash-password'",
            ),
            (
                "listeners: [{listen: '127.0.0.1:1', udp: {idle_timeout: 119s}}]",
                "listeners[0].udp.idle_timeout is under 120s, which RFC 4787 forbids",
            ),
            (
                "listeners: [{listen: '0.0.0.0:1', allow_open: true}]",
                "listeners[0] on 0.0.0.0:1 lets everybody in",
            ),
        ],
    )
    def test_what_is_allowed_but_should_be_said(self, text: str, warning: str) -> None:
        assert read(text).warnings == (warning,)

    def test_none_without_a_reason(self) -> None:
        assert not read(
            f"listeners: [{{listen: '[::1]:1'}}]\nusers: {{alice: {{password: {HASH}}}}}"
        ).warnings


class TestOpen:
    """HAZARDS 80: a proxy that anybody may use is found within hours."""

    @pytest.mark.parametrize(
        "listen",
        [
            "0.0.0.0:1",
            ":1",
            "[::]:1",
            "192.0.2.1:1",
            "[fe80::1]:1",
            "proxy.example:1",
            "[::ffff:0.0.0.0]:1",
        ],
    )
    @pytest.mark.parametrize(
        "more", ["", ", auth: none", ", auth: optional", ", allow_open: false"]
    )
    def test_is_refused(self, listen: str, more: str) -> None:
        users = f"\nusers: {{alice: {{password: {HASH}}}}}" if "optional" in more else ""
        (found,) = errors(f"listeners:\n  - {{listen: '{listen}'{more}}}{users}")
        assert found.startswith("c.yaml:2:5: listeners[0].listen: ")
        assert found.endswith(" would let everybody in: set auth, clients, or allow_open: true")

    @pytest.mark.parametrize("clients", ["[]", "''", "~", ""])
    def test_is_refused_though_clients_name_nobody(self, clients: str) -> None:
        assert errors(f"listeners: [{{listen: '0.0.0.0:1', clients: {clients}}}]")

    @pytest.mark.parametrize(
        "text",
        [
            "listen: '127.0.0.1:1'",
            "listen: '127.1.2.3:1'",
            "listen: '[::1]:1'",
            "listen: '0.0.0.0:1', clients: [10.0.0.0/8]",
            "listen: '0.0.0.0:1', allow_open: true",
        ],
    )
    def test_is_not_what_these_are(self, text: str) -> None:
        assert read(f"listeners: [{{{text}}}]").listeners

    def test_is_not_what_users_may_use(self) -> None:
        assert read(
            f"listeners: [{{listen: ':1', auth: required}}]\nusers: {{alice: {{password: {HASH}}}}}"
        ).listeners

    def test_a_forward_is_open_as_well(self) -> None:
        assert errors("listeners: [{protocol: tcp, listen: ':1', target: '10.0.0.5:22'}]")


class TestCircles:
    @pytest.mark.parametrize("upstreams", ["{a: b, b: a}", "{a: a}", "{a: [b], b: [c], c: [a]}"])
    def test_are_found(self, upstreams: str) -> None:
        assert all(
            line.endswith("the upstream refers back to itself")
            for line in errors(f"upstreams: {upstreams}")
        )

    def test_that_branch_end_as_well(self) -> None:
        """Each name is looked at once, or few names are a bomb (HAZARDS 113)."""
        assert len(errors("upstreams: {a: [" + ", ".join("a" * 12) + "]}")) < 100

    def test_long_chains_are_no_circles(self) -> None:
        names = ["http://h:1"] + [f"n{number}" for number in range(5)]
        text = ", ".join(f"n{number}: [{names[number]}]" for number in range(5)).replace(
            "[http://h:1]", "['http://h:1']"
        )
        try:
            read(f"upstreams: {{{text}}}")
        except ConfigError as error:
            pytest.fail(str(error))


class TestSocketOfTheServiceManager:
    def test_gives_the_listener_its_name(self) -> None:
        (one,) = read("listeners: [{listen: 'systemd:main', clients: 127.0.0.0/8}]").listeners
        assert (one.name, one.addresses) == ("sps-main", (ActivationAddress("systemd:main", 0),))

    def test_counts_as_open_to_others(self) -> None:
        assert errors("listeners: [{listen: 'systemd:main'}]") == [
            "c.yaml:1:13: listeners[0].listen: systemd:main would let everybody in: set auth, clients, or allow_open: true"
        ]

    def test_serves_one_listener(self) -> None:
        assert errors(
            "listeners: [{listen: 'systemd:a', name: x, clients: '::1'}, {listen: 'systemd:a', name: y, clients: '::1'}]"
        ) == [
            "c.yaml:1:61: listeners[1].listen: tcp systemd:a is already used by listener 'x'",
            "c.yaml:1:61: listeners[1].listen: udp systemd:a is already used by listener 'x'",
        ]


class TestMetrics:
    def test_a_listener_for_figures(self) -> None:
        assert read("metrics: 127.0.0.1:9180").metrics == MetricsConfig(Address("127.0.0.1", 9180))
        assert read("metrics: '[::1]:9180'").metrics == MetricsConfig(Address("::1", 9180))
        assert read(
            f"metrics: :9180\nmetrics_token: {'t' * 16}\nstatus_page: true"
        ).metrics == MetricsConfig(Address("::", 9180), "t" * 16, True)

    @pytest.mark.parametrize(
        "text, error",
        [
            (
                "metrics: 0.0.0.0:9180",
                "c.yaml:1:1: metrics: 0.0.0.0:9180 can be reached from other machines: set a metrics_token",
            ),
            (
                "metrics: 127.0.0.1",
                "c.yaml:1:10: metrics: '127.0.0.1' is not an address to listen on (expected host:port, :port or [v6]:port)",
            ),
            ("metrics: systemd:main", "c.yaml:1:10: metrics: must be a single port"),
            ("metrics: 127.0.0.1:1-2", "c.yaml:1:10: metrics: must be a single port"),
            (
                "metrics: 127.0.0.1:1\nstatus_page: true",
                "c.yaml:1:1: status_page: needs a metrics_token: the page shows which client talks to which target",
            ),
            (
                "metrics_token: 0123456789abcdef",
                "c.yaml:1:1: metrics_token: has no listener: set metrics",
            ),
            (
                "metrics: 127.0.0.1:1\nmetrics_token: short-secret",
                "c.yaml:2:16: metrics_token: must have at least 16 letters or digits (openssl rand -hex 16 makes one)",
            ),
        ],
    )
    def test_what_cannot_be(self, text: str, error: str) -> None:
        assert errors(text) == [error]

    def test_hazard_111_its_token_is_not_shown(self) -> None:
        config = read("metrics: 127.0.0.1:1\nmetrics_token: hunter2hunter2hunter2")
        assert "hunter2" not in repr(config)
