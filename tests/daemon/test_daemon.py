"""Daemon in this process: start, reload, drain and stop, and what it tells of itself."""

from __future__ import annotations

import gc
import re
import socket
import threading
from pathlib import Path
from typing import Any, Iterator

import pytest

from netproxy.daemon import runtime
from netproxy.daemon.build import build_for_questions
from netproxy.daemon.questions import PlanQuestions
from netproxy.daemon.daemon import Daemon
from netproxy.daemon.plan import Plan
from netproxy.daemon.runtime import raise_descriptor_limit
from netproxy.errors import ConfigError, ListenError
from netproxy.interfaces.addresses import Address
from netproxy.protocol import socks5
from netproxy.resolver.resolver import LookupPlan, LookupResult
from netproxy.resolver.servers import KEPT_SECONDS
from tests.support.certificates import certificates
from tests.support.dns import a
from tests.support.handlers import RecordingLog
from tests.support.nameservers import WWW, answer_to, serve
from tests.support.relays import Running, UdpClient, UdpPort, configuration, described, running
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
    b"GET /.well-known/masque/udp/127.0.0.1/%d/ HTTP/1.1\r\nHost: proxy.test\r\n"
    b"Connection: Upgrade\r\nUpgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n\r\n"
)
UOT_NAME = b"sp.v2.udp-over-tcp.arpa"


class TestDatagramsInStreams:
    """Listeners serve them if their network has udp, which is the default."""

    @pytest.fixture(autouse=True)
    def uot_name_is_not_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No name server is asked for it."""
        getaddrinfo = socket.getaddrinfo

        def look_up(host: Any, *arguments: Any, **more: Any) -> Any:
            if host in (UOT_NAME, UOT_NAME.decode()):
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return getaddrinfo(host, *arguments, **more)

        monkeypatch.setattr(socket, "getaddrinfo", look_up)

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
    def test_http_without_udp_takes_them_for_plain_requests(self, protocol: str) -> None:
        """UoT's name is not found, and connect-udp is a request to this proxy itself."""
        with running(
            f"listeners: [{{listen: '127.0.0.1:0', protocol: {protocol}, network: [tcp]}}]"
        ) as relay:
            assert relay.daemon.summary() == f"tcp 127.0.0.1:{relay.port}"
            lines = self.by_connect(relay.port)
            assert (
                lines[0] == b"HTTP/1.1 502 Bad Gateway"
                and b"Proxy-Status: netproxy; error=dns_error" in lines
            )
            lines = self.by_upgrade(relay.port)
            assert lines[0] == b"HTTP/1.1 400 Bad Request"
            plain = self.head(
                relay.port,
                b"GET /.well-known/masque/udp/127.0.0.1/53/ HTTP/1.1\r\nHost: proxy.test\r\n\r\n",
            )
            assert plain[0] == lines[0]
            assert not relay.count("sessions_opened")

    @pytest.mark.parametrize("protocol", ["sps", "http"])
    def test_http_serves_them_by_default(self, protocol: str) -> None:
        with running(f"listeners: [{{listen: '127.0.0.1:0', protocol: {protocol}}}]") as relay:
            port = port_of(relay)
            assert self.by_connect(port)[0] == b"HTTP/1.1 200 Connection established"
            assert self.by_upgrade(port)[0] == b"HTTP/1.1 101 Switching Protocols"
            # http binds no UDP socket for it.
            assert ("udp 127" in relay.daemon.summary()) is (protocol == "sps")

    @pytest.mark.parametrize(
        "network, socks5_says, socks4_says",
        [("[tcp]", b"\5\4", b"\0\x5b"), ("[tcp, udp]", b"\5\0", b"\0\x5a")],
    )
    def test_socks_serves_them_if_its_network_has_udp(
        self, network: str, socks5_says: bytes, socks4_says: bytes
    ) -> None:
        with running(f"listeners: [{{listen: '127.0.0.1:0', network: {network}}}]") as relay:
            assert self.by_socks5(port_of(relay)) == socks5_says
            assert self.by_socks4(port_of(relay)) == socks4_says

    def test_reload_that_takes_udp_from_a_listener_ends_them(self) -> None:
        with running("listeners: [{listen: '127.0.0.1:0', protocol: http, name: main}]") as relay:
            port = port_of(relay)
            assert self.by_upgrade(port)[0].startswith(b"HTTP/1.1 101 ")
            relay.reload(
                "listeners: [{listen: '127.0.0.1:0', protocol: http, name: main, network: [tcp]}]"
            )
            assert self.by_upgrade(port)[0].startswith(b"HTTP/1.1 400 ")


