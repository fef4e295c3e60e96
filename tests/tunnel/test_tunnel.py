"""A bridge and an agent together, both daemons in this process: TCP and UDP through ports and through an exit."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import ExitStack

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.listener.tcp import TcpListener
from netproxy.net.stream import Stream
from netproxy.protocol.proxy_protocol import read_header
from netproxy.protocol.tunnel import Service
from netproxy.admin.explain import FlowError
from netproxy.tunnel import pool
from tests.e2e.peers import CONNECT, Refused, socks5
from tests.support.relays import LOCALHOST, SECONDS, SPS, UdpClient, UdpPort, running
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
    Side,
    UdpEcho,
    agent_text,
    bridge_text,
    free_port,
    side,
    tunnel,
)

HOME = "default: tunnel://home"


def dial(port: int) -> socket.socket:
    return socket.create_connection((LOCALHOST, port), SECONDS)


def test_stream_through_a_port() -> None:
    port = free_port()
    with (
        Echo() as echo,
        tunnel(f'{{"{port}": "127.0.0.1:{echo.port}"}}', f"[{port}]") as (bridge, agent),
    ):
        bridge.wait_for_agent(1)
        with dial(port) as sock:
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
            sock.shutdown(socket.SHUT_WR)
            assert read_to_end(sock) == b""
        wait_until(lambda: not bridge.agents()[0]["streams"])


def test_datagrams_through_a_port() -> None:
    port = free_port()
    with (
        UdpEcho() as echo,
        tunnel(f'{{"{port}/udp": "127.0.0.1:{echo.address.port}"}}', f"[{port}/udp]") as (
            bridge,
            agent,
        ),
    ):
        bridge.wait_for_agent(1)
        with UdpPort() as client:
            client.socket.connect((LOCALHOST, port))
            for size in (0, 1, 1200, 9000, 65507):
                data = bytes(size)
                client.socket.send(data)
                assert client.socket.recv(65536) == data
        assert len(set(echo.sources)) == 1


def socks(bridge: Side, target: tuple[str, int]) -> socket.socket:
    """A CONNECT by the bridge's own SOCKS port; Refused with its reply."""
    return socks5((LOCALHOST, bridge.port), CONNECT, target)[0]


# -- ports


def test_many_bytes_both_ways_with_a_half_close() -> None:
    """8 MB up and down at once; the end of one direction is the end of that alone."""
    port, data = free_port(), os.urandom(8 << 20)
    with (
        Echo() as echo,
        tunnel(f'{{"{port}": "127.0.0.1:{echo.port}"}}', f"[{port}]") as (bridge, agent),
    ):
        with dial(port) as sock:
            sender = Task(lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR)))
            assert read_to_end(sock) == data
            sender.result()
        wait_until(lambda: not bridge.agents()[0]["streams"])
        figures = bridge.agents()[0]
        assert min(figures["sent"], figures["received"]) >= len(data)


def test_streams_at_once_use_up_the_pool_and_more() -> None:
    port = free_port()
    with (
        Echo() as echo,
        tunnel(f'{{"{port}": "127.0.0.1:{echo.port}"}}', f"[{port}]") as (bridge, agent),
    ):
        socks = [dial(port) for _ in range(40)]
        for number, sock in enumerate(socks):
            sock.sendall(b"%3d" % number)
        for number, sock in enumerate(socks):
            assert read_exactly(sock, 3) == b"%3d" % number
        assert bridge.agents()[0]["streams"] == 40
        for sock in socks:
            sock.close()
        wait_until(lambda: not bridge.agents()[0]["streams"] and not agent.tunnels.live)


def test_one_stream_unread_while_others_run() -> None:
    """Hazard 124: its memory is what sockets and one buffer hold, and nobody waits for it."""
    port = free_port()
    with (
        Echo() as echo,
        tunnel(f'{{"{port}": "127.0.0.1:{echo.port}"}}', f"[{port}]") as (bridge, agent),
    ):
        with dial(port) as stuck, dial(port) as lively:
            stuck.setblocking(False)
            sent, quiet = 0, 0
            while quiet < 20:  # until nothing more goes
                try:
                    sent += stuck.send(bytes(65536))
                    quiet = 0
                except BlockingIOError:
                    quiet += 1
                    time.sleep(0.01)
            for _ in range(50):
                lively.sendall(bytes(65536))
                assert read_exactly(lively, 65536) == bytes(65536)


