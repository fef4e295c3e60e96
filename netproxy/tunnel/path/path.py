"""One path between agent and bridge: its keys, its state, where it leads, and its flows.

Each side has one Path object for a path.  Datagrams leave on the thread that has them, packets
come on the thread that reads the socket, and the keeper's thread calls tick().
"""

from __future__ import annotations

import os
import threading
import time

from netproxy.protocol.tunnels import path as codec
from netproxy.protocol.tunnels.path import OVERHEAD, Gone, Moved, Ping, Pong
from netproxy.tunnel.path.flows import FlowTable
from netproxy.tunnel.path.keys import PathKeys
from netproxy.tunnel.path.monitor import PathMonitor, PingOrder, SentPing
from netproxy.tunnel.path.mtu import SMALL_PACKET
from netproxy.tunnel.path.sealing import trains
from netproxy.typed import TYPE_CHECKING, Hashable

if TYPE_CHECKING:
    from netproxy.interfaces.answers import PathRow
    from netproxy.interfaces.datagrams import Arena, Run
    from netproxy.tunnel.path.dependencies import PathDependencies
    from netproxy.tunnel.path.flows import PathFlow
    from netproxy.tunnel.path.keys import Epoch
    from netproxy.tunnel.path.remote import Remote
    from netproxy.tunnel.path.sealing import Sealer


