"""Proxies within TLS (https, socks5+tls, socks5h+tls): handshakes, trust, and errors."""

from __future__ import annotations

import socket
import ssl
from typing import Any, Callable

import pytest

from netproxy.config.schema import HopConfig, UpstreamConfig, UpstreamTlsConfig
from netproxy.dialer.factory import DialerFactory
from netproxy.errors import ConfigError, DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.routing import Dialer
from netproxy.net.stream import Stream, complete
from tests.net.test_tls_client import LIMITS, MEGABYTE, RECORD, Peer, bulk, digest, relay
from tests.net.test_tls_client import server as offering
from tests.support.certificates import Certificates, certificates
from tests.support.flows import tcp_to, udp_to
from tests.support.sockets import Task, read_to_end, refusing, server, tcp_pair

TARGET = Address("example.com", 443)
LITERAL = Address("198.51.100.7", 443)
"""A target for dials that fail: nothing has to be looked up for it."""
CONNECT = b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n"
OK = b"HTTP/1.1 200 OK\r\n\r\n"
BOUND = b"\x05\x00\x00\x01\x0a\x00\x00\x01\x1f\x90"
SECRET = "hunter2"
SCHEMES = ("https", "socks5+tls", "socks5h+tls")
Script = Callable[[Peer], Any]


@pytest.fixture(scope="module")
def certs() -> Certificates:
    return certificates()


def hop(certs: Certificates, scheme: str, address: Address, **tls: Any) -> HopConfig:
    return HopConfig(scheme, address, tls=UpstreamTlsConfig(**{"ca": certs.path("ca.pem")} | tls))


def upstream(factory: DialerFactory, *hops: HopConfig, name: str = "") -> Dialer:
    """Return the dialer of a chain."""
    return factory.dialer(UpstreamConfig(hops, name))


def failure(dialer: Dialer) -> DialError:
    """Dial and return the error."""
    with pytest.raises(DialError) as caught:
        dialer.dial(tcp_to(LITERAL))
    return caught.value


def behind(context: ssl.SSLContext, script: Script) -> Callable[[socket.socket], None]:
    """Return a script that runs behind the TLS handshake, if the client completes that."""

    def play(sock: socket.socket) -> None:
        peer = Peer(sock)
        try:
            peer.secure(context)
        except (ssl.SSLError, AssertionError):
            return
        script(peer)

    return play


