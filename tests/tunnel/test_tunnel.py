"""A bridge and an agent, both daemons in this process: TCP and UDP by public ports and an exit."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from netproxy.admin.diagnosis.dial_test import DialTests
from netproxy.admin.diagnosis.explain import FlowError
from netproxy.daemon.tunnels import ports as tunnel_ports
from netproxy.interfaces.addresses import Address
from netproxy.listener.tcp import TcpListener
from netproxy.net.stream import Stream, complete
from netproxy.protocol.proxy_protocol import read_header
from netproxy.protocol.tunnel import BridgePort
from netproxy.tunnel import pool
from tests.e2e.peers import CONNECT, Refused, socks5
from tests.support.relays import LOCALHOST, SECONDS, SPS, UdpClient, UdpPort, described, running
from tests.support.sockets import (
    Task,
    is_reset,
    read_exactly,
    read_to_end,
    refusing,
    server,
    wait_until,
)
from tests.support.tunnels import (
    Echo,
    TunnelDaemon,
    UdpEcho,
    agent_text,
    bridge_text,
    free_port,
    tunnel,
    tunnel_daemon,
)

VIA_HOME = "default: tunnel://home"


def dial(port: int) -> socket.socket:
    """Connect to a port of the bridge."""
    return socket.create_connection((LOCALHOST, port), SECONDS)


def dial_socks(bridge: TunnelDaemon, target: tuple[str, int]) -> socket.socket:
    """CONNECT through the bridge's own SOCKS port.  Raises Refused with the reply."""
    return socks5((LOCALHOST, bridge.port), CONNECT, target)[0]


def check_echo(sock: socket.socket, data: bytes = b"hello") -> None:
    """Send data to an echo service and read it back."""
    sock.sendall(data)
    assert read_exactly(sock, len(data)) == data


def assert_refused(bridge: TunnelDaemon, target: tuple[str, int], reply: int) -> None:
    """Assert that a CONNECT gets this reply of SOCKS5."""
    with pytest.raises(Refused) as caught:
        dial_socks(bridge, target)
    assert caught.value.code == reply


def services_text(services: dict[int, int]) -> str:
    """Return the `services` of an agent: ports of the bridge, and ports on its loopback."""
    return ", ".join(f'"{port}": "{LOCALHOST}:{target}"' for port, target in services.items())


def tcp_service(port: int, echo: Echo) -> str:
    return f"{{{services_text({port: echo.port})}}}"


def udp_service(port: int, echo: UdpEcho) -> str:
    return f'{{"{port}/udp": "{LOCALHOST}:{echo.address.port}"}}'


# -- services as upstreams


def test_service_of_an_agent_is_an_upstream_for_tcp() -> None:
    """It needs no exit."""
    port = free_port()
    more = f"default: tunnel://home/{port}"
    with Echo() as echo, tunnel(tcp_service(port, echo), f"[{port}]", more=more) as (bridge, _):
        with dial_socks(bridge, ("192.0.2.1", 9)) as sock:
            check_echo(sock)
        wait_until(lambda: bridge.log.records)
        assert bridge.log.records[0].upstream == f"tunnel://home/{port}"
    listed = described(bridge_text(more="default: tunnel://home/9"))
    carries = "tunnel://home/9 carries tcp; no udp: tunnel://home/9 is a service for TCP"
    assert any(carries in line for line in listed)


def test_service_that_the_agent_lacks_is_refused() -> None:
    port, more = free_port(), "default: tunnel://home/9"
    with Echo() as echo, tunnel(tcp_service(port, echo), f"[{port}]", more=more) as (bridge, agent):
        assert_refused(bridge, ("192.0.2.1", 9), 2)
        (line,) = [line for line in agent.log.lines if "tunnel.agent.services" in line]
        assert "asked=9/tcp" in line


