"""netproxyd's dns listener and its own lookups, with unbound behind it and dig before it."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

from netproxy.resolver.servers import TRIES, TRY_SECONDS
from tests.e2e import nameservers
from tests.e2e.conftest import Start
from tests.e2e.nameservers import LONG, MIDDLE, UNKNOWN, NameServers, dig
from tests.e2e.origin import HELLO, Origin, serving
from tests.e2e.support import ANY_PORT, LOOPBACK, Netproxyd, environment, program, wait_for
from tests.e2e.upstreams import Programs
from tests.support.certificates import Certificates, certificates
from tests.support.dns import query, question
from tests.support.sockets import nothing_comes

pytestmark = pytest.mark.e2e


class Https(ThreadingHTTPServer):
    """DNS over HTTPS on HTTP/1.1, before the name server on a port of this machine; `asked` are the paths of requests."""

    daemon_threads = True

    def __init__(self, made: Certificates, behind: int) -> None:
        super().__init__((LOOPBACK, 0), _Post)
        self.behind = behind
        self.asked: list[str] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(made.path("server.pem"), made.path("server.key"))
        self.socket = context.wrap_socket(
            self.socket, server_side=True, do_handshake_on_connect=False
        )

    @property
    def port(self) -> int:
        return self.server_address[1]


class _Post(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Https

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(5)
            sock.sendto(body, (LOOPBACK, self.server.behind))
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
    """`port`: of the dns listener; `tls_port`, `strict_port`: of one within TLS, and of one for another client."""

    daemon: Netproxyd
    upstream: Netproxyd
    servers: NameServers
    https: Https
    port: int
    tls_port: int
    strict_port: int


@pytest.fixture(scope="module")
def made() -> Certificates:
    return certificates()


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    with Programs(tmp_path_factory.mktemp("nameservers")) as started:
        yield started


@pytest.fixture(scope="module")
def servers(programs: Programs, made: Certificates) -> NameServers:
    return nameservers.start(programs, made)


@pytest.fixture(scope="module")
def https(servers: NameServers, made: Certificates) -> Iterator[Https]:
    with Https(made, servers.port) as server:
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
    made: Certificates,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    """At its end a reload gives up what is kept of name servers, or descriptors would be counted."""
    upstream = shared_netproxyd("-l", ANY_PORT)
    tls = f"tls: {{ca: '{made.path('ca.pem')}', server_name: localhost}}"
    config = tmp_path_factory.mktemp("world") / "netproxyd.yaml"
    config.write_text(f"""
listeners:
  - {{name: main, listen: "{LOOPBACK}:0"}}
  - {{name: names, protocol: dns, listen: "{LOOPBACK}:0"}}
  - {{name: secure, protocol: dns, listen: "{LOOPBACK}:0", network: tcp, tls: {made.listener()}}}
  - {{name: strict, protocol: dns, listen: "{LOOPBACK}:0", clients: 127.0.0.2}}
upstreams: {{far: "{upstream.url("socks5")}"}}
dns:
  servers: ["{LOOPBACK}:{servers.port}"]
  hosts: {{printer.lan: [192.0.2.9, "2001:db8::9"]}}
  rules:
    - {{domain: ads.test, block: true}}
    - {{domain: tcp.test, servers: "tcp://{LOOPBACK}:{servers.port}"}}
    - {{domain: dot.test, servers: {{url: "tls://{LOOPBACK}:{servers.tls_port}", {tls}}}}}
    - {{domain: doh.test, servers: {{url: "https://{LOOPBACK}:{https.port}/dns-query", {tls}}}}}
    - {{domain: far.test, servers: {{url: "{LOOPBACK}:{servers.port}", upstream: far}}}}
    - {{domain: wrong.test, servers: {{url: "tls://{LOOPBACK}:{servers.tls_port}", tls: {{ca: '{made.path("stranger.pem")}'}}}}}}
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


