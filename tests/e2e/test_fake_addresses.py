"""Fake addresses on a router: clients get them for names, and rules and upstreams get the names."""

from __future__ import annotations

import subprocess
import sys
from typing import Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import TcpEcho, UdpEcho, echo, udp
from tests.e2e.router import (
    CLIENTS,
    OTHER,
    PROXY,
    REDIRECT,
    ROUTER,
    ROUTER_OUT,
    SERVER,
    SERVER6,
    TPROXY_ALL,
    Net,
    configuration,
    network,
    rules,
    run_in,
)
from tests.e2e.support import ROOT, SECONDS, Netproxyd, environment
from tests.e2e.test_names import tls_server
from tests.e2e.test_transparent import dial, start, upstream_config, web_server

pytestmark = [pytest.mark.e2e, pytest.mark.any_workers]

LISTENERS = {"redirect": REDIRECT, "tproxy": TPROXY_ALL}
WORKERS = {"redirect": "workers: 2\n", "tproxy": ""}
CONFIG = f"""
control: unix:CONTROL
dns:
  servers: [{PROXY}]
  fake: {{networks: [198.18.0.0/15, "fc00:1815::/64"], except: [plain.example]}}
destinations: {{deny: [{OTHER}/32]}}
rules:
  - {{domain: ["*.direct.example"], via: direct}}
  - {{domain: blocked.example, via: block}}
  - {{sni: blocked.tls.example, via: block}}
  - {{listener: sps, via: direct}}
default: socks5h://{PROXY}:1080
"""
DNS_LISTENER = f"  - {{protocol: dns, listen: '{ROUTER}:53', clients: {CLIENTS}}}\n"
PROXY_CONFIG = (
    upstream_config().rstrip("]\n")
    + f""",
  {{protocol: dns, listen: '{PROXY}:53', clients: [{ROUTER_OUT}/32]}}]
dns:
  servers: [192.0.2.53]
  hosts: {{www.example: [{SERVER}], a.tls.example: [{SERVER}], plain.example: [{SERVER}],
          echo.direct.example: [{SERVER}], six.direct.example: ["{SERVER6}"],
          denied.direct.example: [{OTHER}], blocked.example: [{SERVER}]}}
"""
)


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with network() as created:
        yield created


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("control") / "socket")


@pytest.fixture(scope="module", params=LISTENERS)
def router(
    request: pytest.FixtureRequest,
    shared_netproxyd: Start,
    net: Net,
    control: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Netproxyd]:
    """A daemon on the router; in the internet a proxy, which is the name server as well."""
    kind = request.param
    text = WORKERS[kind] + CONFIG.replace("CONTROL", control)
    config = configuration(LISTENERS[kind] + DNS_LISTENER, text)
    path = tmp_path_factory.mktemp("rules") / "netproxyd.yaml"
    path.write_text(config)
    proxy = start(shared_netproxyd, net.internet, PROXY, PROXY_CONFIG)
    daemon = start(shared_netproxyd, net.router, ROUTER, config)
    with rules(net, path):
        yield daemon
    # UDP sessions outlive the test.
    for process in (daemon, proxy):
        process.baseline = 0
        process.finish()


def ask(net: Net, name: str, kind: str = "A", *options: str) -> str:
    arguments = ("+short", "+tries=1", *options, f"@{ROUTER}")
    return run_in(net.client, "dig", *arguments, name, kind).strip()


def explain(control: str, flow: str) -> str:
    code = "import sys; from netproxy.cli import control_main; sys.exit(control_main())"
    command = [sys.executable, "-c", code, "-s", control, "explain", flow]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS
    ).stdout


def curl(net: Net, url: str, name: str, port: int) -> str:
    """Return what a server says; the client knows the fake address alone."""
    resolve = ("--resolve", f"{name}:{port}:{ask(net, name)}")
    return run_in(net.client, "curl", "-sSk", "-m", str(SECONDS), *resolve, url)