class TestFilesOfUpstreams:
    """TLS files, which a reload reads again."""

    def test_upstream_and_its_file_may_go_in_one_reload(self, tmp_path: Path) -> None:
        file = tmp_path / "ca.pem"
        file.write_bytes(Path(certificates().path("ca.pem")).read_bytes())
        with running(f"{PLAIN}\ndefault: 'https://192.0.2.1:1?tls.ca={file}'\n") as relay:
            file.unlink()
            relay.reload(PLAIN)
            relay.reload(PLAIN)

    def test_broken_file_leaves_the_daemon_as_it_was(self, tmp_path: Path) -> None:
        file = tmp_path / "ca.pem"
        file.write_bytes(Path(certificates().path("ca.pem")).read_bytes())
        text = f"{PLAIN}\ndefault: 'https://192.0.2.1:1?tls.ca={file}'\n"
        with running(text) as relay:
            before, good = relay.daemon.summary(), file.read_bytes()
            file.write_bytes(b"broken")
            with pytest.raises(ConfigError, match="tls: cannot use"):
                relay.reload(text)
            assert relay.daemon.summary() == before
            file.write_bytes(good)
            relay.reload(text)


class TestStart:
    def test_one_port_serves_everything(self, daemon: Running, echo: Address) -> None:
        """SOCKS4, SOCKS5, HTTP and UDP on the same number."""
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

    def test_configuration_without_listeners_is_allowed(self) -> None:
        with running("listeners: [{listen: '127.0.0.1:0'}]") as running_daemon:
            running_daemon.reload("listeners: []")
            assert running_daemon.daemon.summary() == "nothing"
            assert running_daemon.daemon.dead_thread() == ""

    def test_address_in_use_leaves_nothing_open(self) -> None:
        """The fixture of all tests counts."""
        with listen() as taken:
            daemon = Daemon(RecordingLog())  # type: ignore[arg-type]
            with pytest.raises(
                ListenError, match=f"tcp {address_of(taken)}: Address already in use"
            ):
                daemon.start(
                    configuration(
                        "listeners: [{listen: '127.0.0.1:0', name: a}, "
                        f"{{listen: '{address_of(taken)}'}}]"
                    )
                )
            daemon.stop()

    def test_broken_hash_is_a_configuration_error(self) -> None:
        daemon = Daemon(RecordingLog())  # type: ignore[arg-type]
        with pytest.raises(ConfigError) as caught:
            daemon.start(configuration(PLAIN + "\nusers: {alice: {password: 'scrypt$x'}}"))
        assert "not a hash made by 'netproxyctl hash-password'" in str(caught.value)
        daemon.stop()

    def test_listener_may_have_a_host_name(self) -> None:
        with running("listeners: [{listen: 'localhost:0', allow_open: true}]") as running_daemon:
            assert (
                "127.0.0.1" in running_daemon.daemon.summary()
                or "[::1]" in running_daemon.daemon.summary()
            )

    def test_listener_with_an_unknown_host_name_is_refused(self) -> None:
        daemon = Daemon(RecordingLog())  # type: ignore[arg-type]
        with pytest.raises(ListenError, match="nowhere.invalid"):
            daemon.start(
                configuration("listeners: [{listen: 'nowhere.invalid:0', allow_open: true}]")
            )
        daemon.stop()

    def test_wildcard_is_ipv4_on_a_machine_without_ipv6(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 131."""
        monkeypatch.setattr(runtime, "has_ipv6", lambda: False)
        with running("listeners: [{listen: ':0', allow_open: true}]") as running_daemon:
            assert "0.0.0.0" in running_daemon.daemon.summary()

    @pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 on this machine")
    def test_wildcard_accepts_both_families(self, echo: Address) -> None:
        with running("listeners: [{listen: ':0', allow_open: true}]") as running_daemon:
            for host in ("127.0.0.1", "::1"):
                with socket.create_connection((host, running_daemon.port), SECONDS) as sock:
                    sock.sendall(b"\x05\x01\x00")
                    assert read_exactly(sock, 2) == b"\x05\x00"

    def test_listener_whose_upstream_carries_no_udp_is_warned_of(self) -> None:
        with running(PLAIN + "\ndefault: http://127.0.0.1:9?udp=none") as running_daemon:
            assert running_daemon.log.lines == [
                "test.yaml:1:22: listener 'main' accepts UDP, but its upstream carries none: "
                "http://127.0.0.1:9"
            ]


class TestReload:
    def test_reload_keeps_sockets_and_connections(self, daemon: Running, echo: Address) -> None:
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

    def test_many_reloads_leak_nothing(self, daemon: Running, echo: Address) -> None:
        """Hazard 106; the fixture of all tests counts descriptors and threads."""
        with Tunnel(daemon.port, echo) as tunnel:
            for number in range(30):
                daemon.reload(PLAIN + f"\ntimeouts: {{connect: {number + 1}s}}")
                tunnel.check()
        # The NAT table, the socket whose drops are counted, memory, the log, refusals, accounts,
        # usage, history.
        assert len(daemon.daemon._runtime.janitor._tables) == 8

    def test_old_plans_are_freed(self, tmp_path: Path) -> None:
        """Hazard 106, with every part that a plan may have: each held 60 KiB."""
        files = certificates()
        text = f"""
listeners:
- {{listen: '127.0.0.1:0', name: main, tls: {files.listener()}}}
- {{listen: '127.0.0.1:0', name: names, protocol: dns}}
dns: {{servers: ['127.0.0.1:9']}}
users: {{alice: {{password: secret}}}}
tunnel: {{bridge: {{listen: 'tcp://127.0.0.1:0', agents: {{home: {{token: {"x" * 20}}}}}}}}}
upstreams: {{pool: {{members: ['socks5://127.0.0.1:9', 'http://127.0.0.1:9']}}}}
control: 'unix:{tmp_path / "control"}'
metrics: 127.0.0.1:0
rules: [{{port: 9, via: auto, upstream: pool}}]
"""
        with running(text) as running_daemon:
            for number in range(5):
                running_daemon.reload(text + f"timeouts: {{connect: {number + 1}s}}\n")
            gc.collect()
            plan, runtime = running_daemon.daemon._plan, running_daemon.daemon._runtime
            plans = [known for known in gc.get_objects() if isinstance(known, Plan)]
            assert [known for known in plans if known.runtime is runtime] == [plan]

    def test_reload_starts_new_listeners_and_stops_old_ones(
        self, daemon: Running, echo: Address
    ) -> None:
        with Tunnel(daemon.port, echo) as tunnel:
            tunnel.check()
            daemon.reload("listeners: [{protocol: http, listen: '127.0.0.2:0', name: other}]")
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", daemon.port), SECONDS)
            # Running connections continue.
            tunnel.check()
            assert daemon.daemon.live == 1
        assert daemon.daemon.summary().startswith("tcp 127.0.0.2:")
        wait_until(lambda: not daemon.daemon.live)

    def test_association_ends_with_its_listener(self, daemon: Running) -> None:
        with UdpPort() as target, UdpClient(daemon.port) as client:
            client.check_echo(target)
            daemon.reload("listeners: [{protocol: http, listen: '127.0.0.1:0', name: other}]")
            wait_until(lambda: daemon.idle())

    def test_new_connections_meet_the_new_configuration(
        self, daemon: Running, echo: Address
    ) -> None:
        with Tunnel(daemon.port, echo) as old:
            daemon.reload(PLAIN + "\nusers: {alice: {password: secret}}")
            old.check()
            with Tunnel(daemon.port, echo) as new:
                assert new.method == 255
            with Tunnel(daemon.port, echo, ("alice", "wrong")) as new:
                assert new.reply == 255
            with Tunnel(daemon.port, echo, ("alice", "secret")) as new:
                new.check()

    def test_reload_changes_the_upstream(self, daemon: Running, echo: Address) -> None:
        daemon.reload(PLAIN + "\ndefault: block")
        with Tunnel(daemon.port, echo) as tunnel:
            assert tunnel.reply == socks5.NOT_ALLOWED
        assert daemon.daemon.default_upstream == "block"
        daemon.reload(
            "listeners: [{listen: '127.0.0.1:0', name: main, upstream: open}]\n"
            "upstreams: {open: direct}\ndefault: block"
        )
        with Tunnel(daemon.port, echo) as tunnel:
            tunnel.check()

    def test_reload_with_another_batching_warns_that_it_needs_a_restart(
        self, daemon: Running
    ) -> None:
        single = PLAIN + "\nudp: {batching: single}"
        for text in (PLAIN, single, single, PLAIN):
            daemon.reload(text)
        message = "udp.batching: a change from auto to single needs a restart"
        assert [line for line in daemon.log.lines if "batching" in line] == [message, message]

    def test_reload_with_workers_warns_that_they_need_a_restart(self, daemon: Running) -> None:
        for workers in (2, 1):
            daemon.reload(PLAIN + f"\nworkers: {workers}")
        message = "workers: a change from 1 to 2 needs a restart"
        assert [line for line in daemon.log.lines if "workers" in line] == [message]

    def test_reload_with_an_address_in_use_changes_nothing(
        self, daemon: Running, echo: Address
    ) -> None:
        """Hazard 105."""
        with listen() as taken, Tunnel(daemon.port, echo) as tunnel:
            before = daemon.daemon.summary()
            with pytest.raises(ListenError):
                daemon.reload(
                    "default: block\nlisteners:\n"
                    "  - {listen: '127.0.0.1:0', name: main, udp: {max_sessions: 1}, "
                    "limits: {connections: 1}}\n"
                    f"  - {{listen: '{address_of(taken)}', name: b}}\n"
                )
            tunnel.check()
            assert daemon.daemon.summary() == before
            with Tunnel(daemon.port, echo) as another:
                another.check()
            assert daemon.daemon.default_upstream == "direct"

    def test_reload_with_an_address_in_use_leaves_udp_limits_as_they_were(
        self, daemon: Running
    ) -> None:
        with listen() as taken:
            with pytest.raises(ListenError):
                daemon.reload(
                    "listeners:\n  - {listen: '127.0.0.1:0', name: main, udp: {max_sessions: 1}}\n"
                    f"  - {{listen: '{address_of(taken)}', name: b}}\n"
                )
        with UdpPort() as target, UdpClient(daemon.port) as first, UdpClient(daemon.port) as second:
            first.check_echo(target)
            second.check_echo(target)

    def test_reload_with_a_broken_hash_changes_nothing(
        self, daemon: Running, echo: Address
    ) -> None:
        with pytest.raises(ConfigError):
            daemon.reload(PLAIN + "\ndefault: block\nusers: {alice: {password: 'scrypt$x'}}")
        with Tunnel(daemon.port, echo) as tunnel:
            tunnel.check()

    def test_datagram_after_a_reload_meets_the_new_handler(self, daemon: Running) -> None:
        with UdpPort() as target, UdpClient(daemon.port) as client:
            client.check_echo(target)
            daemon.reload(PLAIN + "\ndefault: block")
            with UdpPort() as other:
                client.to(other.address, b"x")
                wait_until(lambda: daemon.drops())
                assert other.silent()


class TestLimits:
    def test_connections_per_client_are_limited(self, echo: Address) -> None:
        """Hazard 95."""
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

    def test_connections_per_listener_are_limited(self, echo: Address) -> None:
        """Hazard 95.  The excess is closed at once; the others do not notice."""
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

    def test_connection_threads_are_limited_by_descriptors(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = configuration(
            "listeners: [{listen: '127.0.0.1:1-4', limits: {connections: 1000}}]"
        )
        monkeypatch.setattr(runtime.resource, "getrlimit", lambda _: (1024, 4096))
        assert runtime.connection_threads(config) == (1024 - 64) // 3
        monkeypatch.setattr(runtime.resource, "getrlimit", lambda _: (100000, 100000))
        assert runtime.connection_threads(config) == runtime.CONNECTION_THREADS_LIMIT
        monkeypatch.setattr(runtime.resource, "getrlimit", lambda _: (10, 10))
        assert runtime.connection_threads(config) == 1

    def test_descriptor_limit_is_raised_to_the_hard_limit(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limits_set: list[Any] = []
        monkeypatch.setattr(runtime.resource, "getrlimit", lambda _: (1024, 4096))
        monkeypatch.setattr(
            runtime.resource, "setrlimit", lambda _, limits: limits_set.append(limits)
        )
        raise_descriptor_limit()
        assert limits_set == [(4096, 4096)]

    def test_descriptor_limit_stays_if_the_system_refuses_to_raise_it(
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
    def test_relay_port_any_gives_each_association_its_own_port(self) -> None:
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

    def test_relay_port_range_is_kept_to_and_refused_when_used_up(self) -> None:
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
            # The port is closed last.
            wait_until(lambda: running_daemon.idle() and is_free(port))
            with UdpPort() as target, UdpClient(running_daemon.port) as again:
                again.check_echo(target)


class TestStop:
    def test_drain_leaves_running_connections(self, daemon: Running, echo: Address) -> None:
        """Hazard 104."""
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

    def test_stop_ends_everything(self, echo: Address) -> None:
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

    def test_daemon_that_never_started_can_be_stopped(self) -> None:
        Daemon(RecordingLog()).stop()  # type: ignore[arg-type]


class TestTelling:
    def test_status_lines(self, daemon: Running, echo: Address) -> None:
        with Tunnel(daemon.port, echo):
            lines = list(daemon.daemon.status())
        assert lines[0].startswith("connections=1 ")
        assert daemon.daemon.summary() in lines[0]
        assert re.fullmatch(
            r"udp \S+ 127\.0\.0\.1:\d+: associations=0 sessions=0 entries=0", lines[1]
        )
        assert "connections{accepted}=1" in lines

    def test_dead_thread_is_named(self, daemon: Running) -> None:
        """Hazard 98."""
        assert daemon.daemon.dead_thread() == ""
        daemon.daemon._runtime.janitor.stop()
        assert daemon.daemon.dead_thread() == "janitor"

    def test_description_of_a_configuration(self) -> None:
        lines = described(
            "listeners: [{listen: '127.0.0.1:1080', name: main, upstream: chain}, "
            "{protocol: http, listen: '[::1]:8080'}]\n"
            "upstreams: {office: 'socks5://user:hunter2@10.0.0.1:1080', "
            "chain: [office, 'http://proxy.example:3128?udp=none'], "
            "through: [office, 'http://proxy.example:3128']}\n"
        )
        chain = "socks5://10.0.0.1:1080 -> http://proxy.example:3128"
        assert lines == [
            f"listen 127.0.0.1:1080 tcp+udp sps 'main' upstream {chain}",
            "listen [::1]:8080 tcp+connect-udp http 'http-8080' upstream direct",
            "upstream default: direct carries bind, tcp, udp",
            "upstream office: socks5://10.0.0.1:1080 carries tcp, udp by ASSOCIATE",
            f"upstream chain: {chain} carries tcp;"
            " no udp: http://proxy.example:3128 is configured to carry none",
            f"upstream through: {chain} carries tcp, udp by connect-udp",
        ]

    def test_description_opens_nothing(self) -> None:
        """The fixture of all tests counts."""
        described(PLAIN)


def test_connection_has_an_access_record(daemon: Running, echo: Address) -> None:
    with Tunnel(daemon.port, echo) as tunnel:
        tunnel.check(b"12345")
    wait_until(lambda: daemon.log.records)
    (record,) = daemon.log.records
    assert (record.flow.network, record.flow.target, record.flow.listener) == ("tcp", echo, "main")
    assert (record.upstream, record.sent, record.received, record.ended) == (
        "direct",
        5,
        5,
        "closed",
    )


class TestNames:
    """A dns listener, and idle connections to name servers."""

    TEXT = (
        "listeners: [{listen: '127.0.0.1:0', name: main}, "
        "{listen: '127.0.0.1:0', name: names, protocol: dns}]\n"
        "dns: {servers: %s}"
    )

    @staticmethod
    def ask(relay: Running) -> bytes:
        with udp() as sock:
            sock.sendto(WWW, ("127.0.0.1", port_of(relay, 1)))
            return sock.recv(512)

    def test_names_are_looked_up_for_clients_and_stop_closes_the_server_connection(self) -> None:
        ended = threading.Event()

        def script(sock: socket.socket) -> None:
            serve()(sock)
            ended.set()

        with server(script) as address, running(self.TEXT % f"tcp://{address}") as relay:
            assert self.ask(relay) == answer_to(WWW, a(60))
            assert not ended.is_set()
        assert ended.wait(SECONDS)

    def test_reload_closes_connections_to_name_servers(self) -> None:
        ended = threading.Event()

        def script(sock: socket.socket) -> None:
            serve()(sock)
            ended.set()

        with server(script) as address, running(self.TEXT % f"tcp://{address}") as relay:
            self.ask(relay)
            relay.reload(self.TEXT % f"tcp://{address}")
            assert ended.wait(SECONDS)
            assert self.ask(relay) == answer_to(WWW, a(60))

    def test_idle_connection_to_a_name_server_is_closed(self) -> None:
        ended = threading.Event()

        def script(sock: socket.socket) -> None:
            serve()(sock)
            ended.set()

        with server(script) as address, running(self.TEXT % f"tcp://{address}") as relay:
            self.ask(relay)
            relay.sweep(KEPT_SECONDS + 1)
            assert ended.wait(SECONDS)

    def test_group_that_leads_to_a_name_server_has_health_checks(self) -> None:
        members = "['socks5://127.0.0.1:1', 'socks5://127.0.0.1:2']"
        group = f"{{members: {members}, health_check: {{interval: 1h}}}}"
        text = self.TEXT % f"{{url: tcp://192.0.2.1, upstream: {group}}}"
        with running(text) as relay:
            assert len(relay.daemon._runtime.health_checks) == 2
            relay.reload(text)
            assert len(relay.daemon._runtime.health_checks) == 2

    def test_dns_listener_needs_no_upstream_with_udp(self) -> None:
        with running(self.TEXT % "192.0.2.1" + "\ndefault: socks4://192.0.2.7:1080") as relay:
            assert [line for line in relay.log.lines if "carries none" in line] == [
                "test.yaml:1:22: listener 'main' accepts UDP, but its upstream carries none: "
                "socks4://192.0.2.7:1080"
            ]

    def test_description_names_the_name_servers(self) -> None:
        assert (
            "listen 127.0.0.1:0 tcp+udp dns 'names' asks udp://192.0.2.1:53, tls://9.9.9.9:853"
            in described(self.TEXT % "[192.0.2.1, 'tls://9.9.9.9']")
        )


class TestExplain:
    """The lines of --explain for `via: auto`, and for the daemon's own ports."""

    TEXT = """
listeners: [{listen: '127.0.0.1:21080', name: main}]
metrics: 127.0.0.1:21081
upstreams: {there: 'socks5h://192.0.2.1:1', here: 'socks5://192.0.2.1:1'}
rules:
- {domain: .there.test, via: auto, upstream: there}
- {domain: .here.test, via: auto, upstream: here}
auto: {direct: pinned.there.test, upstream: far.there.test}
dns: {hosts: {a.here.test: 203.0.113.1}}
"""

    @staticmethod
    def questions(text: str, flow: str) -> list[str]:
        parts = runtime.Runtime(RecordingLog())  # type: ignore[arg-type]
        try:
            return PlanQuestions(build_for_questions(configuration(text), parts)).explain(flow)
        finally:
            parts.stop()

    @staticmethod
    def explained(target: str, learn: bool | None = None) -> list[str]:
        parts = runtime.Runtime(RecordingLog())  # type: ignore[arg-type]
        try:
            if learn is not None:
                host, port = target.split(":")
                parts.verdicts.learn(Address(host, int(port)), learn)
            plan = build_for_questions(configuration(TestExplain.TEXT), parts)
            return PlanQuestions(plan).explain(f"-> {target}")[2:]
        finally:
            parts.stop()

    @pytest.mark.parametrize(
        "target, learn, upstream, addresses",
        [
            (
                "a.there.test:1",
                None,
                "auto, currently direct; if that fails, through there: socks5h://192.0.2.1:1",
                "looked up when dialled; the upstream resolves the name",
            ),
            (
                "a.there.test:1",
                True,
                "auto, currently through there: socks5h://192.0.2.1:1",
                "the upstream resolves the name",
            ),
            (
                "far.there.test:1",
                None,
                "auto, currently through there: socks5h://192.0.2.1:1",
                "the upstream resolves the name",
            ),
            ("pinned.there.test:1", None, "auto, currently direct", "looked up when dialled"),
            (
                "a.here.test:1",
                None,
                "auto, currently direct; if that fails, through here: socks5://192.0.2.1:1",
                "203.0.113.1",
            ),
        ],
    )
    def test_auto_names_both_upstreams_and_the_next_one(
        self, target: str, learn: bool | None, upstream: str, addresses: str
    ) -> None:
        assert self.explained(target, learn) == [
            f"upstream: {upstream}",
            f"addresses: {addresses}",
            "carried: yes",
        ]

    @pytest.mark.parametrize(
        "flow, last",
        [
            (
                "nobody@10.0.0.1 -> x.test:1 on main",
                "refused: there is no user 'nobody': the login fails",
            ),
            ("alice@10.0.0.1 -> 192.0.2.9:1 on main", "carried: yes"),
            ("nobody@10.0.0.1 -> 192.0.2.9:1 on open", "carried: yes"),
        ],
    )
    def test_user_who_is_not_known_is_refused_or_not_asked_for(self, flow: str, last: str) -> None:
        text = """
listeners:
- {listen: '127.0.0.1:21080', name: main}
- {listen: '127.0.0.1:21081', name: open, auth: none}
users: {alice: {password: x}}
"""
        lines = self.questions(text, flow)
        assert lines[-1] == last
        told = "login: not asked for on open: the flow has no user"
        assert (told in lines) is ("open" in flow)

    def test_upstream_that_needs_an_agent_says_so_before_agents_can_connect(self) -> None:
        text = """
listeners: [{listen: '127.0.0.1:21080', name: main}]
tunnel: {bridge: {listen: 'tcp://127.0.0.1:21082', agents: {home: {token: 0123456789abcdef}}}}
upstreams: {both: {members: [tunnel://home, direct]}}
rules: [{port: 2, via: both}]
default: tunnel://home
"""
        assert (
            self.questions(text, "-> x.test:1")[-1] == "carried: yes, if agent 'home' is connected"
        )
        assert self.questions(text, "-> 192.0.2.9:2")[-1] == "carried: yes"

    @pytest.mark.parametrize(
        "target",
        ["127.0.0.1:21080", "0.0.0.0:21080", "[::ffff:127.0.0.1]:21080", "127.0.0.1:21081"],
    )
    def test_own_ports_are_refused_before_anything_listens(self, target: str) -> None:
        """Hazard 77."""
        assert [line.partition(": ")[0] for line in self.explained(target)] == ["refused"]


def test_twenty_slow_names_delay_no_other() -> None:
    """Hazard 99."""
    parts = runtime.Runtime(RecordingLog())  # type: ignore[arg-type]
    answer, slow = threading.Event(), threading.Semaphore(0)

    def ask(host: str) -> LookupResult:
        if host.startswith("slow"):
            slow.release()
            assert answer.wait(SECONDS)
        return LookupResult(("203.0.113.1",), 1.0)

    parts.resolver.configure(LookupPlan(ask))
    callers = [
        threading.Thread(target=parts.resolver.resolve, args=(Address(f"slow{at}.test", 1),))
        for at in range(20)
    ]
    try:
        for caller in callers:
            caller.start()
        # All are asked for, and none has its answer.
        assert all(slow.acquire(timeout=SECONDS) for _ in callers)
        assert parts.resolver.resolve(Address("fast.test", 1)) == [Address("203.0.113.1", 1)]
    finally:
        answer.set()
        for caller in callers:
            caller.join(SECONDS)
        parts.janitor.start()
        parts.stop()
