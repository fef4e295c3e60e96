"""UDP through SOCKS5 upstreams: one daemon, a chain of two, a restarted one, and Dante."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import time
from pathlib import Path
from typing import Iterator
import pytest

from netproxy.dialer import socks5_udp
from netproxy.interfaces.addresses import Address
from tests.e2e.conftest import Start
from tests.e2e.peers import Association, Endpoint, UdpEcho
from tests.e2e.support import ANY_PORT, LOOPBACK, SECONDS, run_netproxyd, wait_for
from tests.e2e.upstreams import Programs, danted
from tests.support.ports import free_port
from tests.support.relays import SPS, UdpClient, running

# Seconds until a datagram that may have been lost is sent again.
STEP = 0.05
RESET = struct.pack("@ii", 1, 0)


def through(*ports: int) -> str:
    """Return a configuration whose upstream is the chain of SOCKS5 proxies on these ports."""
    hops = ", ".join(f"'socks5://{LOOPBACK}:{port}'" for port in ports)
    return f"{SPS}\ndefault: [{hops}]"


def send_until_answered(client: UdpClient, target: Endpoint, data: bytes) -> None:
    """Send a datagram again and again until its answer arrives."""
    deadline = time.monotonic() + SECONDS
    client.socket.settimeout(STEP)
    while True:
        client.to(Address(*target), data)
        try:
            answer = client.receive()
        except (TimeoutError, ConnectionRefusedError):
            assert time.monotonic() < deadline, "no answer"
            continue
        if answer[0] == data:
            break
    assert answer[1] == target
    client.socket.settimeout(SECONDS)


def connections(port: int, end: str = "") -> set[int]:
    """Return the client ports of the TCP connections that this process has accepted on a port.

    If `end` is "fin" or "reset", they are ended from the server's side.
    """
    clients = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            copy = os.dup(int(number))
        except OSError:
            # The descriptor of the directory, or one that was just closed.
            continue
        try:
            if not os.readlink(f"/proc/self/fd/{copy}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(copy)) as sock:
                if (
                    sock.family != socket.AF_INET
                    or sock.type != socket.SOCK_STREAM
                    or sock.getsockname()[1] != port
                ):
                    continue
                clients.add(sock.getpeername()[1])
                if end == "reset":
                    # Its owner's close() will send RST.
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                if end:
                    sock.shutdown(socket.SHUT_RD if end == "reset" else socket.SHUT_RDWR)
        except OSError:
            # A listening socket.
            continue
        finally:
            os.close(copy)
    return clients


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pause between two attempts to renew an association."""
    monkeypatch.setattr(socks5_udp, "RETRY_SECONDS", STEP)


@pytest.mark.any_workers
class TestOneHop:
    @pytest.mark.parametrize("size", [0, 1, 1200, 60_000])
    def test_datagrams_are_echoed_with_the_targets_address(self, size: int) -> None:
        data = os.urandom(size)
        with (
            running() as far,
            running(through(far.port)) as near,
            UdpEcho() as echo,
            UdpClient(near.port) as client,
        ):
            for _ in range(2):
                client.to(Address(*echo.address), data)
                assert client.receive() == (data, echo.address)
            assert near.drops() == {} == far.drops()

    def test_two_targets_share_one_upstream_association_and_source_port(self) -> None:
        with (
            running() as far,
            running(through(far.port)) as near,
            UdpEcho() as first,
            UdpEcho() as second,
            UdpClient(near.port) as client,
        ):
            for echo in (first, second, first):
                client.to(Address(*echo.address), b"x")
                assert client.receive() == (b"x", echo.address)
            assert far.state()["associations"] == far.state()["sessions"] == 1
            assert first.sources == second.sources * 2

    def test_two_hundred_datagrams_keep_their_order(self) -> None:
        sent = [b"%d" % number for number in range(200)]
        with (
            running() as far,
            running(through(far.port)) as near,
            UdpEcho() as echo,
            UdpClient(near.port) as client,
        ):
            send_until_answered(client, echo.address, b"first")
            for data in sent:
                client.to(Address(*echo.address), data)
            received: list[object] = []
            while len(received) < len(sent):
                answer = client.receive()
                # On a slow machine the first datagram was sent more than once.
                if answer[0] != b"first":
                    received.append(answer)
            assert received == [(data, echo.address) for data in sent]

    def test_upstream_association_ends_with_the_client(self) -> None:
        with running() as far, running(through(far.port)) as near, UdpEcho() as echo:
            with UdpClient(near.port) as client:
                send_until_answered(client, echo.address, b"x")
            near.sweep(1e6)
            wait_for(
                lambda: near.idle() and not far.state()["associations"],
                SECONDS,
                "both without associations",
            )


