"""The sockets that replies to clients of a transparent listener leave by.

A reply must have the address that the client wrote to, which is another machine's.  So each
address that replies come from has a socket bound to it (IP_TRANSPARENT), which all clients
share.  They are bounded in number, and those that have sent nothing for a while are closed.
Thread: any; expire() the janitor's.
"""

from __future__ import annotations

import errno
import threading

from netproxy.interfaces.addresses import Address, ip_text, pack_ip
from netproxy.interfaces.services import dropped
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.interfaces.datagrams import Arena, Destination, Run
    from netproxy.interfaces.services import Counter, Log
    from netproxy.net.datagram_socket import DatagramSocket
    from netproxy.net.udp_sockets import UdpSocketFactory

LIMIT = 1024
"""Sockets at the same time.  At the limit the oldest idle one is closed, else the oldest."""
GONE_LIMIT = 256
"""Sockets that wait for their end, at most a second.  At the limit no other one is opened."""
IDLE_SECONDS = 30.0
"""How long a socket that sends nothing is kept.  To open another one takes 30 microseconds."""
UNUSABLE = "unusable source"
"""The reason of replies whose source has no address that a datagram could come from."""


class _ReplySocket:
    """A socket, and when it was used."""

    __slots__ = ("socket", "active", "seen")

    def __init__(self, sock: DatagramSocket, now: float) -> None:
        self.socket = sock
        self.active = True
        """True if it has sent since the janitor last looked."""
        self.seen = now
        """Monotonic time at which the janitor last found it active."""


class ReplySockets:
    """The reply sockets of one listening address, by the raw address that they send from."""

    def __init__(self, sockets: UdpSocketFactory, counter: Counter, log: Log) -> None:
        self._factory = sockets
        self._counter = counter
        self._log = log
        # Guards changes of the attributes below.  Senders look sockets up without it.
        self._lock = threading.Lock()
        self._sockets: dict[bytes, _ReplySocket] = {}
        self._failed: set[bytes] = set()
        """Addresses for which no socket could be opened in this second."""
        self._gone: list[_ReplySocket] = []
        """Sockets to be closed at the next expire(): a thread may still send with them."""
        self._now = 0.0
        self._closed = False

    def __len__(self) -> int:
        """Return the number of sockets."""
        return len(self._sockets)

    def of(self, client: Address) -> ClientReplies:
        """Return what replies to one client leave by."""
        return ClientReplies(self, client, self._counter)

    def header(self, source: Address) -> bytes:
        """Return what stands for a source in front of its replies: its port, then its address.

        Returns nothing for a name, and for addresses that no other machine has.
        """
        packed = pack_ip(source.host.partition("%")[0])
        if packed is None or not source.port or _is_unusable(packed):
            return b""
        return source.port.to_bytes(2, "big") + packed

    def find(self, header: bytes) -> DatagramSocket | None:
        """Return the socket for a source; None if there is none to be had."""
        reply = self._sockets.get(header) or self._open(header)
        if reply is None:
            return None
        reply.active = True
        return reply.socket

    def expire(self, now: float) -> list[Callable[[], None]]:
        """Take the sockets out that are idle; return the calls that close those of last time."""
        with self._lock:
            self._now = now
            self._failed.clear()
            gone, self._gone = self._gone, []
            for header, reply in list(self._sockets.items()):
                if reply.active:
                    reply.active, reply.seen = False, now
                elif now - reply.seen >= IDLE_SECONDS:
                    self._gone.append(self._sockets.pop(header))
        return [reply.socket.close for reply in gone]

    def close(self) -> None:
        """Close all sockets; from now on none is opened."""
        with self._lock:
            self._closed = True
            replies = [*self._sockets.values(), *self._gone]
            self._sockets, self._gone = {}, []
        for reply in replies:
            reply.socket.close()

    def _open(self, header: bytes) -> _ReplySocket | None:
        address = Address(ip_text(header[2:]), int.from_bytes(header[:2], "big"))
        with self._lock:
            if self._closed or header in self._failed:
                return None
            if (reply := self._sockets.get(header)) is not None:
                return reply
            if len(self._sockets) >= LIMIT:
                if len(self._gone) >= GONE_LIMIT:
                    return None
                self._gone.append(self._sockets.pop(self._least_used()))
                self._counter.count("reply_sockets", "evicted")
            try:
                reply = _ReplySocket(self._factory.foreign(address), self._now)
            except OSError as error:
                self._failed.add(header)
                code = errno.errorcode.get(error.errno or 0, "")
                message = "cannot send replies from %s: %s"
                self._log.limited(("reply socket", code), message, address, error.strerror)
                return None
            self._sockets[header] = reply
        return reply

    def _least_used(self) -> bytes:
        idle = (header for header, reply in self._sockets.items() if not reply.active)
        return next(idle, None) or next(iter(self._sockets))


class ClientReplies:
    """What replies to one client leave by: the socket that has the address of their source.

    A ReplySocket of interfaces.datagrams.
    """

    __slots__ = ("_sockets", "_client", "_counter", "_destinations")

    def __init__(self, sockets: ReplySockets, client: Address, counter: Counter) -> None:
        self._sockets = sockets
        self._client = client
        self._counter = counter
        self._destinations: dict[int, Destination] = {}
        """By the length of a source's header: the client has one for each family at most."""

    def reply_destination(self, key: object) -> None:
        """Return None: each socket has a destination of its own."""

    def send(self, arena: Arena, run: Run, destination: None) -> None:
        """Send a run from the address in its header, without the header."""
        if run.header is None:
            self._drop(UNUSABLE, run)
            return
        source = run.header.data
        sock = self._sockets.find(source)
        if sock is None:
            self._drop("no reply socket", run)
            return
        to = self._destinations.get(len(source))
        if to is None:
            try:
                to = self._destinations[len(source)] = sock.destination(self._client)
            except ValueError:  # an IPv6 client has no use for replies from IPv4
                self._drop(UNUSABLE, run)
                return
        run.header = None
        sock.send(arena, run, to)

    def _drop(self, reason: str, run: Run) -> None:
        counter, client, count = self._counter, self._client.host, len(run.offsets)
        if not counter.refuse_unrecorded("drops", reason, client, count):
            counter.refuse(dropped(reason)._replace(client=client), count)


def _is_unusable(packed: bytes) -> bool:
    """Return whether no other machine has an address: it would deceive the client."""
    if len(packed) == 4:
        return packed[0] in (0, 127) or packed[0] >= 224
    return not any(packed[:15]) or packed[0] == 0xFF
