"""Decides whether a path is up, what to ask the other side, and when: a state machine.

Pure: the owner passes the time, in monotonic seconds, sends what tick() asks for, and guards it.
A path that is up carries datagrams; those of a path that is down go by the stream.
"""

from __future__ import annotations

import math

from netproxy.protocol.tunnels.path import BASE_PACKET
from netproxy.tunnel.path.mtu import MtuSearch
from netproxy.typed import NamedTuple, Sequence

PROBE_SECONDS = 0.5
"""Between two PINGs while datagrams pass, or one is not answered."""

DOUBT_SECONDS = 0.25
"""Between two PINGs while two or more are not answered: of so many in DOWN_SECONDS one arrives,
with its answer, unless a third of all packets is lost."""

DOWN_SECONDS = 2.0
"""A PING that is not answered for so long takes the path down, with PROBE_SECONDS less than 3 s
after the last packet that has passed."""

ACTIVE_SECONDS = 2.0
"""Datagrams have passed in the last so many seconds: the path is in use."""

AGENT_KEEPALIVE, BRIDGE_KEEPALIVE = 25.0, 40.0
"""Seconds of silence until a side sends a PING.  The agent's is below the 30 s after which common
NATs forget a silent UDP mapping; the bridge's only finds an agent that is gone."""

RETRY_FIRST, RETRY_LIMIT = 1.0, 10.0
"""Seconds between the agent's PINGs on a path that is down: at first, and in the end."""

ANSWER_LIMIT = 10.0
"""A PING is not waited for any longer."""

PINGS_LIMIT = 64
"""PINGs that are waited for at once."""

LOSS_PACKETS, LOSS_SECONDS = 500, 10.0
"""The loss is computed anew after so many packets or seconds."""


class Tries(NamedTuple):
    """How a side that begins sends PINGs on a path that is down."""

    first: float = RETRY_FIRST
    """Seconds until the second PING; each further one takes twice as long."""
    longest: float = RETRY_LIMIT
    """Seconds between two PINGs in the end."""
    seconds: float = math.inf
    """For so long after PathMonitor.try_now(); inf: for ever."""


FOR_EVER = Tries()


class PingOrder(NamedTuple):
    """A PING that is to be sent."""

    packet: int = 0
    """Bytes of its packet, 0 for the fewest."""
    measures: bool = False
    """True if it tries a size: it may be lost without fault."""


class SentPing(NamedTuple):
    """A PING that waits for its PONG."""

    order: PingOrder
    sent: float
    packets: int
    """Packets that this side had sent with the key, the PING included."""


