"""Work connections within TLS that carry one stream after the other, and older peers.

One side is a daemon, the other is played by hand.  A peer of version 1.0 of the protocol page
knows neither the flag of REGISTER nor OPEN_REUSABLE: its bytes stand here literally.
"""

from __future__ import annotations

import os
import socket
import ssl
from contextlib import contextmanager
from typing import Iterator

import pytest

from netproxy.errors import StreamError
from netproxy.net import tls
from netproxy.net.stream import Stream, complete
from netproxy.protocol import tunnel
from netproxy.protocol.tunnel import BridgePort, Hello, OpenRequest, Welcome
from netproxy.tunnel import pool
from tests.support.certificates import Certificates, certificates
from tests.support.relays import LOCALHOST, SECONDS
from tests.support.sockets import Task, nothing_comes, read_exactly, read_to_end, wait_until
from tests.support.tunnels import (
    TOKEN,
    Echo,
    TunnelDaemon,
    free_port,
    tls_agent_text,
    tls_bridge_text,
    tunnel_daemon,
)

SESSION = bytes(range(16))
OPEN, OPEN_REUSABLE = 0x4E5407, 0x4E540A
ACCEPT = b"\x80\x4e\x54\x08\0"
END = bytes(4)
OLD, REUSES = b"\0", b"\2"
"""Flags of REGISTER: of an old agent, and of an agent that reuses connections; no exits."""


