"""`announce: auto`, `stun` and `port_mapping`: what is read, and what does not fit together."""

from __future__ import annotations

import pytest

from netproxy.config.schema import ListenerConfig
from netproxy.errors import ConfigError
from netproxy.interfaces.addresses import Address
from tests.config.reading import read
from tests.support.relays import described

OPEN = "listeners: [{listen: '0.0.0.0:1080', allow_open: true, %s}]"
STUN = "stun: [192.0.2.1]"


def listener(keys: str) -> ListenerConfig:
    return read(OPEN % keys).listeners[0]


def error(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text)
    return str(caught.value)


@pytest.mark.parametrize(
    "announce, port",
    [
        ("auto", 0),
        ("AUTO", 0),
        ("'auto:2080'", 2080),
        ("{address: auto}", 0),
        ("{address: 'auto:2080'}", 2080),
        ("[{clients: 10.0.0.0/8, address: 10.0.0.1}, 'auto:2080']", 2080),
    ],
)
def test_public_address_is_announced(announce: str, port: int) -> None:
    config = listener(f"announce: {announce}, {STUN}")
    assert config.is_auto
    assert config.announce[-1].address == Address("", port)
    assert config.announce[-1].is_auto


def test_name_that_begins_as_auto_is_a_name() -> None:
    config = listener("announce: auto.example")
    assert (config.is_auto, config.announce[0].address.host) == (False, "auto.example")


@pytest.mark.parametrize(
    "name, is_warned", [("atuo", True), ("Auot", True), ("box", False), ("atuo.example", False)]
)
def test_word_that_is_nearly_auto_is_warned_of(name: str, is_warned: bool) -> None:
    config = read(OPEN % f"announce: {name}")
    warning = (
        f"c.yaml:1:66: listeners[0].announce: '{name.lower()}' is taken for the name of a host "
        "(did you mean 'auto'?)"
    )
    assert (warning in config.warnings) is is_warned


def test_servers_have_a_default_port_and_no_duplicates() -> None:
    servers = (
        "stun.example, 'stun.example:19302', '2001:db8::1', '[2001:db8::1]:5000', stun.example"
    )
    assert listener(f"announce: auto, stun: [{servers}]").stun == (
        Address("stun.example", 3478),
        Address("stun.example", 19302),
        Address("2001:db8::1", 3478),
        Address("2001:db8::1", 5000),
    )


def test_nothing_is_asked_by_default() -> None:
    config = listener("name: main")
    assert (config.stun, config.port_mapping, config.is_auto) == ((), "off", False)


@pytest.mark.parametrize("protocol", ["pcp", "nat-pmp"])
def test_port_mapping_replaces_servers(protocol: str) -> None:
    config = listener(f"announce: auto, port_mapping: {protocol}")
    assert (config.port_mapping, config.stun) == (protocol, ())


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            "announce: auto",
            "announce: auto has nobody to ask: set stun (a list of STUN servers), "
            "or port_mapping: pcp or nat-pmp",
        ),
        (STUN, "stun: is of use for announce: auto alone"),
        (f"announce: 203.0.113.5, {STUN}", "stun: is of use for announce: auto alone"),
        (
            f"announce: auto, {STUN}, network: tcp",
            "announce: auto is for listeners with SOCKS5 UDP: "
            "their clients alone are told an address",
        ),
        (
            f"protocol: http, announce: auto, {STUN}",
            "announce: auto is for listeners with SOCKS5 UDP: "
            "their clients alone are told an address",
        ),
        (
            f"announce: auto, {STUN}, udp: {{relay_port: any}}",
            "announce: auto finds the address of one port: use it with udp.relay_port: shared",
        ),
        ("announce: auto, stun: [a, b, c, d, e]", "stun: has 5 servers (at most 4)"),
        ("announce: auto, stun: ['a b']", "stun[0]: 'a b' is not an address, address:port or"),
        ("announce: 'auto:0', " + STUN, "announce: must be host:port with a port between"),
        ("port_mapping: upnp", "port_mapping: 'upnp' is not one of pcp, nat-pmp, off"),
        (
            "protocol: redirect, port_mapping: pcp",
            "port_mapping: has no meaning for the protocol redirect",
        ),
    ],
)
def test_key_that_does_not_fit_is_an_error(keys: str, message: str) -> None:
    assert f"listeners[0].{message}" in error(OPEN % keys)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "listeners: [{listen: '127.0.0.1:1080', port_mapping: pcp}]",
            "port_mapping: others cannot reach the listener: listen on an address of the network",
        ),
        (
            "listeners: [{listen: 'unix:/run/a', port_mapping: pcp}]",
            "port_mapping: has no meaning for a UNIX socket",
        ),
        (
            "listeners: [{listen: '[2001:db8::1]:1080', allow_open: true, port_mapping: pcp}]",
            "port_mapping: is for IPv4: the listener has IPv6 addresses alone",
        ),
    ],
)
def test_port_that_no_router_can_map_is_an_error(text: str, message: str) -> None:
    assert message in error(text)


@pytest.mark.parametrize("listen", ["192.168.1.7:1080", "[::]:1080", ":1080", "box.example:1080"])
def test_port_with_ipv4_can_be_mapped(listen: str) -> None:
    config = read(
        f"listeners: [{{listen: '{listen}', allow_open: true, port_mapping: pcp, protocol: tcp, "
        "target: '10.0.0.1:22'}]"
    )
    assert config.listeners[0].port_mapping == "pcp"


def test_check_shows_what_will_be_found() -> None:
    announce = "announce: [{clients: 10.0.0.0/8, interface: lo}, auto]"
    assert described(OPEN % f"{announce}, port_mapping: pcp, stun: [a, 'b:1']")[0] == (
        "listen 0.0.0.0:1080 tcp+udp sps 'sps-1080' upstream direct, ports mapped by pcp, "
        "announces the address of lo, announces its public address as seen by a:3478, b:1"
    )


def test_public_address_of_a_loopback_listener_is_warned_of() -> None:
    config = read("listeners: [{listen: '127.0.0.1:1080', announce: auto}]")
    assert config.warnings == (
        "c.yaml:1:50: listeners[0].announce: auto has no effect: "
        "only this machine reaches the listener",
    )
