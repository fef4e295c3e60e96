"""Configured upstreams within TLS: trust, errors of files, and the renewal of files by a reload.

tests/dialer/test_tls_hops.py has the handshakes in detail.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any, Callable

import pytest

from netproxy.config.schema import UpstreamConfig
from netproxy.dialer.factory import DialerFactory
from netproxy.errors import ConfigError, DialError, Reason
from netproxy.interfaces.routing import Dialer
from netproxy.net.stream import complete
from tests.dialer.configured import TARGET, default_of, failure, members_of, upstreams_of
from tests.support.certificates import certificates
from tests.support.flows import tcp_to
from tests.support.sockets import read_to_end, server

pytest.importorskip("yaml")


def read_head(sock: Any) -> bytes:
    """Return the bytes up to an empty line."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        piece = sock.recv(4096)
        if not piece:
            raise EOFError
        data += piece
    return data


def tls_proxy(mutual: bool = False) -> Callable[[socket.socket], None]:
    """Return the script of an HTTP proxy within TLS that grants every request.

    `mutual`: clients must show a certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates().path("server.pem"), certificates().path("server.key"))
    if mutual:
        context.load_verify_locations(certificates().path("ca.pem"))
        context.verify_mode = ssl.CERT_REQUIRED
    request = f"CONNECT {TARGET} HTTP/1.1\r\nHost: {TARGET}\r\n\r\n".encode()

    def script(sock: socket.socket) -> None:
        try:
            with context.wrap_socket(sock, server_side=True) as secured:
                assert read_head(secured) == request
                secured.sendall(b"HTTP/1.1 200 OK\r\n\r\nhello")
                secured.recv(1)
        except (ssl.SSLError, EOFError):
            # The client has not trusted the certificate.
            pass

    return script


class TestTrust:
    def test_proxy_with_a_trusted_certificate_is_used(self, factory: DialerFactory) -> None:
        with server(tls_proxy()) as address:
            ca = certificates().path("ca.pem")
            config = default_of(f"{{url: 'https://{address}', tls: {{ca: '{ca}'}}}}")
            stream: Any = factory.dialer(config).dial(tcp_to(TARGET))
            assert (complete(stream.read_exactly(5)), stream.plain) == (b"hello", False)
            stream.close()

    @pytest.mark.parametrize(
        "tls, said",
        [
            ("", "TLS: "),
            ("tls.ca={stranger.pem}", "TLS: "),
            ("tls.ca={ca.pem}&tls.server_name=proxy.example", "TLS: Hostname mismatch"),
        ],
    )
    def test_proxy_with_an_untrusted_certificate_is_refused(
        self, factory: DialerFactory, tls: str, said: str
    ) -> None:
        for name in ("stranger.pem", "ca.pem"):
            tls = tls.replace("{" + name + "}", certificates().path(name))
        with server(tls_proxy()) as address:
            office = upstreams_of(f"office: 'https://{address}?{tls}'")["office"]
            error = failure(factory.dialer(office))
        assert str(error).startswith(f"'office' (https://{address}): {said}")
        assert (error.reason, error.upstream) == (Reason.PROTOCOL, True)

    @pytest.mark.parametrize(
        "tls", ["tls.insecure=true", "tls.ca={ca.pem}&tls.server_name=localhost"]
    )
    def test_insecure_and_server_name_change_which_certificate_is_trusted(
        self, factory: DialerFactory, tls: str
    ) -> None:
        query = tls.replace("{ca.pem}", certificates().path("ca.pem"))
        with server(tls_proxy()) as address:
            dialer = factory.dialer(default_of(f"'https://{address}?{query}'"))
            dialer.dial(tcp_to(TARGET)).close()

    def test_client_certificate_is_shown_to_the_proxy(self, factory: DialerFactory) -> None:
        ca, certificate, key = (
            certificates().path(name) for name in ("ca.pem", "client.pem", "client.key")
        )
        with server(tls_proxy(mutual=True)) as address:
            query = f"tls.ca={ca}&tls.certificate={certificate}&tls.key={key}"
            dialer = factory.dialer(default_of(f"'https://{address}?{query}'"))
            dialer.dial(tcp_to(TARGET)).close()

    def test_impossible_server_name_is_a_netproxy_error(self, factory: DialerFactory) -> None:
        with server(read_to_end) as address, pytest.raises((DialError, ConfigError)):
            config = default_of(f"'https://{address}?tls.server_name=.proxy.example'")
            factory.dialer(config).dial(tcp_to(TARGET))

    def test_hops_timeout_limits_the_tls_handshake(self, factory: DialerFactory) -> None:
        with server(read_to_end) as address:
            config = default_of(f"'https://{address}?timeout=100ms&tls.insecure=true'")
            assert str(failure(factory.dialer(config))) == f"https://{address}: timed out"


class TestFiles:
    @pytest.mark.parametrize("scheme", ["https", "socks5+tls", "socks5h+tls"])
    @pytest.mark.parametrize(
        "text, label",
        [
            ("a: '{url}'", "'a' ({bare})"),
            ("a: ['http://h:1', '{url}']", "hop 2 of 'a' ({bare})"),
            ("a: {{members: ['{url}']}}", "{bare}"),
            ("b: '{url}', a: {{members: [b, 'http://h:1']}}", "'b' ({bare})"),
        ],
    )
    def test_unusable_ca_file_is_a_config_error_with_the_hops_label(
        self, factory: DialerFactory, scheme: str, text: str, label: str
    ) -> None:
        bare = f"{scheme}://h:2"
        for file, why in (
            ("/nonexistent/ca.pem", "No such file or directory"),
            (certificates().path("broken.pem"), None),
        ):
            url = f"{scheme}://u:secret@h:2?tls.ca={file}"
            with pytest.raises(ConfigError) as caught:
                factory.dialer(upstreams_of(text.format(url=url))["a"])
            error = str(caught.value)
            assert f": {label.format(bare=bare)}: tls: cannot use {file}: " in error
            assert error.startswith("c.yaml:1:")
            assert why is None or error.endswith(f": {why}")
            assert "secret" not in error

    def test_unusable_key_file_is_a_config_error(self, factory: DialerFactory) -> None:
        certificate = certificates().path("client.pem")
        key = certificates().path("encrypted.key")
        expected = f": https://h:1: tls: cannot use {certificate} with {key}: "
        with pytest.raises(ConfigError, match=expected):
            factory.dialer(default_of(f"'https://h:1?tls.certificate={certificate}&tls.key={key}'"))


def renew(factory: DialerFactory, *configs: UpstreamConfig) -> None:
    """Do what a reload does with TLS files."""
    renewal = factory.prepare_renewal(configs)
    if renewal is not None:
        renewal.commit()


class TestRenewal:
    """A reload reads TLS files again, so that a new certificate needs no restart."""

    @staticmethod
    def put(file: Path, name: str) -> None:
        """Replace a file by one of the test certificates."""
        file.write_bytes(Path(certificates().path(name)).read_bytes())

    @staticmethod
    def trusts(dialer: Dialer) -> bool:
        """Return whether a dial succeeds; otherwise TLS must be the reason."""
        try:
            stream = dialer.dial(tcp_to(TARGET))
        except DialError as error:
            assert (error.reason, error.upstream) == (Reason.PROTOCOL, True)
            assert ": TLS: " in str(error)
            return False
        stream.close()
        return True

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return tmp_path / "ca.pem"

    def test_renewal_changes_the_trust_of_a_dialer_in_use(
        self, factory: DialerFactory, file: Path
    ) -> None:
        self.put(file, "stranger.pem")
        with server(tls_proxy()) as address:
            config = default_of(f"'https://{address}?tls.ca={file}'")
            dialer = factory.dialer(config)
            assert not self.trusts(dialer)
            self.put(file, "ca.pem")
            assert not self.trusts(dialer)
            renew(factory, config)
            assert factory.dialer(config) is dialer and self.trusts(dialer)
            self.put(file, "stranger.pem")
            renew(factory, config)
            assert not self.trusts(dialer)

    def test_renewal_includes_members_of_groups(self, factory: DialerFactory, file: Path) -> None:
        self.put(file, "stranger.pem")
        with server(tls_proxy()) as address:
            config = upstreams_of(f"p: {{members: ['https://{address}?tls.ca={file}']}}")["p"]
            (member,) = members_of(factory.dialer(config)).values()
            self.put(file, "ca.pem")
            renew(factory, config)
            assert self.trusts(member.dialer)

    @pytest.mark.parametrize("broken", [True, False], ids=["broken", "missing"])
    def test_unusable_file_leaves_the_trust_of_all_upstreams_unchanged(
        self, factory: DialerFactory, file: Path, broken: bool
    ) -> None:
        """That of another upstream, too, although its own file can be used."""
        other = file.with_name("other.pem")
        self.put(file, "ca.pem")
        self.put(other, "stranger.pem")
        with server(tls_proxy()) as address:
            office = upstreams_of(f"office: 'https://{address}?tls.ca={file}'")["office"]
            default = default_of(f"'https://{address}?tls.ca={other}'")
            trusting, distrusting = factory.dialer(office), factory.dialer(default)
            self.put(other, "ca.pem")
            if broken:
                self.put(file, "broken.pem")
            else:
                file.unlink()
            expected = f": 'office' \\(https://{address}\\): tls: cannot use {file}: "
            with pytest.raises(ConfigError, match=expected):
                renew(factory, office, default)
            assert self.trusts(trusting) and not self.trusts(distrusting)

    def test_files_of_removed_upstreams_are_not_read_again(
        self, factory: DialerFactory, file: Path
    ) -> None:
        """An upstream and its files may be removed: later reloads must not need them."""
        self.put(file, "ca.pem")
        config = default_of(f"'https://192.0.2.1:1?tls.ca={file}'")
        factory.dialer(config)
        factory.retain([])
        file.unlink()
        renew(factory, config)

    def test_refused_files_are_not_read_again(self, factory: DialerFactory, file: Path) -> None:
        """A typing error in one reload must not affect the next one."""
        config = default_of(f"'https://192.0.2.1:1?tls.ca={file}'")
        with pytest.raises(ConfigError):
            factory.dialer(config)
        renew(factory, config)
