"""Load for limits.py: flows of many users, TCP and UDP, through a proxy to targets.

A pair of processes shares the flows of its users: Clients opens them, Targets is where they lead.
One of the two sends, the other counts what arrives, flow by flow.
"""

from __future__ import annotations

import base64
import select
import socket
import struct
import time
from typing import Callable, NamedTuple, Sequence

from load import SIZE, Process
from rig import SECONDS, SOL_UDP, UDP_GRO, UDP_SEGMENT, Endpoint, header, udp_socket

TCP, UDP = "tcp", "udp"
# Seconds between two looks at the clock while datagrams are due.
TICK = 0.001
# Seconds of its rate that a paced TCP flow sends at once.
PIECE_SECONDS = 0.04
# Datagrams or pieces after which a sender that is late looks after its sockets again.
AT_ONCE = 512
# Bytes of one send of a TCP flow that sends as much as it can, and of one receive.
BLOCK = 1 << 16
RECEIVED_AT_ONCE = 1 << 18
# Bytes before the data of a datagram from netproxyd: those of a target's IPv4 address.
HEADER = 10
PASSWORD = "p"


class Flow(NamedTuple):
    """A TCP connection or a UDP association. `number` is its place in the counts."""

    number: int
    user: str
    network: str


class Counts(NamedTuple):
    """Payload bytes by flow that have arrived up to a time, in monotonic seconds."""

    at: float
    moved: list[int]


class Pacer:
    """Calls functions in turn, so many times a second in all."""

    def __init__(self, sends: Sequence[Callable[[], None]], rate: float) -> None:
        self._sends = sends
        self._rate = rate
        self._started = time.monotonic()
        self.done = 0

    def run(self) -> None:
        """Call the functions that are due."""
        sends, count = self._sends, len(self._sends)
        for number in range(self.done, min(self.due(), self.done + AT_ONCE)):
            sends[number % count]()
            self.done = number + 1

    def due(self) -> int:
        """Return the number of calls that should have been made by now."""
        return int((time.monotonic() - self._started) * self._rate)


class Station(Process):
    """What both ends of the flows have in common: sending and counting."""

    def __init__(self, flows: Sequence[Flow], train: int) -> None:
        """Each send of a UDP flow has `train` datagrams."""
        self.flows = {flow.number: flow for flow in flows}
        self.train = train
        super().__init__()

    # -- calls

    def counts(self) -> Counts:
        """Return what has arrived so far."""
        if self.ended:
            raise SystemExit(f"the proxy has closed the connections of flows {self.ended}")
        return Counts(time.monotonic(), list(self.moved))

    def send(self, rates: dict[str, float]) -> None:
        """Send from now on: each flow of a network at its rate, in payload bytes per second.

        The rate 0 stands for as much as the flow takes, which only TCP flows know.
        """
        for network, rate in rates.items():
            numbers = [number for number, flow in self.flows.items() if flow.network == network]
            if not numbers:
                continue
            if rate:
                piece = SIZE * self.train if network == UDP else max(1, int(rate * PIECE_SECONDS))
                sends = [self.sender(number, piece) for number in numbers]
                self.pacers.append(Pacer(sends, rate / piece * len(sends)))
            else:
                for number in numbers:
                    self.watch_writable(self.sockets[number])

    def late(self) -> float:
        """Return the share of what was due, and has not been sent for want of time."""
        due = sum(pacer.due() for pacer in self.pacers)
        return 1 - sum(pacer.done for pacer in self.pacers) / due if due else 0.0

    # -- in its process

    def begin(self) -> None:
        self.moved = [0] * (max(self.flows, default=0) + 1)
        self.buffer = bytearray(RECEIVED_AT_ONCE)
        self.view = memoryview(self.buffer)
        self.pacers: list[Pacer] = []
        self.sockets: dict[int, socket.socket] = {}
        # Flows whose connections have ended.
        self.ended: list[int] = []
        self.poll = select.epoll()
        self.handlers: dict[int, Callable[[], None]] = {}
        self.watch(self.pipe.fileno(), super().serve)

    def watch(self, descriptor: int, handler: Callable[[], None]) -> None:
        """Call the handler whenever something can be read."""
        self.handlers[descriptor] = handler
        self.poll.register(descriptor, select.EPOLLIN)

    def watch_writable(self, sock: socket.socket) -> None:
        """Send as much as a TCP connection takes."""
        block = bytes(BLOCK)
        # What comes back meanwhile, such as the answer to the request, is left unread.
        self.handlers[sock.fileno()] = lambda: _send_some(sock, block)
        try:
            self.poll.register(sock, select.EPOLLOUT)
        except FileExistsError:
            self.poll.modify(sock, select.EPOLLOUT)

    def serve(self) -> None:
        handlers = self.handlers
        for descriptor, _ in self.poll.poll(TICK if self.pacers else None):
            handlers[descriptor]()
        for pacer in self.pacers:
            pacer.run()

    def watch_tcp(self, number: int, sock: socket.socket) -> None:
        """Count what arrives over a TCP connection."""
        sock.setblocking(False)
        self.sockets[number] = sock
        moved, buffer = self.moved, self.buffer

        def receive() -> None:
            try:
                count = sock.recv_into(buffer)
            except BlockingIOError:
                return
            except ConnectionError:
                count = 0
            moved[number] += count
            if not count:
                self.poll.unregister(sock)
                self.ended.append(number)

        self.watch(sock.fileno(), receive)

    def receive_datagrams(self, sock: socket.socket) -> tuple[int, int]:
        """Receive a train; return its bytes and those of each of its datagrams, 0 if none."""
        try:
            length, control, _, self.peer = sock.recvmsg_into(
                [self.buffer], 64, socket.MSG_DONTWAIT
            )
        except OSError:
            return 0, 0
        for level, kind, data in control:
            if (level, kind) == (SOL_UDP, UDP_GRO):
                return length, struct.unpack_from("=i", data)[0]
        return length, length

    def sender(self, number: int, piece: int) -> Callable[[], None]:
        """Return a function that sends a piece of a flow."""
        sock = self.sockets[number]
        if self.flows[number].network == UDP:
            datagram = self.datagram(number)
            if self.train > 1:
                sock.setsockopt(SOL_UDP, UDP_SEGMENT, len(datagram))
            data, to = datagram * self.train, self.destination(number)
            return lambda: _send_datagrams(sock, data, to)
        owed, block = 0, bytes(piece)

        def send() -> None:
            nonlocal owed
            owed += piece
            while owed >= piece and (sent := _send_some(sock, block)):
                owed -= sent

        return send

    def datagram(self, number: int) -> bytes:
        """Return the datagram that a flow sends."""
        raise NotImplementedError

    def destination(self, number: int) -> Endpoint | None:
        """Return where it goes; None if its socket is connected."""
        raise NotImplementedError