def test_explain_says_whether_the_agent_is_connected() -> None:
    text = bridge_text(more="default: tunnel://home")
    with running(text) as bridge:
        lines = bridge.daemon.explain("-> 192.0.2.1:80")
        assert lines[-1] == "carried: no: agent 'home' is not connected"
    port, more = free_port(), "default: tunnel://home"
    with Echo() as echo, tunnel(tcp_service(port, echo), f"[{port}]", more=more) as (bridge, _):
        bridge.wait_for_agent(1)
        lines = bridge.daemon.explain("-> 192.0.2.1:80")
        assert lines[-1] == "carried: no: agent 'home' is not an exit"
    more = f"default: tunnel://home/{port}"
    with Echo() as echo, tunnel(tcp_service(port, echo), f"[{port}]", more=more) as (bridge, _):
        bridge.wait_for_agent(1)
        assert bridge.daemon.explain("-> 192.0.2.1:80")[-1] == "carried: yes"


def test_target_is_tested_through_an_agent() -> None:
    port = free_port()
    with Echo() as echo, tunnel(tcp_service(port, echo), f"[{port}]") as (bridge, _):
        paths = bridge.daemon.questions.paths()
        request = {"target": "192.0.2.1:80", "via": "tunnel://home"}
        answer = DialTests().run(paths, request)
        assert answer["failure"] is not None
        assert "agent 'home' is not an exit" in str(answer["failure"])


# -- public ports


def test_stream_through_a_public_port() -> None:
    port = free_port()
    with Echo() as echo, tunnel(tcp_service(port, echo), f"[{port}]") as (bridge, _):
        bridge.wait_for_agent(1)
        with dial(port) as sock:
            check_echo(sock)
            sock.shutdown(socket.SHUT_WR)
            assert read_to_end(sock) == b""
        wait_until(lambda: not bridge.agents()[0]["streams"])


def test_datagrams_through_a_public_port_keep_their_sizes() -> None:
    port = free_port()
    with UdpEcho() as echo, tunnel(udp_service(port, echo), f"[{port}/udp]") as (bridge, _):
        bridge.wait_for_agent(1)
        with UdpPort() as client:
            client.socket.connect((LOCALHOST, port))
            for size in (0, 1, 1200, 9000, 65507):
                data = bytes(size)
                client.socket.send(data)
                assert client.socket.recv(65536) == data
        assert len(set(echo.sources)) == 1


