"""Ends of UNIX sockets in a relay, of clients and of programs: nothing is lost, nothing spins.

A UNIX socket hangs up as soon as its peer has closed, although bytes of the peer wait in it.
"""

from __future__ import annotations

import contextlib
import socket
from contextlib import closing
from pathlib import Path
from typing import Iterator

import pytest

from tests.support.handlers import LOCALHOST, SECONDS, eventually
from tests.support.relays import Running, running
from tests.support.sockets import address_of, listen, read_exactly, read_to_end

CONNECT = b"\5\1\0\5\1\0\3\1a\0\x50"
"""SOCKS5: no login, CONNECT to a:80."""
BULK = bytes(range(256)) * 8192
SENDS = "head -c 2097152 /dev/zero"
"""A program that sends two MiB and ends, without a look at its input."""
SLOW = ", limits: {rate_per_client: 8MB/s}"


class Door:
    """A daemon with a UNIX socket or a port, and a program as its upstream."""

    def __init__(self, path: Path | None, relay: Running) -> None:
        self._path = path
        self.relay = relay

    def connect(self, receive_buffer: int = 0) -> socket.socket:
        sock = socket.socket(socket.AF_INET if self._path is None else socket.AF_UNIX)
        sock.settimeout(SECONDS)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.connect((LOCALHOST, self.relay.port) if self._path is None else str(self._path))
        return sock


@contextlib.contextmanager
def door(path: Path | None, program: str, more: str = "") -> Iterator[Door]:
    place = f"'unix:{path}'" if path is not None else f"'{LOCALHOST}:0'"
    command = f"{{command: [sh, -c, {program!r}]}}"
    with running(f"listeners: [{{listen: {place}{more}}}]\ndefault: {command}\n") as relay:
        yield Door(path, relay)


@pytest.fixture(params=["unix", "tcp"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "a.sock" if request.param == "unix" else None


@pytest.mark.parametrize("more", ["", SLOW], ids=["", "paced"])
def test_all_output_of_a_program_that_has_ended_reaches_the_client(
    path: Path | None, more: str
) -> None:
    with door(path, SENDS, more) as ours, closing(ours.connect()) as client:
        client.sendall(CONNECT)
        assert len(read_exactly(client, 12)) == 12
        # The program writes more than the relay and the sockets can hold, then it has ended.
        data = read_to_end(client)
        assert len(data) == 2_097_152


def test_client_that_reads_late_gets_all_output(path: Path | None) -> None:
    with door(path, f"{SENDS}; echo done >&2") as ours, closing(ours.connect(4096)) as client:
        client.sendall(CONNECT)
        assert len(read_exactly(client, 12)) == 12
        pieces = bytearray()
        while len(pieces) < 1_000_000:
            pieces += client.recv(4096)
        assert len(pieces) + len(read_to_end(client)) == 2_097_152


@pytest.mark.parametrize("more", ["", SLOW], ids=["", "paced"])
def test_upload_of_a_client_that_has_closed_reaches_the_target(tmp_path: Path, more: str) -> None:
    path = tmp_path / "a.sock"
    with listen() as target:
        # Before the connection, as everywhere: a window that shrinks to less than half a segment is
        # used once in 200 ms (RFC 9293 section 3.8.6.2.1).
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        place = f"protocol: tcp, target: '{address_of(target)}'"
        with running(f"listeners: [{{listen: 'unix:{path}', {place}{more}}}]") as relay:
            client = Door(path, relay).connect()
            with closing(target.accept()[0]) as accepted:
                accepted.settimeout(SECONDS)
                client.sendall(BULK)
                client.close()
                assert read_to_end(accepted) == BULK
            eventually(lambda: relay.log.records)
            assert [record.ended for record in relay.log.records] == ["closed"]


def test_answer_after_half_close(path: Path | None) -> None:
    with door(path, "wc -c") as ours, closing(ours.connect()) as client:
        client.sendall(CONNECT + BULK)
        client.shutdown(socket.SHUT_WR)
        assert len(read_exactly(client, 12)) == 12
        assert int(read_to_end(client)) == len(BULK)


def test_client_that_leaves_ends_a_program_that_writes(path: Path | None) -> None:
    with door(path, "cat /dev/zero") as ours:
        with closing(ours.connect()) as client:
            client.sendall(CONNECT)
            assert len(read_exactly(client, 12)) == 12
        eventually(lambda: ours.relay.log.records)
        programs = ours.relay.daemon._runtime.commands._programs
        assert programs is not None
        eventually(lambda: not len(programs))
