"""The section `dns`: every form of a name server, and every error with its place."""

from __future__ import annotations

import pytest

from netproxy.config.schema import DnsConfig, FakeConfig, NameServerConfig, UpstreamTlsConfig
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.networks import IpNetwork
from tests.config.reading import errors, read

pytest.importorskip("yaml")


def dns(text: str) -> DnsConfig:
    """Return the section `dns` with the keys in the text."""
    return read(f"dns: {{{text}}}").dns


class TestServers:
    @pytest.mark.parametrize(
        "text, scheme, server, path",
        [
            ("192.168.1.1", "udp", ("192.168.1.1", 53), ""),
            ("192.168.1.1:5353", "udp", ("192.168.1.1", 5353), ""),
            ("2001:db8::1", "udp", ("2001:db8::1", 53), ""),
            ("[2001:db8::1]", "udp", ("2001:db8::1", 53), ""),
            ("[2001:db8::1]:5353", "udp", ("2001:db8::1", 5353), ""),
            ("udp://192.168.1.1", "udp", ("192.168.1.1", 53), ""),
            ("udp://192.168.1.1:54/", "udp", ("192.168.1.1", 54), ""),
            ("tcp://192.168.1.1", "tcp", ("192.168.1.1", 53), ""),
            ("tcp://[::1]:54", "tcp", ("::1", 54), ""),
            ("tls://9.9.9.9", "tls", ("9.9.9.9", 853), ""),
            ("tls://Dns.Example:8853", "tls", ("dns.example", 8853), ""),
            ("https://dns.example", "https", ("dns.example", 443), "/dns-query"),
            ("https://dns.example/", "https", ("dns.example", 443), "/"),
            (
                "https://dns.example:8443/dns-query?a=b",
                "https",
                ("dns.example", 8443),
                "/dns-query?a=b",
            ),
            ("https://[2001:db8::1]/q", "https", ("2001:db8::1", 443), "/q"),
        ],
    )
    def test_name_server_is_written_as_address_or_url(
        self, text: str, scheme: str, server: tuple[str, int], path: str
    ) -> None:
        for written in (
            f"servers: '{text}'",
            f"servers: ['{text}']",
            f"servers: [{{url: '{text}'}}]",
        ):
            (parsed,) = dns(written).servers
            assert parsed._replace(place="") == NameServerConfig(scheme, Address(*server), path)

    def test_name_server_takes_tls_and_upstream(self) -> None:
        config = read("""
upstreams: {office: "socks5://192.0.2.7:1080"}
dns:
  servers:
    - url: tls://9.9.9.9
      tls: {server_name: dns.example, ca: ca.pem, certificate: me.pem, key: me.key}
    - {url: "https://dns.example", upstream: office}
    - {url: 192.0.2.1, upstream: "http://192.0.2.8:3128"}
    - {url: tcp://192.0.2.1, upstream: direct}
""")
        first, second, third, fourth = config.dns.servers
        assert first.tls == UpstreamTlsConfig("ca.pem", "me.pem", "me.key", "dns.example", False)
        assert first.upstream is None
        assert second.upstream is not None and second.upstream.name == "office"
        assert second.upstream == config.upstreams["office"]
        assert third.upstream is not None and third.upstream.text == "http://192.0.2.8:3128"
        assert fourth.upstream is not None and fourth.upstream.text == "direct"
        assert first.place == "c.yaml:5:7"
        assert not config.warnings

    @pytest.mark.parametrize(
        "text, message",
        [
            (
                "dns.example",
                "'dns.example' is a host name: a name server with udp or tcp needs an IP address",
            ),
            ("udp://dns.example", "'dns.example' is a host name"),
            ("tcp://dns.example:53", "'dns.example' is a host name"),
            ("9.9.9.9#53", "is a host name"),
            (
                "quic://9.9.9.9",
                "is not a name server (expected 192.168.1.1, tcp://192.168.1.1, "
                "tls://9.9.9.9 or https://dns.example/dns-query)",
            ),
            ("TLS://9.9.9.9", "is not a name server"),
            ("tls://", "is not a name server"),
            ("", "is not a name server"),
            ("tls://9.9.9.9/path", "is not a name server"),
            ("9.9.9.9/path", "is not a name server"),
            ("[::1", "is not a name server"),
            ("https://dns.example/a b", "is not a name server"),
            ("9.9.9.9:", "is not a name server"),
            ("9.9.9.9:x", "is not a name server"),
            ("9.9.9.9:0", "must be host:port with a port between 1 and 65535"),
            ("9.9.9.9:65536", "must be host:port with a port between 1 and 65535"),
            ("tls://a..b", "must be host:port"),
            ("tls://me:secret@9.9.9.9", "is not a name server"),
            ("tls://me@9.9.9.9", "must be host:port"),
        ],
    )
    def test_invalid_name_server_is_refused(self, text: str, message: str) -> None:
        (error,) = errors(f"dns:\n  servers:\n    - '{text}'\n")
        assert error.startswith("c.yaml:3:7: dns.servers[0].url: ") and message in error

    @pytest.mark.parametrize(
        "text, place, message",
        [
            ("{upstream: direct}", "3:7", "dns.servers[0].url: is missing"),
            (
                "{url: 9.9.9.9, tls: {insecure: true}}",
                "3:27",
                "dns.servers[0].tls: the scheme udp has no TLS (use tls or https)",
            ),
            (
                "{url: tls://9.9.9.9, tls: {key: me.key}}",
                "3:33",
                "dns.servers[0].tls.certificate: is missing",
            ),
            ("{url: tls://9.9.9.9, tls: {sni: x}}", "3:34", "dns.servers[0].tls.sni: unknown key"),
            (
                "{url: tls://9.9.9.9, tls: {server_name: 'a b'}}",
                "3:47",
                "dns.servers[0].tls.server_name: 'a b' is not the name of a server",
            ),
            (
                "{url: 9.9.9.9, upstream: ofice}",
                "3:32",
                "dns.servers[0].upstream: 'ofice' is not an upstream: write scheme://host:port, "
                "direct or block (did you mean 'office'?)",
            ),
            (
                "{url: 9.9.9.9, uptsream: office}",
                "3:22",
                "dns.servers[0].uptsream: unknown key (did you mean 'upstream'?)",
            ),
            ("[9.9.9.9]", "3:7", "dns.servers[0].url: must be a single value"),
        ],
    )
    def test_name_server_errors_have_their_place(self, text: str, place: str, message: str) -> None:
        assert errors(
            f"dns:\n  servers:\n    - {text}\nupstreams: {{office: 'socks5://192.0.2.7:1080'}}\n"
        ) == [f"c.yaml:{place}: {message}"]

    def test_all_errors_of_the_dns_section_are_reported_at_once(self) -> None:
        assert errors(
            "dns:\n  servers: [dns.example, {upstream: direct}]\n"
            "  cache: -1\n  prefer: v4\n  nonsense: 1\n"
        ) == [
            "c.yaml:2:13: dns.servers[0].url: 'dns.example' is a host name: a name server "
            "with udp or tcp needs an IP address",
            "c.yaml:2:26: dns.servers[1].url: is missing",
            "c.yaml:3:10: dns.cache: '-1' is not a number of names between 0 and 1048576",
            "c.yaml:4:11: dns.prefer: 'v4' is not one of ipv4, ipv6 (did you mean 'ipv4'?)",
            "c.yaml:5:3: dns.nonsense: unknown key",
        ]

    def test_name_server_without_certificate_check_gives_a_warning(self) -> None:
        assert read("dns: {servers: [{url: tls://9.9.9.9, tls: {insecure: true}}]}").warnings == (
            "c.yaml:1:17: dns: 9.9.9.9:853: the certificate is not checked: any server "
            "that answers there is trusted",
        )

    def test_name_server_upstream_with_a_host_name_gives_a_warning(self) -> None:
        text = """
upstreams:
  office: ["socks5://proxy.example:1080", "http://other.example:80"]
  plain: socks5://192.0.2.1:1080
dns: {servers: [{url: 9.9.9.9, upstream: %s}]%s}
"""
        assert read(text % ("office", "")).warnings == (
            "c.yaml:5:17: dns: 9.9.9.9:53: the name of its upstream, proxy.example, "
            "may have to be looked up at this server: write an address, or add the "
            "name to dns.hosts",
        )
        assert not read(text % ("office", ", hosts: {proxy.example: 192.0.2.7}")).warnings
        assert not read(text % ("plain", "")).warnings


