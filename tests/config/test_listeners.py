"""Listeners in the file: defaults, values, and the place and words of every error."""

from __future__ import annotations

import pytest

from netproxy.config.schema import LimitsConfig, ListenerConfig, UdpConfig
from netproxy.interfaces.networks import IpNetwork
from netproxy.interfaces.addresses import ActivationAddress, Address
from tests.config.reading import HASH, errors, read

pytest.importorskip("yaml")

USERS = f"users: {{alice: {{password: {HASH}}}}}"


def listener(text: str) -> ListenerConfig:
    """Return the listener on 127.0.0.1:1080 with the keys in the text."""
    return only_listener(f"listeners: [{{listen: '127.0.0.1:1080', {text}}}]")


def only_listener(text: str) -> ListenerConfig:
    """Return the only listener of a file."""
    (config,) = read(text).listeners
    return config


class TestValues:
    def test_listener_on_loopback_has_no_limits_for_each_client(self) -> None:
        assert listener("") == ListenerConfig(
            "sps",
            (Address("127.0.0.1", 1080),),
            "sps-1080",
            udp=UdpConfig(max_sessions_per_client=4096),
            limits=LimitsConfig(connections_per_client=1024),
        )

    def test_listener_for_other_machines_has_limits_for_each_client(self) -> None:
        config = only_listener("listeners: [{listen: ':1080', clients: 10.0.0.0/8}]")
        assert config.udp.max_sessions_per_client == 64
        assert config.limits.connections_per_client == 256

    def test_listener_requires_login_if_there_are_users(self) -> None:
        assert only_listener(f"listeners: [{{listen: ':1080'}}]\n{USERS}").auth == "required"

    @pytest.mark.parametrize(
        "text, announced",
        [
            ("announce: 203.0.113.5", [("203.0.113.5", 0)]),
            ("announce: 'proxy.example:1080'", [("proxy.example", 1080)]),
            ("announce: [203.0.113.5, '2001:db8::1']", [("203.0.113.5", 0), ("2001:db8::1", 0)]),
            ("announce: {address: 203.0.113.5}", [("203.0.113.5", 0)]),
        ],
    )
    def test_announce_takes_text_list_and_mapping(
        self, text: str, announced: list[tuple[str, int]]
    ) -> None:
        assert [tuple(entry.address) for entry in listener(text).announce] == announced

    def test_announced_interface_may_be_for_some_clients(self) -> None:
        interfaces = [entry.interface for entry in listener("announce: {interface: ppp0}").announce]
        assert interfaces == ["ppp0"]
        (entry,) = listener("announce: [{clients: 10.0.0.0/8, interface: br0}]").announce
        assert (entry.interface, entry.address.host) == ("br0", "")
        assert entry.clients == (IpNetwork.parse("10.0.0.0/8"),)

    @pytest.mark.parametrize(
        "protocol, filtering", [("tcp", "endpoint-independent"), ("udp", "address-dependent")]
    )
    def test_fixed_target_sets_network_and_filtering(self, protocol: str, filtering: str) -> None:
        """A forward's UDP port has no login: only the target may answer (RFC 4787 REQ-8)."""
        config = listener(f"protocol: {protocol}, target: '10.0.0.5:53'")
        assert (config.target, config.network) == (Address("10.0.0.5", 53), (protocol,))
        assert config.udp.filtering == filtering


