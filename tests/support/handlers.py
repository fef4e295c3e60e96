"""What tests of handlers need: recorders, a client that talks to one handler, a relay to check.

A Conversation drives a handler on a thread over a loopback connection.  Its dialer records
what is dialled, and returns one end of another loopback connection.  Nothing here sleeps to
wait: reads have a deadline that only a failing test meets.
"""

from __future__ import annotations

import fcntl
import os
import queue
import select
import socket
import struct
import termios
import threading
import time
from typing import Any, Callable, Hashable, Iterable, Mapping

from netproxy.access.login import Login
from netproxy.access.permission import Permission
from netproxy.access.users import Users
from netproxy.errors import DialError, NetProxyError, Reason
from netproxy.handler.announce import Announcer
from netproxy.handler.bind import Binder
from netproxy.handler.outbound import Outbound
from netproxy.handler.socks.socks4 import Socks4Handler
from netproxy.handler.socks.socks5 import Socks5Handler, Socks5Login
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.connections import Handler
from netproxy.interfaces.flows import Flow, LiveFlow, Record
from netproxy.interfaces.listeners import ALL_CLIENTS
from netproxy.net.address import from_sockaddr
from netproxy.net.stream import Stream, complete
from netproxy.observe.metrics import Counters
from netproxy.interfaces.services import Counter, Trace
from netproxy.observe.records import as_text
from netproxy.observe.trace import LogTrace
from netproxy.relay.pipe import PipeLimits
from tests.support.logins import FailureCounts
from tests.support.accounts import account_book, standing
from tests.support.flows import OneUpstream
from tests.support.sockets import SECONDS
from tests.support.waits import run_to_end

LOCALHOST = "127.0.0.1"
PIPE_LIMITS = PipeLimits(idle=10 * SECONDS, half_close=10 * SECONDS)
_RESET = struct.pack("@ii", 1, 0)