def head(peer: Peer) -> bytes:
    """Read a request up to the empty line."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        data += peer.read(1)
    return data


def proxy(more: bytes = b"") -> Script:
    """Return the script of an HTTP proxy: a CONNECT request byte for byte, then an echo."""

    def script(peer: Peer) -> None:
        assert head(peer) == CONNECT + more + b"\r\n"
        peer.send(OK)
        echo(peer)

    return script


def socks(request: bytes, login: bytes = b"") -> Script:
    """Return the script of a SOCKS5 proxy: a request byte for byte, then an echo."""

    def script(peer: Peer) -> None:
        accept_socks(peer, request, login)
        echo(peer)

    return script


def accept_socks(peer: Peer, request: bytes, login: bytes = b"") -> None:
    """Read a login and a request byte for byte, and grant it."""
    method = b"\x02" if login else b"\x00"
    assert peer.read(3) == b"\x05\x01" + method
    peer.send(b"\x05" + method)
    if login:
        assert peer.read(len(login)) == login
        peer.send(b"\x01\x00")
    assert peer.read(len(request)) == request
    peer.send(BOUND)


def echo(peer: Peer) -> None:
    """Send back what comes until the end."""
    peer.send(peer.read_to_end())
    peer.end()
    peer.sock.recv(1)


def through(dialer: Dialer) -> None:
    """Send bytes through a dialer to an echo."""
    stream: Any = dialer.dial(tcp_to(TARGET))
    assert not stream.plain
    stream.limit(5.0)
    stream.write(b"there and back")
    stream.shutdown_write()
    assert complete(stream.read_exactly(14)) == b"there and back"
    assert complete(stream.read_some(1)) == b""
    stream.close()


class TestHandshake:
    @pytest.mark.parametrize(
        "version",
        [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3],
        ids=lambda version: version.name,
    )
    def test_connect_works_within_tls(
        self, factory: DialerFactory, certs: Certificates, version: ssl.TLSVersion
    ) -> None:
        with server(behind(offering(certs, version=version), proxy())) as address:
            through(upstream(factory, hop(certs, "https", address)))

    def test_password_is_sent_within_tls(self, factory: DialerFactory, certs: Certificates) -> None:
        """Hazard 111; RFC 7617."""
        script = proxy(b"Proxy-Authorization: Basic dXNlcjpodW50ZXIy\r\n")
        with server(behind(offering(certs), script)) as address:
            through(
                upstream(
                    factory, hop(certs, "https", address)._replace(user="user", password=SECRET)
                )
            )

    @pytest.mark.parametrize("login", [b"", b"\x01\x04user\x07hunter2"])
    def test_socks5h_works_within_tls(
        self, factory: DialerFactory, certs: Certificates, login: bytes
    ) -> None:
        script = socks(b"\x05\x01\x00\x03\x0bexample.com\x01\xbb", login)
        with server(behind(offering(certs), script)) as address:
            config = hop(certs, "socks5h+tls", address)
            through(
                upstream(
                    factory, config._replace(user="user", password=SECRET) if login else config
                )
            )

    def test_socks5_within_tls_resolves_names_here(
        self, factory: DialerFactory, certs: Certificates, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with server(
            behind(offering(certs), socks(b"\x05\x01\x00\x01\xc6\x33\x64\x07\x01\xbb"))
        ) as address:
            monkeypatch.setattr(
                socket,
                "getaddrinfo",
                lambda *_, **__: [
                    (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("198.51.100.7", 443))
                ],
            )
            through(upstream(factory, hop(certs, "socks5+tls", address)))

    def test_server_name_is_sent_and_verified(
        self, factory: DialerFactory, certs: Certificates
    ) -> None:
        seen: list[str | None] = []
        context = offering(certs)
        context.sni_callback = lambda connection, name, context: seen.append(name)
        with server(behind(context, proxy())) as address:
            through(upstream(factory, hop(certs, "https", Address("localhost", address.port))))
            through(upstream(factory, hop(certs, "https", address, server_name="localhost")))
            through(upstream(factory, hop(certs, "https", address)))
            through(
                upstream(
                    factory,
                    hop(certs, "https", address, server_name="inside.example", insecure=True),
                )
            )
        assert seen == ["localhost", "localhost", None, "inside.example"]

    def test_client_certificate_is_shown_to_the_proxy(
        self, factory: DialerFactory, certs: Certificates
    ) -> None:
        context = offering(certs)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(certs.path("ca.pem"))
        shown: list[Any] = []

        def script(peer: Peer) -> None:
            shown.append(peer.layers[0].tls.getpeercert())
            proxy()(peer)

        with server(behind(context, script)) as address:
            through(
                upstream(
                    factory,
                    hop(
                        certs,
                        "https",
                        address,
                        certificate=certs.path("client.pem"),
                        key=certs.path("client.key"),
                    ),
                )
            )
        assert shown[0]["subject"] == ((("commonName", "test client"),),)

    def test_bytes_behind_the_reply_are_the_targets(
        self, factory: DialerFactory, certs: Certificates
    ) -> None:
        """Hazard 62.  In one record with the reply, and in others behind it."""

        def script(peer: Peer) -> None:
            head(peer)
            peer.sock.sendall(peer.seal(OK + b"first, ") + peer.seal(bulk(20_000)))
            echo(peer)

        with server(behind(offering(certs), script)) as address, tcp_pair() as (ours, theirs):
            stream = upstream(factory, hop(certs, "https", address)).dial(tcp_to(TARGET))
            relaying = Task(relay, Stream(ours), stream, LIMITS)
            assert Peer(theirs).read(20_007) == b"first, " + bulk(20_000)
            theirs.shutdown(socket.SHUT_WR)
            assert read_to_end(theirs) == b""
            assert relaying.result().received == 20_007


class TestTrust:
    """Hazard 118: there is no fallback, and the error says which hop and why, without secrets."""

    def refused(self, factory: DialerFactory, config: HopConfig, context: ssl.SSLContext) -> str:
        """Dial, check that no handshake was completed, and return the error without the label."""
        asked: list[Peer] = []
        with server(behind(context, asked.append)) as address:
            server_at = config.server._replace(port=address.port)
            error = failure(
                upstream(
                    factory,
                    config._replace(server=server_at, user="user", password=SECRET),
                    name="office",
                )
            )
        assert not asked
        assert (error.reason, error.upstream) == (Reason.PROTOCOL, True)
        assert error.hop == f"'office' ({config.scheme}://{server_at})"
        assert str(error).startswith(f"{error.hop}: TLS: ")
        cause = error.__cause__
        assert cause is not None
        assert SECRET not in f"{error!r} {cause!r} {cause.__cause__!r}"
        return str(error).removeprefix(f"{error.hop}: ")

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_certificate_for_another_name_is_refused(
        self, factory: DialerFactory, certs: Certificates, scheme: str
    ) -> None:
        config = hop(certs, scheme, Address("127.0.0.1", 0), server_name="proxy.example")
        assert (
            self.refused(factory, config, offering(certs))
            == "TLS: Hostname mismatch, certificate is not valid for 'proxy.example'."
        )

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_self_signed_certificate_is_refused(
        self, factory: DialerFactory, certs: Certificates, scheme: str
    ) -> None:
        config = hop(certs, scheme, Address("127.0.0.1", 0))
        assert (
            self.refused(factory, config, offering(certs, "stranger"))
            == "TLS: self-signed certificate"
        )

    def test_certificate_of_an_unknown_authority_is_refused(
        self, factory: DialerFactory, certs: Certificates
    ) -> None:
        config = hop(certs, "https", Address("localhost", 0), ca="")
        assert (
            self.refused(factory, config, offering(certs))
            == "TLS: unable to get local issuer certificate"
        )

    def test_insecure_accepts_a_self_signed_certificate(
        self, factory: DialerFactory, certs: Certificates
    ) -> None:
        with server(behind(offering(certs, "stranger"), proxy())) as address:
            through(upstream(factory, hop(certs, "https", address, insecure=True)))

    def test_missing_client_certificate_is_an_error(
        self, factory: DialerFactory, certs: Certificates
    ) -> None:
        """In TLS 1.3 a failed read after the handshake shows it."""
        for version, reasons in (
            (ssl.TLSVersion.TLSv1_2, {Reason.PROTOCOL}),
            (ssl.TLSVersion.TLSv1_3, {Reason.PROTOCOL, Reason.GENERAL}),
        ):
            context = offering(certs, version=version)
            context.verify_mode = ssl.CERT_REQUIRED
            with server(behind(context, lambda peer: None)) as address:
                error = failure(upstream(factory, hop(certs, "https", address)))
            assert error.reason in reasons and error.upstream
            assert str(error).startswith(f"https://{address}: ")


class TestNoTls:
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize(
        "said",
        [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x05\x00", b"SSH-2.0-OpenSSH_9\r\n", b"\0" * 64],
        ids=("http", "socks5", "ssh", "zeros"),
    )
    def test_proxy_without_tls_is_a_protocol_error(
        self, factory: DialerFactory, certs: Certificates, scheme: str, said: bytes
    ) -> None:
        def script(sock: socket.socket) -> None:
            sock.sendall(said)
            sock.shutdown(socket.SHUT_WR)
            sent = read_to_end(sock)
            assert sent[:1] == b"\x16" and SECRET.encode() not in sent

        with server(script) as address:
            error = failure(
                upstream(
                    factory, hop(certs, scheme, address)._replace(user="user", password=SECRET)
                )
            )
        assert (error.reason, error.upstream) == (Reason.PROTOCOL, True)
        assert str(error).startswith(f"{scheme}://{address}: TLS: ")

    def test_incomplete_handshake_is_a_protocol_error(
        self, factory: DialerFactory, certs: Certificates
    ) -> None:
        """Hazard 119.  The server closes within its first answer, at every 25th byte."""
        flights: list[bytes] = []

        def answer(sock: socket.socket) -> bytes:
            """Return the first answer, a new one for each client: nonces differ."""
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = offering(certs).wrap_bio(incoming, outgoing, server_side=True)
            incoming.write(sock.recv(65536))
            with pytest.raises(ssl.SSLWantReadError):
                tls.do_handshake()
            return outgoing.read()

        def script(sock: socket.socket) -> None:
            flights.append(answer(sock))
            sock.sendall(flights[-1][: 25 * (len(flights) - 1)])
            sock.shutdown(socket.SHUT_WR)
            read_to_end(sock)

        with server(script) as address:
            dialer = upstream(factory, hop(certs, "https", address))
            while not flights or 25 * (len(flights) - 1) < len(flights[-1]):
                error = failure(dialer)
                assert (error.reason, error.upstream) == (Reason.PROTOCOL, True)
                assert str(error).startswith(f"https://{address}: ")
        assert len(flights) > 20

    @pytest.mark.parametrize("kept", [0, 1, 5, 300])
    def test_silent_handshake_is_a_timeout(
        self, factory: DialerFactory, certs: Certificates, kept: int
    ) -> None:
        """Hazard 119."""

        def script(sock: socket.socket) -> None:
            sock.sendall(b"\x16\x03\x03\x10\x00"[:kept] + bytes(max(0, kept - 5)))
            read_to_end(sock)

        with server(script) as address:
            error = failure(upstream(factory, hop(certs, "https", address)._replace(timeout=0.1)))
        assert (error.reason, error.upstream, str(error)) == (
            Reason.TIMEOUT,
            True,
            f"https://{address}: timed out",
        )


class TestErrors:
    def test_refusal_within_tls_is_about_the_target(
        self, factory: DialerFactory, certs: Certificates
    ) -> None:
        def script(peer: Peer) -> None:
            head(peer)
            peer.send(b"HTTP/1.1 403 Forbidden\r\n\r\n")
            peer.sock.recv(1)

        with server(behind(offering(certs), script)) as address:
            error = failure(upstream(factory, hop(certs, "https", address)))
        assert (error.reason, error.upstream) == (Reason.DENIED, False)
        assert str(error) == f"https://{address}: {LITERAL}: 403 forbidden"

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_refused_connection_to_the_proxy_is_its_fault(
        self, factory: DialerFactory, certs: Certificates, scheme: str
    ) -> None:
        with refusing() as address:
            error = failure(upstream(factory, hop(certs, scheme, address), name="office"))
        assert (error.reason, error.upstream) == (Reason.REFUSED, True)
        assert str(error) == f"'office' ({scheme}://{address}): connection refused"

    def test_bad_certificate_of_the_second_hop_names_the_second_hop(
        self, factory: DialerFactory, certs: Certificates
    ) -> None:
        """Its handshake runs within the first hop's TLS; the error names the second hop."""
        second = Address("127.0.0.1", 9)

        def script(peer: Peer) -> None:
            assert head(peer).startswith(b"CONNECT 127.0.0.1:9 ")
            peer.send(OK)
            with pytest.raises((ssl.SSLError, AssertionError)):
                peer.secure(offering(certs, "stranger"))

        with server(behind(offering(certs), script)) as address:
            error = failure(
                upstream(
                    factory, hop(certs, "https", address), hop(certs, "https", second), name="both"
                )
            )
        assert (error.reason, error.upstream) == (Reason.PROTOCOL, True)
        assert str(error) == "hop 2 of 'both' (https://127.0.0.1:9): TLS: self-signed certificate"

    @pytest.mark.parametrize(
        "tls, named",
        [
            ({"ca": "missing.pem"}, "missing.pem"),
            ({"certificate": "client.pem", "key": "server.key"}, "server.key"),
            ({"certificate": "client.pem", "key": "encrypted.key"}, "encrypted.key"),
            ({"certificate": "broken.pem"}, "broken.pem"),
        ],
    )
    def test_unusable_file_is_a_config_error(
        self, factory: DialerFactory, certs: Certificates, tls: dict[str, str], named: str
    ) -> None:
        """Hazard 128: when the configuration is read, not at the first dial."""
        paths = {key: certs.path(name) for key, name in tls.items()}
        with pytest.raises(ConfigError) as caught:
            upstream(
                factory, hop(certs, "https", Address("192.0.2.1", 443), **paths), name="office"
            )
        assert str(caught.value).startswith(
            "'office' (https://192.0.2.1:443): tls: cannot use "
        ) and named in str(caught.value)

    def test_proxies_within_tls_carry_udp(
        self, factory: DialerFactory, certs: Certificates
    ) -> None:
        for scheme in SCHEMES:
            assert upstream(factory, hop(certs, scheme, Address("192.0.2.1", 443))).carries == {
                "tcp",
                "udp",
            }
        with refusing() as address:
            for scheme in SCHEMES:
                with pytest.raises(DialError) as caught:
                    upstream(factory, hop(certs, scheme, address)).dial_packet(udp_to(TARGET))
                assert (caught.value.reason, caught.value.upstream) == (Reason.REFUSED, True)


