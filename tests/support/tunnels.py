"""A bridge and an agent, each a real Daemon in the test's process, and what they lead to."""

from __future__ import annotations

import re
import socket
import threading
from contextlib import ExitStack, contextmanager
from typing import Any, Iterator

from tests.e2e.support import free_port as free_port  # for those who need ports for a tunnel
from tests.support.relays import LOCALHOST, SECONDS, Running, UdpPort
from tests.support.sockets import wait_until

TOKEN = "a token of twenty bytes"


def bridge_text(ports: str = "[]", more: str = "", agents: str = "") -> str:
    agents = agents or f"home: {{token: {TOKEN}, ports: {ports}}}"
    return f"listeners: [{{listen: '127.0.0.1:0'}}]\ntunnel: {{bridge: {{listen: 'tcp://127.0.0.1:0', agents: {{{agents}}}}}}}\n{more}"


def agent_text(port: int, services: str = "{}", more: str = "", leads_out: bool = False) -> str:
    return (
        f"listeners: []\ntunnel: {{agent: {{bridge: 'tcp://127.0.0.1:{port}', name: home, token: {TOKEN}, services: {services}, "
        f"exit: {str(leads_out).lower()}}}}}\n{more}"
    )


class Side(Running):
    """A daemon that need not listen."""

    @property
    def tunnels(self) -> Any:
        return self.daemon._plan.tunnels.current

    @property
    def tunnel_port(self) -> int:
        """Where agents come."""
        return next(
            one.address.port
            for one in self.daemon._manager.listeners
            if one.network == "tcp" and one.address.port != self.port
        )

    def agents(self) -> list[dict[str, Any]]:
        return self.tunnels.describe()["agents"]

    def wait_for_agent(self, ports: int = 0, idle: int = 1) -> dict[str, Any]:
        """With so many ports and connections that wait."""
        wait_until(
            lambda: any(len(one["ports"]) >= ports and one["idle"] >= idle for one in self.agents())
        )
        return self.agents()[0]


@contextmanager
def side(text: str) -> Iterator[Side]:
    one = Side(text)
    try:
        yield one
    finally:
        one.daemon.stop()
    assert not one.log.faults
    assert not one.count("drops", "internal error")
    assert not one.count("connections", "internal error")


class Echo:
    """A TCP server on loopback that gives everything back, then its end; counts its clients."""

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
            self._threads.append(
                threading.Thread(
                    target=self._echo, args=(client,), name="test-echo-client", daemon=True
                )
            )
            self._threads[-1].start()

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
    """Gives datagrams back; `sources` are where they came from."""

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
    leads_out: bool = False,
    more: str = "",
    agents: str = "destinations: {allow: [127.0.0.0/8]}",
) -> Iterator[tuple[Side, Side]]:
    """A bridge, and an agent that is connected to it; `more` and `agents` are what else their files say."""
    with ExitStack() as stack:
        bridge = stack.enter_context(side(bridge_text(ports, more)))
        agent = stack.enter_context(
            side(agent_text(bridge.tunnel_port, services, agents, leads_out))
        )
        wait_until(lambda: any(one["exit"] is leads_out for one in bridge.agents()))
        bridge.wait_for_agent(len(re.findall(r'"\d+(?:/udp)?":', services)))
        yield bridge, agent