def _send_some(sock: socket.socket, data: bytes) -> int:
    try:
        return sock.send(data)
    except OSError:
        # It takes nothing now, or the other end, which counts, has gone.
        return 0


def _send_datagrams(sock: socket.socket, data: bytes, to: Endpoint | None) -> None:
    try:
        if to is None:
            sock.send(data)
        else:
            sock.sendto(data, to)
    except OSError:
        # A full buffer loses the datagrams.
        pass


def number_of(data: bytes | memoryview) -> int:
    """Return the flow that a datagram belongs to."""
    return int.from_bytes(data[:4], "big")


def payload(number: int) -> bytes:
    """Return the data of a flow's datagrams."""
    return number.to_bytes(4, "big") + bytes(SIZE - 4)


class Targets(Station):
    """A TCP and a UDP target. Each TCP connection begins with a request that names its flow."""

    def __init__(self, flows: Sequence[Flow], train: int) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._udp = udp_socket(gro=True)
        self.tcp: Endpoint = self._listening.getsockname()
        self.udp: Endpoint = self._udp.getsockname()
        super().__init__(flows, train)
        self._listening.close()
        self._udp.close()

    # -- calls

    def missing(self) -> list[int]:
        """Return the flows that nothing has come from yet."""
        return sorted(self.flows.keys() - self.sockets.keys())

    # -- in its process

    def begin(self) -> None:
        super().begin()
        self._peers: dict[int, Endpoint] = {}
        self.watch(self._listening.fileno(), self._accept)
        self.watch(self._udp.fileno(), self._receive)

    def _accept(self) -> None:
        sock, _ = self._listening.accept()
        request = b""

        def read() -> None:
            nonlocal request
            piece = sock.recv(4096)
            request += piece
            if piece and b"\r\n\r\n" not in request:
                return
            self.poll.unregister(sock)
            if piece:
                sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
                self.watch_tcp(int(request.split()[1].rpartition(b"/")[2]), sock)

        self.watch(sock.fileno(), read)

    def _receive(self) -> None:
        for _ in range(64):
            length, _ = self.receive_datagrams(self._udp)
            if not length:
                return
            number = number_of(self.view)
            self.moved[number] += length
            if number not in self._peers:
                self._peers[number] = self.peer
                self.sockets[number] = self._udp

    def datagram(self, number: int) -> bytes:
        return payload(number)

    def destination(self, number: int) -> Endpoint | None:
        return self._peers[number]


