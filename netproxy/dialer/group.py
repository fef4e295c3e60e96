"""A group of upstreams: the balance that orders its members, and what happens if a member fails.

A dial that fails goes to the next member; bytes are never sent twice.  Members that back off
are asked last; members that a health check marked down are not asked.  Thread: any.
"""

from __future__ import annotations

import threading
import time
import zlib
from operator import attrgetter

from netproxy.dialer.member import Member, MemberPacketConn
from netproxy.errors import DialError, Reason
from netproxy.net.connect import tell_step
from netproxy.typed import TYPE_CHECKING, Callable, Sequence, TypeVar

if TYPE_CHECKING:
    from netproxy.dialer.health import Check
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Dialer

T = TypeVar("T")

MEMBER_TRIES = 3
"""Members that one dial may ask."""
TIME_FACTOR = 1.5
"""The time limit of a group's dial, as a multiple of one dial's: a member that is silent to the
end leaves time for another one."""
_FINAL = frozenset({Reason.REFUSED, Reason.DENIED, Reason.LOOP})
"""What a proxy reports about the target and any other proxy would report, too."""


class GroupDialer:
    """A dialer that chooses one of its members for each flow."""

    refusal = Reason.UNSUPPORTED

    def __init__(self, name: str, members: Sequence[Member], balance: str, seconds: float) -> None:
        """`members` are in the order of the configuration, `seconds` limit one member's dial."""
        self.name = name
        self.members = tuple(members)
        self.balance = balance
        self.checks: Sequence[Check] = ()
        """The health checks of the members."""
        self.carries = frozenset().union(*(member.carries for member in members)) - {"bind"}
        self.resolves_names = all(member.resolves_names for member in members)
        self._seconds = seconds * TIME_FACTOR
        # Guards _turn and the members' credit.
        self._lock = threading.Lock()
        self._turn = 0

    @property
    def symmetric(self) -> bool:
        """True if a connection through some member is for one target."""
        return any(member.symmetric for member in self.members)

    @property
    def knows_bound(self) -> bool:
        """True if a connection through some member may know its public addresses."""
        return any(member.knows_bound for member in self.members)

    def dial(self, flow: Flow) -> Stream:
        """Connect through the first member that can.  Blocks.  Raises DialError."""
        member, stream = self._try_members(Member.dial, flow)
        stream.member = _joined(member, stream.member)
        return stream

    def dial_packet(self, flow: Flow) -> MemberPacketConn:
        """Open a packet connection through the first member that can.

        Blocks.  Raises DialError.
        """
        member, conn = self._try_members(Member.dial_packet, flow)
        conn.member = _joined(member, conn.member)
        return conn

    def fixed_for(self, flow: Flow) -> Dialer:
        """Return the member that the balance chooses; the group itself if there is none."""
        candidates = self._candidates(flow)
        return candidates[0].fixed_for(flow) if candidates else self

    def _try_members(self, dial: Callable[[Member, Flow], T], flow: Flow) -> tuple[Member, T]:
        """Return the first member whose dial succeeds, with the result."""
        deadline = time.monotonic() + self._seconds
        failures: list[tuple[str, DialError]] = []
        for member in self._candidates(flow)[:MEMBER_TRIES]:
            if failures and time.monotonic() > deadline:
                break
            tell_step("member", f"{member.name} of {self.name}")
            try:
                return member, dial(member, flow)
            except DialError as error:
                tell_step("failed", error)
                if not error.upstream and error.reason in _FINAL:
                    raise
                failures.append((member.name, error))
        if failures:
            raise self._all_failed(failures)
        raise self._nobody_asked(flow)

    def _all_failed(self, failures: list[tuple[str, DialError]]) -> DialError:
        errors = "; ".join(f"{name}: {error}" for name, error in failures)
        upstream = any(error.upstream for _, error in failures)
        tried = tuple(attempt for _, error in failures for attempt in error.tried)
        said, reason = f"no member could connect: {errors}", failures[-1][1].reason
        return self._error(reason, said, upstream, tried)

    def _nobody_asked(self, flow: Flow) -> DialError:
        able = [member for member in self.members if flow.network in member.carries]
        if not able:
            return self._error(Reason.UNSUPPORTED, f"no member carries {flow.network.upper()}")
        errors = "; ".join(f"{member.name}: {member.error}" for member in able)
        return self._error(Reason.GENERAL, f"all members are down: {errors}")

    def _error(
        self,
        reason: Reason,
        said: str,
        upstream: bool = True,
        tried: tuple[tuple[str, str], ...] = (),
    ) -> DialError:
        return DialError(reason, "", said, f"group '{self.name}'", upstream, tried=tried)

    def _candidates(self, flow: Flow) -> list[Member]:
        """Return the members to ask, in the balance's order; those that back off come last."""
        now = time.monotonic()
        able = [member for member in self.members if member.up and flow.network in member.carries]
        ready = [member for member in able if not member.backs_off(now)]
        backing_off = [member for member in able if member.backs_off(now)]
        return _BALANCES[self.balance](self, ready, flow) + backing_off

    # The balances.  Each returns the given members in the order in which they are asked.

    def _round_robin(self, members: list[Member], flow: Flow) -> list[Member]:
        with self._lock:
            self._turn += 1
            turn = self._turn % max(1, len(members))
        return members[turn:] + members[:turn]

    def _weighted(self, members: list[Member], flow: Flow) -> list[Member]:
        """Smooth weighted round robin: the first one pays the sum of the weights.

        Each call first gives each member its weight in credit; the highest credit is first.
        """
        with self._lock:
            for member in members:
                member.credit += member.weight
            ordered = sorted(members, key=lambda member: -member.credit)
            if ordered:
                ordered[0].credit -= sum(member.weight for member in members)
        return ordered

    def _least_connections(self, members: list[Member], flow: Flow) -> list[Member]:
        return sorted(self._round_robin(members, flow), key=attrgetter("live"))

    def _least_latency(self, members: list[Member], flow: Flow) -> list[Member]:
        """Members of unknown latency (0) come first, so that it becomes known."""
        return sorted(self._round_robin(members, flow), key=attrgetter("latency"))

    def _failover(self, members: list[Member], flow: Flow) -> list[Member]:
        return members

    def _hash_client(self, members: list[Member], flow: Flow) -> list[Member]:
        return _by_hash(members, flow.client.host)

    def _hash_target(self, members: list[Member], flow: Flow) -> list[Member]:
        return _by_hash(members, flow.target.host)


def _joined(member: Member, inner: str) -> str:
    """Return the member's name in records; `inner` is that of a group within it."""
    return f"{member.name}/{inner}" if inner else member.name


def _by_hash(members: list[Member], key: str) -> list[Member]:
    """Rendezvous hashing: a member that comes or goes moves only its own share of the keys."""
    return sorted(members, key=lambda member: _hash(f"{member.name}\0{key}"), reverse=True)


def _hash(text: str) -> int:
    """Return 32 bits, the same in every process.

    CRC-32 alone would order all keys alike, so its bits are mixed (MurmurHash3's finalizer).
    """
    value = zlib.crc32(text.encode())
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        value = ((value ^ value >> 16) * factor) & 0xFFFFFFFF
    return value ^ value >> 16


_BALANCES: dict[str, Callable[[GroupDialer, list[Member], Flow], list[Member]]] = {
    "round-robin": GroupDialer._round_robin,
    "weighted": GroupDialer._weighted,
    "least-connections": GroupDialer._least_connections,
    "least-latency": GroupDialer._least_latency,
    "hash-client": GroupDialer._hash_client,
    "hash-target": GroupDialer._hash_target,
    "failover": GroupDialer._failover,
}
