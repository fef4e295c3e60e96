"""What clients do while system calls of the daemon fail: each is served, or sees a failure.

A scenario returns True if the client got all that it asked for.  Wrong bytes and silence
fail the test.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
from typing import Callable, Iterator, NamedTuple

from netproxy.interfaces.addresses import Address
from netproxy.protocol import socks5, uot
from tests.support.relays import Running
from tests.support.sockets import SECONDS, Task, read_exactly, server

PATIENCE = SECONDS
"""Seconds for what should happen at once."""
DATA = random.Random(5).randbytes(1 << 20)
"""More than the buffers of a relay, so that it takes a thread and a pipe."""
DATAGRAMS = 4
_PIECE = 1000
_LOOK_SECONDS = 0.02
_LOCALHOST = "127.0.0.1"


class Failed(Exception):
    """The client has seen a failure: a refusal, a reset, an early end."""


class Targets(NamedTuple):
    """What clients reach through the daemon."""

    tcp: Address
    """Sends everything back."""
    http: Address
    """Answers each request with DATA's first bytes."""
    udp: Address
    """Sends everything back."""
    proxy: Address
    """A SOCKS5 proxy whose targets all send everything back."""


Play = Callable[[Running, Targets], None]
"""Raises Failed, or OSError, for a client that is not served."""


class Scenario(NamedTuple):
    """What a client does."""

    play: Play
    config: str
    """Of the daemon; {proxy} stands for an address of Targets."""

    def served(self, daemon: Running, targets: Targets) -> bool:
        """Play; return whether the client was served."""
        try:
            self.play(daemon, targets)
        except TimeoutError as error:
            raise AssertionError("the client waits in vain") from error
        except (Failed, OSError):
            return False
        return True


@contextlib.contextmanager
def targets() -> Iterator[Targets]:
    """Serve them."""

    def echo(sock: socket.socket) -> None:
        while data := sock.recv(65536):
            sock.sendall(data)

    def play_proxy(sock: socket.socket) -> None:
        # The greeting, and a request with an IPv4 address; the daemon may give up early.
        for size, answer in ((3, b"\5\0"), (10, b"")):
            if len(sock.recv(size, socket.MSG_WAITALL)) < size:
                return
            sock.sendall(answer)
        sock.sendall(b"\5\0\0\1" + bytes(6))
        echo(sock)

    def answer(sock: socket.socket) -> None:
        while sock.recv(65536).endswith(b"\r\n\r\n"):
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % _PIECE + DATA[:_PIECE])

    with server(echo) as tcp, server(answer) as http, server(play_proxy) as proxy:
        with _udp_echo() as udp:
            yield Targets(tcp, http, udp, proxy)


@contextlib.contextmanager
def _udp_echo() -> Iterator[Address]:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((_LOCALHOST, 0))

    def echo() -> None:
        while True:
            data, peer = sock.recvfrom(65536)
            if data == b"stop":
                return
            sock.sendto(data, peer)

    task = Task(echo)
    try:
        yield Address(*sock.getsockname())
    finally:
        sock.sendto(b"stop", sock.getsockname())
        task.result(PATIENCE)
        sock.close()


def _connected(daemon: Running) -> socket.socket:
    sock = socket.create_connection((_LOCALHOST, daemon.port), PATIENCE)
    # Otherwise a small piece behind another one waits for an acknowledgement.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _expect(sock: socket.socket, count: int) -> bytes:
    """Read exactly `count` bytes.  Raises Failed if the connection ends before."""
    try:
        return read_exactly(sock, count)
    except AssertionError as error:
        raise Failed from error


def _request(sock: socket.socket, command: int, target: Address) -> Address:
    """Make a SOCKS5 request; return BND.  Raises Failed for a refusal."""
    sock.sendall(b"\5\1\0")
    if _expect(sock, 2) != b"\5\0":
        raise Failed
    sock.sendall(socks5.encode_request(command, target))
    return _read_reply(sock)


def _read_reply(sock: socket.socket) -> Address:
    version, reply, _, kind = _expect(sock, 4)
    assert version == 5 and kind in (1, 4), (version, reply, kind)
    raw = _expect(sock, 6 if kind == 1 else 18)
    if reply:
        raise Failed(reply)
    return socks5.parse_target(bytes((kind,)) + raw)


def _echo(sock: socket.socket, data: bytes) -> None:
    """Send data and read it back, both at once."""
    task = Task(sock.sendall, data)
    try:
        received = _expect(sock, len(data))
    finally:
        with contextlib.suppress(OSError):
            task.result(PATIENCE)
    assert received == data


def _end(sock: socket.socket) -> None:
    """Half-close, and read to the end that the target sends back."""
    sock.shutdown(socket.SHUT_WR)
    assert sock.recv(1) == b""


# -- what clients do


