"""From the raw tree to the schema: defaults, values, warnings, users and metrics."""

from __future__ import annotations

import pytest

from netproxy.config.schema import (
    AnnounceConfig,
    ClientsConfig,
    Config,
    HopConfig,
    LimitsConfig,
    ListenerConfig,
    LogConfig,
    MetricsConfig,
    NetworkList,
    PenaltyConfig,
    TimeoutsConfig,
    UdpConfig,
    UserConfig,
    UserLimitsConfig,
    UpstreamConfig,
)
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.networks import IpNetwork
from tests.config.reading import HASH, errors, read

pytest.importorskip("yaml")


def placeless(config: Config) -> Config:
    """Return the configuration without the places of its users."""
    return config._replace(
        users={name: user._replace(place="") for name, user in config.users.items()}
    )


class TestDefaults:
    @pytest.mark.parametrize("text", ["", "---", "listeners: []", "users: {}\nlog:\ntimeouts:\n"])
    def test_empty_file_has_the_defaults(self, text: str) -> None:
        assert read(text) == Config(())

    def test_default_timeouts_meet_the_rfcs(self) -> None:
        assert TimeoutsConfig() == TimeoutsConfig(10.0, 10.0, 7440.0, 300.0, 30.0)
        assert UdpConfig().idle_timeout == 300.0


class TestValues:
    def test_all_common_keys_are_read(self) -> None:
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
    udp:
      relay_port: 20000-20010
      mapping: symmetric
      filtering: address-dependent
      idle_timeout: 2m
      max_sessions: 10
      max_sessions_per_client: 5
    limits: {{connections: 7, connections_per_client: 3}}
