"""Flows as people write them for explain and test."""

from __future__ import annotations

import pytest

from netproxy.admin.diagnosis.flow_text import FlowError, parse_flow
from netproxy.config.schema import Config, ListenerConfig
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow

CLIENT = Address("127.0.0.1", 0)


def test_whole_flow_is_parsed_and_nothing_assumed() -> None:
    asked = parse_flow("udp alice@192.168.1.5 -> Example.COM:443 on main")
    assert asked.flow == Flow(
        "udp", Address("192.168.1.5", 0), Address("example.com", 443), "main", "alice"
    )
    assert (asked.scheme, asked.assumed) == ("", ())


@pytest.mark.parametrize(
    "text, target, scheme, assumed",
    [
        ("10.0.0.1:80", Address("10.0.0.1", 80), "", ()),
        (" -> 10.0.0.1:80 ", Address("10.0.0.1", 80), "", ()),
        ("Example.com", Address("example.com", 443), "", ("port 443",)),
        ("[::1]:53", Address("::1", 53), "", ()),
        ("[::1]", Address("::1", 443), "", ("port 443",)),
        ("2001:db8::1", Address("2001:db8::1", 443), "", ("port 443",)),
        ("https://x.example/", Address("x.example", 443), "https", ()),
        ("HTTP://u:p@x.example?q=a:b", Address("x.example", 80), "http", ()),
        ("https://[::1]:8443/a@b", Address("::1", 8443), "https", ()),
        ("socks5://x.example:1080", Address("x.example", 1080), "socks5", ()),
    ],
)
def test_target_alone_is_completed(
    text: str, target: Address, scheme: str, assumed: tuple[str, ...]
) -> None:
    asked = parse_flow(text)
    assert asked.flow == Flow("tcp", CLIENT, target, "", "")
    assert asked.scheme == scheme
    assert asked.assumed == ("network tcp", *assumed, "client 127.0.0.1")


@pytest.mark.parametrize("word, command", [("http", "http"), ("bind", "bind"), ("tcp", "connect")])
def test_command_over_tcp_stands_in_place_of_the_network(word: str, command: str) -> None:
    flow = parse_flow(f"{word} alice@10.0.0.1 -> 10.0.0.2:80").flow
    assert (flow.network, flow.command, flow.user) == ("tcp", command, "alice")


def test_http_request_without_a_port_is_for_port_80() -> None:
    asked = parse_flow("http x.example")
    assert (asked.flow.target.port, asked.assumed) == (80, ("port 80", "client 127.0.0.1"))


def test_target_without_an_arrow_takes_a_network_and_a_listener() -> None:
    assert parse_flow("udp b.example:53 on guests").flow == Flow(
        "udp", CLIENT, Address("b.example", 53), "guests", ""
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a:65536",
        "a b:80",
        "alice@a:80",
        "a->b:80",
        "-> a:65536",
        "-> a b:80",
        "-> a\0b:80",
        "gopher://a/",
        "https://",
        "[::1",
        "a..b",
        # Bytes of an argument that are not UTF-8, and an escape of half a character in JSON.
        "-> \udcff:80",
        "10\ud800.0.0.1 -> a:80",
        "-> a:\uff18\uff10",
    ],
)
def test_anything_else_is_an_error(text: str) -> None:
    with pytest.raises(FlowError):
        parse_flow(text)


def listener(name: str, protocol: str, *network: str) -> ListenerConfig:
    return ListenerConfig(protocol, (Address("127.0.0.1", 1),), name, network)


@pytest.mark.parametrize("network, name", [("tcp", "web"), ("udp", "main")])
def test_first_listener_whose_clients_name_targets_is_assumed(network: str, name: str) -> None:
    config = Config(
        (
            listener("names", "dns", "tcp", "udp"),
            listener("web", "http", "tcp"),
            listener("main", "sps", "tcp", "udp"),
        )
    )
    asked = parse_flow(f"{network} 10.0.0.1 -> a:1").on_default_listener(config, ("names", "web"))
    assert (asked.flow.listener, asked.assumed) == (name, (f"listener {name}",))


def test_any_listener_is_better_than_none() -> None:
    config = Config((listener("names", "dns", "tcp", "udp"),))
    assert parse_flow("a").on_default_listener(config, ("names", "web")).flow.listener == "names"
    assert parse_flow("a on b").on_default_listener(config, ("names", "web")).flow.listener == "b"
    assert parse_flow("a").on_default_listener(Config(()), ("agent",)).flow.listener == "agent"
    assert parse_flow("a").on_default_listener(Config(()), ()).assumed[-1] != "listener "