@pytest.mark.parametrize(
    "text, message",
    [
        ("protocl: sps", "2:29: listeners[0].protocl: unknown key (did you mean 'protocol'?)"),
        (
            "protocol: socks",
            "2:39: listeners[0].protocol: 'socks' is not one of sps, socks5, http, tcp, "
            "udp, dns, tunnel, redirect, tproxy, sni (did you mean 'socks5'?)",
        ),
        (
            "protocol: ssh",
            "2:39: listeners[0].protocol: 'ssh' is not one of sps, socks5, http, tcp, "
            "udp, dns, tunnel, redirect, tproxy, sni",
        ),
        (
            "udp: {relay: any}",
            "2:35: listeners[0].udp.relay: unknown key (did you mean 'relay_port'?)",
        ),
        (
            "udp: {relay_port: \u00b2-3}",
            "2:47: listeners[0].udp.relay_port: '\u00b2-3' is not shared, any or a range of "
            "ports FIRST-LAST",
        ),
        (
            "udp: {relay_port: 5-3}",
            "2:47: listeners[0].udp.relay_port: '5-3' is not shared, any or a range of "
            "ports FIRST-LAST",
        ),
        (
            "udp: {relay_port: 0-3}",
            "2:47: listeners[0].udp.relay_port: '0-3' is not shared, any or a range of "
            "ports FIRST-LAST",
        ),
        (
            "udp: {relay_port: 9-65536}",
            "2:47: listeners[0].udp.relay_port: '9-65536' is not shared, any or a range "
            "of ports FIRST-LAST",
        ),
        (
            "udp: {relay_port: 5}",
            "2:47: listeners[0].udp.relay_port: '5' is not shared, any or a range of "
            "ports FIRST-LAST",
        ),
        (
            "udp: {mapping: full-cone}",
            "2:44: listeners[0].udp.mapping: 'full-cone' is not one of "
            "endpoint-independent, symmetric",
        ),
        (
            "udp: {filtering: none}",
            "2:46: listeners[0].udp.filtering: 'none' is not one of endpoint-independent, "
            "address-dependent, address-and-port-dependent",
        ),
        (
            "udp: {max_sessions: many}",
            "2:49: listeners[0].udp.max_sessions: 'many' is not a whole number above 0",
        ),
        (
            "limits: {connections: -1}",
            "2:51: listeners[0].limits.connections: '-1' is not a whole number above 0",
        ),
        *(
            (
                f"limits: {{{key}: 0}}",
                f"2:{40 + len(key)}: listeners[0].limits.{key}: '0' is not a whole number above 0",
            )
            for key in ("connections", "connections_per_client", "handshakes")
        ),
        (
            "limits: {connections: 0123456789012}",
            "2:51: listeners[0].limits.connections: '0123456789012' is not a whole number above 0",
        ),
        (
            "limits: {connections_per_client: 1.5}",
            "2:62: listeners[0].limits.connections_per_client: '1.5' is not a whole number above 0",
        ),
        ("network: [tcp, sctp]", "2:44: listeners[0].network[1]: 'sctp' is neither tcp nor udp"),
        (
            "network: udp",
            "2:38: listeners[0].network: the UDP of the protocol sps needs its TCP "
            "connections: add tcp",
        ),
        (
            "protocol: http, network: udp",
            "2:54: listeners[0].network: the UDP of the protocol http needs its TCP "
            "connections: add tcp",
        ),
        (
            "clients: [10.0.0.1/8]",
            "2:39: listeners[0].clients[0]: '10.0.0.1/8' is not a valid network: bits "
            "behind the prefix are set (write 10.0.0.0/8)",
        ),
        (
            "clients: everybody",
            "2:38: listeners[0].clients[0]: 'everybody' is not a valid network (expected "
            "an address or CIDR, such as 10.0.0.0/8)",
        ),
        (
            "auth: required",
            "2:35: listeners[0].auth: there are no users: add users, users_file or auth",
        ),
        ("auth: maybe", "2:35: listeners[0].auth: 'maybe' is not one of required, optional, none"),
        (
            "announce: 'a b'",
            "2:39: listeners[0].announce: 'a b' is not an address, address:port or host name",
        ),
        (
            "announce: {clients: 10.0.0.0/8}",
            "2:39: listeners[0].announce[0]: has no address (or interface)",
        ),
        (
            "announce: {address: 203.0.113.5, interface: eth0}",
            "2:39: listeners[0].announce[0]: has both address and interface",
        ),
        (
            "announce: {interface: 10.0.0.1}",
            "2:51: listeners[0].announce[0].interface: '10.0.0.1' is not the name of an interface",
        ),
        (
            "upstream: nowhere",
            "2:39: listeners[0].upstream: 'nowhere' is not an upstream: write scheme://host:port, "
            "direct or block",
        ),
        (
            "target: 'h:1'",
            "2:37: listeners[0].target: the protocol sps has no fixed target: its "
            "clients name theirs",
        ),
        ("protocol: tcp", "2:5: listeners[0].target: is missing"),
        (
            "protocol: udp, target: h",
            "2:52: listeners[0].target: must be host:port with a port between 1 and 65535",
        ),
        ("name: [a]", "2:35: listeners[0].name: must be a single value"),
        ("allow_open: yes", "2:41: listeners[0].allow_open: 'yes' is not one of true, false"),
    ],
)
def test_error_of_a_listener_has_place_and_words(text: str, message: str) -> None:
    assert errors(f"listeners:\n  - {{listen: '127.0.0.1:1', {text}}}") == [f"c.yaml:{message}"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{}", "2:5: listeners[0].listen: is missing"),
        (
            "{listen: 1080}",
            "2:14: listeners[0].listen: '1080' is not an address to listen on (write "
            "127.0.0.1:1080 for this machine alone, :1080 for every address)",
        ),
        ("{listen: 'h:70000'}", "2:14: listeners[0].listen: 'h:70000': port 70000 is above 65535"),
        (
            "{listen: ['127.0.0.1:1', '[::1]:1']}",
            "2:14: listeners[0].listen: must be a single value",
        ),
        ("{listen: {host: 127.0.0.1}}", "2:14: listeners[0].listen: must be a single value"),
        ("127.0.0.1:1", "2:5: listeners[0] must be a mapping of keys to values"),
    ],
)
def test_error_of_listen_has_place_and_words(text: str, message: str) -> None:
    assert errors(f"listeners:\n  - {text}")[0] == f"c.yaml:{message}"