def test_three_layers_of_tls_carry_data_in_both_directions(
    factory: DialerFactory, certs: Certificates
) -> None:
    """https, socks5h+tls and https: three layers on one connection, 4 MB in both directions."""
    second, third = Address("second.example", 1080), Address("192.0.2.3", 8443)
    size = 4 * MEGABYTE

    def script(peer: Peer) -> None:
        assert (
            head(peer)
            == b"CONNECT second.example:1080 HTTP/1.1\r\nHost: second.example:1080\r\n\r\n"
        )
        peer.send(OK)
        peer.secure(offering(certs, version=ssl.TLSVersion.TLSv1_2))
        accept_socks(peer, b"\x05\x01\x00\x01\xc0\x00\x02\x03\x20\xfb")
        peer.secure(offering(certs))
        assert head(peer) == CONNECT + b"\r\n"
        peer.sock.sendall(peer.seal(OK + b"at once"))
        assert peer.exchange(bulk(size, 8), RECORD, size) == digest(size)
        peer.end()
        peer.sock.recv(1)

    bulk(size), bulk(size, 8)
    with server(behind(offering(certs), script)) as address, tcp_pair() as (ours, theirs):
        dialer = upstream(
            factory,
            hop(certs, "https", address),
            hop(certs, "socks5h+tls", second, server_name="localhost"),
            hop(certs, "https", third, server_name="localhost"),
        )
        relaying = Task(relay, Stream(ours), dialer.dial(tcp_to(TARGET)), LIMITS)
        client = Peer(theirs)
        assert client.read(7) == b"at once"
        assert client.exchange(bulk(size), RECORD, size) == digest(size, 8)
        client.end()
        assert client.read_to_end() == b""
        assert relaying.result().ended == "closed"
