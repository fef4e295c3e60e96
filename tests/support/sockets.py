"""Real sockets on loopback for tests: pairs, scripted servers, ports that refuse or never answer.

All waits have a limit, and everything that is opened is closed.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from typing import Any, Callable, Iterator

from netproxy.interfaces.addresses import Address

SECONDS = 60.0
"""How long a test waits for an event that must come.

What is expected takes milliseconds, but seconds on a machine that is ten times slower and does
other work beside the tests. Only a test that fails waits so long.
"""
HAS_IPV6 = socket.has_ipv6
if HAS_IPV6:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as _probe:
            _probe.bind(("::1", 0))
    except OSError:
        HAS_IPV6 = False


class Task:
    """Runs a function on a thread of its own."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"test-{function.__name__}", daemon=True
        )
        self._thread.start()

    def result(self, seconds: float = SECONDS) -> Any:
        """Wait for the function; return its result, or raise what it raised."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"{self._thread.name} still runs"
        if self._error:
            raise self._error
        return self._value

    @property
    def done(self) -> bool:
        """True once the function has ended."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        function, arguments = self._call
        try:
            self._value = function(*arguments)
        except BaseException as error:
            self._error = error


def wait_until(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    """Wait for a condition of which no event tells: look every few milliseconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.005)


def address_of(sock: socket.socket) -> Address:
    """Return the local address."""
    return Address(*sock.getsockname()[:2])


def listen(host: str = "127.0.0.1", backlog: int = 16) -> socket.socket:
    """Return a listening TCP socket on a port that the kernel chooses."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.bind((host, 0))
    sock.listen(backlog)
    sock.settimeout(SECONDS)
    return sock


@contextlib.contextmanager
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield both ends of a TCP connection.  The first one blocks; the second one, the test's, has
    a timeout."""
    with listen() as listening:
        ours = socket.create_connection(listening.getsockname())
        theirs, _ = listening.accept()
    theirs.settimeout(SECONDS)
    with ours, theirs:
        yield ours, theirs


@contextlib.contextmanager
def server(script: Callable[[socket.socket], Any], host: str = "127.0.0.1") -> Iterator[Address]:
    """Run `script` with each connection, on a thread each; yield the server's address.

    Raises at the end what a script has raised.
    """
    listening = listen(host)
    failures: list[BaseException] = []
    plays: list[Task] = []

    def play(sock: socket.socket) -> None:
        with sock:
            sock.settimeout(SECONDS)
            try:
                script(sock)
            except (ConnectionError, TimeoutError):
                pass  # the client has left
            except BaseException as error:
                failures.append(error)

    def serve() -> None:
        while True:
            try:
                plays.append(Task(play, listening.accept()[0]))
            except TimeoutError:
                continue
            except OSError:
                return

    task = Task(serve)
    try:
        yield address_of(listening)
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        for thread in [task, *plays]:
            thread.result(2 * SECONDS)
        listening.close()
    if failures:
        raise failures[0]


@contextlib.contextmanager
def refusing(host: str = "127.0.0.1") -> Iterator[Address]:
    """Yield a port on which nobody listens and that nobody else can bind."""
    with socket.socket(
        socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM
    ) as sock:
        sock.bind((host, 0))
        yield address_of(sock)


@contextlib.contextmanager
def black_hole(host: str = "127.0.0.1") -> Iterator[Address]:
    """Yield a port that does not answer connection attempts: its backlog is full."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(listen(host, 0))
        while True:
            sock = stack.enter_context(socket.socket(listening.family, socket.SOCK_STREAM))
            sock.setblocking(False)
            sock.connect_ex(listening.getsockname())
            poll = select.poll()
            poll.register(sock, select.POLLOUT)
            if not poll.poll(100):
                break
        yield address_of(listening)


def udp(host: str = "127.0.0.1") -> socket.socket:
    """Return a UDP socket on a port that the kernel chooses."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, 0))
    sock.settimeout(SECONDS)
    return sock


def datagrams(sock: socket.socket, count: int) -> list[bytes]:
    """Return the next `count` datagrams."""
    return [sock.recv(65536) for _ in range(count)]


def nothing_comes(sock: socket.socket, seconds: float = 0.05) -> bool:
    """Return whether nothing can be read from `sock` for so long."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(seconds * 1000)


def read_exactly(sock: socket.socket, count: int) -> bytes:
    """Read `count` bytes."""
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        assert piece, f"closed after {data!r}"
        data += piece
    return data


def read_to_end(sock: socket.socket) -> bytes:
    """Read up to the end of the stream."""
    pieces = []
    while piece := sock.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def is_reset(sock: socket.socket) -> bool:
    """Read until the connection ends; return whether it ended by RST."""
    try:
        read_to_end(sock)
    except ConnectionResetError:
        return True
    return False


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
