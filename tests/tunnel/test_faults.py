"""What goes wrong between a bridge and an agent: both are daemons in this process, and times are short."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import threading
import time
from pathlib import Path

import pytest

from netproxy.daemon.daemon import Daemon
from netproxy.errors import ConfigError
from netproxy.net import tls
from netproxy.net.stream import Stream
from netproxy.tunnel import agent as agent_module
from netproxy.tunnel import bridge as bridge_module
from netproxy.tunnel import pool
from tests.support.certificates import Certificates, certificates
from tests.support.handlers import RecordingLog
from tests.support.relays import LOCALHOST, SECONDS, UdpPort, configuration
from tests.support.sockets import black_hole, read_exactly, read_to_end, server, wait_until
from tests.support.tunnels import (
    TOKEN,
    Echo,
    Side,
    UdpEcho,
    agent_text,
    bridge_text,
    free_port,
    side,
    tunnel,
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "BACKOFF_FIRST", 0.1)
    monkeypatch.setattr(agent_module, "BACKOFF_LIMIT", 0.2)
    monkeypatch.setattr(bridge_module, "CHALLENGE_SECONDS", 0.3)


@pytest.fixture(scope="module")
def made() -> Certificates:
    return certificates()


def echoes(port: int) -> None:
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


def test_bridge_that_goes_and_comes_back() -> None:
    """Hazard 125: agents find it again, without a thread more each time; UDP sessions are made anew."""
    bridging, tcp, udp = free_port(), free_port(), free_port()
    text = bridge_text(f"[{tcp}, {udp}/udp]").replace(
        "tcp://127.0.0.1:0", f"tcp://127.0.0.1:{bridging}"
    )
    with Echo() as echo, UdpEcho() as udp_echo, UdpPort() as client:
        services = f'{{"{tcp}": "127.0.0.1:{echo.port}", "{udp}/udp": "127.0.0.1:{udp_echo.address.port}"}}'
        with side(
            agent_text(bridging, services)
        ) as agent:  # before there is a bridge: hazard 125 from the first dial on
            threads = []
            for turn in range(4):
                wait_until(lambda: agent.tunnels.describe()["agent"].get("tries", 0) >= 3)
                threads.append(threading.active_count())
                with side(text) as bridge:
                    bridge.wait_for_agent(2)
                    echoes(tcp)
                    client.send(b"%d" % turn, type(client.address)(LOCALHOST, udp))
                    client.expect(b"%d" % turn)
                assert is_free(tcp)
            assert max(threads[2:]) - threads[1] <= 2  # the pools have theirs since the first turn


def test_agent_that_is_killed_frees_its_ports_and_comes_back() -> None:
    port = free_port()
    with Echo() as echo, side(bridge_text(f"[{port}]")) as bridge:
        for _ in range(3):
            with side(agent_text(bridge.tunnel_port, f'{{"{port}": "127.0.0.1:{echo.port}"}}')):
                bridge.wait_for_agent(1)
                echoes(port)
            wait_until(lambda: not bridge.agents())
            assert is_free(port)


def test_second_agent_waits_for_the_first_to_go() -> None:
    """Hazard 121: refused as long as the first answers, in at once when it has gone."""
    port = free_port()
    with (
        Echo() as one,
        Echo() as two,
        tunnel(f'{{"{port}": "127.0.0.1:{one.port}"}}', f"[{port}]") as (bridge, first),
    ):
        with side(
            agent_text(bridge.tunnel_port, f'{{"{port}": "127.0.0.1:{two.port}"}}')
        ) as second:
            wait_until(
                lambda: any(
                    "another agent of this name is connected" in line for line in second.log.lines
                )
            )
            echoes(port)
            assert (one.clients, two.clients) == (1, 0)
            first.daemon.stop_accepting()
            bridge.wait_for_agent(1)
            wait_until(lambda: second.tunnels.describe()["agent"]["connected"])
            bridge.wait_for_agent(1)
            echoes(port)
            assert (one.clients, two.clients) == (1, 1)


def test_port_that_is_busy_is_said_on_both_sides_and_the_others_are_served() -> None:
    with socket.create_server((LOCALHOST, 0)) as squatter, Echo() as echo:
        busy, port = squatter.getsockname()[1], free_port()
        services = f'{{"{busy}": "127.0.0.1:9", "{port}": "127.0.0.1:{echo.port}"}}'
        with (
            side(bridge_text(f"[{busy}, {port}]")) as bridge,
            side(agent_text(bridge.tunnel_port, services)) as agent,
        ):
            bridge.wait_for_agent(1)
            echoes(port)
            assert any(
                f"127.0.0.1:{busy}: Address already in use" in line for line in bridge.log.lines
            )
            wait_until(
                lambda: any(f"port {busy}/tcp is not served" in line for line in agent.log.lines)
            )


def test_strangers_at_the_bridges_port_are_in_nobodys_way() -> None:
    """Hazard 119: silent ones, half a hello, and what speaks something else."""
    port = free_port()
    with Echo() as echo, side(bridge_text(f"[{port}]")) as bridge:
        strangers = [
            socket.create_connection((LOCALHOST, bridge.tunnel_port), SECONDS) for _ in range(200)
        ]
        for number, sock in enumerate(strangers):
            sock.sendall((b"", b"\x9eNPT\1\0", b"GET / HTTP/1.1\r\n\r\n", b"\5\1\0")[number % 4])
        with side(agent_text(bridge.tunnel_port, f'{{"{port}": "127.0.0.1:{echo.port}"}}')):
            bridge.wait_for_agent(1)
            echoes(port)
        for sock in strangers:
            sock.close()


def test_own_port_as_a_service() -> None:
    """An agent may show its own proxy to the bridge: it is what its file says."""
    port = free_port()
    with Echo() as echo, side(bridge_text(f"[{port}]")) as bridge:
        own = free_port()
        text = agent_text(bridge.tunnel_port, f'{{"{port}": "127.0.0.1:{own}"}}').replace(
            "listeners: []", f"listeners: [{{listen: '127.0.0.1:{own}'}}]"
        )
        with side(text):
            bridge.wait_for_agent(1)
            from tests.e2e.peers import CONNECT, socks5

            sock, _ = socks5((LOCALHOST, port), CONNECT, (LOCALHOST, echo.port))
            with sock:
                sock.sendall(b"hello")
                assert read_exactly(sock, 5) == b"hello"


@pytest.mark.parametrize(
    "where", ["connection", "connection by several addresses", "TLS", "hello", "proxy"]
)
def test_agent_that_dials_stops_at_once(where: str, made: Certificates) -> None:
    """Whatever its bridge does not answer; and nobody waits for it on a reload."""
    with (
        black_hole() as nobody,
        server(lambda sock: sock.recv(65536) and sock.recv(65536)) as silent,
    ):
        text = agent_text(
            (nobody if where.startswith("connection") else silent).port, '{"8022": "127.0.0.1:9"}'
        )
        if where == "connection by several addresses":
            text = (
                text.replace("tcp://127.0.0.1", "tcp://bridge.test")
                + "dns: {hosts: {bridge.test: [127.0.0.1, 127.0.0.9]}}"
            )
        elif where == "TLS":
            text = trusting(made, silent.port, '{"8022": "127.0.0.1:9"}')
        elif where == "proxy":
            text = text.replace(
                "agent: {", f"agent: {{upstream: 'socks5://127.0.0.1:{silent.port}', "
            )
        with side(text) as agent:
            thread, dials = agent.tunnels._agent.thread, agent.tunnels._agent._dials
            wait_until(lambda: any(dials._under_way.values()))
            began = time.monotonic()
            agent.reload("listeners: []")
            assert time.monotonic() - began < 1.0 and not thread.is_alive()


# -- TLS


def secured(made: Certificates, ports: str, more: str = "") -> str:
    return bridge_text(ports).replace(
        "tcp://127.0.0.1:0'", f"127.0.0.1:0', tls: {made.listener(more)}"
    )


def trusting(made: Certificates, port: int, services: str, tls: str = "") -> str:
    tls = tls or f"{{ca: '{made.path('ca.pem')}'}}"
    return (
        agent_text(port, services)
        .replace("tcp://127.0.0.1", "tls://127.0.0.1")
        .replace("token:", f"tls: {tls}, token:")
    )


def test_tunnel_in_tls(made: Certificates) -> None:
    tcp, udp, data = free_port(), free_port(), os.urandom(1 << 20)
    with (
        Echo() as echo,
        UdpEcho() as udp_echo,
        side(secured(made, f"[{tcp}, {udp}/udp]")) as bridge,
    ):
        services = f'{{"{tcp}": "127.0.0.1:{echo.port}", "{udp}/udp": "127.0.0.1:{udp_echo.address.port}"}}'
        with side(trusting(made, bridge.tunnel_port, services)), UdpPort() as client:
            bridge.wait_for_agent(2)
            with socket.create_connection((LOCALHOST, tcp), SECONDS) as sock:
                sender = threading.Thread(
                    target=lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR))
                )
                sender.start()
                assert read_to_end(sock) == data
                sender.join()
            for size in (0, 1200, 65507):
                client.send(bytes(size), type(client.address)(LOCALHOST, udp))
                client.expect(bytes(size))


def test_agents_come_by_an_sps_port_with_tls(made: Certificates) -> None:
    port = free_port()
    text = (
        f"listeners: [{{listen: '127.0.0.1:0', tls: {made.listener()}}}]\n"
        f"tunnel: {{bridge: {{agents: {{home: {{token: {TOKEN}, ports: [{port}]}}}}}}}}"
    )
    with (
        Echo() as echo,
        side(text) as bridge,
        side(trusting(made, bridge.port, f'{{"{port}": "127.0.0.1:{echo.port}"}}')),
    ):
        bridge.wait_for_agent(1)
        echoes(port)


def test_agents_come_by_a_tunnel_listener(made: Certificates) -> None:
    port = free_port()
    text = (
        f"listeners: [{{protocol: tunnel, listen: '127.0.0.1:0', tls: {made.listener()}}}]\n"
        f"tunnel: {{bridge: {{agents: {{home: {{token: {TOKEN}, ports: [{port}]}}}}}}}}"
    )
    with (
        Echo() as echo,
        side(text) as bridge,
        side(trusting(made, bridge.port, f'{{"{port}": "127.0.0.1:{echo.port}"}}')),
    ):
        bridge.wait_for_agent(1)
        echoes(port)


@pytest.mark.parametrize(
    ("tls", "said"),
    [
        ("{}", "certificate"),
        ("{{ca: '{stranger}'}}", "certificate"),
        ("{{ca: '{ca}', server_name: bridge.example}}", "Hostname mismatch"),
    ],
)
def test_bridge_that_is_not_the_one_is_not_talked_to(
    made: Certificates, tls: str, said: str
) -> None:
    """Hazard 118: no certificate that is believed, another authority's, another name's."""
    tls = (
        tls.format(ca=made.path("ca.pem"), stranger=made.path("stranger.pem"))
        if "{{" in tls
        else tls
    )
    with (
        side(secured(made, "[8022]")) as bridge,
        side(trusting(made, bridge.tunnel_port, '{"8022": "127.0.0.1:9"}', tls)) as agent,
    ):
        wait_until(lambda: any(said.lower() in line.lower() for line in agent.log.lines))
        assert not bridge.agents() and not bridge.count("tunnel_handshakes", "agent")


def test_agent_must_show_a_certificate_where_the_bridge_wants_one(made: Certificates) -> None:
    """Hazard 118."""
    text = secured(made, "[8022]", f", client_ca: '{made.path('ca.pem')}'")
    shows = f"{{ca: '{made.path('ca.pem')}', certificate: '{made.path('client.pem')}', key: '{made.path('client.key')}'}}"
    with side(text) as bridge:
        with side(trusting(made, bridge.tunnel_port, '{"8022": "127.0.0.1:9"}')) as agent:
            wait_until(lambda: any(line.startswith("tunnel:") for line in agent.log.lines))
            assert not bridge.agents()
        with side(trusting(made, bridge.tunnel_port, '{"8022": "127.0.0.1:9"}', shows)):
            bridge.wait_for_agent()


def resumes(agent: Side) -> bool:
    """Whether a connection that waits has spared itself a part of its handshake."""
    link = agent.tunnels._agent._link
    return link is not None and any(
        stream.socket._tls.session_reused for stream in list(link.pool._waiting)
    )


@pytest.mark.parametrize("change", ["ca", "server_name", "content of ca"])
def test_session_with_a_bridge_does_not_outlive_what_it_was_believed_for(
    made: Certificates, tmp_path: Path, change: str
) -> None:
    """Hazard 118: what was agreed on spares later connections the look at the certificate, until a reload."""
    port, ca = free_port(), tmp_path / "ca.pem"
    shutil.copy(made.path("ca.pem"), ca)
    with Echo() as echo, side(secured(made, f"[{port}]")) as bridge:
        services = f'{{"{port}": "127.0.0.1:{echo.port}"}}'

        def text(tls: str) -> str:
            return trusting(made, bridge.tunnel_port, services, tls)

        with side(text(f"{{ca: '{ca}'}}")) as agent:
            bridge.wait_for_agent(1)
            for _ in range(8):  # each has another connection dialled in its place
                echoes(port)
            wait_until(lambda: resumes(agent))
            before, known = agent.tunnels._agent, agent.tunnels._calling.bridge
            assert known._session is not None
            if change == "content of ca":
                shutil.copy(made.path("stranger.pem"), ca)
                agent.reload(text(f"{{ca: '{ca}'}}"))
                assert (
                    agent.tunnels._agent is before
                )  # its connection was believed when it was made
                for _ in range(pool.WAITING):
                    echoes(port)  # by what was dialled before
            else:
                agent.reload(
                    text(
                        f"{{ca: '{made.path('stranger.pem')}'}}"
                        if change == "ca"
                        else f"{{ca: '{ca}', server_name: bridge.example}}"
                    )
                )
                assert agent.tunnels._agent is not before
            assert agent.tunnels._calling.bridge is not known
            said = "Hostname mismatch" if change == "server_name" else "certificate"
            wait_until(lambda: any(said.lower() in line.lower() for line in agent.log.lines))
            assert agent.tunnels._calling.bridge._session is None
            if change == "content of ca":
                assert not bridge.agents()[0]["idle"]
            else:
                wait_until(lambda: not bridge.agents())


def test_dial_under_way_while_a_configuration_comes_keeps_its_session_to_itself(
    made: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session of one configuration's in another's would be of use to nobody: OpenSSL takes it for another's."""
    port, pairs = free_port(), []
    connect, remember = tls.TlsClient.connect, tls.TlsClient.keep_session
    slow, entered, go_on = threading.Event(), threading.Semaphore(0), threading.Event()

    def connect_slowly(known: tls.TlsClient, stream: Stream) -> None:
        connect(known, stream)
        shaken[id(stream)] = known
        if slow.is_set():
            entered.release()
            assert go_on.wait(SECONDS)

    def remember_by(known: tls.TlsClient, stream: Stream) -> None:
        pairs.append((shaken[id(stream)], known))
        remember(known, stream)

    shaken: dict[int, tls.TlsClient] = {}
    monkeypatch.setattr(tls.TlsClient, "connect", connect_slowly)
    monkeypatch.setattr(tls.TlsClient, "keep_session", remember_by)
    with Echo() as echo, side(secured(made, f"[{port}]")) as bridge:
        text = trusting(made, bridge.tunnel_port, f'{{"{port}": "127.0.0.1:{echo.port}"}}')
        with side(text) as agent:
            bridge.wait_for_agent(1, idle=pool.WAITING)
            pairs.clear()
            slow.set()
            echoes(port)
            assert entered.acquire(timeout=SECONDS)
            before = agent.tunnels._calling.bridge
            agent.reload(text)
            assert agent.tunnels._calling.bridge is not before
            go_on.set()
            wait_until(lambda: pairs)
            assert pairs[0] == (before, before)
            for _ in range(8):
                echoes(port)
            bridge.wait_for_agent(1, idle=pool.WAITING)
            assert all(one is other for one, other in pairs)


