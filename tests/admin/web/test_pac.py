"""The script for browsers: a real interpreter of JavaScript decides as the rules do."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

from netproxy.admin.web.pac import PacSite, make_script
from netproxy.errors import ConfigError
from netproxy.protocol.http1 import HttpRequest
from tests.config.reading import errors, read

PAC = """
listeners: [{listen: '192.0.2.1:1080', clients: 10.0.0.0/8}]
pac: {listen: '127.0.0.1:80'%s}
"""
# isInNet() of browsers, for literal addresses alone.
LIBRARY = """
function number(text) { return text.split(".").reduce((sum, part) => sum * 256 + +part, 0); }
function isInNet(host, net, mask) {
  return (number(host) & number(mask)) === (number(net) & number(mask));
}
"""
PROXY = "PROXY PROXY-HOST:1080"


def decide(text: str, *urls: str) -> list[str]:
    """Return what a browser does with each URL, DIRECT or the proxy."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    script = make_script(read(text))
    ask = f"{LIBRARY}{script}; const ask = u => FindProxyForURL(u, new URL(u).hostname);"
    program = f"{ask} console.log(JSON.stringify({json.dumps(urls)}.map(ask)));"
    done = subprocess.run([node, "-e", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


RULES = """
upstreams: {office: 'socks5h://10.0.0.1:1080'}
rules:
- {network: udp, via: office}
- {domain: secret.lan.example, via: office}
- {domain: [.lan.example, "*.below.example", "keyword:intra", "keyword:77"], via: direct}
- {ip: [10.0.0.0/8, "fd00::/8"], via: direct}
- {domain: ports.example, port: [8000-8100, 9000], via: direct}
- {user: alice, domain: alice.example, via: direct}
- {domain: .blocked.example, via: block}
- {client: 10.9.0.0/16, via: office}
- {domain: late.example, via: direct}
users: {alice: {password: x}}
"""


def test_script_decides_as_the_rules_do() -> None:
    direct = [
        *(
            "https://lan.example/",
            "http://A.LAN.example:81/x?y=http://b/",
            "wss://x.below.example/",
        ),
        *(
            "http://my-intranet.test/",
            "http://a77.test/",
            "http://10.1.2.3/",
            "http://ports.example:8100/",
        ),
        *("https://ports.example:9000/", "http://localhost:3000/", "http://other.local.here/"),
    ]
    proxied = [
        *("http://secret.lan.example/", "https://below.example/", "http://11.1.2.3/"),
        *("http://ports.example/", "http://ports.example:8101/", "https://alice.example/"),
        *("http://a.blocked.example/", "http://late.example/", "http://elsewhere.test/"),
        *("http://evil-lan.example/", "https://user:10.0.0.1@elsewhere.test/", "http://[fd00::1]/"),
        *("http://11.77.2.3/", "http://[fd00::77]/"),
    ]
    text = PAC % ", direct: ['*.here']" + RULES
    found = decide(text, *direct, *proxied)
    assert found == ["DIRECT"] * len(direct) + [PROXY] * len(proxied)


@pytest.mark.parametrize(
    ("listener", "expected"),
    [
        (
            "{listen: '192.0.2.1:3128', protocol: http, clients: 10.0.0.0/8}",
            "PROXY PROXY-HOST:3128",
        ),
        (
            "{listen: '192.0.2.1:1080', protocol: socks5, clients: 10.0.0.0/8}",
            "SOCKS5 PROXY-HOST:1080; SOCKS PROXY-HOST:1080",
        ),
        (
            "{listen: '192.0.2.1:1443', tls: {certificate: a.pem}, clients: 10.0.0.0/8}",
            "HTTPS PROXY-HOST:1443",
        ),
    ],
)
def test_proxy_is_named_by_its_protocol(listener: str, expected: str) -> None:
    script = make_script(read(f"listeners: [{listener}]\npac: {{listen: '127.0.0.1:80'}}"))
    assert f'return "{expected}";' in script


def ask(site: PacSite, target: bytes = b"/proxy.pac", host: bytes = b"p.test:80") -> Any:
    request = HttpRequest(b"GET", target, 1, ((b"Host", host),) if host else ())
    return site.answer(request, "10.0.0.9")


class TestSite:
    def site(self, more: str = "") -> PacSite:
        site = PacSite()
        site.configure(read(PAC % more))
        return site

    @pytest.mark.parametrize(
        ("host", "named"),
        [
            (b"192.168.1.1:8080", b"192.168.1.1:1080"),
            (b"WPAD.lan", b"wpad.lan:1080"),
            (b"[fd00::1]:80", b"[fd00::1]:1080"),
        ],
    )
    def test_browser_gets_the_host_that_it_asked(self, host: bytes, named: bytes) -> None:
        answer = ask(self.site(), b"/wpad.dat", host)
        assert (answer.status, b'"PROXY %b"' % named in answer.body) == (200, True)
        assert answer.content_type == "application/x-ns-proxy-autoconfig"

    @pytest.mark.parametrize("host", [b"", b'a"; evil()', b"a b", b"x" * 300])
    def test_host_that_is_none_is_refused(self, host: bytes) -> None:
        assert ask(self.site(), host=host).status == 400

    def test_configured_host_is_named(self) -> None:
        assert b'"PROXY proxy.test:1080"' in ask(self.site(", host: proxy.test"), host=b"").body

    def test_other_paths_are_not_found(self) -> None:
        assert ask(self.site(), b"/metrics").status == 404


@pytest.mark.parametrize(
    ("pac", "message"),
    [
        ("{}", "pac.listen: is missing"),
        ("{listen: ':80', listener: b}", "pac.listener: no browser can use 'b' (usable: sps-1080)"),
        ("{listen: ':80', host: 'a b'}", "'a b' is not an address or a host name"),
    ],
)
def test_mistake_is_told(pac: str, message: str) -> None:
    (error,) = errors(f"listeners: [{{listen: '127.0.0.1:1080'}}]\npac: {pac}")
    assert message in error


def test_pattern_and_port_that_no_script_can_have_are_errors() -> None:
    with pytest.raises(ConfigError, match="pac.direct: 'a b' is not a valid domain name"):
        make_script(read(PAC % ", direct: ['a b']"))
    text = "listeners: [{listen: '127.0.0.1:0', name: a}]\npac: {listen: '127.0.0.1:80'}"
    with pytest.raises(ConfigError, match="the listener 'a' has no port that browsers could know"):
        make_script(read(text))
