"""A bridge and an agent whose datagrams go by UDP, each a real daemon, and older or other peers."""

from __future__ import annotations

import socket
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol.uot import MAGIC
from netproxy.tunnel.path import bridge, sealing
from tests.support.certificates import Certificates, certificates
from tests.support.relays import LOCALHOST, SECONDS
from tests.support.sockets import read_exactly, wait_until
from tests.support.tunnels import (
    TunnelDaemon,
    UdpEcho,
    free_port,
    tls_agent_text,
    tls_bridge_text,
    tunnel_daemon,
)

pytestmark = pytest.mark.skipif(
    sealing.load_cipher() is None, reason="python3-cryptography is not installed"
)

TO_LOOPBACK = "destinations: {allow: [127.0.0.0/8]}"


@pytest.fixture(scope="module")
def files() -> Certificates:
    return certificates()


def bridge_text(files: Certificates, at: int, port: int, datagrams: str = "true") -> str:
    """Return the configuration of a bridge: where it listens for agents, and its public port."""
    text = tls_bridge_text(files, f"[{port}/udp]")
    text = text.replace(f"{LOCALHOST}:0', tls", f"{LOCALHOST}:{at}', tls")
    text = text.replace("agents:", f"datagrams: {datagrams}, agents:")
    return f"{text}\n{TO_LOOPBACK}\nrules: [{{port: [1-65535], via: tunnel://home}}]"


def agent_text(files: Certificates, at: int, port: int, echo: int, by_udp: bool = True) -> str:
    text = tls_agent_text(files, at, f'{{"{port}/udp": "{LOCALHOST}:{echo}"}}')
    text = text.replace("exit: false", f"exit: true, datagrams: {str(by_udp).lower()}")
    return f"{text}\n{TO_LOOPBACK}"


class Pair:
    """A tunnel to an echo server, and a client of its public port."""

    def __init__(self, stack: ExitStack, files: Certificates, **more: Any) -> None:
        self.files = files
        self.at, self.port = free_port(), free_port()
        self.echo = stack.enter_context(UdpEcho())
        datagrams = more.pop("datagrams", "true")
        self.bridge: TunnelDaemon = stack.enter_context(
            tunnel_daemon(bridge_text(files, self.at, self.port, datagrams))
        )
        text = agent_text(files, self.at, self.port, self.echo.address.port, **more)
        self.agent: TunnelDaemon = stack.enter_context(tunnel_daemon(text))
        self.bridge.wait_for_agent(1)
        self.client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        stack.callback(self.client.close)
        self.client.settimeout(SECONDS)
        self.client.connect((LOCALHOST, self.port))

    def path(self) -> dict[str, Any] | None:
        """Return the bridge's side of the path as netproxyctl shows it."""
        path: dict[str, Any] | None = self.bridge.agents()[0]["path"]
        return path

    def is_up(self) -> bool:
        """Return whether both sides have the path up."""
        own = self.agent.tunnels.describe()["agent"].get("path")
        path = self.path()
        return path is not None and path["up"] and own is not None and own["up"]

    def is_answered(self, size: int = 5) -> bool:
        """Send a datagram; return whether it comes back in time."""
        data = bytes(size)
        try:
            self.client.send(data)
            return self.client.recv(65536) == data
        except TimeoutError:
            return False

    def check_soon(self, *sizes: int) -> None:
        """Send datagrams of these sizes again and again, until each has come back."""
        self.client.settimeout(0.2)
        for size in sizes:
            wait_until(lambda size=size: self.is_answered(size))
        with suppress(TimeoutError):
            # What was answered late.
            while True:
                self.client.recv(65536)
        self.client.settimeout(SECONDS)

    def check(self, *sizes: int) -> None:
        """Send datagrams of these sizes to the service, and receive them back."""
        for size in sizes:
            data = bytes(range(256)) * (size // 256) + bytes(size % 256)
            self.client.send(data)
            assert self.client.recv(65536) == data


@contextmanager
def pair(files: Certificates, **more: Any) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack, files, **more)


def test_datagrams_go_by_the_path(files: Certificates) -> None:
    with pair(files) as both:
        wait_until(both.is_up)
        before = both.path()
        assert before is not None
        both.check(0, 1, 1000, 60000)
        after = both.path()
        assert after is not None and after["flows"] == 1
        assert after["received"] - before["received"] > 1000
        assert after["too_long"] - before["too_long"] == 1
        assert both.bridge.count("tunnel_paths", "up") == 1


def uot(both: Pair) -> socket.socket:
    """Return a stream of the bridge's proxy that carries datagrams to all targets (UoT)."""
    sock = socket.create_connection((LOCALHOST, both.bridge.port), SECONDS)
    name = MAGIC.encode()
    sock.sendall(b"\5\1\0\5\1\0\3" + bytes((len(name),)) + name + b"\0\0")
    assert read_exactly(sock, 12)[3] == 0
    sock.sendall(b"\0\1" + bytes(6))
    return sock


def frame(target: Address, payload: bytes) -> bytes:
    """Return a datagram of UoT to a target, or from it."""
    place = socket.inet_aton(target.host) + target.port.to_bytes(2, "big")
    return b"\0" + place + len(payload).to_bytes(2, "big") + payload


