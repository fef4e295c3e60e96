"""The client's side of direct paths: an upstream whose bridge may have its datagrams go directly.

Each request for connect-udp tells the bridge of the wish.  The bridge answers beside the datagrams
of the requests.  Socket and threads exist while there are requests, and a moment longer.
Thread: any.
"""

from __future__ import annotations

import os
import threading
import time
from functools import partial

from netproxy.errors import StreamError
from netproxy.net.frames.framed import FramedConn
from netproxy.protocol import tunnel
from netproxy.protocol.http.capsule import Capsules
from netproxy.protocol.tunnels import direct, wish
from netproxy.protocol.tunnels.direct import MessageCapsules
from netproxy.tunnel.direct.end import DirectEnd
from netproxy.tunnel.path.agent import AgentPaths
from netproxy.typed import TYPE_CHECKING, Callable, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.answers import DirectRow
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import Destination, PacketConn
    from netproxy.interfaces.services import Counter
    from netproxy.protocol.tunnel import TunnelMessage
    from netproxy.protocol.tunnels.direct import DirectFlow
    from netproxy.tunnel.path.owner import PathServices
    from netproxy.tunnel.pool import Submit

IDLE_SECONDS = 60.0
"""Socket and threads are kept for so long without a request: longer than a dial takes, and than
the bridge keeps a client."""


WAITING_LIMIT = 64
"""Flows that wait for the offer of their pair, which another stream brings a moment later."""


class DatagramDialer(Protocol):
    """Opens packet connections to the bridge.  Thread: the dial pool's."""

    def __call__(self, host: str, port: int) -> tuple[PacketConn, Destination]:
        """Return a connection, and the bridge at `host` as its destination.

        `port`: as in PathOffer.  Blocks.  Raises DialError.
        """


class _Meeting:
    """What one wish has led to: the paths to the bridge and to agents."""

    def __init__(self, services: PathServices, submit: Submit, dial: DatagramDialer) -> None:
        self.identifier = os.urandom(wish.WISH_SIZE)
        self.paths = AgentPaths(services, submit, self._dial, _no_flow)
        self.end = self.paths.direct = DirectEnd(self.paths)
        self.requests: list[_Request] = []
        """Those whose streams have not ended; guarded by the lock of DirectClient."""
        self.host = ""
        """The address of the bridge: its name may stand for several machines."""
        self.used = time.monotonic()
        self._dial_bridge = dial
        # Guards _waiting: flows whose pair is not known yet, as another stream brings its offer.
        self._lock = threading.Lock()
        self._waiting: list[tuple[_Request, DirectFlow]] = []

    def obey(self, message: TunnelMessage) -> None:
        """Obey a message about paths.  Raises ProtocolError."""
        self.paths.obey(message)
        if message.kind == tunnel.DIRECT_OFFER:
            self.use_waiting()

    def wait(self, request: _Request, offer: DirectFlow) -> None:
        """Use a flow once its pair is known."""
        with self._lock:
            self._waiting = [*self._waiting[1 - WAITING_LIMIT :], (request, offer)]
        # The offer may just have come.
        self.use_waiting()

    def use_waiting(self) -> None:
        """Use the flows whose pairs are known by now."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        left = [(request, offer) for request, offer in waiting if not request.use(offer)]
        if left:
            with self._lock:
                self._waiting = [*left, *self._waiting][-WAITING_LIMIT:]

    def _dial(self, port: int) -> tuple[PacketConn, Destination]:
        return self._dial_bridge(self.host, port)


def _no_flow(path: int, flow: int) -> None:
    """Attach nothing: the path to the bridge carries no flows of a client."""


class _Request:
    """One request, from its wish to the end of its stream."""

    def __init__(self, meeting: _Meeting) -> None:
        self._meeting = meeting
        self.conn: FramedConn | None = None

    def is_open(self) -> bool:
        """Return whether the stream has not ended; if it has, forget it, which refers to this."""
        if self.conn is not None and self.conn.closed:
            self.conn = None
        return self.conn is not None

    def obey(self, message: TunnelMessage) -> None:
        """Obey a message of the bridge.  Raises ProtocolError.  Thread: the session's."""
        if message.kind != tunnel.DIRECT_FLOW:
            self._meeting.obey(message)
            return
        offer = direct.parse_flow(message.value)
        if not self.use(offer):
            self._meeting.wait(self, offer)

    def use(self, offer: DirectFlow) -> bool:
        """Send directly from now on; return False if the pair is not known yet."""
        conn = self.conn
        if conn is None or conn.closed:
            return True
        flow = self._meeting.end.client_flow(offer)
        if flow is None:
            return False
        conn.send_beside(flow)
        if conn.closed:
            # It has ended meanwhile.
            flow.close()
        return True