class Path:
    """A path, as one side sees it (flows.Carrier)."""

    def __init__(self, number: int, epoch: Epoch, dependencies: PathDependencies) -> None:
        """Begin with a path that is down, and leads nowhere before `remote` is set."""
        self.number = number
        self.flows = FlowTable(self)
        self.remote: Remote | None = None
        self.sent = self.received = 0
        """Bytes of packets."""
        self.is_resumable = False
        """True if the agent goes on with the session when its connections are lost."""
        self.too_long = 0
        """Datagrams that the stream has carried because they do not fit into a packet."""
        # The three when the owner was told of them.
        self._told = (0, 0, 0)
        self._owner, self._arenas, initiates, self._renewal, tries = dependencies
        # Guards _keys and _monitor.
        self._lock = threading.Lock()
        self._keys = PathKeys(epoch)
        self._monitor = PathMonitor(initiates, time.monotonic(), tries)
        # Read and written without the lock.  What the keeper is told: datagrams pass, large ones
        # do; and whether it sleeps for long.
        self._is_active = self._is_large = False
        self._is_quiet = True
        # Whether the agent is to be told that it has moved.
        self._has_moved = False
        self._room = 0
        """Bytes of the longest plaintext; 0: the path is down."""

    # -- sending; any thread

    @property
    def up(self) -> bool:
        """Whether datagrams go by the path."""
        return self._room > 0

    @property
    def holds_flows(self) -> bool:
        """Whether flows go on without a stream: the agent attaches another one."""
        return self.is_resumable and self.up

    def left_alone(self, flow: PathFlow) -> None:
        """Have another stream attached to a flow, if this side is the agent's."""
        self._owner.left_alone(self, flow)

    def send(self, arena: Arena, run: Run, prefix: bytes) -> bool:
        """Send datagrams, each behind `prefix`; return False if the path cannot carry them."""
        self.note_active()
        remote, room = self.remote, self._room
        if remote is None or not room:
            return False
        length, count = len(prefix) + run.length, len(run.offsets)
        if length > room:
            self.too_long += count
            return False
        packet = OVERHEAD + length
        if packet > SMALL_PACKET:
            self._is_large = True
        if not remote.may_send(count * packet):
            return False
        for train in trains(run, packet):
            self._send_train(remote, arena, train, prefix)
        return True

    def note_active(self) -> None:
        """Note that datagrams pass, in either direction, by the path or by streams."""
        self._is_active = True
        if self._is_quiet:
            self._is_quiet = False
            self._owner.wake()

    def _send_train(self, remote: Remote, arena: Arena, run: Run, prefix: bytes) -> None:
        with self._lock:
            sealer, counter = self._keys.take(len(run.offsets))
        into = self._arenas.take()
        try:
            packets, total = sealer.seal_run(arena, run, prefix, counter, into)
            remote.send(into, packets, remote.destination)
        finally:
            self._arenas.give(into)
        self.sent += total

    def _send_message(self, plain: bytes, key: tuple[Sealer, int] | None = None) -> None:
        """Send a message of the path if that leads anywhere; `key`: taken for it, None for none."""
        if key is None:
            with self._lock:
                key = self._keys.take(1)
        remote, (sealer, counter) = self.remote, key
        if remote is None or not remote.may_send(OVERHEAD + len(plain)):
            return
        into = self._arenas.take()
        try:
            remote.send(into, into.put(sealer.seal(plain, counter)), remote.destination)
        finally:
            self._arenas.give(into)
        self.sent += OVERHEAD + len(plain)

    def _ping(self, order: PingOrder, now: float) -> None:
        stamp = os.urandom(codec.STAMP_SIZE)
        with self._lock:
            key = self._keys.take(1)
            self._monitor.pinged(stamp, SentPing(order, now, key[1] + 1))
        self._send_message(codec.encode_ping(stamp, order.packet), key)

    # -- receiving; thread: one that reads a socket

    def open(self, epoch: Epoch, packet: memoryview, counter: int) -> tuple[bytes | str, bool]:
        """Return what is sealed in a packet, or the reason to drop it.

        Also whether it is the newest packet: then its sender is where the other side is.
        """
        opener = epoch.opener
        with self._lock:
            plain = opener.open(packet, counter)
            if isinstance(plain, str):
                return plain, False
            if epoch is not self._keys.current and self._keys.seen(epoch, time.monotonic()):
                self._monitor.renewed(time.monotonic())
            is_newest = epoch is self._keys.current and counter == opener.window.newest
        self.received += len(packet)
        return plain, is_newest

    def follow(self, remote: Remote) -> None:
        """Send to another address: the newest packet of the other side is from there."""
        self._has_moved = self.remote is not None
        self.remote = remote
        now = time.monotonic()
        with self._lock:
            was_up = self._monitor.moved(remote.largest_packet(), now)
        if was_up:
            self._settle("")
            self._ping(PingOrder(), now)
            self._owner.path_changed(self, "moved")

    def lead_to(self, remote: Remote | None, why: str = "no socket") -> None:
        """Send to an address that is known beforehand; None: nowhere, because of `why`."""
        self.remote = remote
        now = time.monotonic()
        with self._lock:
            if remote is None:
                self._monitor.go_down(now)
            else:
                self._monitor.moved(remote.largest_packet(), now)
                self._monitor.try_now(now)
        self._settle(why)
        self._owner.wake()

    def take_message(self, plain: bytes, epoch: Epoch, peer: Hashable) -> None:
        """Obey a message of the path.  Raises ProtocolError."""
        message, now = codec.parse_message(plain), time.monotonic()
        if isinstance(message, Ping):
            self._answer(message, epoch, now)
        elif isinstance(message, Pong):
            with self._lock:
                self._monitor.heard(now)
                is_answer = self._monitor.answered(message.stamp, message.received, now)
                has_more = self._monitor.mtu.is_searching
            remote = self.remote
            if is_answer and remote is not None and remote.peer in (None, peer):
                remote.validated = True
                self._tell_moved()
            self._settle("")
            if has_more:
                # The next size is tried at once.
                self._owner.wake()
        elif isinstance(message, Gone):
            self.flows.end(message.flow)
        elif isinstance(message, Moved):
            self._owner.agent_moved()

    def _tell_moved(self) -> None:
        """Tell the agent once that it has moved, as soon as it has answered from there."""
        has_moved, self._has_moved = self._has_moved, False
        if has_moved:
            self._send_message(codec.encode_moved())

    def no_flow(self, number: int) -> None:
        """Tell the other side that a flow is gone here: its TCP may not tell for minutes."""
        self.note_active()
        if self.flows.is_news(number):
            self._send_message(codec.encode_gone(Gone(number)))

    def _answer(self, ping: Ping, epoch: Epoch, now: float) -> None:
        with self._lock:
            self._monitor.heard(now)
            pings_back = self._monitor.answers_with_ping(now)
        self._send_message(codec.encode_pong(Pong(ping.stamp, epoch.opener.received)))
        if pings_back:
            self._ping(PingOrder(codec.BASE_PACKET), now)

    # -- keys

    def offer(self, epoch: Epoch) -> None:
        """Use a key as soon as the other side does."""
        with self._lock:
            before = self._keys.offer(epoch)
        if before is not None:
            self._owner.retire(before)

    def use(self, epoch: Epoch) -> None:
        """Use a key from now on."""
        now = time.monotonic()
        with self._lock:
            self._keys.use(epoch, now)
            self._monitor.renewed(now)
            self._monitor.try_now(now)
        if self.up:
            self._ping(PingOrder(), now)
        self._owner.wake()

    def probe(self) -> None:
        """Ask the other side at once whether the path works, if it is up."""
        if self.up:
            self._ping(PingOrder(), time.monotonic())
            self._owner.wake()

    def close(self) -> None:
        """Carry nothing any more."""
        self.remote, self._room = None, 0
        with self._lock:
            self._monitor.go_down(time.monotonic())
            epochs = self._keys.all()
        for epoch in epochs:
            self._owner.retire(epoch)
        self._count()
        self.flows.end_alone()

    # -- time; thread: the keeper's

    def tick(self, now: float) -> float:
        """Do what is due; return when to call again."""
        is_active, self._is_active = self._is_active, False
        is_large, self._is_large = self._is_large, False
        self.flows.forget_told()
        with self._lock:
            orders = self._monitor.tick(now, is_active, is_large)
            gone = self._keys.expire(now)
            needs_renewal = self._keys.needs_renewal(now, self._renewal)
        for epoch in gone:
            self._owner.retire(epoch)
        self._count()
        self._settle("no answer")
        for order in orders:
            self._ping(order, now)
        if needs_renewal:
            self._owner.renew(self)
        with self._lock:
            self._is_quiet = self._monitor.up and not self._monitor.is_probing(now)
            return self._monitor.due()

    def _count(self) -> None:
        """Tell what has been carried since the last call."""
        totals = (self.sent, self.received, self.too_long)
        self._owner.carried(*(now - before for now, before in zip(totals, self._told, strict=True)))
        self._told = totals

    @property
    def last_heard(self) -> float:
        """When the other side has last asked or answered, in monotonic seconds."""
        return self._monitor.last_heard

    def describe(self) -> PathRow:
        """Return the state for netproxyctl."""
        with self._lock:
            monitor = self._monitor
            return {
                "up": self.up,
                "rtt": monitor.rtt,
                "loss": monitor.loss,
                "mtu": monitor.mtu.size,
                "sent": self.sent,
                "received": self.received,
                "too_long": self.too_long,
                "flows": len(self.flows),
            }

    def _settle(self, why: str) -> None:
        """Let datagrams go the way that the monitor says; `why`: it is down for this reason."""
        with self._lock:
            was_up, monitor = self.up, self._monitor
            self._room = monitor.mtu.size - OVERHEAD if monitor.up else 0
        if was_up is not monitor.up:
            if was_up:
                self.flows.end_alone()
            self._owner.path_changed(self, why)
