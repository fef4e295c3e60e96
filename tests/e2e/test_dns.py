"""The dns listener and the daemon's own lookups, with dig as client and unbound as server."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

from tests.e2e import nameservers
from tests.e2e.conftest import Start
from tests.e2e.nameservers import LONG, MIDDLE, UNKNOWN, NameServers, dig
from tests.e2e.origin import HELLO, Origin, serving
from tests.e2e.support import ANY_PORT, LOOPBACK, SECONDS, Netproxyd, environment, program, wait_for
from tests.e2e.upstreams import Programs
from tests.support.certificates import Certificates, certificates
from tests.support.dns import query, question
from tests.support.sockets import nothing_comes

pytestmark = pytest.mark.e2e

# RFC 1035 section 4.1.1.
SERVFAIL = 2


class Https(ThreadingHTTPServer):
    """A DNS-over-HTTPS server with HTTP/1.1. It forwards to the name server on a port of loopback.

    `paths` are those of the requests so far.
    """

    daemon_threads = True

    def __init__(self, files: Certificates, server_port: int) -> None:
        super().__init__((LOOPBACK, 0), _Handler)
        self.dns_port = server_port
        self.paths: list[str] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.path("server.pem"), files.path("server.key"))
        self.socket = context.wrap_socket(
            self.socket, server_side=True, do_handshake_on_connect=False
        )

    @property
    def port(self) -> int:
        return self.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Https

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.paths.append(self.path)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(SECONDS)
            sock.sendto(body, (LOOPBACK, self.server.dns_port))
            answer = sock.recv(65535)
        self.send_response(200)
        self.send_header("Content-Type", "application/dns-message")
        self.send_header("Content-Length", str(len(answer)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


class World(NamedTuple):
    """A daemon with dns listeners, its name servers, and an upstream to one of them."""

    daemon: Netproxyd
    upstream: Netproxyd
    servers: NameServers
    https: Https
    port: int
    """Of the plain dns listener."""
    tls_port: int
    """Of one with TLS."""
    strict_port: int
    """Of one that permits only 127.0.0.2."""


@pytest.fixture(scope="module")
def files() -> Certificates:
    return certificates()


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    with Programs(tmp_path_factory.mktemp("nameservers")) as started:
        yield started


@pytest.fixture(scope="module")
def servers(programs: Programs, files: Certificates) -> NameServers:
    return nameservers.start(programs, files)


@pytest.fixture(scope="module")
def https(servers: NameServers, files: Certificates) -> Iterator[Https]:
    with Https(files, servers.port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def world(
    shared_netproxyd: Start,
    servers: NameServers,
    https: Https,
    files: Certificates,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    """Start both daemons. At the end, a reload without `dns` closes the connections to servers."""
    upstream = shared_netproxyd("-l", ANY_PORT)
    plain, tls = f"{LOOPBACK}:{servers.port}", f"{LOOPBACK}:{servers.tls_port}"
    trust = f"tls: {{ca: '{files.path('ca.pem')}', server_name: localhost}}"
    config = tmp_path_factory.mktemp("world") / "netproxyd.yaml"
    config.write_text(f"""
listeners:
  - {{name: main, listen: "{LOOPBACK}:0"}}
  - {{name: names, protocol: dns, listen: "{LOOPBACK}:0"}}
  - {{name: secure, protocol: dns, listen: "{LOOPBACK}:0", network: tcp, tls: {files.listener()}}}
  - {{name: strict, protocol: dns, listen: "{LOOPBACK}:0", clients: 127.0.0.2}}
upstreams: {{far: "{upstream.url("socks5")}"}}
dns:
  servers: ["{plain}"]
  hosts: {{printer.lan: [192.0.2.9, "2001:db8::9"]}}
  rules:
    - {{domain: ads.test, block: true}}
    - {{domain: tcp.test, servers: "tcp://{plain}"}}
    - {{domain: dot.test, servers: {{url: "tls://{tls}", {trust}}}}}
    - {{domain: doh.test, servers: {{url: "https://{LOOPBACK}:{https.port}/dns-query", {trust}}}}}
    - {{domain: far.test, servers: {{url: "{plain}", upstream: far}}}}
    - domain: wrong.test
      servers: {{url: "tls://{tls}", tls: {{ca: '{files.path("stranger.pem")}'}}}}