def test_service_that_refuses_is_seen_by_the_user() -> None:
    port = free_port()
    with refusing() as nobody, tunnel(f'{{"{port}": "{nobody}"}}', f"[{port}]") as (bridge, agent):
        with dial(port) as sock:
            assert is_reset(sock)
        assert agent.count("tunnel_refused", "connection refused") == 1


def test_proxy_header_tells_the_service_who_comes() -> None:
    port, seen = free_port(), []

    def serve(sock: socket.socket) -> None:
        stream = Stream(sock)
        seen.append(read_header(stream))
        sock.sendall(stream.read_exactly(5))

    with server(serve) as target:
        services = f'{{"{port}": {{target: "{target}", proxy_protocol: true}}}}'
        with tunnel(services, f"[{port}]") as (bridge, agent), dial(port) as sock:
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
            assert seen == [Address(*sock.getsockname())]


def test_records_on_both_sides_name_the_user() -> None:
    port = free_port()
    with (
        Echo() as echo,
        tunnel(f'{{"{port}": "127.0.0.1:{echo.port}"}}', f"[{port}]") as (bridge, agent),
    ):
        with dial(port) as sock:
            user = Address(*sock.getsockname())
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
        wait_until(lambda: bridge.log.records and agent.log.records)
        near, far = bridge.log.records[0], agent.log.records[0]
        assert (near.flow.listener, near.flow.client, near.flow.target, near.upstream) == (
            f"home-{port}",
            user,
            Address("home", port),
            "tunnel://home",
        )
        assert (far.flow.listener, far.flow.client, far.flow.target.port, far.upstream) == (
            "tunnel-agent",
            user,
            echo.port,
            "direct",
        )
        assert (near.sent, near.received, far.sent, far.received) == (5, 5, 5, 5)


def test_bridges_own_clients_do_not_reach_a_public_port() -> None:
    """Hazard 77: it is a port of the proxy's own, as long as it is open; a proxy that an agent shows there is an upstream like any."""
    tcp, udp, inner = free_port(), free_port(), free_port()
    services = {f'"{tcp}"': "{tcp}", f'"{udp}/udp"': "{udp}", f'"{inner}"': "{proxy}"}
    more = f"rules: [{{port: 7, via: 'socks5://127.0.0.1:{inner}'}}]"
    with Echo() as echo, UdpEcho() as udp_echo, running(SPS) as proxy:
        text = ", ".join(f"{key}: '{target}'" for key, target in services.items()).format(
            tcp=f"{LOCALHOST}:{echo.port}",
            udp=f"{LOCALHOST}:{udp_echo.address.port}",
            proxy=f"{LOCALHOST}:{proxy.port}",
        )
        with tunnel(f"{{{text}}}", f"[{tcp}, {udp}/udp, {inner}]", more=more) as (bridge, agent):
            bridge.wait_for_agent(3)
            for _ in range(2):
                with pytest.raises(Refused) as caught:
                    socks(bridge, (LOCALHOST, tcp))
                assert caught.value.code == 2 and not echo.clients
                with UdpClient(bridge.port) as client:
                    client.to(Address(LOCALHOST, udp), b"hello")
                    wait_until(bridge.drops)
                assert not udp_echo.sources
                with pytest.raises(Refused) as caught:
                    socks(bridge, (LOCALHOST, 7))  # nobody is there, which the agent's proxy says
                assert caught.value.code == 5
                bridge.reload(bridge_text(f"[{tcp}, {udp}/udp, {inner}]", more))
            bridge.reload(bridge_text("[]", more))
            with pytest.raises(Refused) as caught:
                socks(bridge, (LOCALHOST, tcp))
            assert caught.value.code == 5  # it is nobody's any more