def chunk(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


@pytest.fixture(scope="module")
def files() -> Certificates:
    return certificates()


def read(stream: Stream, size: int) -> bytes:
    return complete(stream.read_exactly(size))


def read_message(stream: Stream, kind: int) -> bytes:
    """Return the value of the next message, which must be of this kind; pings are skipped."""
    while (message := complete(tunnel.read_message(stream))).kind == tunnel.PING:
        pass
    assert message.kind == kind
    return message.value


def assert_ended(stream: Stream) -> None:
    """Wait for the end of the connection."""
    assert complete(stream.read_some(1)) == b""


# -- an agent played by hand


class Agent:
    """A connected agent, whose work connections are `works`."""

    def __init__(self, bridge: TunnelDaemon, files: Certificates, flags: bytes, port: int) -> None:
        self._port, self._files = bridge.tunnel_port, files
        self._bridge = bridge
        self.streams: list[Stream] = []
        self.session = b""
        self.control = self._connect(tunnel.CONTROL)
        register = flags + b"\6" + port.to_bytes(2, "big")
        self.control.write(b"\x80\x4e\x54\1" + bytes((len(register),)) + register)
        outcomes = tunnel.parse_registered(read_message(self.control, tunnel.REGISTERED))
        assert outcomes == [(BridgePort("tcp", port), tunnel.SERVED)]

    def _connect(self, kind: int) -> Stream:
        stream = Stream(socket.create_connection((LOCALHOST, self._port)), limited=4 * SECONDS)
        self.streams.append(stream)
        tls.connect(stream, self._files.client_context(), "localhost")
        hello = Hello(kind, "home", os.urandom(32), self.session)
        stream.write(tunnel.encode_hello(hello))
        nonce = complete(tunnel.read_challenge(stream))
        assert isinstance(nonce, bytes)
        stream.write(tunnel.agent_proof(TOKEN.encode(), hello, nonce))
        welcome = complete(tunnel.read_welcome(stream))
        assert isinstance(welcome, Welcome)
        self.session = welcome.session
        return stream

    def work(self) -> Stream:
        """Dial a work connection."""
        before = self.idle
        stream = self._connect(tunnel.WORK)
        wait_until(lambda: self.idle == before + 1)
        return stream

    @property
    def idle(self) -> int:
        return int(self._bridge.agents()[0]["idle"])


@contextmanager
def played_agent(files: Certificates, flags: bytes) -> Iterator[tuple[TunnelDaemon, Agent, int]]:
    """Run a bridge with an agent; yield both, and the public port."""
    port = free_port()
    with tunnel_daemon(tls_bridge_text(files, f"[{port}]")) as bridge:
        agent = Agent(bridge, files, flags, port)
        try:
            yield bridge, agent, port
        finally:
            for stream in agent.streams:
                stream.close()


def dial(port: int) -> socket.socket:
    return socket.create_connection((LOCALHOST, port), 2 * SECONDS)


def read_open(work: Stream, kind: int, port: int) -> OpenRequest:
    request = tunnel.parse_open(read_message(work, kind))
    assert request.target == BridgePort("tcp", port)
    return request


def test_bridge_serves_an_old_agent_with_one_stream_a_connection(files: Certificates) -> None:
    with played_agent(files, OLD) as (bridge, agent, port):
        for _ in range(2):
            work = agent.work()
            with dial(port) as client:
                read_open(work, OPEN, port)
                work.write(ACCEPT + b"banner")
                assert read_exactly(client, 6) == b"banner"
                client.sendall(b"hello")
                assert read(work, 5) == b"hello"
                client.shutdown(socket.SHUT_WR)
                assert_ended(work)
                work.write(b"answer")
                work.shutdown_write()
                assert read_to_end(client) == b"answer"
            wait_until(lambda: not bridge.agents()[0]["streams"])
            assert not agent.idle


def test_bridge_opens_one_stream_after_the_other_on_a_connection(files: Certificates) -> None:
    """Each direction ends alone; the end of both makes the connection idle."""
    with played_agent(files, REUSES) as (bridge, agent, port):
        work = agent.work()
        for turn in range(3):
            with dial(port) as client:
                read_open(work, OPEN_REUSABLE, port)
                # A service that speaks first.
                work.write(ACCEPT + chunk(b"banner"))
                assert read_exactly(client, 6) == b"banner"
                client.sendall(b"hello")
                client.shutdown(socket.SHUT_WR)
                assert read(work, 13) == chunk(b"hello") + END
                work.write(chunk(b"late ") + chunk(b"answer"))
                assert read_exactly(client, 11) == b"late answer"
                assert (agent.idle, bridge.agents()[0]["streams"]) == (0, 1)
                work.write(END)
                assert read_to_end(client) == b""
            wait_until(lambda: agent.idle == 1)
            assert bridge.agents()[0]["opened"] == turn + 1
        assert bridge.agents()[0]["sent"] > 15


def test_bridge_counts_traffic_of_a_reused_connection_once(files: Certificates) -> None:
    with played_agent(files, REUSES) as (bridge, agent, port):
        work = agent.work()
        for _ in range(4):
            with dial(port) as client:
                read_open(work, OPEN_REUSABLE, port)
                work.write(ACCEPT)
                client.sendall(bytes(50_000))
                client.shutdown(socket.SHUT_WR)
                assert read(work, 4) != END
                left = 50_000 + 4
                while left:
                    left -= len(complete(work.read_some(left)))
                work.write(END)
                read_to_end(client)
            wait_until(lambda: agent.idle == 1)
        assert 200_000 < int(str(bridge.agents()[0]["sent"])) < 300_000


@pytest.mark.parametrize("behind", ["in the record of the end", "in a record of its own"])
def test_bridge_does_not_reuse_a_connection_with_bytes_behind_the_end(
    files: Certificates, behind: str
) -> None:
    with played_agent(files, REUSES) as (bridge, agent, port):
        work = agent.work()
        with dial(port) as client:
            read_open(work, OPEN_REUSABLE, port)
            if behind == "in the record of the end":
                work.write(ACCEPT + END + b"more")
            else:
                work.write(ACCEPT + END)
                work.write(b"more")
            assert read_to_end(client) == b""
            client.shutdown(socket.SHUT_WR)
            assert read(work, 4) == END
        wait_until(lambda: not bridge.agents()[0]["streams"] and not agent.idle)


@pytest.mark.parametrize("fault", ["close", "reset", "client reset", "bad length"])
def test_bridge_does_not_reuse_a_connection_after_a_fault(files: Certificates, fault: str) -> None:
    with played_agent(files, REUSES) as (bridge, agent, port):
        work = agent.work()
        with dial(port) as client:
            read_open(work, OPEN_REUSABLE, port)
            work.write(ACCEPT + chunk(b"part"))
            assert read_exactly(client, 4) == b"part"
            if fault == "close":
                work.close()
            elif fault == "reset":
                work.reset()
            elif fault == "bad length":
                work.write(b"\xff\xff\xff\xfe")
            else:
                linger = b"\1\0\0\0\0\0\0\0"
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                client.close()
            if fault != "client reset":
                with pytest.raises(ConnectionResetError):
                    read_to_end(client)
        wait_until(lambda: not bridge.agents()[0]["streams"])
        assert not agent.idle
        other = agent.work()
        with dial(port) as client:
            read_open(other, OPEN_REUSABLE, port)
            other.write(ACCEPT + END)
            assert read_to_end(client) == b""


def test_refused_stream_leaves_the_connection_idle(files: Certificates) -> None:
    with played_agent(files, REUSES) as (bridge, agent, port):
        work = agent.work()
        for _ in range(3):
            with dial(port) as client:
                read_open(work, OPEN_REUSABLE, port)
                work.write(b"\x80\x4e\x54\x09\1\6")
                with pytest.raises(ConnectionResetError):
                    read_to_end(client)
            wait_until(lambda: agent.idle == 1)


def test_reload_of_the_bridge_reuses_no_earlier_connection(files: Certificates) -> None:
    """Hazard 118: the certificate of the agent is verified anew."""
    with played_agent(files, REUSES) as (bridge, agent, port):
        work = agent.work()
        bridge.reload(tls_bridge_text(files, f"[{port}]"))
        with dial(port) as client:
            read_open(work, OPEN_REUSABLE, port)
            work.write(ACCEPT + END)
            client.shutdown(socket.SHUT_WR)
            assert read(work, 4) == END and read_to_end(client) == b""
            assert_ended(work)
        assert not agent.idle


def test_waiting_client_gets_a_connection_that_becomes_idle(files: Certificates) -> None:
    with played_agent(files, REUSES) as (bridge, agent, port):
        work = agent.work()
        with dial(port) as first:
            read_open(work, OPEN_REUSABLE, port)
            work.write(ACCEPT)
            with dial(port) as second:
                read_message(agent.control, tunnel.WANT)
                work.write(END)
                first.shutdown(socket.SHUT_WR)
                assert read(work, 4) == END
                read_open(work, OPEN_REUSABLE, port)
                work.write(ACCEPT + chunk(b"second") + END)
                assert read_to_end(second) == b"second"


# -- a bridge played by hand


class Bridge:
    """A bridge of one agent, with the connections that the agent has dialled."""

    def __init__(self, files: Certificates) -> None:
        self._listening = socket.create_server((LOCALHOST, 0))
        self._listening.settimeout(4 * SECONDS)
        self.port = self._listening.getsockname()[1]
        self._context: ssl.SSLContext = tls.server_context(
            files.path("server.pem"), files.path("server.key")
        )
        self.streams: list[Stream] = []

    def accept(self, kind: int) -> Stream:
        """Welcome the next connection, which must be of this kind."""
        sock, _ = self._listening.accept()
        stream = Stream(sock, limited=4 * SECONDS)
        self.streams.append(stream)
        tls.accept(stream, self._context)
        hello, nonce = complete(tunnel.read_hello(stream)), os.urandom(32)
        assert hello.kind == kind
        stream.write(tunnel.encode_challenge(nonce))
        assert read(stream, 32) == tunnel.agent_proof(TOKEN.encode(), hello, nonce)
        proof = tunnel.bridge_proof(TOKEN.encode(), hello, nonce, SESSION)
        stream.write(tunnel.encode_welcome(Welcome(proof, SESSION)))
        return stream

    def accept_agent(self) -> tuple[Stream, list[Stream]]:
        """Welcome the control connection and the first work connections; read REGISTER."""
        control = self.accept(tunnel.CONTROL)
        # An old bridge looks at the lowest bit alone.
        assert read_message(control, tunnel.REGISTER)[:1] == REUSES
        return control, [self.accept(tunnel.WORK) for _ in range(pool.IDLE_FEWEST)]

    def close(self) -> None:
        for stream in self.streams:
            stream.close()
        self._listening.close()


@contextmanager
def played_bridge(files: Certificates, target: int) -> Iterator[tuple[TunnelDaemon, Bridge]]:
    """Run an agent whose service 8022 is the port `target`; yield it and its bridge."""
    bridge = Bridge(files)
    try:
        text = tls_agent_text(files, bridge.port, f'{{"8022": "{LOCALHOST}:{target}"}}')
        with tunnel_daemon(text) as agent:
            yield agent, bridge
    finally:
        bridge.close()


def open_bytes(kind: int) -> bytes:
    """Return the bytes that open a stream to the service."""
    value = b"\6\1\xcb\0\x71\x09\xc3\x50\0\x1f\x56"
    return b"\x80\x4e\x54" + bytes((kind & 0xFF, len(value))) + value


def test_agent_serves_an_old_bridge_with_one_stream_a_connection(files: Certificates) -> None:
    with Echo() as echo, played_bridge(files, echo.port) as (_, bridge):
        _, works = bridge.accept_agent()
        for work in works:
            work.write(open_bytes(OPEN))
            assert read(work, 5) == ACCEPT
            work.write(b"hello")
            assert read(work, 5) == b"hello"
            work.shutdown_write()
            assert_ended(work)
            # Another is dialled in place of each.
            bridge.accept(tunnel.WORK)


def test_agent_serves_one_stream_after_the_other_on_a_connection(files: Certificates) -> None:
    with Echo() as echo, played_bridge(files, echo.port) as (agent, bridge):
        _, works = bridge.accept_agent()
        work = works[0]
        for _ in range(3):
            work.write(open_bytes(OPEN_REUSABLE))
            assert read(work, 5) == ACCEPT
            work.write(chunk(b"hello"))
            assert read(work, 9) == chunk(b"hello")
            work.write(END)
            assert read(work, 4) == END
        wait_until(lambda: not agent.tunnels.live)
        assert echo.clients == 3
        # One was dialled when the first was opened; it is idle as well.
        bridge.accept(tunnel.WORK)
        assert agent.tunnels.describe()["agent"]["opened"] == 3


def test_request_that_comes_with_the_end_of_a_stream_is_served(files: Certificates) -> None:
    """One record holds both, and no descriptor tells of its second half."""
    with Echo() as echo, played_bridge(files, echo.port) as (_, bridge):
        _, works = bridge.accept_agent()
        work = works[0]
        work.write(open_bytes(OPEN_REUSABLE))
        assert read(work, 5) == ACCEPT
        for _ in range(20):
            work.write(chunk(b"hello") + END + open_bytes(OPEN_REUSABLE))
            assert read(work, 18) == chunk(b"hello") + END + ACCEPT


def test_agent_keeps_a_half_closed_stream(files: Certificates) -> None:
    with socket.create_server((LOCALHOST, 0)) as service:
        service.settimeout(2 * SECONDS)
        with played_bridge(files, service.getsockname()[1]) as (agent, bridge):
            _, works = bridge.accept_agent()
            work = works[0]
            work.write(open_bytes(OPEN_REUSABLE))
            server, _ = service.accept()
            with server:
                assert read(work, 5) == ACCEPT
                server.sendall(b"all that I have")
                server.shutdown(socket.SHUT_WR)
                assert read(work, 23) == chunk(b"all that I have") + END
                assert agent.tunnels.live == 1
                work.write(chunk(b"and") + chunk(b" more"))
                assert read_exactly(server, 8) == b"and more"
                assert nothing_comes(server)
                work.write(END)
                assert read_to_end(server) == b""
            wait_until(lambda: not agent.tunnels.live)
            work.write(open_bytes(OPEN_REUSABLE))
            service.accept()[0].close()
            assert read(work, 5) == ACCEPT


@pytest.mark.parametrize("fault", ["service reset", "bridge reset", "cut", "bad length"])
def test_agent_closes_a_connection_after_a_fault(files: Certificates, fault: str) -> None:
    with socket.create_server((LOCALHOST, 0)) as service:
        service.settimeout(2 * SECONDS)
        with played_bridge(files, service.getsockname()[1]) as (agent, bridge):
            _, works = bridge.accept_agent()
            work = works[0]
            work.write(open_bytes(OPEN_REUSABLE))
            server, _ = service.accept()
            with server:
                server.settimeout(2 * SECONDS)
                assert read(work, 5) == ACCEPT
                if fault == "service reset":
                    linger = b"\1\0\0\0\0\0\0\0"
                    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    server.close()
                elif fault == "bridge reset":
                    work.reset()
                elif fault == "cut":
                    work.write(chunk(b"part")[:6])
                    work.shutdown_write()
                else:
                    work.write(b"\0\x20\0\0")
                if fault != "service reset":
                    with pytest.raises(ConnectionResetError):
                        read_to_end(server)
                if fault != "bridge reset":
                    # The reset, or the end of a connection that has sent no end of the stream.
                    try:
                        assert_ended(work)
                    except StreamError:
                        pass
            wait_until(lambda: not agent.tunnels.live)


def test_refusal_of_the_agent_leaves_the_connection_idle(files: Certificates) -> None:
    with played_bridge(files, free_port()) as (_, bridge):
        _, works = bridge.accept_agent()
        for _ in range(3):
            works[0].write(open_bytes(OPEN_REUSABLE))
            assert read(works[0], 6) == b"\x80\x4e\x54\x09\1\6"


def test_agent_takes_back_a_limited_number_of_connections(
    files: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "IDLE_MOST", pool.IDLE_FEWEST)
    with Echo() as echo, played_bridge(files, echo.port) as (agent, bridge):
        _, works = bridge.accept_agent()
        works[0].write(open_bytes(OPEN_REUSABLE))
        assert read(works[0], 5) == ACCEPT
        bridge.accept(tunnel.WORK)
        wait_until(lambda: agent.tunnels.describe()["agent"]["idle"] == pool.IDLE_FEWEST)
        works[0].write(END)
        assert read(works[0], 4) == END
        assert_ended(works[0])


# -- both sides


def send_all(client: socket.socket, data: bytes) -> None:
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)