def test_client_of_a_public_port_has_a_share_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard 95.  Otherwise one client takes all descriptors and threads of the bridge."""
    monkeypatch.setattr(tunnel_ports, "SESSIONS_PER_CLIENT", 2)
    tcp, udp = free_port(), free_port()
    limits = "limits: {connections_per_client: 2}"
    ports = f"[{{port: '0.0.0.0:{tcp}', {limits}}}, '0.0.0.0:{udp}/udp']"
    with Echo() as echo, UdpEcho() as udp_echo, ExitStack() as stack:
        services = f'{services_text({tcp: echo.port})}, "{udp}/udp": "{udp_echo.address}"'
        bridge, _ = stack.enter_context(tunnel(f"{{{services}}}", ports))
        bridge.wait_for_agent(2)
        for _ in range(2):
            check_echo(stack.enter_context(dial(tcp)))
        assert stack.enter_context(dial(tcp)).recv(1) == b""
        clients = [stack.enter_context(UdpPort(host)) for host in (LOCALHOST,) * 3 + ("127.0.0.2",)]
        for client in (*clients[:2], clients[3]):
            client.send(b"data", Address(LOCALHOST, udp))
            client.expect(b"data")
        clients[2].send(b"data", Address(LOCALHOST, udp))
        bridge.wait_for_count("drops", "session limit", 1)


def test_limits_of_a_public_port_are_its_own() -> None:
    tcp = free_port()
    with Echo() as echo, ExitStack() as stack:
        ports = f"[{{port: {tcp}, limits: {{connections: 1, rate: 8Mbit/s}}}}]"
        bridge, _ = stack.enter_context(tunnel(f"{{{services_text({tcp: echo.port})}}}", ports))
        bridge.wait_for_agent(1)
        first = stack.enter_context(dial(tcp))
        check_echo(first)
        assert stack.enter_context(dial(tcp)).recv(1) == b""
        (stats,) = bridge.daemon._runtime.accounts.stats("listener")
        assert (stats.name, stats.connections) == (f"home-{tcp}", 1)


def dial_from(source: str, port: int) -> socket.socket:
    """Connect to a port of the bridge from an address."""
    return socket.create_connection((LOCALHOST, port), SECONDS, (source, 0))


def limited_ports(tcp: int, udp: int, clients: str) -> str:
    """Return the `ports` of an agent, each with these keys."""
    return f"[{{port: {tcp}, {clients}}}, {{port: {udp}/udp, {clients}}}]"


def test_clients_of_a_public_port_are_those_of_its_entry() -> None:
    """A reload changes them; the port stays open and running streams continue."""
    tcp, udp = free_port(), free_port()
    strangers = ("127.0.0.3", "127.0.0.4")
    clients = "clients: [127.0.0.0/8, '!127.0.0.3'], clients_deny: [127.0.0.4]"
    with Echo() as echo, UdpEcho() as udp_echo, ExitStack() as stack:
        services = f'{services_text({tcp: echo.port})}, "{udp}/udp": "{udp_echo.address}"'
        ports = limited_ports(tcp, udp, clients)
        bridge, _ = stack.enter_context(tunnel(f"{{{services}}}", ports))
        bridge.wait_for_agent(2)
        stream = stack.enter_context(dial_from("127.0.0.2", tcp))
        check_echo(stream)
        udp_clients = [stack.enter_context(UdpPort(host)) for host in ("127.0.0.2", *strangers)]
        for client in udp_clients:
            client.send(b"data", Address(LOCALHOST, udp))
        udp_clients[0].expect(b"data")
        for source in strangers:
            assert read_to_end(stack.enter_context(dial_from(source, tcp))) == b""
        bridge.wait_for_count("drops", "client not allowed", 2)
        bridge.wait_for_count("connections_refused", "client not allowed", 2)
        refused = [line for line in bridge.log.lines if line.startswith("msg=refused")]
        assert sorted(line.partition("decided=")[2].split()[0] for line in refused) == (
            ["clients"] * 2 + ["clients_deny"] * 2
        )
        bridge.reload(bridge_text(limited_ports(tcp, udp, "clients: [127.0.0.3]")))
        check_echo(stream)
        check_echo(stack.enter_context(dial_from("127.0.0.3", tcp)))
        udp_clients[1].send(b"now", Address(LOCALHOST, udp))
        udp_clients[1].expect(b"now")
        assert read_to_end(stack.enter_context(dial_from("127.0.0.2", tcp))) == b""


def test_half_close_passes_through_with_all_bytes() -> None:
    """8 MB in each direction at once; the end of one direction ends that direction alone."""
    port, data = free_port(), os.urandom(8 << 20)
    with Echo() as echo, tunnel(tcp_service(port, echo), f"[{port}]") as (bridge, _):
        with dial(port) as sock:
            sender = Task(lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR)))
            assert read_to_end(sock) == data
            sender.result()
        wait_until(lambda: not bridge.agents()[0]["streams"])
        state = bridge.agents()[0]
        assert min(state["sent"], state["received"]) >= len(data)


def test_more_streams_at_once_than_idle_work_connections() -> None:
    port = free_port()
    with Echo() as echo, tunnel(tcp_service(port, echo), f"[{port}]") as (bridge, agent):
        socks = [dial(port) for _ in range(40)]
        for number, sock in enumerate(socks):
            sock.sendall(b"%3d" % number)
        for number, sock in enumerate(socks):
            assert read_exactly(sock, 3) == b"%3d" % number
        assert bridge.agents()[0]["streams"] == 40
        for sock in socks:
            sock.close()
        wait_until(lambda: not bridge.agents()[0]["streams"] and not agent.tunnels.live)


def test_stream_that_is_not_read_does_not_delay_others() -> None:
    """Hazard 124: it fills its own sockets and one buffer."""
    port = free_port()
    with (
        Echo() as echo,
        tunnel(tcp_service(port, echo), f"[{port}]"),
        dial(port) as unread,
        dial(port) as other,
    ):
        unread.setblocking(False)
        full = 0
        # Until nothing more can be sent.
        while full < 20:
            try:
                unread.send(bytes(65536))
                full = 0
            except BlockingIOError:
                full += 1
                time.sleep(0.01)
        for _ in range(50):
            check_echo(other, bytes(65536))


def test_service_that_refuses_resets_the_client() -> None:
    port = free_port()
    with (
        refusing() as target,
        tunnel(f'{{"{port}": "{target}"}}', f"[{port}]") as (_, agent),
        socket.socket() as sock,
    ):
        # The reset may come before connect() returns.
        sock.settimeout(SECONDS)
        assert sock.connect_ex((LOCALHOST, port)) == errno.ECONNRESET or is_reset(sock)
        assert agent.count("tunnel_refused", "connection refused") == 1


def test_proxy_header_tells_the_service_the_client() -> None:
    port = free_port()
    clients: list[Address | None] = []

    def serve(sock: socket.socket) -> None:
        stream = Stream(sock)
        clients.append(complete(read_header(stream)))
        sock.sendall(complete(stream.read_exactly(5)))

    with server(serve) as target:
        services = f'{{"{port}": {{target: "{target}", proxy_protocol: true}}}}'
        with tunnel(services, f"[{port}]"), dial(port) as sock:
            check_echo(sock)
            assert clients == [Address(*sock.getsockname())]


@pytest.mark.parametrize("has_header", [False, True])
def test_service_may_be_a_unix_socket(tmp_path: Path, has_header: bool) -> None:
    port, path = free_port(), tmp_path / "service"
    clients: list[Address | None] = []

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            stream = Stream(sock)
            clients.append(complete(read_header(stream)) if has_header else None)
            sock.sendall(complete(stream.read_exactly(5)))
            assert read_to_end(sock) == b""

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        service = Task(serve)
        services = (
            f'{{"{port}": {{target: "unix:{path}", proxy_protocol: {str(has_header).lower()}}}}}'
        )
        with tunnel(services, f"[{port}]") as (_, agent):
            with dial(port) as sock:
                check_echo(sock)
                assert clients == [Address(*sock.getsockname()) if has_header else None]
            service.result()
            wait_until(lambda: agent.log.records)
            assert str(agent.log.records[0].flow.target) == f"unix:{path}"


def test_records_on_both_sides_name_the_client() -> None:
    port = free_port()
    with Echo() as echo, tunnel(tcp_service(port, echo), f"[{port}]") as (bridge, agent):
        with dial(port) as sock:
            client = Address(*sock.getsockname())
            check_echo(sock)
        wait_until(lambda: bridge.log.records and agent.log.records)
        near, far = bridge.log.records[0], agent.log.records[0]
        assert (near.flow.listener, near.flow.client) == (f"home-{port}", client)
        assert (near.flow.target, near.upstream) == (Address("home", port), "tunnel://home")
        assert (far.flow.listener, far.flow.client) == ("tunnel-agent", client)
        assert (far.flow.target.port, far.upstream) == (echo.port, "direct")
        assert (near.sent, near.received, far.sent, far.received) == (5, 5, 5, 5)


def test_clients_of_the_bridge_cannot_reach_a_public_port() -> None:
    """Hazard 77: it is a port of the daemon itself while it is open.

    A proxy that an agent serves there may be an upstream all the same.
    """
    tcp, udp, inner = free_port(), free_port(), free_port()
    more = f"rules: [{{port: 7, via: 'socks5://127.0.0.1:{inner}'}}]"
    ports = f"[{tcp}, {udp}/udp, {inner}]"
    with Echo() as echo, UdpEcho() as udp_echo, running(SPS) as proxy:
        services = services_text({tcp: echo.port, inner: proxy.port})
        services += f', "{udp}/udp": "{LOCALHOST}:{udp_echo.address.port}"'
        with tunnel(f"{{{services}}}", ports, more=more) as (bridge, _):
            bridge.wait_for_agent(3)
            for _ in range(2):
                assert_refused(bridge, (LOCALHOST, tcp), 2)
                assert not echo.clients
                with UdpClient(bridge.port) as client:
                    client.to(Address(LOCALHOST, udp), b"hello")
                    wait_until(bridge.drops)
                assert not udp_echo.sources
                # Port 7 goes through the agent's proxy, which finds nobody there.
                assert_refused(bridge, (LOCALHOST, 7), 5)
                bridge.reload(bridge_text(ports, more))
            bridge.reload(bridge_text("[]", more))
            # The port is closed: a connection to it is only refused.
            assert_refused(bridge, (LOCALHOST, tcp), 5)


def test_public_ports_closed_at_the_same_time_keep_their_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their connections continue, are counted, and end with the daemon."""
    ports = [free_port() for _ in range(3)]
    looking, closed = threading.Event(), threading.Event()
    live = TcpListener.live

    def slow_live(listener: TcpListener) -> int:
        """Delay the thread that closes a port, so that another port is closed meanwhile."""
        if threading.current_thread().name == "test-close" and not looking.is_set():
            looking.set()
            closed.wait(0.3)
        return live.fget(listener)

    with Echo() as echo, ExitStack() as stack:
        services = services_text({port: echo.port for port in ports})
        with tunnel(f"{{{services}}}", str(ports)) as (bridge, _):
            for port in ports:
                check_echo(stack.enter_context(dial(port)))
            open_ports = bridge.tunnels.bridge._sessions.get("home").ports._open
            first, second, third = (
                open_ports.pop(BridgePort("tcp", port))[1].close for port in ports
            )
            first()
            with monkeypatch.context() as patched:
                patched.setattr(TcpListener, "live", property(slow_live))

                def close() -> None:
                    second()

                task = Task(close)
                assert looking.wait(SECONDS)
                third()
                closed.set()
                task.result()
            assert bridge.tunnels.live == len(bridge.tunnels.ports._retired) == 3
        wait_until(lambda: not bridge.tunnels.live)


