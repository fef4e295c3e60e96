"""Faults between a bridge and an agent, both daemons in this process with short timeouts."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest

from netproxy.errors import ConfigError
from netproxy.interfaces.addresses import Address
from netproxy.net import tls
from netproxy.net.stream import Stream
from netproxy.tunnel import agent as agent_module
from netproxy.tunnel.control import claims
from netproxy.tunnel import pool
from tests.e2e.peers import CONNECT, socks5
from tests.support.certificates import Certificates, certificates
from tests.support.relays import LOCALHOST, SECONDS, UdpPort, described
from tests.support.sockets import Task, black_hole, read_exactly, read_to_end, server, wait_until
from tests.support.tunnels import (
    TOKEN,
    Echo,
    TunnelDaemon,
    UdpEcho,
    agent_text,
    bridge_text,
    free_port,
    tls_agent_text,
    tls_bridge_text,
    tunnel,
    tunnel_daemon,
)

NO_SERVICE = '{"8022": "127.0.0.1:9"}'


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "RECONNECT_FIRST", 0.1)
    monkeypatch.setattr(agent_module, "RECONNECT_LIMIT", 0.2)
    monkeypatch.setattr(claims, "CHALLENGE_SECONDS", 0.3)


@pytest.fixture(scope="module")
def files() -> Certificates:
    return certificates()


def tcp_service(port: int, echo: Echo) -> str:
    """Return the `services` of an agent with an echo service."""
    return f'{{"{port}": "127.0.0.1:{echo.port}"}}'


def both_services(tcp: int, echo: Echo, udp: int, udp_echo: UdpEcho) -> str:
    """Return the `services` of an agent with echo services of TCP and UDP."""
    udp_target = f"127.0.0.1:{udp_echo.address.port}"
    return f'{{"{tcp}": "127.0.0.1:{echo.port}", "{udp}/udp": "{udp_target}"}}'


def has_line(daemon: TunnelDaemon, part: str) -> bool:
    """Return whether a line of the daemon's log contains `part`, in any case."""
    return any(part.lower() in line.lower() for line in daemon.log.lines)


def check_echo(port: int) -> None:
    """Send data to an echo service behind a port of the bridge and read it back."""
    with socket.create_connection((LOCALHOST, port), SECONDS) as sock:
        sock.sendall(b"hello")
        assert read_exactly(sock, 5) == b"hello"


def is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((LOCALHOST, port))
        except OSError:
            return False
    return True


def in_a_pool(thread: threading.Thread) -> bool:
    pools = ("connection-", "dial-", "udp-dial-", "lookup-", "name-", "query-", "check-", "login-")
    return thread.name.startswith(pools)


def test_bridge_that_stops_and_starts_again_is_found_by_its_agent() -> None:
    """Hazard 125: without another thread each time; UDP sessions are created anew."""
    bridge_port, tcp, udp = free_port(), free_port(), free_port()
    text = bridge_text(f"[{tcp}, {udp}/udp]")
    text = text.replace("tcp://127.0.0.1:0", f"tcp://127.0.0.1:{bridge_port}")
    with Echo() as echo, UdpEcho() as udp_echo, UdpPort() as client:
        services = both_services(tcp, echo, udp, udp_echo)
        # The agent starts before there is a bridge: hazard 125 from the first dial on.
        with tunnel_daemon(agent_text(bridge_port, services)) as agent:
            threads = []
            for turn in range(4):
                wait_until(lambda: agent.tunnels.describe()["agent"].get("tries", 0) >= 3)
                threads.append(sum(not in_a_pool(thread) for thread in threading.enumerate()))
                with tunnel_daemon(text) as bridge:
                    bridge.wait_for_agent(2)
                    check_echo(tcp)
                    client.send(b"%d" % turn, Address(LOCALHOST, udp))
                    client.expect(b"%d" % turn)
                assert is_free(tcp)
            # Pools are bounded, and have as many threads as the machine is busy.
            assert threads[1:] == [threads[1]] * 3


