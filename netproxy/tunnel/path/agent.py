"""The agent's side of datagram paths: takes what its bridge offers, and reads their one socket.

An AgentPaths lasts as long as one session with the bridge, whatever becomes of the session's
connections.  The socket is a packet connection through the same upstream as the tunnel; it is
dialled on the dial pool, and read by a thread of its own, which delivers the datagrams as well.
"""

from __future__ import annotations

import math
import threading
import time

from netproxy.errors import DialError, NetProxyError, Reason
from netproxy.protocol import tunnel
from netproxy.protocol.tunnels.path import parse_offer
from netproxy.tunnel.direct.origin import ConnOrigin
from netproxy.tunnel.path.keys import Epoch
from netproxy.tunnel.path.owner import PathSet
from netproxy.tunnel.path.dependencies import PathDependencies
from netproxy.tunnel.path.path import Path
from netproxy.tunnel.path.remote import Remote
from netproxy.tunnel.path.sealing import Opener, Sealer
from netproxy.tunnel.streams.attaching import FlowAttacher
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.datagrams import Destination, PacketConn
    from netproxy.protocol.tunnel import TunnelMessage
    from netproxy.protocol.tunnels.path import FlowOffer, PathOffer
    from netproxy.tunnel.path.dependencies import DirectPaths, PathSocketDialer
    from netproxy.tunnel.path.flows import PathFlow
    from netproxy.tunnel.path.owner import PathServices
    from netproxy.tunnel.pool import Submit
    from netproxy.tunnel.streams.attaching import FlowDialer

AGAIN_SECONDS = 5.0
"""Until a socket is dialled again that could not be had, or has ended."""

PATHS_LIMIT = 64
"""Paths of one session: a bridge has one for each of its processes at the most."""

JOIN_SECONDS = 2.0
"""How long close() waits for the thread."""