def test_each_udp_client_of_a_public_port_has_a_session() -> None:
    port = free_port()
    with UdpEcho() as echo, tunnel(udp_service(port, echo), f"[{port}/udp]") as (bridge, _):
        with UdpPort() as first, UdpPort() as second:
            for client in (first, second):
                client.send(b"hello", Address(LOCALHOST, port))
            for client in (first, second):
                client.expect(b"hello")
            assert len(set(echo.sources)) == 2 and bridge.agents()[0]["streams"] == 2


# -- an exit


def test_socks_connect_through_an_exit() -> None:
    with Echo() as echo, tunnel(is_exit=True, more=VIA_HOME) as (bridge, _):
        with dial_socks(bridge, (LOCALHOST, echo.port)) as sock:
            check_echo(sock)
        # The agent resolves the name.
        with dial_socks(bridge, ("localhost", echo.port)) as sock:
            check_echo(sock)


def test_reason_of_the_exit_reaches_the_client() -> None:
    with refusing() as target, tunnel(is_exit=True, more=VIA_HOME) as (bridge, _):
        assert_refused(bridge, (target.host, target.port), 5)
        assert_refused(bridge, ("no-such-name.invalid", 80), 4)


def test_socks_udp_through_an_exit_uses_one_port_for_all_targets() -> None:
    with (
        UdpEcho() as first,
        UdpEcho() as second,
        tunnel(is_exit=True, more=VIA_HOME) as (bridge, _),
    ):
        with UdpClient(bridge.port) as client:
            for size in (0, 1, 1400, 65000):
                for target in (first, second):
                    client.to(target.address, bytes(size))
                    assert client.receive() == (bytes(size), target.address)
        assert set(first.sources) == set(second.sources) and len(set(first.sources)) == 1
        wait_until(lambda: not bridge.agents()[0]["streams"])


