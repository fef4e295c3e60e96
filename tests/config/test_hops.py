"""Hops in the file: every scheme and option, and the place and words of every error."""

from __future__ import annotations

from typing import Any

import pytest

from netproxy.config.schema import HopConfig, UpstreamConfig, UpstreamTlsConfig
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.routing import Bind
from tests.config.reading import H1, default, default_errors, errors, read

pytest.importorskip("yaml")

NO_BIND = "is neither an address, a prefix, an interface nor incoming"
ETH0 = Bind("eth0", device="eth0")


def hop(text: str) -> HopConfig:
    """Return the only hop of `default: TEXT`."""
    (step,) = default(text).steps
    assert isinstance(step, HopConfig)
    return step


class TestHop:
    @pytest.mark.parametrize(
        "text, expected",
        [
            ("direct", HopConfig("direct")),
            ("block", HopConfig("block")),
            ("http://h1:1", H1),
            ("HTTP://h1:1", None),
            ("http://H1:1/", H1),
            ("socks4://user@h1:1", HopConfig("socks4", Address("h1", 1), "user")),
            ("socks4a://h1:1", HopConfig("socks4a", Address("h1", 1))),
            (
                "socks5://u:p@10.0.0.1:1080",
                HopConfig("socks5", Address("10.0.0.1", 1080), "u", "p"),
            ),
            ("socks5h://[2001:db8::1]:1080", HopConfig("socks5h", Address("2001:db8::1", 1080))),
            ("https://u:p%40ss@h1:1", HopConfig("https", Address("h1", 1), "u", "p@ss")),
            ("socks5+tls://h1:1", HopConfig("socks5+tls", Address("h1", 1))),
            ("socks5h+tls://h1:1", HopConfig("socks5h+tls", Address("h1", 1))),
        ],
    )
    def test_hop_is_written_as_url_mapping_or_chain(
        self, text: str, expected: HopConfig | None
    ) -> None:
        """A scheme must be in lower case; a host is converted to lower case."""
        if expected is None:
            assert default_errors(f"'{text}'") == [
                "c.yaml:1:10: default: not an upstream: write scheme://host:port, direct or block"
            ]
        else:
            assert default(f"'{text}'") == UpstreamConfig((expected,))
            assert default(f"{{url: '{text}'}}") == UpstreamConfig((expected,))
            assert default(f"['{text}']") == UpstreamConfig((expected,))

    @pytest.mark.parametrize(
        "keys, query, field, value",
        [
            ("udp: uot", "udp=uot", "udp", "uot"),
            ("udp: none", "udp=none", "udp", "none"),
            ("udp: connect-udp", "udp=connect-udp", "udp", "connect-udp"),
            ("udp: auto", "udp=auto", "udp", "auto"),
            ("timeout: 1h30m", "timeout=1h30m", "timeout", 5400.0),
            ("bind: 192.0.2.1", "bind=192.0.2.1", "bind", Bind("192.0.2.1", "192.0.2.1")),
            ("bind: '2001:db8::1'", "bind=2001:db8::1", "bind", Bind("2001:db8::1", "2001:db8::1")),
            ("bind: eth0.100", "bind=eth0.100", "bind", Bind("eth0.100", device="eth0.100")),
            ("mark: 255", "mark=255", "mark", 255),
            ("mark: 0xff", "mark=0xff", "mark", 255),
            ("mark: 4294967295", "mark=4294967295", "mark", 0xFFFFFFFF),
            ("keepalive: 90s", "keepalive=90s", "keepalive", 90.0),
            ("keepalive: 0", "keepalive=0", "keepalive", 0.0),
            ("tls: {ca: /a b.pem}", "tls.ca=/a%20b.pem", "tls", UpstreamTlsConfig(ca="/a b.pem")),
            (
                "tls: {certificate: c, key: k}",
                "tls.certificate=c&tls.key=k",
                "tls",
                UpstreamTlsConfig(certificate="c", key="k"),
            ),
            (
                "tls: {certificate: c}",
                "tls.certificate=c",
                "tls",
                UpstreamTlsConfig(certificate="c"),
            ),
            (
                "tls: {server_name: n}",
                "tls.server_name=n",
                "tls",
                UpstreamTlsConfig(server_name="n"),
            ),
            ("tls: {insecure: true}", "tls.insecure=true", "tls", UpstreamTlsConfig(insecure=True)),
            ("tls: {insecure: false}", "tls.insecure=false", "tls", UpstreamTlsConfig()),
        ],
    )
    def test_hop_option_is_a_key_or_a_query_parameter(
        self, keys: str, query: str, field: str, value: Any
    ) -> None:
        expected = HopConfig("https", Address("h", 1), "u", "secret")._replace(**{field: value})
        assert hop(f"{{url: 'https://u:secret@h:1', {keys}}}") == expected
        assert hop(f"'https://u:secret@h:1?{query}'") == expected

    def test_hop_takes_all_options_at_once(self) -> None:
        url = (
            "'socks5h+tls://u:p@h:1?udp=none&timeout=2s&bind=eth0&mark=0x10&keepalive=30s"
            "&send_proxy=v1"
            "&tls.ca=a&tls.certificate=c&tls.key=k&tls.server_name=n&tls.insecure=true'"
        )
        assert hop(url) == HopConfig(
            "socks5h+tls",
            Address("h", 1),
            "u",
            "p",
            "none",
            2.0,
            ETH0,
            16,
            30.0,
            "v1",
            UpstreamTlsConfig("a", "c", "k", "n", True),
        )

    def test_hop_without_options_has_the_defaults(self) -> None:
        assert H1 == HopConfig(
            "http", Address("h1", 1), "", "", "auto", None, None, 0, None, "", UpstreamTlsConfig()
        )
        assert hop("{url: 'http://h1:1'}") == H1

    @pytest.mark.parametrize("scheme", ["direct", "block"])
    def test_direct_and_block_take_socket_options(self, scheme: str) -> None:
        assert hop(f"{{url: {scheme}, bind: eth0, mark: 1, keepalive: 0}}") == HopConfig(
            scheme, bind=ETH0, mark=1, keepalive=0.0
        )