@pytest.mark.any_workers
def test_datagrams_pass_a_chain_of_two_hops() -> None:
    with (
        running() as last,
        running() as first,
        running(through(first.port, last.port)) as near,
        UdpEcho() as echo,
        UdpClient(near.port) as client,
    ):
        for size in (0, 1, 1200, 60_000):
            data = os.urandom(size)
            client.to(Address(*echo.address), data)
            assert client.receive() == (data, echo.address)
        assert [hop.state()["associations"] for hop in (near, first, last)] == [1, 1, 1]
        assert not near.drops() | first.drops() | last.drops()


@pytest.mark.any_workers
class TestLoss:
    @pytest.mark.parametrize("end", ["fin", "reset"])
    def test_session_survives_the_end_of_its_upstream_control_connection(self, end: str) -> None:
        """Hazard 48. The association is renewed each time.

        The first time at once; soon after that, the next datagram renews it when a pause is over.
        """
        with (
            running() as far,
            running(through(far.port)) as near,
            UdpEcho() as echo,
            UdpClient(near.port) as client,
        ):
            for turn in range(3):
                send_until_answered(client, echo.address, b"turn %d" % turn)
                assert near.state()["associations"] == near.state()["sessions"] == 1
                ended = connections(far.port, end)
                assert ended

                def is_renewed(ended: set[int] = ended) -> bool:
                    client.to(Address(*echo.address), b"again")
                    current = connections(far.port)
                    return bool(current) and not current & ended

                wait_for(is_renewed, SECONDS, "another control connection")
            send_until_answered(client, echo.address, b"last")

    def test_association_survives_a_restart_of_the_upstream(self, quick_retries: None) -> None:
        """Hazard 48. Datagrams are dropped and counted meanwhile; later ones use a new session."""
        port = free_port()
        text = f"listeners: [{{listen: '{LOOPBACK}:{port}'}}]"
        with UdpEcho() as echo, running(through(port)) as near, contextlib.ExitStack() as stack:
            with running(text):
                client = stack.enter_context(UdpClient(near.port))
                send_until_answered(client, echo.address, b"before")
            wait_for(
                lambda: client.to(Address(*echo.address), b"lost") or near.drops(),
                SECONDS,
                "a dropped datagram",
            )
            with running(text):
                send_until_answered(client, echo.address, b"after")
                assert near.state()["associations"] == near.state()["sessions"] == 1


@pytest.fixture
def dante(tmp_path: Path) -> Iterator[str]:
    """The URL of a Dante server, which outlives the daemon."""
    with Programs(tmp_path) as programs:
        yield danted(programs, "socks5")


def test_datagrams_through_dante_are_echoed(dante: str, netproxyd: Start) -> None:
    daemon = netproxyd("-l", ANY_PORT, "-u", dante)
    with UdpEcho() as first, UdpEcho() as second, Association(daemon.server) as client:
        for echo in (first, second, first):
            for size in (0, 1, 1200):
                answer = client.echo(echo.address, os.urandom(size))
                assert answer == (echo.address, client.bound)
        assert len(set(first.sources)) == 1


@pytest.mark.any_workers
@pytest.mark.parametrize(
    "hops, carried, warned",
    [
        ("socks5://192.0.2.1:1080", "tcp, udp by ASSOCIATE", False),
        ("socks5://192.0.2.1:1080,socks5h://192.0.2.2:1080", "tcp, udp by ASSOCIATE", False),
        ("socks5://192.0.2.1:1080,http://192.0.2.2:3128", "tcp, udp by connect-udp", False),
        ("http://192.0.2.2:3128,socks5://192.0.2.1:1080", "tcp, udp by ASSOCIATE", False),
        (
            "socks4://192.0.2.2:1080,socks5://192.0.2.1:1080",
            "tcp; no udp: socks5://192.0.2.1:1080 must be reached over UDP, "
            "but socks4 carries none",
            True,
        ),
    ],
)
def test_configuration_check_reports_what_an_upstream_carries(
    hops: str, carried: str, warned: bool
) -> None:
    status, said = run_netproxyd("-t", "-l", ANY_PORT, "-u", hops)
    assert status == 0, said
    assert re.search(f"carries {carried}$", said, re.MULTILINE), said
    assert bool(re.search(r"warning: .*accepts UDP.*carries none", said)) == warned, said