def test_exit_sends_to_all_targets_from_one_port(files: Certificates) -> None:
    with pair(files) as both, UdpEcho() as other, uot(both) as sock:
        wait_until(both.is_up)
        for target in (both.echo, other):
            sent = frame(target.address, b"hello")
            sock.sendall(sent)
            assert read_exactly(sock, len(sent)) == sent
        assert both.echo.sources == other.sources
        path = both.path()
        assert path is not None and path["flows"] == 1


def test_replies_wait_for_a_client_whose_stream_is_full(files: Certificates) -> None:
    """The path's thread must not wait: the session's own thread sends what is left."""
    with pair(files) as both, uot(both) as sock:
        wait_until(both.is_up)
        sent = frame(both.echo.address, bytes(1100))
        sock.sendall(sent)
        assert read_exactly(sock, len(sent)) == sent
        (state,) = both.bridge.daemon._plan.relays.states.values()
        (client,) = state.table.clients.values()
        draining = client.draining
        assert draining is not None
        while not draining.waits:
            sock.sendall(sent * 20)
        received = b""
        while draining.waits:
            received += sock.recv(1 << 16)
        whole = len(received) // len(sent) * len(sent)
        assert received[:whole] == sent * (whole // len(sent))


def test_flow_ends_with_its_work_connection(files: Certificates) -> None:
    with pair(files) as both:
        wait_until(both.is_up)
        both.check(10)
        for session in both.bridge.daemon._runtime.flows.live():
            session.kill()
        wait_until(lambda: both.path()["flows"] == 0)
        wait_until(lambda: both.agent.tunnels.describe()["agent"]["path"]["flows"] == 0)
        # The next datagram begins another one.
        both.check(10)
        assert len(set(both.echo.sources)) == 2


@pytest.mark.parametrize("side", ["bridge", "agent"])
def test_flow_whose_connection_one_side_has_lost_begins_anew(
    files: Certificates, side: str
) -> None:
    """Neither a FIN nor a reset has come to the other side, as when a NAT has forgotten it."""
    with pair(files) as both:
        wait_until(both.is_up)
        both.check(10)
        if side == "bridge":
            (path,) = both.bridge.tunnels.paths._offered
        else:
            (path,) = both.agent.tunnels.agent._agent._session.pool.paths._paths.values()
        flow = path.flows.get(1)
        flow.close()
        # The side that has lost it is told of by what the other side sends.
        if side == "bridge":
            both.echo.socket.sendto(b"late", both.echo.sources[0])
        else:
            both.client.send(b"late")
        both.client.settimeout(0.1)
        wait_until(both.is_answered)
        assert len(set(both.echo.sources)) == 2


def test_reload_ends_and_begins_the_path(files: Certificates) -> None:
    """The flow that runs goes by TCP meanwhile; a new path takes new flows."""
    with pair(files) as both:
        wait_until(both.is_up)
        both.check(10)
        text = bridge_text(files, both.at, both.port)
        without = text.replace("datagrams: true", "datagrams: false")
        both.bridge.reload(without)
        wait_until(lambda: both.path() is None)
        wait_until(lambda: both.agent.tunnels.describe()["agent"]["path"] is None)
        both.check(10, 1000)
        both.bridge.reload(text)
        wait_until(both.is_up)
        both.check(10, 1000)


@pytest.mark.parametrize("side", ["bridge", "agent"])
def test_side_without_datagrams_works_by_tcp(files: Certificates, side: str) -> None:
    """So does an agent or a bridge of before."""
    more = {"by_udp": False} if side == "agent" else {"datagrams": "false"}
    with pair(files, **more) as both:
        both.check(0, 1000, 60000)
        assert both.path() is None


@pytest.mark.parametrize("side", ["bridge", "agent"])
def test_side_without_the_package_works_by_tcp(
    files: Certificates, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(
        [None, sealing.load_cipher()] if side == "bridge" else [sealing.load_cipher(), None]
    )
    monkeypatch.setattr(sealing, "load_cipher", lambda: next(calls))
    with pair(files) as both:
        both.check(0, 1000, 60000)
        assert both.path() is None
        daemon = both.bridge if side == "bridge" else both.agent
        assert any("has no ChaCha20-Poly1305" in line for line in daemon.log.lines)


def test_agent_whose_datagrams_come_from_a_network_not_allowed_has_no_path(
    files: Certificates,
) -> None:
    """Its connections have another address, as with a proxy between the two."""
    with pair(files) as both:
        wait_until(both.is_up)
        text = bridge_text(files, both.at, both.port)
        both.bridge.reload(text.replace("agents:", "clients: [127.0.0.2], agents:"))
        # A path in use goes on, as connections do.
        both.check(10, 1000)
        assert both.is_up() and not both.bridge.drops()
        (path,) = both.bridge.tunnels.paths._offered
        path.remote = None
        wait_until(lambda: both.bridge.drops().get("client not allowed"))
        wait_until(lambda: not both.agent.tunnels.describe()["agent"]["path"]["up"])
        both.check(10, 1000)
        both.bridge.reload(text)
        wait_until(both.is_up)
        both.check(10, 1000)


def test_keys_are_renewed(files: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "RENEWAL_SECONDS", 0.2)
    with pair(files) as both:
        wait_until(both.is_up)
        while both.bridge.count("tunnel_paths", "renewed") < 3:
            both.check(10, 1000)
        assert both.is_up() and not both.bridge.drops() and not both.agent.drops()