class PathMonitor:
    """The state of one path, as one side sees it.

    ======  ==================================  ===========================================
    state   what is sent                        it ends
    ======  ==================================  ===========================================
    down    agent: PING of BASE_PACKET bytes,   with the answer to a PING of BASE_PACKET
            less and less often; bridge: one    bytes
            for a PING of the agent
    up      PING after silence, often if in     if a PING is not answered for DOWN_SECONDS,
            use; PINGs of larger sizes          or those of BASE_PACKET bytes are not
    ======  ==================================  ===========================================
    """

    __slots__ = (
        *("up", "rtt", "loss", "mtu", "_initiates", "_keepalive", "_pings", "_last_ping"),
        *("last_heard", "_last_active", "_next_try", "_retry", "_counted", "_counted_at"),
        *("_tries", "_tries_until"),
    )

    def __init__(self, initiates: bool, now: float, tries: Tries = FOR_EVER) -> None:
        """`initiates`: this side is the agent, or both sides begin; it `tries` so."""
        self.up = False
        self.rtt = 0.0
        """Seconds there and back, smoothed; 0 if not known."""
        self.loss = 0.0
        """The part of this side's packets that has not arrived lately."""
        self.mtu = MtuSearch()
        self._initiates = initiates
        self._keepalive = AGENT_KEEPALIVE if initiates else BRIDGE_KEEPALIVE
        self._pings: dict[bytes, SentPing] = {}
        self._last_ping = self._last_active = -math.inf
        self.last_heard = now
        """When the other side has last asked or answered."""
        self._next_try, self._retry = now if initiates else math.inf, tries.first
        self._tries, self._tries_until = tries, now + tries.seconds
        # Packets sent and received when the loss was last computed.
        self._counted, self._counted_at = (0, 0), now

    # -- time

    def due(self) -> float:
        """Return when tick() is to be called next, unless datagrams begin to pass before."""
        if not self.up:
            return self._next_try
        if self.is_probing(self._last_ping):
            return min(self._next_ping(self._last_ping), self.mtu.due)
        # An idle path is not measured, once its size has been found.
        measured = self.mtu.due if self.mtu.is_searching else math.inf
        return min(self._next_ping(self._last_ping), measured)

    def is_probing(self, now: float) -> bool:
        """Return whether the path is in use, or in doubt."""
        return now - self._last_active < ACTIVE_SECONDS or self._unanswered() is not None

    def _next_ping(self, now: float) -> float:
        if self.is_probing(now):
            unanswered = self._unanswered()
            in_doubt = unanswered is not None and unanswered < self._last_ping
            return self._last_ping + (DOUBT_SECONDS if in_doubt else PROBE_SECONDS)
        return max(self._last_ping, self.last_heard) + self._keepalive

    def tick(self, now: float, is_active: bool, is_large: bool) -> Sequence[PingOrder]:
        """Return the PINGs to be sent; the path may be down afterwards.

        `is_active`: datagrams have passed since the last call; `is_large`: among them packets
        above SMALL_PACKET.
        """
        if is_active:
            self._last_active = now
        self._forget(now)
        if not self.up:
            return self._try_again(now)
        unanswered = self._unanswered()
        orders = [PingOrder()] if now >= self._next_ping(now) else []
        if packet := self.mtu.tick(now, is_large):
            orders.append(PingOrder(packet, True))
        if self.mtu.is_blocked or (unanswered is not None and now - unanswered >= DOWN_SECONDS):
            self.go_down(now)
            return ()
        return orders

    def _try_again(self, now: float) -> Sequence[PingOrder]:
        if now < self._next_try:
            return ()
        if now >= self._tries_until:
            self._next_try = math.inf
            return ()
        longest = self._tries.longest
        self._next_try, self._retry = now + self._retry, min(longest, 2 * self._retry)
        return (PingOrder(BASE_PACKET),)

    def go_down(self, now: float) -> None:
        """Carry no datagrams until a PING is answered again."""
        self.up = False
        self._pings.clear()
        self._retry = self._tries.first
        if self._initiates:
            self._next_try = now + self._retry

    def moved(self, largest_packet: int, now: float) -> bool:
        """Note that packets lead to another address; return whether the path is up.

        Only what is sent from now on proves anything of it.  `largest_packet`: bytes.
        """
        self._pings.clear()
        self._last_ping = -math.inf
        self.mtu.limit = largest_packet
        self.mtu.restart(now)
        return self.up

    def try_now(self, now: float) -> None:
        """Try at once, if the path is down: the other side, or its address, is new."""
        if self._initiates and not self.up:
            self._next_try, self._retry = now, self._tries.first
            self._tries_until = now + self._tries.seconds

    # -- what was sent and what has come

    def pinged(self, stamp: bytes, ping: SentPing) -> None:
        """Note a PING that was sent."""
        if len(self._pings) < PINGS_LIMIT:
            self._pings[stamp] = ping
        if not ping.order.measures:
            self._last_ping = ping.sent

    def heard(self, now: float) -> None:
        """Note a packet of the other side."""
        self.last_heard = now

    def answers_with_ping(self, now: float) -> bool:
        """Return whether this side, which has got a PING, should send its own as well."""
        return not self.up and not self._initiates and now - self._last_ping >= PROBE_SECONDS / 2

    def answered(self, stamp: bytes, received: int, now: float) -> bool:
        """Note a PONG; return False if no PING waits for it.

        `received`: this side's packets that had arrived.
        """
        ping = self._pings.pop(stamp, None)
        if ping is None:
            return False
        # Those before it are lost, or their answers are late: the path works.
        self._pings = {
            key: other
            for key, other in self._pings.items()
            if other.order.measures or other.sent > ping.sent
        }
        sample = now - ping.sent
        self.rtt = sample if not self.rtt else self.rtt + (sample - self.rtt) / 8
        self._count_loss(ping.packets, received, now)
        if not self.up and ping.order.packet == BASE_PACKET:
            self.up = True
            self.mtu.restart(now)
        elif ping.order.measures:
            self.mtu.answered(ping.order.packet, now)
        return True

    def renewed(self, now: float) -> None:
        """Note that another key is in use: packets are counted anew."""
        self._counted, self._counted_at = (0, 0), now
        self._pings.clear()

    def _unanswered(self) -> float | None:
        """Return when the oldest PING has left that waits for its answer; None if none does."""
        waiting = (ping.sent for ping in self._pings.values() if not ping.order.measures)
        return min(waiting, default=None)

    def _forget(self, now: float) -> None:
        self._pings = {
            stamp: ping for stamp, ping in self._pings.items() if now - ping.sent < ANSWER_LIMIT
        }

    def _count_loss(self, sent: int, received: int, now: float) -> None:
        before_sent, before_received = self._counted
        count = sent - before_sent
        if count >= LOSS_PACKETS or (count > 0 and now - self._counted_at >= LOSS_SECONDS):
            lost = count - (received - before_received)
            self.loss = min(1.0, max(0.0, lost / count))
            self._counted, self._counted_at = (sent, received), now
