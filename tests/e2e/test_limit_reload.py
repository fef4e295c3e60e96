"""A reload changes the limits of users in the middle of what they have open."""

from __future__ import annotations

import random
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Iterator

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import (
    ASSOCIATE,
    CONNECT,
    Association,
    Refused,
    TcpEcho,
    UdpEcho,
    echo,
    exactly,
    listen,
    socks5,
)
from tests.e2e.support import LOOPBACK, SECONDS, Netproxyd, wait_for

pytestmark = pytest.mark.e2e

ALICE, BOB = ("alice", "secret"), ("bob", "secret")
DATA = random.Random(7).randbytes(2_000_000)
# So little that DATA never passes while a test runs.
SLOW = "limits: {rate: 8kbit/s, burst: 64KiB}"
DATAGRAMS = 200


class Reloaded:
    """A daemon whose user alice gets other limits by reloads."""

    def __init__(self, start: Start, directory: Path, alice: str) -> None:
        self._state = directory / "state"
        self._state.mkdir()
        self._file = directory / "netproxyd1.yaml"
        self.daemon: Netproxyd = start(config=self._config(alice), login=BOB)

    def _config(self, alice: str) -> str:
        return (
            f"listeners: [{{name: main, listen: '{LOOPBACK}:0', auth: required}}]\n"
            f"users: {{alice: {{password: secret, {alice}}}, bob: {{password: secret}}}}\n"
            f"state: {self._state}\n"
        )

    def change(self, alice: str) -> None:
        """Give the user other limits."""
        self._file.write_text(self._config(alice))
        self.daemon.reload()

    def connect(self, target: TcpEcho) -> socket.socket:
        """Return a connection of the user.  Raises Refused."""
        return socks5(self.daemon.server, CONNECT, target.address, ALICE)[0]

    def code(self, command: int = CONNECT) -> int:
        """Return the code with which SOCKS5 refuses a request of the user."""
        with pytest.raises(Refused) as caught:
            socks5(self.daemon.server, command, (LOOPBACK, 9), ALICE)
        return caught.value.code


@pytest.fixture
def tcp_echo() -> Iterator[TcpEcho]:
    with TcpEcho() as server:
        yield server


@pytest.fixture
def udp_echo() -> Iterator[UdpEcho]:
    with UdpEcho() as server:
        yield server


def test_rate_of_a_running_connection_is_lowered_and_raised(
    netproxyd: Start, tmp_path: Path
) -> None:
    reloaded = Reloaded(netproxyd, tmp_path, "")
    with listen(LOOPBACK) as target, ThreadPoolExecutor(1) as pool:
        client = socks5(reloaded.daemon.server, CONNECT, target.getsockname(), ALICE)[0]
        server, _ = target.accept()
        with client, server:
            server.settimeout(SECONDS)
            for slow in (False, True, False):
                reloaded.change(SLOW if slow else "")
                sent = pool.submit(client.sendall, DATA)
                if not slow:
                    assert exactly(server, len(DATA)) == DATA
                    sent.result()
                    continue
                begun = exactly(server, 1)
                server.settimeout(0.5)
                while (piece := _some(server)) and len(begun) < len(DATA):
                    begun += piece
                server.settimeout(SECONDS)
                assert len(begun) < len(DATA)
                # The rest of it comes as soon as there is no limit any more.
                reloaded.change("")
                assert begun + exactly(server, len(DATA) - len(begun)) == DATA
                sent.result()
    moved = f"sent={3 * len(DATA)} received=0 "
    reloaded.daemon.said(f"msg=finished .*user=alice .*{moved}.*ended=closed$")


def _some(sock: socket.socket) -> bytes:
    """Return what has come, b"" if nothing comes."""
    try:
        return sock.recv(65536)
    except TimeoutError:
        return b""


def test_rate_of_a_running_session_is_lowered_and_raised(
    netproxyd: Start, udp_echo: UdpEcho, tmp_path: Path
) -> None:
    reloaded = Reloaded(netproxyd, tmp_path, "")
    daemon = reloaded.daemon

    def rate_drops() -> int:
        return daemon.drops().get("drops{rate limit}", 0)

    dropped = 0
    with Association(daemon.server, ALICE) as association:
        for slow in (False, True, False):
            reloaded.change(SLOW if slow else "")
            association.echo(udp_echo.address, b"the same session")
            for _ in range(DATAGRAMS):
                association.send(udp_echo.address, bytes(1200))
            if slow:
                wait_for(rate_drops, SECONDS, "datagrams that are dropped")
            _take_all(association)
            if slow:
                dropped = rate_drops()
        assert rate_drops() == dropped
    daemon.said("msg=finished .*user=alice network=udp .*ended=")
    assert len(daemon.lines("msg=finished .*user=alice network=udp ")) == 1
    assert len(set(udp_echo.sources)) == 1