class Clients(Station):
    """The clients of a proxy: a connection or an association for each flow."""

    # -- calls

    def open(self, server: Endpoint, dialect: str, targets: tuple[Endpoint, Endpoint]) -> None:
        """Open the flows. `dialect` is a key of DIALECTS, `targets` a TCP and a UDP one."""
        for flow in self.flows.values():
            if flow.network == UDP:
                self._associate(server, flow, targets[1])
            else:
                request = f"/{flow.number} HTTP/1.0\r\n"
                sock = DIALECTS[dialect](server, flow.user, targets[0], request)
                self.watch_tcp(flow.number, sock)

    def greet(self, numbers: Sequence[int]) -> None:
        """Send a datagram from each of these associations, so that their sessions exist."""
        for number in numbers:
            if self.flows[number].network == UDP:
                self.sockets[number].send(self.datagram(number))

    # -- in its process

    def begin(self) -> None:
        super().begin()
        self._controls: list[socket.socket] = []
        self._headers: dict[int, bytes] = {}

    def _associate(self, server: Endpoint, flow: Flow, target: Endpoint) -> None:
        sock = udp_socket(gro=True)
        control = login(server, flow.user)
        answer = ask(control, 3, ("0.0.0.0", sock.getsockname()[1]))
        relay = socket.inet_ntoa(answer[4:8]), struct.unpack("!H", answer[8:10])[0]
        sock.connect((server[0] if relay[0] == "0.0.0.0" else relay[0], relay[1]))
        self._controls.append(control)
        self._headers[flow.number] = header(target)
        self.sockets[flow.number] = sock
        self.watch(sock.fileno(), lambda: self._receive(flow.number, sock))

    def _receive(self, number: int, sock: socket.socket) -> None:
        length, stride = self.receive_datagrams(sock)
        if length:
            self.moved[number] += length - HEADER * -(-length // stride)

    def datagram(self, number: int) -> bytes:
        return self._headers[number] + payload(number)

    def destination(self, number: int) -> Endpoint | None:
        return None


# -- how clients ask


def login(server: Endpoint, user: str) -> socket.socket:
    """Return a SOCKS5 connection of a user."""
    sock = socket.create_connection(server, SECONDS)
    sock.sendall(b"\5\1\2")
    name = user.encode()
    sock.sendall(b"\1" + bytes([len(name)]) + name + bytes([len(PASSWORD)]) + PASSWORD.encode())
    if exactly(sock, 4) != b"\5\2\1\0":
        raise SystemExit(f"the proxy refuses user {user}")
    return sock


def ask(sock: socket.socket, command: int, to: Endpoint) -> bytes:
    """Send a SOCKS5 request; return the answer."""
    sock.sendall(bytes([5, command]) + header(to)[2:])
    answer = exactly(sock, 10)
    if answer[:4] != b"\5\0\0\1":
        raise SystemExit(f"the proxy refuses a request: {answer[:4].hex()}")
    return answer


def connect_socks(server: Endpoint, user: str, to: Endpoint, request: str) -> socket.socket:
    """Ask with SOCKS5 CONNECT."""
    sock = login(server, user)
    ask(sock, 1, to)
    sock.sendall(f"GET {request}\r\n".encode())
    return sock


def connect_http(server: Endpoint, user: str, to: Endpoint, request: str) -> socket.socket:
    """Ask with HTTP CONNECT."""
    sock = socket.create_connection(server, SECONDS)
    sock.sendall(f"CONNECT {to[0]}:{to[1]} HTTP/1.1\r\n{_credentials(user)}\r\n".encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += exactly(sock, 1)
    if b" 200 " not in answer.partition(b"\r\n")[0]:
        raise SystemExit(f"the proxy refuses CONNECT: {answer!r}")
    sock.sendall(f"GET {request}\r\n".encode())
    return sock


def get_http(server: Endpoint, user: str, to: Endpoint, request: str) -> socket.socket:
    """Ask with a GET that the proxy passes on. Only the target can send."""
    sock = socket.create_connection(server, SECONDS)
    lines = f"GET http://{to[0]}:{to[1]}{request}Host: {to[0]}:{to[1]}\r\n{_credentials(user)}\r\n"
    sock.sendall(lines.encode())
    return sock


def _credentials(user: str) -> str:
    token = base64.b64encode(f"{user}:{PASSWORD}".encode()).decode()
    return f"Proxy-Authorization: Basic {token}\r\n"


def exactly(sock: socket.socket, count: int) -> bytes:
    """Return the next `count` bytes."""
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise SystemExit("the proxy has closed a connection")
        data += piece
    return data


SOCKS, CONNECT, GET = "SOCKS5", "CONNECT", "GET"
DIALECTS = {SOCKS: connect_socks, CONNECT: connect_http, GET: get_http}