class TestRules:
    def test_dns_rule_has_names_files_and_servers(self) -> None:
        rule, blocked = dns(
            "rules: [{domain: ['*.lan', intranet], domain_file: lan.txt, "
            "servers: [192.0.2.1, tls://9.9.9.9]}, {domain: a.example, block: true}]"
        ).rules
        assert (rule.domain, rule.domain_file) == (("*.lan", "intranet"), ("lan.txt",))
        assert [server.scheme for server in rule.servers] == ["udp", "tls"]
        assert rule.place == "c.yaml:1:15"
        assert (blocked.domain, blocked.domain_file, blocked.servers) == (("a.example",), (), ())

    @pytest.mark.parametrize(
        "rule, place, message",
        [
            (
                "{servers: 9.9.9.9}",
                "2:11",
                "dns.rules[0].domain: is missing: the rule needs domain or domain_file",
            ),
            ("{domain: a.lan}", "2:11", "dns.rules[0].servers: is missing (or set block: true)"),
            (
                "{domain: a.lan, block: false}",
                "2:11",
                "dns.rules[0].servers: is missing (or set block: true)",
            ),
            (
                "{domain: a.lan, block: true, servers: 9.9.9.9}",
                "2:49",
                "dns.rules[0].servers: cannot be combined with block: true",
            ),
            (
                "{domain: a.lan, block: yes, servers: 9.9.9.9}",
                "2:34",
                "dns.rules[0].block: 'yes' is not one of true, false",
            ),
            (
                "{domain: a.lan, server: 9.9.9.9, block: true}",
                "2:27",
                "dns.rules[0].server: unknown key (did you mean 'servers'?)",
            ),
        ],
    )
    def test_dns_rule_errors_have_their_place(self, rule: str, place: str, message: str) -> None:
        assert errors(f"dns:\n  rules: [{rule}]\n") == [f"c.yaml:{place}: {message}"]


