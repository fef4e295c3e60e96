"""The section `tunnel`: bridges and agents, and every error with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from netproxy.config.tree.load import load_file
from netproxy.config.tree.problems import Problems
from netproxy.config.read import read_config
from netproxy.config.schema import (
    AgentConfig,
    BridgeAgentConfig,
    ClientsConfig,
    Config,
    HopConfig,
    LimitsConfig,
    NetworkList,
    PortConfig,
    ServiceConfig,
    UpstreamConfig,
    UpstreamTlsConfig,
)
from netproxy.config.sections.tunnel.tunnels import KEEPALIVE
from netproxy.config.sections.tunnel.tunnel_values import parse_port
from netproxy.errors import ConfigError
from netproxy.interfaces.addresses import Address, UnixAddress
from netproxy.interfaces.networks import IpNetwork
from tests.config.reading import errors, read

pytest.importorskip("yaml")

TOKEN = "hunter2 hunter2 hunter2"
BRIDGE = f"listen: 'tcp://127.0.0.1:7000', agents: {{home: {{token: {TOKEN}, ports: [8022]}}}}"
AGENT = (
    f"bridge: 'tls://bridge.example:7000', name: home, token: {TOKEN}, "
    "services: {'8022': '127.0.0.1:22'}"
)


def bridge(text: str, more: str = "") -> Config:
    """Return a configuration with a bridge, and more sections."""
    return read(f"tunnel: {{bridge: {{{text}}}}}\n{more}")


def agent(text: str) -> Config:
    """Return a configuration with an agent."""
    return read(f"tunnel: {{agent: {{{text}}}}}")


def test_tunnel_section_is_empty_by_default() -> None:
    assert read("").tunnel == (None, None)


def test_bridge_has_a_listener_and_agents() -> None:
    ports = "[8022, 8053/udp, '0.0.0.0:8443', '[::1]:9000-9010/tcp', 80]"
    text = (
        "tls: {certificate: a.pem, key: a.key}, listen: '0.0.0.0:7000', "
        f"agents: {{home: {{token: {TOKEN}, ports: {ports}}}, away: {{token: {TOKEN}}}}}"
    )
    config = bridge(text)
    assert config.tunnel.bridge is not None
    assert config.tunnel.bridge.agents == {
        "home": BridgeAgentConfig(
            TOKEN,
            (
                PortConfig("tcp", "127.0.0.1", 8022, 8022),
                PortConfig("udp", "127.0.0.1", 8053, 8053),
                PortConfig("tcp", "0.0.0.0", 8443, 8443),
                PortConfig("tcp", "::1", 9000, 9010),
                PortConfig("tcp", "127.0.0.1", 80, 80),
            ),
        ),
        "away": BridgeAgentConfig(TOKEN, ()),
    }
    listener = config.listeners[0]
    assert (listener.protocol, listener.name, listener.addresses, listener.network) == (
        "tunnel",
        "tunnel",
        (Address("0.0.0.0", 7000),),
        ("tcp",),
    )
    assert listener.tls is not None and not config.warnings


def test_port_may_be_a_mapping_with_its_clients() -> None:
    ports = (
        "[8022, {port: '0.0.0.0:8443', clients: [192.0.2.0/24, '!192.0.2.9']}, "
        "{port: 8053/udp, clients_deny: 192.0.2.66}]"
    )
    config = bridge(BRIDGE.replace("[8022]", ports)).tunnel.bridge
    assert config is not None
    excluded, denied = IpNetwork.parse("192.0.2.9"), IpNetwork.parse("192.0.2.66")
    some = NetworkList((IpNetwork.parse("192.0.2.0/24"),), (excluded,))
    assert config.agents["home"].ports == (
        PortConfig("tcp", "127.0.0.1", 8022, 8022),
        PortConfig("tcp", "0.0.0.0", 8443, 8443, ClientsConfig(some)),
        PortConfig("udp", "127.0.0.1", 8053, 8053, ClientsConfig(deny=NetworkList((denied,)))),
    )


def test_bridge_without_tls_gives_a_warning() -> None:
    assert [text for text in bridge(BRIDGE).warnings if "without TLS" in text]


def test_bridge_may_use_another_listener() -> None:
    tls = "tls: {certificate: a.pem}"
    agents = f"agents: {{home: {{token: {TOKEN}}}}}"
    for protocol in ("sps", "tunnel"):
        config = bridge(
            agents, f"listeners: [{{protocol: {protocol}, listen: '127.0.0.1:1', {tls}}}]"
        )
        assert [listener.protocol for listener in config.listeners] == [protocol]


def test_tunnel_listener_without_clients_is_not_open() -> None:
    """Agents have tokens, so a listener for agents alone may be reached from everywhere."""
    listener = "{protocol: tunnel, listen: ':1', tls: {certificate: a.pem}}"
    assert bridge(f"agents: {{home: {{token: {TOKEN}}}}}", f"listeners: [{listener}]")


def test_service_may_be_a_unix_socket() -> None:
    config = agent(AGENT.replace("127.0.0.1:22", "unix:/run/a.sock"))
    assert config.tunnel.agent is not None
    (service,) = config.tunnel.agent.services
    assert service.target == UnixAddress.of("/run/a.sock")


def test_agent_keys_are_read() -> None:
    config = agent(
        f"bridge: 'tls://Bridge.example:7000', name: home, token: {TOKEN}, exit: true, "
        "tls: {ca: a.pem, server_name: b.example}, "
        "services: {'8022': '127.0.0.1:22', 8053/udp: 'dns.lan:53', "
        "'80': {target: '[::1]:80', proxy_protocol: true}}"
    )
    assert config.tunnel.agent == AgentConfig(
        Address("bridge.example", 7000),
        "home",
        TOKEN,
        UpstreamTlsConfig(ca="a.pem", server_name="b.example"),
        UpstreamConfig((HopConfig("direct", keepalive=KEEPALIVE),)),
        True,
        (
            ServiceConfig("tcp", 8022, Address("127.0.0.1", 22)),
            ServiceConfig("udp", 8053, Address("dns.lan", 53)),
            ServiceConfig("tcp", 80, Address("::1", 80), True),
        ),
    )
    assert not config.warnings


def test_agent_with_upstream_and_without_tls_gives_a_warning() -> None:
    config = agent(AGENT.replace("tls://", "tcp://") + ", upstream: 'socks5://10.0.0.1:1080'")
    assert config.tunnel.agent is not None
    assert config.tunnel.agent.tls is None
    assert config.tunnel.agent.upstream.text == "socks5://10.0.0.1:1080"
    assert [text for text in config.warnings if "without TLS" in text]


def test_short_token_gives_a_warning() -> None:
    config = bridge("listen: 'tcp://127.0.0.1:1', agents: {home: {token: hunter2}}")
    assert [
        text
        for text in config.warnings
        if "tunnel.bridge.agents.home.token: is shorter than 16 bytes" in text
    ]
    assert "hunter2" not in "".join(config.warnings)


def test_tunnel_tokens_are_not_in_repr() -> None:
    config = read(f"tunnel: {{bridge: {{{BRIDGE}}}, agent: {{{AGENT}}}}}")
    assert "hunter2" not in repr(config)


def test_token_file_is_read_and_must_not_be_empty(tmp_path: Path) -> None:
    """Hazard 128: a token file that cannot be read keeps the daemon from starting."""
    path = tmp_path / "c.yaml"
    path.write_text(
        "tunnel: {agent: {bridge: 'tls://b:1', name: home, token: !file home.token, exit: true}}"
    )
    with pytest.raises(ConfigError) as caught:
        load_file(str(path))
    assert (
        str(caught.value) == f"{path}:1:58: !file {tmp_path}/home.token: No such file or directory"
    )
    (tmp_path / "home.token").write_text(f"{TOKEN}\n")
    config = read_config(load_file(str(path)), Problems())
    assert config.tunnel.agent is not None and config.tunnel.agent.token == TOKEN
    (tmp_path / "home.token").write_text("\n")
    problems = Problems()
    read_config(load_file(str(path)), problems)
    assert ["token: is missing or empty" in str(error) for error in problems.errors] == [True]


def test_tunnel_url_is_an_upstream() -> None:
    more = (
        "upstreams: {home: 'tunnel://home', far: [home, 'http://h:1'], "
        "any: {members: [home, {url: 'tunnel://home', timeout: 2s}]}}\n"
        "rules: [{ip: [192.168.7.0/24], via: 'tunnel://home'}]\ndefault: 'tunnel://home'"
    )
    config = bridge(BRIDGE, more)
    assert config.default.text == "tunnel://home"
    assert config.upstreams["far"].text == "tunnel://home -> http://h:1"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "default: tunnel://home",
            "c.yaml:1:10: default: tunnel.bridge.agents has no agent 'home'",
        ),
        (
            f"tunnel: {{bridge: {{{BRIDGE}}}}}\ndefault: tunnel://hom",
            "c.yaml:2:10: default: tunnel.bridge.agents has no agent 'hom'",
        ),
        (
            f"tunnel: {{bridge: {{{BRIDGE}}}}}\ndefault: tunnel://home:1",
            "c.yaml:2:10: default: a tunnel is written tunnel://NAME or tunnel://NAME/PORT, with "
            "the name of an agent",
        ),
        (
            f"tunnel: {{bridge: {{{BRIDGE}}}}}\ndefault: ['http://h:1', tunnel://home]",
            "c.yaml:2:10: default[1]: a tunnel must be the first hop: its agent connects "
            "to this daemon",
        ),
        (
            f"tunnel: {{bridge: {{{BRIDGE}}}}}\ndefault: {{url: tunnel://home, udp: uot}}",
            "c.yaml:2:10: default: a tunnel takes no option except timeout: its agent "
            "connects to this daemon",
        ),
        ("tunnel: {bridge: {}}", "c.yaml:1:18: tunnel.bridge.agents: names no agent"),
        (
            "tunnel: {brigde: {}}",
            "c.yaml:1:10: tunnel.brigde: unknown key (did you mean 'bridge'?)",
        ),
        (
            "tunnel: {bridge: {agents: {home: {token: ''}}, listen: 'tcp://127.0.0.1:1'}}",
            "c.yaml:1:42: tunnel.bridge.agents.home.token: is missing or empty",
        ),
        (
            "tunnel: {bridge: {agents: {ho.me: {token: aaaaaaaaaaaaaaaa}}, listen: "
            "'tcp://127.0.0.1:1'}}",
            "c.yaml:1:35: tunnel.bridge.agents.ho.me: an agent's name has 1 to 63 "
            "letters, digits, '-' and '_'",
        ),
        (
            "tunnel: {bridge: {agents: {home: {token: aaaaaaaaaaaaaaaa}}, listen: '127.0.0.1:1'}}",
            "c.yaml:1:18: tunnel.bridge.tls: is missing: write listen: tcp://... for a "
            "bridge without TLS",
        ),
        (
            "tunnel: {bridge: {agents: {home: {token: aaaaaaaaaaaaaaaa}}, listen: "
            "'tcp://127.0.0.1:1', tls: {certificate: a}}}",
            "c.yaml:1:96: tunnel.bridge.tls: a bridge at tcp:// has no TLS: remove this key",
        ),
        (
            "tunnel: {bridge: {agents: {home: {token: aaaaaaaaaaaaaaaa}}}}",
            "c.yaml:1:18: tunnel.bridge.listen: is missing, and no listener with tls has "
            "the protocol tunnel or sps",
        ),
        (
            "listeners: [{protocol: tunnel, listen: '127.0.0.1:1', tls: {certificate: a}}]",
            "c.yaml:1:1: tunnel.bridge: is missing, but a listener has the protocol tunnel",
        ),
        (
            f"listeners: [{{protocol: tunnel, listen: '127.0.0.1:1'}}]\ntunnel: {{bridge: "
            f"{{{BRIDGE}}}}}",
            "c.yaml:1:13: listeners[0].tls: is missing (for a bridge without TLS write "
            "tunnel.bridge.listen: tcp://...)",
        ),
        (
            "tunnel: {agent: "
            f"{{{AGENT.replace('tls://bridge.example:7000', 'bridge.example')}}}}}",
            "c.yaml:1:26: tunnel.agent.bridge: 'bridge.example' is not a bridge (expected "
            "tls://host:port)",
        ),
        (
            "tunnel: {agent: {exit: true, name: home, token: aaaaaaaaaaaaaaaa}}",
            "c.yaml:1:17: tunnel.agent.bridge: is missing (expected tls://host:port)",
        ),
        (
            "tunnel: {agent: {exit: true, bridge: 'tls://b:1', token: aaaaaaaaaaaaaaaa}}",
            "c.yaml:1:17: tunnel.agent.name: is missing",
        ),
        (
            "tunnel: {agent: {exit: true, bridge: 'tls://b:1', name: a b, token: "
            "aaaaaaaaaaaaaaaa}}",
            "c.yaml:1:57: tunnel.agent.name: an agent's name has 1 to 63 letters, digits, "
            "'-' and '_'",
        ),
        (
            "tunnel: {agent: {exit: true, bridge: 'tls://b:1', name: ab}}",
            "c.yaml:1:17: tunnel.agent.token: is missing or empty",
        ),
        (
            "tunnel: {agent: {exit: true, bridge: 'tcp://b:1', name: ab, token: "
            "aaaaaaaaaaaaaaaa, tls: {ca: x}}}",
            "c.yaml:1:91: tunnel.agent.tls: a bridge at tcp:// has no TLS: remove this key",
        ),
        (
            "tunnel: {agent: {exit: true, bridge: 'tls://b:1', name: ab, token: "
            "aaaaaaaaaaaaaaaa, tls: {insecure: true}}}",
            "c.yaml:1:92: tunnel.agent.tls.insecure: unknown key",
        ),
        (
            "tunnel: {agent: {bridge: 'tls://b:1', name: ab, token: aaaaaaaaaaaaaaaa}}",
            "c.yaml:1:17: tunnel.agent.services: there are none, and exit is false: the "
            "agent would have nothing to do",
        ),
        (
            f"tunnel: {{agent: {{{AGENT.replace('8022', '0.0.0.0:80')}}}}}",
            "c.yaml:1:110: tunnel.agent.services.0.0.0.0:80: '0.0.0.0:80' is not a port "
            "of the bridge (expected 8022 or 8053/udp)",
        ),
        (
            f"tunnel: {{agent: {{{AGENT.replace('127.0.0.1:22', '22')}}}}}",
            "c.yaml:1:118: tunnel.agent.services.8022.target: must be host:port with a "
            "port between 1 and 65535",
        ),
        (
            f"tunnel: {{agent: {{{AGENT[:-1]}, 8022/tcp: 'a:1'}}}}}}",
            "c.yaml:1:134: tunnel.agent.services.8022/tcp: is given twice",
        ),
        (
            f"tunnel: {{agent: {{{AGENT[:-1]}, 53/udp: {{target: 'a:1', proxy_protocol: "
            f"true}}}}}}}}",
            "c.yaml:1:174: tunnel.agent.services.53/udp.proxy_protocol: is for TCP",
        ),
        (
            f"tunnel: {{agent: {{{AGENT[:-1]}, '53': {{}}}}}}}}",
            "c.yaml:1:140: tunnel.agent.services.53.target: is missing",
        ),
        (
            f"tunnel: {{agent: {{{AGENT[:-1]}, 53/udp: 'unix:/run/a'}}}}}}",
            "c.yaml:1:142: tunnel.agent.services.53/udp.target: a UNIX socket takes no datagrams",
        ),
    ],
)
def test_tunnel_error_has_place_and_words(text: str, error: str) -> None:
    lines = errors(text)
    assert lines[0] == error
    assert "hunter2" not in "".join(lines)


def test_limits_of_a_udp_port_are_rates() -> None:
    limits = "connections: 5, connections_per_client: 5, connection_rate_per_client: 5/s, "
    limits += "handshakes: 5, rate: 8kbit/s, rate_per_client: 8kbit/s"
    ports = f"[{{port: 8053/udp, limits: {{{limits}}}}}, {{port: 8053, limits: {{{limits}}}}}]"
    lines = errors(f"tunnel: {{bridge: {{{BRIDGE.replace('[8022]', ports)}}}}}")
    assert [line.partition("home.")[2] for line in lines] == [
        f"ports[0].limits.{key}: has no meaning for udp"
        for key in (
            *("connections", "connections_per_client"),
            *("connection_rate_per_client", "handshakes"),
        )
    ]


def test_rates_of_a_udp_port_are_read() -> None:
    ports = "[{port: 8053/udp, limits: {rate: 8kbit/s, rate_per_client: 4kbit/s}}]"
    tunnel = bridge(BRIDGE.replace("[8022]", ports)).tunnel
    assert tunnel.bridge is not None
    (port,) = tunnel.bridge.agents["home"].ports
    assert port.limits == LimitsConfig(rate=1000, rate_per_client=500)


def test_each_port_with_an_error_is_reported() -> None:
    ports = "[80, x, {clients: [y]}, {port: 81, clients: []}, {port: 82, speed: 1}]"
    lines = errors(f"tunnel: {{bridge: {{{BRIDGE.replace('[8022]', ports)}}}}}")
    assert [line.partition("home.")[2] for line in lines] == [
        "ports[1]: 'x' is not a port (expected 8022, 8053/udp, 0.0.0.0:8443 or 8000-8010)",
        "ports[2].port: is missing",
        "ports[2].clients[0]: 'y' is not a valid network "
        "(expected an address or CIDR, such as 10.0.0.0/8)",
        "ports[3].clients: names no network",
        "ports[4].speed: unknown key",
    ]
    assert lines[0].startswith("c.yaml:1:111: tunnel.bridge.agents.")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "0",
        "65536",
        "8022/sctp",
        "host:80",
        "1000-2000",
        "80-90",
        "9000-8000",
        "8000-70000",
        ":80",
        "[::1:80",
        "1.2.3:80",
    ],
)
def test_invalid_port_of_an_agent_is_refused(text: str) -> None:
    """Hazard 122: ports below 1024 must be named one by one, and not as part of a range."""
    with pytest.raises(ValueError):
        parse_port(text)


# -- datagrams by UDP

WITH_TLS = f"tls: {{certificate: a.pem, key: a.key}}, agents: {{home: {{token: {TOKEN}}}}}"
UDP_PORT = "listen: '0.0.0.0:7000', datagrams: true, "


def test_datagrams_go_by_tcp_by_default() -> None:
    config = bridge(BRIDGE).tunnel.bridge
    assert config is not None and not config.datagrams
    own = agent(AGENT).tunnel.agent
    assert own is not None and not own.datagrams


def test_datagrams_have_the_port_number_of_the_bridge() -> None:
    config = bridge(UDP_PORT + WITH_TLS)
    assert config.tunnel.bridge is not None and config.tunnel.bridge.datagrams
    (listener,) = config.listeners
    assert listener.network == ("tcp", "udp") and listener.addresses == (Address("0.0.0.0", 7000),)


def test_datagrams_may_have_a_port_of_their_own() -> None:
    """As they must if agents connect to an sps listener, whose UDP is that of SOCKS5."""
    text = f"datagrams: '0.0.0.0:7001', agents: {{home: {{token: {TOKEN}}}}}"
    more = "listeners: [{listen: '127.0.0.1:1', tls: {certificate: a.pem}}]"
    main, udp = bridge(text, more).listeners
    assert main.network == ("tcp", "udp") and main.protocol == "sps"
    assert (udp.protocol, udp.name, udp.network) == ("tunnel", "tunnel-datagrams", ("udp",))
    assert udp.addresses == (Address("0.0.0.0", 7001),) and udp.tls is None


def test_datagrams_come_to_every_listener_for_agents_with_a_port() -> None:
    text = f"datagrams: true, agents: {{home: {{token: {TOKEN}}}}}"
    tls = "protocol: tunnel, tls: {certificate: a.pem}"
    more = f"listeners: [{{listen: '127.0.0.1:1', {tls}}}, {{listen: 'systemd:a', {tls}}}]"
    first, second = bridge(text, more).listeners
    assert first.network == ("tcp", "udp") and second.network == ("tcp",)


def test_agent_may_want_datagrams_by_udp() -> None:
    own = agent(f"{AGENT}, datagrams: true").tunnel.agent
    assert own is not None and own.datagrams


@pytest.mark.parametrize(
    "text, error",
    [
        (f"datagrams: true, {BRIDGE}", "datagrams: needs TLS, in which agents are told the keys"),
        (f"datagrams: maybe, {WITH_TLS}, listen: ':7000'", "datagrams: 'maybe' is not"),
    ],
)
def test_datagrams_of_a_bridge_that_cannot_be_are_an_error(text: str, error: str) -> None:
    assert error in errors(f"tunnel: {{bridge: {{{text}}}}}")[0]


def test_datagrams_without_a_listener_of_their_own_need_an_address() -> None:
    text = f"datagrams: true, agents: {{home: {{token: {TOKEN}}}}}"
    more = "listeners: [{listen: '127.0.0.1:1', tls: {certificate: a.pem}}]"
    (error,) = errors(f"tunnel: {{bridge: {{{text}}}}}\n{more}")
    assert "no listener for agents has a UDP port: write the address of one" in error


def test_agents_and_clients_may_talk_directly() -> None:
    config = bridge(f"{UDP_PORT}direct: true, {WITH_TLS}").tunnel.bridge
    assert config is not None and config.direct
    own = agent(f"{AGENT}, datagrams: true, exit: true, direct: true").tunnel.agent
    assert own is not None and own.direct
    assert not bridge(UDP_PORT + WITH_TLS).tunnel.bridge.direct  # type: ignore[union-attr]  # set


@pytest.mark.parametrize(
    "text",
    [
        f"bridge: {{direct: true, listen: ':7000', {WITH_TLS}}}",
        f"agent: {{{AGENT}, exit: true, direct: true}}",
        f"agent: {{{AGENT}, datagrams: true, direct: true}}",
    ],
)
def test_direct_paths_need_datagrams_by_udp(text: str) -> None:
    """Those of an agent also need an exit."""
    (error,) = errors(f"tunnel: {{{text}}}")
    assert "direct: needs datagrams" in error


def test_datagrams_of_an_agent_need_tls() -> None:
    text = f"{AGENT}, datagrams: true".replace("tls://", "tcp://")
    (error,) = errors(f"tunnel: {{agent: {{{text}}}}}")
    assert "datagrams: needs TLS, in which the bridge tells the keys" in error