def test_agent_that_stops_frees_its_ports_and_may_come_back() -> None:
    port = free_port()
    with Echo() as echo, tunnel_daemon(bridge_text(f"[{port}]")) as bridge:
        for _ in range(3):
            with tunnel_daemon(agent_text(bridge.tunnel_port, tcp_service(port, echo))):
                bridge.wait_for_agent(1)
                check_echo(port)
            wait_until(lambda: not bridge.agents())
            assert is_free(port)


def test_second_agent_is_refused_until_the_first_leaves() -> None:
    """Hazard 121."""
    port = free_port()
    with (
        Echo() as first_echo,
        Echo() as second_echo,
        tunnel(tcp_service(port, first_echo), f"[{port}]") as (bridge, first),
        tunnel_daemon(agent_text(bridge.tunnel_port, tcp_service(port, second_echo))) as second,
    ):
        wait_until(lambda: has_line(second, "another agent with this name is connected"))
        check_echo(port)
        assert (first_echo.clients, second_echo.clients) == (1, 0)
        first.daemon.stop_accepting()
        bridge.wait_for_agent(1)
        wait_until(lambda: second.tunnels.describe()["agent"]["connected"])
        bridge.wait_for_agent(1)
        check_echo(port)
        assert (first_echo.clients, second_echo.clients) == (1, 1)


def test_busy_port_is_logged_on_both_sides_and_the_others_are_served() -> None:
    with socket.create_server((LOCALHOST, 0)) as squatter, Echo() as echo:
        busy, port = squatter.getsockname()[1], free_port()
        services = f'{{"{busy}": "127.0.0.1:9", "{port}": "127.0.0.1:{echo.port}"}}'
        with (
            tunnel_daemon(bridge_text(f"[{busy}, {port}]")) as bridge,
            tunnel_daemon(agent_text(bridge.tunnel_port, services)) as agent,
        ):
            bridge.wait_for_agent(1)
            check_echo(port)
            assert has_line(bridge, f"127.0.0.1:{busy}: Address already in use")
            wait_until(lambda: has_line(agent, f"port {busy}/tcp is not served"))


def test_strangers_at_the_port_of_the_bridge_do_not_keep_an_agent_out() -> None:
    """Hazard 119: silent ones, half a hello, and other protocols."""
    port = free_port()
    first_bytes = (b"", b"\x9eNPT\1\0", b"GET / HTTP/1.1\r\n\r\n", b"\5\1\0")
    with Echo() as echo, tunnel_daemon(bridge_text(f"[{port}]")) as bridge:
        strangers = [
            socket.create_connection((LOCALHOST, bridge.tunnel_port), SECONDS) for _ in range(200)
        ]
        for number, sock in enumerate(strangers):
            sock.sendall(first_bytes[number % 4])
        with tunnel_daemon(agent_text(bridge.tunnel_port, tcp_service(port, echo))):
            bridge.wait_for_agent(1)
            check_echo(port)
        for sock in strangers:
            sock.close()


def test_proxy_port_of_the_agent_may_be_its_own_service() -> None:
    """An agent may offer its own proxy to the bridge if its file says so."""
    port = free_port()
    with Echo() as echo, tunnel_daemon(bridge_text(f"[{port}]")) as bridge:
        own = free_port()
        text = agent_text(bridge.tunnel_port, f'{{"{port}": "127.0.0.1:{own}"}}')
        text = text.replace("listeners: []", f"listeners: [{{listen: '127.0.0.1:{own}'}}]")
        with tunnel_daemon(text):
            bridge.wait_for_agent(1)
            sock, _ = socks5((LOCALHOST, port), CONNECT, (LOCALHOST, echo.port))
            with sock:
                sock.sendall(b"hello")
                assert read_exactly(sock, 5) == b"hello"