class TestCacheAndHosts:
    def test_empty_dns_section_has_the_defaults(self) -> None:
        assert read("dns:").dns._replace(place="") == read("").dns == DnsConfig()
        assert DnsConfig().cache == 4096

    def test_cache_prefer_and_hosts_are_read(self) -> None:
        section = dns(
            "cache: 0, prefer: ipv6, hosts: {Printer.LAN.: 192.0.2.9, "
            "two: ['192.0.2.1', '2001:db8::1'], none: []}"
        )
        assert (section.cache, section.prefer) == (0, "ipv6")
        assert section.hosts == (
            ("none", ()),
            ("printer.lan", ("192.0.2.9",)),
            ("two", ("192.0.2.1", "2001:db8::1")),
        )

    @pytest.mark.parametrize(
        "text, seconds", [("0", 0.0), ("0s", 0.0), ("90m", 5400.0), ("7d", 604800.0)]
    )
    def test_serve_stale_is_a_duration(self, text: str, seconds: float) -> None:
        assert dns(f"serve_stale: {text}").serve_stale == seconds
        assert dns("").serve_stale == 86400.0

    @pytest.mark.parametrize(
        "text, message",
        [
            ("7d1s", "'7d1s' is longer than 7d"),
            ("60", "'60' has no unit: write 60s for seconds or 60ms for milliseconds"),
            ("true", "'true' is not a duration (expected 500ms, 30s, 5m, 2h, 1d or 1h30m)"),
        ],
    )
    def test_serve_stale_out_of_range_is_refused(self, text: str, message: str) -> None:
        assert errors(f"dns: {{serve_stale: {text}}}") == [
            f"c.yaml:1:20: dns.serve_stale: {message}"
        ]

    @pytest.mark.parametrize(
        "text, prefix, find",
        [
            ("auto", None, True),
            ("off", None, False),
            ("64:ff9b::/96", "64:ff9b::/96", False),
            ("'2001:db8:1::/48'", "2001:db8:1::/48", False),
        ],
    )
    def test_nat64_is_auto_off_or_a_prefix(self, text: str, prefix: str | None, find: bool) -> None:
        section = dns(f"nat64: {text}")
        assert section.nat64 == (IpNetwork.parse(prefix) if prefix else None)
        assert section.find_nat64 is find
        assert dns("").find_nat64 and dns("").nat64 is None

    @pytest.mark.parametrize("text", ["true", "64:ff9b::", "64:ff9b::/95", "10.0.0.0/8", "x"])
    def test_other_nat64_is_refused(self, text: str) -> None:
        assert errors(f"dns: {{nat64: '{text}'}}") == [
            f"c.yaml:1:14: dns.nat64: '{text}' is not auto, off or an IPv6 prefix of "
            "32, 40, 48, 56, 64, 96 bits, such as 64:ff9b::/96"
        ]

    @pytest.mark.parametrize("cache", ["-1", "1048577", "many", "1.5", "''"])
    def test_cache_out_of_range_is_refused(self, cache: str) -> None:
        (error,) = errors(f"dns: {{cache: {cache}}}")
        assert error.startswith("c.yaml:1:14: dns.cache: ")
        assert error.endswith(" is not a number of names between 0 and 1048576")

    @pytest.mark.parametrize(
        "hosts, place, message",
        [
            ("{a.lan: b.lan}", "1:22", "dns.hosts.a.lan[0]: 'b.lan' is not an IP address"),
            (
                "{a.lan: [192.0.2.1, 192.0.2.300]}",
                "1:34",
                "dns.hosts.a.lan[1]: '192.0.2.300' is not an IP address",
            ),
            ("{'*.lan': 192.0.2.1}", "1:15", "dns.hosts: '*.lan' is not a host name"),
            ("{'a b': 192.0.2.1}", "1:15", "dns.hosts: 'a b' is not a host name"),
            ("{a.lan: {b: 192.0.2.1}}", "1:22", "dns.hosts.a.lan[0]: must be a single value"),
            (
                "[192.0.2.1]",
                "1:14",
                "dns.hosts must be a mapping of keys to values "
                "(write the keys without '- ' before them)",
            ),
        ],
    )
    def test_dns_hosts_errors_have_their_place(self, hosts: str, place: str, message: str) -> None:
        assert errors(f"dns: {{hosts: {hosts}}}") == [f"c.yaml:{place}: {message}"]