class TestHopErrors:
    @pytest.mark.parametrize(
        "text, message",
        [
            ("''", "10: default: not an upstream: write scheme://host:port, direct or block"),
            (
                "'h:1'",
                "10: default: not an upstream: write scheme://host:port, direct or "
                "block (the scheme is missing: socks5://... or http://...)",
            ),
            ("[]", "10: default: names no upstream"),
            ("{}", "10: default: needs url, members or command"),
            ("{balance: failover}", "10: default: needs url, members or command"),
            ("{udp: none, timout: 3s}", "10: default: needs url, members or command"),
            (
                "{url: ''}",
                "16: default.url: not an upstream: write scheme://host:port, direct or block",
            ),
            ("{url: ['http://h:1']}", "16: default.url: must be a single value"),
            (
                "{url: 'http://h:1?udp=none'}",
                "16: default.url: write what follows the '?' as keys beside the url",
            ),
            (
                "{url: 'sock5://h:1'}",
                "16: default.url: 'sock5' is not an upstream scheme (did you mean 'socks5'?)",
            ),
            ("'http://h'", "10: default: must be host:port with a port between 1 and 65535"),
            ("'http://h:0'", "10: default: must be host:port with a port between 1 and 65535"),
            (
                "'http://h:65536?udp=none'",
                "10: default.url: must be host:port with a port between 1 and 65535",
            ),
            ("'http://a b:1'", "10: default: must be host:port with a port between 1 and 65535"),
            (
                "'socks5://u@h:1'",
                "10: default: SOCKS5 takes a user and a password of 1 to 255 bytes each",
            ),
            (
                "'socks5://:p@h:1'",
                "10: default: SOCKS5 takes a user and a password of 1 to 255 bytes each",
            ),
            (
                "'socks5h+tls://u@h:1'",
                "10: default: SOCKS5 takes a user and a password of 1 to 255 bytes each",
            ),
            (
                "'socks4://u:secret@h:1'",
                "10: default: SOCKS4 takes a user of up to 255 bytes, and no password",
            ),
            (
                "'socks4a://:secret@h:1'",
                "10: default: SOCKS4 takes a user of up to 255 bytes, and no password",
            ),
            (
                "'socks4://a%00b@h:1'",
                "10: default: SOCKS4 takes a user of up to 255 bytes, and no password",
            ),
            ("'http://%ff@h:1'", "10: default: a %-escape is not UTF-8"),
            ("'direct?bind=eth0'", None),
            ("'http://h:1?timout=1s'", "10: default.timout: unknown key (did you mean 'timeout'?)"),
            ("'http://h:1?udp=none&udp=uot'", "10: default: 'udp' is given twice"),
            ("'http://h:1?url=http://h:2'", "10: default: 'url' is given twice"),
            ("'https://h:1?tls.ca=a&tls.ca=b'", "10: default: 'ca' is given twice"),
            ("'https://h:1?tls=x&tls.ca=b'", "10: default: 'tls' is given twice"),
            ("'https://h:1?tls=x'", "10: default.tls must be a mapping of keys to values"),
            ("'https://h:1?tls.caa=x'", "10: default.tls.caa: unknown key (did you mean 'ca'?)"),
        ],
    )
    def test_hop_url_error_has_place_and_words(self, text: str, message: str | None) -> None:
        if message is None:
            assert hop(text) == HopConfig("direct", bind=ETH0)
        else:
            assert default_errors(text) == [f"c.yaml:1:{message}"]

    @pytest.mark.parametrize(
        "keys, message",
        [
            (
                "udp: ^no",
                "udp: 'no' is not one of auto, connect-udp, uot, none (did you mean 'none'?)",
            ),
            ("^upd: none", "upd: unknown key (did you mean 'udp'?)"),
            ("^weight: 3", "weight: unknown key"),
            (
                "timeout: ^5",
                "timeout: '5' has no unit: write 5s for seconds or 5ms for milliseconds",
            ),
            ("timeout: ^0", "timeout: must be longer than 0"),
            ("timeout: ^[1s]", "timeout: must be a single value"),
            ("bind: ^'a b'", f"bind: 'a b' {NO_BIND}"),
            ("bind: ^''", f"bind: '' {NO_BIND}"),
            ("bind: ^'eth0:1'", f"bind: 'eth0:1' {NO_BIND}"),
            ("bind: ^a/b", f"bind: 'a/b' {NO_BIND}"),
            ("bind: ^sixteen-letters.", f"bind: 'sixteen-letters.' {NO_BIND}"),
            ("bind: ^'2001:db8::g'", f"bind: '2001:db8::g' {NO_BIND}"),
            ("mark: ^0", "mark: '0' is not a mark (expected a number above 0, decimal or 0x...)"),
            ("mark: ^-1", "mark: '-1' is not a mark (expected a number above 0, decimal or 0x...)"),
            ("mark: ^ff", "mark: 'ff' is not a mark (expected a number above 0, decimal or 0x...)"),
            (
                "mark: ^4294967296",
                "mark: '4294967296' is not a mark (expected a number above 0, decimal or 0x...)",
            ),
            (
                "keepalive: ^soon",
                "keepalive: 'soon' is not a duration (expected 500ms, 30s, 5m, 2h, 1d or 1h30m)",
            ),
            ("tls: ^x", "tls must be a mapping of keys to values"),
            (
                "tls: ^[a]",
                "tls must be a mapping of keys to values (write the keys without '- ' before them)",
            ),
            ("tls: ^{key: k}", "tls.certificate: is missing"),
            ("tls: {insecure: ^yes}", "tls.insecure: 'yes' is not one of true, false"),
            ("tls: {^cert: c}", "tls.cert: unknown key (did you mean 'certificate'?)"),
            (
                "tls: {^server-name: n}",
                "tls.server-name: unknown key (did you mean 'server_name'?)",
            ),
        ],
    )
    def test_hop_option_error_has_place_and_words(self, keys: str, message: str) -> None:
        """`^` stands before the place of the error."""
        before = "default: {url: 'https://h:1', "
        assert errors(f"{before}{keys.replace('^', '')}}}") == [
            f"c.yaml:1:{len(before) + keys.index('^') + 1}: default.{message}"
        ]

    @pytest.mark.parametrize("keys", ["tls: {}", "tls: ''", "tls: "])
    def test_empty_tls_mapping_is_accepted(self, keys: str) -> None:
        assert hop(f"{{url: 'https://h:1', {keys}}}") == HopConfig("https", Address("h", 1))

    def test_mapping_with_url_and_members_is_refused(self) -> None:
        assert default_errors("{url: 'http://h:1', members: ['http://h:2']}") == [
            "c.yaml:1:11: default.url: unknown key"
        ]

    @pytest.mark.parametrize("text", ["1_0", "+5", "0b11", "0o17", " 7", "\u0667"])
    def test_mark_that_only_int_accepts_is_refused(self, text: str) -> None:
        """Hazard 1.2: int() accepts more than users mean."""
        assert default_errors(f"{{url: 'http://h:1', mark: '{text}'}}") == [
            f"c.yaml:1:36: default.mark: '{text}' is not a mark "
            "(expected a number above 0, decimal or 0x...)"
        ]

    def test_invalid_address_is_not_taken_for_an_interface(self) -> None:
        assert default_errors("{url: 'http://h:1', bind: 10.0.0.256}") == [
            f"c.yaml:1:36: default.bind: '10.0.0.256' {NO_BIND}"
        ]

    @pytest.mark.parametrize("name", [".proxy.example", "proxy..example"])
    def test_invalid_server_name_is_refused(self, name: str) -> None:
        """A TLS handshake cannot ask for such a name: the file is refused, not the first dial."""
        assert len(default_errors(f"{{url: 'https://h:1', tls: {{server_name: '{name}'}}}}")) == 1

    @pytest.mark.parametrize(
        "scheme, tls",
        [
            ("https", True),
            ("socks5+tls", True),
            ("socks5h+tls", True),
            ("http", False),
            ("socks4", False),
            ("socks4a", False),
            ("socks5", False),
            ("socks5h", False),
        ],
    )
    def test_tls_options_need_a_scheme_with_tls(self, scheme: str, tls: bool) -> None:
        text = f"{{url: '{scheme}://h:1', tls: {{ca: x}}}}"
        if tls:
            assert hop(text).tls.ca == "x"
        else:
            assert default_errors(text) == [
                f"c.yaml:1:{31 + len(scheme)}: default.tls: the scheme {scheme} has no TLS "
                "(use https or socks5+tls)"
            ]

    @pytest.mark.parametrize("scheme", ["socks4", "socks5", "socks5h+tls"])
    def test_connect_udp_is_for_http(self, scheme: str) -> None:
        text = f"{{url: '{scheme}://h:1', udp: connect-udp}}"
        assert default_errors(text) == [
            f"c.yaml:1:{31 + len(scheme)}: default.udp: connect-udp is for http and https, "
            f"not for {scheme}"
        ]

    @pytest.mark.parametrize("scheme", ["direct", "block"])
    @pytest.mark.parametrize(
        "keys, message",
        [
            ("udp: none", "udp: {} is not a proxy"),
            ("udp: uot", "udp: {} is not a proxy"),
            ("udp: connect-udp", "udp: {} is not a proxy"),
            ("timeout: 1s", "timeout: {} is not a proxy"),
            ("tls: {ca: x}", "tls: the scheme {} has no TLS (use https or socks5+tls)"),
        ],
    )
    def test_direct_and_block_refuse_options_of_a_proxy(
        self, scheme: str, keys: str, message: str
    ) -> None:
        assert default_errors(f"{{url: {scheme}, {keys}}}") == [
            f"c.yaml:1:{17 + len(f'{scheme}, {keys.split()[0]}')}: default.{message.format(scheme)}"
        ]