def test_streams_at_once_and_one_by_one_are_right(files: Certificates) -> None:
    """Every stream has its own bytes, whichever connection carries it."""
    port = free_port()
    with Echo() as echo, tunnel_daemon(tls_bridge_text(files, f"[{port}]")) as bridge:
        services = f'{{"{port}": "{LOCALHOST}:{echo.port}"}}'
        with tunnel_daemon(tls_agent_text(files, bridge.tunnel_port, services)) as agent:
            bridge.wait_for_agent(1)

            def work(number: int) -> None:
                for turn in range(12):
                    data = bytes((number, turn)) * (1 + 997 * turn * turn)
                    with dial(port) as client:
                        sender = Task(send_all, client, data)
                        assert read_to_end(client) == data
                        sender.result()

            tasks = [Task(work, number) for number in range(8)]
            for task in tasks:
                task.result()
            wait_until(lambda: not bridge.agents()[0]["streams"] and not agent.tunnels.live)
            state = bridge.agents()[0]
            assert state["opened"] == 96
            assert agent.tunnels.describe()["agent"]["opened"] == 96


@contextmanager
def unread(port: int, bridge: TunnelDaemon) -> Iterator[None]:
    """Hold a client that sends all it can and reads nothing: all its buffers are full."""
    bridge.wait_for_agent(1)
    with dial(port) as client:
        client.settimeout(0.3)
        try:
            while True:
                client.send(bytes(1 << 16))
        except TimeoutError:
            pass
        yield


