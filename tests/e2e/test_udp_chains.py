"""UDP through SOCKS5 upstreams: netproxy behind netproxy, a chain of them, a restart, and Dante."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import Iterator

import pytest

from netproxy.dialer import socks5_udp
from netproxy.interfaces.addresses import Address
from tests.e2e.conftest import Start
from tests.e2e.peers import Association, Endpoint, UdpEcho
from tests.e2e.support import ANY_PORT, LOOPBACK, program, run_netproxyd, wait_for
from tests.e2e.upstreams import DANTED
from tests.support.ports import free_port
from tests.support.relays import SPS, UdpClient, running

SECONDS = 5.0
STEP = 0.05  # until what may have been lost is sent again
RESET = struct.pack("@ii", 1, 0)


def behind(*ports: int) -> str:
    """A configuration whose way out are the SOCKS5 proxies on `ports`."""
    hops = ", ".join(f"'socks5://{LOOPBACK}:{port}'" for port in ports)
    return f"{SPS}\ndefault: [{hops}]"


def insist(client: UdpClient, target: Endpoint, data: bytes) -> None:
    """Sends until the answer comes."""
    deadline = time.monotonic() + SECONDS
    client.socket.settimeout(STEP)
    while True:
        client.to(Address(*target), data)
        try:
            answer = client.receive()
        except (TimeoutError, ConnectionRefusedError):
            assert time.monotonic() < deadline, "no answer any more"
            continue
        if answer[0] == data:
            break
    assert answer[1] == target
    client.socket.settimeout(SECONDS)


def served(port: int, end: str = "") -> set[int]:
    """The clients' ports of the TCP connections that this process serves on `port`; `end` cuts them from the server's side."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            copy = os.dup(int(number))
        except OSError:
            continue  # the directory's own descriptor, or one just closed
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
                found.add(sock.getpeername()[1])
                if end == "reset":
                    sock.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, RESET
                    )  # what its owner's close will then be
                if end:
                    sock.shutdown(socket.SHUT_RD if end == "reset" else socket.SHUT_RDWR)
        except OSError:
            continue  # one that listens
        finally:
            os.close(copy)
    return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries to associate anew come one soon after the other."""
    monkeypatch.setattr(socks5_udp, "RETRY_SECONDS", STEP)


class TestOne:
    @pytest.mark.parametrize("size", [0, 1, 1200, 60_000])
    def test_datagrams_come_back_as_they_went_and_name_the_target(self, size: int) -> None:
        data = os.urandom(size)
        with (
            running() as far,
            running(behind(far.port)) as near,
            UdpEcho() as echo,
            UdpClient(near.port) as client,
        ):
            for _ in range(2):
                client.to(Address(*echo.address), data)
                assert client.receive() == (data, echo.address)
            assert near.drops() == {} == far.drops()

    def test_two_targets_share_an_association_and_a_port(self) -> None:
        with (
            running() as far,
            running(behind(far.port)) as near,
            UdpEcho() as one,
            UdpEcho() as other,
            UdpClient(near.port) as client,
        ):
            for echo in (one, other, one):
                client.to(Address(*echo.address), b"x")
                assert client.receive() == (b"x", echo.address)
            assert far.state()["associations"] == far.state()["sessions"] == 1
            assert one.sources == other.sources * 2

    def test_many_keep_their_order(self) -> None:
        sent = [b"%d" % number for number in range(200)]
        with (
            running() as far,
            running(behind(far.port)) as near,
            UdpEcho() as echo,
            UdpClient(near.port) as client,
        ):
            insist(client, echo.address, b"first")
            for data in sent:
                client.to(Address(*echo.address), data)
            assert [client.receive() for _ in sent] == [(data, echo.address) for data in sent]

    def test_the_clients_end_is_the_upstream_associations_end(self) -> None:
        with running() as far, running(behind(far.port)) as near, UdpEcho() as echo:
            with UdpClient(near.port) as client:
                insist(client, echo.address, b"x")
            near.sweep(1e6)
            wait_for(
                lambda: near.idle() and not far.state()["associations"],
                SECONDS,
                "both without associations",
            )


def test_two_hops() -> None:
    with (
        running() as last,
        running() as first,
        running(behind(first.port, last.port)) as near,
        UdpEcho() as echo,
        UdpClient(near.port) as client,
    ):
        for size in (0, 1, 1200, 60_000):
            data = os.urandom(size)
            client.to(Address(*echo.address), data)
            assert client.receive() == (data, echo.address)
        assert [one.state()["associations"] for one in (near, first, last)] == [1, 1, 1]
        assert not near.drops() | first.drops() | last.drops()


class TestLoss:
    @pytest.mark.parametrize("end", ["end", "reset"])
    def test_a_control_connection_that_is_cut_leaves_the_client_its_session(self, end: str) -> None:
        with (
            running() as far,
            running(behind(far.port)) as near,
            UdpEcho() as echo,
            UdpClient(near.port) as client,
        ):
            for turn in range(3):
                insist(client, echo.address, b"turn %d" % turn)
                assert near.state()["associations"] == near.state()["sessions"] == 1
                before = served(far.port, end)
                assert before
                # the first time at once; one that is lost again soon is renewed by the next datagram, when it is time
                wait_for(
                    lambda: (
                        client.to(Address(*echo.address), b"again")
                        or (now := served(far.port))
                        and not now & before
                    ),
                    SECONDS,
                    "another control connection",
                )
            insist(client, echo.address, b"last")

    def test_a_restart_of_the_upstream_leaves_the_client_its_association(self, quick: None) -> None:
        """Its next datagram that can go goes by a session of its own."""
        port = free_port()
        text = f"listeners: [{{listen: '{LOOPBACK}:{port}'}}]"
        with UdpEcho() as echo, running(behind(port)) as near, contextlib.ExitStack() as stack:
            with running(text):
                client = stack.enter_context(UdpClient(near.port))
                insist(client, echo.address, b"before")
            wait_for(
                lambda: client.to(Address(*echo.address), b"lost") or near.drops(),
                SECONDS,
                "a loss",
            )
            with running(text):
                insist(client, echo.address, b"after")
                assert near.state()["associations"] == near.state()["sessions"] == 1


@pytest.fixture
def danted(tmp_path: Path) -> Iterator[int]:
    """The port of a Dante server; skips where there is none."""
    path, port = program("danted"), free_port()
    (tmp_path / "danted.conf").write_text(DANTED.format(directory=tmp_path, port=port, user="root"))
    process = subprocess.Popen(
        [path, "-N", "1", "-f", str(tmp_path / "danted.conf")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                socket.create_connection((LOOPBACK, port), 1.0).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.skip("danted does not start")
                time.sleep(STEP)
        yield port
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # it and its children: a session of their own
        except ProcessLookupError:
            pass
        process.wait()


def test_through_dante(danted: int, netproxyd: Start) -> None:
    daemon = netproxyd("-l", ANY_PORT, "-u", f"socks5://{LOOPBACK}:{danted}")
    with UdpEcho() as one, UdpEcho() as other, Association(daemon.server) as client:
        for echo in (one, other, one):
            for size in (0, 1, 1200):
                assert client.echo(echo.address, os.urandom(size)) == (echo.address, client.bound)
        assert len(set(one.sources)) == 1


@pytest.mark.parametrize(
    "hops, carried, warned",
    [
        ("socks5://192.0.2.1:1080", "tcp, udp by ASSOCIATE", False),
        ("socks5://192.0.2.1:1080,socks5h://192.0.2.2:1080", "tcp, udp by ASSOCIATE", False),
        ("socks5://192.0.2.1:1080,http://192.0.2.2:3128", "tcp, udp by connect-udp", False),
        ("http://192.0.2.2:3128,socks5://192.0.2.1:1080", "tcp, udp by ASSOCIATE", False),
        (
            "socks4://192.0.2.2:1080,socks5://192.0.2.1:1080",
            "tcp; no udp: socks5://192.0.2.1:1080 must be reached over UDP, but socks4 carries none",
            True,
        ),
    ],
)
def test_the_check_says_what_an_upstream_carries(hops: str, carried: str, warned: bool) -> None:
    status, said = run_netproxyd("-t", "-l", ANY_PORT, "-u", hops)
    assert status == 0, said
    assert re.search(f"carries {carried}$", said, re.MULTILINE), said
    assert bool(re.search(r"warning: .*takes UDP.*carries none", said)) == warned, said