@pytest.mark.parametrize(
    "first",
    [b"\x9eNPT\1\0" + bytes(32) + b"\4home", b"GET / HTTP/1.1\r\n\r\n", b"\x16\3\1\0\5hello"],
)
def test_plaintext_at_a_bridge_with_tls_is_not_read(made: Certificates, first: bytes) -> None:
    """Hazard 120."""
    with (
        side(secured(made, "[8022]")) as bridge,
        socket.create_connection((LOCALHOST, bridge.tunnel_port), SECONDS) as sock,
    ):
        sock.sendall(first)
        try:
            assert tunnel_silent(sock)
        except ConnectionResetError:
            pass
        wait_until(lambda: bridge.count("connections", "bad protocol") == 1)


def tunnel_silent(sock: socket.socket) -> bool:
    """Whether nothing comes but an alert of TLS, and then the end."""
    data = read_to_end(sock)
    return not data or data[0] == 0x15


def test_bridge_without_tls_is_not_spoken_to_in_clear(made: Certificates) -> None:
    """Hazard 118: an agent that was told tls:// does not fall back."""
    first: list[bytes] = []
    with server(lambda sock: first.append(sock.recv(1))) as nobody:
        with side(trusting(made, nobody.port, '{"8022": "127.0.0.1:9"}')):
            wait_until(lambda: first)
    assert set(first) == {b"\x16"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1])
def test_old_tls_is_refused(made: Certificates, version: ssl.TLSVersion) -> None:
    """Hazard 118."""
    context = made.client_context()
    context.minimum_version = context.maximum_version = version
    context.set_ciphers("ALL:@SECLEVEL=0")
    with (
        side(secured(made, "[8022]")) as bridge,
        socket.create_connection((LOCALHOST, bridge.tunnel_port), SECONDS) as sock,
    ):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            context.wrap_socket(sock, server_hostname="localhost")


def test_files_that_cannot_be_used_keep_a_daemon_from_starting(made: Certificates) -> None:
    for text in (
        secured(made, "[]").replace("server.key", "broken.key"),
        trusting(made, 9, '{"8022": "127.0.0.1:9"}', f"{{ca: '{made.path('broken.pem')}'}}"),
    ):
        with pytest.raises(ConfigError):
            Daemon(RecordingLog()).describe(configuration(text))  # type: ignore[arg-type]