def test_long_stream_arrives_and_its_connection_is_closed(files: Certificates) -> None:
    port, data = free_port(), os.urandom(3 << 20)
    with Echo() as echo, tunnel_daemon(tls_bridge_text(files, f"[{port}]")) as bridge:
        services = f'{{"{port}": "{LOCALHOST}:{echo.port}"}}'
        with tunnel_daemon(tls_agent_text(files, bridge.tunnel_port, services)) as agent:
            bridge.wait_for_agent(1, idle=pool.IDLE_FEWEST)
            for turn in range(2):
                with dial(port) as client:
                    sender = Task(send_all, client, data)
                    assert read_to_end(client) == data
                    sender.result()
                wait_until(lambda: not bridge.agents()[0]["streams"] and not agent.tunnels.live)
                # The one that was dialled when it was opened has taken its place.
                wait_until(lambda: bridge.agents()[0]["idle"] == pool.IDLE_FEWEST)
                records = [daemon.log.records[turn] for daemon in (bridge, agent)]
                assert {record.ended for record in records} == {"closed"}
                assert {(record.sent, record.received) for record in records} == {
                    (len(data), len(data))
                }


def test_unread_stream_stops_no_other(files: Certificates) -> None:
    port = free_port()
    with Echo() as echo, tunnel_daemon(tls_bridge_text(files, f"[{port}]")) as bridge:
        services = f'{{"{port}": "{LOCALHOST}:{echo.port}"}}'
        with (
            tunnel_daemon(tls_agent_text(files, bridge.tunnel_port, services)),
            unread(port, bridge),
        ):
            for _ in range(10):
                with dial(port) as client:
                    client.sendall(b"hello")
                    client.shutdown(socket.SHUT_WR)
                    assert read_to_end(client) == b"hello"