class TestDig:
    @pytest.mark.parametrize("kind, data", [("A", "192.0.2.1"), ("AAAA", "2001:db8::1")])
    def test_addresses(self, world: World, kind: str, data: str) -> None:
        for _ in range(2):  # asked for, and kept
            found = dig(world.port, "www.test", kind)
            assert (found.status, found.data) == ("NOERROR", [data]), found.text
            assert {"qr", "rd", "ra"} <= set(found.flags)

    def test_a_kept_answer_is_not_asked_for_again_and_ages(self, world: World) -> None:
        first = dig(world.port, "udp.test", "A")
        asked = world.daemon.status()["queries{forwarded}"]
        again = [dig(world.port, "udp.test", "A") for _ in range(3)]
        assert world.daemon.status()["queries{forwarded}"] == asked
        assert all(
            one.data == ["192.0.2.10"] and 0 < int(one.records[0][1]) <= int(first.records[0][1])
            for one in again
        )

    def test_a_long_text_by_tcp_alone(self, world: World) -> None:
        found = dig(world.port, "big.test", "TXT", "+tcp")
        assert found.data == [" ".join(f'"{one}"' for one in LONG)], found.text

    def test_a_long_text_is_truncated_and_asked_for_again_by_tcp(self, world: World) -> None:
        found = dig(world.port, "big.test", "TXT")
        assert "Truncated, retrying in TCP mode" in found.text
        assert found.data == [" ".join(f'"{one}"' for one in LONG)]

    def test_the_size_that_a_client_takes_counts(self, world: World) -> None:
        found = dig(world.port, "middle.test", "TXT", "+bufsize=4096")
        assert "Truncated" not in found.text and found.data == [
            " ".join(f'"{one}"' for one in MIDDLE)
        ]
        short = dig(world.port, "middle.test", "TXT", "+bufsize=512", "+ignore")
        assert "tc" in short.flags and not short.records

    @pytest.mark.parametrize(
        "option, has_it", [("+noedns", False), ("+edns=0", True), ("+dnssec", True)]
    )
    def test_edns_is_answered_with_edns(self, world: World, option: str, has_it: bool) -> None:
        found = dig(world.port, "www.test", "A", option)
        assert found.data == ["192.0.2.1"]
        assert ("OPT PSEUDOSECTION" in found.text) is has_it

    def test_an_unknown_kind(self, world: World) -> None:
        for _ in range(2):
            found = dig(world.port, "odd.test", "TYPE65280")
            assert found.data == [f"\\# 6 {UNKNOWN}"], found.text

    def test_flags_pass(self, world: World) -> None:
        assert "cd" in dig(world.port, "www.test", "A", "+cdflag").flags
        assert "rd" not in dig(world.port, "www.test", "A", "+norecurse").flags

    @pytest.mark.parametrize("name", ["wWw.TeSt", "WWW.test"])
    def test_an_answer_is_spelt_as_its_query(self, world: World, name: str) -> None:
        found = dig(world.port, name, "A")
        assert found.records[0][0] == f"{name}." and found.data == ["192.0.2.1"]

    def test_no_such_name(self, world: World) -> None:
        for _ in range(2):
            found = dig(world.port, "no.test", "A")
            assert (found.status, found.records) == ("NXDOMAIN", [])
            assert "SOA" in found.text

    def test_names_without_a_server(self, world: World) -> None:
        assert dig(world.port, "printer.lan", "A").data == ["192.0.2.9"]
        assert dig(world.port, "Printer.LAN", "AAAA").data == ["2001:db8::9"]
        blocked = dig(world.port, "ads.test", "A")
        assert (blocked.status, blocked.records) == ("NXDOMAIN", [])

    def test_within_tls(self, world: World, made: Certificates) -> None:
        found = dig(
            world.tls_port,
            "www.test",
            "A",
            "+tls",
            f"+tls-ca={made.path('ca.pem')}",
            "+tls-hostname=localhost",
        )
        assert found.data == ["192.0.2.1"], found.text

    def test_strangers_have_no_answer(self, world: World) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(query(question("www.test")), (LOOPBACK, world.strict_port))
            wait_for(
                lambda: world.daemon.status().get("drops{client not allowed}"),
                5,
                "a stranger counted",
            )
            assert nothing_comes(sock, 0)
        assert dig(world.strict_port, "www.test", "A", "-b", "127.0.0.2").data == ["192.0.2.1"]
        assert not dig(world.strict_port, "www.test", "A", "+tcp").status