def test_agent_that_is_not_an_exit_dials_only_its_services() -> None:
    port = free_port()
    services = f'{{"{port}": "127.0.0.1:9"}}'
    with Echo() as echo, tunnel(services, f"[{port}]", more=VIA_HOME) as (bridge, _):
        assert_refused(bridge, (LOCALHOST, echo.port), 2)
        assert not echo.clients
        # The agent itself refuses if the bridge asks all the same.
        bridge.tunnels.bridge._sessions.get("home").is_exit = True
        assert_refused(bridge, (LOCALHOST, echo.port), 2)
        assert not echo.clients


@pytest.mark.parametrize(
    "agents",
    [
        "",
        "destinations: {deny: [127.0.0.0/8]}",
        "rules: [{listener: tunnel-agent, network: tcp, via: block}]",
    ],
    ids=["defaults", "destinations", "rules"],
)
def test_exit_dials_only_what_the_rules_of_the_agent_permit(agents: str) -> None:
    """By default nothing on the agent's loopback."""
    with Echo() as echo, tunnel(is_exit=True, more=VIA_HOME, agents=agents) as (bridge, agent):
        assert_refused(bridge, (LOCALHOST, echo.port), 2)
        assert not echo.clients
        assert agent.count("tunnel_refused", "not allowed by the rules") == 1


