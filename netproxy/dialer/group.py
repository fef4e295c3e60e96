"""Several ways out as one: which of them takes a flow, and what happens when one fails.

A dial that fails goes to the next member; bytes never do.  A member whose proxy
failed rests, longer each time, and is asked only when no other is left; one that
a health check found dead is not asked at all.  Members outlive a reload.
"""

from __future__ import annotations

import math
import threading
import time
import zlib
from typing import Any, Callable, Sequence

from netproxy.errors import DialError, Reason
from netproxy.interfaces.datagrams import PacketConn
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Dialer
from netproxy.net.stream import Stream

REST_SECONDS, REST_LIMIT = 1.0, 60.0  # of a member that failed: doubled with each failure in a row
TRIES = 3  # members that one dial may ask
PATIENCE = 1.5  # of the time that a dial may take: one member that is silent to the end leaves some for another
LATENCY_WEIGHT = 0.2  # of the newest dial in a member's average
# What a proxy says of the target: another one would say the same
_FINAL = frozenset({Reason.REFUSED, Reason.DENIED, Reason.LOOP})


class Member:
    """A way out, of a group or by itself, and what is known of it: a Dialer around another.

    Its figures are guarded by its lock, but for what only reads.
    """

    def __init__(
        self, name: str, dialer: Dialer, weight: int = 1, groups: Sequence[GroupDialer] = ()
    ) -> None:
        """`groups`: those on its way."""
        self.name = name
        self.dialer = dialer
        self.carries, self.refusal, self.symmetric = (
            dialer.carries,
            dialer.refusal,
            dialer.symmetric,
        )
        self.resolves_names = dialer.resolves_names
        self.weight = weight
        self.groups = groups
        self.up = True  # as far as health checks know
        self.checked_at = 0.0  # the last check began (monotonic)
        self.checking = False
        self.live = 0  # connections and UDP sessions
        self.dialled = self.failed = 0  # in total
        self.latency = 0.0  # seconds, an average of its dials; 0: not known
        self.error = ""  # the last
        self._lock = threading.Lock()
        self._failures = 0  # in a row
        self._failed_at = -1.0  # the last of them (monotonic)
        self._rests_until = 0.0
        self.credit = 0  # of the weighted balance; guarded by the group's lock

    def rests(self, now: float) -> bool:
        return now < self._rests_until

    def dial(self, flow: Flow) -> Stream:
        stream = self._try(lambda: self.dialer.dial(flow))
        stream.on_close(self._leave)
        return stream

    def dial_packet(self, flow: Flow) -> PacketConn:
        conn: Any = self._try(lambda: self.dialer.dial_packet(flow))
        close, left = conn.close, threading.Lock()

        def close_and_leave() -> None:
            close()
            if left.acquire(blocking=False):  # the first time
                self._leave()

        conn.close = close_and_leave
        return conn

    def fixed_for(self, flow: Flow) -> Dialer:
        inner = self.dialer.fixed_for(flow)
        return self if inner is self.dialer else inner

    def _try(self, dial: Callable[[], Any]) -> Any:
        started = time.monotonic()
        try:
            made = dial()
        except DialError as error:
            self.note_failure(error, started)
            raise
        took = time.monotonic() - started
        with self._lock:
            self.dialled += 1
            self.live += 1
            self._failures = 0
            self._rests_until = 0.0
            self.latency += (took - self.latency) * (LATENCY_WEIGHT if self.latency else 1.0)
        return made

    def note_failure(self, error: DialError, started: float = math.inf) -> None:
        """A failure of the target's is none of the member's, and dials that fail together are one failure in a row."""
        now = time.monotonic()
        with self._lock:
            self.dialled += 1
            if error.upstream:
                self.failed += 1
                self.error = str(error)
                if started > self._failed_at:
                    self._failures += 1
                    self._rests_until = now + min(
                        REST_LIMIT, REST_SECONDS * 2.0 ** min(self._failures - 1, 16)
                    )
                    self._failed_at = now

    def note_check(self, error: str) -> bool:
        """What a health check found, "" for a member that is well; whether that is news."""
        with self._lock:
            news = self.up == bool(error)
            self.up = not error
            self.error = error or self.error
            if self.up:
                self._failures, self._rests_until = 0, 0.0
            self.checking = False
        return news

    def _leave(self) -> None:
        with self._lock:
            self.live -= 1

    @property
    def state(self) -> str:
        """In a word, for people."""
        if not self.up:
            return "down"
        return (
            "failing" if self._failures else "up" if self.dialled or self.checked_at else "unused"
        )


