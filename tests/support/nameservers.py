"""Name servers that play a script, and the queries and answers that they exchange."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from typing import Any, Callable, Iterator

from netproxy.interfaces.addresses import Address
from netproxy.net.stream import Stream
from tests.support.dns import HEADER, QR, RA, RD, a, query, question, record, soa
from tests.support.sockets import SECONDS, Task, address_of, read_exactly, udp

WWW = query(question("www.example"), id=0x1111)
MAIL = query(question("mail.example", 28), id=0x2222)
RIGHT = a(60, b"\xc0\0\2\x01")
"""A record of the answers that must be accepted."""


def far_deadline() -> float:
    """Return a deadline that only a failing test reaches."""
    return time.monotonic() + 2 * SECONDS


def answer_to(
    asked: bytes, *answers: bytes, id: int | None = None, flags: int = QR | RD | RA
) -> bytes:
    """Return an answer to a query as it arrived.  Only its question is repeated."""
    end = asked.index(b"\0", 12) + 5
    number = int.from_bytes(asked[:2], "big") if id is None else id
    return HEADER.pack(number, flags, 1, len(answers), 0, 0) + asked[12:end] + b"".join(answers)


def is_answer(message: bytes, asked: bytes, *records: bytes) -> bool:
    """Return whether a message is the answer with these records."""
    return message == answer_to(asked, *records)


def nxdomain(asked: bytes, ttl: int = 60) -> bytes:
    """Return NXDOMAIN with a SOA that lets it be kept for `ttl` seconds."""
    bare = bytearray(answer_to(asked, flags=QR | RD | RA | 3))
    bare[8:10] = b"\0\1"
    return bytes(bare) + soa(ttl, ttl)


def txt_records(ttl: int, size: int) -> tuple[bytes, ...]:
    """Return TXT records of about `size` bytes."""
    return tuple(
        record(b"\xc0\x0c", 16, ttl, b"\xff" + bytes([65 + number % 26]) * 255)
        for number in range(size // 268 + 1)
    )


def question_of(asked: bytes) -> bytes:
    """Return the question of a query, its name in lower case."""
    return asked[12 : asked.index(b"\0", 12) + 5].lower()


@contextlib.contextmanager
def udp_server(
    script: Callable[[socket.socket], Any], host: str = "127.0.0.1"
) -> Iterator[Address]:
    """Play `script` once with a UDP socket; raise at the end what it raised."""
    with udp(host) as sock:
        task = Task(script, sock)
        yield address_of(sock)
        task.result()


def answer_datagrams(
    sock: socket.socket, reply: Callable[[bytes], bytes | None], stop: Callable[[], bool]
) -> None:
    """Answer datagrams until stop() is true.  A `reply` of None is silence.  A script."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while not stop():
        if poll.poll(10):
            asked, peer = sock.recvfrom(65536)
            answer = reply(asked)
            if answer is not None:
                sock.sendto(answer, peer)


@contextlib.contextmanager
def name_server(reply: Callable[[bytes], bytes | None]) -> Iterator[Address]:
    """Run a name server over UDP."""
    over: list[bool] = []
    with udp() as sock:
        task = Task(answer_datagrams, sock, reply, lambda: bool(over))
        try:
            yield address_of(sock)
        finally:
            over.append(True)
            task.result()


def framed(message: bytes) -> bytes:
    """Return a message with its length, as it is sent over TCP."""
    return struct.pack(">H", len(message)) + message


def read_framed(sock: socket.socket) -> bytes:
    """Read a message with its length."""
    return read_exactly(sock, struct.unpack(">H", read_exactly(sock, 2))[0])


def serve(
    reply: Callable[[bytes], bytes] = lambda asked: answer_to(asked, a(60)),
) -> Callable[[socket.socket], None]:
    """Return a script for a TCP server that answers until the client closes."""

    def script(sock: socket.socket) -> None:
        while prefix := sock.recv(2):
            if len(prefix) == 1:
                prefix += read_exactly(sock, 1)
            asked = read_exactly(sock, int.from_bytes(prefix, "big"))
            sock.sendall(framed(reply(asked)))

    return script


def dial_to(address: Address) -> Callable[[float], Stream]:
    """Return a dial function; its sockets do not block, as those of dialers."""

    def connect(deadline: float) -> Stream:
        sock = socket.create_connection(address, SECONDS)
        sock.setblocking(False)
        return Stream(sock)

    return connect
