"""PROXY headers that a tcp listener and upstreams send, in a whole daemon."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.net.stream import Stream, complete
from netproxy.protocol.proxy_protocol import encode_header
from tests.support.certificates import certificates
from tests.support.handlers import LOCALHOST, SECONDS
from tests.support.relays import running
from tests.support.sockets import address_of, listen, read_exactly, read_to_end

VERSIONS = pytest.mark.parametrize("version", ["v1", "v2"])
CONNECT = b"\5\1\0\5\1\0\1\xc0\0\2\1\0\x50"
"""SOCKS5: no login, CONNECT to 192.0.2.1:80."""
GRANTED = b"\5\0\5\0\0\1\0\0\0\0\0\0"


def connect(port: int) -> socket.socket:
    return socket.create_connection((LOCALHOST, port), SECONDS)


class TestFixedTarget:
    @VERSIONS
    def test_target_gets_one_header_before_the_clients_bytes(self, version: str) -> None:
        with listen() as target:
            text = f"{{protocol: tcp, listen: '{LOCALHOST}:0', target: '{address_of(target)}'"
            with running(f"listeners: [{text}, send_proxy: {version}}}]") as relay:
                with closing(connect(relay.port)) as client:
                    client.sendall(b"first")
                    with closing(target.accept()[0]) as accepted:
                        accepted.settimeout(SECONDS)
                        listener = Address(LOCALHOST, relay.port)
                        header = encode_header(version, address_of(client), listener)
                        assert read_exactly(accepted, len(header) + 5) == header + b"first"
                        accepted.sendall(b"answer")
                        assert read_exactly(client, 6) == b"answer"
                        client.sendall(b"second")
                        client.shutdown(socket.SHUT_WR)
                        assert read_to_end(accepted) == b"second"

    def test_target_that_speaks_first_is_not_delayed(self) -> None:
        with listen() as target:
            text = f"{{protocol: tcp, listen: '{LOCALHOST}:0', target: '{address_of(target)}'"
            with running(f"listeners: [{text}, send_proxy: v1}}]") as relay:
                with closing(connect(relay.port)) as client:
                    with closing(target.accept()[0]) as accepted:
                        accepted.settimeout(SECONDS)
                        accepted.sendall(b"220 ready\r\n")
                        assert read_exactly(client, 11) == b"220 ready\r\n"
                        assert complete(Stream(accepted).read_until(b"\n", 107)).endswith(b"\r\n")

    def test_header_names_the_client_of_a_received_header(self) -> None:
        client_address = Address("198.51.100.7", 4321)
        with listen() as target:
            text = f"{{protocol: tcp, listen: '{LOCALHOST}:0', target: '{address_of(target)}'"
            more = f"send_proxy: v2, proxy_protocol: [{LOCALHOST}]"
            with running(f"listeners: [{text}, {more}}}]") as relay:
                listener = Address(LOCALHOST, relay.port)
                with closing(connect(relay.port)) as client:
                    client.sendall(encode_header("v1", client_address, listener))
                    with closing(target.accept()[0]) as accepted:
                        accepted.settimeout(SECONDS)
                        header = encode_header("v2", client_address, listener)
                        assert read_exactly(accepted, len(header)) == header


class TestUpstream:
    @VERSIONS
    def test_proxy_gets_the_header_before_its_own_protocol(self, version: str) -> None:
        with listen() as proxy:
            text = f"{{url: 'socks5h://{address_of(proxy)}', send_proxy: {version}}}"
            with running(f"listeners: [{{listen: '{LOCALHOST}:0'}}]\ndefault: {text}\n") as relay:
                with closing(connect(relay.port)) as client:
                    client.sendall(CONNECT)
                    with closing(proxy.accept()[0]) as accepted:
                        accepted.settimeout(SECONDS)
                        header = encode_header(version, address_of(client), address_of(proxy))
                        assert read_exactly(accepted, len(header) + 3) == header + b"\5\1\0"
                        accepted.sendall(b"\5\0")
                        assert read_exactly(accepted, 10) == CONNECT[3:]
                        accepted.sendall(GRANTED[2:])
                        assert read_exactly(client, 4) == b"\5\0\5\0"

    def test_header_comes_before_tls(self) -> None:
        with listen() as proxy:
            text = (
                f"{{url: 'https://{address_of(proxy)}', send_proxy: v2, "
                f"tls: {{ca: '{certificates().path('ca.pem')}'}}}}"
            )
            with running(f"listeners: [{{listen: '{LOCALHOST}:0'}}]\ndefault: {text}\n") as relay:
                with closing(connect(relay.port)) as client:
                    client.sendall(CONNECT)
                    with closing(proxy.accept()[0]) as accepted:
                        accepted.settimeout(SECONDS)
                        header = encode_header("v2", address_of(client), address_of(proxy))
                        # A TLS record with a handshake message follows.
                        assert read_exactly(accepted, len(header) + 2) == header + b"\x16\3"

    def test_second_hop_gets_its_header_through_the_first(self) -> None:
        second = Address("192.0.2.9", 1080)
        with listen() as proxy:
            first = f"socks5h://{address_of(proxy)}"
            text = f"['{first}', {{url: 'socks5h://{second}', send_proxy: v2}}]"
            with running(f"listeners: [{{listen: '{LOCALHOST}:0'}}]\ndefault: {text}\n") as relay:
                with closing(connect(relay.port)) as client:
                    client.sendall(CONNECT)
                    with closing(proxy.accept()[0]) as accepted:
                        accepted.settimeout(SECONDS)
                        assert read_exactly(accepted, 3) == b"\5\1\0"
                        accepted.sendall(b"\5\0")
                        assert read_exactly(accepted, 10) == b"\5\1\0\1\xc0\0\2\x09\4\x38"
                        accepted.sendall(GRANTED[2:])
                        header = encode_header("v2", address_of(client), second)
                        assert read_exactly(accepted, len(header)) == header
