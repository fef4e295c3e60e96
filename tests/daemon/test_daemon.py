"""The daemon in this process: start, reload, drain, stop; what it keeps and what it gives back."""

from __future__ import annotations

import re
import socket
import threading
from pathlib import Path
from typing import Any, Iterator

import pytest

from netproxy.daemon import runtime
from netproxy.daemon.daemon import Daemon
from netproxy.daemon.runtime import raise_descriptor_limit
from netproxy.errors import ConfigError, ListenError
from netproxy.interfaces.addresses import Address
from netproxy.protocol import socks5
from netproxy.resolver.resolver import Found, Plan
from netproxy.resolver.servers import KEPT_SECONDS
from tests.support.certificates import certificates
from tests.support.dns import a
from tests.support.handlers import RecordingLog
from tests.support.nameservers import WWW, answer_to, serve
from tests.support.relays import Running, UdpClient, UdpPort, configuration, running
from tests.support.sockets import (
    HAS_IPV6,
    SECONDS,
    address_of,
    listen,
    read_exactly,
    read_to_end,
    server,
    udp,
    wait_until,
)

pytest.importorskip("yaml")
PLAIN = "listeners: [{listen: '127.0.0.1:0', name: main}]"


@pytest.fixture
def daemon() -> Iterator[Running]:
    with running(PLAIN) as running_daemon:
        yield running_daemon


@pytest.fixture
def echo() -> Iterator[Address]:
    def script(sock: socket.socket) -> None:
        while data := sock.recv(65536):
            sock.sendall(data)

    with server(script) as address:
        yield address


class Tunnel:
    """A SOCKS5 CONNECT to `target` through the proxy on `port`."""

    def __init__(self, port: int, target: Address, login: tuple[str, str] | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), SECONDS)
        self.socket.sendall(b"\x05\x01\x02" if login else b"\x05\x01\x00")
        self.method = read_exactly(self.socket, 2)[1]
        self.reply = 255
        if login and self.method == 2:
            self.socket.sendall(socks5.encode_credentials(*login))
            if read_exactly(self.socket, 2)[1]:
                return
        if self.method != 255:
            self.socket.sendall(socks5.encode_request(socks5.CONNECT, target))
            self.reply = read_exactly(self.socket, 10)[1]

    def check(self, data: bytes = b"ping") -> None:
        self.socket.sendall(data)
        assert read_exactly(self.socket, len(data)) == data

    def __enter__(self) -> Tunnel:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def port_of(running_daemon: Running, index: int = 0) -> int:
    return int(re.findall(r"tcp \S+:(\d+)", running_daemon.daemon.summary())[index])


CONNECT_UDP = (
    b"GET /.well-known/masque/udp/127.0.0.1/%d/ HTTP/1.1\r\nHost: proxy.test\r\nConnection: Upgrade\r\n"
    b"Upgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n\r\n"
)
UOT_NAME = b"sp.v2.udp-over-tcp.arpa"