def test_flow_of_an_exit_is_explained_by_its_listener_name() -> None:
    rules = """
destinations: {allow: [127.0.0.0/8]}
rules: [{listener: tunnel-agent, port: 25, via: block}]
"""
    with tunnel(is_exit=True, more=VIA_HOME, agents=rules) as (bridge, agent):
        for port, upstream in ((25, "block"), (80, "direct")):
            lines = agent.daemon.explain(f"tcp 203.0.113.9 -> 127.0.0.1:{port} on tunnel-agent")
            assert lines[0] == f"flow: tcp 203.0.113.9 -> 127.0.0.1:{port} on tunnel-agent"
            assert lines[2] == f"upstream: {upstream}"
        # The agent has no other listener.
        assert agent.daemon.explain("-> 127.0.0.1:80")[0].endswith(", listener tunnel-agent)")
        with pytest.raises(FlowError, match="no listener 'tunnel-agent'"):
            bridge.daemon.explain("-> 127.0.0.1:80 on tunnel-agent")


def test_agent_that_is_not_an_exit_explains_its_refusal() -> None:
    port = free_port()
    with tunnel(f'{{"{port}": "127.0.0.1:9"}}', f"[{port}]") as (_, agent):
        assert agent.daemon.explain("-> 127.0.0.1:80 on tunnel-agent")[1:] == [
            "refused: the agent is no exit, and leads to its services alone"
        ]


def test_rule_of_the_bridge_leads_into_the_network_of_the_agent() -> None:
    more = "rules: [{ip: [127.9.0.0/16], via: 'tunnel://home'}]\ndefault: block"
    with Echo("127.9.9.9") as echo, tunnel(is_exit=True, more=more) as (bridge, _):
        with dial_socks(bridge, ("127.9.9.9", echo.port)) as sock:
            check_echo(sock)
        with pytest.raises(Refused):
            dial_socks(bridge, (LOCALHOST, echo.port))


def test_dial_without_a_connected_agent_is_refused() -> None:
    with tunnel_daemon(bridge_text(more=VIA_HOME)) as bridge:
        assert_refused(bridge, (LOCALHOST, 9), 4)


def test_tunnel_as_the_first_hop_of_a_chain() -> None:
    """The next hop is a proxy in the agent's network."""
    with Echo() as echo, running() as inner:
        far = f"['tunnel://home', 'socks5://127.0.0.1:{inner.port}']"
        more = f"upstreams: {{far: {far}}}\ndefault: far"
        with (
            tunnel(is_exit=True, more=more) as (bridge, agent),
            dial_socks(bridge, (LOCALHOST, echo.port)) as sock,
        ):
            check_echo(sock)
            assert len(inner.log.records) == 0 and agent.tunnels.live == 1


def test_group_tries_the_next_member_without_a_connected_agent() -> None:
    members = "{members: ['tunnel://home', direct], balance: failover}"
    more = f"upstreams: {{any: {members}}}\ndefault: any"
    with (
        Echo() as echo,
        tunnel_daemon(bridge_text(more=more)) as bridge,
        dial_socks(bridge, (LOCALHOST, echo.port)) as sock,
    ):
        check_echo(sock)


# -- reload


def test_reload_of_the_agent_changes_services_and_keeps_the_rest() -> None:
    first, second = free_port(), free_port()
    with (
        Echo() as echo,
        tunnel(tcp_service(first, echo), f"[{first}, {second}]") as (bridge, agent),
    ):
        since = bridge.agents()[0]["since"]
        with dial(first) as sock:
            check_echo(sock)
            both = f"{{{services_text({first: echo.port, second: echo.port})}}}"
            agent.reload(agent_text(bridge.tunnel_port, both))
            bridge.wait_for_agent(2)
            with dial(second) as other:
                check_echo(other)
            agent.reload(agent_text(bridge.tunnel_port, tcp_service(second, echo)))
            wait_until(lambda: len(bridge.agents()[0]["ports"]) == 1)
            with pytest.raises(ConnectionRefusedError):
                dial(first)
            check_echo(sock, b"still")
        assert bridge.agents()[0]["since"] == since


