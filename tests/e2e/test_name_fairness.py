"""Clients that ask for names whose server is silent, beside one whose names are answered.

Hazard 138.  The flood never ends while the good client asks; the good client asks once for each
name, all of them new, and each must be answered.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any, Callable, Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import CONNECT, Association, TcpEcho, UdpEcho, echo, encode, socks5
from tests.e2e.support import LOOPBACK, SECONDS, Netproxyd, wait_for
from tests.support.dns import a, query, question
from tests.support.nameservers import answer_datagrams, answer_to
from tests.support.sockets import Task, udp

pytestmark = [pytest.mark.e2e, pytest.mark.any_workers]

ATTACKERS = pytest.mark.parametrize("attackers", [1, 2, 50])
# Names of the good client.
NAMES = 30
# What the attackers have waiting at the same time, all together.
CONNECTIONS, DATAGRAMS, QUERIES = 250, 2000, 1000
# Seconds between two queries or datagrams of the flood.
PAUSE = 0.002
SLOW = "{number}.slow"
GOOD = "127.0.9.9"


class From:
    """Makes sockets with a source address, as socket.socket does."""

    def __init__(self, host: str) -> None:
        self._host = host

    def __call__(self, family: int, kind: int) -> socket.socket:
        host = self._host

        class Bound(socket.socket):
            def bind(self, address: Any) -> None:
                super().bind((host, address[1]))

        sock = Bound(family, kind)
        if kind == socket.SOCK_STREAM:
            sock.bind((host, 0))
        return sock


def attacker(number: int) -> From:
    return From(f"127.0.1.{number + 1}")


@contextlib.contextmanager
def name_servers() -> Iterator[tuple[int, int]]:
    """Run a server that answers all names with 127.0.0.1, and a silent one; yield their ports."""
    over: list[bool] = []

    def reply(asked: bytes) -> bytes:
        is_ipv4 = asked[asked.index(b"\0", 12) + 1 :].startswith(b"\0\1")
        return answer_to(asked, *([a(60, b"\x7f\0\0\1")] if is_ipv4 else []))

    with udp() as server, udp() as silent:
        task = Task(answer_datagrams, server, reply, lambda: bool(over))
        try:
            yield server.getsockname()[1], silent.getsockname()[1]
        finally:
            over.append(True)
            task.result()


@pytest.fixture
def daemon(netproxyd: Start) -> Iterator[Netproxyd]:
    with name_servers() as (server, silent):
        yield netproxyd(
            config=f"""
listeners:
  - {{listen: "{LOOPBACK}:0"}}
  - {{protocol: dns, listen: "{LOOPBACK}:0"}}
dns:
  servers: ["{LOOPBACK}:{server}"]
  rules: [{{domain: .slow, servers: "{LOOPBACK}:{silent}"}}]
"""
        )


@contextlib.contextmanager
def flood(step: Callable[[int], None], started: Callable[[], bool]) -> Iterator[None]:
    """Call step(0), step(1) and so on, on a thread; begin once started() is true."""
    over = threading.Event()

    def run() -> None:
        number = 0
        while not over.is_set():
            step(number)
            number += 1

    task = Task(run)
    try:
        wait_for(started, SECONDS, "the flood is there")
        yield
    finally:
        over.set()
        task.result()


@ATTACKERS
def test_queries_of_a_dns_listener_are_answered(daemon: Netproxyd, attackers: int) -> None:
    server = (LOOPBACK, daemon.tcp_ports[1])
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(udp(f"127.0.1.{number + 1}")) for number in range(attackers)]
        sent = 0

        def step(number: int) -> None:
            nonlocal sent
            sockets[number % attackers].sendto(
                query(question(SLOW.format(number=number)), id=number & 0xFFFF), server
            )
            sent = number
            time.sleep(PAUSE if number > QUERIES else 0)

        with flood(step, lambda: sent > QUERIES), udp(GOOD) as client:
            client.settimeout(SECONDS)
            for number in range(NAMES):
                asked = query(question(f"udp{number}.test"), id=number)
                client.sendto(asked, server)
                assert client.recv(512) == answer_to(asked, a(60, b"\x7f\0\0\1"))
        assert daemon.status()["queries{forwarded}"] >= NAMES


@ATTACKERS
def test_names_of_connections_are_found(daemon: Netproxyd, attackers: int) -> None:
    makers = [attacker(number) for number in range(attackers)]
    waiting: dict[int, socket.socket] = {}

    def step(number: int) -> None:
        """Open a connection that asks for a slow name, in place of the oldest one."""
        slot = number % CONNECTIONS
        if slot in waiting:
            waiting.pop(slot).close()
        sock = waiting[slot] = makers[number % attackers](socket.AF_INET, socket.SOCK_STREAM)
        sock.settimeout(SECONDS)
        sock.connect(daemon.server)
        target = encode((SLOW.format(number=number), 80))
        sock.sendall(b"\5\1\0\5\1\0" + target)
        time.sleep(0.02 if number > CONNECTIONS else 0)

    try:
        with TcpEcho() as target, flood(step, lambda: len(waiting) == CONNECTIONS):
            for number in range(NAMES):
                name = (f"tcp{number}.test", target.address[1])
                sock, _ = socks5(daemon.server, CONNECT, name, make=From(GOOD))
                with sock:
                    echo(sock, b"hello")
    finally:
        for sock in waiting.values():
            sock.close()


@ATTACKERS
def test_names_of_datagrams_are_found(daemon: Netproxyd, attackers: int) -> None:
    with contextlib.ExitStack() as stack:
        associations = [
            stack.enter_context(Association(daemon.server, make=attacker(number)))
            for number in range(attackers)
        ]
        sent = 0

        def step(number: int) -> None:
            nonlocal sent
            association = associations[number % attackers]
            association.send((SLOW.format(number=number), 9), b"x" * 100)
            sent = number
            time.sleep(PAUSE if number > DATAGRAMS else 0)

        with (
            UdpEcho() as target,
            flood(step, lambda: sent > DATAGRAMS),
            Association(daemon.server, make=From(GOOD)) as client,
        ):
            for number in range(NAMES):
                client.echo((f"udp{number}.test", target.address[1]), b"hello %d" % number)
