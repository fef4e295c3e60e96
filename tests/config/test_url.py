"""Addresses and URLs in command-line options and in the file."""

from __future__ import annotations

from typing import Callable

import re

import pytest

from netproxy.config.schema import HopConfig
from netproxy.config.url import (
    listener_node,
    parse_announce,
    parse_hop,
    parse_host_port,
    parse_listen,
)
from netproxy.interfaces.addresses import ActivationAddress, Address, UnixAddress
from tests.config.reading import plain

EXPECTED_SCHEMES = (
    "(expected one of socks4, socks4a, socks5, socks5h, http, https, socks5+tls, socks5h+tls, "
    "tunnel)"
)
UNIX_EXPECTED = "what follows 'unix:' is not the path of a socket (at most 107 bytes)"


class TestListen:
    @pytest.mark.parametrize(
        "text, addresses",
        [
            ("127.0.0.1:1080", [("127.0.0.1", 1080)]),
            (":1080", [("::", 1080)]),
            ("[::1]:1080", [("::1", 1080)]),
            ("0.0.0.0:0", [("0.0.0.0", 0)]),
            ("localhost:80", [("127.0.0.1", 80)]),
            (
                "127.0.0.1:8000-8002",
                [("127.0.0.1", 8000), ("127.0.0.1", 8001), ("127.0.0.1", 8002)],
            ),
            ("[::]:65535", [("::", 65535)]),
        ],
    )
    def test_listen_address_is_parsed(self, text: str, addresses: list[tuple[str, int]]) -> None:
        assert list(parse_listen(text)) == [Address(*address) for address in addresses]

    def test_listen_address_of_an_activated_socket_is_parsed(self) -> None:
        (activated,) = parse_listen("systemd:main.tcp")
        assert (type(activated), activated.name, str(activated)) == (
            ActivationAddress,
            "main.tcp",
            "systemd:main.tcp",
        )

    def test_host_named_systemd_is_a_host(self) -> None:
        assert parse_listen("systemd:1080") == (Address("systemd", 1080),)

    @pytest.mark.parametrize(
        "text",
        [
            "systemd:",
            "systemd:a:b",
            "systemd:a b",
            "",
            "1080",
            "127.0.0.1",
            "::1:1080",
            "127.0.0.1:",
            "127.0.0.1:x",
            "127.0.0.1:-1",
            "[::1]",
            "[]:1080",
            "[127.0.0.1]:1080",
            "[localhost]:1080",
            "[::1:80",
            "a:1-2-3",
        ],
    )
    def test_invalid_listen_address_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="is not an address to listen on"):
            parse_listen(text)

    @pytest.mark.parametrize(
        "text, why",
        [
            ("127.0.0.1:65536", "port 65536 is above 65535"),
            ("127.0.0.1:99999", "port 99999 is above 65535"),
            ("127.0.0.1:65530-65536", "port 65536 is above 65535"),
            ("127.0.0.1:65536-1", "port 65536 is above 65535"),
            ("127.0.0.1:2-1", "the range of ports ends before it begins (write 1-2)"),
        ],
    )
    def test_invalid_listen_port_is_refused(self, text: str, why: str) -> None:
        with pytest.raises(ValueError, match=re.escape(f"'{text}': {why}")):
            parse_listen(text)


class TestHostPort:
    @pytest.mark.parametrize(
        "text, address",
        [
            ("10.0.0.5:22", ("10.0.0.5", 22)),
            ("[2001:db8::1]:22", ("2001:db8::1", 22)),
            ("Example.COM:443", ("example.com", 443)),
        ],
    )
    def test_host_port_is_parsed(self, text: str, address: tuple[str, int]) -> None:
        assert parse_host_port(text) == Address(*address)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "host",
            ":22",
            "host:0",
            "host:65536",
            "host:1-2",
            "ho st:1",
            "a..b:1",
            "-:",
            "host:x",
            "b\u00fccher:1",
            "a/b:1",
            "a\nb:1",
            "host:1\n",
            "[]:1",
        ],
    )
    def test_invalid_host_port_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="must be host:port with a port between 1 and 65535"):
            parse_host_port(text)


class TestAnnounce:
    @pytest.mark.parametrize(
        "text, address",
        [
            ("203.0.113.5", ("203.0.113.5", 0)),
            ("203.0.113.5:1080", ("203.0.113.5", 1080)),
            ("2001:db8::1", ("2001:db8::1", 0)),
            ("[2001:db8::1]", ("2001:db8::1", 0)),
            ("[2001:db8::1]:1080", ("2001:db8::1", 1080)),
            ("Proxy.example", ("proxy.example", 0)),
            ("proxy.example:1080", ("proxy.example", 1080)),
        ],
    )
    def test_announce_address_is_parsed(self, text: str, address: tuple[str, int]) -> None:
        assert parse_announce(text) == Address(*address)

    @pytest.mark.parametrize(
        "text", ["", "a b", "[]", "host:", "host:0", "host:x", "203.0.113.5:65536", "a/b"]
    )
    def test_invalid_announce_address_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError):
            parse_announce(text)

    @pytest.mark.parametrize("text", ["a:b:c", "::zz", "[a:b:c]", "1:2:3:4:5:6:7:8:9"])
    def test_colons_alone_are_not_an_ipv6_address(self, text: str) -> None:
        """Clients would be told such an address as a host name."""
        with pytest.raises(ValueError):
            parse_announce(text)