def eventually(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    """Wait for a condition of which no event tells: descriptors, threads, counters."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.002)


def descriptors() -> int:
    """Return the number of open descriptors."""
    return len(os.listdir("/proc/self/fd"))


def tcp_pair(
    client: str = LOCALHOST, server: str = LOCALHOST
) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a loopback connection from `client` to `server`, the client's first."""
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with socket.create_server((server, 0), family=family) as listening:
        near = socket.create_connection(listening.getsockname()[:2], SECONDS, (client, 0))
        far, _ = listening.accept()
    for sock in (near, far):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


def refused(address: Address) -> bool:
    """Return whether nobody listens there."""
    try:
        socket.create_connection(address, SECONDS).close()
    except ConnectionRefusedError:
        return True
    return False


def silent(sock: socket.socket) -> bool:
    """Return whether nothing has come until now, nor an end."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(0)


class RecordingLog:
    """A Log and an Observer."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.limited_keys: list[Hashable] = []
        self.faults: list[str] = []
        self.records: list[Record] = []

    def _say(self, message: str, *values: object) -> None:
        self.lines.append(message % values if values else message)

    debug = info = warning = error = _say

    def limited(self, key: Hashable, message: str, *values: object) -> None:
        if key not in self.limited_keys:
            self.limited_keys.append(key)
            self._say(message, *values)

    def exception(self, doing: str) -> None:
        self.faults.append(doing)

    def auth_failed(self, client: str, user: str, listener: str) -> None:
        self._say("auth_failed client=%s user=%s listener=%s", client, user, listener)

    def record(self, level: int, fields: Mapping[str, object]) -> None:
        self._say("%s", as_text(fields))

    tracing = False

    def trace(self, listener: str, client: Address) -> Trace:
        return LogTrace(self, listener, client)

    level = "info"
    recent: tuple[str, ...] = ()

    def expire(self, now: float) -> tuple[()]:
        """Expire nothing: the daemon registers its log with the janitor."""
        return ()

    def began(self, live: LiveFlow, dialled: float | None = None) -> None:
        """Note nothing."""

    def finished(self, record: Record) -> None:
        self.records.append(record)


class RecordingDialer:
    """A dialer that returns one end of a loopback connection; target() returns the other.

    It waits until `gate` is set, and fails with `failure` if that is set.
    """

    name = "recording"
    refusal = Reason.UNSUPPORTED
    symmetric = knows_bound = False
    resolves_names = True

    def __init__(
        self, failure: Reason | None = None, carries: Iterable[str] = ("tcp", "udp", "bind")
    ) -> None:
        self.carries = frozenset(carries)
        self.failure = failure
        self.dialled: list[Address] = []
        self.asked = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self._targets: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()

    def dial(self, flow: Flow) -> Stream:
        self.dialled.append(flow.target)
        self.asked.set()
        assert self.gate.wait(SECONDS)
        if self.failure:
            raise DialError(self.failure, str(flow.target))
        near, far = tcp_pair()
        near.settimeout(None)
        far.settimeout(SECONDS)
        self._targets.put(far)
        return Stream(near)

    def dial_packet(self, flow: Flow) -> Any:
        raise DialError(self.failure or Reason.UNSUPPORTED)

    def target(self) -> socket.socket:
        return self._targets.get(timeout=SECONDS)


def resolve(address: Address) -> list[Address]:
    """Resolve literal addresses and localhost."""
    if address.host == "localhost":
        return [address._replace(host=host) for host in ("::1", LOCALHOST)]
    if pack_ip(address.host) is None:
        raise DialError(Reason.NAME, address.host)
    return [address]


class LiteralResolver:
    """Resolves literal addresses and localhost."""

    def resolve(self, target: Address, seconds: float = 0.0) -> list[Address]:
        return resolve(target)

    def known(self, target: Address) -> list[Address]:
        return resolve(target)


def permission(login: Login | None = None, counter: Counter | None = None) -> Permission:
    """Return the permission of a listener for all clients; without `login` nobody logs in."""
    login = login or Login(Users({}), "none")
    return Permission("test", login, ALL_CLIENTS, counter or Counters(), standing())


class HandlerDependencies:
    """Recorders that handlers are built on."""

    def __init__(
        self,
        users: dict[str, str] | None = None,
        auth: str = "none",
        failure: Reason | None = None,
        bind_seconds: float = SECONDS,
        announcer: Announcer | None = None,
    ) -> None:
        self.counters = Counters()
        self.log = RecordingLog()
        self.dialer = RecordingDialer(failure)
        self.router = OneUpstream(self.dialer)
        self.accounts = account_book()
        self.outbound = Outbound(self.router, PIPE_LIMITS, self.counters, self.log, self.accounts)
        announcer = announcer or Announcer([])
        self.binder = Binder(announcer, self.counters, bind_seconds)
        self.login = Login(Users(users or {}), auth, FailureCounts(self.counters))
        self.permission = permission(self.login, self.counters)

    def socks4(self) -> Socks4Handler:
        return Socks4Handler("test", self.outbound, self.binder, self.permission)

    def socks5(self) -> Socks5Handler:
        return Socks5Handler("test", self.outbound, self.binder, None, Socks5Login(self.permission))

    @property
    def dialled(self) -> list[Address]:
        return self.dialer.dialled

    def untouched(self) -> bool:
        """Return whether nothing was dialled, nor even routed."""
        return not self.dialer.dialled and not self.router.flows


class Conversation:
    """A client's end of a connection, and the handler that serves it on a thread.

    At the end of the context the handler must have returned.
    """

    def __init__(
        self,
        handler: Handler,
        client: str = LOCALHOST,
        server: str = LOCALHOST,
        deadline: float = SECONDS,
    ) -> None:
        self.socket, self._served = tcp_pair(client, server)
        self.local = from_sockaddr(self.socket.getsockname())
        self.raised: BaseException | None = None
        stream = Stream(self._served)
        stream.limit(deadline)
        self._thread = threading.Thread(target=self._serve, args=(handler, stream), daemon=True)
        self._thread.start()

    def _serve(self, handler: Handler, stream: Stream) -> None:
        try:
            run_to_end(complete(handler.handle(stream, self.local)))
        except Exception as error:
            self.raised = error
        finally:
            stream.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def trickle(self, data: bytes) -> None:
        """Send byte by byte: the next one when the handler has received the last."""
        for at in range(len(data)):
            self.socket.sendall(data[at : at + 1])
            eventually(self._all_taken)

    def expect(self, data: bytes) -> None:
        received = self.read(len(data))
        assert received == data

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count and (piece := self.socket.recv(count - len(data))):
            data += piece
        return data

    def expect_end(self) -> None:
        """Check that the stream ends, without another byte."""
        assert self.socket.recv(64) == b""

    def expect_closed(self) -> None:
        """Check that the stream ends or is reset, without another byte."""
        try:
            assert self.socket.recv(64) == b""
        except ConnectionResetError:
            pass

    def silent(self) -> bool:
        """Return whether nothing has come until now."""
        return silent(self.socket)

    def wait(self) -> None:
        """Wait until the handler has returned."""
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        assert self.raised is None or isinstance(self.raised, NetProxyError), repr(self.raised)

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close()
        if kind is None:
            self.wait()

    def _all_taken(self) -> bool:
        try:
            left = fcntl.ioctl(self._served.fileno(), termios.FIONREAD, b"\0\0\0\0")
        except (OSError, ValueError):
            return True  # closed meanwhile
        return left == b"\0\0\0\0"


def check_relay(client: Conversation, target: socket.socket) -> None:
    """Check that bytes pass both ways, and the ends of both streams."""
    with target:
        client.send(b"up")
        assert target.recv(16) == b"up"
        target.sendall(b"down")
        client.expect(b"down")
        client.socket.shutdown(socket.SHUT_WR)
        assert target.recv(16) == b""
        target.sendall(b"late")
        client.expect(b"late")
    client.expect_end()
    client.wait()