""")
    daemon = shared_netproxyd("-c", str(config))
    _, port, tls_port, strict_port = daemon.tcp_ports
    yield World(daemon, upstream, servers, https, port, tls_port, strict_port)
    config.write_text(f"listeners: [{{name: main, listen: '{LOOPBACK}:0'}}]\n")
    daemon.reload()


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with serving() as server:
        yield server


class TestListener:
    @pytest.mark.parametrize("kind, data", [("A", "192.0.2.1"), ("AAAA", "2001:db8::1")])
    def test_addresses_are_answered(self, world: World, kind: str, data: str) -> None:
        """By the server the first time, from the cache the second time."""
        for _ in range(2):
            answer = dig(world.port, "www.test", kind)
            assert (answer.status, answer.data) == ("NOERROR", [data]), answer.text
            assert {"qr", "rd", "ra"} <= set(answer.flags)

    def test_cached_answer_is_not_forwarded_again_and_its_ttl_decreases(self, world: World) -> None:
        first = dig(world.port, "udp.test", "A")
        forwarded = world.daemon.status()["queries{forwarded}"]
        cached = [dig(world.port, "udp.test", "A") for _ in range(3)]
        assert world.daemon.status()["queries{forwarded}"] == forwarded
        for answer in cached:
            assert answer.data == ["192.0.2.10"]
            assert 0 < int(answer.records[0][1]) <= int(first.records[0][1])

    def test_long_text_is_answered_over_tcp(self, world: World) -> None:
        answer = dig(world.port, "big.test", "TXT", "+tcp")
        assert answer.data == [" ".join(f'"{text}"' for text in LONG)], answer.text

    def test_long_text_is_truncated_over_udp_and_complete_over_tcp(self, world: World) -> None:
        answer = dig(world.port, "big.test", "TXT")
        assert "Truncated, retrying in TCP mode" in answer.text
        assert answer.data == [" ".join(f'"{text}"' for text in LONG)]

    def test_answer_is_truncated_to_the_clients_edns_size(self, world: World) -> None:
        answer = dig(world.port, "middle.test", "TXT", "+bufsize=4096")
        assert "Truncated" not in answer.text
        assert answer.data == [" ".join(f'"{text}"' for text in MIDDLE)]
        short = dig(world.port, "middle.test", "TXT", "+bufsize=512", "+ignore")
        assert "tc" in short.flags and not short.records

    @pytest.mark.parametrize(
        "option, has_edns", [("+noedns", False), ("+edns=0", True), ("+dnssec", True)]
    )
    def test_query_with_edns_gets_an_answer_with_edns(
        self, world: World, option: str, has_edns: bool
    ) -> None:
        answer = dig(world.port, "www.test", "A", option)
        assert answer.data == ["192.0.2.1"]
        assert ("OPT PSEUDOSECTION" in answer.text) is has_edns

    def test_record_of_an_unknown_type_is_answered(self, world: World) -> None:
        for _ in range(2):
            answer = dig(world.port, "odd.test", "TYPE65280")
            assert answer.data == [f"\\# 6 {UNKNOWN}"], answer.text

    def test_flags_of_the_query_are_forwarded(self, world: World) -> None:
        assert "cd" in dig(world.port, "www.test", "A", "+cdflag").flags
        assert "rd" not in dig(world.port, "www.test", "A", "+norecurse").flags

    @pytest.mark.parametrize("name", ["wWw.TeSt", "WWW.test"])
    def test_answer_has_the_case_of_the_query(self, world: World, name: str) -> None:
        answer = dig(world.port, name, "A")
        assert answer.records[0][0] == f"{name}." and answer.data == ["192.0.2.1"]

    def test_name_that_does_not_exist_is_nxdomain(self, world: World) -> None:
        for _ in range(2):
            answer = dig(world.port, "no.test", "A")
            assert (answer.status, answer.records) == ("NXDOMAIN", [])
            assert "SOA" in answer.text

    def test_hosts_and_blocked_names_are_answered_without_a_server(self, world: World) -> None:
        assert dig(world.port, "printer.lan", "A").data == ["192.0.2.9"]
        assert dig(world.port, "Printer.LAN", "AAAA").data == ["2001:db8::9"]
        blocked = dig(world.port, "ads.test", "A")
        assert (blocked.status, blocked.records) == ("NXDOMAIN", [])

    def test_query_over_tls_is_answered(self, world: World, files: Certificates) -> None:
        options = ("+tls", f"+tls-ca={files.path('ca.pem')}", "+tls-hostname=localhost")
        answer = dig(world.tls_port, "www.test", "A", *options)
        assert answer.data == ["192.0.2.1"], answer.text

    def test_client_that_is_not_permitted_gets_no_answer(self, world: World) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(query(question("www.test")), (LOOPBACK, world.strict_port))
            wait_for(
                lambda: world.daemon.status().get("drops{client not allowed}"),
                SECONDS,
                "the datagram is counted",
            )
            assert nothing_comes(sock, 0)
        assert dig(world.strict_port, "www.test", "A", "-b", "127.0.0.2").data == ["192.0.2.1"]
        assert not dig(world.strict_port, "www.test", "A", "+tcp").status


class TestServers:
    def test_query_is_forwarded_over_tcp(self, world: World) -> None:
        assert dig(world.port, "tcp.test", "A").data == ["192.0.2.11"]

    def test_query_is_forwarded_over_tls(self, world: World) -> None:
        assert dig(world.port, "dot.test", "A").data == ["192.0.2.12"]

    def test_query_is_forwarded_over_https(self, world: World) -> None:
        before = len(world.https.paths)
        assert dig(world.port, "doh.test", "A").data == ["192.0.2.13"]
        assert world.https.paths[before:] == ["/dns-query"]

    def test_query_is_forwarded_through_an_upstream(self, world: World) -> None:
        assert dig(world.port, "far.test", "A").data == ["192.0.2.14"]
        # The connection stays open, so that there is no access record yet; the counter shows it.
        world.upstream.counted("connections{accepted}", 1)

    def test_server_with_a_certificate_of_another_authority_is_not_trusted(
        self, world: World
    ) -> None:
        assert dig(world.port, "wrong.test", "A").status == "SERVFAIL"


def test_query_is_forwarded_to_dnsdist_over_https(
    shared_netproxyd: Start, servers: NameServers, programs: Programs, files: Certificates
) -> None:
    port = nameservers.start_https(programs, files, servers.port)
    daemon = shared_netproxyd(
        config=f"""
