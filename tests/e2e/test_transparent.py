"""Transparent listeners on a router: a client that knows of no proxy reaches the internet."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import subprocess
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.namespaces import Namespace
from tests.e2e.peers import TcpEcho, UdpEcho, echo, exactly, family, listen, udp
from tests.e2e.quic import EchoServer, transfer
from tests.e2e.router import (
    OTHER,
    PROXY,
    REDIRECT,
    ROUTER,
    ROUTER_OUT,
    SERVER,
    SERVER6,
    TPROXY,
    TPROXY_ALL,
    Net,
    configuration,
    network,
    rules,
    run_in,
)
from tests.e2e.support import SECONDS, Netproxyd, program, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.long]

SILENCE = 0.3
"""How long a test waits for an answer that must not come."""
LISTENERS = {"tproxy": TPROXY, "tproxy-all": TPROXY_ALL, "redirect": REDIRECT}
RULE = "rules: [{ip: [10.81.1.0/24], via: direct}]"
"""The targets in the client's network, which the upstream cannot reach."""
UPSTREAMS = {"direct": "", "socks5": f"default: socks5://{PROXY}:1080\n{RULE}"}


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with network() as created:
        yield created


@pytest.fixture(
    scope="module",
    params=[
        "tproxy-direct",
        "tproxy-all-direct",
        "redirect-direct",
        "tproxy-socks5",
        "redirect-socks5",
    ],
)
def router(
    request: pytest.FixtureRequest,
    shared_netproxyd: Start,
    net: Net,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Netproxyd]:
    """A daemon on the router, with its rules applied."""
    kind, _, upstream = request.param.rpartition("-")
    config = configuration(LISTENERS[kind], UPSTREAMS[upstream])
    proxy = None
    if upstream == "socks5":
        proxy = start(shared_netproxyd, net.internet, PROXY, upstream_config())
    daemon = start(shared_netproxyd, net.router, ROUTER, config)
    path = tmp_path_factory.mktemp("rules") / "netproxyd.yaml"
    path.write_text(config)
    with rules(net, path):
        yield daemon
    # Its UDP sessions outlive the test; test_replies.py has the sockets that they use.
    daemon.baseline = 0
    daemon.finish()
    if proxy is not None:
        proxy.baseline = 0
        proxy.finish()


def upstream_config() -> str:
    return f"listeners: [{{protocol: sps, listen: '{PROXY}:1080', allow_open: true}}]\n"


def start(netproxyd: Start, host: Namespace, address: str, config: str) -> Netproxyd:
    return netproxyd(config=config, host=address, make=host.socket, preexec_fn=host.enter)


def dial(host: Namespace, address: str, port: int) -> socket.socket:
    sock = host.socket(family(address), socket.SOCK_STREAM)
    sock.settimeout(SECONDS)
    sock.connect((address, port))
    return sock


@pytest.mark.parametrize("server", [SERVER, SERVER6])
def test_tcp_reaches_the_target_that_the_client_dialled(
    net: Net, router: Netproxyd, server: str
) -> None:
    with TcpEcho(server, net.internet.socket) as target:
        with dial(net.client, server, target.address[1]) as sock:
            echo(sock, b"hello" * 1000)
            assert sock.getpeername()[:2] == (server, target.address[1])


@pytest.mark.parametrize("server", [SERVER, SERVER6])
def test_reply_comes_from_the_address_that_the_client_wrote_to(
    net: Net, router: Netproxyd, server: str
) -> None:
    with UdpEcho(server, net.internet.socket) as target:
        with udp(wildcard(server), net.client.socket) as sock:
            sock.settimeout(SECONDS)
            for text in (b"first", b"", b"second" * 200):
                sock.sendto(text, (server, target.address[1]))
                data, source = sock.recvfrom(65535)
                assert (data, source[:2]) == (text, (server, target.address[1]))