upstreams:
  office: socks5://user:pass@10.0.0.1:1080
  both: [office, http://proxy.example:3128]
default: both
users: {{alice: {{password: {HASH}, limits: {{sessions: 4}}}}}}
timeouts: {{handshake: 1s, connect: 2s, tcp_idle: 3h, half_close: 4m, drain: 500ms}}
log: {{level: debug, format: json, access: false, queue: 100}}
udp: {{batching: single}}
tcp: {{splice: false}}
""")
        office = HopConfig("socks5", Address("10.0.0.1", 1080), "user", "pass")
        upstream = UpstreamConfig((office,), "office")
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
                    clients=ClientsConfig(
                        NetworkList((IpNetwork.parse("192.168.0.0/16"), IpNetwork.parse("::1")))
                    ),
                    upstream=upstream,
                    udp=UdpConfig("20000-20010", 120.0, "symmetric", "address-dependent", 10, 5),
                    limits=LimitsConfig(7, 3),
                ),
            ),
            upstreams={"office": upstream, "both": both},
            default=both,
            users={"alice": UserConfig(HASH, UserLimitsConfig(sessions=4))},
            batching="single",
            splice=False,
            timeouts=TimeoutsConfig(1.0, 2.0, 10800.0, 240.0, 0.5),
            log=LogConfig("debug", "json", False, 100),
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
    def test_default_upstream_takes_chains_and_names(
        self, text: str, chain: tuple[str, ...]
    ) -> None:
        assert tuple(hop.scheme for hop in read(text).default.hops) == chain

    @pytest.mark.parametrize(
        "text, penalty",
        [
            ("default: direct", PenaltyConfig(5, 10.0, 600.0)),
            ("penalty: {after: 0}", PenaltyConfig(0, 10.0, 600.0)),
            ("penalty: {after: 3, for: 1m, longest: 1h}", PenaltyConfig(3, 60.0, 3600.0)),
        ],
    )
    def test_penalty_is_read(self, text: str, penalty: PenaltyConfig) -> None:
        assert read(text).penalty == penalty

    def test_mistakes_of_a_penalty_are_errors(self) -> None:
        assert errors("penalty: {after: -1, for: 1h, longest: 1m, within: 1m}") == [
            "c.yaml:1:18: penalty.after: '-1' is not a whole number (0 switches penalties off)",
            "c.yaml:1:40: penalty.longest: is shorter than for, the first penalty",
            "c.yaml:1:44: penalty.within: unknown key",
        ]
        above = "c.yaml:1:18: penalty.after: '1001' is above 1000 (0 switches penalties off)"
        assert errors("penalty: {after: 1001}") == [above]

    def test_user_names_and_passwords_stay_text(self) -> None:
        """Hazard 113: YAML types would turn these into numbers and booleans."""
        assert placeless(read("users: {0123: {password: 1.10}, no: {password: 0123}}")).users == {
            "0123": UserConfig("1.10"),
            "no": UserConfig("0123"),
        }

    def test_password_is_not_in_repr_or_warnings(self) -> None:
        """Hazard 111: a password is in no message."""
        config = read(
            "users: {alice: {password: hunter2}}\nupstreams: {a: 'http://u:hunter2@h:1'}\n"
            "default: a"
        )
        assert "hunter2" not in repr(config) and "hunter2" not in "".join(config.warnings)

    def test_upstream_text_holds_no_password(self) -> None:
        upstream = UpstreamConfig(
            (HopConfig("socks5", Address("::1", 1), "u", "hunter2"), HopConfig("direct"))
        )
        assert upstream.text == "socks5://[::1]:1 -> direct"


class TestWarnings:
    @pytest.mark.parametrize(
        "text, warning",
        [
            (
                "users: {alice: {password: plain}}",
                "c.yaml:1:27: users.alice.password: is plain text: make a hash of the password "
                "with 'netproxyctl hash-password'",
            ),
            (
                "listeners: [{listen: '127.0.0.1:1', udp: {idle_timeout: 119s}}]",
                "c.yaml:1:57: listeners[0].udp.idle_timeout: is under 120s, which RFC 4787 forbids",
            ),
            (
                "listeners: [{listen: '0.0.0.0:1', allow_open: true}]",
                "c.yaml:1:22: listeners[0].listen: 0.0.0.0:1 lets everybody in",
            ),
        ],
    )
    def test_questionable_setting_gives_a_warning(self, text: str, warning: str) -> None:
        assert read(text).warnings == (warning,)

    def test_ordinary_configuration_gives_no_warning(self) -> None:
        assert not read(
            f"listeners: [{{listen: '[::1]:1'}}]\nusers: {{alice: {{password: {HASH}}}}}"
        ).warnings


class TestMetrics:
    def test_metrics_listener_token_and_page_are_read(self) -> None:
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
                "c.yaml:1:10: metrics: 0.0.0.0:9180 can be reached from other "
                "machines: set a metrics_token",
            ),
            (
                "metrics: 127.0.0.1",
                "c.yaml:1:10: metrics: '127.0.0.1' is not an address to listen on "
                "(expected host:port, :port or [v6]:port)",
            ),
            ("metrics: systemd:main", "c.yaml:1:10: metrics: must be a single port"),
            ("metrics: 127.0.0.1:1-2", "c.yaml:1:10: metrics: must be a single port"),
            (
                "metrics: 127.0.0.1:1\nstatus_page: true",
                "c.yaml:2:14: status_page: needs a metrics_token: the page shows which "
                "client talks to which target",
            ),
            (
                "metrics_token: 0123456789abcdef",
                "c.yaml:1:16: metrics_token: has no listener: set metrics",
            ),
            ("metrics_users: true", "c.yaml:1:16: metrics_users: has no listener: set metrics"),
            (
                "metrics: 127.0.0.1:1\nmetrics_token: short-secret",
                "c.yaml:2:16: metrics_token: must have at least 16 letters or digits "
                "(openssl rand -hex 16 makes one)",
            ),
        ],
    )
    def test_metrics_error_has_place_and_words(self, text: str, error: str) -> None:
        assert errors(text) == [error]

    def test_metrics_token_is_not_in_repr(self) -> None:
        """Hazard 111."""
        config = read("metrics: 127.0.0.1:1\nmetrics_token: hunter2hunter2hunter2")
        assert "hunter2" not in repr(config)