def test_clients_reach_names_by_fake_addresses(net: Net, router: Netproxyd, control: str) -> None:
    """Hazards 158 and 160."""
    address, address6 = ask(net, "www.example"), ask(net, "www.example", "AAAA")
    assert address.startswith("198.18.0.") and address6.startswith("fc00:1815::")
    # No server knows it, none is asked; and the other worker has an address of its own.
    assert ask(net, "nobody.example", "A", "+tcp").startswith("198.18.0.")
    assert ask(net, "www.example", "HTTPS") == ""
    assert ask(net, "plain.example") == SERVER
    assert run_in(net.client, "dig", "+short", f"@{ROUTER}", "-x", address).strip() == (
        "www.example."
    )

    with (
        web_server(net.internet, SERVER) as port,
        tls_server(net.internet, SERVER) as tls,
        TcpEcho(SERVER, net.internet.socket) as target,
        TcpEcho(SERVER6, net.internet.socket) as target6,
    ):
        assert curl(net, f"http://www.example:{port}/", "www.example", port) == "hello"
        router.said(rf"target=www.example:{port} rule=default .*upstream=.*{PROXY}")
        text = curl(net, f"https://a.tls.example:{tls}/", "a.tls.example", tls)
        assert "Ciphers supported" in text
        router.said(rf"target=a.tls.example:{tls} rule=default .*seen_in=tls")
        with dial(net.client, address6, port) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert sock.makefile("rb").read().endswith(b"hello")
        # Directly, for which the router asks the name server.
        for name, there in (("echo.direct.example", target), ("six.direct.example", target6)):
            with dial(net.client, ask(net, name), there.address[1]) as sock:
                echo(sock, b"hello" * 1000)
        for name, why in (
            ("denied.direct.example", f"decided=.*destinations.deny {OTHER}/32"),
            ("blocked.example", r"rule=rules\[1\]"),
        ):
            refused(net, ask(net, name), port)
            router.said(f"target={name}:{port} .*{why}")
        refused(net, "198.18.77.7", port)
        router.said(
            r'reason="unknown fake address" listener=lan .*asked=198.18.77.7:\d+ decided=dns.fake'
        )

    for host, written in ((address, address), (address6, f"[{address6}]")):
        lines = explain(control, f"tcp 10.81.1.2 -> {written}:443 on lan")
        assert f"name: www.example (fake address {host})\n" in lines
        assert "addresses: the upstream resolves the name\n" in lines
    assert "unknown fake address" in explain(control, "198.18.77.7:443")
    router.reload()
    assert ask(net, "www.example") == address
    with web_server(net.internet, SERVER) as port:
        assert curl(net, f"http://www.example:{port}/", "www.example", port) == "hello"


def refused(net: Net, host: str, port: int) -> None:
    """Check that a connection is reset."""
    with dial(net.client, host, port) as sock, pytest.raises(ConnectionError):
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert sock.recv(1) == b"x"


def test_datagrams_come_back_from_fake_addresses(net: Net, router: Netproxyd) -> None:
    with (
        UdpEcho(SERVER, net.internet.socket) as server,
        UdpEcho(SERVER6, net.internet.socket) as server6,
        udp("0.0.0.0", net.client.socket) as client,
        udp("::", net.client.socket) as client6,
    ):
        for name, target in (
            ("www.example", server),
            ("echo.direct.example", server),
            ("six.direct.example", server6),
        ):
            port = target.address[1]
            for sock, kind in ((client, "A"), (client6, "AAAA")):
                to = ask(net, name, kind), port
                for text in (b"first", b"second" * 200):
                    sock.sendto(text, to)
                    data, source = sock.recvfrom(65535)
                    assert (data, source[:2]) == (text, to)
        client.sendto(b"lost", ("198.18.77.7", 9))
        router.said(r'reason="unknown fake address" .* network=udp asked=198.18.77.7:9 ')
        # An address of the network beside it still answers as itself.
        client.sendto(b"plain", server.address)
        assert client.recvfrom(100) == (b"plain", server.address)
    assert router.counted("drops{unknown fake address}", 1) == 1