def test_reload_keeps_the_agent_unless_its_bridge_or_identity_changes() -> None:
    """Changed timeouts apply to what is dialled later; another upstream needs another agent."""
    port = free_port()
    timeouts = "{handshake: 7s, connect: 6s, tcp_idle: 1h, half_close: 4m, drain: 20s}"
    with (
        Echo() as echo,
        tunnel(tcp_service(port, echo), f"[{port}]") as (bridge, agent),
        running(SPS) as proxy,
    ):
        text = agent_text(bridge.tunnel_port, tcp_service(port, echo))
        tunnels, since = agent.tunnels, bridge.agents()[0]["since"]
        before, via = tunnels.agent._agent, tunnels.agent.connector.hop.via
        agent.reload(f"{text}timeouts: {timeouts}")
        assert tunnels.agent._agent is before and not before.stopped
        assert tunnels.agent.connector.hop.seconds == 7.0
        assert tunnels.agent.connector.hop.via is not via
        with dial(port) as sock:
            check_echo(sock)
        # Another work connection was dialled in place of the one that was opened.
        bridge.wait_for_agent(1, idle=pool.IDLE_FEWEST)
        assert bridge.agents()[0]["since"] == since
        upstream = f"upstream: 'socks5://127.0.0.1:{proxy.port}'"
        agent.reload(text.replace("agent: {", f"agent: {{{upstream}, "))
        assert tunnels.agent._agent is not before and before.stopped
        wait_until(lambda: any(new["since"] > since and new["ports"] for new in bridge.agents()))


def test_reload_of_the_bridge_closes_a_port_and_keeps_its_streams() -> None:
    first, second = free_port(), free_port()
    with Echo() as echo:
        services = f"{{{services_text({first: echo.port, second: echo.port})}}}"
        with tunnel(services, f"[{first}, {second}]") as (bridge, agent):
            since = bridge.wait_for_agent(2)["since"]
            with dial(first) as sock, dial(second) as other:
                for stream in (sock, other):
                    check_echo(stream)
                bridge.reload(bridge_text(f"[{second}]"))
                with pytest.raises(ConnectionRefusedError):
                    dial(first)
                with dial(second) as later:
                    for stream in (sock, other, later):
                        check_echo(stream, b"still")
            assert bridge.agents()[0]["since"] == since
            expected = {f"{first}/tcp": "not allowed by the bridge", f"{second}/tcp": "served"}
            wait_until(lambda: agent.tunnels.describe()["agent"]["ports"] == expected)


def test_reload_that_removes_the_tunnel_on_either_side() -> None:
    port = free_port()
    with Echo() as echo, tunnel(tcp_service(port, echo), f"[{port}]") as (bridge, agent):
        with dial(port) as sock:
            check_echo(sock)
            agent.reload("listeners: []")
            wait_until(lambda: not bridge.agents())
            with pytest.raises(ConnectionRefusedError):
                dial(port)
            check_echo(sock, b"still")
        agent.reload(agent_text(bridge.tunnel_port, tcp_service(port, echo)))
        bridge.wait_for_agent(1)
        bridge.reload(SPS)
        wait_until(lambda: not bridge.agents())


def test_drain_lets_streams_finish() -> None:
    port = free_port()
    with Echo() as echo, tunnel(tcp_service(port, echo), f"[{port}]") as (bridge, agent):
        with dial(port) as sock:
            check_echo(sock)
            bridge.daemon.stop_accepting()
            agent.daemon.stop_accepting()
            check_echo(sock, b"still")
            # Idle work connections end meanwhile; the stream's are left.
            wait_until(lambda: bridge.daemon.live == agent.daemon.live == 1)
        wait_until(lambda: not bridge.daemon.live and not agent.daemon.live)