class TestInsecure:
    @pytest.mark.parametrize(
        "text, path",
        [
            ("default: {url: 'https://h:1', tls: {insecure: true}}", "47: default.tls"),
            ("default: 'https://h:1?tls.insecure=true'", "10: default.tls"),
            ("upstreams: {a: 'socks5+tls://h:1?tls.insecure=true'}", "16: upstreams.a.tls"),
            (
                "default: {members: [{via: {url: 'https://h:1', tls: {insecure: true}}}]}",
                "64: default.members[0].via.tls",
            ),
            (
                "listeners: [{listen: '127.0.0.1:1', upstream: 'https://h:1?tls.insecure=true'}]",
                "47: listeners[0].upstream.tls",
            ),
        ],
    )
    def test_insecure_tls_gives_a_warning(self, text: str, path: str) -> None:
        assert read(text).warnings == (
            f"c.yaml:1:{path}.insecure: the certificate of h:1 is not checked: "
            "any server that answers there can read all traffic",
        )


class TestDirect:
    def test_datagrams_may_go_directly_to_the_agents_of_a_bridge(self) -> None:
        assert hop("{url: 'https://h1:1', direct: true}").direct
        assert hop("'https://h1:1?direct=true'").direct and not hop("'https://h1:1'").direct

    @pytest.mark.parametrize(
        "text",
        [
            "{url: 'http://h1:1', direct: true}",
            "{url: 'socks5+tls://h1:1', direct: true}",
            "{url: 'https://h1:1', udp: none, direct: true}",
        ],
    )
    def test_direct_needs_connect_udp_within_tls(self, text: str) -> None:
        (message,) = default_errors(text)
        assert message.endswith(
            "direct: needs the scheme https and connect-udp, by which the bridge tells the keys"
        )