class TestWays:
    def test_by_tcp(self, world: World) -> None:
        assert dig(world.port, "tcp.test", "A").data == ["192.0.2.11"]

    def test_by_tls(self, world: World) -> None:
        assert dig(world.port, "dot.test", "A").data == ["192.0.2.12"]

    def test_by_https(self, world: World) -> None:
        before = len(world.https.asked)
        assert dig(world.port, "doh.test", "A").data == ["192.0.2.13"]
        assert world.https.asked[before:] == ["/dns-query"]

    def test_by_an_upstream(self, world: World) -> None:
        assert dig(world.port, "far.test", "A").data == ["192.0.2.14"]
        # the upstream writes its line when the connection ends, which is kept: it counts it at once
        assert world.upstream.status()["connections{accepted}"] >= 1

    def test_a_server_that_is_not_who_it_should_be_is_not_believed(self, world: World) -> None:
        assert dig(world.port, "wrong.test", "A").status == "SERVFAIL"


def test_dnsdist_by_https(
    shared_netproxyd: Start, servers: NameServers, programs: Programs, made: Certificates
) -> None:
    port = nameservers.start_https(programs, made, servers.port)
    daemon = shared_netproxyd(
        config=f"""
listeners: [{{listen: "{LOOPBACK}:0"}}, {{protocol: dns, listen: "{LOOPBACK}:0"}}]
dns: {{servers: {{url: "https://localhost:{port}", tls: {{ca: '{made.path("ca.pem")}'}}}}, hosts: {{localhost: {LOOPBACK}}}}}
"""
    )
    for name, data in (("doh", "192.0.2.13"), ("www", "192.0.2.1")):
        found = dig(daemon.tcp_ports[1], f"{name}.test", "A")
        assert found.data == [data], found.text


class TestOurOwnLookups:
    @pytest.mark.parametrize("scheme", ["socks5h", "http", "socks4a"])
    def test_a_name_that_unbound_alone_knows(
        self, world: World, origin: Origin, scheme: str
    ) -> None:
        done = subprocess.run(
            (
                program("curl"),
                "-q",
                "-sS",
                "--noproxy",
                "",
                "-m",
                "20",
                "-x",
                world.daemon.url(scheme),
                origin.url(host="origin.test"),
            ),
            capture_output=True,
            env=environment(),
            timeout=30,
        )
        assert (done.returncode, done.stdout) == (0, HELLO), done.stderr

    def test_a_name_that_is_blocked_or_is_not_there(self, world: World) -> None:
        for name in ("ads.test", "no.test"):
            done = subprocess.run(
                (
                    program("curl"),
                    "-q",
                    "-sS",
                    "--noproxy",
                    "",
                    "-m",
                    "20",
                    "-o",
                    "/dev/null",
                    "-w",
                    "%{http_code}",
                    "-x",
                    world.daemon.url("http"),
                    f"http://{name}/",
                ),
                capture_output=True,
                env=environment(),
                timeout=30,
            )
            assert done.stdout in (b"502", b"504"), done.stdout


def test_a_reload_changes_what_is_known(
    netproxyd: Start, servers: NameServers, tmp_path: Path
) -> None:
    config = tmp_path / "names.yaml"
    text = f"""
listeners: [{{listen: "{LOOPBACK}:0"}}, {{protocol: dns, listen: "{LOOPBACK}:0"}}]
dns: {{servers: "{LOOPBACK}:{servers.port}", rules: [{{domain: dot.test, servers: "tcp://{LOOPBACK}:{servers.port}"}}]%s}}
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


def test_slow_names_delay_no_other(netproxyd: Start, servers: NameServers) -> None:
    """Forty names of a name server that says nothing, and one of another's, by UDP and by TCP."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        silent.bind((LOOPBACK, 0))
        silent.settimeout(10)
        daemon = netproxyd(
            config=f"""
listeners: [{{listen: "{LOOPBACK}:0"}}, {{protocol: dns, listen: "{LOOPBACK}:0"}}]
dns:
  servers: ["{LOOPBACK}:{servers.port}"]
  rules: [{{domain: "*.slow", servers: "{LOOPBACK}:{silent.getsockname()[1]}"}}]
"""
        )
        port = daemon.tcp_ports[1]
        began = time.monotonic()
        for at in range(40):
            client.sendto(query(question(f"n{at}.slow"), id=at), (LOOPBACK, port))
        waiting: set[bytes] = set()
        while len(waiting) < 40:
            waiting.add(silent.recv(512)[12:])
        for way in ((), ("+tcp",)):
            assert dig(port, "www.test", "A", *way).data == ["192.0.2.1"]
        assert (
            nothing_comes(client, 0) or time.monotonic() > began + TRIES * TRY_SECONDS
        )  # SERVFAIL, in the end
