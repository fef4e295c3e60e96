"""A client, a bridge and an agent, each a real daemon, whose datagrams go directly."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Iterator

import pytest

from netproxy.tunnel.direct import attempts, bridge
from netproxy.tunnel.path import sealing
from tests.support.certificates import Certificates, certificates
from tests.support.relays import LOCALHOST, SECONDS, UdpClient, UdpPort
from tests.support.sockets import wait_until
from tests.support.tunnels import (
    TOKEN,
    TunnelDaemon,
    UdpEcho,
    free_port,
    tls_agent_text,
    tunnel_daemon,
)

pytestmark = pytest.mark.skipif(
    sealing.load_cipher() is None, reason="python3-cryptography is not installed"
)


TO_LOOPBACK = "destinations: {allow: [127.0.0.0/8]}"


@pytest.fixture(scope="module")
def files() -> Certificates:
    return certificates()


def bridge_text(files: Certificates, at: int, more: str = "", direct: bool = True) -> str:
    tls = files.listener()
    return f"""
listeners: [{{listen: '127.0.0.1:0', tls: {tls}, protocol: sps}}]
tunnel:
  bridge:
    listen: 127.0.0.1:{at}
    tls: {tls}
    datagrams: true
    direct: {str(direct).lower()}
    agents: {{home: {{token: {TOKEN}}}}}
