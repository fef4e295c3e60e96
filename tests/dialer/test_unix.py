"""Proxies and targets at UNIX sockets, with a daemon on each side of the socket."""

from __future__ import annotations

import contextlib
import socket
from contextlib import closing
from pathlib import Path
from typing import Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol.proxy_protocol import encode_header
from tests.support.certificates import certificates
from tests.support.exchanges import GREETING, EchoTarget, converse, socks5_request
from tests.support.handlers import LOCALHOST, SECONDS, eventually
from tests.support.relays import Running, UdpClient, UdpPort, described, running
from tests.support.sockets import address_of, read_exactly, server

VERSIONS = pytest.mark.parametrize("version", ["v1", "v2"])
LISTENER = f"listeners: [{{listen: '{LOCALHOST}:0'}}]"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.sock"


@contextlib.contextmanager
def service(path: Path) -> Iterator[socket.socket]:
    """A service at a UNIX socket, whose script is the test."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        listening.settimeout(SECONDS)
        yield listening


def accept(listening: socket.socket) -> socket.socket:
    accepted, _ = listening.accept()
    accepted.settimeout(SECONDS)
    return accepted


@contextlib.contextmanager
def through(path: Path, upstream: str, more: str = "") -> Iterator[Running]:
    """Run a proxy at a UNIX socket, and a daemon with an upstream there."""
    with running(f"listeners: [{{listen: 'unix:{path}'{more}}}]"):
        with running(f"{LISTENER}\ndefault: {upstream.replace('PATH', str(path))}") as front:
            yield front


def connect(relay: Running) -> socket.socket:
    return socket.create_connection((LOCALHOST, relay.port), SECONDS)


@pytest.mark.parametrize("scheme", ["socks4", "socks4a", "socks5", "socks5h", "http"])
def test_connections_pass_through_a_proxy_at_a_socket(path: Path, scheme: str) -> None:
    with server(EchoTarget()) as target, through(path, f"{scheme}://unix:PATH") as front:
        for data in (b"x", b"y" * 300_000):
            with connect(front) as sock:
                got = converse(sock, GREETING + socks5_request(target) + data)
                assert got.endswith(b"got " + data)
        eventually(lambda: len(front.log.records) == 2)
        assert {record.upstream for record in front.log.records} == {f"{scheme}://unix:{path}"}


def test_proxy_at_a_socket_wants_a_login(path: Path) -> None:
    users = "\nusers: {alice: {password: 'p@ss'}}"
    upstream = "socks5h://alice:p%40ss@unix:PATH"
    with running(f"listeners: [{{listen: 'unix:{path}'}}]{users}"), server(EchoTarget()) as target:
        with running(f"{LISTENER}\ndefault: '{upstream.replace('PATH', str(path))}'") as front:
            with connect(front) as sock:
                assert converse(sock, GREETING + socks5_request(target) + b"x").endswith(b"got x")


def test_proxy_at_a_socket_may_speak_tls(path: Path) -> None:
    files = certificates()
    tls = f", tls: {{certificate: '{files.path('server.pem')}', key: '{files.path('server.key')}'}}"
    trust = f"tls: {{ca: '{files.path('ca.pem')}', server_name: localhost}}"
    upstream = f"{{url: 'https://unix:PATH', {trust}}}"
    with server(EchoTarget()) as target, through(path, upstream, tls) as front:
        with connect(front) as sock:
            assert converse(sock, GREETING + socks5_request(target) + b"x").endswith(b"got x")


@pytest.mark.parametrize("upstream", ["http://unix:PATH", "{url: 'http://unix:PATH', udp: uot}"])
def test_datagrams_pass_within_a_stream(path: Path, upstream: str) -> None:
    with through(path, upstream, ", protocol: http") as front, UdpPort() as target:
        with UdpClient(front.port) as client:
            client.check_echo(target)


def test_socks5_at_a_socket_carries_no_datagrams_of_its_own() -> None:
    lines = described(f"{LISTENER}\nupstreams: {{a: 'socks5h://unix:/a', b: 'http://unix:/b'}}")
    assert "upstream a: socks5h://unix:/a carries tcp; no udp: socks5h://unix:/a is a UNIX " in (
        "\n".join(lines)
    )
    assert "upstream b: http://unix:/b carries tcp, udp by connect-udp" in lines


def test_chain_begins_at_a_socket(path: Path) -> None:
    with running(LISTENER) as second, server(EchoTarget()) as target:
        chain = f"['http://unix:PATH', 'socks5h://{LOCALHOST}:{second.port}']"
        with through(path, chain) as front, connect(front) as sock:
            assert converse(sock, GREETING + socks5_request(target) + b"x").endswith(b"got x")


@VERSIONS
def test_proxy_at_a_socket_gets_the_header(path: Path, version: str) -> None:
    text = f"{{url: 'socks5h://unix:{path}', send_proxy: {version}}}"
    with service(path) as listening, running(f"{LISTENER}\ndefault: {text}") as front:
        with connect(front) as client:
            client.sendall(GREETING + socks5_request(Address("192.0.2.1", 80)))
            with closing(accept(listening)) as accepted:
                header = encode_header(version, address_of(client), Address("127.0.0.1", 0))
                assert b"UNKNOWN" not in header
                assert read_exactly(accepted, len(header) + 3) == header + GREETING


@pytest.mark.parametrize("header", ["", "v1", "v2"])
def test_target_at_a_socket_gets_the_bytes_of_clients(path: Path, header: str) -> None:
    more = f", send_proxy: {header}" if header else ""
    text = f"{{protocol: tcp, listen: '{LOCALHOST}:0', target: 'unix:{path}'{more}}}"
    # No upstream leads there; and a rule by address does not look for addresses.
    rest = "rules: [{ip: 10.0.0.0/8, via: block}]\ndefault: socks5h://192.0.2.1:1"
    with service(path) as listening, running(f"listeners: [{text}]\n{rest}") as front:
        with connect(front) as client:
            client.sendall(b"hello")
            with closing(accept(listening)) as accepted:
                listener = Address(LOCALHOST, front.port)
                sent = encode_header(header, address_of(client), listener) if header else b""
                assert read_exactly(accepted, len(sent) + 5) == sent + b"hello"
                accepted.sendall(b"bye")
            assert read_exactly(client, 3) == b"bye"
            assert client.recv(1) == b""
        eventually(lambda: front.log.records)
        (record,) = front.log.records
        assert (str(record.flow.target), record.upstream) == (f"unix:{path}", "direct")


def test_route_of_an_sni_listener_leads_to_a_socket(path: Path) -> None:
    request = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"
    route = f"{{host: a.example, target: 'unix:{path}', send_proxy: v1}}"
    text = f"{{protocol: sni, listen: '{LOCALHOST}:0', routes: [{route}]}}"
    rest = "default: socks5://192.0.2.1:1"
    with service(path) as listening, running(f"listeners: [{text}]\n{rest}") as front:
        with connect(front) as client:
            client.sendall(request)
            with closing(accept(listening)) as accepted:
                header = encode_header("v1", address_of(client), Address(LOCALHOST, front.port))
                assert read_exactly(accepted, len(header) + len(request)) == header + request


def test_rule_may_block_a_target_at_a_socket(path: Path) -> None:
    text = f"{{protocol: tcp, listen: '{LOCALHOST}:0', target: 'unix:{path}', name: app}}"
    rules = "rules: [{listener: app, client: 127.0.0.0/8, via: block}]"
    with service(path), running(f"listeners: [{text}]\n{rules}") as front:
        with connect(front) as client, pytest.raises(ConnectionResetError):
            client.recv(1)
        eventually(lambda: front.log.records)
        assert front.log.records[0].decided == "rules[0]"


@pytest.mark.parametrize("kind", ["target", "upstream"])
def test_record_says_what_is_wrong_with_a_socket(path: Path, kind: str) -> None:
    """Hazard 165."""
    text = LISTENER + f"\ndefault: socks5h://unix:{path}"
    if kind == "target":
        text = f"listeners: [{{protocol: tcp, listen: '{LOCALHOST}:0', target: 'unix:{path}'}}]"
    with running(text) as front:
        with connect(front) as client, contextlib.suppress(ConnectionResetError):
            client.sendall(GREETING + socks5_request(Address("192.0.2.1", 80)))
            while client.recv(100):
                pass
        eventually(lambda: front.log.records)
        named = f"unix:{path}" if kind == "target" else f"socks5h://unix:{path}"
        assert front.log.records[0].ended == (
            f"{named}: there is no such socket (is its service running?)"
        )
        assert front.count("dial_failures", "connection refused") == 1