class TestListeners:
    LISTENER = "listeners: [{protocol: dns, listen: '%s', name: names%s}]\n"

    def test_dns_listener_serves_both_networks_unless_told(self) -> None:
        (listener,) = read(
            self.LISTENER % ("127.0.0.1:53", "") + "dns: {servers: 9.9.9.9}"
        ).listeners
        assert (listener.protocol, listener.network, listener.addresses) == (
            "dns",
            ("tcp", "udp"),
            (Address("127.0.0.1", 53),),
        )
        (listener,) = read(
            self.LISTENER % ("127.0.0.1:53", ", network: udp") + "dns: {servers: 9.9.9.9}"
        ).listeners
        assert listener.network == ("udp",)

    @pytest.mark.parametrize(
        "more",
        ["", "dns:\n", "dns: {cache: 7}\n", "dns: {rules: [{domain: a.lan, servers: 9.9.9.9}]}\n"],
    )
    def test_dns_listener_needs_name_servers(self, more: str) -> None:
        (error,) = errors(self.LISTENER % ("127.0.0.1:53", "") + more)
        assert error.endswith(": dns.servers: is missing: listener 'names' needs name servers")

    def test_dns_listener_for_everybody_is_refused(self) -> None:
        (error,) = errors(self.LISTENER % (":53", "") + "dns: {servers: 9.9.9.9}")
        assert "would let everybody in: set auth, clients, or allow_open: true" in error
        assert read(
            self.LISTENER % (":53", ", clients: 192.168.0.0/16") + "dns: {servers: 9.9.9.9}"
        )

    @pytest.mark.parametrize(
        "key", ["announce: 192.0.2.1", "upstream: direct", "udp: {idle_timeout: 5m}"]
    )
    def test_dns_listener_refuses_keys_without_meaning(self, key: str) -> None:
        (error,) = errors(self.LISTENER % ("127.0.0.1:53", f", {key}") + "dns: {servers: 9.9.9.9}")
        assert error.endswith(f".{key.partition(':')[0]}: has no meaning for the protocol dns")

    def test_dns_listener_refuses_auth_and_target(self) -> None:
        lines = errors(
            self.LISTENER % ("127.0.0.1:53", ", auth: required, target: '9.9.9.9:53'")
            + "dns: {servers: 9.9.9.9}\nusers: {a: {password: b}}"
        )
        assert [line.partition(": ")[2] for line in lines] == [
            "listeners[0].target: the protocol dns has no fixed target: its clients name theirs",
            "listeners[0].auth: the protocol dns has no login: set clients, or auth: none",
        ]

    @pytest.mark.parametrize(
        "listen, server",
        [
            ("127.0.0.1:5353", "127.0.0.1:5353"),
            ("127.0.0.1:53", "tcp://127.0.0.1"),
            ("0.0.0.0:53", "127.0.0.1"),
            (":53", "[::1]:53"),
            ("127.0.0.1:853", "tls://127.0.0.1"),
        ],
    )
    def test_own_dns_listener_as_name_server_is_refused(self, listen: str, server: str) -> None:
        text = self.LISTENER % (listen, ", clients: 192.168.0.0/16")
        for section in (
            f"dns: {{servers: ['{server}']}}",
            f"dns: {{servers: 9.9.9.9, rules: [{{domain: a.lan, servers: ['{server}']}}]}}",
        ):
            (error,) = errors(text + section)
            assert error.startswith("c.yaml:2:")
            assert error.endswith(" is listener 'names' of this daemon")

    @pytest.mark.parametrize(
        "listen, server",
        [
            ("127.0.0.1:53", "127.0.0.2"),
            ("127.0.0.1:53", "127.0.0.1:54"),
            ("192.168.1.1:53", "127.0.0.1"),
        ],
    )
    def test_other_server_on_this_machine_is_accepted(self, listen: str, server: str) -> None:
        assert read(
            self.LISTENER % (listen, ", clients: 192.168.0.0/16")
            + f"dns: {{servers: ['{server}']}}"
        )