rules: [{{port: [1-65535], via: tunnel://home}}]
{TO_LOOPBACK}
{more}
"""


def agent_text(files: Certificates, at: int, direct: bool = True, more: str = TO_LOOPBACK) -> str:
    text = tls_agent_text(files, at, "{}")
    keys = f"exit: true, datagrams: true, direct: {str(direct).lower()}"
    return f"{text.replace('exit: false', keys)}\n{more}"


def client_text(files: Certificates, port: int, login: str = "", more: str = TO_LOOPBACK) -> str:
    return f"""
listeners: [{{listen: '127.0.0.1:0'}}]
upstreams:
  home:
    url: 'https://{login}127.0.0.1:{port}'
    direct: true
    tls: {{ca: '{files.path("ca.pem")}'}}
default: home
{more}
"""


class Three:
    """A client's daemon, a bridge and an agent; a program behind the client, and an echo server."""

    def __init__(
        self, stack: ExitStack, files: Certificates, bridge: str = "", login: str = "", **more: Any
    ) -> None:
        at = free_port()
        self.bridge_text = bridge_text(files, at, bridge)
        self.bridge: TunnelDaemon = stack.enter_context(tunnel_daemon(self.bridge_text))
        self.agent: TunnelDaemon = stack.enter_context(
            tunnel_daemon(agent_text(files, at, **more.pop("agent", {})))
        )
        text = client_text(files, self.bridge.port, login, **more)
        self.client: TunnelDaemon = stack.enter_context(tunnel_daemon(text))
        self.bridge.wait_for_agent()
        wait_until(lambda: bool((self.bridge.agents()[0]["path"] or {}).get("up")))
        self.echo = stack.enter_context(UdpEcho())
        self.program = stack.enter_context(UdpClient(self.client.port))

    def check(self, *sizes: int) -> None:
        """Send datagrams of these sizes to the echo server, and receive them back."""
        for size in sizes:
            data = bytes(range(256)) * (size // 256) + bytes(size % 256)
            self.program.to(self.echo.address, data)
            assert self.program.receive() == (data, self.echo.address)

    def come_through(self) -> None:
        """Send datagrams until one comes back: what is under way when a flow ends is lost."""
        self.program.socket.settimeout(0.2)
        wait_until(self._is_answered, 2 * SECONDS)
        while self._is_answered(b""):
            pass
        self.program.socket.settimeout(SECONDS)

    def _is_answered(self, data: bytes = b"again") -> bool:
        try:
            if data:
                self.program.to(self.echo.address, data)
            return self.program.receive() == (b"again", self.echo.address)
        except TimeoutError:
            return False

    def rows(self) -> list[dict[str, Any]]:
        """Return the direct paths as the bridge, the agent and the client show them."""
        own = self.agent.tunnels.describe()["agent"].get("direct", [])
        ends = [*own, *self.client.tunnels.describe()["direct"]]
        return [*self.bridge.tunnels.describe()["direct"], *ends]

    def is_direct(self) -> bool:
        """Return whether all three show the path as up."""
        return [row["state"] for row in self.rows()] == ["direct"] * 3

    def go_directly(self) -> None:
        """Begin a flow, and wait until it goes directly."""
        self.check(1)
        wait_until(self.is_direct, SECONDS)
        self.check(2, 2)

    def relayed(self) -> int:
        """Return the datagrams of live sessions that the bridge has relayed to the agent."""
        return sum(
            live.traffic().datagrams_sent for live in self.bridge.daemon._runtime.flows.live()
        )

    def lost(self) -> dict[str, int]:
        """Return what was dropped, except the probes that have overtaken an offer."""
        drops: dict[str, int] = {}
        for daemon in (self.bridge, self.agent, self.client):
            drops |= daemon.drops()
        drops.pop("unknown connection", None)
        return drops


@contextmanager
def three(files: Certificates, **more: Any) -> Iterator[Three]:
    with ExitStack() as stack:
        yield Three(stack, files, **more)


def test_datagrams_go_directly(files: Certificates) -> None:
    with three(files) as parts:
        parts.go_directly()
        relayed = parts.relayed()
        parts.check(0, 1, 100, 1000)
        assert parts.relayed() == relayed
        # What no packet holds is relayed; so is its answer.
        parts.check(9000)
        assert parts.relayed() == relayed + 1
        assert len(set(parts.echo.sources)) == 1
        assert [row["flows"] for row in parts.rows()] == [1, 1, 1]
        assert all(row["rtt"] > 0 for row in parts.rows())
        assert not parts.lost()


def test_further_flows_share_the_path(files: Certificates) -> None:
    with three(files) as parts:
        parts.go_directly()
        with UdpEcho() as other:
            parts.program.to(other.address, b"first")
            assert parts.program.receive() == (b"first", other.address)
            wait_until(lambda: [row["flows"] for row in parts.rows()] == [2, 2, 2])
            relayed = parts.relayed()
            parts.program.to(other.address, b"second")
            assert parts.program.receive() == (b"second", other.address)
            parts.check(10)
            assert parts.relayed() == relayed
        assert parts.bridge.count("tunnel_direct", "attempt") == 1


def test_flow_that_the_bridge_ends_ends_everywhere(files: Certificates) -> None:
    """Hazard 184."""
    with three(files) as parts:
        parts.go_directly()
        (session,) = parts.bridge.daemon._runtime.flows.live()
        session.kill()
        wait_until(lambda: [row["flows"] for row in parts.rows()] == [0, 0, 0])
        # The next datagram begins another flow, by the path that is there.
        parts.check(10)
        wait_until(lambda: [row["flows"] for row in parts.rows()] == [1, 1, 1])
        assert len(set(parts.echo.sources)) == 2
        assert parts.bridge.count("tunnel_direct", "attempt") == 1


@pytest.mark.parametrize(
    "limits", ["rate: 100Mbit/s", "quota: {total: 1GiB}", "rate_down: 100Mbit/s"]
)
def test_flow_under_a_limit_of_bytes_stays_relayed(
    files: Certificates, limits: str, tmp_path: Path
) -> None:
    """Hazard 184."""
    users = f"users: {{ann: {{password: secret, limits: {{{limits}}}}}}}\nstate: {tmp_path}"
    with three(files, bridge=users, login="ann:secret@") as parts:
        parts.check(1, 100, 1000)
        parts.bridge.wait_for_count("tunnel_direct", "limited", 1)
        assert parts.relayed() == 3
        assert not parts.rows()


def test_flow_that_gets_a_limit_is_relayed_from_then_on(files: Certificates) -> None:
    """Hazard 184."""
    users = "users: {ann: {password: secret}}"
    with three(files, bridge=users, login="ann:secret@") as parts:
        parts.go_directly()
        limits = users.replace("secret}", "secret, limits: {rate: 100Mbit/s}}")
        parts.bridge.reload(parts.bridge_text.replace(users, limits))
        wait_until(lambda: [row["flows"] for row in parts.rows()] == [0, 0, 0])
        relayed = parts.relayed()
        parts.check(10, 100)
        assert parts.relayed() == relayed + 2


def test_reload_without_direct_ends_direct_paths(files: Certificates) -> None:
    with three(files) as parts:
        parts.go_directly()
        without = parts.bridge_text.replace("direct: true", "direct: false")
        parts.bridge.reload(without)
        wait_until(lambda: not parts.rows())
        relayed = parts.relayed()
        parts.check(10, 100)
        assert parts.relayed() == relayed + 2
        parts.bridge.reload(parts.bridge_text)
        parts.program.close()
        with UdpClient(parts.client.port) as parts.program:
            parts.go_directly()


@pytest.mark.parametrize("side", ["agent", "bridge"])
def test_side_without_direct_relays(files: Certificates, side: str) -> None:
    more: dict[str, Any] = {"agent": {"direct": False}} if side == "agent" else {}
    with three(files, **more) as parts:
        if side == "bridge":
            parts.bridge.reload(parts.bridge_text.replace("direct: true", "direct: false"))
        parts.check(1, 100)
        assert parts.relayed() == 2 and not parts.rows()


def test_address_that_destinations_deny_is_never_probed(files: Certificates) -> None:
    """Hazard 182: the client's policy denies the loopback of the agent."""
    with three(files, more="") as parts:
        parts.check(1)
        parts.client.wait_for_count("tunnel_direct", "address refused", 1)
        wait_until(lambda: [row["state"] for row in parts.rows()][1:] == ["relayed"] * 2)
        parts.check(100)
        assert parts.relayed() == 2


def test_agent_that_connects_again_is_tried_again(files: Certificates) -> None:
    with three(files) as parts:
        parts.go_directly()
        (session,) = parts.bridge.tunnels._sessions.all()
        session.control.stream.shutdown()
        parts.bridge.wait_for_count("tunnel_handshakes", "resumed", 1)
        parts.bridge.wait_for_agent()
        wait_until(lambda: bool((parts.bridge.agents()[0]["path"] or {}).get("up")))
        parts.come_through()
        parts.go_directly()


def test_client_leaves_nothing_behind(files: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    with three(files) as parts:
        parts.go_directly()
        parts.program.close()
        parts.client.sweep(1000)
        wait_until(lambda: not parts.client.daemon._runtime.flows.live())
        parts.client.sweep(1000)
        assert parts.client.tunnels.describe()["direct"] == []
        wait_until(lambda: not parts.bridge.daemon._runtime.flows.live())
        parts.bridge.sweep(1000)
        wait_until(lambda: not parts.rows())


def test_strangers_packets_are_dropped_and_counted(files: Certificates) -> None:
    """Hazard 185: forged, replayed or of unknown connections, at either end."""
    with three(files) as parts:
        parts.go_directly()
        (meeting,) = [client._meeting for client in parts.client.tunnels.upstreams._clients]
        (path,) = meeting.end._pairs.values()
        port = meeting.paths.origin.conn._socket.address.port
        identifier = path._keys.current.identifier
        forged = b"\x9e" + identifier + bytes(8) + bytes(100)
        unknown = b"\x9e" + bytes(8) + bytes(8) + bytes(100)
        before = parts.client.drops()
        with UdpPort() as stranger:
            for packet in (forged, unknown, b"\x9e", b"hello"):
                stranger.socket.sendto(packet, (LOCALHOST, port))
            wanted = sum(before.values()) + 4
            wait_until(lambda: sum(parts.client.drops().values()) >= wanted)
            assert stranger.silent()
        after = parts.client.drops()
        drops = {reason: after[reason] - before.get(reason, 0) for reason in after}
        assert drops.pop("forged", 0) + drops.pop("replayed", 0) == 1
        assert drops == {"unknown connection": 1, "truncated": 1, "malformed": 1}
        parts.check(10)
        assert parts.is_direct()


def test_keys_are_renewed_without_loss(
    files: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "RENEWAL_SECONDS", 1.0)
    with three(files) as parts:
        parts.go_directly()
        while parts.bridge.count("tunnel_direct", "attempt") < 3:
            parts.check(10, 1000)
        wait_until(parts.is_direct)
        assert not parts.lost()


def test_user_has_few_clients(files: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "CLIENTS_PER_USER", 0)
    with three(files) as parts:
        parts.check(1, 100)
        parts.bridge.wait_for_count("tunnel_direct", "too many clients", 1)
        assert parts.relayed() == 2