@pytest.mark.parametrize(
    "silent", ["connection", "connection by several addresses", "TLS", "hello", "proxy"]
)
def test_agent_that_is_dialling_ends_on_reload(silent: str, files: Certificates) -> None:
    """Whichever step of its bridge gets no answer."""
    with (
        black_hole() as unreachable,
        server(lambda sock: sock.recv(65536) and sock.recv(65536)) as listening,
    ):
        port = (unreachable if silent.startswith("connection") else listening).port
        text = agent_text(port, NO_SERVICE)
        if silent == "connection by several addresses":
            text = text.replace("tcp://127.0.0.1", "tcp://bridge.test")
            text += "dns: {hosts: {bridge.test: [127.0.0.1, 127.0.0.9]}}"
        elif silent == "TLS":
            text = tls_agent_text(files, port, NO_SERVICE)
        elif silent == "proxy":
            upstream = f"upstream: 'socks5://127.0.0.1:{port}'"
            text = text.replace("agent: {", f"agent: {{{upstream}, ")
        with tunnel_daemon(text) as agent:
            running = agent.tunnels.agent._agent
            wait_until(lambda: any(running._dials._running._sockets.values()))
            agent.reload("listeners: []")
            assert not running.thread.is_alive()


# -- TLS


def test_tunnel_within_tls_carries_streams_and_datagrams(files: Certificates) -> None:
    tcp, udp, data = free_port(), free_port(), os.urandom(1 << 20)
    with (
        Echo() as echo,
        UdpEcho() as udp_echo,
        tunnel_daemon(tls_bridge_text(files, f"[{tcp}, {udp}/udp]")) as bridge,
    ):
        services = both_services(tcp, echo, udp, udp_echo)
        with (
            tunnel_daemon(tls_agent_text(files, bridge.tunnel_port, services)),
            UdpPort() as client,
        ):
            bridge.wait_for_agent(2)
            with socket.create_connection((LOCALHOST, tcp), SECONDS) as sock:
                sender = Task(lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR)))
                assert read_to_end(sock) == data
                sender.result()
            for size in (0, 1200, 65507):
                client.send(bytes(size), Address(LOCALHOST, udp))
                client.expect(bytes(size))


@pytest.mark.parametrize("protocol", ["sps", "tunnel"])
def test_agent_connects_by_a_listener_with_tls(files: Certificates, protocol: str) -> None:
    port = free_port()
    text = f"""
listeners: [{{protocol: {protocol}, listen: '127.0.0.1:0', tls: {files.listener()}}}]
tunnel: {{bridge: {{agents: {{home: {{token: {TOKEN}, ports: [{port}]}}}}}}}}
"""
    with (
        Echo() as echo,
        tunnel_daemon(text) as bridge,
        tunnel_daemon(tls_agent_text(files, bridge.port, tcp_service(port, echo))),
    ):
        bridge.wait_for_agent(1)
        check_echo(port)


@pytest.mark.parametrize(
    ("tls", "said"),
    [
        ("{}", "certificate"),
        ("{{ca: '{stranger}'}}", "certificate"),
        ("{{ca: '{ca}', server_name: bridge.example}}", "Hostname mismatch"),
    ],
    ids=["no trust", "other authority", "other name"],
)
def test_bridge_with_the_wrong_certificate_is_rejected(
    files: Certificates, tls: str, said: str
) -> None:
    """Hazard 118."""
    if "{{" in tls:
        tls = tls.format(ca=files.path("ca.pem"), stranger=files.path("stranger.pem"))
    with (
        tunnel_daemon(tls_bridge_text(files, "[8022]")) as bridge,
        tunnel_daemon(tls_agent_text(files, bridge.tunnel_port, NO_SERVICE, tls)) as agent,
    ):
        wait_until(lambda: has_line(agent, said))
        assert not bridge.agents() and not bridge.count("tunnel_handshakes", "agent")