class TestHop:
    @pytest.mark.parametrize(
        "text, hop",
        [
            ("direct", HopConfig("direct")),
            ("block", HopConfig("block")),
            ("socks5://10.0.0.1:1080", HopConfig("socks5", Address("10.0.0.1", 1080))),
            ("socks5h://[::1]:1080/", HopConfig("socks5h", Address("::1", 1080))),
            ("http://Proxy.example:3128", HopConfig("http", Address("proxy.example", 3128))),
            ("socks5://user:pass@h:1", HopConfig("socks5", Address("h", 1), "user", "pass")),
            ("http://user@h:1", HopConfig("http", Address("h", 1), "user", "")),
            ("http://u%40x:p%3A%2F%25@h:1", HopConfig("http", Address("h", 1), "u@x", "p:/%")),
            ("http://u:a:b@h:1", HopConfig("http", Address("h", 1), "u", "a:b")),
            ("http://u:%C3%BC@h:1", HopConfig("http", Address("h", 1), "u", "\u00fc")),
            ("http://u:\u00fc@h:1", HopConfig("http", Address("h", 1), "u", "\u00fc")),
            ("socks5h://unix:/run/a.sock", HopConfig("socks5h", UnixAddress.of("/run/a.sock"))),
            ("http://unix:@name", HopConfig("http", UnixAddress.of("@name"))),
            ("http://u:p@unix:/a", HopConfig("http", UnixAddress.of("/a"), "u", "p")),
            ("https://u:@unix:/a%20b@c%3F", HopConfig("https", UnixAddress.of("/a b@c?"), "u", "")),
        ],
    )
    def test_hop_url_is_parsed(self, text: str, hop: HopConfig) -> None:
        assert parse_hop(text) == hop

    @pytest.mark.parametrize(
        "text, message",
        [
            ("", "not an upstream: write scheme://host:port, direct or block"),
            (
                "10.0.0.1:1080",
                "not an upstream: write scheme://host:port, direct or block "
                "(the scheme is missing: socks5://... or http://...)",
            ),
            (
                "socks5://u:p@ss#1@h:1",
                "not an upstream: write scheme://host:port, direct or block (in a user name or "
                "password, / is written as %2F, ? as %3F, # as %23)",
            ),
            (
                "socks5://fd00::1:1080",
                "must be host:port with a port between 1 and 65535 "
                "(an IPv6 address in brackets: [v6]:port)",
            ),
            ("socks5://h:1/path", "not an upstream: write scheme://host:port, direct or block"),
            ("sock5://h:1", "'sock5' is not an upstream scheme (did you mean 'socks5'?)"),
            (
                "socks5-tls://h:1",
                "'socks5-tls' is not an upstream scheme (did you mean 'socks5+tls'?)",
            ),
            ("htpp://h:1", "'htpp' is not an upstream scheme (did you mean 'http'?)"),
            ("direct://h:1", "write direct without '://'"),
            (
                "socks5+unix:///run/a.sock",
                "not an upstream: write scheme://host:port, direct or block "
                "(a UNIX socket is written scheme://unix:/path)",
            ),
            *(
                (f"http://u:secret@unix:{path}", UNIX_EXPECTED)
                for path in ("/", "/a/", "@", "/" + "a" * 107)
            ),
            (
                "http://unix:run/a.sock",
                "not an upstream: write scheme://host:port, direct or block",
            ),
            *(
                (f"{scheme}://h:1", f"'{scheme}' is not an upstream scheme {EXPECTED_SCHEMES}")
                for scheme in ("ssh", "ftp", "ss", "quic", "trojan")
            ),
            ("http://h:1?x=y", "write what follows the '?' as keys beside the url"),
            ("http://h", "must be host:port with a port between 1 and 65535"),
            ("http://u:secret@h", "must be host:port with a port between 1 and 65535"),
            ("http://u:%ff@h:1", "a %-escape is not UTF-8"),
            ("socks5://secret@h:1", "SOCKS5 takes a user and a password of 1 to 255 bytes each"),
            ("socks5://:secret@h:1", "SOCKS5 takes a user and a password of 1 to 255 bytes each"),
            (
                "socks5://u:" + "x" * 256 + "@h:1",
                "SOCKS5 takes a user and a password of 1 to 255 bytes each",
            ),
        ],
    )
    def test_invalid_hop_url_error_holds_no_secret(self, text: str, message: str) -> None:
        """Hazard 111: a password is in no message."""
        with pytest.raises(ValueError) as caught:
            parse_hop(text)
        assert str(caught.value) == message
        assert "secret" not in str(caught.value)

    def test_password_length_counts_bytes(self) -> None:
        """The file is refused, not the first dial."""
        with pytest.raises(ValueError, match="SOCKS5 takes"):
            parse_hop("socks5://u:" + "\u00fc" * 200 + "@h:1")

    def test_password_length_counts_decoded_escapes(self) -> None:
        assert parse_hop("socks5://u:" + "%40" * 100 + "@h:1").password == "@" * 100

    def test_hop_repr_holds_no_password(self) -> None:
        assert "secret" not in repr(parse_hop("http://u:secret@h:1"))