def connect(daemon: Running, targets: Targets) -> None:
    """Connect to a literal address: what the poller's thread does alone."""
    with _connected(daemon) as sock:
        _request(sock, socks5.CONNECT, targets.tcp)
        _echo(sock, DATA[:_PIECE])
        _end(sock)


def connect_by_name(daemon: Running, targets: Targets) -> None:
    """Connect to a name with two addresses, of which one refuses."""
    with _connected(daemon) as sock:
        _request(sock, socks5.CONNECT, Address("two.test", targets.tcp.port))
        _echo(sock, DATA[:_PIECE])
        _end(sock)


def bulk(daemon: Running, targets: Targets) -> None:
    """Move much both ways: a thread, and pipes in the kernel."""
    with _connected(daemon) as sock:
        _request(sock, socks5.CONNECT, targets.tcp)
        _echo(sock, DATA)
        _end(sock)


def forward(daemon: Running, targets: Targets) -> None:
    """Make two HTTP requests on one connection."""
    with _connected(daemon) as sock:
        for _ in range(2):
            sock.sendall(f"GET http://{targets.http}/ HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += _expect(sock, 1)
            if not head.startswith(b"HTTP/1.1 200 "):
                raise Failed(head)
            assert _expect(sock, _PIECE) == DATA[:_PIECE]


def bind(daemon: Running, targets: Targets) -> None:
    """Wait for a peer, which sends and gets bytes."""
    with _connected(daemon) as sock:
        bound = _request(sock, socks5.BIND, Address("0.0.0.0", 0))
        with socket.create_connection(bound, PATIENCE) as peer:
            _read_reply(sock)
            for near, far in ((sock, peer), (peer, sock)):
                near.sendall(DATA[:_PIECE])
                assert _expect(far, _PIECE) == DATA[:_PIECE]


def associate(daemon: Running, targets: Targets) -> None:
    """Send datagrams; each comes back, or is counted as dropped."""
    with _connected(daemon) as control, _udp_socket() as sock:
        hint = Address("0.0.0.0", sock.getsockname()[1])
        sock.connect(_request(control, socks5.UDP_ASSOCIATE, hint))
        for number in range(DATAGRAMS):
            payload = DATA[number : number + 100]
            before = _dropped(daemon)
            sock.send(socks5.encode_header(targets.udp) + payload)
            if not _comes(sock, control, daemon, before):
                raise Failed("dropped")
            data = sock.recv(65536)
            skip = socks5.header_length(data)
            assert (socks5.parse_target(data[3:skip]), data[skip:]) == (targets.udp, payload)


def _udp_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((_LOCALHOST, 0))
    sock.settimeout(PATIENCE)
    return sock


def _dropped(daemon: Running) -> int:
    return sum(daemon.drops().values())


def _comes(sock: socket.socket, control: socket.socket, daemon: Running, before: int) -> bool:
    """Return whether a datagram comes, before one is counted as dropped or all ends."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    poll.register(control, select.POLLIN)
    for _ in range(round(PATIENCE / _LOOK_SECONDS)):
        ready = dict(poll.poll(_LOOK_SECONDS * 1000))
        if sock.fileno() in ready:
            return True
        if control.fileno() in ready or _dropped(daemon) != before:
            return False
    raise TimeoutError


def datagrams_in_a_stream(daemon: Running, targets: Targets) -> None:
    """Send datagrams as UDP over TCP."""
    with _connected(daemon) as sock:
        _request(sock, socks5.CONNECT, Address(uot.MAGIC, 443))
        sock.sendall(uot.encode_request(uot.UotRequest(False, targets.udp)))
        prefix = uot.encode_address(targets.udp)
        for number in range(DATAGRAMS):
            payload = DATA[number : number + 100]
            frame = prefix + struct.pack(">H", len(payload)) + payload
            before = _dropped(daemon)
            sock.sendall(frame)
            if not _comes(sock, sock, daemon, before):
                raise Failed("dropped")
            assert _expect(sock, len(frame)) == frame


_SPS = "listeners: [{{listen: '127.0.0.1:0'}}]\n"
_NAMED = _SPS + "dns: {{hosts: {{two.test: ['127.0.0.2', '127.0.0.1']}}}}\n"
_QUICK = "timeouts: {{half_close: 2s}}\n"
SCENARIOS = {
    "connect": Scenario(connect, _SPS + _QUICK),
    "name": Scenario(connect_by_name, _NAMED + _QUICK),
    "bulk": Scenario(bulk, _SPS + _QUICK),
    "chain": Scenario(connect, _SPS + "default: 'socks5://{proxy}'\n" + _QUICK),
    "forward": Scenario(forward, _SPS + _QUICK),
    "bind": Scenario(bind, _SPS + _QUICK),
    "associate": Scenario(associate, _SPS + "udp: {{batching: auto}}\n"),
    "associate, single": Scenario(associate, _SPS + "udp: {{batching: single}}\n"),
    "uot": Scenario(datagrams_in_a_stream, _SPS),
}