def test_agent_needs_a_certificate_if_the_bridge_demands_one(files: Certificates) -> None:
    """Hazard 118."""
    ca, certificate, key = (files.path(name) for name in ("ca.pem", "client.pem", "client.key"))
    text = tls_bridge_text(files, "[8022]", f", client_ca: '{ca}'")
    client_tls = f"{{ca: '{ca}', certificate: '{certificate}', key: '{key}'}}"
    with tunnel_daemon(text) as bridge:
        port = bridge.tunnel_port
        with tunnel_daemon(tls_agent_text(files, port, NO_SERVICE)) as agent:
            wait_until(lambda: has_line(agent, "tunnel: no connection to the bridge"))
            assert not bridge.agents()
        with tunnel_daemon(tls_agent_text(files, port, NO_SERVICE, client_tls)):
            bridge.wait_for_agent()


def has_resumed_session(agent: TunnelDaemon) -> bool:
    """Return whether an idle work connection has resumed a TLS session."""
    session = agent.tunnels.agent._agent._session
    return session is not None and any(
        stream.socket._tls.session_reused for stream in list(session.pool._idle)
    )


@pytest.mark.parametrize("change", ["ca", "server_name", "content of ca"])
def test_reload_does_not_resume_tls_sessions_of_an_earlier_trust(
    files: Certificates, tmp_path: Path, change: str
) -> None:
    """Hazard 118: a resumed session spares the check of the certificate, but not after a reload."""
    port, ca = free_port(), tmp_path / "ca.pem"
    shutil.copy(files.path("ca.pem"), ca)
    with Echo() as echo, tunnel_daemon(tls_bridge_text(files, f"[{port}]")) as bridge:

        def text(tls: str) -> str:
            return tls_agent_text(files, bridge.tunnel_port, tcp_service(port, echo), tls)

        with tunnel_daemon(text(f"{{ca: '{ca}'}}")) as agent:
            bridge.wait_for_agent(1)
            # Each echo has another work connection dialled.
            for _ in range(8):
                check_echo(port)
            wait_until(lambda: has_resumed_session(agent))
            before, trust = agent.tunnels.agent._agent, agent.tunnels.agent.connector.trust
            assert trust._session is not None
            if change == "content of ca":
                shutil.copy(files.path("stranger.pem"), ca)
                agent.reload(text(f"{{ca: '{ca}'}}"))
                # The control connection was trusted when it was made, and stays.
                assert agent.tunnels.agent._agent is before
                # The idle work connections serve once more and are used up: others are dialled.
                wait_until(lambda: is_used_up(bridge, port))
            elif change == "ca":
                agent.reload(text(f"{{ca: '{files.path('stranger.pem')}'}}"))
                assert agent.tunnels.agent._agent is not before
            else:
                agent.reload(text(f"{{ca: '{ca}', server_name: bridge.example}}"))
                assert agent.tunnels.agent._agent is not before
            assert agent.tunnels.agent.connector.trust is not trust
            said = "Hostname mismatch" if change == "server_name" else "certificate"
            wait_until(lambda: has_line(agent, said))
            assert agent.tunnels.agent.connector.trust._session is None
            if change == "content of ca":
                # None of those that have served is idle again; the janitor finds them closed.
                # One that was being dialled during the reload may serve once more.
                wait_until(lambda: is_used_up(bridge, port))
            else:
                wait_until(lambda: not bridge.agents())


def is_used_up(bridge: Any, port: int) -> bool:
    """Use an idle work connection, if there is one; return whether there is none any more.

    One that the bridge still counts may be closed already: such a client waits for a dial which
    the agent no longer trusts, and goes.
    """
    if bridge.agents()[0]["idle"]:
        with contextlib.suppress(OSError, EOFError, AssertionError):
            check_echo(port)
    return not bridge.agents()[0]["idle"]