class ClientKeeper(Protocol):
    """Looks after the clients that have requests.  Thread: any."""

    def add(self, client: DirectClient) -> None:
        """Call expire() once a second from now on."""

    def remove(self, client: DirectClient) -> None:
        """Call it no more."""


class DirectClient:
    """The direct paths of one upstream (dialer.http.DirectUpstream)."""

    def __init__(
        self, services: PathServices, submit: Submit, dial: DatagramDialer, keeper: ClientKeeper
    ) -> None:
        """`submit` runs a call on the dial pool, where `dial` opens the socket.

        `keeper` looks after the client as long as there are requests.
        """
        self._services = services
        self._submit = submit
        self._dial = dial
        self._keeper = keeper
        # Guards the two, and the requests of the meeting.
        self._lock = threading.Lock()
        self._meeting: _Meeting | None = None
        """The keeper looks after the client as long as there is one."""
        self._closed = False

    def wish(self) -> tuple[bytes, bytes] | None:
        """Return the field of a request that asks for a direct path; None if there can be none."""
        if self._services.make_cipher is None:
            return None
        with self._lock:
            if self._closed:
                return None
            meeting = self._meeting
            if meeting is None:
                meeting = self._meeting = _Meeting(self._services, self._submit, self._dial)
                self._keeper.add(self)
            meeting.used = time.monotonic()
            return wish.encode_wish(meeting.identifier)

    def connect(self, stream: Stream, target: Address, counter: Counter) -> FramedConn:
        """Return the packet connection of a request that the bridge has accepted.

        `counter`: of its flow.  Raises DialError; then the stream is closed.
        """
        meeting = self._meeting
        if meeting is None:
            # The dial has taken longer than a meeting is kept.
            return FramedConn(stream, Capsules(target), counter)
        try:
            meeting.host = stream.peer_address().host
        except StreamError:
            pass  # the stream has just ended
        request = _Request(meeting)
        conn = request.conn = FramedConn(stream, MessageCapsules(target, request.obey), counter)
        # Whoever reads it is told where datagrams beside it go, before there are any.
        conn.deliverer = conn
        with self._lock:
            meeting.requests.append(request)
        return conn

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Return what ends the socket if nothing has needed it (interfaces.services.Expirable)."""
        with self._lock:
            meeting = self._meeting
            if meeting is None:
                return ()
            meeting.requests = [request for request in meeting.requests if request.is_open()]
            if meeting.requests:
                meeting.used = now
            if now - meeting.used < IDLE_SECONDS:
                return (meeting.paths.fill,)
            self._meeting = None
            self._keeper.remove(self)
        return (partial(self._close_soon, meeting),)

    def _close_soon(self, meeting: _Meeting) -> None:
        """Close on the dial pool: it waits for threads, which the janitor does not."""
        self._submit(meeting.paths.close)

    def close(self) -> None:
        """End all paths, for good."""
        with self._lock:
            self._closed = True
            meeting, self._meeting = self._meeting, None
            if meeting is not None:
                self._keeper.remove(self)
        if meeting is not None:
            meeting.paths.close()

    def describe(self) -> list[DirectRow]:
        """Return the direct paths, for netproxyctl."""
        meeting = self._meeting
        return meeting.end.describe() if meeting is not None else []