def test_second_listener_with_the_same_name_is_refused() -> None:
    assert errors(
        "listeners:\n  - {listen: '127.0.0.1:1', name: a}\n  - {listen: '127.0.0.2:1', name: a}\n"
    ) == ["c.yaml:3:35: listeners[1].name: 'a' is the name of another listener"]


@pytest.mark.parametrize("name", ["tunnel-agent", "tunnel-direct"])
def test_listener_with_a_name_of_tunnels_is_refused(name: str) -> None:
    assert errors(f"listeners: [{{listen: '127.0.0.1:0', name: {name}}}]\n") == [
        f"c.yaml:1:43: listeners[0].name: '{name}' is reserved for what comes or goes by a tunnel"
    ]


def test_second_listener_on_the_same_address_is_refused() -> None:
    assert errors(
        "listeners:\n  - {listen: '127.0.0.1:1-2', name: a}\n  - {listen: '127.0.0.1:2', "
        "name: b, network: tcp}\n"
    ) == ["c.yaml:3:14: listeners[1].listen: tcp 127.0.0.1:2 is already used by listener 'a'"]


def test_tcp_and_udp_listener_on_the_same_port_are_accepted() -> None:
    config = read("""
listeners:
  - {listen: '127.0.0.1:1', name: a, network: tcp}
  - {listen: '127.0.0.1:1', name: b, protocol: udp, target: 'h:1'}
""")
    assert [listener.network for listener in config.listeners] == [("tcp",), ("udp",)]


class TestOpen:
    """Hazard 80: a proxy that anybody may use is found, and abused, within hours."""

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
    def test_open_listener_is_refused(self, listen: str, more: str) -> None:
        users = USERS if "optional" in more else ""
        (line,) = errors(f"listeners:\n  - {{listen: '{listen}'{more}}}\n{users}")
        assert line.startswith("c.yaml:2:14: listeners[0].listen: ")
        name = " (a name is looked up at the start, and counts as an address for other machines)"
        hint = name if listen.startswith("proxy.example") else ""
        assert line.endswith(
            f" would let everybody in{hint}: set auth, clients, or allow_open: true"
        )

    @pytest.mark.parametrize("clients", ["[]", "''", "~", ""])
    def test_empty_clients_do_not_make_a_listener_safe(self, clients: str) -> None:
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
    def test_listener_on_loopback_or_with_clients_is_accepted(self, text: str) -> None:
        assert read(f"listeners: [{{{text}}}]").listeners

    def test_listener_with_required_login_is_accepted(self) -> None:
        assert read(f"listeners: [{{listen: ':1', auth: required}}]\n{USERS}").listeners

    def test_open_forward_is_refused(self) -> None:
        assert errors("listeners: [{protocol: tcp, listen: ':1', target: '10.0.0.5:22'}]")