def test_tls_session_of_a_dial_during_a_reload_stays_with_its_configuration(
    files: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL would not resume a session in another context."""
    port = free_port()
    remembered: list[tuple[object, object]] = []
    """The trust that shook hands, and the one that remembers the session."""
    connected: dict[int, object] = {}
    connect, remember = tls.TlsClient.connect, tls.TlsClient.keep_session
    slow, entered, go_on = threading.Event(), threading.Semaphore(0), threading.Event()

    def connect_slowly(trust: tls.TlsClient, stream: Stream) -> None:
        connect(trust, stream)
        connected[id(stream)] = trust
        if slow.is_set():
            entered.release()
            assert go_on.wait(SECONDS)

    def note_remember(trust: tls.TlsClient, stream: Stream) -> None:
        remembered.append((connected[id(stream)], trust))
        remember(trust, stream)

    monkeypatch.setattr(tls.TlsClient, "connect", connect_slowly)
    monkeypatch.setattr(tls.TlsClient, "keep_session", note_remember)
    with Echo() as echo, tunnel_daemon(tls_bridge_text(files, f"[{port}]")) as bridge:
        text = tls_agent_text(files, bridge.tunnel_port, tcp_service(port, echo))
        with tunnel_daemon(text) as agent:
            bridge.wait_for_agent(1, idle=pool.IDLE_FEWEST)
            remembered.clear()
            slow.set()
            check_echo(port)
            assert entered.acquire(timeout=SECONDS)
            before = agent.tunnels.agent.connector.trust
            agent.reload(text)
            assert agent.tunnels.agent.connector.trust is not before
            go_on.set()
            wait_until(lambda: remembered)
            assert remembered[0] == (before, before)
            for _ in range(8):
                check_echo(port)
            bridge.wait_for_agent(1, idle=pool.IDLE_FEWEST)
            assert all(connecting is remembering for connecting, remembering in remembered)


@pytest.mark.parametrize(
    "first",
    [b"\x9eNPT\1\0" + bytes(32) + b"\4home", b"GET / HTTP/1.1\r\n\r\n", b"\x16\3\1\0\5hello"],
    ids=["hello", "HTTP", "malformed TLS"],
)
def test_plaintext_at_a_bridge_with_tls_is_closed(files: Certificates, first: bytes) -> None:
    """Hazard 120."""
    with (
        tunnel_daemon(tls_bridge_text(files, "[8022]")) as bridge,
        socket.create_connection((LOCALHOST, bridge.tunnel_port), SECONDS) as sock,
    ):
        sock.sendall(first)
        try:
            data = read_to_end(sock)
            # Nothing, or an alert of TLS.
            assert not data or data[0] == 0x15
        except ConnectionResetError:
            pass
        wait_until(lambda: bridge.count("connections", "bad protocol") == 1)


def test_agent_with_tls_does_not_fall_back_to_plaintext(files: Certificates) -> None:
    """Hazard 118."""
    first: list[bytes] = []
    with (
        server(lambda sock: first.append(sock.recv(1))) as plain,
        tunnel_daemon(tls_agent_text(files, plain.port, NO_SERVICE)),
    ):
        wait_until(lambda: first)
    assert set(first) == {b"\x16"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1])
def test_old_tls_is_refused(files: Certificates, version: ssl.TLSVersion) -> None:
    """Hazard 118."""
    context = files.client_context()
    context.minimum_version = context.maximum_version = version
    context.set_ciphers("ALL:@SECLEVEL=0")
    with (
        tunnel_daemon(tls_bridge_text(files, "[8022]")) as bridge,
        socket.create_connection((LOCALHOST, bridge.tunnel_port), SECONDS) as sock,
    ):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            context.wrap_socket(sock, server_hostname="localhost")


def test_unusable_tls_files_are_configuration_errors(files: Certificates) -> None:
    broken_ca = f"{{ca: '{files.path('broken.pem')}'}}"
    for text in (
        tls_bridge_text(files, "[]").replace("server.key", "broken.key"),
        tls_agent_text(files, 9, NO_SERVICE, broken_ca),
    ):
        with pytest.raises(ConfigError):
            described(text)