class TestListenerUrl:
    @pytest.mark.parametrize(
        "text, tree",
        [
            ("sps://127.0.0.1:1080", {"protocol": "sps", "listen": "127.0.0.1:1080"}),
            ("http://:8080/", {"protocol": "http", "listen": ":8080"}),
            ("sps://unix:/run/a.sock", {"protocol": "sps", "listen": "unix:/run/a.sock"}),
            ("socks5://[::1]:1080", {"protocol": "socks5", "listen": "[::1]:1080"}),
            (
                "sps://:1080?announce=203.0.113.5",
                {"protocol": "sps", "listen": ":1080", "announce": "203.0.113.5"},
            ),
            (
                "sps://:1?clients=10.0.0.0/8,fd00::/8&auth=none",
                {
                    "protocol": "sps",
                    "listen": ":1",
                    "clients": ["10.0.0.0/8", "fd00::/8"],
                    "auth": "none",
                },
            ),
            (
                "sps://:1?udp.relay_port=any&udp.idle_timeout=2m&limits.connections=5",
                {
                    "protocol": "sps",
                    "listen": ":1",
                    "udp": {"relay_port": "any", "idle_timeout": "2m"},
                    "limits": {"connections": "5"},
                },
            ),
            (
                "tcp://:2222?target=10.0.0.5:22",
                {"protocol": "tcp", "listen": ":2222", "target": "10.0.0.5:22"},
            ),
            ("sps://:1?name=a%20b", {"protocol": "sps", "listen": ":1", "name": "a b"}),
            ("sps://:1?", {"protocol": "sps", "listen": ":1"}),
        ],
    )
    def test_listener_url_gives_a_mapping(self, text: str, tree: dict[str, object]) -> None:
        assert plain(listener_node(text, "-l")) == tree

    @pytest.mark.parametrize(
        "text, message",
        [
            ("127.0.0.1:1080", "not a listener: write scheme://host:port (sps://127.0.0.1:1080)"),
            (":1080", "not a listener: write scheme://host:port (sps://:1080)"),
            (
                "1080",
                "not a listener: write scheme://host:port "
                "(sps://127.0.0.1:1080 for this machine alone, sps://:1080 for others too)",
            ),
            ("", "not a listener: write scheme://host:port"),
            (
                "sps://u:secret@127.0.0.1:1",
                "a listener's URL takes no user: write 'users' into a file",
            ),
            ("sps://:1?auth=none&auth=none", "'auth' is given twice"),
            ("sps://:1?protocol=http", "'protocol' is given twice"),
            ("sps://:1?udp=x&udp.relay_port=any", "'udp' is given twice"),
            ("sps://:1?udp.relay_port=any&udp=x", "'udp' is given twice"),
        ],
    )
    def test_invalid_listener_url_is_refused(self, text: str, message: str) -> None:
        with pytest.raises(ValueError) as caught:
            listener_node(text, "-l")
        assert str(caught.value) == message


class TestOtherDigits:
    """Digits of other alphabets, which int() would read."""

    @pytest.mark.parametrize("parse", [parse_listen, parse_host_port, parse_announce])
    def test_port_is_not_written_with_them(self, parse: Callable[[str], object]) -> None:
        with pytest.raises(ValueError):
            parse("127.0.0.1:\uff18\uff10")

    def test_port_of_a_hop_is_not_written_with_them(self) -> None:
        with pytest.raises(ValueError):
            parse_hop("http://127.0.0.1:\u0668\u0660")


class TestCharacters:
    def test_nul_in_a_value_is_refused(self) -> None:
        with pytest.raises(ValueError, match="a NUL character"):
            listener_node("sps://127.0.0.1:80?tls.key=%00", "-l")

    def test_argument_that_is_not_utf_8_is_refused(self) -> None:
        with pytest.raises(ValueError, match="not UTF-8"):
            listener_node("sps://127.0.0.1:80?name=\udcff", "-l")

    def test_announced_host_has_no_nul(self) -> None:
        with pytest.raises(ValueError, match="is not an address"):
            parse_announce("a\x001")