class GroupDialer:
    """A Dialer.  Its members are in the order of the configuration."""

    refusal = Reason.UNSUPPORTED

    def __init__(self, name: str, members: Sequence[Member], balance: str, seconds: float) -> None:
        """`seconds` that a dial may take."""
        self.name = name
        self.members = tuple(members)
        self.balance = balance
        self.checks: Sequence[Any] = ()  # what health asks of its members
        self.carries = frozenset().union(*(member.carries for member in members)) - {"bind"}
        self.symmetric = any(member.symmetric for member in members)
        self.resolves_names = all(member.resolves_names for member in members)
        self._patience = seconds * PATIENCE
        self._lock = threading.Lock()  # guards _turn and the members' credit
        self._turn = 0

    def dial(self, flow: Flow) -> Stream:
        return self._first(flow, Member.dial)

    def dial_packet(self, flow: Flow) -> PacketConn:
        return self._first(flow, Member.dial_packet)

    def fixed_for(self, flow: Flow) -> Dialer:
        candidates = self._candidates(flow)
        return candidates[0].fixed_for(flow) if candidates else self

    def _first(self, flow: Flow, dial: Callable[[Member, Flow], Any]) -> Any:
        """What the first member gives that can."""
        deadline = time.monotonic() + self._patience
        failures: list[tuple[str, DialError]] = []
        for member in self._candidates(flow)[:TRIES]:
            if failures and time.monotonic() > deadline:
                break
            try:
                return dial(member, flow)
            except DialError as error:
                if not error.upstream and error.reason in _FINAL:
                    raise
                failures.append((member.name, error))
        raise self._failure(flow, failures)

    def _failure(self, flow: Flow, failures: list[tuple[str, DialError]]) -> DialError:
        if not failures:
            able = [member for member in self.members if flow.network in member.carries]
            said = (
                "no live member: " + "; ".join(f"{member.name}: {member.error}" for member in able)
                if able
                else (f"no member carries {flow.network.upper()}")
            )
            failure = DialError(Reason.GENERAL if able else Reason.UNSUPPORTED, said=said)
        else:
            failure = DialError(
                failures[-1][1].reason,
                said="no member could: "
                + "; ".join(f"{name}: {error}" for name, error in failures),
            )
        failure.hop = f"group '{self.name}'"
        failure.upstream = not failures or any(error.upstream for _, error in failures)
        return failure

    def _candidates(self, flow: Flow) -> list[Member]:
        """Who is asked, in this order: the balance's, those that rest last."""
        now = time.monotonic()
        able = [member for member in self.members if member.up and flow.network in member.carries]
        awake = [member for member in able if not member.rests(now)]
        resting = [member for member in able if member.rests(now)]
        return _ORDERS[self.balance](self, awake, flow) + resting

    # -- balances

    def _in_turn(self, members: list[Member], flow: Flow) -> list[Member]:
        with self._lock:
            self._turn += 1
            turn = self._turn % max(1, len(members))
        return members[turn:] + members[:turn]

    def _by_weight(self, members: list[Member], flow: Flow) -> list[Member]:
        """Each turn gives everybody its weight in credit, and the richest pays for all."""
        with self._lock:
            for member in members:
                member.credit += member.weight
            ordered = sorted(members, key=lambda member: -member.credit)
            if ordered:
                ordered[0].credit -= sum(member.weight for member in members)
        return ordered

    def _least_busy(self, members: list[Member], flow: Flow) -> list[Member]:
        return sorted(self._in_turn(members, flow), key=lambda member: member.live)

    def _nearest(self, members: list[Member], flow: Flow) -> list[Member]:
        """Who is not known yet goes first, once."""
        return sorted(self._in_turn(members, flow), key=lambda member: member.latency)

    def _as_written(self, members: list[Member], flow: Flow) -> list[Member]:
        return members

    def _by_client(self, members: list[Member], flow: Flow) -> list[Member]:
        return _by_hash(members, flow.client.host)

    def _by_target(self, members: list[Member], flow: Flow) -> list[Member]:
        return _by_hash(members, flow.target.host)


def _by_hash(members: list[Member], key: str) -> list[Member]:
    """Rendezvous hashing: where a member goes or comes, only what was or will be its moves."""
    return sorted(members, key=lambda member: _mixed(f"{member.name}\0{key}"), reverse=True)


def _mixed(text: str) -> int:
    """32 bits, the same in every process; CRC-32 alone would order all keys alike."""
    value = zlib.crc32(text.encode())
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        value = ((value ^ value >> 16) * factor) & 0xFFFFFFFF
    return value ^ value >> 16


_ORDERS: dict[str, Callable[[GroupDialer, list[Member], Flow], list[Member]]] = {
    "round-robin": GroupDialer._in_turn,
    "weighted": GroupDialer._by_weight,
    "least-connections": GroupDialer._least_busy,
    "least-latency": GroupDialer._nearest,
    "hash-client": GroupDialer._by_client,
    "hash-target": GroupDialer._by_target,
    "failover": GroupDialer._as_written,
}