class TestSendProxy:
    @pytest.mark.parametrize("version", ["v1", "v2"])
    def test_version_is_an_option_of_a_proxy(self, version: str) -> None:
        expected = H1._replace(send_proxy=version)
        assert hop(f"{{url: 'http://h1:1', send_proxy: {version}}}") == expected
        assert hop(f"'http://h1:1?send_proxy={version}'") == expected

    def test_other_value_is_an_error(self) -> None:
        (message,) = default_errors("{url: 'http://h1:1', send_proxy: v3}")
        assert message == "c.yaml:1:43: default.send_proxy: 'v3' is not one of v1, v2"

    @pytest.mark.parametrize("scheme", ["direct", "block"])
    def test_upstream_without_proxy_has_no_header(self, scheme: str) -> None:
        (message,) = default_errors(f"{{url: {scheme}, send_proxy: v2}}")
        assert message.endswith(
            f"default.send_proxy: {scheme} is not a proxy "
            "(a tcp listener has send_proxy for its target)"
        )

    def test_tunnel_has_no_header(self) -> None:
        agents = "tunnel: {bridge: {listen: 'tcp://127.0.0.1:7000', agents: {a: {token: t}}}}"
        (message,) = default_errors("{url: 'tunnel://a', send_proxy: v2}", agents)
        assert "default.send_proxy: a tunnel takes no header" in message

    def test_listener_with_clients_that_name_their_targets_has_no_header(self) -> None:
        (message,) = errors("listeners: [{listen: '127.0.0.1:1', send_proxy: v2}]")
        assert message.endswith("send_proxy: has no meaning for the protocol sps")
        listener = "{protocol: tcp, listen: '127.0.0.1:1', target: 'h:1', send_proxy: v1}"
        assert read(f"listeners: [{listener}]").listeners[0].send_proxy == "v1"