def _take_all(association: Association) -> None:
    """Receive replies until none comes."""
    association.socket.settimeout(0.5)
    try:
        while True:
            association.receive()
    except TimeoutError:
        association.socket.settimeout(SECONDS)


def test_connections_and_sessions_are_lowered_and_raised(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho, tmp_path: Path
) -> None:
    reloaded = Reloaded(netproxyd, tmp_path, "limits: {connections: 2, sessions: 2}")
    daemon = reloaded.daemon
    with (
        closing(reloaded.connect(tcp_echo)) as first,
        closing(reloaded.connect(tcp_echo)) as second,
        Association(daemon.server, ALICE) as association,
        Association(daemon.server, ALICE) as other,
    ):
        association.echo(udp_echo.address, b"one")
        reloaded.change("limits: {connections: 1, sessions: 1}")
        # What runs goes on, also beyond the limit; nothing new begins.
        for sock in (first, second):
            echo(sock, b"still there")
        association.echo(udp_echo.address, b"still there")
        assert reloaded.code() == 2
        other.send(udp_echo.address, b"beyond")
        wait_for(lambda: daemon.drops() == {"drops{session limit}": 1}, SECONDS, "a drop")
        reloaded.change("limits: {connections: 3, sessions: 2}")
        with closing(reloaded.connect(tcp_echo)) as third:
            echo(third, b"room again")
            assert reloaded.code() == 2
        other.echo(udp_echo.address, b"room again")
    assert daemon.counted("requests_refused{connection limit of the user}", 2) == 2
    assert daemon.counted("drops{session limit}", 1) == 1


def test_raised_quota_lets_the_user_in_again(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho, tmp_path: Path
) -> None:
    reloaded = Reloaded(netproxyd, tmp_path, "limits: {quota: {month: 8B}}")
    with closing(reloaded.connect(tcp_echo)) as sock:
        echo(sock, b"used up")
        reloaded.daemon.said('ended="quota used up" decided=users.alice.limits.quota id=')
        assert sock.recv(1) == b""
    assert reloaded.code() == reloaded.code(ASSOCIATE) == 2
    reloaded.change("limits: {quota: {month: 1KiB}}")
    with closing(reloaded.connect(tcp_echo)) as sock:
        echo(sock, b"more")
        with Association(reloaded.daemon.server, ALICE) as association:
            association.echo(udp_echo.address, b"more")
        # What was used before counts: 14 bytes, and 16 now.
        reloaded.change("limits: {quota: {month: 30B}}")
        reloaded.daemon.said('network=tcp .*ended="quota used up"', times=2)
    assert reloaded.code() == 2


def test_moved_date_ends_and_admits(
    netproxyd: Start, tcp_echo: TcpEcho, udp_echo: UdpEcho, tmp_path: Path
) -> None:
    reloaded = Reloaded(netproxyd, tmp_path, "expires: 2020-01-31")
    daemon = reloaded.daemon
    assert reloaded.code() == reloaded.code(ASSOCIATE) == 2
    reloaded.change("expires: 2999-12-31")
    with (
        closing(reloaded.connect(tcp_echo)) as sock,
        Association(daemon.server, ALICE) as association,
    ):
        echo(sock, b"now")
        association.echo(udp_echo.address, b"now")
        reloaded.change("expires: 2020-01-31")
        ended = 'ended="user expired" .*decided=users.alice.expires id='
        daemon.said(f"msg=finished .*user=alice network=(tcp|udp) .*{ended}", times=2)
        assert sock.recv(1) == b""
        association.send(udp_echo.address, b"too late")
        wait_for(lambda: daemon.drops() == {"drops{user expired}": 1}, SECONDS, "a drop")
        reloaded.change("")
        association.echo(udp_echo.address, b"again")
    assert daemon.counted("requests_refused{user expired}", 2) == 2