def test_public_ports_that_close_at_once_are_all_looked_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Connections that live go on, are counted, and are ended with the daemon."""
    ports = [free_port() for _ in range(3)]
    looking, closed = threading.Event(), threading.Event()
    live = TcpListener.live

    def slowly(listener: TcpListener) -> int:
        """The first who looks at those that were closed before gives another the time to close one meanwhile."""
        if threading.current_thread().name == "test-close" and not looking.is_set():
            looking.set()
            closed.wait(0.3)
        return live.fget(listener)

    with Echo() as echo:
        services = ", ".join(f'"{port}": "{LOCALHOST}:{echo.port}"' for port in ports)
        with tunnel(f"{{{services}}}", str(ports)) as (bridge, agent), ExitStack() as stack:
            for sock in [stack.enter_context(dial(port)) for port in ports]:
                sock.sendall(b"hello")
                assert read_exactly(sock, 5) == b"hello"
            first, second, third = (
                bridge.tunnels._sessions.get("home").ports.pop(Service("tcp", port)).close
                for port in ports
            )
            first()
            with monkeypatch.context() as patched:
                patched.setattr(TcpListener, "live", property(slowly))

                def close() -> None:
                    second()

                task = Task(close)
                assert looking.wait(SECONDS)
                third()
                closed.set()
                task.result()
            assert bridge.tunnels.live == len(bridge.tunnels._ports._retired) == 3
        wait_until(lambda: not bridge.tunnels.live)


def test_udp_clients_have_a_session_each() -> None:
    port = free_port()
    with (
        UdpEcho() as echo,
        tunnel(f'{{"{port}/udp": "127.0.0.1:{echo.address.port}"}}', f"[{port}/udp]") as (
            bridge,
            agent,
        ),
    ):
        with UdpPort() as one, UdpPort() as other:
            for client in (one, other):
                client.send(b"hello", Address(LOCALHOST, port))
            for client in (one, other):
                client.expect(b"hello")
            assert len(set(echo.sources)) == 2 and bridge.agents()[0]["streams"] == 2


# -- an exit


def test_socks_through_an_exit() -> None:
    with Echo() as echo, tunnel(leads_out=True, more=HOME) as (bridge, agent):
        with socks(bridge, (LOCALHOST, echo.port)) as sock:
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
        with socks(bridge, ("localhost", echo.port)) as sock:  # resolved by the agent
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"


def test_exits_reasons_reach_the_client() -> None:
    with refusing() as nobody, tunnel(leads_out=True, more=HOME) as (bridge, agent):
        for target, code in (((nobody.host, nobody.port), 5), (("no-such-name.invalid", 80), 4)):
            with pytest.raises(Refused) as caught:
                socks(bridge, target)
            assert caught.value.code == code


def test_socks_udp_through_an_exit_has_one_port_for_all_targets() -> None:
    with UdpEcho() as one, UdpEcho() as other, tunnel(leads_out=True, more=HOME) as (bridge, agent):
        with UdpClient(bridge.port) as client:
            for size in (0, 1, 1400, 65000):
                for target in (one, other):
                    client.to(target.address, bytes(size))
                    assert client.receive() == (bytes(size), target.address)
        assert set(one.sources) == set(other.sources) and len(set(one.sources)) == 1
        wait_until(lambda: not bridge.agents()[0]["streams"])


def test_agent_that_is_no_exit_dials_nothing_else() -> None:
    port = free_port()
    with (
        Echo() as echo,
        tunnel(f'{{"{port}": "127.0.0.1:9"}}', f"[{port}]", more=HOME) as (bridge, agent),
    ):
        with pytest.raises(Refused) as caught:
            socks(bridge, (LOCALHOST, echo.port))
        assert caught.value.code == 2 and not echo.clients
        # nor when the bridge asks all the same
        bridge.tunnels._sessions.get("home").leads_out = True
        with pytest.raises(Refused) as caught:
            socks(bridge, (LOCALHOST, echo.port))
        assert caught.value.code == 2 and not echo.clients


@pytest.mark.parametrize(
    "agents",
    [
        "",
        "destinations: {deny: [127.0.0.0/8]}",
        "rules: [{listener: tunnel-agent, network: tcp, via: block}]",
    ],
)
def test_exit_dials_what_the_agents_own_rules_permit(agents: str) -> None:
    """Nothing on its loopback, unless its file says so."""
    with Echo() as echo, tunnel(leads_out=True, more=HOME, agents=agents) as (bridge, agent):
        with pytest.raises(Refused) as caught:
            socks(bridge, (LOCALHOST, echo.port))
        assert caught.value.code == 2 and not echo.clients
        assert agent.count("tunnel_refused", "not allowed by the rules") == 1


def test_what_becomes_of_an_exits_flow_is_explained() -> None:
    """By the name that its records and the rules have for it."""
    rules = "destinations: {allow: [127.0.0.0/8]}\nrules: [{listener: tunnel-agent, port: 25, via: block}]"
    with tunnel(leads_out=True, more=HOME, agents=rules) as (bridge, agent):
        for port, way in ((25, "block"), (80, "direct")):
            told = agent.daemon.explain(f"203.0.113.9 -> 127.0.0.1:{port} on tunnel-agent")
            assert told[0] == f"flow: tcp 203.0.113.9 -> 127.0.0.1:{port} on tunnel-agent"
            assert told[2] == f"upstream: {way}"
        assert agent.daemon.explain("-> 127.0.0.1:80")[0].endswith(
            " on tunnel-agent"
        )  # it has no other
        with pytest.raises(FlowError, match="no listener 'tunnel-agent'"):
            bridge.daemon.explain("-> 127.0.0.1:80 on tunnel-agent")


def test_agent_that_is_no_exit_explains_so() -> None:
    port = free_port()
    with tunnel(f'{{"{port}": "127.0.0.1:9"}}', f"[{port}]") as (bridge, agent):
        assert agent.daemon.explain("-> 127.0.0.1:80 on tunnel-agent")[1:] == [
            "refused: the agent is no exit, and leads to its services alone"
        ]


def test_rule_of_the_bridge_leads_into_the_agents_network() -> None:
    more = "rules: [{ip: [127.9.0.0/16], via: 'tunnel://home'}]\ndefault: block"
    with Echo("127.9.9.9") as echo, tunnel(leads_out=True, more=more) as (bridge, agent):
        with socks(bridge, ("127.9.9.9", echo.port)) as sock:
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
        with pytest.raises(Refused):
            socks(bridge, (LOCALHOST, echo.port))


def test_no_agent_is_refused_at_once() -> None:
    with side(bridge_text(more=HOME)) as bridge:
        with pytest.raises(Refused) as caught:
            socks(bridge, (LOCALHOST, 9))
        assert caught.value.code == 4


def test_tunnel_is_the_first_hop_of_a_chain() -> None:
    """The next proxy is one that only the agent reaches."""
    with Echo() as echo, running() as inner:
        more = f"upstreams: {{far: ['tunnel://home', 'socks5://127.0.0.1:{inner.port}']}}\ndefault: far"
        with (
            tunnel(leads_out=True, more=more) as (bridge, agent),
            socks(bridge, (LOCALHOST, echo.port)) as sock,
        ):
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
            assert len(inner.log.records) == 0 and agent.tunnels.live == 1


def test_group_goes_on_where_the_agent_is_not_there() -> None:
    more = "upstreams: {any: {members: ['tunnel://home', direct], balance: failover}}\ndefault: any"
    with (
        Echo() as echo,
        side(bridge_text(more=more)) as bridge,
        socks(bridge, (LOCALHOST, echo.port)) as sock,
    ):
        sock.sendall(b"hello")
        assert read_exactly(sock, 5) == b"hello"


# -- reload


def test_reload_of_the_agent_changes_services_and_leaves_the_others() -> None:
    first, second = free_port(), free_port()
    with (
        Echo() as echo,
        tunnel(f'{{"{first}": "127.0.0.1:{echo.port}"}}', f"[{first}, {second}]") as (
            bridge,
            agent,
        ),
    ):
        since = bridge.agents()[0]["since"]
        with dial(first) as sock:
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
            agent.reload(
                agent_text(
                    bridge.tunnel_port,
                    f'{{"{first}": "127.0.0.1:{echo.port}", "{second}": "127.0.0.1:{echo.port}"}}',
                )
            )
            bridge.wait_for_agent(2)
            with dial(second) as other:
                other.sendall(b"hello")
                assert read_exactly(other, 5) == b"hello"
            agent.reload(agent_text(bridge.tunnel_port, f'{{"{second}": "127.0.0.1:{echo.port}"}}'))
            wait_until(lambda: len(bridge.agents()[0]["ports"]) == 1)
            with pytest.raises(ConnectionRefusedError):
                dial(first)
            sock.sendall(b"still")
            assert read_exactly(sock, 5) == b"still"
        assert bridge.agents()[0]["since"] == since


def test_reload_of_times_leaves_the_agents_connection() -> None:
    """What is dialled from then on has them; only another bridge, identity, trust or way there is another connection."""
    port = free_port()
    with (
        Echo() as echo,
        tunnel(f'{{"{port}": "127.0.0.1:{echo.port}"}}', f"[{port}]") as (bridge, agent),
        running(SPS) as proxy,
    ):
        text = agent_text(bridge.tunnel_port, f'{{"{port}": "127.0.0.1:{echo.port}"}}')
        since, made, way = (
            bridge.agents()[0]["since"],
            agent.tunnels._agent,
            agent.tunnels._calling.hop.via,
        )
        agent.reload(
            text
            + "timeouts: {handshake: 7s, connect: 6s, tcp_idle: 1h, half_close: 4m, drain: 20s}"
        )
        assert agent.tunnels._agent is made and not made.stopped
        assert (
            agent.tunnels._calling.hop.seconds == 7.0 and agent.tunnels._calling.hop.via is not way
        )
        with dial(port) as sock:
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
        bridge.wait_for_agent(
            1, idle=pool.WAITING
        )  # one was dialled in the place of the one that was opened
        assert bridge.agents()[0]["since"] == since
        agent.reload(
            text.replace("agent: {", f"agent: {{upstream: 'socks5://127.0.0.1:{proxy.port}', ")
        )
        assert agent.tunnels._agent is not made and made.stopped
        wait_until(lambda: any(one["since"] > since and one["ports"] for one in bridge.agents()))


def test_reload_of_the_bridge_takes_a_port_back_and_leaves_what_runs() -> None:
    first, second = free_port(), free_port()
    services = ", ".join(f'"{port}": "127.0.0.1:{{echo}}"' for port in (first, second))
    with (
        Echo() as echo,
        tunnel(f"{{{services.format(echo=echo.port)}}}", f"[{first}, {second}]") as (bridge, agent),
    ):
        since = bridge.wait_for_agent(2)["since"]
        with dial(first) as sock, dial(second) as other:
            for one in (sock, other):
                one.sendall(b"hello")
                assert read_exactly(one, 5) == b"hello"
            bridge.reload(bridge_text(f"[{second}]"))
            with pytest.raises(ConnectionRefusedError):
                dial(first)
            for one in (sock, other, dial(second)):
                one.sendall(b"still")
                assert read_exactly(one, 5) == b"still"
            one.close()
        assert bridge.agents()[0]["since"] == since
        wait_until(
            lambda: (
                agent.tunnels.describe()["agent"]["ports"]
                == {f"{first}/tcp": "not allowed by the bridge", f"{second}/tcp": "served"}
            )
        )


def test_reload_that_ends_the_tunnel_on_either_side() -> None:
    port = free_port()
    with (
        Echo() as echo,
        tunnel(f'{{"{port}": "127.0.0.1:{echo.port}"}}', f"[{port}]") as (bridge, agent),
    ):
        with dial(port) as sock:
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
            agent.reload("listeners: []")
            wait_until(lambda: not bridge.agents())
            with pytest.raises(ConnectionRefusedError):
                dial(port)
            sock.sendall(b"still")
            assert read_exactly(sock, 5) == b"still"
        agent.reload(agent_text(bridge.tunnel_port, f'{{"{port}": "127.0.0.1:{echo.port}"}}'))
        bridge.wait_for_agent(1)
        bridge.reload(SPS)
        wait_until(lambda: not bridge.agents())


def test_drain_lets_streams_come_to_their_end() -> None:
    port = free_port()
    with (
        Echo() as echo,
        tunnel(f'{{"{port}": "127.0.0.1:{echo.port}"}}', f"[{port}]") as (bridge, agent),
    ):
        with dial(port) as sock:
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
            bridge.daemon.stop_accepting()
            agent.daemon.stop_accepting()
            sock.sendall(b"still")
            assert read_exactly(sock, 5) == b"still"
            assert bridge.daemon.live == agent.daemon.live == 1
        wait_until(lambda: not bridge.daemon.live and not agent.daemon.live)