class TestCommand:
    def test_command_is_an_upstream(self) -> None:
        expected = HopConfig("command", command=("ssh", "-W", "%h:%p", "gate"), processes=5)
        assert hop("{command: [ssh, -W, '%h:%p', gate], processes: 5}") == expected
        assert hop("{command: nc}") == HopConfig("command", command=("nc",))
        assert expected.url == "command:ssh"

    def test_path_is_relative_to_the_file(self) -> None:
        assert hop("{command: [/bin/nc, '%%%h']}").command == ("/bin/nc", "%%%h")
        assert hop("{command: [./nc]}").command[0].endswith("nc")

    @pytest.mark.parametrize(
        "text, message",
        [
            ("{command: []}", "names no program"),
            ("{command: ['']}", "names no program"),
            ("{command: 'nc %h %p'}", "write the program and its arguments as a list"),
            ("{command: [nc, '%u']}", "'%u' is not known"),
            ("{command: [nc, '%%%x']}", "'%x' is not known"),
            ("{command: [nc, 'a%']}", "'%' is not known"),
            ("{command: nc, url: direct}", "unknown key"),
            ("{command: nc, timeout: 3s}", "unknown key"),
            ("{command: nc, processes: 0}", "processes"),
        ],
    )
    def test_mistake_is_an_error(self, text: str, message: str) -> None:
        (error,) = default_errors(text)
        assert message in error

    def test_command_is_the_first_hop_of_a_chain(self) -> None:
        assert default("[{command: nc}, 'http://h1:1']").steps[1] == H1
        (error,) = default_errors("['http://h1:1', {command: nc}]")
        assert error.endswith("a command must be the first hop: no proxy carries a program")
