"""Name servers that play a script, and the queries and answers that they exchange."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from typing import Any, Callable, Iterator

from netproxy.interfaces.addresses import Address
from tests.support.dns import HEAD, QR, RA, RD, a, query, question, record, soa
from tests.support.sockets import SECONDS, Task, address_of, read_exactly, udp

WWW, MAIL = (
    query(question("www.example"), id=0x1111),
    query(question("mail.example", 28), id=0x2222),
)


def soon() -> float:
    """A deadline that only a failing test meets."""
    return time.monotonic() + 2 * SECONDS


def answer_to(
    asked: bytes, *answers: bytes, id: int | None = None, flags: int = QR | RD | RA
) -> bytes:
    """To a query as it has come: its question alone is repeated."""
    end = asked.index(b"\0", 12) + 5
    number = int.from_bytes(asked[:2], "big") if id is None else id
    return HEAD.pack(number, flags, 1, len(answers), 0, 0) + asked[12:end] + b"".join(answers)


def no_such(asked: bytes, ttl: int = 60) -> bytes:
    """NXDOMAIN, and how long that holds."""
    bare = bytearray(answer_to(asked, flags=QR | RD | RA | 3))
    bare[8:10] = b"\0\1"
    return bytes(bare) + soa(ttl, ttl)


def texts(ttl: int, size: int) -> tuple[bytes, ...]:
    """TXT records with about so many bytes."""
    return tuple(
        record(b"\xc0\x0c", 16, ttl, b"\xff" + bytes([65 + at % 26]) * 255)
        for at in range(size // 268 + 1)
    )


def named(asked: bytes) -> bytes:
    """The question of a query, its name in lower case."""
    return asked[12 : asked.index(b"\0", 12) + 5].lower()


@contextlib.contextmanager
def udp_server(
    script: Callable[[socket.socket], Any], host: str = "127.0.0.1"
) -> Iterator[Address]:
    """Plays `script` once with a socket; what it raises, this raises at the end."""
    with udp(host) as sock:
        task = Task(script, sock)
        yield address_of(sock)
        task.result()


def answering(
    sock: socket.socket, reply: Callable[[bytes], bytes | None], stop: Callable[[], bool]
) -> None:
    """As a script: answers datagrams until `stop`; None is no answer."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while not stop():
        if poll.poll(10):
            asked, peer = sock.recvfrom(65536)
            given = reply(asked)
            if given is not None:
                sock.sendto(given, peer)


@contextlib.contextmanager
def name_server(reply: Callable[[bytes], bytes | None]) -> Iterator[Address]:
    """By UDP, as often as it is asked."""
    over: list[bool] = []
    with udp() as sock:
        task = Task(answering, sock, reply, lambda: bool(over))
        try:
            yield address_of(sock)
        finally:
            over.append(True)
            task.result()


def framed(message: bytes) -> bytes:
    return struct.pack(">H", len(message)) + message


def read_framed(sock: socket.socket) -> bytes:
    return read_exactly(sock, struct.unpack(">H", read_exactly(sock, 2))[0])


def serve(
    reply: Callable[[bytes], bytes] = lambda asked: answer_to(asked, a(60)),
) -> Callable[[socket.socket], None]:
    """A script for TCP: answers until the client closes."""

    def script(sock: socket.socket) -> None:
        while size := sock.recv(2):
            asked = read_exactly(
                sock,
                struct.unpack(">H", size + (b"" if len(size) == 2 else read_exactly(sock, 1)))[0],
            )
            sock.sendall(framed(reply(asked)))

    return script