class TestFakeAddresses:
    @pytest.mark.parametrize(
        "text, networks, domain, exceptions",
        [
            ("198.18.0.0/15", ["198.18.0.0/15"], (), ()),
            ("[198.18.0.0/15, 'fc00:1815::/64']", ["198.18.0.0/15", "fc00:1815::/64"], (), ()),
            (
                "{networks: 10.9.0.0/24, domain: [.example], except: ['*.cdn.example', test]}",
                ["10.9.0.0/24"],
                (".example",),
                ("*.cdn.example", "test"),
            ),
        ],
    )
    def test_networks_or_a_mapping_with_names(
        self, text: str, networks: list[str], domain: tuple[str, ...], exceptions: tuple[str, ...]
    ) -> None:
        fake = dns(f"fake: {text}").fake
        assert fake._replace(place="") == FakeConfig(
            tuple(map(IpNetwork.parse, networks)), domain, exceptions
        )
        assert fake.place.startswith("c.yaml:1:")
        assert dns("").fake == FakeConfig()

    @pytest.mark.parametrize(
        "text, place, message",
        [
            ("198.18.0.0/25", "1:13", "[0]: '198.18.0.0/25' has too few addresses: 256 are "),
            ("198.18.0.1/15", "1:13", "[0]: '198.18.0.1/15' is not a valid network: bits "),
            ("true", "1:13", "[0]: 'true' is not a valid network (expected an address or "),
            ("[198.18.0.0/16, 198.19.0.0/16]", "1:13", ": has two networks of one family"),
            ("{domain: a.example}", "1:13", ".networks: is missing (expected networks, "),
            ("{networks: 198.18.0.0/15, domains: x}", "1:39", ".domains: unknown key (did you "),
            ("{networks: 198.18.0.0/15, not: x}", "1:39", ".not: unknown key"),
        ],
    )
    def test_errors_have_their_place(self, text: str, place: str, message: str) -> None:
        (error, *_) = errors(f"dns: {{fake: {text}}}")
        assert error.startswith(f"c.yaml:{place}: dns.fake{message}"), error

    def test_fake_addresses_without_a_dns_listener_give_a_warning(self) -> None:
        (warning,) = read("dns: {fake: 198.18.0.0/15}").warnings
        assert warning == "c.yaml:1:13: dns.fake: there is no listener with the protocol dns"