class TestDatagramsInStreams:
    """Which listeners serve them: those whose network has udp, which it has by default."""

    @pytest.fixture(autouse=True)
    def no_such_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody is asked for it beyond this machine."""
        real = socket.getaddrinfo

        def find(host: Any, *arguments: Any, **more: Any) -> Any:
            if host in (UOT_NAME, UOT_NAME.decode()):
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return real(host, *arguments, **more)

        monkeypatch.setattr(socket, "getaddrinfo", find)

    @staticmethod
    def head(port: int, ask: bytes) -> list[bytes]:
        with socket.create_connection(("127.0.0.1", port), SECONDS) as client:
            client.sendall(ask)
            data = b""
            while b"\r\n\r\n" not in data:
                piece = client.recv(4096)
                assert piece
                data += piece
        return data.partition(b"\r\n\r\n")[0].split(b"\r\n")

    def by_connect(self, port: int) -> list[bytes]:
        return self.head(port, b"CONNECT %b:443 HTTP/1.1\r\nHost: x\r\n\r\n" % UOT_NAME)

    def by_upgrade(self, port: int) -> list[bytes]:
        with UdpPort() as target:
            return self.head(port, CONNECT_UDP % target.address.port)

    @staticmethod
    def by_socks5(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), SECONDS) as client:
            client.sendall(b"\5\1\0" + b"\5\1\0\3\x17" + UOT_NAME + b"\1\xbb")
            return read_exactly(client, 12)[2:4]

    @staticmethod
    def by_socks4(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), SECONDS) as client:
            client.sendall(b"\4\1\1\xbb\0\0\0\1\0" + UOT_NAME + b"\0")
            return read_exactly(client, 8)[:2]

    @pytest.mark.parametrize("protocol", ["sps", "http"])
    def test_by_http_of_tcp_alone(self, protocol: str) -> None:
        """UoT's name is one that is not found, and connect-udp a request to this proxy itself."""
        with running(
            f"listeners: [{{listen: '127.0.0.1:0', protocol: {protocol}, network: [tcp]}}]"
        ) as one:
            assert one.daemon.summary() == f"tcp 127.0.0.1:{one.port}"
            lines = self.by_connect(one.port)
            assert (
                lines[0] == b"HTTP/1.1 502 Bad Gateway"
                and b"Proxy-Status: netproxy; error=dns_error" in lines
            )
            lines = self.by_upgrade(one.port)
            assert lines[0] == b"HTTP/1.1 400 Bad Request"
            plain = self.head(
                one.port,
                b"GET /.well-known/masque/udp/127.0.0.1/53/ HTTP/1.1\r\nHost: proxy.test\r\n\r\n",
            )
            assert plain[0] == lines[0]
            assert not one.count("sessions_opened")

    @pytest.mark.parametrize("protocol", ["sps", "http"])
    def test_by_http_by_default(self, protocol: str) -> None:
        with running(f"listeners: [{{listen: '127.0.0.1:0', protocol: {protocol}}}]") as one:
            port = port_of(one)
            assert self.by_connect(port)[0] == b"HTTP/1.1 200 Connection established"
            assert self.by_upgrade(port)[0] == b"HTTP/1.1 101 Switching Protocols"
            assert ("udp 127" in one.daemon.summary()) is (
                protocol == "sps"
            )  # http binds no UDP socket for it

    @pytest.mark.parametrize(
        "network, socks5_says, socks4_says",
        [("[tcp]", b"\5\4", b"\0\x5b"), ("[tcp, udp]", b"\5\0", b"\0\x5a")],
    )
    def test_by_socks(self, network: str, socks5_says: bytes, socks4_says: bytes) -> None:
        with running(f"listeners: [{{listen: '127.0.0.1:0', network: {network}}}]") as one:
            assert (self.by_socks5(port_of(one)), self.by_socks4(port_of(one))) == (
                socks5_says,
                socks4_says,
            )

    def test_a_listener_that_a_reload_leaves_tcp_alone_serves_them_no_more(self) -> None:
        with running("listeners: [{listen: '127.0.0.1:0', protocol: http, name: main}]") as one:
            port = port_of(one)
            assert self.by_upgrade(port)[0].startswith(b"HTTP/1.1 101 ")
            one.reload(
                "listeners: [{listen: '127.0.0.1:0', protocol: http, name: main, network: [tcp]}]"
            )
            assert self.by_upgrade(port)[0].startswith(b"HTTP/1.1 400 ")


class TestFilesOfUpstreams:
    """Of TLS; a reload reads them again."""

    def test_an_upstream_and_its_file_may_go_in_one_reload(self, tmp_path: Path) -> None:
        file = tmp_path / "ca.pem"
        file.write_bytes(Path(certificates().path("ca.pem")).read_bytes())
        with running(f"{PLAIN}\ndefault: 'https://192.0.2.1:1?tls.ca={file}'\n") as one:
            file.unlink()
            one.reload(PLAIN)
            one.reload(PLAIN)

    def test_a_file_that_is_broken_leaves_the_daemon_as_it_was(self, tmp_path: Path) -> None:
        file = tmp_path / "ca.pem"
        file.write_bytes(Path(certificates().path("ca.pem")).read_bytes())
        text = f"{PLAIN}\ndefault: 'https://192.0.2.1:1?tls.ca={file}'\n"
        with running(text) as one:
            before, good = one.daemon.summary(), file.read_bytes()
            file.write_bytes(b"broken")
            with pytest.raises(ConfigError, match="tls: cannot use"):
                one.reload(text)
            assert one.daemon.summary() == before
            file.write_bytes(good)
            one.reload(text)