listeners: [{{listen: "{LOOPBACK}:0"}}, {{protocol: dns, listen: "{LOOPBACK}:0"}}]
dns:
  servers: {{url: "https://localhost:{port}", tls: {{ca: '{files.path("ca.pem")}'}}}}
  hosts: {{localhost: {LOOPBACK}}}
"""
    )
    for name, data in (("doh", "192.0.2.13"), ("www", "192.0.2.1")):
        answer = dig(daemon.tcp_ports[1], f"{name}.test", "A")
        assert answer.data == [data], answer.text


def curl(proxy: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run curl through a proxy."""
    options = ("-q", "-sS", "--noproxy", "", "-m", "50", "-x", proxy)
    command = (program("curl"), *options, *arguments)
    return subprocess.run(command, capture_output=True, env=environment(), timeout=60)


class TestOwnLookups:
    @pytest.mark.parametrize("scheme", ["socks5h", "http", "socks4a"])
    def test_client_reaches_a_name_that_only_the_configured_server_knows(
        self, world: World, origin: Origin, scheme: str
    ) -> None:
        process = curl(world.daemon.url(scheme), origin.url(host="origin.test"))
        assert (process.returncode, process.stdout) == (0, HELLO), process.stderr

    def test_client_is_refused_for_a_blocked_or_missing_name(self, world: World) -> None:
        for name in ("ads.test", "no.test"):
            output = ("-o", "/dev/null", "-w", "%{http_code}")
            process = curl(world.daemon.url("http"), *output, f"http://{name}/")
            assert process.stdout in (b"502", b"504"), process.stdout


def test_reload_changes_hosts(netproxyd: Start, servers: NameServers, tmp_path: Path) -> None:
    config = tmp_path / "names.yaml"
    server = f"{LOOPBACK}:{servers.port}"
    text = f"""
listeners: [{{listen: "{LOOPBACK}:0"}}, {{protocol: dns, listen: "{LOOPBACK}:0"}}]
dns: {{servers: "{server}", rules: [{{domain: dot.test, servers: "tcp://{server}"}}]%s}}
"""
    config.write_text(text % "")
    daemon = netproxyd("-c", str(config))
    port = daemon.tcp_ports[1]
    assert [dig(port, f"{name}.test", "A").data for name in ("www", "dot")] == [
        ["192.0.2.1"],
        ["192.0.2.12"],
    ]
    config.write_text(text % ", hosts: {www.test: 192.0.2.200}")
    daemon.reload()
    assert [dig(port, f"{name}.test", "A").data for name in ("www", "dot")] == [
        ["192.0.2.200"],
        ["192.0.2.12"],
    ]


def test_names_of_a_silent_server_do_not_delay_others(
    netproxyd: Start, servers: NameServers
) -> None:
    """Forty queries wait for a server that does not answer, while another server is asked."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        silent.bind((LOOPBACK, 0))
        silent.settimeout(SECONDS)
        daemon = netproxyd(
            config=f"""
listeners: [{{listen: "{LOOPBACK}:0"}}, {{protocol: dns, listen: "{LOOPBACK}:0"}}]
dns:
  servers: ["{LOOPBACK}:{servers.port}"]
  rules: [{{domain: "*.slow", servers: "{LOOPBACK}:{silent.getsockname()[1]}"}}]
"""
        )
        port = daemon.tcp_ports[1]
        for number in range(40):
            client.sendto(query(question(f"n{number}.slow"), id=number), (LOOPBACK, port))
        waiting: set[bytes] = set()
        while len(waiting) < 40:
            waiting.add(silent.recv(512)[12:])
        for options in ((), ("+tcp",)):
            assert dig(port, "www.test", "A", *options).data == ["192.0.2.1"]
        # On a slow machine the daemon may have given up waiting.
        while not nothing_comes(client, 0):
            assert client.recv(512)[3] & 15 == SERVFAIL
