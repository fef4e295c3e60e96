"""Names of flows through a router whose clients know of no proxy: rules and upstreams use them."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.namespaces import Namespace
from tests.e2e.peers import TcpEcho, UdpEcho, echo, listen, udp
from tests.e2e.router import (
    CLIENTS,
    OTHER,
    PROXY,
    REDIRECT,
    ROUTER,
    SERVER,
    TPROXY_ALL,
    Net,
    configuration,
    network,
    rules,
    run_in,
)
from tests.e2e.support import SECONDS, Netproxyd, environment, program, wait_for
from tests.e2e.test_transparent import dial, start, upstream_config, web_server
from tests.support.certificates import certificates

pytestmark = [pytest.mark.e2e, pytest.mark.long]

SILENCE = 0.3
"""How long a test waits for an answer that must not come."""
LISTENERS = {"redirect": REDIRECT, "tproxy": TPROXY_ALL}
DNS = f"""
dns:
  servers: [192.0.2.53]
  remember: true
  hosts: {{asked.example: [{SERVER}], refused.example: [{OTHER}], www.example: [{SERVER}]}}
"""
DNS_LISTENER = f"  - {{protocol: dns, listen: '{ROUTER}:53', clients: {CLIENTS}}}\n"
RULES = """
rules:
  - {sni: "*.tls.example", via: direct}
  - {domain: [plain.example, asked.example], via: direct}
  - {listener: sps, via: direct}
