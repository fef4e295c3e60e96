"""A bridge and an agent, each a real Daemon in the test's process, and the servers behind them."""

from __future__ import annotations

import re
import socket
import threading
from contextlib import ExitStack, contextmanager
from typing import Any, Iterator

from tests.support.certificates import Certificates
from tests.support.ports import free_port as free_port
from tests.support.relays import LOCALHOST, SECONDS, Running, UdpPort
from tests.support.sockets import wait_until

TOKEN = "a token of twenty bytes"


def bridge_text(ports: str = "[]", more: str = "", agents: str = "") -> str:
    """Return the configuration of a bridge; `more` is appended to it."""
    agents = agents or f"home: {{token: {TOKEN}, ports: {ports}}}"
    return f"""
listeners: [{{listen: '127.0.0.1:0'}}]
tunnel: {{bridge: {{listen: 'tcp://127.0.0.1:0', agents: {{{agents}}}}}}}
{more}
"""


def agent_text(port: int, services: str = "{}", more: str = "", is_exit: bool = False) -> str:
    """Return the configuration of an agent; `more` is appended to it."""
    return f"""
listeners: []
tunnel: {{agent: {{bridge: 'tcp://127.0.0.1:{port}', name: home, token: {TOKEN}, \
services: {services}, exit: {str(is_exit).lower()}}}}}
{more}
"""


def tls_bridge_text(files: Certificates, ports: str, more: str = "") -> str:
    """Return the configuration of a bridge with TLS; `more` is added to its `tls`."""
    listener = f"127.0.0.1:0', tls: {files.listener(more)}"
    return bridge_text(ports).replace("tcp://127.0.0.1:0'", listener)


def tls_agent_text(files: Certificates, port: int, services: str, tls: str = "") -> str:
    """Return the configuration of an agent with TLS, which trusts the test's authority."""
    tls = tls or f"{{ca: '{files.path('ca.pem')}'}}"
    text = agent_text(port, services).replace("tcp://127.0.0.1", "tls://127.0.0.1")
    return text.replace("token:", f"tls: {tls}, token:")


class TunnelDaemon(Running):
    """A daemon with a tunnel, which may have no listener."""

    @property
    def tunnels(self) -> Any:
        """The daemon's netproxy.daemon.tunnels.tunnels.Tunnels."""
        return self.daemon._plan.tunnels.current

    @property
    def tunnel_port(self) -> int:
        """The port that agents dial."""
        return next(
            listener.address.port
            for listener in self.daemon._manager.listeners
            if listener.network == "tcp" and listener.address.port != self.port
        )

    def agents(self) -> list[dict[str, Any]]:
        """Return the connected agents as netproxyctl shows them."""
        return self.tunnels.describe()["agents"]

    def wait_for_agent(self, ports: int = 0, idle: int = 1) -> dict[str, Any]:
        """Wait for an agent with at least so many ports and idle work connections."""
        wait_until(
            lambda: any(
                len(agent["ports"]) >= ports and agent["idle"] >= idle for agent in self.agents()
            )
        )
        return self.agents()[0]


@contextmanager
def tunnel_daemon(text: str) -> Iterator[TunnelDaemon]:
    """Run a daemon with this configuration; check at its end that it met no internal error."""
    daemon = TunnelDaemon(text)
    try:
        yield daemon
    finally:
        daemon.daemon.stop()
    assert not daemon.log.faults
    assert not daemon.count("drops", "internal error")
    assert not daemon.count("connections", "internal error")


class Echo:
    """A TCP server that sends everything back, then its end of stream; counts its clients."""

    def __init__(self, host: str = LOCALHOST) -> None:
        self._listening = socket.create_server((host, 0), backlog=64)
        self.port = self._listening.getsockname()[1]
        self.clients = 0
        self._threads = [threading.Thread(target=self._accept, name="test-echo", daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            self.clients += 1
            thread = threading.Thread(
                target=self._echo, args=(client,), name="test-echo-client", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    @staticmethod
    def _echo(client: socket.socket) -> None:
        with client:
            client.settimeout(2 * SECONDS)
            try:
                while data := client.recv(65536):
                    client.sendall(data)
                client.shutdown(socket.SHUT_WR)
            except OSError:
                pass

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(SECONDS)


class UdpEcho(UdpPort):
    """A UDP server that sends datagrams back; `sources` are the addresses they came from."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[Any] = []
        self.socket.settimeout(None)
        self._thread = threading.Thread(target=self._serve, name="test-udp-echo", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            data, peer = self.socket.recvfrom(65536)
            if data == b"stop":
                return
            self.sources.append(peer)
            self.socket.sendto(data, peer)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"stop", self.address)
        self._thread.join(SECONDS)
        super().close()


@contextmanager
def tunnel(
    services: str = "{}",
    ports: str = "[]",
    is_exit: bool = False,
    more: str = "",
    agents: str = "destinations: {allow: [127.0.0.0/8]}",
) -> Iterator[tuple[TunnelDaemon, TunnelDaemon]]:
    """Run a bridge and an agent connected to it.

    `more` and `agents` are appended to the configuration of the bridge and of the agent.
    """
    with ExitStack() as stack:
        bridge = stack.enter_context(tunnel_daemon(bridge_text(ports, more)))
        text = agent_text(bridge.tunnel_port, services, agents, is_exit)
        agent = stack.enter_context(tunnel_daemon(text))
        wait_until(lambda: any(agent["exit"] is is_exit for agent in bridge.agents()))
        bridge.wait_for_agent(len(re.findall(r'"\d+(?:/udp)?":', services)))
        yield bridge, agent