class TestStart:
    def test_one_port_serves_everything(self, daemon: Running, echo: Address) -> None:
        """The north star: SOCKS4, SOCKS5, HTTP and UDP on the same number."""
        assert (
            daemon.daemon.summary() == f"udp 127.0.0.1:{daemon.port}, tcp 127.0.0.1:{daemon.port}"
        )
        with Tunnel(daemon.port, echo) as tunnel:
            assert tunnel.reply == 0
            tunnel.check()
        with socket.create_connection(("127.0.0.1", daemon.port), SECONDS) as http:
            http.sendall(b"CONNECT %b HTTP/1.1\r\nHost: x\r\n\r\nping" % str(echo).encode())
            assert http.recv(12) == b"HTTP/1.1 200"
            data = b""
            while not data.endswith(b"\r\n\r\nping"):
                data += http.recv(100)
        with socket.create_connection(("127.0.0.1", daemon.port), SECONDS) as socks4:
            socks4.sendall(
                b"\x04\x01" + echo.port.to_bytes(2, "big") + socket.inet_aton(echo.host) + b"\0ping"
            )
            answer = read_exactly(socks4, 12)
            assert (answer[1], answer[8:]) == (0x5A, b"ping")
        with UdpPort() as target, UdpClient(daemon.port) as client:
            client.check_echo(target)

    def test_nothing_to_listen_on_is_fine(self) -> None:
        with running("listeners: [{listen: '127.0.0.1:0'}]") as running_daemon:
            running_daemon.reload("listeners: []")
            assert running_daemon.daemon.summary() == "nothing"
            assert running_daemon.daemon.dead_thread() == ""

    def test_an_address_in_use_leaves_nothing_open(self) -> None:
        """The fixture of all tests counts."""
        with listen() as taken:
            daemon = Daemon(RecordingLog())  # type: ignore[arg-type]
            with pytest.raises(
                ListenError, match=f"tcp {address_of(taken)}: Address already in use"
            ):
                daemon.start(
                    configuration(
                        f"listeners: [{{listen: '127.0.0.1:0', name: a}}, {{listen: '{address_of(taken)}'}}]"
                    )
                )
            daemon.stop()

    def test_a_broken_hash_is_an_error_of_the_configuration(self) -> None:
        daemon = Daemon(RecordingLog())  # type: ignore[arg-type]
        with pytest.raises(ConfigError) as caught:
            daemon.start(configuration(PLAIN + "\nusers: {alice: {password: 'scrypt$x'}}"))
        assert "not a hash made by 'netproxyctl hash-password'" in str(caught.value)
        daemon.stop()

    def test_a_name_to_listen_on(self) -> None:
        with running("listeners: [{listen: 'localhost:0', allow_open: true}]") as running_daemon:
            assert (
                "127.0.0.1" in running_daemon.daemon.summary()
                or "[::1]" in running_daemon.daemon.summary()
            )

    def test_a_name_that_is_none(self) -> None:
        daemon = Daemon(RecordingLog())  # type: ignore[arg-type]
        with pytest.raises(ListenError, match="nowhere.invalid"):
            daemon.start(
                configuration("listeners: [{listen: 'nowhere.invalid:0', allow_open: true}]")
            )
        daemon.stop()

    def test_the_wildcard_of_a_machine_without_ipv6_is_ipv4s(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """HAZARDS 131."""
        monkeypatch.setattr(runtime, "_has_ipv6", lambda: False)
        with running("listeners: [{listen: ':0', allow_open: true}]") as running_daemon:
            assert "0.0.0.0" in running_daemon.daemon.summary()

    @pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 on this machine")
    def test_the_wildcard_takes_both_families(self, echo: Address) -> None:
        with running("listeners: [{listen: ':0', allow_open: true}]") as running_daemon:
            for host in ("127.0.0.1", "::1"):
                with socket.create_connection((host, running_daemon.port), SECONDS) as sock:
                    sock.sendall(b"\x05\x01\x00")
                    assert read_exactly(sock, 2) == b"\x05\x00"

    def test_datagrams_without_a_way_out_are_said(self) -> None:
        with running(PLAIN + "\ndefault: http://127.0.0.1:9?udp=none") as running_daemon:
            assert running_daemon.log.lines == [
                "listener 'main' accepts UDP, but its upstream carries none: http://127.0.0.1:9"
            ]


class TestReload:
    def test_keeps_sockets_and_connections(self, daemon: Running, echo: Address) -> None:
        before, listeners = daemon.daemon.summary(), daemon.daemon._manager.listeners
        with (
            Tunnel(daemon.port, echo) as tunnel,
            UdpPort() as target,
            UdpClient(daemon.port) as client,
        ):
            tunnel.check()
            seen = client.check_echo(target)
            for _ in range(3):
                daemon.reload(PLAIN)
                tunnel.check()
                assert client.check_echo(target) == seen
            assert daemon.daemon.live == 2
        assert daemon.daemon.summary() == before
        assert daemon.daemon._manager.listeners == listeners

    def test_many_times_leaks_nothing(self, daemon: Running, echo: Address) -> None:
        """HAZARDS 106; the fixture of all tests counts descriptors and threads."""
        with Tunnel(daemon.port, echo) as tunnel:
            for number in range(30):
                daemon.reload(PLAIN + f"\ntimeouts: {{connect: {number + 1}s}}")
                tunnel.check()
        assert (
            len(daemon.daemon._runtime.janitor._tables) == 5
        )  # the NAT table, the socket whose drops are counted, memory, health checks, the log

    def test_new_listeners_come_and_old_ones_go(self, daemon: Running, echo: Address) -> None:
        with Tunnel(daemon.port, echo) as tunnel:
            tunnel.check()
            daemon.reload("listeners: [{protocol: http, listen: '127.0.0.2:0', name: other}]")
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", daemon.port), SECONDS)
            tunnel.check()  # what lives goes on
            assert daemon.daemon.live == 1
        assert daemon.daemon.summary().startswith("tcp 127.0.0.2:")
        wait_until(lambda: not daemon.daemon.live)

    def test_the_association_of_a_listener_that_goes_ends(self, daemon: Running) -> None:
        with UdpPort() as target, UdpClient(daemon.port) as client:
            client.check_echo(target)
            daemon.reload("listeners: [{protocol: http, listen: '127.0.0.1:0', name: other}]")
            wait_until(lambda: daemon.idle())

    def test_what_is_new_holds_for_new_connections(self, daemon: Running, echo: Address) -> None:
        with Tunnel(daemon.port, echo) as old:
            daemon.reload(PLAIN + "\nusers: {alice: {password: secret}}")
            old.check()
            with Tunnel(daemon.port, echo) as new:
                assert new.method == 255
            with Tunnel(daemon.port, echo, ("alice", "wrong")) as new:
                assert new.reply == 255
            with Tunnel(daemon.port, echo, ("alice", "secret")) as new:
                new.check()

    def test_another_way_out(self, daemon: Running, echo: Address) -> None:
        daemon.reload(PLAIN + "\ndefault: block")
        with Tunnel(daemon.port, echo) as tunnel:
            assert tunnel.reply == socks5.NOT_ALLOWED
        assert daemon.daemon.way_out == "block"
        daemon.reload(
            "listeners: [{listen: '127.0.0.1:0', name: main, upstream: open}]\nupstreams: {open: direct}\ndefault: block"
        )
        with Tunnel(daemon.port, echo) as tunnel:
            tunnel.check()

    def test_an_address_in_use_changes_nothing(self, daemon: Running, echo: Address) -> None:
        """HAZARDS 105."""
        with listen() as taken, Tunnel(daemon.port, echo) as tunnel:
            before = daemon.daemon.summary()
            with pytest.raises(ListenError):
                daemon.reload(
                    "default: block\nlisteners:\n"
                    "  - {listen: '127.0.0.1:0', name: main, udp: {max_sessions: 1}, limits: {connections: 1}}\n"
                    f"  - {{listen: '{address_of(taken)}', name: b}}\n"
                )
            tunnel.check()
            assert daemon.daemon.summary() == before
            with Tunnel(daemon.port, echo) as another:
                another.check()
            assert daemon.daemon.way_out == "direct"

    def test_an_address_in_use_leaves_the_limits_of_udp_as_they_were(self, daemon: Running) -> None:
        with listen() as taken:
            with pytest.raises(ListenError):
                daemon.reload(
                    "listeners:\n  - {listen: '127.0.0.1:0', name: main, udp: {max_sessions: 1}}\n"
                    f"  - {{listen: '{address_of(taken)}', name: b}}\n"
                )
        with UdpPort() as target, UdpClient(daemon.port) as first, UdpClient(daemon.port) as second:
            first.check_echo(target)
            second.check_echo(target)

    def test_a_broken_hash_changes_nothing(self, daemon: Running, echo: Address) -> None:
        with pytest.raises(ConfigError):
            daemon.reload(PLAIN + "\ndefault: block\nusers: {alice: {password: 'scrypt$x'}}")
        with Tunnel(daemon.port, echo) as tunnel:
            tunnel.check()

    def test_a_batch_that_waits_meets_the_new_handler(self, daemon: Running) -> None:
        with UdpPort() as target, UdpClient(daemon.port) as client:
            client.check_echo(target)
            daemon.reload(PLAIN + "\ndefault: block")
            with UdpPort() as other:
                client.to(other.address, b"x")
                wait_until(lambda: daemon.drops())
                assert other.silent()


class TestLimits:
    def test_of_a_client(self, echo: Address) -> None:
        """HAZARDS 95."""
        with running(
            "listeners: [{listen: '127.0.0.1:0', limits: {connections_per_client: 2}}]"
        ) as running_daemon:
            with (
                Tunnel(running_daemon.port, echo) as first,
                Tunnel(running_daemon.port, echo) as second,
            ):
                with socket.create_connection(("127.0.0.1", running_daemon.port), SECONDS) as third:
                    assert read_to_end(third) == b""
                first.check()
                second.check()
            wait_until(lambda: not running_daemon.daemon.live)
            with Tunnel(running_daemon.port, echo) as again:
                again.check()

    def test_of_all_connections(self, echo: Address) -> None:
        """HAZARDS 95: the excess is closed at once, and costs the others nothing."""
        with running(
            "listeners: [{listen: '127.0.0.1:0', limits: {connections: 2}}]"
        ) as running_daemon:
            with (
                Tunnel(running_daemon.port, echo) as first,
                Tunnel(running_daemon.port, echo) as second,
            ):
                with socket.create_connection(("127.0.0.1", running_daemon.port), SECONDS) as third:
                    assert read_to_end(third) == b""
                first.check()
                second.check()
                first.socket.close()
                wait_until(lambda: running_daemon.daemon.live < 2)
            with Tunnel(running_daemon.port, echo) as fourth:
                fourth.check()

    def test_of_threads_are_what_the_descriptors_allow(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = configuration(
            "listeners: [{listen: '127.0.0.1:1-4', limits: {connections: 1000}}]"
        )
        monkeypatch.setattr(runtime.resource, "getrlimit", lambda _: (1024, 4096))
        assert runtime.room_for(config) == (1024 - 64) // 3
        monkeypatch.setattr(runtime.resource, "getrlimit", lambda _: (100000, 100000))
        assert runtime.room_for(config) == runtime.THREADS_LIMIT
        monkeypatch.setattr(runtime.resource, "getrlimit", lambda _: (10, 10))
        assert runtime.room_for(config) == 1

    def test_of_descriptors_are_raised_to_what_the_system_allows(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found: list[Any] = []
        monkeypatch.setattr(runtime.resource, "getrlimit", lambda _: (1024, 4096))
        monkeypatch.setattr(runtime.resource, "setrlimit", lambda _, limits: found.append(limits))
        raise_descriptor_limit()
        assert found == [(4096, 4096)]

    def test_of_descriptors_stay_where_the_system_lets_nobody_raise_them(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(_: int, limits: tuple[int, int]) -> None:
            raise ValueError("not allowed to raise maximum limit")

        monkeypatch.setattr(runtime.resource, "setrlimit", refuse)
        raise_descriptor_limit()


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class TestRelayPorts:
    def test_any_gives_each_association_its_own(self) -> None:
        with running(
            "listeners: [{listen: '127.0.0.1:0', udp: {relay_port: any}}]"
        ) as running_daemon:
            with (
                UdpPort() as target,
                UdpClient(running_daemon.port) as first,
                UdpClient(running_daemon.port) as second,
            ):
                assert len({first.bound.port, second.bound.port, running_daemon.port}) == 3
                first.check_echo(target)
                second.check_echo(target)
            wait_until(
                lambda: (
                    not [
                        thread
                        for thread in threading.enumerate()
                        if thread.name.startswith("udp-listener")
                    ]
                )
            )

    def test_a_range_is_kept_to_and_its_end_is_said(self) -> None:
        with UdpPort() as probe:
            port = probe.address.port
        with running(
            f"listeners: [{{listen: '127.0.0.1:0', udp: {{relay_port: {port}-{port}}}}}]"
        ) as running_daemon:
            with UdpPort() as target, UdpClient(running_daemon.port) as first:
                assert first.bound.port == port
                first.check_echo(target)
                with socket.create_connection(
                    ("127.0.0.1", running_daemon.port), SECONDS
                ) as second:
                    second.sendall(
                        b"\x05\x01\x00"
                        + socks5.encode_request(socks5.UDP_ASSOCIATE, Address("0.0.0.0", 0))
                    )
                    assert read_exactly(second, 12)[3] == socks5.GENERAL_FAILURE
            wait_until(
                lambda: running_daemon.idle() and is_free(port)
            )  # the port is given back last
            with UdpPort() as target, UdpClient(running_daemon.port) as again:
                again.check_echo(target)


class TestStop:
    def test_draining_leaves_what_lives(self, daemon: Running, echo: Address) -> None:
        """HAZARDS 104."""
        with (
            Tunnel(daemon.port, echo) as tunnel,
            UdpPort() as target,
            UdpClient(daemon.port) as client,
        ):
            client.check_echo(target)
            daemon.daemon.stop_accepting()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", daemon.port), SECONDS)
            tunnel.check()
            client.check_echo(target)
            assert daemon.daemon.live == 2
        wait_until(lambda: not daemon.daemon.live)

    def test_ends_everything(self, echo: Address) -> None:
        with running(PLAIN) as running_daemon:
            tunnels = [Tunnel(running_daemon.port, echo) for _ in range(5)]
            idle = socket.create_connection(("127.0.0.1", running_daemon.port), SECONDS)
            target, client = UdpPort(), UdpClient(running_daemon.port)
            client.check_echo(target)
        for sock in [tunnel.socket for tunnel in tunnels] + [idle, client.control]:
            try:
                assert read_to_end(sock) == b""
            except ConnectionResetError:
                pass
            sock.close()
        target.close()
        client.close()
        assert not running_daemon.daemon.live and running_daemon.idle()

    def test_though_it_never_started(self) -> None:
        Daemon(RecordingLog()).stop()  # type: ignore[arg-type]


class TestLookingAtIt:
    def test_status(self, daemon: Running, echo: Address) -> None:
        with Tunnel(daemon.port, echo):
            lines = list(daemon.daemon.status())
        assert lines[0].startswith("connections=1 ")
        assert daemon.daemon.summary() in lines[0]
        assert re.fullmatch(
            r"udp \S+ 127\.0\.0\.1:\d+: associations=0 sessions=0 entries=0", lines[1]
        )
        assert "connections{accepted}=1" in lines

    def test_a_thread_that_died_is_named(self, daemon: Running) -> None:
        """HAZARDS 98."""
        assert daemon.daemon.dead_thread() == ""
        daemon.daemon._runtime.janitor.stop()
        assert daemon.daemon.dead_thread() == "janitor"

    def test_what_it_would_do(self) -> None:
        daemon = Daemon(RecordingLog())  # type: ignore[arg-type]
        lines = daemon.describe(
            configuration(
                "listeners: [{listen: '127.0.0.1:1080', name: main, upstream: chain}, {protocol: http, listen: '[::1]:8080'}]\n"
                "upstreams: {office: 'socks5://user:hunter2@10.0.0.1:1080', chain: [office, 'http://proxy.example:3128?udp=none'],"
                " through: [office, 'http://proxy.example:3128']}\n"
            )
        )
        assert lines == [
            "listen 127.0.0.1:1080 tcp+udp sps 'main' out by socks5://10.0.0.1:1080 -> http://proxy.example:3128",
            "listen [::1]:8080 tcp+udp http 'http-8080' out by direct",
            "warning: listener 'main' accepts UDP, but its upstream carries none: socks5://10.0.0.1:1080 -> http://proxy.example:3128",
            "upstream default: direct carries bind, tcp, udp",
            "upstream office: socks5://10.0.0.1:1080 carries tcp, udp by ASSOCIATE",
            "upstream chain: socks5://10.0.0.1:1080 -> http://proxy.example:3128 carries tcp;"
            " no udp: http://proxy.example:3128 is told to carry none",
            "upstream through: socks5://10.0.0.1:1080 -> http://proxy.example:3128 carries tcp, udp by connect-udp",
        ]
        daemon.stop()

    def test_looking_opens_nothing(self) -> None:
        """The fixture of all tests counts."""
        Daemon(RecordingLog()).describe(configuration(PLAIN))  # type: ignore[arg-type]


def test_the_access_record_of_a_connection(daemon: Running, echo: Address) -> None:
    with Tunnel(daemon.port, echo) as tunnel:
        tunnel.check(b"12345")
    wait_until(lambda: daemon.log.records)
    (record,) = daemon.log.records
    assert (record.flow.network, record.flow.target, record.flow.listener) == ("tcp", echo, "main")
    assert (record.upstream, record.sent, record.received, record.ended) == ("direct", 5, 5, "closed")


class TestNames:
    """A dns listener, and connections to name servers that are kept."""

    TEXT = "listeners: [{listen: '127.0.0.1:0', name: main}, {listen: '127.0.0.1:0', name: names, protocol: dns}]\ndns: {servers: %s}"

    @staticmethod
    def ask(relay: Running) -> bytes:
        with udp() as sock:
            sock.sendto(WWW, ("127.0.0.1", port_of(relay, 1)))
            return sock.recv(512)

    def test_are_looked_up_for_clients_and_a_stop_gives_everything_up(self) -> None:
        ended = threading.Event()

        def script(sock: socket.socket) -> None:
            serve()(sock)
            ended.set()

        with server(script) as address, running(self.TEXT % f"tcp://{address}") as relay:
            assert self.ask(relay) == answer_to(WWW, a(60))
            assert not ended.is_set()
        assert ended.wait(SECONDS)

    def test_a_reload_gives_up_what_is_kept_of_those_before(self) -> None:
        ended = threading.Event()

        def script(sock: socket.socket) -> None:
            serve()(sock)
            ended.set()

        with server(script) as address, running(self.TEXT % f"tcp://{address}") as relay:
            self.ask(relay)
            relay.reload(self.TEXT % f"tcp://{address}")
            assert ended.wait(SECONDS)
            assert self.ask(relay) == answer_to(WWW, a(60))

    def test_what_nobody_uses_for_a_while_is_given_up(self) -> None:
        ended = threading.Event()

        def script(sock: socket.socket) -> None:
            serve()(sock)
            ended.set()

        with server(script) as address, running(self.TEXT % f"tcp://{address}") as relay:
            self.ask(relay)
            relay.sweep(KEPT_SECONDS + 1)
            assert ended.wait(SECONDS)

    def test_the_group_that_leads_to_a_name_server_is_looked_after(self) -> None:
        group = "{members: ['socks5://127.0.0.1:1', 'socks5://127.0.0.1:2'], health_check: {interval: 1h}}"
        text = self.TEXT % f"{{url: tcp://192.0.2.1, upstream: {group}}}"
        with running(text) as relay:
            assert len(relay.daemon._runtime.health.checks) == 2
            relay.reload(text)
            assert len(relay.daemon._runtime.health.checks) == 2

    def test_without_a_udp_way_out_a_dns_listener_is_not_warned_of(self) -> None:
        with running(self.TEXT % "192.0.2.1" + "\ndefault: socks4://192.0.2.7:1080") as relay:
            assert [line for line in relay.log.lines if "carries none" in line] == [
                "listener 'main' accepts UDP, but its upstream carries none: socks4://192.0.2.7:1080"
            ]

    def test_whom_it_asks_is_told(self) -> None:
        config = configuration(self.TEXT % "[192.0.2.1, 'tls://9.9.9.9']")
        assert (
            "listen 127.0.0.1:0 tcp+udp dns 'names' asks udp://192.0.2.1:53, tls://9.9.9.9:853"
            in Daemon(RecordingLog()).describe(config)
        )


class TestExplain:
    """What is told of a flow is what happens to it."""

    TEXT = """
listeners: [{listen: '127.0.0.1:21080', name: main}]
metrics: 127.0.0.1:21081
upstreams: {there: 'socks5h://192.0.2.1:1', here: 'socks5://192.0.2.1:1'}
rules: [{domain: .there.test, via: auto, upstream: there}, {domain: .here.test, via: auto, upstream: here}]
auto: {direct: pinned.there.test, upstream: far.there.test}
dns: {hosts: {a.here.test: 203.0.113.1}}
"""

    @staticmethod
    def told(target: str, learn: bool | None = None) -> list[str]:
        daemon = Daemon(RecordingLog())
        try:
            if learn is not None:
                host, port = target.split(":")
                daemon.verdicts.learn(Address(host, int(port)), learn)
            return daemon.explain(f"-> {target}", configuration(TestExplain.TEXT))[2:]
        finally:
            daemon.stop()

    @pytest.mark.parametrize(
        "target, learn, way, addresses",
        [
            (
                "a.there.test:1",
                None,
                "auto, now direct, and where that fails by there: socks5h://192.0.2.1:1",
                "looked up when it is dialled; the name goes to the upstream as it is",
            ),
            (
                "a.there.test:1",
                True,
                "auto, now by there: socks5h://192.0.2.1:1",
                "the name goes to the proxy as it is",
            ),
            (
                "far.there.test:1",
                None,
                "auto, now by there: socks5h://192.0.2.1:1",
                "the name goes to the proxy as it is",
            ),
            ("pinned.there.test:1", None, "auto, now direct", "looked up when it is dialled"),
            (
                "a.here.test:1",
                None,
                "auto, now direct, and where that fails by here: socks5://192.0.2.1:1",
                "203.0.113.1",
            ),
        ],
    )
    def test_of_auto_with_both_ways_and_which_is_next(
        self, target: str, learn: bool | None, way: str, addresses: str
    ) -> None:
        assert self.told(target, learn) == [
            f"way out: {way}",
            f"addresses: {addresses}",
            "carried: yes",
        ]

    @pytest.mark.parametrize(
        "target",
        ["127.0.0.1:21080", "0.0.0.0:21080", "[::ffff:127.0.0.1]:21080", "127.0.0.1:21081"],
    )
    def test_hazard_77_our_own_ports_are_refused_before_anything_listens(self, target: str) -> None:
        assert [line.partition(": ")[0] for line in self.told(target)] == ["refused"]


def test_hazard_99_twenty_slow_names_delay_no_other() -> None:
    parts = runtime.Runtime(RecordingLog())
    go_on, slow = threading.Event(), threading.Semaphore(0)

    def ask(host: str) -> Found:
        if host.startswith("slow"):
            slow.release()
            assert go_on.wait(SECONDS)
        return Found(("203.0.113.1",), 1.0)

    parts.resolver.configure(Plan(ask))
    callers = [
        threading.Thread(target=parts.resolver.resolve, args=(Address(f"slow{at}.test", 1),))
        for at in range(20)
    ]
    try:
        for caller in callers:
            caller.start()
        assert all(
            slow.acquire(timeout=SECONDS) for _ in callers
        )  # all are asked for, and none has its answer
        assert parts.resolver.resolve(Address("fast.test", 1)) == [Address("203.0.113.1", 1)]
    finally:
        go_on.set()
        for caller in callers:
            caller.join(SECONDS)
        parts.janitor.start()
        parts.stop()
