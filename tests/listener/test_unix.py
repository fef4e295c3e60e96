"""Listeners at UNIX sockets, in a whole daemon: the file, the clients, reloads."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import closing
from pathlib import Path

import pytest

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import UNIX_CLIENT, Address
from tests.support.certificates import certificates
from tests.support.handlers import SECONDS, eventually
from tests.support.relays import running
from tests.support.sockets import address_of, listen, read_exactly, read_to_end


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "proxy.sock"


def text(path: Path, more: str = "") -> str:
    return f"listeners: [{{listen: 'unix:{path}'{more}}}]\n"


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(SECONDS)
    sock.connect(str(path))
    return sock


def request(target: Address, command: int = 1) -> bytes:
    """SOCKS5: no login, a command for an IPv4 target."""
    host, port = socket.inet_aton(target.host), target.port.to_bytes(2, "big")
    return b"\5\1\0\5" + bytes((command,)) + b"\0\1" + host + port


def leave_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


class TestClients:
    def test_connection_is_served_and_recorded(self, path: Path) -> None:
        with listen() as target, running(text(path)) as relay, closing(connect(path)) as client:
            client.sendall(request(address_of(target)) + b"first")
            with closing(target.accept()[0]) as accepted:
                accepted.settimeout(SECONDS)
                assert read_exactly(client, 5) == b"\5\0\5\0\0"
                assert read_exactly(accepted, 5) == b"first"
                assert read_exactly(client, 7)[0] == 1
                accepted.sendall(b"answer" * 100_000)
                accepted.shutdown(socket.SHUT_WR)
                assert read_to_end(client) == b"answer" * 100_000
                client.shutdown(socket.SHUT_WR)
                assert read_to_end(accepted) == b""
            eventually(lambda: relay.log.records)
            assert [str(record.flow.client) for record in relay.log.records] == ["unix:"]

    def test_all_clients_share_the_limit_of_connections(self, path: Path) -> None:
        with running(text(path, ", limits: {connections: 2}")) as relay:
            first, second = connect(path), connect(path)
            with closing(first), closing(second), closing(connect(path)) as third:
                for client in (first, second):
                    client.sendall(b"\5\1\0")
                    assert read_exactly(client, 2) == b"\5\0"
                assert read_to_end(third) == b""
            relay.wait_for_count("connections_refused", "connection limit", 1)

    def test_rule_by_client_network_does_not_match(self, path: Path) -> None:
        rules = "rules: [{client: ['0.0.0.0/0', '::/0'], via: block}]\n"
        with listen() as target, running(text(path) + rules), closing(connect(path)) as client:
            client.sendall(request(address_of(target)))
            target.accept()[0].close()
            assert read_exactly(client, 4) == b"\5\0\5\0"

    def test_password_is_asked_for_and_has_no_penalty(self, path: Path) -> None:
        users = "users: {alice: {password: secret}}\npenalty: {after: 1}\n"
        with running(text(path) + users):
            for password, status in ((b"wrong!", 1), (b"wrong!", 1), (b"secret", 0)):
                with closing(connect(path)) as client:
                    client.sendall(b"\5\1\2\1\5alice\6" + password)
                    assert read_exactly(client, 4) == b"\5\2\1" + bytes((status,))

    def test_tls_is_spoken_within(self, path: Path) -> None:
        with running(text(path, f", tls: {certificates().listener()}")):
            with closing(certificates().secure(connect(path))) as client:
                client.sendall(b"\5\1\0")
                assert client.recv(2) == b"\5\0"

    def test_bind_of_socks_listens_on_all_addresses(self, path: Path) -> None:
        with running(text(path)), closing(connect(path)) as client:
            client.sendall(request(Address("127.0.0.1", 0), command=2))
            reply = read_exactly(client, 12)
            assert reply[2:6] == b"\5\0\0\1"
            port = int.from_bytes(reply[10:], "big")
            with closing(socket.create_connection(("127.0.0.1", port), SECONDS)):
                assert read_exactly(client, 4) == b"\5\0\0\1"

    def test_udp_associate_is_refused(self, path: Path) -> None:
        with running(text(path)), closing(connect(path)) as client:
            client.sendall(request(Address("0.0.0.0", 0), command=3))
            assert read_exactly(client, 4) == b"\5\0\5\7"

    @pytest.mark.parametrize("version", ["v1", "v2"])
    def test_header_for_a_target_names_no_address(self, path: Path, version: str) -> None:
        expected = {"v1": b"PROXY UNKNOWN\r\n", "v2": b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"}[version]
        with listen() as target:
            more = f", protocol: tcp, target: '{address_of(target)}', send_proxy: {version}"
            with running(text(path, more)), closing(connect(path)) as client:
                client.sendall(b"x")
                with closing(target.accept()[0]) as accepted:
                    accepted.settimeout(SECONDS)
                    assert read_exactly(accepted, len(expected) + 1) == expected + b"x"


class TestFile:
    def test_file_has_mode_and_group_and_is_removed_at_the_end(self, path: Path) -> None:
        with running(text(path, f", mode: '0640', group: '{os.getgid()}'")) as relay:
            status = path.stat()
            assert stat.S_ISSOCK(status.st_mode)
            assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o640, os.getgid())
            assert relay.daemon.summary().startswith(f"tcp unix:{path}")
        assert not path.exists()

    def test_file_has_no_group_or_others_before_its_mode_is_set(self, path: Path) -> None:
        from netproxy.interfaces.addresses import UnixAddress
        from netproxy.listener.sockets.unix import bind_unix

        before = os.umask(0)
        try:
            with closing(bind_unix(UnixAddress.of(path))):
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
        finally:
            os.umask(before)

    def test_stale_file_is_replaced(self, path: Path) -> None:
        leave_stale(path)
        with running(text(path)), closing(connect(path)) as client:
            client.sendall(b"\5\1\0")
            assert read_exactly(client, 2) == b"\5\0"

    def refused(self, path: Path) -> str:
        """Reload a daemon with a listener that must not be bound; return the error."""
        other = path.with_name("other.sock")
        with running(text(other)) as relay:
            with pytest.raises(ListenError) as caught:
                relay.reload(text(path))
            connect(other).close()
        return str(caught.value).removeprefix(f"cannot listen on tcp unix:{path}: ")

    def test_live_socket_is_refused_and_left_alone(self, path: Path) -> None:
        with running(text(path)):
            assert self.refused(path) == "Address already in use"
            with closing(connect(path)) as client:
                client.sendall(b"\5\1\0")
                assert read_exactly(client, 2) == b"\5\0"

    def test_other_file_is_refused_and_left_alone(self, path: Path) -> None:
        path.write_text("precious")
        assert self.refused(path) == "Address already in use"
        assert path.read_text() == "precious"

    def test_missing_folder_is_one_line(self, tmp_path: Path) -> None:
        path = tmp_path / "missing.sock" / "a.sock"
        with running(text(tmp_path / "other.sock")) as relay:
            with pytest.raises(ListenError) as caught:
                relay.reload(text(path))
        message = f"cannot listen on tcp unix:{path}: No such file or directory"
        assert str(caught.value) == message

    def test_file_of_another_process_is_not_removed(self, path: Path) -> None:
        with running(text(path)):
            path.unlink()
            leave_stale(path)
        assert path.exists()


class TestReload:
    def test_listener_stays_and_gets_its_new_mode_and_name(self, path: Path) -> None:
        with running(text(path)) as relay, closing(connect(path)) as client:
            inode = path.stat().st_ino
            relay.reload(text(path, ", mode: 0600, name: renamed"))
            assert path.stat().st_ino == inode
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            client.sendall(b"\5\1\0")
            assert read_exactly(client, 2) == b"\5\0"

    def test_listener_moves_to_another_path(self, path: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.sock"
        with running(text(path)) as relay:
            relay.reload(text(other))
            assert not path.exists()
            connect(other).close()


def test_clients_are_loopback_and_equal() -> None:
    from netproxy.interfaces.fairness import client_key
    from netproxy.interfaces.networks import is_loopback

    assert is_loopback(UNIX_CLIENT.host) and client_key(UNIX_CLIENT.host) == "unix:"
    assert str(UNIX_CLIENT) == "unix:"