default: block
"""


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with network() as created:
        yield created


@contextmanager
def routed(
    netproxyd: Start, net: Net, tmp_path: Path, config: str, proxy: str = ""
) -> Iterator[Netproxyd]:
    """Run a daemon on the router with its rules, and another one in the internet if wanted."""
    path = tmp_path / "rules.yaml"
    path.write_text(config)
    if proxy:
        start(netproxyd, net.internet, PROXY, proxy)
    daemon = start(netproxyd, net.router, ROUTER, config)
    with rules(net, path):
        yield daemon
    # Before the proxy ends, which it needs.  UDP sessions outlive the test.
    daemon.baseline = 0
    daemon.finish()


@pytest.fixture(params=LISTENERS)
def router(
    request: pytest.FixtureRequest, netproxyd: Start, net: Net, tmp_path: Path
) -> Iterator[Netproxyd]:
    """A daemon whose rules allow some names alone."""
    config = configuration(LISTENERS[request.param] + DNS_LISTENER, DNS + RULES)
    with routed(netproxyd, net, tmp_path, config) as daemon:
        yield daemon


@contextmanager
def tls_server(host: Namespace, address: str) -> Iterator[int]:
    """Answer each GET within TLS with a page; yield the port."""
    with listen(address, host.socket) as free:
        port: int = free.getsockname()[1]
    files = certificates()
    command = [
        *(program("openssl"), "s_server", "-quiet", "-www", "-accept", f"{address}:{port}"),
        *("-cert", files.path("server.pem"), "-key", files.path("server.key")),
    ]
    process = subprocess.Popen(
        command, preexec_fn=host.enter, stdin=subprocess.DEVNULL, env=environment()
    )

    def serves() -> bool:
        assert process.poll() is None
        try:
            dial(host, address, port).close()
        except ConnectionRefusedError:
            return False
        return True

    try:
        wait_for(serves, SECONDS, "the server listens")
        yield port
    finally:
        process.kill()
        process.wait()


def curl(net: Net, url: str, *resolve: str) -> str:
    """Return what curl says to a URL whose name it knows; "" if the connection is refused."""
    arguments = [argument for item in resolve for argument in ("--resolve", item)]
    try:
        return run_in(net.client, "curl", "-sSk", "-m", str(SECONDS), *arguments, url)
    except AssertionError as error:
        assert "curl: (35)" in str(error) or "curl: (56)" in str(error), str(error)
        return ""


def ask(net: Net, name: str) -> str:
    return run_in(net.client, "dig", "+short", "+tries=1", f"@{ROUTER}", name).strip()


@pytest.mark.any_workers
def test_rules_decide_by_server_name_and_by_host(net: Net, router: Netproxyd) -> None:
    with tls_server(net.internet, SERVER) as tls, web_server(net.internet, SERVER) as plain:
        for name, port, answer in (
            ("a.tls.example", tls, "Ciphers supported"),
            ("other.example", tls, ""),
            ("plain.example", plain, "hello"),
            ("other.example", plain, ""),
        ):
            scheme = "https" if port == tls else "http"
            text = curl(net, f"{scheme}://{name}:{port}/", f"{name}:{port}:{SERVER}")
            assert answer in text and bool(answer) == bool(text), name
        # Without a name: an address in the URL.
        assert curl(net, f"https://{SERVER}:{tls}/") == ""
    router.said(rf"target={SERVER}:{tls} rule=rules\[0\] .*name=a.tls.example seen_in=tls")
    router.said(rf"target={SERVER}:{plain} rule=rules\[1\] .*name=plain.example seen_in=http")


@pytest.mark.any_workers
@pytest.mark.parametrize("client", ["openssl", "gnutls-cli", "python3"])
def test_tls_clients_reach_the_server_by_their_name(
    net: Net, router: Netproxyd, client: str
) -> None:
    with tls_server(net.internet, SERVER) as port:
        name = "b.tls.example"
        target = f"{SERVER}:{port}"
        script = (
            "import socket, ssl; c = ssl._create_unverified_context(); "
            f"s = c.wrap_socket(socket.create_connection(('{SERVER}', {port})), "
            f"server_hostname='{name}'); print('connected', s.version())"
        )
        arguments = {
            "openssl": ("s_client", "-connect", target, "-servername", name),
            "gnutls-cli": ("--insecure", "--sni-hostname", name, "-p", str(port), SERVER),
            "python3": ("-c", script),
        }[client]
        said = run_in(net.client, client, *arguments)
        assert any(word in said for word in ("TLSv1.3", "TLS1.3"))
    router.said(rf"target={target} rule=rules\[0\] .*name={name} seen_in=tls")


def test_server_that_speaks_first_is_not_waited_for_longer(net: Net, router: Netproxyd) -> None:
    assert ask(net, "asked.example") == SERVER
    with listen(SERVER, net.internet.socket) as listening:
        with dial(net.client, SERVER, listening.getsockname()[1]) as client:
            server, _ = listening.accept()
            with server:
                server.sendall(b"220 ready")
                assert client.recv(9) == b"220 ready"


def test_flows_to_an_address_that_a_client_was_told_get_the_name(
    net: Net, router: Netproxyd
) -> None:
    with (
        UdpEcho(SERVER, net.internet.socket) as told,
        UdpEcho(OTHER, net.internet.socket) as refused,
        TcpEcho(SERVER, net.internet.socket) as target,
        udp("0.0.0.0", net.client.socket) as client,
    ):
        client.settimeout(SILENCE)
        assert ask(net, "www.example") == SERVER
        client.sendto(b"refused", told.address)
        with pytest.raises(TimeoutError):
            client.recv(100)
        assert (ask(net, "asked.example"), ask(net, "refused.example")) == (SERVER, OTHER)
        with dial(net.client, SERVER, target.address[1]) as sock:
            echo(sock, b"hello")
        client.sendto(b"refused", refused.address)
        with pytest.raises(TimeoutError):
            client.recv(100)
        client.settimeout(SECONDS)
        client.sendto(b"hello", told.address)
        assert client.recvfrom(100) == (b"hello", told.address)
    router.said(rf"target={SERVER}:{target.address[1]} .*name=asked.example seen_in=dns")


PROXY_CONFIG = upstream_config() + (
    f"dns: {{hosts: {{a.tls.example: [{OTHER}], asked.example: [{OTHER}]}}}}\n"
)


@pytest.mark.any_workers
@pytest.mark.parametrize("scheme", ["socks5h", "http", "socks5"])
@pytest.mark.parametrize("kind", LISTENERS)
def test_upstream_that_resolves_names_is_asked_for_the_name(
    netproxyd: Start, net: Net, tmp_path: Path, kind: str, scheme: str
) -> None:
    """The proxy knows another address for the name than the client has dialled."""
    rest = f"{DNS}rules: [{{listener: sps, via: direct}}]\ndefault: {scheme}://{PROXY}:1080"
    config = configuration(LISTENERS[kind] + DNS_LISTENER, rest)
    reached = SERVER if scheme == "socks5" else OTHER
    with (
        routed(netproxyd, net, tmp_path, config, PROXY_CONFIG),
        TcpEcho(reached, net.internet.socket) as target,
        web_server(net.internet, reached) as port,
    ):
        name = "a.tls.example"
        assert curl(net, f"http://{name}:{port}/", f"{name}:{port}:{SERVER}") == "hello"
        assert ask(net, "asked.example") == SERVER
        with dial(net.client, SERVER, target.address[1]) as sock:
            echo(sock, b"hello")


@pytest.mark.any_workers
@pytest.mark.parametrize("kind", LISTENERS)
def test_name_leads_to_no_address_that_is_denied(
    netproxyd: Start, net: Net, tmp_path: Path, kind: str
) -> None:
    """Hazard 155.  Neither the address that was dialled nor those of the name may be denied."""
    listener = LISTENERS[kind].replace("name: lan,", "name: lan, sniff_dial: name,")
    hosts = f"dns: {{hosts: {{denied.example: [{OTHER}], www.example: [{SERVER}]}}}}\n"
    denied = f"destinations: {{deny: [{OTHER}/32]}}\n"
    config = configuration(listener, hosts + denied)
    with (
        routed(netproxyd, net, tmp_path, config) as daemon,
        web_server(net.internet, SERVER) as port,
    ):
        for name, dialled, answer in (
            ("www.example", SERVER, "hello"),
            ("denied.example", SERVER, ""),
            ("www.example", OTHER, "hello"),
        ):
            assert curl(net, f"http://{name}:{port}/", f"{name}:{port}:{dialled}") == answer
        daemon.said(rf"target=denied.example:{port} .*decided=.*{OTHER}")


@pytest.mark.any_workers
def test_names_work_with_several_workers(netproxyd: Start, net: Net, tmp_path: Path) -> None:
    """The kernel spreads connections over the workers; one of them has been asked for the name."""
    config = configuration(REDIRECT + DNS_LISTENER, f"workers: 3\n{DNS}{RULES}")
    with routed(netproxyd, net, tmp_path, config), TcpEcho(SERVER, net.internet.socket) as target:
        assert ask(net, "asked.example") == SERVER
        for _ in range(20):
            with dial(net.client, SERVER, target.address[1]) as sock:
                echo(sock, b"hello")