class AgentPaths(PathSet):
    """The paths of one session with a bridge."""

    def __init__(
        self, services: PathServices, submit: Submit, dial: PathSocketDialer, dial_flow: FlowDialer
    ) -> None:
        """`submit` runs a call on the dial pool; `dial` opens the socket there.

        `dial_flow` dials there as well.
        """
        super().__init__(services)
        self._attacher = FlowAttacher(dial_flow, submit, services.log)
        self._has_moved = False
        self.submit = submit
        self._dial = dial
        # Guards all below.
        self._lock = threading.Lock()
        self._paths: dict[int, Path] = {}
        self._stale: set[int] = set()
        """Paths that the bridge has not offered since the session was resumed."""
        self._port = 0
        self._remote: Remote | None = None
        self.origin: ConnOrigin | None = None
        """The socket, None while there is none."""
        self._reader: threading.Thread | None = None
        self._is_dialling = False
        self._next_dial = 0.0
        self._doubted = math.inf
        """When a socket is given up by which no path is up; in monotonic seconds."""
        self._closed = False
        self.direct: DirectPaths | None = None
        """The direct paths that share the socket; None without any.  Set at once."""

    # -- what the bridge says; thread: the agent's

    def obey(self, message: TunnelMessage) -> None:
        """Obey PATH_OFFER, PATH_END or a message of a direct path.  Raises ProtocolError."""
        if message.kind == tunnel.PATH_OFFER:
            self._take_offer(parse_offer(message.value))
        elif message.kind == tunnel.PATH_END:
            self._end_path(tunnel.parse_number(message.value))
        elif self.direct is not None:
            self.direct.obey(message)

    def _take_offer(self, offer: PathOffer) -> None:
        """Use a path, or the next key of one."""
        make, now = self.services.make_cipher, time.monotonic()
        assert make is not None  # nothing is asked for without
        sealer = Sealer(make(offer.bridge_key), offer.bridge_id)
        epoch = Epoch(offer.agent_id, sealer, Opener(make(offer.agent_key)), now)
        with self._lock:
            path = self._paths.get(offer.number)
            self._port = offer.port
            self._stale.discard(offer.number)
        if path is not None:
            self.table.add(path, epoch)
            path.use(epoch)
            return
        if len(self._paths) >= PATHS_LIMIT:
            return
        arenas = self.services.arenas
        path = Path(offer.number, epoch, PathDependencies(self, arenas, True, float("inf")))
        try:
            self.add(path, epoch)
        except RuntimeError as error:
            self.services.log.warning("tunnel: no datagram path: %s", error)
            return
        with self._lock:
            self._paths[offer.number] = path
            remote = self._remote
        if remote is not None:
            path.lead_to(remote)
        self.fill()

    def _end_path(self, number: int) -> None:
        """Use a path no more."""
        with self._lock:
            path = self._paths.pop(number, None)
        if path is not None:
            self.drop(path)

    def resume(self, dial: PathSocketDialer) -> None:
        """Go on beside another control connection: attach other work connections to all flows.

        `dial` opens the next socket.  The present one is given up unless it works soon: its address
        may be the former one.
        """
        paths, is_up = self._all(), self.is_up
        with self._lock:
            self._dial, self._stale, remote = dial, set(self._paths), self._remote
            self._doubted = math.inf if is_up else time.monotonic() + AGAIN_SECONDS
        for path in paths:
            for flow in path.flows.all():
                self._attacher.add(path.number, flow)
        self._attacher.fill()
        for path in () if is_up or remote is None else paths:
            path.lead_to(remote)

    def note_offered(self) -> None:
        """Note that the bridge has offered what there is, and lets the session be resumed.

        Paths that it has not offered again have ended while the agent could not be told.
        """
        with self._lock:
            stale, self._stale = self._stale, set()
        for number in stale:
            self._end_path(number)
        for path in self._all():
            path.is_resumable = True

    def path(self, number: int) -> Path | None:
        """Return a path, None if it is not there."""
        with self._lock:
            return self._paths.get(number)

    def flow(self, offer: FlowOffer, is_addressed: bool) -> PathFlow | None:
        """Return a flow that the bridge offers, None if its path is not there."""
        path = self.path(offer.path)
        return path.flows.add(offer.flow, is_addressed) if path is not None else None

    # -- the socket

    def fill(self) -> None:
        """Dial the socket if there is none and it is time to, and for flows that need a stream."""
        self._attacher.fill()
        self._give_up_socket()
        if self.direct is not None:
            self.direct.report(time.monotonic())
        with self._lock:
            wanted = bool(self._paths) and self.origin is None and not self._is_dialling
            if self._closed or not wanted or time.monotonic() < self._next_dial:
                return
            self._is_dialling = True
        if not self.submit(self._open):
            self._settle_dial(None)

    def _give_up_socket(self) -> None:
        """End a socket by which no path has come up since the session was resumed."""
        with self._lock:
            is_over = time.monotonic() >= self._doubted
            self._doubted = math.inf if is_over else self._doubted
            origin = self.origin if is_over else None
        if origin is not None and not self.is_up:
            origin.conn.shutdown()

    def _open(self) -> None:
        """Dial the socket and read it.  Thread: the dial pool's."""
        conn: PacketConn | None = None
        try:
            conn, destination = self._dial(self._port)
            self._start(conn, destination)
        except NetProxyError as error:
            if not self._closed:
                self.services.log.limited(
                    ("tunnel path", str(error)), "tunnel: no socket for datagrams: %s", error
                )
            if conn is not None:
                conn.close()
            self._settle_dial(None)
        except BaseException:
            self._settle_dial(None)
            raise

    def _start(self, conn: PacketConn, destination: Destination) -> None:
        """Raises DialError if there is no thread, or the session has ended."""
        origin, name = ConnOrigin(conn, self.submit), "tunnel-path"
        reader = threading.Thread(target=self._read, args=(origin,), name=name, daemon=True)
        remote = Remote(conn.send, destination)
        with self._lock:
            if self._closed:
                raise DialError(Reason.GENERAL, said="the session has ended")
            try:
                reader.start()
            except RuntimeError as error:
                raise DialError(Reason.GENERAL, said=str(error)) from error
            self.origin, self._reader, self._remote = origin, reader, remote
            self._is_dialling = False
            paths = list(self._paths.values())
        for path in paths:
            path.lead_to(remote)

    def _settle_dial(self, remote: Remote | None) -> None:
        with self._lock:
            self._is_dialling, self._next_dial = False, time.monotonic() + AGAIN_SECONDS
            self.origin = self._reader = None
            self._remote = remote
            paths = [] if self._closed else list(self._paths.values())
        for path in paths:
            path.lead_to(remote)
        if self.direct is not None:
            self.direct.lose_socket()

    def _read(self, origin: ConnOrigin) -> None:
        """Read the socket until it ends, and close it.  Thread: tunnel-path."""
        arenas, conn = self.services.arenas, origin.conn
        while conn.wait():
            arena = arenas.take()
            try:
                self.table.take(conn.receive(arena), origin)
            except Exception:
                # A fault in one batch must not end the path.
                self.services.counter.count("drops", "internal error")
                self.services.log.exception("taking packets of a tunnel's path")
            finally:
                arenas.give(arena)
        self._settle_dial(None)
        conn.close()

    def close(self) -> None:
        """End all paths: the session with the bridge has ended."""
        with self._lock:
            self._closed = True
            origin, reader, paths = self.origin, self._reader, list(self._paths.values())
            self._paths.clear()
        self._attacher.close()
        for path in paths:
            self.drop(path)
        if self.direct is not None:
            self.direct.close()
        self.stop()
        if origin is not None and reader is not None:
            origin.conn.shutdown()
            reader.join(JOIN_SECONDS)

    # -- what the paths know of the network (control.watch.PathSigns)

    def _all(self) -> list[Path]:
        with self._lock:
            return list(self._paths.values())

    @property
    def is_up(self) -> bool:
        """Whether datagrams go by UDP."""
        return any(path.up for path in self._all())

    @property
    def last_heard(self) -> float:
        """When the bridge has last asked or answered by a path, in monotonic seconds."""
        return max((path.last_heard for path in self._all() if path.up), default=-math.inf)

    def probe(self) -> None:
        """Ask the bridge at once whether the paths that are up work."""
        for path in self._all():
            path.probe()

    def take_moved(self) -> bool:
        """Return whether the bridge has seen the agent move since the last call."""
        has_moved, self._has_moved = self._has_moved, False
        return has_moved

    def agent_moved(self) -> None:
        """Note that the bridge sees the agent at another address."""
        self._has_moved = True

    def left_alone(self, path: Path, flow: PathFlow) -> None:
        """Attach another work connection to a flow whose own has failed."""
        self._attacher.add(path.number, flow)
        self._attacher.fill()

    # -- for people

    def describe(self) -> dict[str, object] | None:
        """Return the path that carries most, for netproxyctl; None if there is none."""
        rows = [path.describe() for path in self._all()]
        rows.sort(key=lambda row: (row["up"], row["sent"] + row["received"]))
        return {**rows[-1]} if rows else None

    def names(self, path: Path) -> str:
        """Return whose datagrams a path carries, for the log."""
        return "of the bridge"