@pytest.mark.parametrize("value", ["any", "shared", "20000-20010"])
@pytest.mark.parametrize(
    "protocol, more", [("http", ""), ("udp", ", target: 'h:1'"), ("tcp", ", target: 'h:1'")]
)
def test_relay_port_without_udp_associate_is_refused(protocol: str, more: str, value: str) -> None:
    listener = f"listen: '127.0.0.1:1', protocol: {protocol}{more}"
    assert errors(f"listeners:\n- {{udp: {{relay_port: {value}}}, {listener}}}") == [
        "c.yaml:2:22: listeners[0].udp.relay_port: has no meaning for the protocol "
        f"{protocol}: it has no UDP ASSOCIATE"
    ]


class TestSocketActivation:
    def test_activated_listener_is_named_after_the_socket(self) -> None:
        config = only_listener("listeners: [{listen: 'systemd:main', clients: 127.0.0.0/8}]")
        assert config.name == "sps-main"
        assert config.addresses == (ActivationAddress("systemd:main", 0),)

    def test_activated_listener_counts_as_open(self) -> None:
        assert errors("listeners: [{listen: 'systemd:main'}]") == [
            "c.yaml:1:22: listeners[0].listen: systemd:main would let everybody in: "
            "set auth, clients, or allow_open: true"
        ]

    def test_activated_socket_serves_a_single_listener(self) -> None:
        assert errors(
            "listeners: [{listen: 'systemd:a', name: x, clients: '::1'}, {listen: "
            "'systemd:a', name: y, clients: '::1'}]"
        ) == [
            "c.yaml:1:70: listeners[1].listen: tcp systemd:a is already used by listener 'x'",
            "c.yaml:1:70: listeners[1].listen: udp systemd:a is already used by listener 'x'",
        ]


class TestTransparent:
    @pytest.mark.parametrize(
        "protocol, network", [("redirect", ("tcp",)), ("tproxy", ("tcp", "udp"))]
    )
    def test_networks_by_default(self, protocol: str, network: tuple[str, ...]) -> None:
        assert listener(f"protocol: {protocol}").network == network

    def test_tproxy_serves_udp_alone(self) -> None:
        assert listener("protocol: tproxy, network: [udp]").network == ("udp",)

    def test_clients_of_tproxy_on_loopback_are_other_machines(self) -> None:
        config = listener("protocol: tproxy")
        assert not config.is_local
        assert config.udp.max_sessions_per_client == 64
        assert config.limits.connections_per_client == 256

    @pytest.mark.parametrize(
        "text",
        [
            *("protocol: redirect, network: [udp]", "protocol: redirect, udp: {max_sessions: 9}"),
            *("protocol: tproxy, announce: 203.0.113.5", "protocol: tproxy, target: 'a:1'"),
            *("protocol: tproxy, bind: incoming", "protocol: tproxy, proxy_protocol: 10.0.0.2"),
            *("protocol: redirect, tls: {certificate: a.pem}", "protocol: redirect, auth: none x"),
        ],
    )
    def test_key_without_a_meaning_is_an_error(self, text: str) -> None:
        assert errors(f"listeners: [{{listen: '127.0.0.1:1080', {text}}}]")

    def test_login_is_an_error(self) -> None:
        text = "listeners: [{listen: '127.0.0.1:1', protocol: redirect, auth: required}]"
        assert "has no login" in errors(f"{text}\n{USERS}")[0]

    def test_redirect_that_lets_everybody_in_is_refused(self) -> None:
        assert (
            "would let everybody in" in errors("listeners: [{listen: ':1', protocol: redirect}]")[0]
        )