class _Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def web_server(host: Namespace, address: str) -> Iterator[int]:
    """Answer each GET with hello; yield the port."""
    sock = listen(address, host.socket)
    server = http.server.HTTPServer((address, 0), _Hello, bind_and_activate=False)
    server.socket.close()
    server.socket = sock
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield sock.getsockname()[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answer(query: bytes) -> bytes:
    """Answer a question for an address with 192.0.2.7."""
    end = query.index(b"\0", 12) + 5
    record = b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04" + socket.inet_aton("192.0.2.7")
    return query[:2] + b"\x85\x80\0\x01\0\x01\0\0\0\0" + query[12:end] + record


@contextmanager
def nameserver(host: Namespace, address: str) -> Iterator[int]:
    """Answer questions over UDP, and one over TCP; yield the port."""
    with UdpEcho(address, host.socket, answer) as over_udp:
        port = over_udp.address[1]
        with listen(address, host.socket, port) as over_tcp:

            def serve() -> None:
                connection, _ = over_tcp.accept()
                with connection:
                    size = int.from_bytes(exactly(connection, 2), "big")
                    reply = answer(exactly(connection, size))
                    connection.sendall(len(reply).to_bytes(2, "big") + reply)

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            yield port
            thread.join(SECONDS)


def wildcard(address: str) -> str:
    return "::" if ":" in address else "0.0.0.0"


def test_reply_from_another_port_comes_from_there(net: Net, router: Netproxyd) -> None:
    """Hazard 151, as in TFTP: the server answers from a port of its own."""
    with udp(SERVER, net.internet.socket) as well_known, udp(SERVER, net.internet.socket) as other:
        with udp("0.0.0.0", net.client.socket) as client:
            for sock in (well_known, other, client):
                sock.settimeout(SECONDS)
            client.sendto(b"read request", (SERVER, well_known.getsockname()[1]))
            data, mapped = well_known.recvfrom(100)
            other.sendto(b"block 1", mapped)
            data, source = client.recvfrom(100)
            assert (data, source) == (b"block 1", other.getsockname())
            client.sendto(b"ack 1", source)
            assert other.recvfrom(100) == (b"ack 1", mapped)


def received(sock: socket.socket, source: tuple[str, int]) -> bytes:
    """Return the next datagram from an address, b"" if none comes for a second."""
    sock.settimeout(1)
    try:
        while True:
            data, address = sock.recvfrom(100)
            if address == source:
                return data
    except TimeoutError:
        return b""


def asked(sock: socket.socket, server: tuple[str, int], request: bytes) -> bytes:
    """Send a request; return the server's answer, b"" if none comes for a second."""
    sock.sendto(request, server)
    return received(sock, server)


def test_mapping_and_filtering_are_endpoint_independent(net: Net, router: Netproxyd) -> None:
    """What STUN (RFC 5780) finds out: one mapping for all servers, and strangers get in."""
    with (
        UdpEcho(SERVER, net.internet.socket) as first,
        UdpEcho(OTHER, net.internet.socket) as second,
        udp(OTHER, net.internet.socket) as stranger,
        udp("0.0.0.0", net.client.socket) as client,
    ):
        request = b"binding request"
        for server in (first, second):
            ask = partial(asked, client, server.address, request)
            assert wait_for(ask, SECONDS, "an answer") == request
        (mapped,) = set(first.sources)
        assert set(second.sources) == {mapped}
        address = stranger.getsockname()
        stranger.sendto(b"unasked", mapped)
        unasked = wait_for(partial(received, client, address), SECONDS, "the stranger's datagram")
        assert unasked == b"unasked"


@pytest.mark.any_workers
@pytest.mark.parametrize("server", [SERVER, SERVER6])
def test_quic_transfer(net: Net, router: Netproxyd, server: str, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    with EchoServer(tmp_path, server, net.internet.enter) as target:
        result: list[bytes] = []

        def run() -> None:
            net.client.enter()
            result.append(transfer(target.port, data, 3 * SECONDS, server))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert result == [data]


@pytest.mark.any_workers
@pytest.mark.parametrize("server", [SERVER, SERVER6])
def test_curl(net: Net, router: Netproxyd, server: str) -> None:
    with web_server(net.internet, server) as port:
        host = f"[{server}]" if ":" in server else server
        url = f"http://{host}:{port}/"
        assert run_in(net.client, "curl", "-sS", "-g", "-m", str(SECONDS), url) == "hello"


def test_dig_over_udp_and_tcp(net: Net, router: Netproxyd) -> None:
    with nameserver(net.internet, SERVER) as port:
        for transport in ("+notcp", "+tcp"):
            question = ("+short", "+tries=1", transport, "-p", str(port), f"@{SERVER}", "a.test")
            assert run_in(net.client, "dig", *question).split() == ["192.0.2.7"]


@pytest.mark.any_workers
# More bytes than all buffers hold: the program ends when the sender has got rid of them.  Datagrams
# are sent at 1 Mbit/s unless the program is told otherwise.
@pytest.mark.parametrize(
    "more",
    [
        *(("-n", "64M"), ("-n", "64M", "-R")),
        *(("-n", "2M", "-u", "-b", "20M", "-l", "1200"), ("-n", "2M", "-u", "-b", "20M", "-R")),
    ],
)
def test_iperf3(net: Net, router: Netproxyd, more: tuple[str, ...]) -> None:
    command = [program("iperf3"), "-s", "--forceflush", "-1", "-B", SERVER, "-p", "5201"]
    server = subprocess.Popen(
        command, preexec_fn=net.internet.enter, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if "Server listening" in line:
                break
        text = run_in(net.client, "iperf3", "-c", SERVER, "-p", "5201", "-J", *more)
        end = json.loads(text)["end"]
        assert end.get("sum_received", end.get("sum"))["bytes"] > 0
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


def test_what_no_rule_has_led_to_a_listener_is_refused(net: Net, router: Netproxyd) -> None:
    """Hazard 149: to dial its target, the listener itself, would be a loop."""
    ports = {
        (network, port)
        for network, host, port in router.listens
        if port in (7892, 7893) and host not in ("127.0.0.1", "::1")
    }
    for address in (ROUTER, ROUTER_OUT):
        for transport, port in ports:
            if transport == "tcp":
                # The reset may come before the end of connect().
                with contextlib.suppress(ConnectionResetError):
                    with dial(net.client, address, port) as sock:
                        assert sock.recv(1) == b""
            else:
                with udp("0.0.0.0", net.client.socket) as sock:
                    sock.settimeout(SILENCE)
                    sock.sendto(b"x", (address, port))
                    with pytest.raises(TimeoutError):
                        sock.recv(1)
    if ports:
        router.counted("requests_refused{not redirected}", 2)
        router.counted("drops{not redirected}", 2)


def test_the_services_of_the_router_are_left_alone(net: Net, router: Netproxyd) -> None:
    with TcpEcho(ROUTER_OUT, net.router.socket) as target:
        before = len(router.all_lines(" on lan"))
        with dial(net.client, ROUTER_OUT, target.address[1]) as sock:
            echo(sock, b"hello")
    assert len(router.all_lines(" on lan")) == before


def test_records_have_the_client_and_the_address_that_it_dialled(
    net: Net, router: Netproxyd
) -> None:
    with TcpEcho(SERVER, net.internet.socket) as target:
        with dial(net.client, SERVER, target.address[1]) as sock:
            echo(sock, b"hello")
            local = sock.getsockname()
        router.said(rf"client={local[0]}.* target={SERVER}:{target.address[1]}")
